package exec

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"innkeeper/guest/account"
	"innkeeper/guest/link"
	"innkeeper/guest/reaper"
	"innkeeper/guest/terminal"
)

// Request is the exec verb.
type Request struct {
	ID             string            `json:"id"`
	Argv           []string          `json:"argv"`
	Shell          *string           `json:"shell"`
	Cell           *Cell             `json:"cell"`
	User           string            `json:"user"`
	Cwd            string            `json:"cwd"`
	Env            map[string]string `json:"env"`
	Stdin          bool              `json:"stdin"`
	Merge          bool              `json:"merge"`
	Pty            *terminal.Size    `json:"pty"`
	TimeoutMs      int64             `json:"timeout_ms"`
	DetachOnCancel bool              `json:"detach_on_cancel"`
	ExactEnv       bool              `json:"exact_env"`
}

const idBytes = 64

func (r *Request) check() error {
	switch {
	case r.ID == "" || len(r.ID) > idBytes:
		return link.Errorf("bad_request", "exec: an id has 1 to %d characters", idBytes)
	case r.Cell != nil:
		if err := r.checkCell(); err != nil {
			return err
		}
	case (r.Shell == nil) == (len(r.Argv) == 0):
		return link.Errorf("bad_request", "exec: either argv or shell")
	case r.TimeoutMs < 0:
		return link.Errorf("bad_request", "exec: timeout_ms is negative")
	}
	words := append([]string{r.Cwd}, r.Argv...)
	if r.Shell != nil {
		words = append(words, *r.Shell)
	}
	for name, value := range r.Env {
		if name == "" || strings.Contains(name, "=") {
			return link.Errorf("bad_request", "exec: %q cannot name a variable", name)
		}
		words = append(words, name, value)
	}
	for _, word := range words {
		if strings.IndexByte(word, 0) >= 0 {
			return link.Errorf("bad_request", "exec: NUL in a word")
		}
	}
	return nil
}

func (r *Request) checkCell() error {
	switch {
	case r.Shell != nil || len(r.Argv) > 0 || r.Pty != nil || r.Cwd != "" || r.ExactEnv:
		return link.Errorf("bad_request", "exec: a cell goes without argv, shell, pty, cwd and exact_env")
	case r.Cell.Kernel == "" || len(r.Cell.Kernel) > idBytes:
		return link.Errorf("bad_request", "exec: a kernel's name has 1 to %d characters", idBytes)
	}
	return nil
}

// plan is a request with everything looked up.
type plan struct {
	user        account.User
	directory   string
	environment []string
	path        string
	argv        []string
	stamp       string // of the profile files
}

// plan decides user, environment, directory and program.
func (t *Table) plan(request *Request) (*plan, error) {
	settings := t.Settings()
	name := request.User
	if name == "" {
		name = settings.User
	}
	user, err := account.Lookup(name)
	if err != nil {
		return nil, err
	}
	made := &plan{user: user, directory: request.Cwd}
	if request.ExactEnv {
		// No profile file is read: what an image is built with must not depend on who would log in to it.
		made.environment = Merge([]string{"HOME=" + user.Home}, request.Env)
	} else {
		login, stamp := t.logins.Environment(user)
		made.stamp = stamp
		made.environment = Merge(login, settings.Env, request.Env)
	}
	if request.Pty != nil && value(made.environment, "TERM") == "" {
		made.environment = append(made.environment, "TERM=xterm-256color")
	}
	if made.directory == "" {
		made.directory = defaultDirectory(settings, user)
	}
	if request.Shell == nil {
		made.argv = request.Argv
		made.path, err = lookPath(request.Argv[0], value(made.environment, "PATH"), made.directory)
		return made, err
	}
	if made.path = account.BashPath(); made.path != "" {
		made.argv = []string{"bash", "-c", *request.Shell}
	} else if made.path = account.ShellPath(); made.path != "" {
		made.argv = []string{"sh", "-c", *request.Shell}
	} else if words := plainWords(*request.Shell); words != nil {
		// No shell would make anything else of it, so an image without one runs its programs all the same.
		made.argv = words
		made.path, err = lookPath(words[0], value(made.environment, "PATH"), made.directory)
		return made, err
	} else {
		return nil, link.Errorf("bad_request", "the image has no shell (neither bash nor sh), so only a program with plain arguments can be run")
	}
	return made, nil
}

func defaultDirectory(settings Settings, user account.User) string {
	for _, directory := range []string{settings.Workdir, user.Home} {
		if directory == "" {
			continue
		}
		if information, err := os.Stat(directory); err == nil && information.IsDir() {
			return directory
		}
	}
	return "/"
}

// Merge lays variables over an environment, later ones winning.
func Merge(environment []string, layers ...map[string]string) []string {
	merged := append([]string(nil), environment...)
	at := make(map[string]int, len(merged))
	for index, entry := range merged {
		name, _, _ := strings.Cut(entry, "=")
		at[name] = index
	}
	for _, layer := range layers {
		for name, value := range layer {
			if index, ok := at[name]; ok {
				merged[index] = name + "=" + value
				continue
			}
			at[name] = len(merged)
			merged = append(merged, name+"="+value)
		}
	}
	return merged
}

func value(environment []string, name string) string {
	for _, entry := range environment {
		if strings.HasPrefix(entry, name+"=") {
			return entry[len(name)+1:]
		}
	}
	return ""
}

// lookPath finds a program as execvp does.
func lookPath(name, path, directory string) (string, error) {
	if strings.Contains(name, "/") {
		return name, nil
	}
	for _, folder := range filepath.SplitList(path) {
		if !filepath.IsAbs(folder) {
			folder = filepath.Join(directory, folder)
		}
		if candidate := filepath.Join(folder, name); name != "" && account.IsExecutable(candidate) {
			return candidate, nil
		}
	}
	return "", link.Errorf("not_found", "%s: command not found", name)
}

// descriptors are the files of a process that is about to start: its own three and the agent's ends.
type descriptors struct {
	child   [3]*os.File
	outputs []*os.File
	kinds   []byte
	input   *os.File
	pty     *os.File
	close   []*os.File // the child's ends that the agent must not keep
}

func (d *descriptors) release() {
	for _, file := range d.close {
		_ = file.Close()
	}
	d.close = nil
}

func (d *descriptors) abandon() {
	d.release()
	for _, file := range append(d.outputs, d.input) {
		if file != nil {
			_ = file.Close()
		}
	}
}

// pipe returns an end for the agent, which does not block, and one for the child, which does.
func pipe(childReads bool) (own, child *os.File, err error) {
	var ends [2]int
	if err := syscall.Pipe2(ends[:], syscall.O_CLOEXEC); err != nil {
		return nil, nil, os.NewSyscallError("pipe2", err)
	}
	ownEnd, childEnd := ends[0], ends[1]
	if childReads {
		ownEnd, childEnd = childEnd, ownEnd
	}
	if err := syscall.SetNonblock(ownEnd, true); err != nil {
		return nil, nil, os.NewSyscallError("fcntl", err)
	}
	return os.NewFile(uintptr(ownEnd), "pipe"), os.NewFile(uintptr(childEnd), "pipe"), nil
}

func (t *Table) describe(request *Request) (*descriptors, error) {
	d := &descriptors{}
	if request.Pty != nil {
		master, slave, err := terminal.Open(*request.Pty)
		if err != nil {
			return nil, err
		}
		d.child = [3]*os.File{slave, slave, slave}
		d.close = []*os.File{slave}
		d.outputs, d.kinds = []*os.File{master}, []byte{link.Data}
		d.input, d.pty = master, master
		return d, nil
	}
	d.child[0] = t.null
	if request.Stdin {
		own, child, err := pipe(true)
		if err != nil {
			return nil, err
		}
		d.child[0], d.input, d.close = child, own, append(d.close, child)
	}
	kinds := []byte{link.Data, link.Data2}
	if request.Merge {
		kinds = kinds[:1]
	}
	for index, kind := range kinds {
		own, child, err := pipe(false)
		if err != nil {
			d.abandon()
			return nil, err
		}
		d.child[index+1], d.close = child, append(d.close, child)
		d.outputs, d.kinds = append(d.outputs, own), append(d.kinds, kind)
	}
	if request.Merge {
		d.child[2] = d.child[1]
	}
	return d, nil
}

// start makes the process of a request; it does not run its reader.
func (t *Table) start(request *Request) (*Process, error) {
	if err := request.check(); err != nil {
		return nil, err
	}
	p := t.newProcess(request.ID)
	if err := t.claim(p); err != nil {
		return nil, err
	}
	err := t.launch(p, request)
	if err != nil {
		t.disown(p)
		return nil, err
	}
	return p, nil
}

func (t *Table) newProcess(id string) *Process {
	p := &Process{ID: id, table: t, begun: time.Now()}
	p.space = sync.NewCond(&p.mu)
	return p
}

func (t *Table) launch(p *Process, request *Request) error {
	if request.Cell != nil {
		return t.launchCell(p, request)
	}
	made, err := t.plan(request)
	if err != nil {
		return err
	}
	t.spares.plan(spareDelayRunning)
	if request.ExactEnv {
		return t.launchPlan(p, request, made, nil)
	}
	var direct *plan
	if request.Shell != nil {
		direct = made.direct(*request.Shell)
	}
	if direct == nil && t.spares.take(p, request, made) {
		return nil
	}
	return t.launchPlan(p, request, made, direct)
}

func (t *Table) launchPlan(p *Process, request *Request, made, direct *plan) error {
	d, err := t.describe(request)
	if err != nil {
		return err
	}
	attributes := &syscall.ProcAttr{
		Dir: made.directory, Env: made.environment,
		Files: []uintptr{d.child[0].Fd(), d.child[1].Fd(), d.child[2].Fd()},
		Sys:   &syscall.SysProcAttr{Setsid: true, Setctty: d.pty != nil, Credential: made.user.Credential()},
	}
	p.begun = time.Now()
	child, err := t.spawn(made, direct, attributes)
	if err == syscall.ENOEXEC {
		// A script without an interpreter line: what execvp and shells do.
		if shell := account.ShellPath(); shell != "" {
			argv := append([]string{"sh", made.path}, made.argv[1:]...)
			child, err = t.children.Start(shell, argv, attributes)
		}
	}
	if err != nil {
		d.abandon()
		return spawnError(err, made)
	}
	d.release()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.child, p.pty, p.input, p.hasInput = child, d.pty, d.input, d.input != nil
	for index, file := range d.outputs {
		if err := p.addOutput(file, d.kinds[index]); err != nil {
			return err
		}
	}
	return nil
}

// spawn tries the way without a shell first; whatever goes wrong there is the shell's to judge and to put into words.
func (t *Table) spawn(made, direct *plan, attributes *syscall.ProcAttr) (*reaper.Child, error) {
	if direct != nil {
		shorter := *attributes
		shorter.Env = direct.environment
		if child, err := t.children.Start(direct.path, direct.argv, &shorter); err == nil {
			return child, nil
		}
	}
	return t.children.Start(made.path, made.argv, attributes)
}

// spawnError says whether the directory or the program was at fault: the kernel gives one number for both.
func spawnError(err error, made *plan) error {
	if information, statError := os.Stat(made.directory); statError != nil {
		return link.Errorf("not_found", "the working directory %s: %v", made.directory, errors.Unwrap(statError))
	} else if !information.IsDir() {
		return link.Errorf("not_a_directory", "the working directory %s is not a directory", made.directory)
	}
	code := "spawn_failed"
	if err == syscall.ENOENT {
		code = "not_found"
	}
	return link.Errorf(code, "%s: %v", made.argv[0], err)
}

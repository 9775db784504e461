package sudo

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"innkeeper/guest/account"
	"innkeeper/guest/reaper"
	"innkeeper/guest/terminal"
)

const (
	securePath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	hangUp     = 200 * time.Millisecond
	askTimeout = 10 * time.Second
)

// Server is PID 1's side.
type Server struct {
	children   *reaper.Table
	configured func() string // the user who may

	mu       sync.Mutex
	allowed  bool
	listener *net.UnixListener
}

// NewServer starts commands through children for the user that configured names.
func NewServer(children *reaper.Table, configured func() string) *Server {
	return &Server{children: children, configured: configured}
}

// Allow opens or closes it. The socket stays once made: refusing in words is kinder than a missing file.
func (s *Server) Allow(allowed bool) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.allowed = allowed
	if !allowed || s.listener != nil {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(SocketPath), 0o755); err != nil {
		return err
	}
	_ = os.Remove(SocketPath)
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: SocketPath, Net: "unix"})
	if err != nil {
		return err
	}
	if err := os.Chmod(SocketPath, 0o666); err != nil {
		_ = listener.Close()
		return err
	}
	s.listener = listener
	go s.accept(listener)
	return nil
}

func (s *Server) accept(listener *net.UnixListener) {
	for {
		connection, err := listener.AcceptUnix()
		if err != nil {
			time.Sleep(10 * time.Millisecond) // out of descriptors, say
			continue
		}
		go s.serve(connection)
	}
}

func (s *Server) serve(connection *net.UnixConn) {
	defer connection.Close()
	_ = connection.SetDeadline(time.Now().Add(askTimeout))
	// gVisor answers SO_PEERCRED with the asking process's own ids, so the identity comes with the message.
	// The client speaks only after the switch is set.
	if passCredentials(connection) != nil {
		return
	}
	if _, err := connection.Write([]byte{'\n'}); err != nil {
		return
	}
	wanted, who, descriptors, err := receiveAsk(connection)
	defer func() {
		for _, descriptor := range descriptors {
			_ = syscall.Close(descriptor)
		}
	}()
	_ = connection.SetDeadline(time.Time{})
	answers := json.NewEncoder(connection)
	if err == nil {
		err = s.permit(who)
	}
	if err != nil {
		_ = answers.Encode(note{Error: err.Error()})
		return
	}
	caller, err := account.Lookup(strconv.Itoa(int(who.Uid)))
	if err != nil {
		caller = account.User{Name: strconv.Itoa(int(who.Uid)), UID: who.Uid, GID: who.Gid}
	}
	if wanted.List {
		name, _ := os.Hostname()
		_ = answers.Encode(note{Ended: true, Text: fmt.Sprintf(
			"User %s may run the following commands on %s:\n    (ALL : ALL) NOPASSWD: ALL\n", caller.Name, name)})
		return
	}
	child, err := s.start(wanted, caller, descriptors)
	for _, descriptor := range descriptors {
		_ = syscall.Close(descriptor)
	}
	descriptors = nil
	if err != nil {
		_ = answers.Encode(note{Error: err.Error()})
		return
	}
	s.follow(connection, answers, child)
}

func passCredentials(connection *net.UnixConn) error {
	raw, err := connection.SyscallConn()
	if err != nil {
		return err
	}
	var result error
	err = raw.Control(func(descriptor uintptr) {
		result = syscall.SetsockoptInt(int(descriptor), syscall.SOL_SOCKET, syscall.SO_PASSCRED, 1)
	})
	if err != nil {
		return err
	}
	return result
}

func (s *Server) permit(who *syscall.Ucred) error {
	s.mu.Lock()
	allowed := s.allowed
	s.mu.Unlock()
	if who.Uid == 0 {
		return nil
	}
	user, err := account.Lookup(s.configured())
	if err != nil || !allowed || user.UID != who.Uid {
		return fmt.Errorf("uid %d may not use sudo in this guest", who.Uid)
	}
	return nil
}

func (s *Server) start(wanted *ask, caller account.User, descriptors []int) (*reaper.Child, error) {
	target, err := account.Lookup(wanted.User)
	if err != nil {
		return nil, fmt.Errorf("unknown user %s", wanted.User)
	}
	if wanted.Group != "" {
		group, err := account.GroupID(wanted.Group)
		if err != nil {
			return nil, fmt.Errorf("unknown group %s", wanted.Group)
		}
		target.GID = group
	}
	path, argv, err := program(wanted, target)
	if err != nil {
		return nil, err
	}
	directory := wanted.Directory
	if wanted.Login {
		directory = target.Home
	}
	attributes := &syscall.ProcAttr{
		Dir: directory, Env: environment(wanted, caller, target, argv),
		Sys: &syscall.SysProcAttr{Setsid: true, Credential: target.Credential()},
	}
	for index, descriptor := range descriptors {
		attributes.Files = append(attributes.Files, uintptr(descriptor))
		if wanted.Terminal && !attributes.Sys.Setctty && isTerminal(descriptor) {
			attributes.Sys.Setctty, attributes.Sys.Ctty = true, index
			_ = syscall.Fchown(descriptor, int(target.UID), -1)
		}
	}
	child, err := s.children.Start(path, argv, attributes)
	if err == syscall.EACCES || err == syscall.ENOENT {
		if information, statError := os.Stat(path); statError == nil && information.Mode().IsRegular() {
			// The target may not enter the caller's directory; sudo proper would stay in it by inheritance.
			attributes.Dir = "/"
			child, err = s.children.Start(path, argv, attributes)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("unable to execute %s: %v", path, err)
	}
	return child, nil
}

// program decides what runs: the command, or a shell, or a shell that runs the command.
func program(wanted *ask, target account.User) (path string, argv []string, err error) {
	if !wanted.Login && !wanted.Shell {
		path, err = find(wanted.Command[0], wanted.Directory)
		return path, wanted.Command, err
	}
	shell := target.Shell
	if wanted.Shell {
		if chosen := lookup(wanted.Environment, "SHELL"); chosen != "" {
			shell = chosen
		}
	}
	if !account.IsExecutable(shell) {
		if shell = account.ShellPath(); shell == "" {
			return "", nil, fmt.Errorf("there is no shell in the guest")
		}
	}
	argv = []string{shell}
	if wanted.Login {
		argv[0] = "-" + filepath.Base(shell)
	}
	if len(wanted.Command) > 0 {
		words := make([]string, len(wanted.Command))
		for index, word := range wanted.Command {
			words[index] = escape(word)
		}
		argv = append(argv, "-c", strings.Join(words, " "))
	}
	return shell, argv, nil
}

// escape puts a backslash before everything that is not plain, as sudo does, except $.
func escape(word string) string {
	var escaped strings.Builder
	for at := 0; at < len(word); at++ {
		letter := word[at]
		plain := letter >= 'a' && letter <= 'z' || letter >= 'A' && letter <= 'Z' || letter >= '0' && letter <= '9' ||
			letter == '_' || letter == '-' || letter == '$' || letter >= 0x80
		if letter == '\n' {
			escaped.WriteString("'\n'")
			continue
		}
		if !plain {
			escaped.WriteByte('\\')
		}
		escaped.WriteByte(letter)
	}
	return escaped.String()
}

func find(name, directory string) (string, error) {
	if strings.Contains(name, "/") {
		path := name
		if !filepath.IsAbs(path) {
			path = filepath.Join(directory, name)
		}
		if !account.IsExecutable(path) {
			return "", fmt.Errorf("%s: command not found", name)
		}
		return path, nil
	}
	for _, folder := range filepath.SplitList(securePath) {
		if path := filepath.Join(folder, name); name != "" && account.IsExecutable(path) {
			return path, nil
		}
	}
	return "", fmt.Errorf("%s: command not found", name)
}

// environment is what sudo leaves: a clean one, or with -E the caller's, and the names that say who asked.
func environment(wanted *ask, caller, target account.User, argv []string) []string {
	result := map[string]string{}
	keep := map[string]bool{}
	for _, name := range wanted.Keep {
		keep[name] = true
	}
	for _, entry := range wanted.Environment {
		name, value, ok := strings.Cut(entry, "=")
		if ok && (wanted.Preserve && !wanted.Login || keep[name] || harmless(name)) {
			result[name] = value
		}
	}
	set := func(name, value string) {
		if !keep[name] {
			result[name] = value
		}
	}
	set("HOME", target.Home)
	set("USER", target.Name)
	set("LOGNAME", target.Name)
	set("SHELL", target.Shell)
	set("PATH", securePath)
	set("MAIL", "/var/mail/"+target.Name)
	result["SUDO_USER"] = caller.Name
	result["SUDO_UID"] = strconv.Itoa(int(caller.UID))
	result["SUDO_GID"] = strconv.Itoa(int(caller.GID))
	result["SUDO_COMMAND"] = strings.Join(argv, " ")
	for _, entry := range wanted.Assignments {
		name, value, _ := strings.Cut(entry, "=")
		result[name] = value
	}
	entries := make([]string, 0, len(result))
	for name, value := range result {
		entries = append(entries, name+"="+value)
	}
	return entries
}

func harmless(name string) bool {
	switch name {
	case "TERM", "COLORTERM", "LANG", "LANGUAGE", "LS_COLORS", "DISPLAY", "XAUTHORITY", "TZ", "LINES", "COLUMNS":
		return true
	}
	return strings.HasPrefix(name, "LC_")
}

func lookup(environment []string, name string) string {
	for _, entry := range environment {
		if strings.HasPrefix(entry, name+"=") {
			return entry[len(name)+1:]
		}
	}
	return ""
}

// follow passes signals in and the end out. A client that is gone takes the command with it.
func (s *Server) follow(connection *net.UnixConn, answers *json.Encoder, child *reaper.Child) {
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		notes := json.NewDecoder(connection)
		for {
			var received note
			if notes.Decode(&received) != nil {
				return
			}
			if received.Signal > 0 && received.Signal <= 64 {
				_ = s.children.Signal(child, syscall.Signal(received.Signal), true)
			}
			if received.Resize {
				terminal.Announce(child.Pid)
			}
		}
	}()
	select {
	case <-child.Done:
		end := note{Ended: true, Code: child.Exit().Code()}
		if child.Exit().Status.Signaled() {
			end.Signal = int(child.Exit().Status.Signal())
		}
		_ = answers.Encode(end)
		return
	case <-gone:
	}
	_ = s.children.Signal(child, syscall.SIGHUP, true)
	select {
	case <-child.Done:
	case <-time.After(hangUp):
	}
	_ = s.children.Signal(child, syscall.SIGKILL, true)
}

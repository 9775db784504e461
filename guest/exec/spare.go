package exec

import (
	"os"
	"sync"
	"syscall"
	"time"

	"innkeeper/guest/account"
	"innkeeper/guest/link"
	"innkeeper/guest/reaper"
)

// spareScript waits for a command on descriptor 9, up to its end of file, and runs it. BASH_EXECUTION_STRING is what `bash -c`
// itself would have set, so no variable betrays the spare. -N reads a pipe in blocks instead of one byte at a call, and counts
// bytes only in the C locale; it takes any command, being told more than spareCommandBytes.
const spareScript = `LC_ALL=C read -r -N 65536 -u 9 BASH_EXECUTION_STRING; exec 9<&-; eval "$BASH_EXECUTION_STRING"`

const (
	spareDescriptor = 9
	// A replacement costs a few milliseconds of a core: it waits until no command ended for that long.
	spareDelay = 15 * time.Millisecond
	// While a command runs, it also leaves that one alone at first; a long one must not keep the others from having a spare.
	spareDelayRunning = 150 * time.Millisecond
	// A pipe takes that much without blocking.
	spareCommandBytes = 60 << 10
)

// spares keeps at most one shell of the default user ready.
type spares struct {
	table *Table

	mu    sync.Mutex
	ready *spare
	timer *time.Timer
}

type spare struct {
	child   *reaper.Child
	command *os.File
	output  *os.File
	fit     fitness
}

// fitness is what must be equal for the shell to serve a command.
type fitness struct {
	user, directory, environment, stamp string
	inode, device                       uint64
}

func fitnessOf(made *plan) fitness {
	result := fitness{user: made.user.Name, directory: made.directory, stamp: made.stamp}
	for _, entry := range made.environment {
		result.environment += entry + "\x00"
	}
	var status syscall.Stat_t
	if syscall.Stat(made.directory, &status) == nil {
		result.inode, result.device = status.Ino, status.Dev
	}
	return result
}

// take gives the request to the ready shell if it suits.
func (s *spares) take(p *Process, request *Request, made *plan) bool {
	if request.Shell == nil || request.User != "" || request.Cwd != "" || len(request.Env) > 0 ||
		request.Stdin || request.Pty != nil || !request.Merge || len(*request.Shell) > spareCommandBytes {
		return false
	}
	if !s.mu.TryLock() {
		return false // one is being made right now: not worth waiting for
	}
	ready := s.ready
	s.ready = nil
	s.mu.Unlock()
	if ready == nil {
		return false
	}
	if !ready.suits(made) {
		ready.discard(s.table)
		return false
	}
	p.begun = time.Now()
	if _, err := ready.command.WriteString(*request.Shell); err != nil {
		ready.discard(s.table)
		return false
	}
	_ = ready.command.Close()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.child = ready.child
	return p.addOutput(ready.output, link.Data) == nil
}

func (s *spare) suits(made *plan) bool {
	select {
	case <-s.child.Done:
		return false
	default:
		return s.fit == fitnessOf(made)
	}
}

func (s *spare) discard(t *Table) {
	_ = s.command.Close()
	_ = s.output.Close()
	_ = t.children.Signal(s.child, syscall.SIGKILL, true)
}

// plan puts a replacement in order; each further command that starts or ends puts it off.
func (s *spares) plan(delay time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.timer == nil {
		s.timer = time.AfterFunc(delay, s.prepare)
	} else {
		s.timer.Reset(delay)
	}
}

// prepare starts a shell if one is wanted and none is ready.
func (s *spares) prepare() {
	if !s.table.Settings().SpareShell {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ready == nil {
		s.ready = s.table.startSpare()
	}
}

func (s *spares) discard() {
	s.mu.Lock()
	ready := s.ready
	s.ready = nil
	s.mu.Unlock()
	if ready != nil {
		ready.discard(s.table)
		<-ready.child.Done
	}
}

func (s *spares) pids() map[int]bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	pids := map[int]bool{}
	if s.ready != nil {
		pids[s.ready.child.Pid] = true
	}
	return pids
}

// startSpare returns nil where there is no bash or it could not start: then commands start shells of their own.
func (t *Table) startSpare() *spare {
	bash := account.BashPath()
	script := spareScript
	made, err := t.plan(&Request{Shell: &script})
	if bash == "" || err != nil {
		return nil
	}
	command, commandEnd, err := pipe(true)
	if err != nil {
		return nil
	}
	defer commandEnd.Close()
	output, outputEnd, err := pipe(false)
	if err != nil {
		_ = command.Close()
		return nil
	}
	defer outputEnd.Close()
	files := []uintptr{t.null.Fd(), outputEnd.Fd(), outputEnd.Fd()}
	for len(files) < spareDescriptor {
		files = append(files, ^uintptr(0))
	}
	child, err := t.children.Start(bash, made.argv, &syscall.ProcAttr{
		Dir: made.directory, Env: made.environment, Files: append(files, commandEnd.Fd()),
		Sys: &syscall.SysProcAttr{Setsid: true, Credential: made.user.Credential()},
	})
	if err != nil {
		_ = command.Close()
		_ = output.Close()
		return nil
	}
	return &spare{child: child, command: command, output: output, fit: fitnessOf(made)}
}

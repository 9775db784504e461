// Package reaper starts every process of the agent and collects every child, its own and orphans.
//
// os/exec cannot be used beside it: its Wait and PID 1's wait for any child would take each other's statuses.
package reaper

import (
	"os"
	"os/signal"
	"runtime"
	"sync"
	"syscall"
	"time"
	"unsafe"
)

// Exit is how a process ended, when the agent noticed, and the processor time of it and of those that it waited for.
type Exit struct {
	Status syscall.WaitStatus
	At     time.Time
	CPU    time.Duration
}

// Code is the shell's exit code: 128+n for signal n.
func (e Exit) Code() int {
	if e.Status.Signaled() {
		return 128 + int(e.Status.Signal())
	}
	return e.Status.ExitStatus()
}

// Child is a process that was started here and perhaps not collected yet.
type Child struct {
	Pid  int
	Done chan struct{} // closed once Exit is set
	exit Exit
}

// Exit is valid after Done.
func (c *Child) Exit() Exit { return c.exit }

// Table knows the running children. One goroutine collects all of them.
type Table struct {
	mu       sync.Mutex
	children map[int]*Child
	early    map[int]Exit // collected before Start could register the pid
	starting int
	idle     *sync.Cond
	parked   bool
}

const prSetChildSubreaper = 36

// New starts collecting. Where the agent is not PID 1 it becomes the subreaper of what it starts.
func New() *Table {
	t := &Table{children: map[int]*Child{}, early: map[int]Exit{}}
	t.idle = sync.NewCond(&t.mu)
	if os.Getpid() != 1 {
		_, _, _ = syscall.RawSyscall(syscall.SYS_PRCTL, prSetChildSubreaper, 1, 0)
	}
	// Orphans may arrive from a process that entered the container from outside while there is no child at all.
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGCHLD)
	go func() {
		for range signals {
			t.mu.Lock()
			if t.parked {
				t.idle.Broadcast()
			}
			t.mu.Unlock()
		}
	}()
	go t.collect()
	return t
}

// Start forks and execs; the arguments are those of syscall.ForkExec.
func (t *Table) Start(path string, argv []string, attributes *syscall.ProcAttr) (*Child, error) {
	t.mu.Lock()
	t.starting++
	t.mu.Unlock()
	pid, err := syscall.ForkExec(path, argv, attributes)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.starting--
	child := &Child{Pid: pid, Done: make(chan struct{})}
	if err == nil {
		if exit, ok := t.early[pid]; ok {
			child.exit = exit
			close(child.Done)
		} else {
			t.children[pid] = child
			t.idle.Signal()
		}
	}
	if t.starting == 0 && len(t.early) > 0 {
		t.early = map[int]Exit{}
	}
	return child, err
}

// Signal sends a signal to the child, or its whole process group, and never to a pid that was given away again.
func (t *Table) Signal(child *Child, number syscall.Signal, group bool) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if group {
		// The number of a group stays taken while it has a member, so a collected leader does no harm here.
		return syscall.Kill(-child.Pid, number)
	}
	if t.children[child.Pid] != child {
		return syscall.ESRCH
	}
	return syscall.Kill(child.Pid, number)
}

// collect has a thread of its own, which sits in waitid.
func (t *Table) collect() {
	runtime.LockOSThread()
	for {
		pid, err := waitAny()
		switch err {
		case 0:
			t.reap(pid)
		case syscall.ECHILD:
			t.mu.Lock()
			if len(t.children) == 0 {
				t.parked = true
				t.idle.Wait()
				t.parked = false
			} else {
				// A child that another part of the system collected cannot be waited for: report it as lost.
				t.lose()
			}
			t.mu.Unlock()
		}
	}
}

// reap collects under the lock, so that Signal cannot hit a pid which was just given away again.
func (t *Table) reap(pid int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	var status syscall.WaitStatus
	var used syscall.Rusage
	got, err := syscall.Wait4(pid, &status, syscall.WNOHANG, &used)
	if err != nil || got != pid {
		return
	}
	exit := Exit{Status: status, At: time.Now(), CPU: time.Duration(used.Utime.Nano() + used.Stime.Nano())}
	child, known := t.children[pid]
	switch {
	case known:
		delete(t.children, pid)
		child.exit = exit
		close(child.Done)
	case t.starting > 0:
		t.early[pid] = exit
	}
}

func (t *Table) lose() {
	for pid, child := range t.children {
		if syscall.Kill(pid, 0) == syscall.ESRCH {
			delete(t.children, pid)
			child.exit = Exit{Status: syscall.WaitStatus(syscall.SIGKILL), At: time.Now()}
			close(child.Done)
		}
	}
}

// waitAny blocks until any child has ended and leaves it to be collected.
func waitAny() (int, syscall.Errno) {
	const (
		all      = 0
		exited   = 4
		noWait   = 0x1000000
		pidField = 16
	)
	var information [128]byte
	_, _, errno := syscall.Syscall6(syscall.SYS_WAITID, all, 0,
		uintptr(unsafe.Pointer(&information[0])), exited|noWait, 0, 0)
	return int(*(*int32)(unsafe.Pointer(&information[pidField]))), errno
}

// Package kernel runs interpreters that keep their state between the cells of a session.
//
// An interpreter is a child process with one end of a socket pair. A cell goes to it as code with the three descriptors that are to be its input and
// outputs; the answer says how it ended. Nothing listens anywhere, and what a cell prints goes to the cell's own pipes, never to the socket.
package kernel

import (
	_ "embed" // the interpreter's program
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"

	"innkeeper/guest/reaper"
)

//go:embed program.py
var program []byte

// Bootstrap is what the interpreter is told on its command line: the program itself would fill every list of processes.
const Bootstrap = `import os; exec(compile(os.fdopen(4, "rb").read(), "<kernel>", "exec"), {"__name__": "kernel"})`

const (
	// Sizes of the id and of the results, exit code, processor time, threads, and whether results are missing.
	replyHead  = 1 + 1 + 8 + 4 + 1 + 4
	maxResults = 8 << 20
	// What the interpreter says first of each cell.
	hasBegun = 'b'
)

// ErrGone says that the interpreter ended, or broke the protocol and was ended for it.
var ErrGone = errors.New("the interpreter has ended")

// Reply is how a cell ended. Results is packed in a way that nobody has checked.
type Reply struct {
	ID               string
	ExitCode         int
	CPUUs            int64
	Threads          int
	ResultsTruncated bool
	Results          []byte
}

// Kernel is one interpreter.
type Kernel struct {
	Child   *reaper.Child
	control *net.UnixConn
}

// Start runs path with argv, to which the bootstrap is added. The process inherits what attributes say, and nothing of the agent's.
func Start(children *reaper.Table, path string, argv []string, attributes syscall.ProcAttr) (*Kernel, error) {
	pair, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socketpair", err)
	}
	theirs := os.NewFile(uintptr(pair[1]), "kernel")
	defer theirs.Close()
	ours := os.NewFile(uintptr(pair[0]), "kernel")
	defer ours.Close()
	connection, err := net.FileConn(ours)
	if err != nil {
		return nil, err
	}
	text, feed, err := os.Pipe()
	if err != nil {
		_ = connection.Close()
		return nil, err
	}
	defer text.Close()
	attributes.Files = append(append([]uintptr(nil), attributes.Files...), theirs.Fd(), text.Fd())
	child, err := children.Start(path, append(append([]string(nil), argv...), "-c", Bootstrap), &attributes)
	if err != nil {
		_ = connection.Close()
		_ = feed.Close()
		return nil, err
	}
	go func() {
		// Beside, because a pipe holds less than some programs, and the interpreter may never read.
		_, _ = feed.Write(program)
		_ = feed.Close()
	}()
	return &Kernel{Child: child, control: connection.(*net.UnixConn)}, nil
}

// Run has a cell executed, with these variables set before, and returns its end. begun is called when the interpreter has it: an interrupt is for this cell
// from then on. An id has at most 255 bytes. Only one may run at a time. ErrGone: there is no interpreter any more.
func (k *Kernel) Run(id, code string, env map[string]string, files [3]uintptr, begun func()) (Reply, error) {
	var variables []byte
	for name, value := range env {
		variables = append(append(append(append(variables, name...), '='), value...), 0)
	}
	body := append([]byte{byte(len(id))}, id...)
	body = append(binary.BigEndian.AppendUint32(body, uint32(len(variables))), variables...)
	body = append(body, code...)
	var length [4]byte
	binary.BigEndian.PutUint32(length[:], uint32(len(body)))
	rights := syscall.UnixRights(int(files[0]), int(files[1]), int(files[2]))
	if _, _, err := k.control.WriteMsgUnix(length[:], rights, nil); err != nil {
		return Reply{}, ErrGone
	}
	if _, err := k.control.Write(body); err != nil {
		return Reply{}, ErrGone
	}
	var word [1]byte
	if _, err := io.ReadFull(k.control, word[:]); err != nil || word[0] != hasBegun {
		return Reply{}, ErrGone
	}
	begun()
	reply, err := k.receive()
	if err != nil || reply.ID != id {
		return Reply{}, ErrGone
	}
	return reply, nil
}

func (k *Kernel) receive() (Reply, error) {
	var head [replyHead]byte
	if _, err := io.ReadFull(k.control, head[:]); err != nil {
		return Reply{}, err
	}
	size := binary.BigEndian.Uint32(head[15:])
	if size > maxResults {
		return Reply{}, fmt.Errorf("a reply with %d bytes of results", size)
	}
	body := make([]byte, int(head[0])+int(size))
	if _, err := io.ReadFull(k.control, body); err != nil {
		return Reply{}, err
	}
	return Reply{
		ID:               string(body[:head[0]]),
		ExitCode:         int(head[1]),
		CPUUs:            int64(binary.BigEndian.Uint64(head[2:])),
		Threads:          int(binary.BigEndian.Uint32(head[10:])),
		ResultsTruncated: head[14] != 0,
		Results:          body[head[0]:],
	}, nil
}

// Close lets go of the interpreter, which then ends if it still lives and waits for a cell.
func (k *Kernel) Close() { _ = k.control.Close() }

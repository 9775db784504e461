// Package kernel runs interpreters that keep their state between the cells of a session.
//
// An interpreter is a child process with one end of a socket pair. A cell goes to it as code with the three descriptors that are to be its input and
// outputs; the answer says how it ended. Nothing listens anywhere, and what a cell prints goes to the cell's own pipes, never to the socket.
package kernel

import (
	_ "embed" // the interpreter's program
	"encoding/binary"
	"encoding/json"
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
	maxHead    = 64 << 10
	maxResults = 8 << 20
)

// ErrGone says that the interpreter ended, or broke the protocol and was ended for it.
var ErrGone = errors.New("the interpreter has ended")

// Reply is how a cell ended. Results is a JSON text that nobody has checked.
type Reply struct {
	ID               string `json:"id"`
	ExitCode         int    `json:"exit_code"`
	CPUUs            int64  `json:"cpu_us"`
	Threads          int    `json:"threads"`
	ResultsTruncated bool   `json:"results_truncated"`
	Results          []byte `json:"-"`
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

// Run has a cell executed and returns its end. Only one may run at a time. ErrGone: there is no interpreter any more.
func (k *Kernel) Run(id, code string, files [3]uintptr) (Reply, error) {
	body, err := json.Marshal(map[string]string{"id": id, "code": code})
	if err != nil {
		return Reply{}, err
	}
	var length [4]byte
	binary.BigEndian.PutUint32(length[:], uint32(len(body)))
	rights := syscall.UnixRights(int(files[0]), int(files[1]), int(files[2]))
	if _, _, err := k.control.WriteMsgUnix(length[:], rights, nil); err != nil {
		return Reply{}, ErrGone
	}
	if _, err := k.control.Write(body); err != nil {
		return Reply{}, ErrGone
	}
	reply, err := k.receive()
	if err != nil || reply.ID != id {
		return Reply{}, ErrGone
	}
	return reply, nil
}

func (k *Kernel) receive() (Reply, error) {
	var header [8]byte
	if _, err := io.ReadFull(k.control, header[:]); err != nil {
		return Reply{}, err
	}
	head, results := binary.BigEndian.Uint32(header[:4]), binary.BigEndian.Uint32(header[4:])
	if head > maxHead || results > maxResults {
		return Reply{}, fmt.Errorf("a reply of %d and %d bytes", head, results)
	}
	body := make([]byte, head)
	if _, err := io.ReadFull(k.control, body); err != nil {
		return Reply{}, err
	}
	reply := Reply{}
	if err := json.Unmarshal(body, &reply); err != nil {
		return Reply{}, err
	}
	reply.Results = make([]byte, results)
	_, err := io.ReadFull(k.control, reply.Results)
	return reply, err
}

// Close lets go of the interpreter, which then ends if it still lives and waits for a cell.
func (k *Kernel) Close() { _ = k.control.Close() }

package jail

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"syscall"
)

const (
	inner     = "jailed"
	separator = "--"
	// Of this program, where a new process finds it.
	self = "/proc/self/exe"
)

// Main serves both parts. The outer one, `jail`, begins the inner one `jailed`, as the first process of new namespaces, and prints its pid when the command runs,
// or stays until it ends.
func Main(part string, arguments []string) int {
	// Namespaces, rights and the rest belong to a thread, and the one that begins a command, or becomes it, hands its own on.
	runtime.LockOSThread()
	if len(arguments) < 4 || arguments[2] != separator {
		fmt.Fprintf(os.Stderr, "inn-agent: %s takes a mark, a plan, -- and a command\n", part)
		return 2
	}
	made, err := read(arguments[1])
	if err == nil {
		if part == inner {
			err = enter(made, arguments[3:])
		} else {
			err = begin(made, arguments)
		}
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "inn-agent: %s: %v\n", part, err)
		return 1
	}
	return 0
}

// begin is the outer part. The command inherits every descriptor above the third; the first three are nothing, nothing, and where we say what is wrong.
func begin(made *plan, arguments []string) error {
	for _, group := range made.Groups {
		// From the first moment on.
		if err := os.WriteFile(group, []byte("0"), 0); err != nil {
			return err
		}
	}
	namespaces := uintptr(syscall.CLONE_NEWNS | syscall.CLONE_NEWIPC | syscall.CLONE_NEWUTS | syscall.CLONE_NEWPID)
	if made.Network == "" {
		namespaces |= syscall.CLONE_NEWNET
	} else if err := joinNetwork(made.Network); err != nil {
		return err
	}
	null, err := os.OpenFile("/dev/null", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	hears, said, err := os.Pipe()
	if err != nil {
		return err
	}
	pid, err := syscall.ForkExec(self, append([]string{os.Args[0], inner}, arguments...), &syscall.ProcAttr{
		Env:   os.Environ(),
		Files: []uintptr{null.Fd(), said.Fd(), os.Stderr.Fd()},
		Sys:   &syscall.SysProcAttr{Cloneflags: namespaces},
	})
	if err != nil {
		return fmt.Errorf("namespaces: %w", err)
	}
	_ = said.Close()
	// Its end of the pipe closes when it becomes the command.
	if count, _ := hears.Read(make([]byte, 1)); count > 0 {
		_, _ = syscall.Wait4(pid, nil, 0, nil)
		return errors.New("the command did not begin")
	}
	if made.Stays {
		_, err := syscall.Wait4(pid, nil, 0, nil)
		return err
	}
	fmt.Println(pid)
	return nil
}

func joinNetwork(path string) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	if _, _, errno := syscall.RawSyscall(sysSetns, file.Fd(), syscall.CLONE_NEWNET, 0); errno != 0 {
		return fmt.Errorf("setns %s: %w", path, errno)
	}
	return nil
}

// Package terminal opens pseudo terminals and changes their size.
package terminal

import (
	"bytes"
	"os"
	"strconv"
	"strings"
	"syscall"
	"unsafe"
)

// Size is what a program sees of its terminal.
type Size struct {
	Rows int `json:"rows"`
	Cols int `json:"cols"`
}

type windowSize struct{ rows, cols, x, y uint16 }

// Open makes a pseudo terminal of that size. The master does not block, so that Go's poller can wait for it.
func Open(size Size) (master, slave *os.File, err error) {
	descriptor, err := syscall.Open("/dev/ptmx", syscall.O_RDWR|syscall.O_NOCTTY|syscall.O_CLOEXEC|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, err
	}
	var number uint32
	var unlock int32
	if err = ioctl(descriptor, syscall.TIOCGPTN, unsafe.Pointer(&number)); err == nil {
		err = ioctl(descriptor, syscall.TIOCSPTLCK, unsafe.Pointer(&unlock))
	}
	if err != nil {
		_ = syscall.Close(descriptor)
		return nil, nil, err
	}
	master = os.NewFile(uintptr(descriptor), "ptmx")
	slave, err = os.OpenFile("/dev/pts/"+strconv.Itoa(int(number)), os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		_ = master.Close()
		return nil, nil, err
	}
	if err := SetSize(master, size); err != nil {
		_ = master.Close()
		_ = slave.Close()
		return nil, nil, err
	}
	return master, slave, nil
}

// Resize sets the size and tells the programs: gVisor does not send SIGWINCH, so each process group of the session gets it by hand.
func Resize(master *os.File, session int, size Size) error {
	if err := SetSize(master, size); err != nil {
		return err
	}
	Announce(session)
	return nil
}

// Announce sends SIGWINCH to each process group of a session.
func Announce(session int) { Signal(session, syscall.SIGWINCH) }

// Signal sends a signal to each process group of a session.
func Signal(session int, number syscall.Signal) {
	for group := range sessionGroups(session) {
		_ = syscall.Kill(-group, number)
	}
}

// SetSize changes the size without telling anybody.
func SetSize(file *os.File, size Size) error {
	clamp := func(value int) uint16 {
		if value < 1 {
			return 1
		}
		if value > 0xffff {
			return 0xffff
		}
		return uint16(value)
	}
	wanted := windowSize{rows: clamp(size.Rows), cols: clamp(size.Cols)}
	connection, err := file.SyscallConn()
	if err != nil {
		return err
	}
	var result error
	err = connection.Control(func(descriptor uintptr) {
		result = ioctl(int(descriptor), syscall.TIOCSWINSZ, unsafe.Pointer(&wanted))
	})
	if err != nil {
		return err
	}
	return result
}

// sessionGroups finds the process groups of a session in /proc.
func sessionGroups(session int) map[int]bool {
	groups := map[int]bool{}
	directory, err := os.Open("/proc")
	if err != nil {
		return groups
	}
	defer directory.Close()
	names, _ := directory.Readdirnames(-1)
	for _, name := range names {
		if name[0] < '0' || name[0] > '9' {
			continue
		}
		content, err := os.ReadFile("/proc/" + name + "/stat")
		if err != nil {
			continue
		}
		// The command in parentheses may hold spaces and parentheses: the fields start after the last one.
		end := bytes.LastIndexByte(content, ')')
		if end < 0 {
			continue
		}
		fields := strings.Fields(string(content[end+1:]))
		if len(fields) < 4 {
			continue
		}
		group, _ := strconv.Atoi(fields[2])
		if of, _ := strconv.Atoi(fields[3]); of == session && group > 1 {
			groups[group] = true
		}
	}
	return groups
}

func ioctl(descriptor int, request uintptr, argument unsafe.Pointer) error {
	if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, uintptr(descriptor), request, uintptr(argument)); errno != 0 {
		return errno
	}
	return nil
}

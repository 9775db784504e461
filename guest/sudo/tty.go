package sudo

import (
	"syscall"
	"unsafe"
)

type windowSize struct{ rows, cols, x, y uint16 }

func isTerminal(descriptor int) bool {
	var state syscall.Termios
	return ioctl(descriptor, syscall.TCGETS, unsafe.Pointer(&state)) == nil
}

func ioctl(descriptor int, request uintptr, argument unsafe.Pointer) error {
	if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, uintptr(descriptor), request, uintptr(argument)); errno != 0 {
		return errno
	}
	return nil
}

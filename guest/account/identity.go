package account

import (
	"os"
	"runtime"
	"syscall"
)

// As runs action with the effective identity of user, on a thread of its own identity.
//
// gVisor has no setfsuid, so the thread takes the effective ids; the real ones stay root's and let it return. Raw system calls
// change this thread only, unlike those of package syscall.
func As(user User, action func() error) error {
	if os.Getuid() != 0 || user.UID == 0 && user.GID == 0 {
		return action()
	}
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		err := become(user)
		if err == nil {
			err = action()
		}
		// A thread that cannot return dies with its goroutine, because it is never unlocked.
		if comeBack() == nil {
			runtime.UnlockOSThread()
		}
		result <- err
	}()
	return <-result
}

const keep = ^uintptr(0)

func become(user User) error {
	if err := setGroups(user.Groups); err != nil {
		return err
	}
	if _, _, errno := syscall.RawSyscall(syscall.SYS_SETRESGID, keep, uintptr(user.GID), keep); errno != 0 {
		return errno
	}
	if _, _, errno := syscall.RawSyscall(syscall.SYS_SETRESUID, keep, uintptr(user.UID), keep); errno != 0 {
		return errno
	}
	return nil
}

func comeBack() error {
	if _, _, errno := syscall.RawSyscall(syscall.SYS_SETRESUID, keep, 0, keep); errno != 0 {
		return errno
	}
	if _, _, errno := syscall.RawSyscall(syscall.SYS_SETRESGID, keep, 0, keep); errno != 0 {
		return errno
	}
	return setGroups(nil)
}

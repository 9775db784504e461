package files

import (
	"syscall"
	"unsafe"
)

const (
	atFdcwd         = -0x64
	renameNoReplace = 1
)

// moveTo renames; without replace it is an error that the new name is taken.
func moveTo(from, to string, replace bool) error {
	if replace {
		if err := syscall.Rename(from, to); err != nil {
			return wrap("rename", to, err)
		}
		return nil
	}
	first, err := syscall.BytePtrFromString(from)
	if err != nil {
		return wrap("rename", from, err)
	}
	second, err := syscall.BytePtrFromString(to)
	if err != nil {
		return wrap("rename", to, err)
	}
	here := atFdcwd
	_, _, errno := syscall.Syscall6(sysRenameat2, uintptr(here), uintptr(unsafe.Pointer(first)),
		uintptr(here), uintptr(unsafe.Pointer(second)), renameNoReplace, 0)
	if errno == syscall.EINVAL || errno == syscall.ENOSYS {
		// A file system that does not know the flag: nobody else's file is lost but one that comes up in this very moment.
		var status syscall.Stat_t
		if syscall.Lstat(to, &status) == nil {
			return wrap("rename", to, syscall.EEXIST)
		}
		return moveTo(from, to, true)
	}
	if errno != 0 {
		return wrap("rename", to, errno)
	}
	return nil
}

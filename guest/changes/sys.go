package changes

import (
	"syscall"
	"unsafe"
)

// The scanner reads metadata only: these are all the file system calls that it makes on a guest's files. None follows a
// symlink, none opens anything but a directory.

const (
	sysOpenat2 = 437 // the same number on every architecture

	atSymlinkNofollow = 0x100
	resolveNoXdev     = 0x01
	resolveNoSymlinks = 0x04
	resolveBeneath    = 0x08
	statxBtime        = 0x800

	openDirFlags = syscall.O_RDONLY | syscall.O_DIRECTORY | syscall.O_NOFOLLOW | syscall.O_CLOEXEC | syscall.O_NONBLOCK
)

type openHow struct {
	flags, mode, resolve uint64
}

// openDir opens the directory at path (NUL-terminated, relative) below the directory dirfd, never leaving dirfd's tree
// or its mount and never passing a symlink in any component.
func openDir(dirfd int, path []byte) (int, error) {
	how := openHow{flags: openDirFlags, resolve: resolveNoXdev | resolveNoSymlinks | resolveBeneath}
	for {
		fd, _, errno := syscall.Syscall6(sysOpenat2, uintptr(dirfd), uintptr(unsafe.Pointer(&path[0])),
			uintptr(unsafe.Pointer(&how)), unsafe.Sizeof(how), 0, 0)
		switch errno {
		case 0:
			return int(fd), nil
		case syscall.EINTR, syscall.EAGAIN: // EAGAIN: a rename raced with the lookup, which may simply be repeated
			continue
		}
		return -1, errno
	}
}

// statAt fills st for name (NUL-terminated) in the directory dirfd. The scheduler is not told of the call, which saves
// a fifth of a scan; so a stat that waits for the disk keeps its processor, and Main makes more of them than scans.
func statAt(dirfd int, name *byte, st *syscall.Stat_t) error {
	_, _, errno := syscall.RawSyscall6(sysFstatat, uintptr(dirfd), uintptr(unsafe.Pointer(name)),
		uintptr(unsafe.Pointer(st)), atSymlinkNofollow, 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// birthAt is the birth time of name in nanoseconds since 1970, or false where the file system does not keep one.
func birthAt(dirfd int, name *byte) (int64, bool) {
	var buf [256]byte // struct statx: stx_mask at 0, stx_btime at 80
	_, _, errno := syscall.Syscall6(sysStatx, uintptr(dirfd), uintptr(unsafe.Pointer(name)), atSymlinkNofollow,
		statxBtime, uintptr(unsafe.Pointer(&buf[0])), 0)
	if errno != 0 || *(*uint32)(unsafe.Pointer(&buf[0]))&statxBtime == 0 {
		return 0, false
	}
	return *(*int64)(unsafe.Pointer(&buf[80]))*1e9 + int64(*(*uint32)(unsafe.Pointer(&buf[88]))), true
}

// Two names: overlays mounted with `userxattr` keep their marks in user.overlay.*, which an unprivileged reader may see;
// trusted.overlay.* is hidden from everyone without CAP_SYS_ADMIN.
var opaqueXattr = []byte("user.overlay.opaque\x00")

// isOpaque says whether the overlay directory behind fd hides everything in the layers below it.
func isOpaque(fd int) bool {
	var value [4]byte
	n, _, errno := syscall.Syscall6(syscall.SYS_FGETXATTR, uintptr(fd), uintptr(unsafe.Pointer(&opaqueXattr[0])),
		uintptr(unsafe.Pointer(&value[0])), uintptr(len(value)), 0, 0)
	return errno == 0 && n == 1 && value[0] == 'y'
}

// vanished tells errors that only mean "the guest removed or replaced this entry while we looked".
func vanished(err error) bool {
	switch err {
	case syscall.ENOENT, syscall.ENOTDIR, syscall.ELOOP, syscall.ESTALE:
		return true
	}
	return false
}

// offMount tells the error of a directory on another mount, which is not part of this layer.
func offMount(err error) bool { return err == syscall.EXDEV }

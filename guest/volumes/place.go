package volumes

import (
	"fmt"
	"os"
	"path"
	"strings"
	"syscall"
	"unsafe"

	"innkeeper/guest/link"
)

const (
	pathOnly    = 0x200000 // O_PATH
	removeDir   = 0x200    // AT_REMOVEDIR
	pathLimit   = 1024
	madeParents = 0o755
)

// What is the guest's system, and what the agent needs. A volume there would break the guest, and nothing in it.
var reserved = []string{"/proc", "/sys", "/dev", "/run", "/.innkeeper"}

// place is a path whose last part may be there or not. The directories above it were opened one by one and none was a symlink: what the guest's users
// put in their way leads nowhere else.
type place struct {
	path   string
	parent int
	name   string
}

// placeOf opens what is above a path, and makes what is missing of it where it is to.
func placeOf(text string, makeMissing bool) (*place, error) {
	if err := check(text); err != nil {
		return nil, err
	}
	parts := strings.Split(text[1:], "/")
	parent, err := syscall.Open("/", pathOnly|syscall.O_DIRECTORY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	for _, part := range parts[:len(parts)-1] {
		next, err := openDirectory(parent, part)
		if err == syscall.ENOENT && makeMissing {
			if err = syscall.Mkdirat(parent, part, madeParents); err == nil || err == syscall.EEXIST {
				next, err = openDirectory(parent, part)
			}
		}
		_ = syscall.Close(parent)
		if err == syscall.ELOOP || err == syscall.ENOTDIR {
			return nil, link.Errorf("not_a_directory", "%s: %s is no directory, or a symlink", text, part)
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", text, err)
		}
		parent = next
	}
	return &place{path: text, parent: parent, name: parts[len(parts)-1]}, nil
}

func check(text string) error {
	if !strings.HasPrefix(text, "/") || text == "/" || path.Clean(text) != text || len(text) > pathLimit || strings.IndexByte(text, 0) >= 0 {
		return link.Errorf("bad_request", "path: not an absolute path without . and ..")
	}
	for _, system := range reserved {
		if text == system || strings.HasPrefix(text, system+"/") {
			return link.Errorf("bad_request", "path: %s is the system's", system)
		}
	}
	return nil
}

func (p *place) close() { _ = syscall.Close(p.parent) }

// through is a way to the place that goes by the directory that was opened, whatever its path leads to by now.
func (p *place) through() string { return fmt.Sprintf("/proc/self/fd/%d/%s", p.parent, p.name) }

// target is what the symlink at the place says; empty where there is none.
func (p *place) target() string {
	target, err := os.Readlink(p.through())
	if err != nil {
		return ""
	}
	return target
}

// emptyDirectory is what a volume may take the place of; nil where nothing is there. Anything else is an error.
func (p *place) emptyDirectory() (*syscall.Stat_t, error) {
	opened, err := p.openDirectory()
	switch err {
	case nil:
	case syscall.ENOENT:
		return nil, nil
	case syscall.ENOTDIR, syscall.ELOOP:
		return nil, link.Errorf("exists", "%s: there is something already", p.path)
	default:
		return nil, fmt.Errorf("%s: %w", p.path, err)
	}
	defer opened.Close()
	names, _ := opened.Readdirnames(1)
	if len(names) > 0 {
		return nil, link.Errorf("exists", "%s: the directory is not empty", p.path)
	}
	var status syscall.Stat_t
	if err := syscall.Fstat(int(opened.Fd()), &status); err != nil {
		return nil, err
	}
	return &status, nil
}

// openDirectory opens the one at the place, whose errors are bare numbers.
func (p *place) openDirectory() (*os.File, error) {
	descriptor, err := syscall.Openat(p.parent, p.name, syscall.O_RDONLY|syscall.O_DIRECTORY|syscall.O_NOFOLLOW|syscall.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(descriptor), p.path), nil
}

func openDirectory(parent int, name string) (int, error) {
	return syscall.Openat(parent, name, pathOnly|syscall.O_DIRECTORY|syscall.O_NOFOLLOW|syscall.O_CLOEXEC, 0)
}

func (p *place) makeDirectory(mode uint32) error { return syscall.Mkdirat(p.parent, p.name, mode) }

func (p *place) removeDirectory() error { return p.unlink(removeDir) }

func (p *place) removeLink() error { return p.unlink(0) }

func (p *place) unlink(flags uintptr) error {
	name, err := syscall.BytePtrFromString(p.name)
	if err != nil {
		return err
	}
	_, _, errno := syscall.Syscall(syscall.SYS_UNLINKAT, uintptr(p.parent), uintptr(unsafe.Pointer(name)), flags)
	if errno != 0 && errno != syscall.ENOENT {
		return fmt.Errorf("%s: %w", p.path, errno)
	}
	return nil
}

func (p *place) makeLink(to string) error {
	name, err := syscall.BytePtrFromString(p.name)
	if err != nil {
		return err
	}
	target, err := syscall.BytePtrFromString(to)
	if err != nil {
		return err
	}
	_, _, errno := syscall.Syscall(
		syscall.SYS_SYMLINKAT, uintptr(unsafe.Pointer(target)), uintptr(p.parent), uintptr(unsafe.Pointer(name)))
	if errno != 0 {
		return fmt.Errorf("%s: %w", p.path, errno)
	}
	return nil
}

package jail

import (
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"unsafe"
)

// enter is the inner part, the first process of its namespaces: it becomes the command. An error is told to the outer part as well.
func enter(made *plan, command []string) (err error) {
	said, err := takeOutput()
	if err != nil {
		return err
	}
	defer func() { _, _ = syscall.Write(said, []byte{0}) }()
	for _, step := range []struct {
		name string
		take func(*plan) error
	}{
		{"mounts", makeMounts},
		{"the root", enterRoot},
		{"limits", setLimits},
		{"rights", giveUpRights},
	} {
		if err := step.take(made); err != nil {
			return fmt.Errorf("%s: %w", step.name, err)
		}
	}
	return fmt.Errorf("%s: %w", command[0], syscall.Exec(command[0], command, os.Environ()))
}

// takeOutput puts nothing in the place of the standard output, which is the pipe to the outer part, and returns that. It closes where the command runs.
func takeOutput() (int, error) {
	said, _, errno := syscall.RawSyscall(syscall.SYS_FCNTL, 1, syscall.F_DUPFD_CLOEXEC, 3)
	if errno != 0 {
		return -1, fmt.Errorf("the output: %w", errno)
	}
	return int(said), syscall.Dup3(0, 1, 0)
}

func makeMounts(made *plan) error {
	// Nothing that is mounted here shows on the host, nor the other way round.
	if err := syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""); err != nil {
		return err
	}
	if err := bind(made.Root, made.Root, syscall.MS_NOSUID); err != nil {
		return err
	}
	for _, wanted := range made.Mounts {
		flags := uintptr(syscall.MS_NOSUID)
		if wanted.ReadOnly {
			flags |= syscall.MS_RDONLY
		}
		if !wanted.Devices {
			flags |= syscall.MS_NODEV
		}
		if !wanted.Programs {
			flags |= syscall.MS_NOEXEC
		}
		if err := bind(wanted.Source, filepath.Join(made.Root, wanted.Target), flags); err != nil {
			return err
		}
	}
	// Of /proc the command sees itself: QEMU opens memory that it has as a descriptor by its name there, and has no other way to.
	const alone = syscall.MS_RDONLY | syscall.MS_NOSUID | syscall.MS_NODEV | syscall.MS_NOEXEC
	return syscall.Mount("proc", filepath.Join(made.Root, "proc"), "proc", alone, "subset=pid")
}

func bind(source, target string, flags uintptr) error {
	if err := syscall.Mount(source, target, "", syscall.MS_BIND, ""); err != nil {
		return fmt.Errorf("%s at %s: %w", source, target, err)
	}
	if err := syscall.Mount("", target, "", syscall.MS_BIND|syscall.MS_REMOUNT|flags, ""); err != nil {
		return fmt.Errorf("%s: %w", target, err)
	}
	return nil
}

// enterRoot leaves nothing of the host's tree behind the new root: a copy of a guest's mount would keep its disk busy for as long as the machine runs.
func enterRoot(made *plan) error {
	if err := os.Chdir(made.Root); err != nil {
		return err
	}
	if err := syscall.PivotRoot(".", "old"); err != nil {
		return err
	}
	if err := os.Chdir("/"); err != nil {
		return err
	}
	if err := syscall.Unmount("/old", syscall.MNT_DETACH); err != nil {
		return err
	}
	return syscall.Mount("", "/", "", syscall.MS_BIND|syscall.MS_REMOUNT|syscall.MS_RDONLY|syscall.MS_NOSUID, "")
}

func setLimits(made *plan) error {
	for _, limit := range []struct {
		kind  int
		value uint64
	}{
		{syscall.RLIMIT_CORE, 0},
		{syscall.RLIMIT_NOFILE, made.OpenFiles},
		{syscall.RLIMIT_FSIZE, made.FileBytes},
	} {
		if err := syscall.Setrlimit(limit.kind, &syscall.Rlimit{Cur: limit.value, Max: limit.value}); err != nil {
			return err
		}
	}
	return nil
}

const (
	prSetNoNewPrivs      = 38
	prCapAmbient         = 47
	prCapAmbientClearAll = 4
	capabilityVersion3   = 0x20080522
)

// giveUpRights is for the calling thread, which is the one that becomes the command.
func giveUpRights(made *plan) error {
	for capability := uintptr(0); ; capability++ {
		if _, _, errno := syscall.RawSyscall(syscall.SYS_PRCTL, syscall.PR_CAPBSET_DROP, capability, 0); errno == syscall.EINVAL && capability > 0 {
			break // the kernel knows no more of them
		} else if errno != 0 {
			return fmt.Errorf("the bounding set: %w", errno)
		}
	}
	further := make([]uint32, len(made.Further)+1) // one more, so that there is a first
	for index, group := range made.Further {
		further[index] = uint32(group)
	}
	if _, _, errno := syscall.RawSyscall(syscall.SYS_SETGROUPS, uintptr(len(made.Further)), uintptr(unsafe.Pointer(&further[0])), 0); errno != 0 {
		return fmt.Errorf("setgroups: %w", errno)
	}
	uid, gid := uintptr(made.UID), uintptr(made.GID)
	if _, _, errno := syscall.RawSyscall(syscall.SYS_SETRESGID, gid, gid, gid); errno != 0 {
		return fmt.Errorf("setresgid: %w", errno)
	}
	if _, _, errno := syscall.RawSyscall(syscall.SYS_SETRESUID, uid, uid, uid); errno != 0 {
		return fmt.Errorf("setresuid: %w", errno)
	}
	if _, _, errno := syscall.RawSyscall6(syscall.SYS_PRCTL, prCapAmbient, prCapAmbientClearAll, 0, 0, 0, 0); errno != 0 {
		return fmt.Errorf("ambient capabilities: %w", errno)
	}
	header := struct {
		version uint32
		pid     int32
	}{version: capabilityVersion3}
	var none [6]uint32 // effective, permitted and inheritable, twice 32 of each
	if _, _, errno := syscall.RawSyscall(syscall.SYS_CAPSET, uintptr(unsafe.Pointer(&header)), uintptr(unsafe.Pointer(&none[0])), 0); errno != 0 {
		return fmt.Errorf("capset: %w", errno)
	}
	if _, _, errno := syscall.RawSyscall6(syscall.SYS_PRCTL, prSetNoNewPrivs, 1, 0, 0, 0, 0); errno != 0 {
		return fmt.Errorf("no_new_privs: %w", errno)
	}
	return nil
}

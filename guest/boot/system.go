package boot

import (
	"fmt"
	"os"
	"strings"
	"syscall"

	"innkeeper/guest/network"
)

const (
	// Of the guest's memory, as tmpfs itself has it.
	sharedMemory = "mode=1777,size=50%"
	openFiles    = 1 << 20
	openFilesNow = 1 << 16
)

// mountSystem mounts what every Linux has. /tmp stays on the disk, where its files count and are seen to change.
func mountSystem() error {
	const quiet = syscall.MS_NOSUID | syscall.MS_NODEV | syscall.MS_NOEXEC
	for _, point := range []struct {
		kind, path string
		flags      uintptr
		options    string
	}{
		{"proc", "/proc", quiet, ""},
		{"sysfs", "/sys", quiet, ""},
		{"cgroup2", "/sys/fs/cgroup", quiet, ""}, // container engines do not begin without it
		{"devtmpfs", "/dev", syscall.MS_NOSUID, ""},
		{"devpts", "/dev/pts", syscall.MS_NOSUID | syscall.MS_NOEXEC, "gid=5,mode=620,ptmxmode=666"},
		{"tmpfs", "/dev/shm", syscall.MS_NOSUID | syscall.MS_NODEV, sharedMemory},
		{"tmpfs", "/run", syscall.MS_NOSUID | syscall.MS_NODEV, "mode=755,size=20%"},
	} {
		if err := directory(point.path); err != nil {
			return err
		}
		if err := syscall.Mount(point.kind, point.path, point.kind, point.flags, point.options); err != nil {
			return fmt.Errorf("mount %s: %w", point.path, err)
		}
	}
	for name, target := range map[string]string{"fd": "/proc/self/fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2"} {
		if err := os.Symlink(target, "/dev/"+name); err != nil && !os.IsExist(err) {
			return err
		}
	}
	return nil
}

// setNetwork brings up what a guest has without its host. Any user may ping, as wherever systemd is: ping has no rights of its own any more.
func setNetwork() error {
	if err := os.WriteFile("/proc/sys/net/ipv4/ping_group_range", []byte("0 2147483647"), 0); err != nil {
		return err
	}
	// For as long as the guest lives: a clone need not be told again.
	if err := network.WithoutIPv6(); err != nil {
		return fmt.Errorf("without IPv6: %w", err)
	}
	return network.Up("lo")
}

// becomeAgent gives the process what a program expects that did not start as a kernel's first.
func becomeAgent() error {
	os.Clearenv()
	for name, value := range map[string]string{
		"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8",
	} {
		if err := os.Setenv(name, value); err != nil {
			return err
		}
	}
	limit := syscall.Rlimit{Cur: openFilesNow, Max: openFiles}
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return fmt.Errorf("the limit of open files: %w", err)
	}
	return nil
}

// holdStandardDescriptors takes the three that the kernel has left closed, for want of a console: what is opened later, the port above all, must not be a
// child's output. The initramfs has a /dev/null for this.
func holdStandardDescriptors() error {
	for {
		null, err := syscall.Open("/dev/null", syscall.O_RDWR, 0)
		if err != nil {
			return fmt.Errorf("/dev/null: %w", err)
		}
		if null > 2 {
			return syscall.Close(null)
		}
	}
}

// openConsole is nil unless the kernel's command line asks for words on its console.
func openConsole() *os.File {
	if os.Mkdir("/proc", 0o555) == nil {
		_ = syscall.Mount("proc", "/proc", "proc", 0, "")
	}
	for _, word := range commandLine() {
		if word == "innkeeper.debug" {
			if console, err := os.OpenFile("/dev/console", os.O_WRONLY|syscall.O_NOCTTY, 0); err == nil {
				return console
			}
		}
	}
	return nil
}

func commandLine() []string {
	line, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return nil
	}
	return strings.Fields(string(line))
}

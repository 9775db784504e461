package boot

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

const (
	// Modules that the kernel may want later, in the initramfs and in the guest. They are in its memory: one that goes on from a checkpoint finds those of its own kernel.
	earlyOffered = "/offered"
	Offered      = own + "/modules"

	modprobe = binaryFolder + "/modprobe"
)

// placeOffered puts them, and the agent as modprobe, into the new root.
func placeOffered() error {
	if _, err := os.Stat(earlyOffered); err != nil {
		return nil // of a kernel that was fetched without them
	}
	if err := os.Symlink(filepath.Base(Binary), newRoot+modprobe); err != nil {
		return err
	}
	if err := os.Mkdir(newRoot+Offered, 0o755); err != nil {
		return err
	}
	if err := syscall.Mount(earlyOffered, newRoot+Offered, "", syscall.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind the modules: %w", err)
	}
	return syscall.Mount("", newRoot+Offered, "", syscall.MS_REMOUNT|syscall.MS_BIND|syscall.MS_RDONLY|syscall.MS_NODEV|syscall.MS_NOSUID|syscall.MS_NOEXEC, "")
}

// offerModules has the kernel load modules by the agent when it wants some, and makes the devices that it wants them for.
func offerModules() error {
	if _, err := os.Stat(Offered); err != nil {
		return nil
	}
	if err := os.WriteFile("/proc/sys/kernel/modprobe", []byte(modprobe), 0); err != nil {
		return err
	}
	return makeNodes(Offered + "/modules.devname")
}

// makeNodes makes devices whose opening loads their module: `fuse fuse c10:229` is a line about /dev/fuse.
func makeNodes(list string) error {
	file, err := os.Open(list)
	if err != nil {
		return err
	}
	defer file.Close()
	for lines := bufio.NewScanner(file); lines.Scan(); {
		fields := strings.Fields(lines.Text())
		if len(fields) != 3 || !strings.HasPrefix(fields[2], "c") {
			continue
		}
		first, second, _ := strings.Cut(fields[2][1:], ":")
		major, err := strconv.Atoi(first)
		if err != nil {
			continue
		}
		minor, err := strconv.Atoi(second)
		if err != nil {
			continue
		}
		mode := uint32(0o600)
		if fields[1] == "fuse" || fields[1] == "net/tun" {
			mode = 0o666 // for everybody, as udev has it: they ask for rights themselves
		}
		path := "/dev/" + fields[1]
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		// The kernel's numbers of these are small: no bits of them lie elsewhere.
		if err := syscall.Mknod(path, syscall.S_IFCHR|mode, major<<8|minor); err != nil && !os.IsExist(err) {
			return fmt.Errorf("%s: %w", path, err)
		}
		if err := syscall.Chmod(path, mode); err != nil { // whatever the umask is
			return err
		}
	}
	return nil
}

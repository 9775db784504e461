package boot

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"innkeeper/guest/link"
)

const (
	portName    = "innkeeper.link"
	imageSerial = "image"
	diskSerial  = "disk"
)

// openPort finds the port by its name. What fails before it is open can be told to nobody.
func (b *sequence) openPort() error {
	if err := mountDevices(); err != nil {
		return err
	}
	device, err := await(func() string { return named("/sys/class/virtio-ports", "name", portName) })
	if err != nil {
		return fmt.Errorf("no virtio-serial port is called %s: %w", portName, err)
	}
	// The device's node may come a moment after its name.
	var file *os.File
	_, err = await(func() string {
		file, err = os.OpenFile("/dev/"+device, os.O_RDWR|syscall.O_NONBLOCK, 0)
		if err != nil {
			return ""
		}
		return device
	})
	if err != nil {
		return err
	}
	b.port = link.NewPort(file)
	return nil
}

// mountDevices mounts what devices are found by, in the initramfs.
func mountDevices() error {
	for _, point := range []struct{ path, kind string }{{"/sys", "sysfs"}, {"/dev", "devtmpfs"}} {
		if err := os.MkdirAll(point.path, 0o755); err != nil {
			return err
		}
		if err := syscall.Mount(point.kind, point.path, point.kind, 0, ""); err != nil && err != syscall.EBUSY {
			return fmt.Errorf("%s: %w", point.path, err)
		}
	}
	return nil
}

// disk is the node of the virtio disk with that serial, or of that name where no disk has a serial that tells.
func disk(serial, name string) (string, error) {
	found, err := await(func() string {
		device := named("/sys/block", "serial", serial)
		if device == "" {
			device = unmarked(name)
		}
		if device == "" {
			return ""
		}
		if _, err := os.Stat("/dev/" + device); err != nil {
			return ""
		}
		return "/dev/" + device
	})
	if err != nil {
		return "", fmt.Errorf("there is no disk %s: %w", name, err)
	}
	return found, nil
}

// named is the first entry of a folder of /sys whose attribute has that value.
func named(folder, attribute, value string) string {
	entries, _ := filepath.Glob(filepath.Join(folder, "*", attribute))
	for _, entry := range entries {
		if content, err := os.ReadFile(entry); err == nil && strings.TrimSpace(string(content)) == value {
			return filepath.Base(filepath.Dir(entry))
		}
	}
	return ""
}

// unmarked is the name, where a disk of that name is there and says nothing else of itself.
func unmarked(name string) string {
	serial, err := os.ReadFile("/sys/block/" + name + "/serial")
	if err != nil || len(strings.TrimSpace(string(serial))) > 0 {
		return ""
	}
	return name
}

func await(look func() string) (string, error) {
	for deadline := time.Now().Add(deviceTimeout); ; time.Sleep(devicePoll) {
		if found := look(); found != "" {
			return found, nil
		}
		if time.Now().After(deadline) {
			return "", fmt.Errorf("not within %s", deviceTimeout)
		}
	}
}

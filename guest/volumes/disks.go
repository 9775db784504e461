package volumes

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"innkeeper/guest/link"
)

const (
	// On a slow machine that emulates every instruction.
	deviceTimeout = 20 * time.Second
	devicePoll    = 5 * time.Millisecond
	// A disk that was plugged in comes up by itself in less.
	recallEvery = 2 * time.Second
	// Of the page 0x80 that a SCSI disk says its serial number on.
	serialOffset = 4
	resizeFS     = 0x40086610 // EXT4_IOC_RESIZE_FS
	blockSize    = 4096       // of every volume's file system
	getSize      = 0x80081272 // BLKGETSIZE64
	unfollowed   = 0x8        // UMOUNT_NOFOLLOW
)

// disks shows volumes by mounting them. Neither set-uid programs nor device nodes of a volume mean anything: another guest may have put them there.
type disks struct {
	shown map[string]shown
	// Where disks were that the kernel was told to forget, as host:channel:target:unit, by volume.
	forgotten map[string]string
}

// shown is a volume that was mounted.
type shown struct {
	number   string // of its device, as mountinfo has it
	made     bool   // the directory did not exist before
	readOnly bool
}

func (d *disks) show(volume string, at *place, readOnly bool) (string, error) {
	deadline := time.Now().Add(deviceTimeout)
	device, err := d.await(volume, deadline)
	if err != nil {
		return "", err
	}
	if isMount(at, device) {
		return at.through(), nil
	}
	before, err := at.emptyDirectory()
	if err != nil {
		return "", err
	}
	if before == nil {
		if err := at.makeDirectory(madeParents); err != nil {
			return "", fmt.Errorf("%s: %w", at.path, err)
		}
	}
	d.shown[volume] = shown{number: numberOf(device), made: before == nil, readOnly: readOnly}
	err = mountDisk(device, at, readOnly)
	for isGoing(err) && time.Now().Before(deadline) {
		// The disk of an earlier time, on its way out; the new one follows.
		time.Sleep(devicePoll)
		if device, err = d.await(volume, deadline); err == nil {
			d.shown[volume] = shown{number: numberOf(device), made: before == nil, readOnly: readOnly}
			err = mountDisk(device, at, readOnly)
		}
	}
	if err != nil {
		d.clean(volume, at)
		return "", err
	}
	delete(d.forgotten, volume)
	if !readOnly {
		fill(device, at)
	}
	return at.through(), nil
}

func mountDisk(device string, at *place, readOnly bool) error {
	flags := uintptr(syscall.MS_NOSUID | syscall.MS_NODEV | syscall.MS_NOATIME)
	if readOnly {
		flags |= syscall.MS_RDONLY
	}
	directory, err := openDirectory(at.parent, at.name)
	if err != nil {
		return fmt.Errorf("%s: %w", at.path, err)
	}
	defer syscall.Close(directory)
	err = syscall.Mount(device, fmt.Sprintf("/proc/self/fd/%d", directory), "ext4", flags, "")
	if errors.Is(err, syscall.EROFS) {
		return link.Errorf("io_error", "the volume was not unmounted cleanly: attach it once as one that may be written")
	}
	if err != nil {
		return fmt.Errorf("mount at %s: %w", at.path, err)
	}
	return nil
}

func (d *disks) hide(volume string, at *place) error {
	device := findDisk(volume)
	if device == "" {
		// It was pulled out: what is left of it gives errors only.
		for _, path := range mountsOf(d.shown[volume].number) {
			_ = syscall.Unmount(path, unfollowed|syscall.MNT_DETACH)
		}
		d.clean(volume, at)
		return nil
	}
	for _, path := range mountsOf(numberOf(device)) {
		if err := syscall.Unmount(path, unfollowed); err == syscall.EBUSY {
			return link.Errorf("busy", "the volume is in use: %s", orSomething(users(path)))
		} else if err != nil {
			return fmt.Errorf("unmount %s: %w", path, err)
		}
	}
	// Fails while it is mounted in another namespace: taking the disk away would lose what is written there.
	if claimed, err := os.OpenFile(device, os.O_RDONLY|syscall.O_EXCL, 0); err == nil {
		// Nobody can mount it meanwhile.
		d.forget(volume, device)
		_ = claimed.Close()
	} else if errors.Is(err, syscall.EBUSY) {
		if known, mounted := d.shown[volume]; mounted && at != nil {
			if err := mountDisk(device, at, known.readOnly); err != nil {
				return err
			}
		}
		return link.Errorf("busy", "the volume is in use: another mount namespace has it")
	}
	d.clean(volume, at)
	return nil
}

// numberOf is a device's number as mountinfo has it; empty where it is gone.
func numberOf(device string) string {
	var disk syscall.Stat_t
	if syscall.Stat(device, &disk) != nil {
		return ""
	}
	return fmt.Sprintf("%d:%d", disk.Rdev>>8&0xfff, disk.Rdev&0xff|disk.Rdev>>12&0xfff00)
}

// MountpointOf is where a volume is mounted; "" where it is not.
func MountpointOf(volume string) string {
	if !isID(volume) {
		return ""
	}
	device := findDisk(volume)
	if device == "" {
		return ""
	}
	if paths := mountsOf(numberOf(device)); len(paths) > 0 {
		return paths[0]
	}
	return ""
}

// mountsOf are the paths at which a device is mounted, the latest first.
func mountsOf(number string) []string {
	content, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil || number == "" {
		return nil
	}
	var paths []string
	for _, line := range strings.Split(string(content), "\n") {
		fields := strings.Fields(line)
		if len(fields) > 4 && fields[2] == number {
			paths = append([]string{unescape.Replace(fields[4])}, paths...)
		}
	}
	return paths
}

var unescape = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)

func (d *disks) clean(volume string, at *place) {
	if d.shown[volume].made && at != nil {
		_ = at.removeDirectory()
	}
	delete(d.shown, volume)
}

// fill lets a file system take the whole of a disk that has grown since it was made.
func fill(device string, at *place) {
	disk, err := os.OpenFile(device, os.O_RDONLY, 0)
	if err != nil {
		return
	}
	defer disk.Close()
	var size uint64
	if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, disk.Fd(), getSize, uintptr(unsafe.Pointer(&size))); errno != 0 {
		return
	}
	root, err := os.Open(at.through())
	if err != nil {
		return
	}
	defer root.Close()
	blocks := size / blockSize
	_, _, _ = syscall.Syscall(syscall.SYS_IOCTL, root.Fd(), resizeFS, uintptr(unsafe.Pointer(&blocks)))
}

// isMount says whether the disk's root directory is at the place.
func isMount(at *place, device string) bool {
	var disk, root syscall.Stat_t
	if syscall.Stat(device, &disk) != nil || syscall.Lstat(at.through(), &root) != nil {
		return false
	}
	return disk.Rdev == root.Dev
}

// isGoing tells of a disk that the kernel is removing, or has removed.
func isGoing(err error) bool {
	return errors.Is(err, syscall.ENXIO) || errors.Is(err, syscall.ENODEV) || errors.Is(err, syscall.ENOENT)
}

// forget has the kernel remove the disk now. It would once it has heard that the disk was pulled out, which may be after the same volume was plugged in
// again, or in another life of the memory: what was mounted by then would be lost. Fine for one that is going already.
func (d *disks) forget(volume, device string) {
	known := "/sys/block/" + filepath.Base(device) + "/device"
	if target, err := os.Readlink(known); err == nil {
		d.forgotten[volume] = filepath.Base(target)
	}
	_ = os.WriteFile(known+"/delete", []byte("1"), 0)
}

// recall has the kernel look for a forgotten disk where it was: one that was not pulled out since does not come up by itself.
func (d *disks) recall(volume string) {
	if host, place, found := strings.Cut(d.forgotten[volume], ":"); found {
		_ = os.WriteFile("/sys/class/scsi_host/host"+host+"/scan", []byte(strings.ReplaceAll(place, ":", " ")), 0)
	}
}

func (d *disks) await(volume string, deadline time.Time) (string, error) {
	for recall := time.Now().Add(recallEvery); ; time.Sleep(devicePoll) {
		if device := findDisk(volume); device != "" {
			return device, nil
		}
		now := time.Now()
		if now.After(deadline) {
			return "", link.Errorf("not_found", "no disk of the volume came up")
		}
		if now.After(recall) {
			d.recall(volume)
			recall = time.Now().Add(recallEvery)
		}
	}
}

// findDisk is the node of the disk whose serial number is the volume's id; empty where none is there.
func findDisk(volume string) string {
	pages, _ := filepath.Glob("/sys/block/sd*/device/vpd_pg80")
	for _, page := range pages {
		content, err := os.ReadFile(page)
		if err != nil || len(content) < serialOffset || strings.TrimSpace(string(content[serialOffset:])) != volume {
			continue
		}
		device := "/dev/" + filepath.Base(filepath.Dir(filepath.Dir(page)))
		if _, err := os.Stat(device); err == nil {
			return device
		}
	}
	return ""
}

func orSomething(named string) string {
	if named == "" {
		return "something in the guest has it"
	}
	return named
}

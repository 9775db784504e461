package changes

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"syscall"
	"unsafe"
)

// Every change of an ext4 inode, its times included, goes through ext4_mark_inode_dirty, whose trace point a perf counter counts on each
// processor for one device. A count that is what it was before the last scan means that a scan would find what it found then.
const (
	writesEvent = "events/ext4/ext4_mark_inode_dirty/id"
	onlineCPUs  = "/sys/devices/system/cpu/online"

	perfTypeTracepoint = 2
	perfFlagCloexec    = 8
	perfIocSetFilter   = 0x40082406
	perfAttributes     = 120 // bytes of struct perf_event_attr
	fsopenCloexec      = 1
	fsmountCloexec     = 1
	fsconfigCreate     = 6
	ext4Magic          = 0xef53

	// The same numbers on every architecture.
	sysFsopen   = 430
	sysFsconfig = 431
	sysFsmount  = 432
)

// writes counts what was written to one file system since it was opened. It is never closed: it is there as long as the guest is.
type writes struct {
	counters []int
	online   []byte
}

// countWrites begins to count on the file system of a directory, or says why the kernel cannot tell.
func countWrites(directory string) (*writes, error) {
	var fs syscall.Statfs_t
	var st syscall.Stat_t
	if err := syscall.Statfs(directory, &fs); err != nil {
		return nil, err
	}
	if err := syscall.Stat(directory, &st); err != nil {
		return nil, err
	}
	if fs.Type != ext4Magic {
		return nil, fmt.Errorf("%s is not on ext4", directory)
	}
	event, err := eventNumber()
	if err != nil {
		return nil, err
	}
	w := &writes{}
	if w.online, err = online(); err != nil {
		return nil, err
	}
	// The kernel's own encoding of a device number, which trace points show.
	major, minor := st.Dev>>8&0xfff|st.Dev>>32&^0xfff, st.Dev&0xff|st.Dev>>12&^0xff
	filter := []byte(fmt.Sprintf("dev == %d\x00", major<<20|minor&0xfffff))
	for cpu := 0; cpu < runtime.NumCPU(); cpu++ {
		fd, err := openCounter(event, cpu, filter)
		if err != nil {
			for _, opened := range w.counters {
				_ = syscall.Close(opened)
			}
			return nil, err
		}
		w.counters = append(w.counters, fd)
	}
	return w, nil
}

// count is how many there were, or false where that is not known, because a processor came or went.
func (w *writes) count() (uint64, bool) {
	if now, err := online(); err != nil || !bytes.Equal(now, w.online) {
		return 0, false
	}
	var sum uint64
	for _, fd := range w.counters {
		var value [8]byte
		if n, err := syscall.Read(fd, value[:]); err != nil || n != len(value) {
			return 0, false
		}
		sum += binary.LittleEndian.Uint64(value[:])
	}
	return sum, true
}

func openCounter(event uint64, cpu int, filter []byte) (int, error) {
	var attributes [perfAttributes]byte // type, size, config; all else 0 is counting
	binary.LittleEndian.PutUint32(attributes[:], perfTypeTracepoint)
	binary.LittleEndian.PutUint32(attributes[4:], perfAttributes)
	binary.LittleEndian.PutUint64(attributes[8:], event)
	everybody, alone := -1, -1
	fd, _, errno := syscall.Syscall6(sysPerfEventOpen, uintptr(unsafe.Pointer(&attributes[0])), uintptr(everybody), uintptr(cpu),
		uintptr(alone), perfFlagCloexec, 0)
	if errno != 0 {
		return -1, os.NewSyscallError("perf_event_open", errno)
	}
	if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, fd, perfIocSetFilter, uintptr(unsafe.Pointer(&filter[0]))); errno != 0 {
		_ = syscall.Close(int(fd))
		return -1, os.NewSyscallError("PERF_EVENT_IOC_SET_FILTER", errno)
	}
	return int(fd), nil
}

// eventNumber is the kernel's number of the trace point, read in a tracefs that is mounted nowhere.
func eventNumber() (uint64, error) {
	name := []byte("tracefs\x00")
	context, _, errno := syscall.Syscall(sysFsopen, uintptr(unsafe.Pointer(&name[0])), fsopenCloexec, 0)
	if errno != 0 {
		return 0, os.NewSyscallError("fsopen", errno)
	}
	defer syscall.Close(int(context))
	if _, _, errno := syscall.Syscall6(sysFsconfig, context, fsconfigCreate, 0, 0, 0, 0); errno != 0 {
		return 0, os.NewSyscallError("fsconfig", errno)
	}
	mount, _, errno := syscall.Syscall(sysFsmount, context, fsmountCloexec, 0)
	if errno != 0 {
		return 0, os.NewSyscallError("fsmount", errno)
	}
	defer syscall.Close(int(mount))
	fd, err := syscall.Openat(int(mount), writesEvent, syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return 0, os.NewSyscallError("openat", err)
	}
	defer syscall.Close(fd)
	var text [32]byte
	n, err := syscall.Read(fd, text[:])
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(string(bytes.TrimSpace(text[:n])), 10, 64)
}

// online is the kernel's list of processors. Plain calls: it is read for every command.
func online() ([]byte, error) {
	fd, err := syscall.Open(onlineCPUs, syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer syscall.Close(fd)
	list := make([]byte, 4096)
	n, err := syscall.Read(fd, list)
	if err != nil {
		return nil, err
	}
	return list[:n], nil
}

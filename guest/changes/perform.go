package changes

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"
)

var (
	errBadRequest    = errors.New("bad request")
	errTrustedXattrs = errors.New("the overlay is not mounted with `userxattr`, so emptied directories cannot be told")
)

// alwaysExcluded are the guest's own mounts, and ours.
var alwaysExcluded = []string{"/proc", "/sys", "/dev", "/run", "/.innkeeper"}

// perform answers one request.
//
// A result and the baseline that follows it become valid together, by one rename: the new baseline names the result,
// which is complete by then under a pending name beside the baseline and gets its own afterwards, by this request or, after a crash, by the
// next. A request whose result exists already is a retry and gets that one.
func perform(ctx context.Context, q *request) (answer, error) {
	started := time.Now()
	if err := check(q); err != nil {
		return answer{}, err
	}
	var a answer
	var err error
	if q.Op == "baseline" {
		if err = checkMount(q.Upper); err == nil {
			a, err = compare(ctx, q)
		}
	} else {
		if a.Total, a.Recalled, err = recall(q); err == nil && !a.Recalled {
			a, err = compare(ctx, q)
		}
	}
	a.DurationUS = time.Since(started).Microseconds()
	return a, err
}

func check(q *request) error {
	paths := append([]string{q.Upper, q.Baseline}, q.Lowers...)
	switch q.Op {
	case "changes":
		paths = append(paths, q.Result)
	case "baseline":
	default:
		return fmt.Errorf("%w: op %q", errBadRequest, q.Op)
	}
	for _, path := range append(paths, q.Excluded...) {
		if !strings.HasPrefix(path, "/") || strings.IndexByte(path, 0) >= 0 || len(path) > maxResultPath {
			return fmt.Errorf("%w: path %q", errBadRequest, path)
		}
	}
	return nil
}

// recall finishes what a crash interrupted, and says whether the result is there already.
func recall(q *request) (total uint64, found bool, err error) {
	old, err := openBaseline(q.Baseline)
	if err != nil {
		return 0, false, err
	}
	old.close()
	if old.result != "" {
		_, id, err := stored(pending(q.Baseline))
		if err == nil && id == old.id {
			err = os.Rename(pending(q.Baseline), old.result)
		}
		if err != nil && !errors.Is(err, os.ErrNotExist) && err != errBadResult {
			return 0, false, err
		}
	}
	total, _, err = stored(q.Result)
	if errors.Is(err, os.ErrNotExist) {
		return 0, false, nil
	}
	return total, err == nil, err
}

// compare scans, again if the clock was too coarse, and stores what it found.
func compare(ctx context.Context, q *request) (answer, error) {
	upper, err := openRoot(q.Upper)
	if err != nil {
		return answer{}, err
	}
	defer syscall.Close(upper)
	var roots []int
	for _, path := range q.Lowers {
		fd, err := openRoot(path)
		if err != nil {
			return answer{}, err
		}
		defer syscall.Close(fd)
		roots = append(roots, fd)
	}
	fine := fineTimes(upper)
	list := newNames()
	for attempt := 1; ; attempt++ {
		s := &scan{ctx: ctx, upper: upper, layers: layers{roots: roots}, names: list, new: &baselineWriter{path: q.Baseline}}
		for _, paths := range [][]string{alwaysExcluded, q.Excluded} {
			for _, path := range paths {
				s.excluded = append(s.excluded, bytes.TrimRight([]byte(path), "/"))
			}
		}
		if q.Op == "changes" {
			if s.old, err = openBaseline(q.Baseline); err != nil {
				return answer{}, err
			}
			s.result = &resultWriter{path: pending(q.Baseline), id: identity()}
		}
		a, again, err := s.complete(q.Result, fine || attempt == 3)
		if s.old != nil {
			s.old.close()
		}
		if !again {
			return a, err
		}
	}
}

// complete runs the scan and makes its outcome valid, unless it must be run again: where the kernel stamps files with its
// tick (before 6.13), a file seen in the very tick of its last change could change once more without a trace. So the scan
// waits for the next tick and looks again. A file that is written all the time is taken as it is (settled).
func (s *scan) complete(result string, settled bool) (a answer, again bool, err error) {
	done := false
	defer func() {
		if !done {
			s.new.abandon()
			if s.result != nil {
				s.result.abandon()
			}
		}
	}()
	if err := s.run(); err != nil {
		return a, false, err
	}
	a.Scanned = s.visited
	if !settled && s.newest >= tick() {
		for s.newest >= tick() && s.newest < time.Now().UnixNano()+int64(20*time.Millisecond) {
			time.Sleep(time.Millisecond)
		}
		return a, true, nil
	}
	if !s.new.active {
		return a, false, nil // nothing differs, so there are no rows either
	}
	var id uint64
	if s.result == nil || s.result.total == 0 {
		result = "" // no file, so nothing to finish after a crash
	} else {
		a.Total, id = s.result.total, s.result.id
		if err := s.result.finish(); err != nil {
			return a, false, err
		}
	}
	if err := s.new.finish(result, id); err != nil {
		return a, false, err
	}
	if err := s.ctx.Err(); err != nil {
		return a, false, err
	}
	if err := s.new.commit(); err != nil {
		return a, false, err
	}
	done = true
	if result != "" {
		err = os.Rename(s.result.path, result)
	}
	return a, false, err
}

// identity is a random number that tells one result from another.
func identity() uint64 {
	var b [8]byte
	rand.Read(b[:]) // the kernel's generator does not fail
	return binary.LittleEndian.Uint64(b[:])
}

// openRoot opens a layer's root, whose path the daemon chose.
func openRoot(path string) (int, error) {
	fd, err := syscall.Open(path, openDirFlags, 0)
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return fd, nil
}

// tick is the time that a kernel without fine timestamps gives to a file that changes now.
func tick() int64 {
	const clockRealtimeCoarse = 5
	var ts syscall.Timespec
	syscall.Syscall(syscall.SYS_CLOCK_GETTIME, clockRealtimeCoarse, uintptr(unsafe.Pointer(&ts)), 0)
	return ts.Nano()
}

// fineTimes says whether a change that follows a stat is always given another time than the stat showed: ext4, XFS, Btrfs
// and tmpfs since Linux 6.13.
func fineTimes(fd int) bool {
	var fs syscall.Statfs_t
	if syscall.Fstatfs(fd, &fs) != nil {
		return false
	}
	switch uint32(fs.Type) {
	case 0xef53, 0x58465342, 0x9123683e, 0x01021994:
	default:
		return false
	}
	var name syscall.Utsname
	if syscall.Uname(&name) != nil {
		return false
	}
	var release []byte
	for _, c := range name.Release {
		if c == 0 {
			break
		}
		release = append(release, byte(c))
	}
	return since613(string(release))
}

func since613(release string) bool {
	parts := strings.SplitN(release, ".", 3)
	if len(parts) < 2 {
		return false
	}
	major, err1 := strconv.Atoi(parts[0])
	minor, err2 := strconv.Atoi(strings.TrimRight(parts[1], "-+abcdefghijklmnopqrstuvwxyz"))
	return err1 == nil && err2 == nil && (major > 6 || major == 6 && minor >= 13)
}

// checkMount refuses an upper directory that is mounted with trusted.overlay.* marks, which this process cannot read.
func checkMount(upper string) error {
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return err
	}
	for _, line := range strings.Split(string(mounts), "\n") {
		fields := strings.Fields(line)
		if len(fields) < 4 || fields[2] != "overlay" {
			continue
		}
		options := "," + fields[3] + ","
		if strings.Contains(options, ",upperdir="+upper+",") && !strings.Contains(options, ",userxattr,") {
			return errTrustedXattrs
		}
	}
	return nil
}

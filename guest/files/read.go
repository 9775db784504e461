package files

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"innkeeper/guest/account"
	"innkeeper/guest/link"
)

// openRegular opens without ever blocking on a FIFO or device, and accepts regular files only.
func openRegular(path string) (*os.File, *syscall.Stat_t, error) { return openWith(path, 0) }

// openUnfollowed is openRegular for a path whose last name a walk has met: it may be something else by now, and no symlink is followed.
func openUnfollowed(path string) (*os.File, error) {
	file, _, err := openWith(path, syscall.O_NOFOLLOW)
	return file, err
}

func openWith(path string, flags int) (*os.File, *syscall.Stat_t, error) {
	descriptor, err := syscall.Open(path, syscall.O_RDONLY|syscall.O_NONBLOCK|syscall.O_CLOEXEC|syscall.O_NOCTTY|flags, 0)
	if err != nil {
		if isSpecial(path) { // a socket, or a device that is not there or refuses: what it says differs from kernel to kernel
			return nil, nil, link.Errorf("not_a_regular_file", "%s is not a regular file", path)
		}
		return nil, nil, wrap("open", path, err)
	}
	var status syscall.Stat_t
	err = syscall.Fstat(descriptor, &status)
	switch {
	case err != nil:
		err = wrap("stat", path, err)
	case status.Mode&syscall.S_IFMT == syscall.S_IFDIR:
		err = link.Errorf("is_a_directory", "%s is a directory", path)
	case status.Mode&syscall.S_IFMT != syscall.S_IFREG:
		err = link.Errorf("not_a_regular_file", "%s is not a regular file", path)
	default:
		// The poller has no use for a regular file, and a blocking descriptor keeps it out.
		if err = syscall.SetNonblock(descriptor, false); err == nil {
			return os.NewFile(uintptr(descriptor), path), &status, nil
		}
	}
	_ = syscall.Close(descriptor)
	return nil, nil, err
}

// isSpecial says whether path is there and neither a file nor a directory.
func isSpecial(path string) bool {
	var status syscall.Stat_t
	if syscall.Stat(path, &status) != nil {
		return false
	}
	kind := status.Mode & syscall.S_IFMT
	return kind != syscall.S_IFREG && kind != syscall.S_IFDIR
}

var neverPublic = []string{"/proc", "/sys", "/dev", "/run"}

// checkPublic asks the kernel where an open file really is: no symlink can lie about that.
func checkPublic(file *os.File, asked string) error {
	resolved, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(int(file.Fd())))
	if err != nil {
		return link.Errorf("permission_denied", "%s: cannot tell where it is", asked)
	}
	if isPrivate(resolved) {
		return link.Errorf("permission_denied", "%s is not public", asked)
	}
	return nil
}

func isPrivate(path string) bool {
	path = filepath.Clean(path)
	for _, folder := range neverPublic {
		if path == folder || strings.HasPrefix(path, folder+"/") {
			return true
		}
	}
	return false
}

type readStart struct {
	Size    int64  `json:"size"`
	MtimeNs int64  `json:"mtime_ns"`
	Mime    string `json:"mime"`
	// With size and mtime_ns these tell one content of a path from another.
	Inode   uint64 `json:"inode"`
	CtimeNs int64  `json:"ctime_ns"`
}

// Read serves the read verb.
func (s *Store) Read(stream *link.Stream, open link.Request) {
	request := struct {
		Location
		Offset int64  `json:"offset"`
		Length *int64 `json:"length"`
		Public bool   `json:"public"`
	}{}
	err := s.Resolve(open, &request, &request.Location)
	if err == nil && (request.Offset < 0 || request.Length != nil && *request.Length < 0) {
		err = link.Errorf("bad_request", "read: negative offset or length")
	}
	if err == nil && request.Public && isPrivate(request.Path) {
		// Not even opened: opening some devices has effects.
		err = link.Errorf("permission_denied", "%s is not public", request.Path)
	}
	if err != nil {
		stream.Fail(err)
		return
	}
	var file *os.File
	var status *syscall.Stat_t
	err = account.As(request.Account, func() (err error) {
		file, status, err = openRegular(request.Path)
		return err
	})
	if err != nil {
		stream.Fail(err)
		return
	}
	defer file.Close()
	if request.Public {
		if err := checkPublic(file, request.Path); err != nil {
			stream.Fail(err)
			return
		}
	}
	start := readStart{Size: status.Size, MtimeNs: status.Mtim.Nano(), Mime: mimeOf(request.Path, file),
		Inode: status.Ino, CtimeNs: status.Ctim.Nano()}
	left := int64(-1)
	if request.Length != nil {
		left = *request.Length
	}
	sendFile(stream, file, start, request.Offset, left)
}

// sendFile reads straight into frames; left < 0 means to the end. Small files go out in one system call, answer included.
func sendFile(stream *link.Stream, file *os.File, start readStart, offset, left int64) {
	pending := []link.Frame{stream.JSONFrame(link.Message, start)}
	size := int64(link.MaxPayload)
	if rest := start.Size - offset; rest < size {
		// One more byte than expected shows a file that grew, or whose size is not told (/proc).
		size = max(rest+1, 4096)
	}
	buffer := make([]byte, link.HeaderBytes+int(size))
	var sent int64
	for left != 0 {
		want := int64(len(buffer) - link.HeaderBytes)
		if left >= 0 && left < want {
			want = left
		}
		granted, err := stream.WaitCredit(int(want))
		if err != nil {
			return
		}
		count, err := syscall.Pread(int(file.Fd()), buffer[link.HeaderBytes:link.HeaderBytes+granted], offset)
		if err == syscall.EINTR {
			count, err = 0, nil
			stream.ReturnCredit(granted)
			continue
		}
		if err != nil {
			stream.Fail(wrap("read", file.Name(), err))
			return
		}
		stream.ReturnCredit(granted - count)
		if count == 0 {
			break
		}
		offset += int64(count)
		sent += int64(count)
		if left > 0 {
			left -= int64(count)
		}
		if pending != nil && (count < granted || left == 0) {
			pending = append(pending, link.Frame{Stream: stream.ID, Kind: link.Data, Payload: buffer[link.HeaderBytes : link.HeaderBytes+count]})
			break
		}
		if pending != nil {
			if stream.SendFrames(pending...) != nil {
				return
			}
			pending = nil
		}
		if stream.SendTaken(link.Data, buffer[:link.HeaderBytes+count]) != nil {
			return
		}
	}
	result := stream.JSONFrame(link.Result, struct {
		Bytes int64 `json:"bytes"`
	}{sent})
	_ = stream.SendFrames(append(pending, result)...)
}

func max(a, b int64) int64 {
	if a > b {
		return a
	}
	return b
}

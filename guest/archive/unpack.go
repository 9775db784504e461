package archive

import (
	"archive/tar"
	"errors"
	"io"
	"os"
	"path"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"innkeeper/guest/account"
	"innkeeper/guest/link"
	"innkeeper/guest/reaper"
)

const (
	permissionBits = 0o7777
	copyBytes      = 256 << 10
)

// Unpacker serves the unpack verb; what it cannot decompress itself it gives to the guest's own programs.
type Unpacker struct {
	children *reaper.Table
}

// NewUnpacker starts processes through children.
func NewUnpacker(children *reaper.Table) *Unpacker { return &Unpacker{children} }

type unpackRequest struct {
	Destination string  `json:"destination"`
	AsFile      bool    `json:"as_file"` // the one file in the stream takes the destination as its name, unless that is a directory
	Archive     bool    `json:"archive"` // the stream is an archive of the user's, perhaps compressed
	Chown       string  `json:"chown"`
	Mode        *uint32 `json:"mode"`
	Owners      bool    `json:"owners"` // keep the owners that the stream names; root's otherwise
}

// Unpack serves the verb: a tar stream becomes files below the destination, written as root.
func (u *Unpacker) Unpack(stream *link.Stream, open link.Request) {
	request := unpackRequest{}
	err := open.Decode(&request)
	if err == nil && !strings.HasPrefix(request.Destination, "/") {
		err = link.Errorf("bad_request", "unpack: the destination is not an absolute path")
	}
	if err != nil {
		stream.Fail(err)
		return
	}
	work := &unpacking{request: request, buffer: make([]byte, copyBytes), made: map[string]bool{}}
	if request.Chown != "" {
		if work.owner, err = account.LookupOwner(request.Chown); err != nil {
			stream.Fail(err)
			return
		}
	}
	var input io.Reader = &receiver{stream: stream}
	if request.Archive {
		input, err = u.decompress(input, nil)
		if program, ok := input.(*piped); ok {
			// Its output closed, a program that still writes ends, and so does who feeds it.
			defer program.Close()
		}
	}
	if err == nil {
		err = work.run(tar.NewReader(input))
	}
	if err == nil {
		// What follows the end of an archive is padding; the opener waits until all of it was taken.
		_, err = io.Copy(io.Discard, input)
	}
	if err != nil {
		stream.Fail(describe(err))
		return
	}
	stream.Succeed(struct {
		Files   int64 `json:"files"`
		Bytes   int64 `json:"bytes"`
		Skipped int64 `json:"skipped"`
	}{work.files, work.bytes, work.skipped})
}

func describe(err error) error {
	var known *link.Error
	var errno syscall.Errno
	if errors.As(err, &known) || errors.As(err, &errno) || errors.Is(err, link.ErrGone) {
		return err
	}
	return link.Errorf("bad_request", "unpack: %v", err)
}

type unpacking struct {
	request unpackRequest
	owner   account.Owner
	buffer  []byte
	made    map[string]bool // directories that are known to be there
	folders []madeFolder
	files   int64
	bytes   int64
	skipped int64

	contained bool // nothing may come up outside the destination, nor by way of a symlink
	entries   int64
	names     int64 // bytes of the names in made and folders
}

// madeFolder is a directory of the stream: what it says of it comes last, as it could forbid to make what lies in it.
type madeFolder struct {
	path     string
	mode     uint32
	modified time.Time
}

func (w *unpacking) run(reader *tar.Reader) error {
	destination := path.Clean(w.request.Destination)
	if w.request.AsFile {
		if information, err := os.Stat(destination); err == nil && information.IsDir() {
			w.request.AsFile = false
		}
	}
	if !w.request.AsFile {
		if err := w.directory(destination); err != nil {
			return err
		}
	}
	for {
		header, err := reader.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		target := destination
		if !w.request.AsFile {
			name := path.Clean("/" + header.Name)
			if strings.Contains("/"+header.Name+"/", "/../") {
				return link.Errorf("bad_request", "unpack: %q leads out of the archive", header.Name)
			}
			target = path.Join(destination, name)
		}
		if ofTheHost(target) {
			w.skipped++
			continue
		}
		if err := w.entry(target, header, reader); err != nil {
			return err
		}
	}
	if w.contained {
		return nil // finished where its place is
	}
	return w.finish(func(made string) string { return made })
}

// finish gives directories their modes and times, each where it lies by now; the empty place is nowhere.
func (w *unpacking) finish(where func(made string) string) error {
	for index := len(w.folders) - 1; index >= 0; index-- {
		one := w.folders[index]
		place := where(one.path)
		if place == "" {
			continue
		}
		if err := syscall.Chmod(place, one.mode); err != nil {
			return &os.PathError{Op: "chmod", Path: place, Err: err}
		}
		setTime(place, one.modified)
	}
	return nil
}

// ofTheHost tells of what lies in the guest and is not its image's: kernel file systems, and the agent's own place.
func ofTheHost(target string) bool {
	for _, place := range []string{"/proc", "/sys", "/dev", "/.innkeeper"} {
		if target == place || strings.HasPrefix(target, place+"/") {
			return true
		}
	}
	return false
}

func (w *unpacking) entry(target string, header *tar.Header, content io.Reader) error {
	if header.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	if w.contained {
		if err := w.count(); err != nil {
			return err
		}
		if err := w.contain(target); err != nil {
			return err
		}
	}
	if header.Typeflag != tar.TypeDir {
		if err := w.directory(path.Dir(target)); err != nil {
			return err
		}
		if err := makeRoom(target); err != nil {
			return err
		}
	}
	switch header.Typeflag {
	case tar.TypeDir:
		return w.folder(target, header)
	case tar.TypeReg, tar.TypeGNUSparse:
		return w.file(target, header, content)
	case tar.TypeSymlink:
		if err := os.Symlink(header.Linkname, target); err != nil {
			return err
		}
		w.files++
		return w.own(target, header)
	case tar.TypeLink:
		existing := path.Join(path.Clean(w.request.Destination), path.Clean("/"+header.Linkname))
		if w.contained {
			if err := w.contain(existing); err != nil {
				return err
			}
		}
		w.files++
		return os.Link(existing, target)
	}
	// Devices, FIFOs: an image has none.
	w.skipped++
	return nil
}

// makeRoom takes away what is in the way of a file; a directory stays, and is an error.
func makeRoom(target string) error {
	information, err := os.Lstat(target)
	if err != nil {
		return nil
	}
	if information.IsDir() {
		return link.Errorf("is_a_directory", "%s is a directory", target)
	}
	return os.Remove(target)
}

func (w *unpacking) file(target string, header *tar.Header, content io.Reader) error {
	file, err := os.OpenFile(target, os.O_WRONLY|os.O_CREATE|os.O_EXCL|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	written, err := io.CopyBuffer(struct{ io.Writer }{file}, content, w.buffer)
	w.files++
	w.bytes += written
	if err == nil {
		uid, gid := w.ids(header)
		if uid != 0 || gid != 0 {
			err = file.Chown(uid, gid)
		}
	}
	if err == nil {
		// After the owner: a change of owner clears the set-id bits.
		err = syscall.Fchmod(int(file.Fd()), w.mode(header))
	}
	if closed := file.Close(); err == nil {
		err = closed
	}
	if err == nil {
		setTime(target, header.ModTime)
	}
	return err
}

// folder makes a directory of the stream; one that is there keeps its mode unless an archive says otherwise.
func (w *unpacking) folder(target string, header *tar.Header) error {
	look := os.Stat
	if w.contained {
		look = os.Lstat
	}
	information, err := look(target)
	if err == nil && !information.IsDir() {
		return link.Errorf("not_a_directory", "%s is there and not a directory", target)
	}
	if err == nil && !w.request.Archive {
		w.made[target] = true
		return nil
	}
	if err != nil {
		if err := w.directory(path.Dir(target)); err != nil {
			return err
		}
		if err := os.Mkdir(target, 0o755); err != nil {
			return err
		}
		w.files++
	}
	w.made[target] = true
	if err := w.own(target, header); err != nil {
		return err
	}
	w.names += int64(len(target))
	w.folders = append(w.folders, madeFolder{target, w.mode(header), header.ModTime})
	return nil
}

// directory makes a directory and its parents that no entry describes.
func (w *unpacking) directory(target string) error {
	if w.made[target] {
		return nil
	}
	information, err := os.Stat(target)
	if err == nil && information.IsDir() {
		w.made[target] = true
		return nil
	}
	if err == nil {
		return link.Errorf("not_a_directory", "%s is there and not a directory", target)
	}
	if target != "/" {
		if err := w.directory(path.Dir(target)); err != nil {
			return err
		}
	}
	if err := os.Mkdir(target, 0o755); err != nil {
		return err
	}
	w.made[target] = true
	w.names += int64(len(target))
	if w.request.Chown != "" {
		return os.Lchown(target, int(w.owner.UID), int(w.owner.GID))
	}
	return nil
}

func (w *unpacking) own(target string, header *tar.Header) error {
	uid, gid := w.ids(header)
	if uid == 0 && gid == 0 {
		return nil
	}
	return os.Lchown(target, uid, gid)
}

func (w *unpacking) ids(header *tar.Header) (uid, gid int) {
	switch {
	case w.request.Chown != "":
		return int(w.owner.UID), int(w.owner.GID)
	case w.request.Owners:
		return header.Uid, header.Gid
	}
	return 0, 0
}

func (w *unpacking) mode(header *tar.Header) uint32 {
	if w.request.Mode != nil {
		return *w.request.Mode & permissionBits
	}
	if w.contained {
		return uint32(header.Mode) & treeMode
	}
	return uint32(header.Mode) & permissionBits
}

const (
	atFdcwd         = -0x64
	symlinkNoFollow = 0x100
)

// setTime is for the eye of programs that compare times; a file system that cannot is no error.
func setTime(target string, modified time.Time) {
	if modified.Unix() < 0 {
		return
	}
	stamp := syscall.NsecToTimespec(modified.UnixNano())
	stamps := [2]syscall.Timespec{stamp, stamp}
	name, err := syscall.BytePtrFromString(target)
	if err != nil {
		return
	}
	fd := atFdcwd
	_, _, _ = syscall.Syscall6(syscall.SYS_UTIMENSAT, uintptr(fd), uintptr(unsafe.Pointer(name)),
		uintptr(unsafe.Pointer(&stamps[0])), symlinkNoFollow, 0, 0)
}

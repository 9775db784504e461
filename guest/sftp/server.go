// Package sftp is the server of SSH file transfers: a program of the guest's user, which may do what that user may and is spoken to over its input
// and output. Whatever a client makes of paths, it makes in the guest.
package sftp

import (
	"bufio"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
)

const (
	version    = 3
	maxHandles = 256
	// Names in one answer to readdir.
	listedAtOnce = 128

	openRead     = 1
	openWrite    = 2
	openAppend   = 4
	openCreate   = 8
	openTruncate = 16
	openExclude  = 32

	statusOK          = 0
	statusEOF         = 1
	statusNoFile      = 2
	statusDenied      = 3
	statusFailure     = 4
	statusBad         = 5
	statusUnsupported = 8
)

// handle is an open file or directory. Of a directory `names` are still to be listed.
type handle struct {
	file      *os.File
	directory string
	names     []string
	appends   bool
}

type server struct {
	output  *bufio.Writer
	handles map[string]*handle
	next    uint64
}

// Main serves until the input ends; the program's exit status.
func Main() int {
	if err := Serve(os.Stdin, os.Stdout); err != nil {
		_, _ = os.Stderr.WriteString("sftp-server: " + err.Error() + "\n")
		return 1
	}
	return 0
}

// Serve answers the packets of an input until it ends.
func Serve(input io.Reader, output io.Writer) error {
	s := &server{output: bufio.NewWriterSize(output, maxPacket), handles: map[string]*handle{}}
	defer s.closeAll()
	buffered := bufio.NewReaderSize(input, 64<<10)
	var content []byte
	for first := true; ; first = false {
		var err error
		content, err = receive(buffered, content)
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		fields := &reader{rest: content[1:]}
		if first != (content[0] == typeInit) {
			return errMalformed
		}
		if first {
			err = s.greet()
		} else {
			err = s.answer(content[0], fields)
		}
		if err != nil {
			return err
		}
		// Answers to requests that came together go together.
		if buffered.Buffered() == 0 {
			if err := s.output.Flush(); err != nil {
				return err
			}
		}
	}
}

func (s *server) closeAll() {
	_ = s.output.Flush()
	for _, open := range s.handles {
		_ = open.close()
	}
}

func (s *server) greet() error {
	return newPacket(typeVersion).uint32(version).
		string("posix-rename@openssh.com").string("1").
		string("hardlink@openssh.com").string("1").
		string("fsync@openssh.com").string("1").send(s.output)
}

// answer serves one request. Only an error of the connection itself is returned.
func (s *server) answer(kind byte, fields *reader) error {
	id := fields.uint32()
	if fields.bad {
		return errMalformed
	}
	serve, known := requests[kind]
	if !known {
		return s.status(id, statusUnsupported, "not supported")
	}
	reply, err := serve(s, fields)
	if fields.bad {
		return s.status(id, statusBad, "a malformed request")
	}
	if err != nil {
		code, message := described(err)
		return s.status(id, code, message)
	}
	if reply == nil {
		return s.status(id, statusOK, "")
	}
	return reply(id).send(s.output)
}

func (s *server) status(id, code uint32, message string) error {
	return newPacket(typeStatus).uint32(id).uint32(code).string(message).string("").send(s.output)
}

func described(err error) (uint32, string) {
	var number syscall.Errno
	switch {
	case err == io.EOF:
		return statusEOF, "end of file"
	case err == errUnsupported:
		return statusUnsupported, err.Error()
	case errors.Is(err, os.ErrNotExist):
		return statusNoFile, "no such file or directory"
	case errors.Is(err, os.ErrPermission):
		return statusDenied, "permission denied"
	case errors.As(err, &number):
		return statusFailure, number.Error()
	default:
		return statusFailure, err.Error()
	}
}

// A reply is made once its number is known; none is the status of success.
type reply func(id uint32) packet

var (
	errUnsupported  = errors.New("not supported")
	errNoHandle     = errors.New("no such handle")
	errManyHandles  = errors.New("too many open files")
	errIsDirectory  = errors.New("is a directory")
	errNotDirectory = errors.New("not a directory")
)

var requests = map[byte]func(*server, *reader) (reply, error){
	typeOpen: (*server).open, typeClose: (*server).closeHandle, typeRead: (*server).read, typeWrite: (*server).write,
	typeLstat: (*server).lstat, typeStat: (*server).stat, typeFstat: (*server).fstat, typeSetstat: (*server).setstat, typeFsetstat: (*server).fsetstat,
	typeOpendir: (*server).opendir, typeReaddir: (*server).readdir, typeRemove: (*server).remove, typeMkdir: (*server).mkdir, typeRmdir: (*server).rmdir,
	typeRealpath: (*server).realpath, typeRename: (*server).rename, typeReadlink: (*server).readlink, typeSymlink: (*server).symlink,
	typeExtended: (*server).extended,
}

// --- open files ---------------------------------------------------------------------------------------------------

func (h *handle) close() error {
	if h.file == nil {
		return nil
	}
	return h.file.Close()
}

func (s *server) keep(open *handle) (reply, error) {
	if len(s.handles) >= maxHandles {
		_ = open.close()
		return nil, errManyHandles
	}
	s.next++
	name := strconv.FormatUint(s.next, 16)
	s.handles[name] = open
	return func(id uint32) packet { return newPacket(typeHandle).uint32(id).string(name) }, nil
}

func (s *server) file(fields *reader) (*handle, error) {
	open := s.handles[fields.string()]
	if open == nil {
		return nil, errNoHandle
	}
	if open.file == nil {
		return nil, errIsDirectory
	}
	return open, nil
}

func (s *server) open(fields *reader) (reply, error) {
	path, wanted, said := fields.string(), fields.uint32(), fields.attributes()
	if fields.bad {
		return nil, nil
	}
	flags := os.O_RDONLY
	switch {
	case wanted&openRead != 0 && wanted&openWrite != 0:
		flags = os.O_RDWR
	case wanted&openWrite != 0:
		flags = os.O_WRONLY
	}
	for bit, flag := range map[uint32]int{openAppend: os.O_APPEND, openCreate: os.O_CREATE, openTruncate: os.O_TRUNC, openExclude: os.O_EXCL} {
		if wanted&bit != 0 {
			flags |= flag
		}
	}
	file, err := os.OpenFile(path, flags, said.mode(0o666))
	if err != nil {
		return nil, err
	}
	if information, err := file.Stat(); err == nil && information.IsDir() {
		_ = file.Close()
		return nil, errIsDirectory
	}
	return s.keep(&handle{file: file, appends: wanted&openAppend != 0})
}

func (s *server) closeHandle(fields *reader) (reply, error) {
	name := fields.string()
	open := s.handles[name]
	if open == nil {
		return nil, errNoHandle
	}
	delete(s.handles, name)
	return nil, open.close()
}

func (s *server) read(fields *reader) (reply, error) {
	open, err := s.file(fields)
	offset, size := fields.uint64(), fields.uint32()
	if fields.bad || err != nil {
		return nil, err
	}
	if size > maxData {
		size = maxData
	}
	if offset > 1<<62 {
		return nil, io.EOF
	}
	content := make([]byte, size)
	count, err := open.file.ReadAt(content, int64(offset))
	if errors.Is(err, syscall.ESPIPE) {
		count, err = open.file.Read(content)
	}
	if count == 0 && size > 0 {
		if err == nil {
			err = io.EOF
		}
		return nil, err
	}
	return func(id uint32) packet { return newPacket(typeData).uint32(id).string(string(content[:count])) }, nil
}

func (s *server) write(fields *reader) (reply, error) {
	open, err := s.file(fields)
	offset, content := fields.uint64(), fields.bytes()
	if fields.bad || err != nil {
		return nil, err
	}
	if open.appends {
		_, err = open.file.Write(content)
		return nil, err
	}
	if offset > 1<<62 {
		return nil, syscall.EFBIG
	}
	_, err = open.file.WriteAt(content, int64(offset))
	if errors.Is(err, syscall.ESPIPE) {
		_, err = open.file.Write(content)
	}
	return nil, err
}

// --- what files are -------------------------------------------------------------------------------------------------

func told(information os.FileInfo, err error) (reply, error) {
	if err != nil {
		return nil, err
	}
	return func(id uint32) packet { return newPacket(typeAttrs).uint32(id).attributes(information) }, nil
}

func (s *server) lstat(fields *reader) (reply, error) { return told(os.Lstat(fields.string())) }

func (s *server) stat(fields *reader) (reply, error) { return told(os.Stat(fields.string())) }

func (s *server) fstat(fields *reader) (reply, error) {
	open, err := s.file(fields)
	if err != nil {
		return nil, err
	}
	return told(open.file.Stat())
}

func (s *server) setstat(fields *reader) (reply, error) {
	path, said := fields.string(), fields.attributes()
	if fields.bad {
		return nil, nil
	}
	return nil, said.apply(path, nil)
}

func (s *server) fsetstat(fields *reader) (reply, error) {
	open, err := s.file(fields)
	said := fields.attributes()
	if fields.bad || err != nil {
		return nil, err
	}
	return nil, said.apply("", open.file)
}

// --- directories ----------------------------------------------------------------------------------------------------

func (s *server) opendir(fields *reader) (reply, error) {
	path := fields.string()
	directory, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer directory.Close()
	if information, err := directory.Stat(); err != nil || !information.IsDir() {
		return nil, errNotDirectory
	}
	names, err := directory.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	return s.keep(&handle{directory: path, names: append([]string{".", ".."}, names...)})
}

func (s *server) readdir(fields *reader) (reply, error) {
	open := s.handles[fields.string()]
	if open == nil || open.file != nil {
		return nil, errNoHandle
	}
	var rows packet
	count := uint32(0)
	for count < listedAtOnce && len(rows) < maxData/2 && len(open.names) > 0 {
		name := open.names[0]
		open.names = open.names[1:]
		information, err := os.Lstat(filepath.Join(open.directory, name))
		if err != nil {
			// It went meanwhile.
			continue
		}
		rows = rows.string(name).string(longName(name, information)).attributes(information)
		count++
	}
	if count == 0 {
		return nil, io.EOF
	}
	return func(id uint32) packet { return append(newPacket(typeName).uint32(id).uint32(count), rows...) }, nil
}

func (s *server) mkdir(fields *reader) (reply, error) {
	path, said := fields.string(), fields.attributes()
	if fields.bad {
		return nil, nil
	}
	return nil, os.Mkdir(path, said.mode(0o777))
}

func (s *server) rmdir(fields *reader) (reply, error) { return nil, syscall.Rmdir(fields.string()) }

func (s *server) remove(fields *reader) (reply, error) { return nil, syscall.Unlink(fields.string()) }

// --- names ----------------------------------------------------------------------------------------------------------

func named(name string) reply {
	return func(id uint32) packet {
		return newPacket(typeName).uint32(id).uint32(1).string(name).string(name).uint32(0)
	}
}

// realpath follows what is there; a client also asks it for names that are not there yet.
func (s *server) realpath(fields *reader) (reply, error) {
	path := fields.string()
	if path == "" {
		path = "."
	}
	absolute, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	if followed, err := filepath.EvalSymlinks(absolute); err == nil {
		absolute = followed
	}
	return named(absolute), nil
}

// rename takes no name that is there already, as version 3 has it.
func (s *server) rename(fields *reader) (reply, error) {
	from, to := fields.string(), fields.string()
	if fields.bad {
		return nil, nil
	}
	information, err := os.Lstat(from)
	if err != nil {
		return nil, err
	}
	if information.Mode().IsRegular() {
		// The kernel refuses a second file of that name, whenever it came up.
		if err := os.Link(from, to); err == nil {
			return nil, syscall.Unlink(from)
		} else if !errors.Is(err, syscall.EPERM) && !errors.Is(err, syscall.EOPNOTSUPP) && !errors.Is(err, syscall.EXDEV) {
			return nil, err
		}
	}
	if _, err := os.Lstat(to); err == nil {
		return nil, syscall.EEXIST
	}
	return nil, os.Rename(from, to)
}

func (s *server) readlink(fields *reader) (reply, error) {
	target, err := os.Readlink(fields.string())
	if err != nil {
		return nil, err
	}
	return named(target), nil
}

// symlink takes the target first, which is OpenSSH's order and not the draft's.
func (s *server) symlink(fields *reader) (reply, error) {
	target, path := fields.string(), fields.string()
	if fields.bad {
		return nil, nil
	}
	return nil, os.Symlink(target, path)
}

func (s *server) extended(fields *reader) (reply, error) {
	switch fields.string() {
	case "posix-rename@openssh.com":
		from, to := fields.string(), fields.string()
		if fields.bad {
			return nil, nil
		}
		return nil, os.Rename(from, to)
	case "hardlink@openssh.com":
		from, to := fields.string(), fields.string()
		if fields.bad {
			return nil, nil
		}
		return nil, os.Link(from, to)
	case "fsync@openssh.com":
		open, err := s.file(fields)
		if err != nil {
			return nil, err
		}
		return nil, open.file.Sync()
	}
	return nil, errUnsupported
}

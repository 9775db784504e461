package files

import (
	"os"
	"path/filepath"
	"syscall"

	"innkeeper/guest/account"
	"innkeeper/guest/link"
)

// draft is a file that is being written beside its target.
type draft struct {
	file    *os.File
	beside  string
	target  string
	existed *syscall.Stat_t
	fresh   bool // The target must not be there.
}

// Write serves the write verb.
func (s *Store) Write(stream *link.Stream, open link.Request) {
	request := struct {
		Location
		Mode    *uint32 `json:"mode"`
		Parents *bool   `json:"parents"`
		Size    *int64  `json:"size"`
		Replace *bool   `json:"replace"`
	}{}
	if err := s.Resolve(open, &request, &request.Location); err != nil {
		stream.Fail(err)
		return
	}
	mode := uint32(0o644)
	if request.Mode != nil {
		mode = *request.Mode & permissionBits
	}
	var made *draft
	err := account.As(request.Account, func() (err error) {
		made, err = begin(request.Path, request.Parents == nil || *request.Parents, request.Replace != nil && !*request.Replace)
		return err
	})
	if err != nil {
		stream.Fail(err)
		return
	}
	bytes, err := made.fill(stream, request.Size)
	if err == nil {
		err = made.finish(request.Account, mode, &s.drafts)
	}
	if err != nil {
		made.discard(request.Account)
		stream.Fail(err)
		return
	}
	stream.Succeed(struct {
		Bytes   int64 `json:"bytes"`
		Created bool  `json:"created"`
	}{bytes, made.existed == nil})
}

const symlinkDepth = 40

// begin opens the draft with the user's permissions. A symlink is written through, so the target is what it points to; where the file
// has to be a fresh one, it is a name that is taken.
func begin(path string, parents, fresh bool) (*draft, error) {
	for depth := 0; !fresh; depth++ {
		target, err := os.Readlink(path)
		if err != nil {
			break
		}
		if depth == symlinkDepth {
			return nil, wrap("open", path, syscall.ELOOP)
		}
		if !filepath.IsAbs(target) {
			// Not cleaned: with a symlink before it, `..` is not the folder that the text says.
			target = filepath.Dir(path) + "/" + target
		}
		path = target
	}
	made := &draft{target: path, fresh: fresh}
	var status syscall.Stat_t
	switch err := syscall.Lstat(path, &status); {
	case err == nil && fresh:
		return nil, wrap("open", path, syscall.EEXIST)
	case err == nil:
		if err := mayReplace(path, &status); err != nil {
			return nil, err
		}
		made.existed = &status
	case err != syscall.ENOENT:
		return nil, wrap("open", path, err)
	case path[len(path)-1] == '/':
		return nil, link.Errorf("is_a_directory", "%s names a directory", path)
	case parents:
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return nil, err
		}
	}
	beside, err := draftName(path)
	if err != nil {
		return nil, err
	}
	made.beside = beside
	file, err := os.OpenFile(made.beside, os.O_WRONLY|os.O_CREATE|os.O_EXCL|syscall.O_NOFOLLOW, 0o600)
	made.file = file
	return made, err
}

// mayReplace refuses what is no regular file, and a file that the user could not have written in place.
func mayReplace(path string, status *syscall.Stat_t) error {
	switch status.Mode & syscall.S_IFMT {
	case syscall.S_IFREG:
	case syscall.S_IFDIR:
		return link.Errorf("is_a_directory", "%s is a directory", path)
	default:
		return link.Errorf("not_a_regular_file", "%s is not a regular file", path)
	}
	descriptor, err := syscall.Open(path, syscall.O_WRONLY|syscall.O_NONBLOCK|syscall.O_CLOEXEC|syscall.O_NOFOLLOW, 0)
	if err == syscall.ETXTBSY { // a running program is replaced, not overwritten
		return nil
	}
	if err != nil {
		return wrap("open", path, err)
	}
	return syscall.Close(descriptor)
}

// fill takes the opener's bytes up to END. With a size announced, any other number is an error.
func (d *draft) fill(stream *link.Stream, size *int64) (int64, error) {
	var total int64
	for {
		data, ok, err := stream.Read()
		if err != nil {
			return total, err
		}
		if !ok {
			break
		}
		if _, err := d.file.Write(data); err != nil {
			return total, err
		}
		total += int64(len(data))
		stream.Release(data)
	}
	if size != nil && *size != total {
		return total, link.Errorf("bad_request", "write: %d bytes came, %d were announced", total, *size)
	}
	return total, nil
}

// finish gives the draft its mode and owner and renames it over the target.
func (d *draft) finish(user account.User, mode uint32, known *drafts) error {
	if d.existed != nil {
		mode = d.existed.Mode & permissionBits
		if os.Getuid() == 0 && (d.existed.Uid != user.UID || d.existed.Gid != user.GID) {
			if err := d.file.Chown(int(d.existed.Uid), int(d.existed.Gid)); err != nil {
				return err
			}
		}
	}
	// After the owner: a change of owner clears the set-id bits.
	if err := syscall.Fchmod(int(d.file.Fd()), mode); err != nil {
		return wrap("chmod", d.beside, err)
	}
	if err := d.file.Close(); err != nil {
		return err
	}
	if d.existed != nil {
		known.note(filepath.Base(d.beside))
	}
	return account.As(user, func() error {
		return moveTo(d.beside, d.target, !d.fresh)
	})
}

func (d *draft) discard(user account.User) {
	_ = d.file.Close()
	_ = account.As(user, func() error { return os.Remove(d.beside) })
}

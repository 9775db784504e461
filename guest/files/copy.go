package files

import (
	"crypto/rand"
	"encoding/hex"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"innkeeper/guest/account"
	"innkeeper/guest/link"
)

const (
	copyBytes = 256 << 10
	// How often a verb that works for long says that it does.
	signOfLife = 5 * time.Second
	copyMode   = 0o777
)

// lively does the work and meanwhile tells the opener, every few seconds, that it goes on.
func lively(stream *link.Stream, work func() error) error {
	done := make(chan error, 1)
	go func() { done <- work() }()
	ticker := time.NewTicker(signOfLife)
	defer ticker.Stop()
	for {
		select {
		case err := <-done:
			return err
		case <-ticker.C:
			_ = stream.SendMessage(struct{}{})
		}
	}
}

// draftName is a name beside a target that nobody else has.
func draftName(target string) (string, error) {
	random := make([]byte, 8)
	if _, err := rand.Read(random); err != nil {
		return "", err
	}
	return filepath.Join(filepath.Dir(target), draftPrefix+hex.EncodeToString(random)), nil
}

// isDraft says whether a name is one of draftName's.
func isDraft(name string) bool {
	return len(name) == len(draftPrefix)+16 && strings.HasPrefix(name, draftPrefix)
}

const draftPrefix = ".inn-"

// Copy serves the copy verb. What is copied gets its name when it is whole.
func (s *Store) Copy(stream *link.Stream, open link.Request) {
	request := struct {
		Location
		To        string `json:"to"`
		ToB64     string `json:"to_b64"`
		Recursive bool   `json:"recursive"`
		Replace   *bool  `json:"replace"`
	}{}
	err := s.Resolve(open, &request, &request.Location)
	if err == nil {
		request.To, err = decodePath(request.To, request.ToB64)
	}
	if err != nil {
		stream.Fail(err)
		return
	}
	work := &copying{stream: stream, drafts: &s.drafts}
	err = lively(stream, func() error {
		return account.As(request.Account, func() error {
			return work.run(request.Path, filepath.Clean(request.To), request.Recursive, request.Replace == nil || *request.Replace)
		})
	})
	answer(stream, err, struct {
		Files   int64 `json:"files"`
		Bytes   int64 `json:"bytes"`
		Skipped int64 `json:"skipped"`
	}{work.files, work.bytes, work.skipped})
}

type copying struct {
	stream  *link.Stream
	drafts  *drafts
	buffer  []byte
	files   int64
	bytes   int64
	skipped int64
}

func (c *copying) run(from, to string, recursive, replace bool) error {
	var status syscall.Stat_t
	if err := syscall.Lstat(from, &status); err != nil {
		return wrap("copy", from, err)
	}
	directory := status.Mode&syscall.S_IFMT == syscall.S_IFDIR
	if directory && !recursive {
		return link.Errorf("is_a_directory", "%s is a directory", from)
	}
	if err := mayTake(to, replace && !directory); err != nil {
		return err
	}
	if directory && isWithin(from, filepath.Dir(to)) {
		return link.Errorf("bad_request", "%s lies in what is copied", to)
	}
	beside, err := draftName(to)
	if err != nil {
		return err
	}
	if err = c.entry(from, beside, &status); err == nil && c.skipped > 0 && !directory {
		err = link.Errorf("not_a_regular_file", "%s is not a regular file", from)
	}
	var replaced syscall.Stat_t
	if err == nil && syscall.Lstat(to, &replaced) == nil {
		c.drafts.note(baseOf(beside))
	}
	if err == nil {
		// Asked again, since it may have come up meanwhile; a directory is never replaced.
		err = moveTo(beside, to, replace && !directory)
	}
	if err != nil {
		_ = os.RemoveAll(beside)
	}
	return err
}

// mayTake refuses a name that is taken by what may not be replaced.
func mayTake(path string, replace bool) error {
	var status syscall.Stat_t
	switch err := syscall.Lstat(path, &status); {
	case err == syscall.ENOENT:
		return nil
	case err != nil:
		return wrap("copy", path, err)
	case !replace:
		return wrap("copy", path, syscall.EEXIST)
	case status.Mode&syscall.S_IFMT == syscall.S_IFDIR:
		return link.Errorf("is_a_directory", "%s is a directory", path)
	}
	return nil
}

// isWithin says whether a directory is the tree at root or lies in it, whatever symlinks lead there.
func isWithin(root, directory string) bool {
	var top, one syscall.Stat_t
	if syscall.Stat(root, &top) != nil {
		return false
	}
	real, err := filepath.EvalSymlinks(directory)
	for err == nil {
		if syscall.Stat(real, &one) == nil && one.Dev == top.Dev && one.Ino == top.Ino {
			return true
		}
		if real == "/" {
			return false
		}
		real = filepath.Dir(real)
	}
	return false
}

func (c *copying) entry(from, to string, status *syscall.Stat_t) error {
	if cancelled, broken := c.stream.State(); cancelled || broken {
		return link.ErrGone
	}
	switch status.Mode & syscall.S_IFMT {
	case syscall.S_IFREG:
		return c.file(from, to)
	case syscall.S_IFDIR:
		return c.directory(from, to, status)
	case syscall.S_IFLNK:
		target, err := os.Readlink(from)
		if err != nil {
			return err
		}
		c.files++
		return os.Symlink(target, to)
	}
	// Sockets, FIFOs and devices belong to whoever made them.
	c.skipped++
	return nil
}

func (c *copying) file(from, to string) error {
	source, err := openUnfollowed(from)
	if err != nil {
		return err
	}
	defer source.Close()
	var status syscall.Stat_t
	if err := syscall.Fstat(int(source.Fd()), &status); err != nil {
		return wrap("stat", from, err)
	}
	target, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	err = c.content(source, target)
	if err == nil {
		err = syscall.Fchmod(int(target.Fd()), status.Mode&copyMode)
	}
	if closed := target.Close(); err == nil {
		err = closed
	}
	if err == nil {
		keepTime(to, &status)
	}
	c.files++
	return err
}

func (c *copying) content(source, target *os.File) error {
	if c.buffer == nil {
		c.buffer = make([]byte, copyBytes)
	}
	for {
		count, err := source.Read(c.buffer)
		if count > 0 {
			if _, err := target.Write(c.buffer[:count]); err != nil {
				return err
			}
			c.bytes += int64(count)
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if cancelled, broken := c.stream.State(); cancelled || broken {
			return link.ErrGone
		}
	}
}

func (c *copying) directory(from, to string, status *syscall.Stat_t) error {
	if err := os.Mkdir(to, 0o700); err != nil {
		return err
	}
	c.files++
	after := ""
	for {
		names, more, err := namesAfter(from, after, walkNames, true)
		if err != nil {
			return err
		}
		for _, name := range names {
			var one syscall.Stat_t
			if err := syscall.Lstat(from+"/"+name, &one); err != nil {
				continue // removed meanwhile
			}
			if err := c.entry(from+"/"+name, to+"/"+name, &one); err != nil {
				return err
			}
		}
		if !more {
			break
		}
		after = names[len(names)-1]
	}
	if err := syscall.Chmod(to, status.Mode&copyMode); err != nil {
		return wrap("chmod", to, err)
	}
	keepTime(to, status)
	return nil
}

// keepTime gives a copy its original's time of change; a file system that cannot is no error.
func keepTime(path string, status *syscall.Stat_t) {
	modified := time.Unix(status.Mtim.Unix())
	_ = os.Chtimes(path, modified, modified)
}

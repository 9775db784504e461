// Package files serves the guest's files with the permissions of one of its users.
package files

import (
	"encoding/base64"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"unicode/utf8"

	"innkeeper/guest/account"
	"innkeeper/guest/link"
)

// Store serves the file verbs.
type Store struct {
	defaultUser func() string
	drafts      drafts
}

// New asks defaultUser whose permissions apply where a request names nobody.
func New(defaultUser func() string) *Store { return &Store{defaultUser: defaultUser} }

// Location is what every file verb begins with.
type Location struct {
	Path    string `json:"path"`
	PathB64 string `json:"path_b64"`
	User    string `json:"user"`

	Account account.User `json:"-"`
}

// Resolve decodes a request into target, of which l is a part, and finds out where and as whom.
func (s *Store) Resolve(open link.Request, target any, l *Location) error {
	if err := open.Decode(target); err != nil {
		return err
	}
	path, err := decodePath(l.Path, l.PathB64)
	if err != nil {
		return err
	}
	l.Path = path
	name := l.User
	if name == "" {
		name = s.defaultUser()
	}
	l.Account, err = account.Lookup(name)
	return err
}

func decodePath(plain, encoded string) (string, error) {
	if encoded != "" {
		bytes, err := base64.StdEncoding.DecodeString(encoded)
		if err != nil {
			return "", link.Errorf("bad_request", "path_b64: %v", err)
		}
		plain = string(bytes)
	}
	if !strings.HasPrefix(plain, "/") || strings.IndexByte(plain, 0) >= 0 {
		return "", link.Errorf("bad_request", "%q is not an absolute path", plain)
	}
	return plain, nil
}

// answer ends a stream either way.
func answer(stream *link.Stream, err error, result any) {
	if err != nil {
		stream.Fail(err)
		return
	}
	stream.Succeed(result)
}

type statAnswer struct {
	Type      string `json:"type"`
	Size      int64  `json:"size"`
	Mode      uint32 `json:"mode"`
	UID       uint32 `json:"uid"`
	GID       uint32 `json:"gid"`
	MtimeNs   int64  `json:"mtime_ns"`
	Target    string `json:"target,omitempty"`
	TargetB64 string `json:"target_b64,omitempty"`
}

const permissionBits = 0o7777

func typeOf(mode uint32) string {
	switch mode & syscall.S_IFMT {
	case syscall.S_IFREG:
		return "file"
	case syscall.S_IFDIR:
		return "dir"
	case syscall.S_IFLNK:
		return "symlink"
	}
	return "other"
}

// Stat serves the stat verb.
func (s *Store) Stat(stream *link.Stream, open link.Request) {
	request := struct {
		Location
		Follow *bool `json:"follow"`
	}{}
	if err := s.Resolve(open, &request, &request.Location); err != nil {
		stream.Fail(err)
		return
	}
	var result statAnswer
	err := account.As(request.Account, func() error {
		var status syscall.Stat_t
		look := syscall.Stat
		if request.Follow != nil && !*request.Follow {
			look = syscall.Lstat
		}
		if err := look(request.Path, &status); err != nil {
			return wrap("stat", request.Path, err)
		}
		result = statAnswer{
			Type: typeOf(status.Mode), Size: status.Size, Mode: status.Mode & permissionBits,
			UID: status.Uid, GID: status.Gid, MtimeNs: status.Mtim.Nano(),
		}
		if result.Type == "symlink" {
			target, err := os.Readlink(request.Path)
			if err != nil {
				return err
			}
			result.Target, result.TargetB64 = encodeName(target)
		}
		return nil
	})
	answer(stream, err, result)
}

func wrap(operation, path string, err error) error {
	return &os.PathError{Op: operation, Path: path, Err: err}
}

// encodeName is a name as JSON can carry it: plain, or base64 where it is not UTF-8.
func encodeName(name string) (plain, encoded string) {
	if utf8.ValidString(name) {
		return name, ""
	}
	return "", base64.StdEncoding.EncodeToString([]byte(name))
}

type listEntry struct {
	Name    string `json:"name,omitempty"`
	NameB64 string `json:"name_b64,omitempty"`
	Type    string `json:"type"`
	Size    int64  `json:"size"`
	Mode    uint32 `json:"mode"`
	MtimeNs int64  `json:"mtime_ns"`
}

const (
	listLimit = 1000
	// A row is at most about 500 bytes; an answer must fit 64 KiB.
	listBytes = 48 << 10
)

// List serves the list verb. The cursor is the base64 of the last name.
func (s *Store) List(stream *link.Stream, open link.Request) {
	request := struct {
		Location
		Cursor string `json:"cursor"`
		Limit  int    `json:"limit"`
	}{}
	err := s.Resolve(open, &request, &request.Location)
	after := ""
	if err == nil && request.Cursor != "" {
		var bytes []byte
		if bytes, err = base64.StdEncoding.DecodeString(request.Cursor); err != nil {
			err = link.Errorf("bad_request", "list: cursor: %v", err)
		}
		after = string(bytes)
	}
	if err != nil {
		stream.Fail(err)
		return
	}
	if request.Limit < 1 || request.Limit > listLimit {
		request.Limit = listLimit
	}
	result := struct {
		Entries []listEntry `json:"entries"`
		Next    string      `json:"next,omitempty"`
	}{Entries: []listEntry{}}
	err = account.As(request.Account, func() error {
		names, more, err := namesAfter(request.Path, after, request.Limit, false)
		if err != nil {
			return err
		}
		size := 0
		for index, name := range names {
			if size > listBytes {
				more = true
				names = names[:index]
				break
			}
			entry, ok := describe(request.Path, name)
			if !ok {
				continue // removed meanwhile
			}
			result.Entries = append(result.Entries, entry)
			// JSON writes some characters as six.
			size += 6*len(entry.Name) + len(entry.NameB64) + 110
		}
		if more {
			result.Next = base64.StdEncoding.EncodeToString([]byte(names[len(names)-1]))
		}
		return nil
	})
	answer(stream, err, result)
}

func describe(directory, name string) (listEntry, bool) {
	var status syscall.Stat_t
	if syscall.Lstat(filepath.Join(directory, name), &status) != nil {
		return listEntry{}, false
	}
	entry := listEntry{
		Type: typeOf(status.Mode), Size: status.Size, Mode: status.Mode & permissionBits, MtimeNs: status.Mtim.Nano(),
	}
	entry.Name, entry.NameB64 = encodeName(name)
	return entry, true
}

// Mkdir serves the mkdir verb. With parents, a directory that exists is no error.
func (s *Store) Mkdir(stream *link.Stream, open link.Request) {
	request := struct {
		Location
		Parents bool `json:"parents"`
	}{}
	if err := s.Resolve(open, &request, &request.Location); err != nil {
		stream.Fail(err)
		return
	}
	err := account.As(request.Account, func() error {
		if request.Parents {
			return os.MkdirAll(request.Path, 0o755)
		}
		return os.Mkdir(request.Path, 0o755)
	})
	answer(stream, err, struct{}{})
}

// Rename serves the rename verb.
func (s *Store) Rename(stream *link.Stream, open link.Request) {
	request := struct {
		Location
		To      string `json:"to"`
		ToB64   string `json:"to_b64"`
		Replace *bool  `json:"replace"`
	}{}
	err := s.Resolve(open, &request, &request.Location)
	if err == nil {
		request.To, err = decodePath(request.To, request.ToB64)
	}
	if err != nil {
		stream.Fail(err)
		return
	}
	err = account.As(request.Account, func() error {
		return moveTo(request.Path, request.To, request.Replace == nil || *request.Replace)
	})
	answer(stream, err, struct{}{})
}

// Remove serves the remove verb; a symlink is removed itself. A removal that was begun goes on to its end, whoever waits for it.
func (s *Store) Remove(stream *link.Stream, open link.Request) {
	request := struct {
		Location
		Recursive bool `json:"recursive"`
	}{}
	if err := s.Resolve(open, &request, &request.Location); err != nil {
		stream.Fail(err)
		return
	}
	err := lively(stream, func() error {
		return account.As(request.Account, func() error {
			if !request.Recursive {
				return os.Remove(request.Path)
			}
			if _, err := os.Lstat(request.Path); err != nil {
				return err
			}
			if filepath.Clean(request.Path) == "/" {
				return link.Errorf("bad_request", "the root directory is not removed")
			}
			return os.RemoveAll(request.Path)
		})
	})
	answer(stream, err, struct{}{})
}

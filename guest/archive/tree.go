package archive

import (
	"archive/tar"
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"

	"innkeeper/guest/account"
	"innkeeper/guest/files"
	"innkeeper/guest/link"
	"innkeeper/guest/reaper"
)

const (
	// What an archive may make the agent remember: it is memory of the guest's first process.
	treeEntries   = 1_000_000
	treeNameBytes = 32 << 20
	treeMode      = 0o777
	namesAtOnce   = 4096
)

// Trees serves pack_tree and unpack_tree: what a user of the guest sends and takes, with that user's permissions.
type Trees struct {
	unpacker *Unpacker
	store    *files.Store
}

// NewTrees takes paths and users as the file verbs do.
func NewTrees(children *reaper.Table, store *files.Store) *Trees {
	return &Trees{NewUnpacker(children), store}
}

// Pack sends a directory's content, or one file, as a tar stream.
func (t *Trees) Pack(stream *link.Stream, open link.Request) {
	request := struct{ files.Location }{}
	if err := t.store.Resolve(open, &request, &request.Location); err != nil {
		stream.Fail(err)
		return
	}
	out := &sender{stream: stream}
	packer := packer{writer: tar.NewWriter(out)}
	err := account.As(request.Account, func() error {
		real, err := filepath.EvalSymlinks(request.Path)
		if err != nil {
			return err
		}
		information, err := os.Stat(real)
		if err != nil {
			return err
		}
		if err := packer.add(source{real, path.Base(request.Path), information.IsDir()}); err != nil {
			return err
		}
		if err := packer.writer.Close(); err != nil {
			return err
		}
		return out.flush()
	})
	if err != nil {
		stream.Fail(describe(err))
		return
	}
	stream.Succeed(struct {
		Files int64 `json:"files"`
		Bytes int64 `json:"bytes"`
	}{packer.files, packer.bytes})
}

// Unpack makes files of an archive. They come up beside their places, under a name of the agent's, and move there when the archive was whole.
func (t *Trees) Unpack(stream *link.Stream, open link.Request) {
	request := struct{ files.Location }{}
	if err := t.store.Resolve(open, &request, &request.Location); err != nil {
		stream.Fail(err)
		return
	}
	work := &tree{destination: path.Clean(request.Path), merged: map[string]bool{}}
	err := account.As(request.Account, work.begin)
	if err == nil {
		err = t.fill(stream, work, request.Account)
		if err == nil {
			err = account.As(request.Account, work.finish)
		}
		if err != nil {
			_ = account.As(request.Account, func() error { return os.RemoveAll(work.staging) })
		}
	}
	if err != nil {
		stream.Fail(describe(err))
		return
	}
	stream.Succeed(struct {
		Files   int64 `json:"files"`
		Bytes   int64 `json:"bytes"`
		Skipped int64 `json:"skipped"`
	}{work.unpacking.files, work.unpacking.bytes, work.unpacking.skipped})
}

func (t *Trees) fill(stream *link.Stream, work *tree, user account.User) error {
	input, err := t.unpacker.decompress(&receiver{stream: stream}, user.Credential())
	if program, ok := input.(*piped); ok {
		defer program.Close()
	}
	if err != nil {
		return err
	}
	return account.As(user, func() error {
		if err := work.unpacking.run(tar.NewReader(input)); err != nil {
			return err
		}
		// What follows the end of an archive is padding; the opener waits until all of it was taken.
		_, err := io.Copy(io.Discard, input)
		return err
	})
}

// tree is one archive on its way to its destination.
type tree struct {
	destination string
	exists      bool
	staging     string
	unpacking   *unpacking
	merged      map[string]bool // directories that were there before
}

func (t *tree) begin() error {
	above := t.destination
	information, err := os.Stat(above)
	if err == nil && !information.IsDir() {
		return link.Errorf("not_a_directory", "%s is there and not a directory", above)
	}
	t.exists = err == nil
	for errors.Is(err, fs.ErrNotExist) && above != "/" {
		above = path.Dir(above)
		_, err = os.Stat(above)
	}
	if err != nil {
		return err
	}
	random := make([]byte, 8)
	if _, err := rand.Read(random); err != nil {
		return err
	}
	t.staging = path.Join(above, ".inn-"+hex.EncodeToString(random))
	t.unpacking = &unpacking{
		request: unpackRequest{Destination: t.staging, Archive: true}, contained: true,
		buffer: make([]byte, copyBytes), made: map[string]bool{},
	}
	return os.Mkdir(t.staging, 0o755)
}

// finish moves what was unpacked to its place; what stands in the way is found before anything moves.
func (t *tree) finish() error {
	if !t.exists {
		if err := os.MkdirAll(path.Dir(t.destination), 0o755); err != nil {
			return err
		}
		if err := os.Rename(t.staging, t.destination); err != nil {
			return err
		}
	} else {
		if err := t.check(""); err != nil {
			return err
		}
		if err := t.merge(""); err != nil {
			return err
		}
	}
	return t.unpacking.finish(func(unpacked string) string {
		relative := strings.TrimPrefix(unpacked, t.staging)
		if t.merged[relative] {
			return "" // that directory keeps its own mode and time
		}
		return path.Join(t.destination, relative)
	})
}

// check refuses a directory in a file's way, a file in a directory's, and directories that the user may not change.
func (t *tree) check(relative string) error {
	t.merged[relative] = true
	probe := path.Join(t.destination, relative, path.Base(t.staging)+"p")
	if err := os.Mkdir(probe, 0o700); err != nil {
		return err
	}
	if err := os.Remove(probe); err != nil {
		return err
	}
	folder, err := os.Open(t.staging + relative)
	if err != nil {
		return err
	}
	defer folder.Close()
	for {
		names, err := folder.Readdirnames(namesAtOnce)
		for _, name := range names {
			if err := t.checkOne(relative + "/" + name); err != nil {
				return err
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (t *tree) checkOne(relative string) error {
	var ours, theirs syscall.Stat_t
	target := path.Join(t.destination, relative)
	if err := syscall.Lstat(target, &theirs); err != nil {
		if err == syscall.ENOENT {
			return nil
		}
		return &os.PathError{Op: "stat", Path: target, Err: err}
	}
	if err := syscall.Lstat(t.staging+relative, &ours); err != nil {
		return err
	}
	directory := ours.Mode&syscall.S_IFMT == syscall.S_IFDIR
	taken := theirs.Mode&syscall.S_IFMT == syscall.S_IFDIR
	switch {
	case directory && taken:
		return t.check(relative)
	case directory:
		return link.Errorf("not_a_directory", "%s is there and not a directory", target)
	case taken:
		return link.Errorf("is_a_directory", "%s is a directory", target)
	}
	return nil
}

// merge moves one directory's entries and takes the empty directory away.
func (t *tree) merge(relative string) error {
	for {
		folder, err := os.Open(t.staging + relative)
		if err != nil {
			return err
		}
		// Always the first ones: those that were moved are gone.
		names, err := folder.Readdirnames(namesAtOnce)
		_ = folder.Close()
		if len(names) == 0 && (err == nil || err == io.EOF) {
			return os.Remove(t.staging + relative)
		}
		if err != nil {
			return err
		}
		for _, name := range names {
			one := relative + "/" + name
			if t.merged[one] {
				err = t.merge(one)
			} else {
				err = os.Rename(t.staging+one, path.Join(t.destination, one))
			}
			if err != nil {
				return err
			}
		}
	}
}

// contain refuses an entry that a symlink of the archive's own would lead elsewhere.
func (w *unpacking) contain(target string) error {
	root := path.Clean(w.request.Destination)
	for folder := path.Dir(target); len(folder) > len(root) && !w.made[folder]; folder = path.Dir(folder) {
		information, err := os.Lstat(folder)
		if err == nil && !information.IsDir() {
			return link.Errorf("bad_request", "unpack: %q lies behind what is not a directory", strings.TrimPrefix(target, root+"/"))
		}
	}
	return nil
}

// count refuses an archive that is made to exhaust the agent.
func (w *unpacking) count() error {
	w.entries++
	if w.entries > treeEntries || w.names > treeNameBytes {
		return link.Errorf("too_large", "unpack: more than %d entries, or too long names of directories", treeEntries)
	}
	return nil
}

var zipMagic = []byte("PK\x03\x04")

func refuseZip(head []byte) error {
	if bytes.HasPrefix(head, zipMagic) {
		return link.Errorf("bad_request", "a zip archive; send a tar archive, plain or compressed by gzip, bzip2 or xz")
	}
	return nil
}

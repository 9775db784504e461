package archive

import (
	"bufio"
	"bytes"
	"compress/bzip2"
	"compress/gzip"
	"io"
	"os"
	"syscall"

	"innkeeper/guest/account"
	"innkeeper/guest/link"
	"innkeeper/guest/reaper"
)

// receiver reads the opener's DATA; END is the end.
type receiver struct {
	stream *link.Stream
	rest   []byte
}

func (r *receiver) Read(buffer []byte) (int, error) {
	for len(r.rest) == 0 {
		data, ok, err := r.stream.Read()
		if err != nil {
			return 0, err
		}
		if !ok {
			return 0, io.EOF
		}
		r.rest = data
	}
	taken := copy(buffer, r.rest)
	r.rest = r.rest[taken:]
	return taken, nil
}

// decompress looks at the first bytes, not at the name. Programs of the guest run as the given user; nil means root.
func (u *Unpacker) decompress(input io.Reader, user *syscall.Credential) (io.Reader, error) {
	buffered := bufio.NewReaderSize(input, copyBytes)
	head, _ := buffered.Peek(6)
	if err := refuseZip(head); err != nil {
		return nil, err
	}
	switch {
	case bytes.HasPrefix(head, []byte{0x1f, 0x8b}):
		return gzip.NewReader(buffered)
	case bytes.HasPrefix(head, []byte("BZh")):
		return bzip2.NewReader(buffered), nil
	case bytes.HasPrefix(head, []byte{0xfd, '7', 'z', 'X', 'Z', 0}):
		return u.pipe(buffered, user, "xz", "-dc")
	}
	return buffered, nil
}

// pipe decompresses with a program of the guest.
func (u *Unpacker) pipe(input io.Reader, user *syscall.Credential, name string, arguments ...string) (io.Reader, error) {
	program := ""
	for _, folder := range []string{"/usr/local/bin/", "/usr/bin/", "/bin/"} {
		if account.IsExecutable(folder + name) {
			program = folder + name
			break
		}
	}
	if program == "" {
		return nil, link.Errorf("not_found", "the archive is compressed by %s, which the image has not got", name)
	}
	childIn, feed, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer childIn.Close()
	output, childOut, err := os.Pipe()
	if err != nil {
		_ = feed.Close()
		return nil, err
	}
	defer childOut.Close()
	child, err := u.children.Start(program, append([]string{name}, arguments...), &syscall.ProcAttr{
		Dir: "/", Env: []string{"PATH=/usr/bin:/bin"},
		Files: []uintptr{childIn.Fd(), childOut.Fd(), childOut.Fd()}, Sys: &syscall.SysProcAttr{Setsid: true, Credential: user},
	})
	if err != nil {
		_, _ = feed.Close(), output.Close()
		return nil, err
	}
	go func() {
		_, _ = io.Copy(feed, input)
		_ = feed.Close()
	}()
	return &piped{File: output, child: child}, nil
}

// piped reads what a program writes; its end is an error when the program failed.
type piped struct {
	*os.File
	child *reaper.Child
}

func (p *piped) Read(buffer []byte) (int, error) {
	taken, err := p.File.Read(buffer)
	if err == io.EOF {
		_ = p.File.Close()
		<-p.child.Done
		if code := p.child.Exit().Code(); code != 0 {
			return taken, link.Errorf("bad_request", "the archive could not be decompressed (exit code %d)", code)
		}
	}
	return taken, err
}

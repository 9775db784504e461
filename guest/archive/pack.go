// Package archive moves trees of files into and out of the guest as tar streams: image builds copy by it.
package archive

import (
	"archive/tar"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"sort"
	"strings"
	"syscall"

	"innkeeper/guest/link"
)

// hidden is what the guest has from its host and not from its image.
var hidden = map[string]bool{
	"/proc": true, "/sys": true, "/dev": true, "/.innkeeper": true,
	"/etc/hosts": true, "/etc/hostname": true, "/etc/resolv.conf": true, "/etc/machine-id": true,
}

// Pack serves the pack verb: what the sources name, as a tar stream, read as root.
func Pack(stream *link.Stream, open link.Request) {
	var request struct {
		Sources []string `json:"sources"`
	}
	if err := open.Decode(&request); err != nil {
		stream.Fail(err)
		return
	}
	picked, err := pick(request.Sources)
	if err != nil {
		stream.Fail(err)
		return
	}
	message := struct {
		Single bool `json:"single"`
	}{len(picked) == 1 && !picked[0].directory}
	if stream.SendMessage(message) != nil {
		return
	}
	out := &sender{stream: stream}
	writer := tar.NewWriter(out)
	packer := packer{writer: writer}
	for _, one := range picked {
		if err = packer.add(one); err != nil {
			break
		}
	}
	if err == nil {
		err = writer.Close()
	}
	if err == nil {
		err = out.flush()
	}
	if err != nil {
		stream.Fail(err)
		return
	}
	stream.Succeed(struct {
		Files int64 `json:"files"`
		Bytes int64 `json:"bytes"`
	}{packer.files, packer.bytes})
}

// source is one path that a pattern took; a directory gives what it holds, a file itself under the name it was asked by.
type source struct {
	path      string
	name      string
	directory bool
}

func pick(patterns []string) ([]source, error) {
	var picked []source
	for _, pattern := range patterns {
		pattern = path.Clean("/" + pattern)
		matches := []string{pattern}
		if strings.ContainsAny(pattern, `*?[\`) {
			found, err := filepath.Glob(pattern)
			if err != nil {
				return nil, link.Errorf("bad_request", "%s: not a pattern", pattern)
			}
			matches = found
			sort.Strings(matches)
		}
		taken := 0
		for _, match := range matches {
			// Links that are named themselves are followed, those below a directory are copied.
			real, err := filepath.EvalSymlinks(match)
			if err != nil {
				continue
			}
			information, err := os.Stat(real)
			if err != nil {
				continue
			}
			picked = append(picked, source{real, path.Base(match), information.IsDir()})
			taken++
		}
		if taken == 0 {
			return nil, link.Errorf("not_found", "%s: no such file or directory", pattern)
		}
	}
	return picked, nil
}

type packer struct {
	writer *tar.Writer
	files  int64
	bytes  int64
}

func (p *packer) add(one source) error {
	if !one.directory {
		information, err := os.Lstat(one.path)
		if err != nil {
			return err
		}
		return p.entry(one.path, one.name, information)
	}
	return filepath.WalkDir(one.path, func(file string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if hidden[file] {
			if entry.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		name := strings.TrimPrefix(strings.TrimPrefix(file, one.path), "/")
		if name == "" {
			return nil
		}
		information, err := entry.Info()
		if err != nil {
			return err
		}
		return p.entry(file, name, information)
	})
}

func (p *packer) entry(file, name string, information fs.FileInfo) error {
	target := ""
	switch information.Mode().Type() {
	case 0, fs.ModeDir:
	case fs.ModeSymlink:
		var err error
		if target, err = os.Readlink(file); err != nil {
			return err
		}
	default:
		// Sockets, FIFOs and devices belong to the guest that made them.
		return nil
	}
	header, err := tar.FileInfoHeader(information, target)
	if err != nil {
		return err
	}
	header.Name, header.Format = name, tar.FormatPAX
	header.Uname, header.Gname = "", ""
	if status, ok := information.Sys().(*syscall.Stat_t); ok {
		header.Uid, header.Gid = int(status.Uid), int(status.Gid)
	}
	if err := p.writer.WriteHeader(header); err != nil {
		return err
	}
	p.files++
	if information.Mode().Type() != 0 {
		return nil
	}
	content, err := os.Open(file)
	if err != nil {
		return err
	}
	defer content.Close()
	// A file that grows meanwhile is cut at the length that was announced; one that shrinks is an error.
	copied, err := io.CopyN(p.writer, content, header.Size)
	p.bytes += copied
	return err
}

// sender collects bytes into frames and waits for the reader's credit.
type sender struct {
	stream *link.Stream
	buffer []byte
}

const frameBytes = 128 << 10

func (s *sender) Write(data []byte) (int, error) {
	written := len(data)
	for len(data) > 0 {
		if s.buffer == nil {
			s.buffer = make([]byte, 0, frameBytes)
		}
		room := frameBytes - len(s.buffer)
		if room > len(data) {
			room = len(data)
		}
		s.buffer = append(s.buffer, data[:room]...)
		data = data[room:]
		if len(s.buffer) == frameBytes {
			if err := s.flush(); err != nil {
				return 0, err
			}
		}
	}
	return written, nil
}

func (s *sender) flush() error {
	rest := s.buffer
	for len(rest) > 0 {
		granted, err := s.stream.WaitCredit(len(rest))
		if err != nil {
			return err
		}
		if err := s.stream.SendFrames(link.Frame{Stream: s.stream.ID, Kind: link.Data, Payload: rest[:granted]}); err != nil {
			return err
		}
		rest = rest[granted:]
	}
	s.buffer = s.buffer[:0]
	return nil
}

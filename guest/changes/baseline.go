package changes

import (
	"bufio"
	"encoding/binary"
	"errors"
	"io"
	"os"
)

// A baseline is one scan of an upper directory on disk, in the order of the walk: a directory's entries sorted by name,
// each directory directly followed by its own entries and an end mark. So a scan reads the old one and writes the new one
// as streams.
//
//	"INNBASE1" record... end-of-root trailer
//	record:  u8 kind | opaque<<7, then except for an end mark: u8 length, name;
//	         for a file, symlink or special also u32 mode, uid, gid, u64 size, mtime, ctime, inode (little endian)
//	trailer: path of the result that was written together with this baseline, u64 its identity, u32 the path's length,
//	         "INNBEND1"
const (
	baselineMagic   = "INNBASE1"
	baselineTrailer = "INNBEND1"
	endMark         = 0x7f
	opaqueBit       = 0x80
	metaBytes       = 3*4 + 4*8
	trailerBytes    = 8 + 4 + len(baselineTrailer)
	maxResultPath   = 4096
)

var (
	errNoBaseline  = errors.New("there is no baseline")
	errBadBaseline = errors.New("the baseline is damaged")
)

type baselineReader struct {
	f      *os.File
	r      *bufio.Reader
	offset int64 // of the record in kind, name and meta
	size   int64 // of that record
	end    bool  // it is an end mark
	name   []byte
	meta   meta
	result string
	id     uint64 // of the result
	buf    [2 + 256 + metaBytes]byte
}

// openBaseline fails with errNoBaseline or errBadBaseline, among others.
func openBaseline(path string) (*baselineReader, error) {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, errNoBaseline
	}
	if err != nil {
		return nil, err
	}
	b := &baselineReader{f: f, r: bufio.NewReaderSize(f, 128<<10)}
	if err := b.open(); err != nil {
		f.Close()
		return nil, err
	}
	return b, nil
}

func (b *baselineReader) open() error {
	info, err := b.f.Stat()
	if err != nil {
		return err
	}
	tail := make([]byte, trailerBytes)
	if info.Size() < int64(len(tail)) {
		return errBadBaseline
	}
	if _, err := b.f.ReadAt(tail, info.Size()-int64(len(tail))); err != nil || string(tail[12:]) != baselineTrailer {
		return errBadBaseline
	}
	b.id = binary.LittleEndian.Uint64(tail)
	length := int64(binary.LittleEndian.Uint32(tail[8:]))
	if length > maxResultPath || length > info.Size()-int64(len(tail)) {
		return errBadBaseline
	}
	result := make([]byte, length)
	if _, err := b.f.ReadAt(result, info.Size()-int64(len(tail))-length); err != nil {
		return errBadBaseline
	}
	b.result = string(result)
	magic := make([]byte, len(baselineMagic))
	if _, err := io.ReadFull(b.r, magic); err != nil || string(magic) != baselineMagic {
		return errBadBaseline
	}
	b.size = int64(len(magic))
	return b.next()
}

// next moves to the record after this one.
func (b *baselineReader) next() error {
	b.offset += b.size
	head, err := b.r.Peek(2)
	if err != nil {
		return errBadBaseline
	}
	b.end = head[0] == endMark
	if b.end {
		b.size = 1
		b.r.Discard(1)
		return nil
	}
	k := kind(head[0] &^ opaqueBit)
	if k == absent || k > special || head[1] == 0 {
		return errBadBaseline
	}
	b.meta = meta{kind: k, opaque: head[0]&opaqueBit != 0}
	length := int(head[1])
	b.size = int64(2 + length)
	if b.meta.leaf() {
		b.size += metaBytes
	}
	record := b.buf[:b.size]
	if _, err := io.ReadFull(b.r, record); err != nil {
		return errBadBaseline
	}
	b.name = record[2 : 2+length]
	if b.meta.leaf() {
		f := record[2+length:]
		b.meta.mode = binary.LittleEndian.Uint32(f)
		b.meta.uid = binary.LittleEndian.Uint32(f[4:])
		b.meta.gid = binary.LittleEndian.Uint32(f[8:])
		b.meta.size = int64(binary.LittleEndian.Uint64(f[12:]))
		b.meta.mtime = int64(binary.LittleEndian.Uint64(f[20:]))
		b.meta.ctime = int64(binary.LittleEndian.Uint64(f[28:]))
		b.meta.inode = binary.LittleEndian.Uint64(f[36:])
	}
	return nil
}

// skip moves behind the record and, of a directory, everything in it.
func (b *baselineReader) skip() error {
	for depth := 0; ; {
		if b.end {
			depth--
		} else if b.meta.kind == directory {
			depth++
		}
		if err := b.next(); err != nil {
			return err
		}
		if depth <= 0 {
			return nil
		}
	}
}

func (b *baselineReader) close() { b.f.Close() }

// baselineWriter writes nothing until the scan finds the first difference: then all that came before is copied from the
// old baseline, and a scan that finds none leaves the old one alone.
type baselineWriter struct {
	path   string // of the new file, renamed by commit
	f      *os.File
	w      *bufio.Writer
	active bool
	buf    [2 + 256 + metaBytes]byte
}

func temporary(path string) string { return path + ".new" }

// start begins the file with the first prefix bytes of old, or with nothing but the magic.
func (b *baselineWriter) start(old *baselineReader) error {
	f, err := create(temporary(b.path))
	if err != nil {
		return err
	}
	b.f, b.w, b.active = f, bufio.NewWriterSize(f, 128<<10), true
	if old == nil {
		_, err = b.w.WriteString(baselineMagic)
	} else {
		_, err = io.Copy(b.w, io.NewSectionReader(old.f, 0, old.offset))
	}
	return err
}

func (b *baselineWriter) put(name []byte, m *meta) error {
	if !b.active {
		return nil
	}
	b.buf[0] = byte(m.kind)
	if m.opaque {
		b.buf[0] |= opaqueBit
	}
	b.buf[1] = byte(len(name))
	n := 2 + copy(b.buf[2:], name)
	if m.leaf() {
		f := b.buf[n:]
		binary.LittleEndian.PutUint32(f, m.mode)
		binary.LittleEndian.PutUint32(f[4:], m.uid)
		binary.LittleEndian.PutUint32(f[8:], m.gid)
		binary.LittleEndian.PutUint64(f[12:], uint64(m.size))
		binary.LittleEndian.PutUint64(f[20:], uint64(m.mtime))
		binary.LittleEndian.PutUint64(f[28:], uint64(m.ctime))
		binary.LittleEndian.PutUint64(f[36:], m.inode)
		n += metaBytes
	}
	_, err := b.w.Write(b.buf[:n])
	return err
}

func (b *baselineWriter) end() error {
	if !b.active {
		return nil
	}
	return b.w.WriteByte(endMark)
}

// finish completes the file, still under its temporary name.
func (b *baselineWriter) finish(result string, id uint64) error {
	b.w.WriteString(result)
	var tail [12]byte
	binary.LittleEndian.PutUint64(tail[:], id)
	binary.LittleEndian.PutUint32(tail[8:], uint32(len(result)))
	b.w.Write(tail[:])
	b.w.WriteString(baselineTrailer)
	if err := b.w.Flush(); err != nil { // bufio keeps the first error of all writes
		return err
	}
	return b.f.Close()
}

func (b *baselineWriter) commit() error { return os.Rename(temporary(b.path), b.path) }

func (b *baselineWriter) abandon() {
	if b.active {
		b.f.Close()
		os.Remove(temporary(b.path))
	}
}

// create makes a file that only this user may read, replacing what a crash left.
func create(path string) (*os.File, error) {
	os.Remove(path)
	return os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
}

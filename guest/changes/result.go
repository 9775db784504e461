package changes

import (
	"bufio"
	"encoding/binary"
	"errors"
	"io"
	"os"
)

// A result is the list of one command's changes, sorted by path components.
//
//	"INNCHNG1", u64 number of rows, u64 offset of the index, u64 identity
//	row:   u8 status (1 created, 2 modified, 3 deleted), u8 kind (1 file, 2 symlink), u16 length, u64 size, path
//	index: u64 offset of every 1,000th row, beginning with the first (all little endian)
const (
	resultMagic  = "INNCHNG1"
	resultHeader = 32
	indexEvery   = 1000

	created  = 1
	modified = 2
	deleted  = 3
)

// resultWriter makes its file with the first row: a command that changed nothing leaves none.
type resultWriter struct {
	path   string // while it is pending
	id     uint64
	f      *os.File
	w      *bufio.Writer
	total  uint64
	offset uint64
	index  []uint64
}

// pending is where the result of the request at hand waits for the baseline's commit: one name, so that crashes cannot
// leave more than one file.
func pending(baseline string) string { return baseline + ".result" }

func (r *resultWriter) row(status byte, m *meta, path []byte) error {
	if r.f == nil {
		f, err := create(r.path)
		if err != nil {
			return err
		}
		r.f, r.w, r.offset = f, bufio.NewWriterSize(f, 64<<10), resultHeader
		r.w.Write(make([]byte, resultHeader))
	}
	if r.total%indexEvery == 0 {
		r.index = append(r.index, r.offset)
	}
	size := m.size
	if status == deleted || size < 0 {
		size = 0
	}
	var head [12]byte
	head[0], head[1] = status, byte(m.kind)
	binary.LittleEndian.PutUint16(head[2:], uint16(len(path)))
	binary.LittleEndian.PutUint64(head[4:], uint64(size))
	r.w.Write(head[:])
	_, err := r.w.Write(path)
	r.total++
	r.offset += uint64(len(head) + len(path))
	return err
}

// finish completes the file, still pending.
func (r *resultWriter) finish() error {
	for _, offset := range r.index {
		var b [8]byte
		binary.LittleEndian.PutUint64(b[:], offset)
		r.w.Write(b[:])
	}
	if err := r.w.Flush(); err != nil {
		return err
	}
	head := make([]byte, resultHeader)
	copy(head, resultMagic)
	binary.LittleEndian.PutUint64(head[8:], r.total)
	binary.LittleEndian.PutUint64(head[16:], r.offset)
	binary.LittleEndian.PutUint64(head[24:], r.id)
	if _, err := r.f.WriteAt(head, 0); err != nil {
		return err
	}
	return r.f.Close()
}

func (r *resultWriter) abandon() {
	if r.f != nil {
		r.f.Close()
		os.Remove(r.path)
	}
}

var errBadResult = errors.New("the result file is damaged")

// stored is the number of rows and the identity of a finished result, or os.ErrNotExist.
func stored(path string) (total, id uint64, err error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, 0, err
	}
	defer f.Close()
	head := make([]byte, resultHeader)
	if _, err := io.ReadFull(f, head); err != nil || string(head[:8]) != resultMagic {
		return 0, 0, errBadResult
	}
	return binary.LittleEndian.Uint64(head[8:]), binary.LittleEndian.Uint64(head[24:]), nil
}

package sftp

import (
	"encoding/binary"
	"errors"
	"io"
)

// Types of packets, as draft-ietf-secsh-filexfer-02 (version 3) numbers them.
const (
	typeInit     = 1
	typeVersion  = 2
	typeOpen     = 3
	typeClose    = 4
	typeRead     = 5
	typeWrite    = 6
	typeLstat    = 7
	typeFstat    = 8
	typeSetstat  = 9
	typeFsetstat = 10
	typeOpendir  = 11
	typeReaddir  = 12
	typeRemove   = 13
	typeMkdir    = 14
	typeRmdir    = 15
	typeRealpath = 16
	typeStat     = 17
	typeRename   = 18
	typeReadlink = 19
	typeSymlink  = 20
	typeStatus   = 101
	typeHandle   = 102
	typeData     = 103
	typeName     = 104
	typeAttrs    = 105
	typeExtended = 200
)

const (
	maxData = 256 << 10
	// What OpenSSH's server takes.
	maxPacket = maxData + 1<<10
)

var errMalformed = errors.New("a malformed packet")

// reader takes the fields of a packet apart. After the first field that is not there all others are empty, and `bad` says so.
type reader struct {
	rest []byte
	bad  bool
}

func (r *reader) take(size int) []byte {
	if size < 0 || size > len(r.rest) {
		r.bad, r.rest = true, nil
		return nil
	}
	taken := r.rest[:size]
	r.rest = r.rest[size:]
	return taken
}

func (r *reader) uint32() uint32 {
	if field := r.take(4); field != nil {
		return binary.BigEndian.Uint32(field)
	}
	return 0
}

func (r *reader) uint64() uint64 {
	if field := r.take(8); field != nil {
		return binary.BigEndian.Uint64(field)
	}
	return 0
}

func (r *reader) bytes() []byte {
	size := r.uint32()
	if size > maxPacket {
		r.bad, r.rest = true, nil
		return nil
	}
	return r.take(int(size))
}

func (r *reader) string() string { return string(r.bytes()) }

// packet is an answer that is being put together.
type packet []byte

func newPacket(kind byte) packet { return packet{0, 0, 0, 0, kind} }

func (p packet) uint32(value uint32) packet {
	return append(p, byte(value>>24), byte(value>>16), byte(value>>8), byte(value))
}

func (p packet) uint64(value uint64) packet {
	return p.uint32(uint32(value >> 32)).uint32(uint32(value))
}

func (p packet) string(value string) packet {
	return append(p.uint32(uint32(len(value))), value...)
}

func (p packet) send(output io.Writer) error {
	binary.BigEndian.PutUint32(p, uint32(len(p)-4))
	_, err := output.Write(p)
	return err
}

// receive reads one packet into buffer, which it grows where need be.
func receive(input io.Reader, buffer []byte) ([]byte, error) {
	var head [4]byte
	if _, err := io.ReadFull(input, head[:]); err != nil {
		return buffer, err
	}
	size := int(binary.BigEndian.Uint32(head[:]))
	if size < 1 || size > maxPacket {
		return buffer, errMalformed
	}
	if cap(buffer) < size {
		buffer = make([]byte, size)
	}
	buffer = buffer[:size]
	_, err := io.ReadFull(input, buffer)
	return buffer, err
}

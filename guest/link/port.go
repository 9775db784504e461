package link

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"
)

const (
	nonceBytes = 16
	magicBytes = 32
	resetBytes = magicBytes + nonceBytes
	// How long a payload that ends in a RESET has to stand still before it is one: that many looks, each for so long. A machine that stood still itself finds
	// at the next look what came meanwhile.
	standstillLooks = 5
	standstillLook  = 100 * time.Millisecond
	// For bytes that only tell the host of the link: where it does not take them it is not there.
	noticeTimeout = time.Second
	// While the host's end is closed a read returns at once, and nothing tells when it opens.
	idleFirst   = 10 * time.Millisecond
	idleLongest = 100 * time.Millisecond
)

// Every byte has its top bit set and the length of a frame begins with a zero, so none of them can begin a frame.
var resetMagic, _ = hex.DecodeString("e0d3efcfa780938dfff2ffb5b3b7f2f5d6fac4b489af93bbb6dfc493c7c989f4")

var (
	errReset  = errors.New("the host began anew")
	errClosed = errors.New("the link on the port is closed")
)

// Device is an open character device.
type Device interface {
	io.ReadWriter
	SetDeadline(deadline time.Time) error
	SetReadDeadline(deadline time.Time) error
	SetWriteDeadline(deadline time.Time) error
}

// Port is a virtio-serial port, on which links follow each other without a connection: each begins with the host's RESET.
//
// Next and the reads of its connections belong to one goroutine.
type Port struct {
	device Device

	// Bytes that were read and belong to no link.
	pending []byte
	scratch []byte
	frames  boundaries
	tail    []byte // the last bytes that came, while they are within a payload
	// Whether the host may believe in a link that is none any more.
	betray bool

	writing sync.Mutex // for the time of a write, so that a link's last one is over before the next link begins
	mu      sync.Mutex
	current *portConnection
}

// NewPort speaks on a device that was not read before.
func NewPort(device Device) *Port { return &Port{device: device, scratch: make([]byte, 16<<10)} }

// Next waits for a RESET, answers it, and returns the connection that it begins. The one before is closed by then.
func (p *Port) Next() Connection {
	for {
		p.end()
		nonce := p.search()
		if connection := p.begin(nonce); connection != nil {
			return connection
		}
	}
}

// end closes the connection that is open, and tells the host where that is not its own doing.
func (p *Port) end() {
	p.mu.Lock()
	current := p.current
	p.mu.Unlock()
	if current != nil {
		_ = current.Close()
	}
	p.writing.Lock() // a writer that Close has interrupted is out by then
	defer p.writing.Unlock()
	_ = p.device.SetReadDeadline(time.Time{})
	if p.betray && !bytes.Contains(p.pending, resetMagic) {
		_ = p.device.SetWriteDeadline(time.Now().Add(noticeTimeout))
		// Longer than any frame that was begun, and malformed behind it.
		_, _ = p.device.Write(bytes.Repeat([]byte{0xff}, MaxPayload+HeaderBytes))
	}
	p.betray = false
}

// search reads up to the end of the next RESET.
func (p *Port) search() []byte {
	pause := idleFirst
	for {
		if nonce := p.find(); nonce != nil {
			return nonce
		}
		count, err := p.device.Read(p.scratch)
		p.pending = append(p.pending, p.scratch[:count]...)
		if err == nil {
			pause = idleFirst
			continue
		}
		time.Sleep(pause)
		if pause *= 2; pause > idleLongest {
			pause = idleLongest
		}
	}
}

func (p *Port) find() []byte {
	at := bytes.Index(p.pending, resetMagic)
	switch {
	case at < 0:
		if keep := resetBytes - 1; len(p.pending) > keep {
			p.pending = append(p.pending[:0], p.pending[len(p.pending)-keep:]...)
		}
		return nil
	case len(p.pending) < at+resetBytes:
		p.pending = append(p.pending[:0], p.pending[at:]...)
		return nil
	}
	nonce := append([]byte(nil), p.pending[at+magicBytes:at+resetBytes]...)
	p.pending = append(p.pending[:0], p.pending[at+resetBytes:]...)
	return nonce
}

func (p *Port) begin(nonce []byte) *portConnection {
	p.writing.Lock()
	defer p.writing.Unlock()
	_ = p.device.SetWriteDeadline(time.Now().Add(noticeTimeout))
	if _, err := p.device.Write(append(append([]byte(nil), resetMagic...), nonce...)); err != nil {
		return nil // the host is gone again
	}
	_ = p.device.SetWriteDeadline(time.Time{})
	p.frames, p.tail, p.betray = boundaries{}, p.tail[:0], true
	connection := &portConnection{port: p}
	p.mu.Lock()
	p.current = connection
	p.mu.Unlock()
	return connection
}

// portConnection is the port for the time of one link.
type portConnection struct {
	port     *Port
	deadline time.Time
}

// Read returns bytes of this link's frames only. Any error is its end.
func (c *portConnection) Read(buffer []byte) (int, error) {
	p := c.port
	if !p.is(c) {
		return 0, errClosed
	}
	count, err := c.read(buffer)
	if err != nil {
		return 0, err
	}
	whole, stray := p.frames.follow(buffer[:count])
	if stray != nil {
		p.pending = append(stray, p.pending...)
		if bytes.Contains(p.pending, resetMagic) {
			err = errReset
		} else {
			err = fmt.Errorf("%w: a malformed frame", ErrProtocol)
		}
		return whole, err
	}
	p.remember(buffer[:count])
	return count, nil
}

// read takes what is pending first, and waits no longer than for a standstill where that would mean a RESET.
func (c *portConnection) read(buffer []byte) (int, error) {
	p := c.port
	if len(p.pending) > 0 {
		count := copy(buffer, p.pending)
		p.pending = append(p.pending[:0], p.pending[count:]...)
		return count, nil
	}
	looks := 0
	if p.frames.left > 0 && len(p.tail) == resetBytes && bytes.HasPrefix(p.tail, resetMagic) {
		looks = standstillLooks
	}
	for ; looks > 0; looks-- {
		if err := c.bound(time.Now().Add(standstillLook)); err != nil {
			return 0, err
		}
		count, err := p.device.Read(buffer)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			if looks == 1 && p.is(c) {
				p.pending = append(p.pending, p.tail...)
				return 0, errReset
			}
			continue
		}
		if closed := c.bound(c.deadline); closed != nil {
			return 0, closed
		}
		return p.heard(count, err)
	}
	return p.heard(p.device.Read(buffer))
}

// bound sets the deadline of reads, unless the connection is closed: the one that Close has set interrupts them for good.
func (c *portConnection) bound(deadline time.Time) error {
	c.port.mu.Lock()
	defer c.port.mu.Unlock()
	if c.port.current != c {
		return errClosed
	}
	return c.port.device.SetReadDeadline(deadline)
}

// heard passes on what a read returned.
func (p *Port) heard(count int, err error) (int, error) {
	if errors.Is(err, io.EOF) {
		p.betray = false // the host closed its end
	}
	return count, err
}

// remember keeps the last bytes, as long as they are within a payload.
func (p *Port) remember(piece []byte) {
	if p.frames.left == 0 {
		p.tail = p.tail[:0]
		return
	}
	if extra := len(piece) - resetBytes; extra > 0 {
		piece = piece[extra:]
	}
	p.tail = append(p.tail, piece...)
	if extra := len(p.tail) - resetBytes; extra > 0 {
		p.tail = append(p.tail[:0], p.tail[extra:]...)
	}
}

func (p *Port) is(c *portConnection) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.current == c
}

// Write sends bytes while the connection is open.
func (c *portConnection) Write(data []byte) (int, error) {
	c.port.writing.Lock()
	defer c.port.writing.Unlock()
	if !c.port.is(c) {
		return 0, errClosed
	}
	return c.port.device.Write(data)
}

// SetReadDeadline bounds the reads that begin from now on.
func (c *portConnection) SetReadDeadline(deadline time.Time) error {
	c.deadline = deadline
	return c.bound(deadline)
}

// Close ends the connection, interrupts whoever reads or writes, and leaves the device open.
func (c *portConnection) Close() error {
	p := c.port
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.current == c {
		p.current = nil
		_ = p.device.SetDeadline(time.Unix(1, 0))
	}
	return nil
}

// boundaries follows a stream of frames, of which it knows only where they begin and end.
type boundaries struct {
	header [HeaderBytes]byte
	have   int // of the header
	left   int // of the payload
}

// follow looks at the next bytes. stray is nil while they are frames. Else a malformed one began, and only the first whole bytes are surely this link's:
// without the frame that ended right before it, whose end may be the beginning of something else. The others are stray.
func (b *boundaries) follow(piece []byte) (whole int, stray []byte) {
	carried := append([]byte(nil), b.header[:b.have]...)
	begun := 0
	for i := 0; i < len(piece); {
		if b.left > 0 {
			taken := len(piece) - i
			if taken > b.left {
				taken = b.left
			}
			b.left -= taken
			i += taken
			continue
		}
		if b.have == 0 {
			whole, begun = begun, i
		}
		b.header[b.have] = piece[i]
		b.have++
		i++
		if b.malformed() {
			return whole, append(carried, piece[whole:]...)
		}
		if b.have == HeaderBytes {
			b.have, b.left = 0, int(binary.BigEndian.Uint32(b.header[0:4]))
		}
	}
	return len(piece), nil
}

// malformed says whether the header, as far as it came, begins no frame.
func (b *boundaries) malformed() bool {
	if b.have < HeaderBytes {
		return b.header[0] != 0
	}
	frame := Frame{Stream: binary.BigEndian.Uint32(b.header[4:8]), Kind: b.header[8]}
	return checkHeader(frame, int(binary.BigEndian.Uint32(b.header[0:4]))) != nil
}

package link_test

import (
	"bytes"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"innkeeper/guest/link"
)

const patience = 30 * time.Second

var magic, _ = hex.DecodeString("e0d3efcfa780938dfff2ffb5b3b7f2f5d6fac4b489af93bbb6dfc493c7c989f4")

// portHost is the host's end of a port, with an agent at the other that keeps what its verb was given.
type portHost struct {
	t      *testing.T
	end    io.ReadWriter
	nonces byte
	ended  chan error

	mu    sync.Mutex
	taken []byte
}

func serveOn(t *testing.T, device link.Device, end io.ReadWriter) *portHost {
	h := &portHost{t: t, end: end, ended: make(chan error, 16)}
	port := link.NewPort(device)
	go func() {
		for {
			h.ended <- link.Serve(port.Next(), link.Identity{Protocol: 1, MinProtocol: 1, BootID: "0"}, h.take)
		}
	}()
	return h
}

func newPortHost(t *testing.T) *portHost {
	pair, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_NONBLOCK|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	device := os.NewFile(uintptr(pair[0]), "port")
	file := os.NewFile(uintptr(pair[1]), "host")
	end, err := net.FileConn(file)
	_ = file.Close()
	if err != nil {
		t.Fatal(err)
	}
	_ = end.SetDeadline(time.Now().Add(patience))
	t.Cleanup(func() { _ = end.Close() }) // the agent's end stays: its goroutine ends with the tests
	return serveOn(t, device, end)
}

func (h *portHost) take(stream *link.Stream, _ link.Request) {
	for {
		data, more, err := stream.Read()
		if err != nil {
			return
		}
		h.mu.Lock()
		h.taken = append(h.taken, data...)
		h.mu.Unlock()
		if !more {
			stream.Succeed(struct{}{})
			return
		}
	}
}

func (h *portHost) seen() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return string(h.taken)
}

func (h *portHost) write(data []byte) {
	h.t.Helper()
	if _, err := h.end.Write(data); err != nil {
		h.t.Fatal(err)
	}
}

func (h *portHost) frame(stream uint32, kind byte, payload string) []byte {
	return link.AppendFrame(nil, link.Frame{Stream: stream, Kind: kind, Payload: []byte(payload)})
}

// reset returns a new RESET.
func (h *portHost) reset() []byte {
	h.nonces++
	return append(append([]byte(nil), magic...), bytes.Repeat([]byte{0x80 | h.nonces}, 16)...)
}

// answered reads up to the answer, and the HELLO behind it, to which it says the host's. It returns what came before.
func (h *portHost) answered(reset []byte) []byte {
	h.t.Helper()
	var got []byte
	for !bytes.Contains(got, reset) {
		piece := make([]byte, 1)
		if _, err := io.ReadFull(h.end, piece); err != nil {
			h.t.Fatal("no answer to a RESET: ", err)
		}
		got = append(got, piece...)
	}
	hello, err := link.ReadFrame(h.end)
	if err != nil || hello.Kind != link.Hello {
		h.t.Fatal("no HELLO: ", err)
	}
	h.write(h.frame(0, link.Hello, `{"protocol":1}`))
	return got[:len(got)-len(reset)]
}

func (h *portHost) begin() {
	h.t.Helper()
	reset := h.reset()
	h.write(reset)
	h.answered(reset)
}

// finish ends stream 1 and waits for its result.
func (h *portHost) finish() {
	h.t.Helper()
	h.write(h.frame(1, link.End, ""))
	for {
		frame, err := link.ReadFrame(h.end)
		if err != nil {
			h.t.Fatal(err)
		}
		if frame.Kind == link.Result {
			return
		}
	}
}

func TestALinkOnAPortBeginsWithAReset(t *testing.T) {
	h := newPortHost(t)
	first := h.reset()
	h.write([]byte("left from before" + string(first[:20])))
	h.write(first)
	if before := h.answered(first); len(before) > 0 {
		t.Errorf("%q was sent unasked", before)
	}
	h.write(h.frame(1, link.Open, `{"verb":"take"}`))
	h.write(h.frame(1, link.Data, "abc"))
	h.finish()
	if h.seen() != "abc" {
		t.Errorf("%q", h.seen())
	}
}

func TestAResetOfAnyPlaceBeginsANewLink(t *testing.T) {
	whole := string(newPortHost(t).frame(1, link.Data, strings.Repeat("x", 100)))
	places := map[string]string{
		"between frames":                            "",
		"in a header":                               whole[:5],
		"behind the first byte of a header":         whole[:1],
		"behind a header":                           whole[:9],
		"in a payload":                              whole[:20],
		"a RESET's length before its end, less one": whole[:len(whole)-47],
		"shortly before a payload's end":            whole[:len(whole)-20],
		"before the last byte of a payload":         whole[:len(whole)-1],
	}
	for name, half := range places {
		t.Run(name, func(t *testing.T) {
			h := newPortHost(t)
			h.begin()
			h.write(h.frame(1, link.Open, `{"verb":"take"}`))
			h.write(h.frame(1, link.Data, "before "))
			// Alone: what comes in the same read as a malformed frame may be lost with the link.
			for deadline := time.Now().Add(patience); h.seen() != "before " && time.Now().Before(deadline); {
				time.Sleep(time.Millisecond)
			}
			h.write([]byte(half))
			h.begin()
			if h.seen() != "before " {
				t.Errorf("of a frame that was cut off this was acted on: %q", h.seen())
			}
			h.write(h.frame(1, link.Open, `{"verb":"take"}`))
			h.write(h.frame(1, link.Data, "after"))
			h.finish()
			if h.seen() != "before after" {
				t.Errorf("%q", h.seen())
			}
		})
	}
}

func TestFilesMayHoldWhatLooksLikeAReset(t *testing.T) {
	h := newPortHost(t)
	h.begin()
	h.write(h.frame(1, link.Open, `{"verb":"take"}`))
	content := strings.Repeat(string(h.reset()), 100)
	for _, piece := range []string{content, content[:47], content[:48], content[16:48], "x" + content} {
		h.write(h.frame(1, link.Data, piece))
	}
	time.Sleep(700 * time.Millisecond) // a payload that ends in one has ended: what follows it may be long in coming
	// It stands still in a payload, but not right behind a RESET.
	frame := h.frame(1, link.Data, content)
	h.write(frame[:9+48*3+1])
	time.Sleep(700 * time.Millisecond)
	h.write(frame[9+48*3+1:])
	h.finish()
	if wanted := content + content[:47] + content[:48] + content[16:48] + "x" + content + content; h.seen() != wanted {
		t.Error("of", len(wanted), "bytes there came", len(h.seen()))
	}
	select {
	case err := <-h.ended:
		t.Error("the link ended:", err)
	default:
	}
}

func TestEveryResetIsAnswered(t *testing.T) {
	h := newPortHost(t)
	first, second, third := h.reset(), h.reset(), h.reset()
	h.write([]byte(string(first) + string(second)))
	h.write(third)
	before := string(h.answered(third))
	if !strings.Contains(before, string(first)) || !strings.Contains(before, string(second)) {
		t.Errorf("%q", before)
	}
}

func TestTheHostHearsOfALinkThatTheAgentEnded(t *testing.T) {
	h := newPortHost(t)
	h.begin()
	h.write(h.frame(2, link.Open, `{}`)) // an id that is not the host's
	stray := make([]byte, link.MaxPayload+link.HeaderBytes)
	if _, err := io.ReadFull(h.end, stray); err != nil || bytes.Count(stray, []byte{0xff}) != len(stray) {
		t.Fatal("no word of it", err)
	}
	if err := <-h.ended; !errors.Is(err, link.ErrProtocol) {
		t.Error(err)
	}
	h.begin()
}

// fifos are a device whose other end can be closed and opened again, as a port's.
type fifos struct {
	*os.File // to the host
	in       *os.File
}

func (f fifos) Read(buffer []byte) (int, error)          { return f.in.Read(buffer) }
func (f fifos) SetReadDeadline(deadline time.Time) error { return f.in.SetReadDeadline(deadline) }
func (f fifos) SetDeadline(deadline time.Time) error {
	_ = f.in.SetReadDeadline(deadline)
	return f.File.SetWriteDeadline(deadline)
}

func TestALinkEndsWhenTheHostClosesItsEnd(t *testing.T) {
	folder := t.TempDir()
	in, out := filepath.Join(folder, "in"), filepath.Join(folder, "out")
	for _, path := range []string{in, out} {
		if err := syscall.Mkfifo(path, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	open := func(path string, flags int) *os.File {
		file, err := os.OpenFile(path, flags|syscall.O_NONBLOCK, 0)
		if err != nil {
			t.Fatal(err)
		}
		return file
	}
	device := fifos{open(out, os.O_RDWR), open(in, os.O_RDONLY)}
	from := open(out, os.O_RDONLY)
	_ = from.SetReadDeadline(time.Now().Add(patience))
	h := serveOn(t, device, struct {
		io.Reader
		io.Writer
	}{from, open(in, os.O_WRONLY)})
	h.begin()
	h.write(h.frame(1, link.Open, `{"verb":"take"}`))
	h.write(h.frame(1, link.Data, "cut off")[:12])
	_ = h.end.(struct {
		io.Reader
		io.Writer
	}).Writer.(*os.File).Close()
	if err := <-h.ended; err == nil || errors.Is(err, link.ErrProtocol) {
		t.Error(err)
	}
	h.end = struct {
		io.Reader
		io.Writer
	}{from, open(in, os.O_WRONLY)}
	reset := h.reset()
	h.write(reset)
	if before := h.answered(reset); len(before) > 0 {
		t.Errorf("the host was told of what it did itself: %d bytes", len(before))
	}
	if h.seen() != "" {
		t.Errorf("%q", h.seen())
	}
}

// Package linktest is the host's end of a link for tests of the verbs.
package linktest

import (
	"encoding/binary"
	"encoding/json"
	"net"
	"sync"
	"testing"
	"time"

	"innkeeper/guest/link"
)

// Host speaks to one handler over a socket pair.
type Host struct {
	t          *testing.T
	connection net.Conn
	writing    sync.Mutex
	mu         sync.Mutex
	next       uint32
	incoming   map[uint32]chan link.Frame
	Ended      chan error // how the agent's side ended
}

// New starts a link that serves the verbs.
func New(t *testing.T, verbs map[string]link.Handler) *Host {
	t.Helper()
	ours, theirs := pair(t)
	h := &Host{t: t, connection: ours, next: 1, incoming: map[uint32]chan link.Frame{}, Ended: make(chan error, 1)}
	go func() {
		h.Ended <- link.Serve(theirs, link.Identity{Protocol: 1, MinProtocol: 1, BootID: "0"}, func(s *link.Stream, r link.Request) {
			if verbs[r.Verb] == nil {
				s.Fail(link.Errorf("unknown_verb", "%s", r.Verb))
				return
			}
			verbs[r.Verb](s, r)
		})
	}()
	if hello, err := link.ReadFrame(ours); err != nil || hello.Kind != link.Hello {
		t.Fatal("no HELLO", err)
	}
	h.Send(0, link.Hello, []byte(`{"protocol":1}`))
	go h.receive()
	t.Cleanup(func() { _ = ours.Close() })
	return h
}

func pair(t *testing.T) (ours, theirs net.Conn) {
	listener, err := net.Listen("unix", t.TempDir()+"/s")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	if ours, err = net.Dial("unix", listener.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if theirs, err = listener.Accept(); err != nil {
		t.Fatal(err)
	}
	return ours, theirs
}

func (h *Host) receive() {
	for {
		frame, err := link.ReadFrame(h.connection)
		if err != nil {
			return
		}
		h.mu.Lock()
		channel := h.incoming[frame.Stream]
		h.mu.Unlock()
		if channel != nil {
			channel <- frame
		}
	}
}

// Send writes one frame, right or wrong.
func (h *Host) Send(stream uint32, kind byte, payload []byte) {
	h.writing.Lock()
	defer h.writing.Unlock()
	_, _ = h.connection.Write(link.AppendFrame(nil, link.Frame{Stream: stream, Kind: kind, Payload: payload}))
}

// Break closes the link.
func (h *Host) Break() { _ = h.connection.Close() }

// Call is one stream as its opener sees it.
type Call struct {
	ID     uint32
	host   *Host
	frames chan link.Frame
}

// Open starts a verb; fields is a JSON object's inside.
func (h *Host) Open(fields string) *Call {
	h.mu.Lock()
	id := h.next
	h.next += 2
	call := &Call{ID: id, host: h, frames: make(chan link.Frame, 4096)}
	h.incoming[id] = call.frames
	h.mu.Unlock()
	h.Send(id, link.Open, []byte("{"+fields+"}"))
	return call
}

// Send writes a frame of this stream.
func (c *Call) Send(kind byte, payload string) { c.host.Send(c.ID, kind, []byte(payload)) }

// Grant gives credit.
func (c *Call) Grant(bytes uint32) {
	var payload [4]byte
	binary.BigEndian.PutUint32(payload[:], bytes)
	c.host.Send(c.ID, link.Credit, payload[:])
}

const patience = 30 * time.Second

// Next is the stream's next frame.
func (c *Call) Next() link.Frame {
	c.host.t.Helper()
	select {
	case frame := <-c.frames:
		return frame
	case <-time.After(patience):
		c.host.t.Fatal("no frame came")
		return link.Frame{}
	}
}

// Quiet fails if a frame comes within the time.
func (c *Call) Quiet(within time.Duration) {
	c.host.t.Helper()
	select {
	case frame := <-c.frames:
		c.host.t.Fatalf("a frame of kind %d came", frame.Kind)
	case <-time.After(within):
	}
}

// Outcome is everything that a stream brought.
type Outcome struct {
	Output   string
	Errors   string
	Messages []map[string]any
	Result   map[string]any
	Code     string // of an ERROR
}

// Message is the last MESSAGE with that field.
func (o Outcome) Message(field string) map[string]any {
	for index := len(o.Messages) - 1; index >= 0; index-- {
		if _, ok := o.Messages[index][field]; ok {
			return o.Messages[index]
		}
	}
	return nil
}

// Finish reads the stream to its end and grants credit on the way.
func (c *Call) Finish() Outcome {
	c.host.t.Helper()
	var outcome Outcome
	for {
		frame := c.Next()
		var object map[string]any
		switch frame.Kind {
		case link.Data:
			outcome.Output += string(frame.Payload)
			c.Grant(uint32(len(frame.Payload)))
		case link.Data2:
			outcome.Errors += string(frame.Payload)
			c.Grant(uint32(len(frame.Payload)))
		case link.Message, link.Result, link.Fail:
			if err := json.Unmarshal(frame.Payload, &object); err != nil {
				c.host.t.Fatal(err)
			}
		}
		switch frame.Kind {
		case link.Message:
			outcome.Messages = append(outcome.Messages, object)
		case link.Result:
			outcome.Result = object
			return outcome
		case link.Fail:
			outcome.Code, _ = object["code"].(string)
			return outcome
		}
	}
}

// Do opens a verb and finishes it.
func (h *Host) Do(fields string) Outcome {
	h.t.Helper()
	return h.Open(fields).Finish()
}

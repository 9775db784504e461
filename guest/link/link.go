package link

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"sync"
	"time"
)

// Request is an OPEN: its verb and the whole object for the verb's own fields.
type Request struct {
	Verb string
	Raw  json.RawMessage
}

// Decode reads the verb's own fields into target.
func (r Request) Decode(target any) error {
	if err := json.Unmarshal(r.Raw, target); err != nil {
		return Errorf("bad_request", "%s: %v", r.Verb, err)
	}
	return nil
}

// Handler serves one stream; it runs in a goroutine of its own.
type Handler func(stream *Stream, request Request)

// Identity is what the agent says in HELLO.
type Identity struct {
	Protocol    int    `json:"protocol"`
	MinProtocol int    `json:"min_protocol"`
	Agent       string `json:"agent"`
	BootID      string `json:"boot_id"`
	// LastError says why the link before this one ended, as the agent saw it.
	LastError string `json:"last_error,omitempty"`
	// BootError is all that a guest has to say that could not boot.
	BootError *BootError `json:"boot_error,omitempty"`
}

// BootError is the step at which a guest's boot failed, and why.
type BootError struct {
	Step    string `json:"step"`
	Message string `json:"message"`
}

// Connection is what a link runs over: a socket, or a port for the time of one link.
type Connection interface {
	io.ReadWriteCloser
	SetReadDeadline(deadline time.Time) error
}

// Link is one connection to the host.
type Link struct {
	connection Connection
	handler    Handler

	writing sync.Mutex

	payloads payloads

	mu      sync.Mutex
	streams map[uint32]*Stream
	lastID  uint32
}

// A host that accepts and says nothing must not keep the agent from redialling.
const helloTimeout = 10 * time.Second

// Serve says HELLO, answers frames until the connection ends, and breaks off what is open then.
func Serve(connection Connection, identity Identity, handler Handler) error {
	l := &Link{connection: connection, handler: handler, streams: map[uint32]*Stream{}}
	defer l.breakOff()
	return l.run(identity)
}

// SayHello says HELLO and nothing else, and waits until the host has closed its end: then it says true. Otherwise the connection broke.
func SayHello(connection Connection, identity Identity) bool {
	defer connection.Close()
	l := &Link{connection: connection}
	if l.hello(identity) != nil {
		return false
	}
	_, err := io.Copy(io.Discard, connection)
	return err == nil
}

func (l *Link) hello(identity Identity) error {
	payload, err := json.Marshal(identity)
	if err != nil {
		return err
	}
	return l.write(AppendFrame(nil, Frame{0, Hello, payload}))
}

func (l *Link) run(identity Identity) error {
	if err := l.hello(identity); err != nil {
		return err
	}
	// Larger than any usual burst of small frames, smaller than a bulk frame, whose payload is then read in place.
	reader := bufio.NewReaderSize(l.connection, 16<<10)
	_ = l.connection.SetReadDeadline(time.Now().Add(helloTimeout))
	if err := readHello(reader); err != nil {
		return err
	}
	_ = l.connection.SetReadDeadline(time.Time{})
	for {
		frame, err := readFrame(reader, l.payloads.take)
		if err != nil {
			return err
		}
		if err := l.dispatch(frame); err != nil {
			return err
		}
	}
}

func readHello(reader *bufio.Reader) error {
	frame, err := ReadFrame(reader)
	if err != nil {
		return err
	}
	if frame.Kind != Hello {
		return fmt.Errorf("%w: the first frame is of kind %d", ErrProtocol, frame.Kind)
	}
	var hello struct {
		Protocol int `json:"protocol"`
	}
	if err := json.Unmarshal(frame.Payload, &hello); err != nil {
		return fmt.Errorf("%w: HELLO: %v", ErrProtocol, err)
	}
	if hello.Protocol < MinimumProtocol || hello.Protocol > Protocol {
		return fmt.Errorf("%w: the host chose protocol %d", ErrProtocol, hello.Protocol)
	}
	return nil
}

func (l *Link) dispatch(frame Frame) error {
	switch frame.Kind {
	case Ping:
		return l.write(AppendFrame(nil, Frame{0, Pong, frame.Payload}))
	case Pong:
		return nil
	case Hello:
		return fmt.Errorf("%w: a second HELLO", ErrProtocol)
	case Open:
		return l.open(frame)
	}
	l.mu.Lock()
	stream := l.streams[frame.Stream]
	if stream != nil && frame.Kind == Cancel {
		delete(l.streams, frame.Stream)
	}
	l.mu.Unlock()
	if stream == nil {
		return nil
	}
	return stream.receive(frame)
}

func (l *Link) open(frame Frame) error {
	if frame.Stream%2 == 0 {
		return fmt.Errorf("%w: the host opened stream %d", ErrProtocol, frame.Stream)
	}
	var head struct {
		Verb string `json:"verb"`
	}
	parseError := json.Unmarshal(frame.Payload, &head)
	stream := newStream(l, frame.Stream)
	l.mu.Lock()
	if frame.Stream <= l.lastID {
		l.mu.Unlock()
		return fmt.Errorf("%w: stream %d opened after %d", ErrProtocol, frame.Stream, l.lastID)
	}
	l.lastID = frame.Stream
	full := len(l.streams) >= MaxStreams
	if !full {
		l.streams[frame.Stream] = stream
	}
	l.mu.Unlock()
	switch {
	case full:
		stream.Fail(Errorf("too_many_streams", "%d streams are open", MaxStreams))
	case parseError != nil:
		stream.Fail(Errorf("bad_request", "OPEN: %v", parseError))
	default:
		go l.serve(stream, Request{Verb: head.Verb, Raw: frame.Payload})
	}
	return nil
}

// serve turns a bug in one verb into an error of that verb: the end of PID 1 would be the end of the guest.
func (l *Link) serve(stream *Stream, request Request) {
	defer func() {
		if reason := recover(); reason != nil {
			stream.Fail(Errorf("internal", "%s: %v", request.Verb, reason))
		}
	}()
	l.handler(stream, request)
}

// write sends whole frames; a failed write closes the connection, which ends the reading side too.
func (l *Link) write(buffer []byte) error {
	l.writing.Lock()
	defer l.writing.Unlock()
	if _, err := l.connection.Write(buffer); err != nil {
		_ = l.connection.Close()
		return ErrGone
	}
	return nil
}

func (l *Link) forget(id uint32) {
	l.mu.Lock()
	delete(l.streams, id)
	l.mu.Unlock()
}

func (l *Link) breakOff() {
	_ = l.connection.Close()
	l.mu.Lock()
	streams := l.streams
	l.streams = map[uint32]*Stream{}
	l.mu.Unlock()
	for _, stream := range streams {
		stream.breakOff()
	}
}

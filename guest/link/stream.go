package link

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
)

// ErrGone is returned when the opener cancelled the stream or the link broke: nobody is there to tell.
var ErrGone = errors.New("the stream is gone")

// Stream is one verb in progress. One goroutine writes to it and one reads from it; both may be the same.
type Stream struct {
	ID   uint32
	link *Link

	mu         sync.Mutex
	changed    *sync.Cond
	events     chan struct{}
	sendCredit int64
	allowed    int64 // what the opener may still send
	consumed   int64 // read by the application, not yet granted again
	incoming   [][]byte
	ended      bool // the opener sent END
	messages   []json.RawMessage
	unread     int // bytes of messages
	cancelled  bool
	broken     bool
	finished   bool
}

func newStream(link *Link, id uint32) *Stream {
	stream := &Stream{
		ID: id, link: link, events: make(chan struct{}, 1),
		sendCredit: InitialCredit, allowed: InitialCredit,
	}
	stream.changed = sync.NewCond(&stream.mu)
	return stream
}

// Events has a token after anything happened: data, a message, credit, END, CANCEL, a broken link.
func (s *Stream) Events() <-chan struct{} { return s.events }

// notify is called with mu held.
func (s *Stream) notify() {
	s.changed.Broadcast()
	select {
	case s.events <- struct{}{}:
	default:
	}
}

// State tells whether the opener cancelled and whether the link broke.
func (s *Stream) State() (cancelled, broken bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.cancelled, s.broken
}

// TakeMessage returns the oldest unread MESSAGE, or nil.
func (s *Stream) TakeMessage() json.RawMessage {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.messages) == 0 {
		return nil
	}
	message := s.messages[0]
	s.messages = s.messages[1:]
	s.unread -= len(message)
	return message
}

// Read blocks for the opener's next DATA payload, which the caller owns. ok is false after END; err is ErrGone.
func (s *Stream) Read() (data []byte, ok bool, err error) {
	s.mu.Lock()
	for len(s.incoming) == 0 && !s.ended && !s.cancelled && !s.broken && !s.finished {
		s.changed.Wait()
	}
	switch {
	case s.cancelled || s.broken || s.finished:
		s.mu.Unlock()
		return nil, false, ErrGone
	case len(s.incoming) == 0:
		s.mu.Unlock()
		return nil, false, nil
	}
	data = s.incoming[0]
	s.incoming[0] = nil
	s.incoming = s.incoming[1:]
	s.consumed += int64(len(data))
	var grant int64
	if s.consumed >= CreditStep && !s.ended {
		grant, s.consumed = s.consumed, 0
		s.allowed += grant
	}
	s.mu.Unlock()
	if grant > 0 {
		var payload [4]byte
		binary.BigEndian.PutUint32(payload[:], uint32(grant))
		if err := s.link.write(AppendFrame(nil, Frame{s.ID, Credit, payload[:]})); err != nil {
			return nil, false, ErrGone
		}
	}
	return data, true, nil
}

// Release gives back what Read returned, once it is of no use any more: whoever reads much saves the guest fresh memory by it.
func (s *Stream) Release(data []byte) { s.link.payloads.give(data) }

// TakeCredit takes up to want bytes of the credit without waiting.
func (s *Stream) TakeCredit(want int) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.takeLocked(want)
}

func (s *Stream) takeLocked(want int) int {
	if int64(want) > s.sendCredit {
		want = int(s.sendCredit)
	}
	s.sendCredit -= int64(want)
	return want
}

// WaitCredit blocks until there is credit for at least one byte and takes up to want.
func (s *Stream) WaitCredit(want int) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.sendCredit == 0 && !s.cancelled && !s.broken {
		s.changed.Wait()
	}
	if s.cancelled || s.broken {
		return 0, ErrGone
	}
	return s.takeLocked(want), nil
}

// SendTaken writes one DATA or DATA2 frame whose header space is the first HeaderBytes of buffer; credit was taken before.
func (s *Stream) SendTaken(kind byte, buffer []byte) error {
	if s.gone() {
		return ErrGone
	}
	PutHeader(buffer, s.ID, kind, len(buffer)-HeaderBytes)
	return s.link.write(buffer)
}

func (s *Stream) gone() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.cancelled || s.broken || s.finished
}

// SendMessage sends a MESSAGE frame.
func (s *Stream) SendMessage(value any) error {
	return s.SendFrames(s.JSONFrame(Message, value))
}

// JSONFrame encodes value as a frame of this stream.
func (s *Stream) JSONFrame(kind byte, value any) Frame {
	payload, err := json.Marshal(value)
	if err != nil || len(payload) > MaxJSON {
		kind = Fail
		payload, _ = json.Marshal(Errorf("too_large", "the answer of %d bytes does not fit a frame (%v)", len(payload), err))
	}
	return Frame{s.ID, kind, payload}
}

// SendFrames writes the frames in one system call; a RESULT or ERROR among them ends the stream.
func (s *Stream) SendFrames(frames ...Frame) error {
	s.mu.Lock()
	if s.cancelled || s.broken || s.finished {
		s.mu.Unlock()
		return ErrGone
	}
	var buffer []byte
	ends := false
	for _, frame := range frames {
		buffer = AppendFrame(buffer, frame)
		ends = ends || frame.Kind == Result || frame.Kind == Fail
	}
	if ends {
		s.finished = true
		s.notify()
	}
	s.mu.Unlock()
	if ends {
		s.link.forget(s.ID)
	}
	return s.link.write(buffer)
}

// SendEnd says that no more DATA follows.
func (s *Stream) SendEnd() error { return s.SendFrames(Frame{s.ID, End, nil}) }

// Succeed ends the stream with RESULT.
func (s *Stream) Succeed(value any) { _ = s.SendFrames(s.JSONFrame(Result, value)) }

// Fail ends the stream with ERROR.
func (s *Stream) Fail(err error) { _ = s.SendFrames(s.JSONFrame(Fail, AsError(err))) }

// receive handles one frame of the opener; an error is a protocol violation.
func (s *Stream) receive(frame Frame) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch frame.Kind {
	case Data:
		if s.ended {
			return fmt.Errorf("%w: DATA after END", ErrProtocol)
		}
		s.allowed -= int64(len(frame.Payload))
		if s.allowed < 0 {
			return fmt.Errorf("%w: DATA beyond the credit", ErrProtocol)
		}
		if len(frame.Payload) > 0 {
			s.incoming = append(s.incoming, frame.Payload)
		}
	case Message:
		if len(s.messages) >= MaxUnread {
			return fmt.Errorf("%w: more than %d unread messages", ErrProtocol, MaxUnread)
		}
		s.unread += len(frame.Payload)
		if s.unread > MaxJSON {
			return fmt.Errorf("%w: more than %d bytes of unread messages", ErrProtocol, MaxJSON)
		}
		s.messages = append(s.messages, frame.Payload)
	case End:
		s.ended = true
	case Credit:
		s.sendCredit += int64(binary.BigEndian.Uint32(frame.Payload))
		if s.sendCredit > 1<<40 {
			return fmt.Errorf("%w: credit overflow", ErrProtocol)
		}
	case Cancel:
		s.cancelled = true
		s.incoming = nil
	default:
		return fmt.Errorf("%w: a frame of kind %d from the opener", ErrProtocol, frame.Kind)
	}
	s.notify()
	return nil
}

func (s *Stream) breakOff() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.broken = true
	s.incoming = nil
	s.notify()
}

// ReturnCredit gives back credit that was taken and not used.
func (s *Stream) ReturnCredit(count int) {
	s.mu.Lock()
	s.sendCredit += int64(count)
	s.mu.Unlock()
}

// Package link is the agent's end of the guest protocol: frames, streams and their credit.
package link

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// Frame kinds, as docs/guest-protocol.md numbers them.
const (
	Open    byte = 1
	Data    byte = 2
	Data2   byte = 3
	Message byte = 4
	End     byte = 5
	Result  byte = 6
	Fail    byte = 7
	Credit  byte = 8
	Cancel  byte = 9
	Ping    byte = 10
	Pong    byte = 11
	Hello   byte = 12
)

const (
	HeaderBytes     = 9
	MaxPayload      = 256 << 10
	MaxJSON         = MaxPayload
	InitialCredit   = 1 << 20
	CreditStep      = InitialCredit / 2
	MaxUnread       = 64
	MaxStreams      = 1024
	Protocol        = 1
	MinimumProtocol = 1
)

// ErrProtocol is wrapped by every violation after which the link must be closed.
var ErrProtocol = errors.New("protocol error")

// Frame is one unit on the wire.
type Frame struct {
	Stream  uint32
	Kind    byte
	Payload []byte
}

// AppendFrame appends the frame's encoding to buffer.
func AppendFrame(buffer []byte, frame Frame) []byte {
	buffer = AppendHeader(buffer, frame.Stream, frame.Kind, len(frame.Payload))
	return append(buffer, frame.Payload...)
}

// AppendHeader appends the nine bytes that precede a payload of that length.
func AppendHeader(buffer []byte, stream uint32, kind byte, length int) []byte {
	var header [HeaderBytes]byte
	PutHeader(header[:], stream, kind, length)
	return append(buffer, header[:]...)
}

// PutHeader writes a header into the first nine bytes of buffer.
func PutHeader(buffer []byte, stream uint32, kind byte, length int) {
	binary.BigEndian.PutUint32(buffer[0:4], uint32(length))
	binary.BigEndian.PutUint32(buffer[4:8], stream)
	buffer[8] = kind
}

// ReadFrame reads one frame and checks what can be checked without state: kind, length per kind, stream number.
// The payload belongs to the caller.
func ReadFrame(reader io.Reader) (Frame, error) {
	return readFrame(reader, func(length int) []byte { return make([]byte, length) })
}

func readFrame(reader io.Reader, take func(int) []byte) (Frame, error) {
	var header [HeaderBytes]byte
	if _, err := io.ReadFull(reader, header[:]); err != nil {
		return Frame{}, err
	}
	length := int(binary.BigEndian.Uint32(header[0:4]))
	frame := Frame{Stream: binary.BigEndian.Uint32(header[4:8]), Kind: header[8]}
	if err := checkHeader(frame, length); err != nil {
		return Frame{}, err
	}
	if length > 0 {
		frame.Payload = take(length)
		if _, err := io.ReadFull(reader, frame.Payload); err == io.EOF {
			return Frame{}, io.ErrUnexpectedEOF
		} else if err != nil {
			return Frame{}, err
		}
	}
	return frame, nil
}

func checkHeader(frame Frame, length int) error {
	limit := 0
	ofLink := false
	exact := false
	switch frame.Kind {
	case Open, Message, Result, Fail:
		limit = MaxJSON
	case Hello:
		limit, ofLink = MaxJSON, true
	case Data, Data2:
		limit = MaxPayload
	case End, Cancel:
	case Credit:
		limit, exact = 4, true
	case Ping, Pong:
		limit, exact, ofLink = 8, true, true
	default:
		return fmt.Errorf("%w: unknown frame kind %d", ErrProtocol, frame.Kind)
	}
	if length > limit || exact && length != limit {
		return fmt.Errorf("%w: a frame of kind %d has %d bytes", ErrProtocol, frame.Kind, length)
	}
	if ofLink != (frame.Stream == 0) {
		return fmt.Errorf("%w: a frame of kind %d on stream %d", ErrProtocol, frame.Kind, frame.Stream)
	}
	return nil
}

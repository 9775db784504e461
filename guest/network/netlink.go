package network

import (
	"encoding/binary"
	"errors"
	"fmt"
	"syscall"
)

const (
	// Every answer of the kernel fits; one is cut at this length, never longer.
	answerBytes  = 64 << 10
	messageBytes = syscall.SizeofNlMsghdr
	alignment    = syscall.NLMSG_ALIGNTO
)

var native = binary.LittleEndian // of every architecture that the agent is built for

// conversation is a netlink socket of routing.
type conversation struct {
	socket   int
	sequence uint32
}

func open() (*conversation, error) {
	socket, err := syscall.Socket(syscall.AF_NETLINK, syscall.SOCK_RAW|syscall.SOCK_CLOEXEC, syscall.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("a netlink socket: %w", err)
	}
	return &conversation{socket: socket}, nil
}

func (c *conversation) close() { _ = syscall.Close(c.socket) }

// change asks for one thing to be done.
func (c *conversation) change(kind, flags int, body []byte) error {
	_, err := c.ask(kind, flags|syscall.NLM_F_ACK, body)
	return err
}

// list asks for all objects of a kind.
func (c *conversation) list(kind int, body []byte) ([]syscall.NetlinkMessage, error) {
	return c.ask(kind, syscall.NLM_F_DUMP, body)
}

func (c *conversation) ask(kind, flags int, body []byte) ([]syscall.NetlinkMessage, error) {
	c.sequence++
	message := make([]byte, messageBytes, messageBytes+len(body))
	native.PutUint32(message[0:], uint32(messageBytes+len(body)))
	native.PutUint16(message[4:], uint16(kind))
	native.PutUint16(message[6:], uint16(flags|syscall.NLM_F_REQUEST))
	native.PutUint32(message[8:], c.sequence)
	if err := syscall.Sendto(c.socket, append(message, body...), 0, &syscall.SockaddrNetlink{Family: syscall.AF_NETLINK}); err != nil {
		return nil, err
	}
	var found []syscall.NetlinkMessage
	for {
		buffer := make([]byte, answerBytes)
		// It is there: the kernel answers before it returns from the request.
		count, err := syscall.Read(c.socket, buffer)
		if errors.Is(err, syscall.EINTR) {
			continue
		}
		if err != nil {
			return nil, err
		}
		messages, err := syscall.ParseNetlinkMessage(buffer[:count])
		if err != nil {
			return nil, err
		}
		for _, answer := range messages {
			if answer.Header.Seq != c.sequence {
				continue
			}
			switch answer.Header.Type {
			case syscall.NLMSG_DONE:
				return found, nil
			case syscall.NLMSG_ERROR:
				if len(answer.Data) < 4 {
					return nil, syscall.EBADMSG
				}
				if code := int32(native.Uint32(answer.Data)); code != 0 {
					return nil, syscall.Errno(-code)
				}
				return found, nil
			}
			found = append(found, answer)
		}
	}
}

// attribute is one field of a message's body, padded.
func attribute(kind uint16, value []byte) []byte {
	encoded := make([]byte, syscall.SizeofRtAttr, syscall.SizeofRtAttr+len(value)+alignment)
	native.PutUint16(encoded[0:], uint16(syscall.SizeofRtAttr+len(value)))
	native.PutUint16(encoded[2:], kind)
	encoded = append(encoded, value...)
	for len(encoded)%alignment != 0 {
		encoded = append(encoded, 0)
	}
	return encoded
}

// attributes are those of an answer, of which head bytes come first.
func attributes(message syscall.NetlinkMessage, head int) map[uint16][]byte {
	found := map[uint16][]byte{}
	for rest := message.Data; len(rest) >= head; {
		rest, head = rest[head:], 0
		if len(rest) < syscall.SizeofRtAttr {
			break
		}
		length := int(native.Uint16(rest))
		if length < syscall.SizeofRtAttr || length > len(rest) {
			break
		}
		found[native.Uint16(rest[2:])] = rest[syscall.SizeofRtAttr:length]
		head = (length + alignment - 1) &^ (alignment - 1)
	}
	return found
}

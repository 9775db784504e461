// Package ports reaches the guest's TCP ports and lists them.
package ports

import (
	"errors"
	"io"
	"net"
	"strconv"
	"time"

	"innkeeper/guest/link"
)

const (
	dialTimeout = 5 * time.Second
	// A connection begins with the small buffer; one that fills it gets a larger one, since every system call is dear in gVisor.
	firstBuffer = 16 << 10
	lastBuffer  = link.MaxPayload
)

// Dial serves the dial verb: bytes both ways, END as the half close.
func Dial(stream *link.Stream, open link.Request) {
	var request struct {
		Port int `json:"port"`
	}
	if err := open.Decode(&request); err != nil {
		stream.Fail(err)
		return
	}
	if request.Port < 1 || request.Port > 65535 {
		stream.Fail(link.Errorf("bad_request", "%d is no port", request.Port))
		return
	}
	connection, err := dialOwn(strconv.Itoa(request.Port))
	if err != nil {
		stream.Fail(link.Errorf("unreachable", "%v", err))
		return
	}
	defer connection.Close()
	if stream.SendMessage(map[string]bool{"connected": true}) != nil {
		return
	}
	inward := make(chan error, 1)
	go func() { inward <- receive(stream, connection.(*net.TCPConn)) }()
	outward := send(stream, connection)
	if outward == nil {
		outward = stream.SendEnd()
	}
	if outward != nil {
		// Nobody can use the other direction after a reset or a cancelled stream.
		_ = connection.Close()
		stream.Fail(link.Errorf("io_error", "%v", outward))
		return
	}
	if err := <-inward; err != nil {
		stream.Fail(link.Errorf("io_error", "%v", err))
		return
	}
	stream.Succeed(struct{}{})
}

// dialOwn connects to the port on the first of the guest's own addresses that takes it: loopback, where nearly everything
// listens, is asked first, and a server bound to nothing but the guest's outer address is found all the same.
func dialOwn(port string) (net.Conn, error) {
	deadline := time.Now().Add(dialTimeout)
	connection, first := net.DialTimeout("tcp", net.JoinHostPort("127.0.0.1", port), dialTimeout)
	if first == nil {
		return connection, nil
	}
	for _, address := range otherAddresses() {
		dialer := net.Dialer{Deadline: deadline}
		if connection, err := dialer.Dial("tcp", net.JoinHostPort(address, port)); err == nil {
			return connection, nil
		}
	}
	return nil, first
}

func otherAddresses() []string {
	found := []string{"::1"}
	addresses, _ := net.InterfaceAddrs()
	for _, address := range addresses {
		if network, ok := address.(*net.IPNet); ok && network.IP.IsGlobalUnicast() {
			found = append(found, network.IP.String())
		}
	}
	return found
}

// receive carries the opener's bytes to the port. A stream that is gone takes the connection with it.
func receive(stream *link.Stream, connection *net.TCPConn) error {
	for {
		data, ok, err := stream.Read()
		if err != nil {
			_ = connection.Close()
			return err
		}
		if !ok {
			// A peer that has closed already needs no half close.
			_ = connection.CloseWrite()
			return nil
		}
		if _, err := connection.Write(data); err != nil {
			return err
		}
		stream.Release(data)
	}
}

// send carries the port's bytes to the opener, never more than its credit.
func send(stream *link.Stream, connection net.Conn) error {
	size := firstBuffer
	buffer := make([]byte, link.HeaderBytes+size)
	for {
		granted, err := stream.WaitCredit(size)
		if err != nil {
			return err
		}
		count, err := connection.Read(buffer[link.HeaderBytes : link.HeaderBytes+granted])
		stream.ReturnCredit(granted - count)
		if count > 0 {
			if err := stream.SendTaken(link.Data, buffer[:link.HeaderBytes+count]); err != nil {
				return err
			}
		}
		if err != nil {
			if !errors.Is(err, io.EOF) {
				return err
			}
			return nil
		}
		if count == size && size < lastBuffer {
			size *= 2
			buffer = make([]byte, link.HeaderBytes+size)
		}
	}
}

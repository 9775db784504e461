package ports_test

import (
	"fmt"
	"io"
	"net"
	"strings"
	"testing"

	"innkeeper/guest/link"
	"innkeeper/guest/linktest"
	"innkeeper/guest/ports"
)

func listen(t *testing.T, serve func(*net.TCPConn)) int {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = listener.Close() })
	go func() {
		for {
			connection, err := listener.Accept()
			if err != nil {
				return
			}
			go serve(connection.(*net.TCPConn))
		}
	}()
	return listener.Addr().(*net.TCPAddr).Port
}

var verbs = map[string]link.Handler{"dial": ports.Dial, "ports": ports.List}

func TestDialCarriesBothWaysAndHalfCloses(t *testing.T) {
	port := listen(t, func(c *net.TCPConn) {
		all, _ := io.ReadAll(c)
		_, _ = c.Write([]byte(strings.ToUpper(string(all))))
		_ = c.Close()
	})
	call := linktest.New(t, verbs).Open(fmt.Sprintf(`"verb":"dial","port":%d`, port))
	big := strings.Repeat("abcd", 100_000)
	for at := 0; at < len(big); at += 100_000 {
		call.Send(link.Data, big[at:at+100_000])
	}
	call.Send(link.End, "")
	outcome := call.Finish()
	if outcome.Output != strings.ToUpper(big) || outcome.Messages[0]["connected"] != true {
		t.Error(len(outcome.Output), outcome.Messages, outcome.Code)
	}
}

func TestDialRefused(t *testing.T) {
	h := linktest.New(t, verbs)
	for request, code := range map[string]string{`"port":1`: "unreachable", `"port":0`: "bad_request", `"port":70000`: "bad_request"} {
		if outcome := h.Do(`"verb":"dial",` + request); outcome.Code != code {
			t.Errorf("%s: %+v", request, outcome)
		}
	}
}

func TestAServerOnAnotherAddressIsFound(t *testing.T) {
	addresses, _ := net.InterfaceAddrs()
	tried := 0
	for _, address := range addresses {
		network, ok := address.(*net.IPNet)
		if !ok || network.IP.String() == "127.0.0.1" || network.IP.IsLinkLocalUnicast() {
			continue
		}
		listener, err := net.Listen("tcp", net.JoinHostPort(network.IP.String(), "0"))
		if err != nil {
			continue
		}
		tried++
		go func() {
			if connection, err := listener.Accept(); err == nil {
				_, _ = connection.Write([]byte("found"))
				_ = connection.Close()
			}
		}()
		call := linktest.New(t, verbs).Open(fmt.Sprintf(`"verb":"dial","port":%d`, listener.Addr().(*net.TCPAddr).Port))
		call.Send(link.End, "")
		if outcome := call.Finish(); outcome.Output != "found" {
			t.Error(network, outcome)
		}
		_ = listener.Close()
	}
	if tried == 0 {
		t.Skip("no address but 127.0.0.1")
	}
}

func TestCancelHangsUp(t *testing.T) {
	closed := make(chan struct{})
	port := listen(t, func(c *net.TCPConn) { _, _ = io.ReadAll(c); close(closed) })
	call := linktest.New(t, verbs).Open(fmt.Sprintf(`"verb":"dial","port":%d`, port))
	call.Next()
	call.Send(link.Cancel, "")
	<-closed
}

func TestListeningPortsAreListed(t *testing.T) {
	port := listen(t, nil)
	outcome := linktest.New(t, verbs).Do(`"verb":"ports"`)
	for _, entry := range outcome.Result["ports"].([]any) {
		row := entry.(map[string]any)
		if row["port"] == float64(port) {
			if row["address"] != "127.0.0.1" || row["command"] != "ports.test" {
				t.Error(row)
			}
			return
		}
	}
	t.Error(port, outcome.Result)
}

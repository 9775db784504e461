// A program in the guest agent's place that breaks the guest protocol in the way that the command line or path it is asked for names.
// It answers configure sensibly, so that the instance becomes ready.
package main

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"io"
	"net"
	"strings"
	"time"
)

const (
	kindOpen, kindData, kindMessage, kindResult, kindError, kindHello = 1, 2, 4, 6, 7, 12
)

type wire struct {
	net.Conn
}

func (w wire) frame(kind byte, stream uint32, payload []byte) error {
	head := make([]byte, 9, 9+len(payload))
	binary.BigEndian.PutUint32(head, uint32(len(payload)))
	binary.BigEndian.PutUint32(head[4:], stream)
	head[8] = kind
	_, err := w.Write(append(head, payload...))
	return err
}

func (w wire) json(kind byte, stream uint32, text string) error {
	return w.frame(kind, stream, []byte(text))
}

func dial() wire {
	for {
		conn, err := net.Dial("unix", "/.innkeeper/link/agent.sock")
		if err == nil {
			return wire{conn}
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func main() {
	for {
		serve(dial())
		time.Sleep(50 * time.Millisecond)
	}
}

func serve(w wire) {
	defer w.Close()
	w.json(kindHello, 0, `{"protocol": 1, "min_protocol": 1, "agent": "hostile", "boot_id": "0000000000000000"}`)
	reader := bufio.NewReader(w)
	for {
		head := make([]byte, 9)
		if _, err := io.ReadFull(reader, head); err != nil {
			return
		}
		payload := make([]byte, binary.BigEndian.Uint32(head))
		if _, err := io.ReadFull(reader, payload); err != nil {
			return
		}
		if head[8] != kindOpen {
			continue
		}
		var open struct{ Verb, Shell, Path string }
		json.Unmarshal(payload, &open)
		stream := binary.BigEndian.Uint32(head[4:])
		if open.Verb == "configure" {
			w.json(kindResult, stream, `{"uid": 0, "gid": 0, "home": "/root", "tmp_is_tmpfs": false}`)
			continue
		}
		// What to do is said by the command line or the path that the test asks for.
		mode := strings.TrimPrefix(open.Shell+open.Path, "/")
		if !misbehave(w, stream, mode) {
			return
		}
	}
}

// misbehave answers one stream in the worst way of its name, and says whether the link is still of use.
func misbehave(w wire, stream uint32, mode string) bool {
	big := make([]byte, 262144)
	switch {
	case mode == "malformed":
		w.Write([]byte(strings.Repeat("\xff", 64)))
	case mode == "giant":
		w.Write([]byte{0xff, 0xff, 0xff, 0xff, 0, 0, 0, 1, kindData})
		for w.frame(kindData, stream, big) == nil {
		}
		return false
	case mode == "messages":
		for w.json(kindMessage, stream, `{"x": "`+strings.Repeat("y", 60000)+`"}`) == nil {
		}
		return false
	case mode == "credit":
		for w.frame(kindData, stream, big) == nil {
		}
		return false
	case mode == "unknown":
		for i := 0; i < 20000; i++ {
			w.json(kindResult, uint32(1000001+2*i), `{}`)
		}
		w.json(kindError, stream, `{"code": "internal", "message": "done"}`)
	case mode == "deep":
		w.frame(kindResult, stream, []byte(strings.Repeat("[", 200000)))
	case mode == "opens":
		w.json(kindOpen, 2, `{"verb": "machine.destroy"}`)
	case mode == "hello":
		w.json(kindHello, 0, `{"protocol": 1, "min_protocol": 1}`)
	case mode == "never-read":
		select {}
	case mode == "connections":
		for i := 0; i < 4000; i++ {
			if conn, err := net.Dial("unix", "/.innkeeper/link/agent.sock"); err == nil && i%2 == 0 {
				conn.Close()
			}
		}
		w.json(kindError, stream, `{"code": "internal", "message": "done"}`)
	case strings.HasPrefix(mode, "say:"):
		w.json(kindMessage, stream, mode[4:])
		w.json(kindResult, stream, `{}`)
	case strings.HasPrefix(mode, "result:"):
		w.json(kindResult, stream, mode[7:])
	case strings.HasPrefix(mode, "error:"):
		w.json(kindError, stream, mode[6:])
	default:
		w.json(kindResult, stream, `{}`)
	}
	return true
}

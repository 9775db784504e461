// A program in the guest agent's place that breaks the guest protocol in the way that the command line or path it is asked for names.
// It answers configure sensibly, so that the instance becomes ready.
package main

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/json"
	"io"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"time"
)

const (
	kindOpen, kindData, kindData2, kindMessage, kindEnd, kindResult, kindError = 1, 2, 3, 4, 5, 6, 7
	kindCredit, kindCancel, kindPing, kindPong, kindHello                      = 8, 9, 10, 11, 12
)

// Set by the modes that outlive the link that they were asked for on, until the test is over.
var storm atomic.Value

func until() time.Time { return time.Now().Add(20 * time.Second) }

type wire struct {
	io.ReadWriteCloser
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
	if len(os.Args) == 3 && os.Args[1] == "port" {
		servePort(os.Args[2])
	}
	for {
		serve(dial())
		if !storming("reconnect") && !storming("offsets") {
			time.Sleep(50 * time.Millisecond)
		}
	}
}

func storming(mode string) bool {
	state, _ := storm.Load().(stormState)
	return state.mode == mode && time.Now().Before(state.end)
}

type stormState struct {
	mode string
	end  time.Time
}

// By verb: how its next streams are answered.
var prepared = map[string][]string{}

func serve(w wire) {
	defer w.Close()
	w.json(kindHello, 0, `{"protocol": 1, "min_protocol": 1, "agent": "hostile", "boot_id": "0000000000000000"}`)
	if storming("reconnect") {
		return
	}
	reader := bufio.NewReader(w)
	for {
		head := make([]byte, 9)
		if _, err := io.ReadFull(reader, head); err != nil {
			return
		}
		if head[0] != 0 {
			return // on a port, the host's next RESET
		}
		payload := make([]byte, binary.BigEndian.Uint32(head))
		if _, err := io.ReadFull(reader, payload); err != nil {
			return
		}
		if head[8] != kindOpen {
			continue
		}
		var open struct {
			Verb, Shell, Path string
			Argv              []string
			Cell              struct{ Code string }
		}
		json.Unmarshal(payload, &open)
		stream := binary.BigEndian.Uint32(head[4:])
		if open.Verb == "configure" {
			w.json(kindResult, stream, `{"uid": 0, "gid": 0, "home": "/root", "tmp_is_tmpfs": false}`)
			continue
		}
		if open.Verb == "attach" && storming("offsets") {
			w.json(kindMessage, stream, `{"started": true, "pid": 1, "offset": 9007199254740991}`)
			w.frame(kindData, stream, make([]byte, 1000))
			return
		}
		// What to do is said by the command line or the path that the test asks for, or was said ahead where a verb has neither.
		mode := strings.TrimPrefix(open.Shell+open.Path+open.Cell.Code, "/")
		if len(open.Argv) > 0 {
			mode = open.Argv[0]
		}
		if text := strings.TrimPrefix(mode, "prepare:"); text != mode {
			verb, rest, _ := strings.Cut(text, ":")
			var modes []string
			json.Unmarshal([]byte(rest), &modes)
			prepared[verb] = modes
			mode = `say:{"exited": true, "exit_code": 0, "user_processes": 0}`
		} else if ahead := prepared[open.Verb]; len(ahead) > 0 {
			mode, prepared[open.Verb] = ahead[0], ahead[1:]
		}
		if !misbehave(w, reader, stream, mode) {
			return
		}
	}
}

// flood repeats one frame, many to a write, for 20 seconds or until the link ends.
func flood(w wire, kind byte, stream uint32, length int) bool {
	frame := make([]byte, 9+length)
	binary.BigEndian.PutUint32(frame, uint32(length))
	binary.BigEndian.PutUint32(frame[4:], stream)
	frame[8] = kind
	many := bytes.Repeat(frame, 65536/len(frame))
	for end := until(); time.Now().Before(end); {
		if _, err := w.Write(many); err != nil {
			return false
		}
	}
	return false
}

// misbehave answers one stream in the worst way of its name, and says whether the link is still of use.
func misbehave(w wire, reader io.Reader, stream uint32, mode string) bool {
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
	case mode == "pings":
		go io.Copy(io.Discard, w)
		return flood(w, kindPing, 0, 8)
	case mode == "pongs":
		return flood(w, kindPong, 0, 8)
	case mode == "strays":
		return flood(w, kindEnd, 1000001, 0)
	case mode == "credits":
		return flood(w, kindCredit, stream, 4)
	case mode == "bytes":
		return flood(w, kindData, stream, 1)
	case mode == "empties":
		return flood(w, kindData, stream, 0)
	case mode == "json":
		many := strings.Repeat("[],", 80000)
		for end := until(); time.Now().Before(end); {
			if w.json(kindMessage, stream, `{"x": [`+many+`0]}`) != nil {
				return false
			}
		}
	case mode == "interleaved":
		for i := 0; w.frame(byte(kindData+i%2), stream, []byte("x")) == nil; i++ {
		}
		return false
	case mode == "half":
		w.Write([]byte{0, 3, 0, 0, 0, 0, 0, byte(stream), kindMessage, '{'})
		io.Copy(io.Discard, w)
		return false
	case mode == "silence", mode == "no-credit":
		io.Copy(io.Discard, w)
		return false
	case mode == "reconnect", mode == "offsets":
		w.json(kindMessage, stream, `{"started": true, "pid": 1}`)
		storm.Store(stormState{mode, until()})
		return false
	case mode == "dials":
		end := until()
		for i := 0; i < 16; i++ {
			go func() {
				for time.Now().Before(end) {
					if conn, err := net.Dial("unix", "/.innkeeper/link/agent.sock"); err == nil {
						conn.Close()
					}
				}
			}()
		}
		return true
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
	case strings.HasPrefix(mode, "script:"):
		return follow(w, reader, stream, mode[7:])
	case strings.HasPrefix(mode, "result:"):
		w.json(kindResult, stream, mode[7:])
	case strings.HasPrefix(mode, "error:"):
		w.json(kindError, stream, mode[6:])
	default:
		w.json(kindResult, stream, `{}`)
	}
	return true
}

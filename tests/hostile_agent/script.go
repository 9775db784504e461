package main

import (
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"io"
	"strings"
	"time"
)

// step is one frame, or many of one kind, on the stream of a script; of kind 0 it is the end of the link.
type step struct {
	Kind   byte
	Text   string
	Base64 string
	// As often as this, or with -1 for 20 seconds.
	Times int
	// The text as often as this in each frame.
	Repeat int
	// Milliseconds after each frame.
	Pause int
}

// follow sends the steps of a script (JSON) and keeps to the credit it is given, as an agent that lies but breaks no rule of the link. It says
// whether the link is still of use.
func follow(w wire, reader io.Reader, stream uint32, text string) bool {
	var steps []step
	if err := json.Unmarshal([]byte(text), &steps); err != nil {
		w.json(kindError, stream, `{"code": "internal", "message": "the test's script is none"}`)
		return true
	}
	credit := 1 << 20
	end := until()
	for n := 0; n < len(steps); n++ {
		one := steps[n]
		if one.Kind == 0 {
			return false
		}
		payload := []byte(strings.Repeat(one.Text, max(one.Repeat, 1)))
		if one.Base64 != "" {
			payload, _ = base64.StdEncoding.DecodeString(one.Base64)
		}
		isData := one.Kind == kindData || one.Kind == kindData2
		for i := 0; i < max(one.Times, 1) || one.Times < 0 && time.Now().Before(end); i++ {
			for isData && credit < len(payload) {
				more, open := granted(reader, stream)
				if !open {
					return false
				}
				if more < 0 {
					return true
				}
				credit += more
			}
			if isData {
				credit -= len(payload)
			}
			if w.frame(one.Kind, stream, payload) != nil {
				return false
			}
			time.Sleep(time.Duration(one.Pause) * time.Millisecond)
		}
	}
	return true
}

// granted reads the next frame: the credit in it for the stream, -1 when the stream was cancelled, and whether the link is open.
func granted(reader io.Reader, stream uint32) (int, bool) {
	head := make([]byte, 9)
	if _, err := io.ReadFull(reader, head); err != nil {
		return 0, false
	}
	payload := make([]byte, binary.BigEndian.Uint32(head))
	if _, err := io.ReadFull(reader, payload); err != nil {
		return 0, false
	}
	if binary.BigEndian.Uint32(head[4:]) != stream {
		return 0, true
	}
	switch head[8] {
	case kindCredit:
		return int(binary.BigEndian.Uint32(payload)), true
	case kindCancel:
		return -1, true
	}
	return 0, true
}

func max(a, b int) int {
	if a > b {
		return a
	}
	return b
}

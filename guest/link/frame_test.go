package link

import (
	"bytes"
	"errors"
	"io"
	"testing"
)

func TestFramesReadBack(t *testing.T) {
	for _, frame := range []Frame{
		{1, Open, []byte(`{"verb":"x"}`)}, {3, Data, bytes.Repeat([]byte("x"), MaxPayload)}, {5, End, nil},
		{7, Credit, []byte{0, 4, 0, 0}}, {0, Ping, []byte("12345678")}, {0, Hello, []byte(`{}`)}, {1<<32 - 1, Cancel, nil},
	} {
		got, err := ReadFrame(bytes.NewReader(AppendFrame(nil, frame)))
		if err != nil || got.Stream != frame.Stream || got.Kind != frame.Kind || !bytes.Equal(got.Payload, frame.Payload) {
			t.Errorf("%d %d: %v", frame.Stream, frame.Kind, err)
		}
	}
}

func TestBadFrames(t *testing.T) {
	cases := map[string][]byte{
		"kind 0":           {0, 0, 0, 0, 0, 0, 0, 1, 0},
		"kind 13":          {0, 0, 0, 0, 0, 0, 0, 1, 13},
		"too long":         {0, 4, 0, 1, 0, 0, 0, 1, Data},
		"too much JSON":    {0, 4, 0, 1, 0, 0, 0, 1, Open},
		"short credit":     {0, 0, 0, 3, 0, 0, 0, 1, Credit, 1, 2, 3},
		"long ping":        {0, 0, 0, 9, 0, 0, 0, 0, Ping, 1, 2, 3, 4, 5, 6, 7, 8, 9},
		"ping on a stream": {0, 0, 0, 8, 0, 0, 0, 1, Ping, 1, 2, 3, 4, 5, 6, 7, 8},
		"data on the link": {0, 0, 0, 1, 0, 0, 0, 0, Data, 1},
		"end with bytes":   {0, 0, 0, 1, 0, 0, 0, 1, End, 1},
	}
	for name, bad := range cases {
		if _, err := ReadFrame(bytes.NewReader(bad)); !errors.Is(err, ErrProtocol) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for cut := 1; cut < 12; cut++ {
		whole := AppendFrame(nil, Frame{1, Data, []byte("abc")})
		if _, err := ReadFrame(bytes.NewReader(whole[:cut])); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("cut after %d: %v", cut, err)
		}
	}
}

// FuzzFrames: whatever comes, the decoder returns frames within the limits or an error, and what it accepted encodes back the same.
func FuzzFrames(f *testing.F) {
	f.Add(AppendFrame(AppendFrame(nil, Frame{1, Open, []byte(`{"verb":"stat"}`)}), Frame{1, Cancel, nil}))
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 0, 0, 0, 1, 2})
	f.Fuzz(func(t *testing.T, input []byte) {
		reader := bytes.NewReader(input)
		for {
			before := reader.Len()
			frame, err := ReadFrame(reader)
			if err != nil {
				return
			}
			if len(frame.Payload) > MaxPayload {
				t.Fatalf("a payload of %d bytes", len(frame.Payload))
			}
			at := len(input) - before
			if encoded := AppendFrame(nil, frame); !bytes.Equal(encoded, input[at:at+len(encoded)]) {
				t.Fatalf("%v encodes as %v", input[at:], encoded)
			}
		}
	})
}

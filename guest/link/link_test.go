package link_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"innkeeper/guest/link"
	"innkeeper/guest/linktest"
)

func echo(stream *link.Stream, _ link.Request) {
	for {
		data, ok, err := stream.Read()
		if err != nil {
			return
		}
		if !ok {
			stream.Succeed(map[string]bool{"echoed": true})
			return
		}
		for len(data) > 0 {
			granted, err := stream.WaitCredit(len(data))
			if err != nil {
				return
			}
			buffer := append(make([]byte, link.HeaderBytes), data[:granted]...)
			if stream.SendTaken(link.Data, buffer) != nil {
				return
			}
			data = data[granted:]
		}
	}
}

func wait(stream *link.Stream, _ link.Request) {
	for range stream.Events() {
		if cancelled, broken := stream.State(); cancelled || broken {
			return
		}
	}
}

var verbs = map[string]link.Handler{"echo": echo, "wait": wait}

func TestDataAndEnd(t *testing.T) {
	call := linktest.New(t, verbs).Open(`"verb":"echo"`)
	call.Send(link.Data, "abc")
	call.Send(link.Data, "def")
	call.Send(link.End, "")
	if outcome := call.Finish(); outcome.Output != "abcdef" || outcome.Result["echoed"] != true {
		t.Error(outcome)
	}
}

func TestSendingStopsAtTheCredit(t *testing.T) {
	call := linktest.New(t, verbs).Open(`"verb":"echo"`)
	block := strings.Repeat("x", link.MaxPayload)
	for sent := 0; sent < link.InitialCredit; sent += len(block) {
		call.Send(link.Data, block)
	}
	received, granted := 0, 0
	for received < link.InitialCredit {
		if frame := call.Next(); frame.Kind == link.Data {
			received += len(frame.Payload)
		} else {
			granted++
		}
	}
	for ; granted < link.InitialCredit/link.CreditStep; granted++ {
		if frame := call.Next(); frame.Kind != link.Credit {
			t.Fatal("kind", frame.Kind)
		}
	}
	call.Send(link.Data, block)
	call.Quiet(50 * time.Millisecond)
	call.Grant(100)
	if frame := call.Next(); frame.Kind != link.Data || len(frame.Payload) != 100 {
		t.Error("kind", frame.Kind, "bytes", len(frame.Payload))
	}
}

func TestViolationsCloseTheLink(t *testing.T) {
	cases := map[string]func(h *linktest.Host){
		"beyond the credit": func(h *linktest.Host) {
			call := h.Open(`"verb":"wait"`)
			for sent := 0; sent <= link.InitialCredit; sent += link.MaxPayload {
				call.Send(link.Data, strings.Repeat("x", link.MaxPayload))
			}
		},
		"a used id":         func(h *linktest.Host) { h.Open(`"verb":"wait"`); h.Send(1, link.Open, []byte(`{}`)) },
		"an even id":        func(h *linktest.Host) { h.Send(2, link.Open, []byte(`{}`)) },
		"an unknown kind":   func(h *linktest.Host) { h.Send(1, 99, nil) },
		"a second HELLO":    func(h *linktest.Host) { h.Send(0, link.Hello, []byte(`{}`)) },
		"RESULT by opener":  func(h *linktest.Host) { h.Open(`"verb":"wait"`).Send(link.Result, "{}") },
		"too many messages": func(h *linktest.Host) { floodMessages(h.Open(`"verb":"wait"`)) },
		"too many bytes of messages": func(h *linktest.Host) {
			call := h.Open(`"verb":"wait"`)
			for count := 0; count < 5; count++ {
				call.Send(link.Message, `{"x":"`+strings.Repeat("x", 60000)+`"}`)
			}
		},
		"DATA after END": func(h *linktest.Host) {
			call := h.Open(`"verb":"wait"`)
			call.Send(link.End, "")
			call.Send(link.Data, "x")
		},
	}
	for name, violate := range cases {
		h := linktest.New(t, verbs)
		violate(h)
		select {
		case err := <-h.Ended:
			if !errors.Is(err, link.ErrProtocol) {
				t.Errorf("%s: %v", name, err)
			}
		case <-time.After(20 * time.Second):
			t.Errorf("%s: the link stayed open", name)
		}
	}
}

func floodMessages(call *linktest.Call) {
	for count := 0; count <= link.MaxUnread; count++ {
		call.Send(link.Message, "{}")
	}
}

func TestTooManyStreams(t *testing.T) {
	h := linktest.New(t, verbs)
	for count := 0; count < link.MaxStreams; count++ {
		h.Open(`"verb":"wait"`)
	}
	last := h.Open(`"verb":"wait"`)
	if outcome := last.Finish(); outcome.Code != "too_many_streams" {
		t.Error(outcome)
	}
}

func TestStrayFramesAreIgnored(t *testing.T) {
	h := linktest.New(t, verbs)
	h.Send(77, link.Data, []byte("x"))
	call := h.Open(`"verb":"wait"`)
	call.Send(link.Cancel, "")
	call.Send(link.Data, "crossed the end")
	if outcome := h.Do(`"verb":"nope"`); outcome.Code != "unknown_verb" {
		t.Error(outcome)
	}
	if outcome := h.Do(`"verb":3`); outcome.Code != "bad_request" {
		t.Error(outcome)
	}
}

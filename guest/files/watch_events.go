package files

import (
	"encoding/json"
	"time"

	"innkeeper/guest/link"
)

// watchEvent is one line of a watch's DATA.
type watchEvent struct {
	Type      string `json:"type"` // created, modified, deleted, moved, overflow
	Path      string `json:"path,omitempty"`
	PathB64   string `json:"path_b64,omitempty"`
	From      string `json:"from,omitempty"`
	FromB64   string `json:"from_b64,omitempty"`
	Directory bool   `json:"directory,omitempty"`
}

func newEvent(kind, path string, directory bool) watchEvent {
	event := watchEvent{Type: kind, Directory: directory}
	event.Path, event.PathB64 = encodeName(path)
	return event
}

// event queues one for the opener. A file that is written to many times is told once.
func (w *watch) event(event watchEvent) {
	w.mu.Lock()
	defer w.mu.Unlock()
	key := event.Path + "\x00" + event.PathB64
	if event.Type == "moved" {
		// What was told before is of the names as they were.
		w.latest = nil
	} else if before := w.latest[key]; before == event.Type || before == "created" && event.Type == "modified" {
		return
	}
	if len(w.pending) >= watchPending {
		w.overflow = true
		return
	}
	if w.latest == nil {
		w.latest = map[string]string{}
	}
	w.latest[key] = event.Type
	w.pending = append(w.pending, event)
	w.wake()
}

// lost notes that events were.
func (w *watch) lost() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.overflow = true
	w.wake()
}

func (w *watch) wake() {
	select {
	case w.news <- struct{}{}:
	default:
	}
}

func (w *watch) takePending() (events []watchEvent, overflow bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	events, overflow = w.pending, w.overflow
	w.pending, w.latest, w.overflow = nil, nil, false
	return events, overflow
}

// tell sends what happened until the opener is gone or the watch has ended.
func (w *watch) tell(stream *link.Stream, ended <-chan error) error {
	for over := false; !over; {
		var failure error
		select {
		case failure = <-ended:
			over = true
		case <-w.news:
			select {
			case <-time.After(watchPause):
			case failure = <-ended:
				over = true
			}
		case <-stream.Events():
		}
		if cancelled, broken := stream.State(); cancelled || broken {
			return link.ErrGone
		}
		if failure != nil {
			return failure
		}
		events, overflow := w.takePending()
		if overflow {
			events = append(events, watchEvent{Type: "overflow"})
		}
		if err := sendLines(stream, events); err != nil {
			return err
		}
	}
	return nil
}

func sendLines(stream *link.Stream, events []watchEvent) error {
	var lines []byte
	for index, event := range events {
		line, err := json.Marshal(event)
		if err != nil {
			return err
		}
		lines = append(append(lines, line...), '\n')
		if len(lines) < 48<<10 && index+1 < len(events) {
			continue
		}
		for len(lines) > 0 {
			granted, err := stream.WaitCredit(len(lines))
			if err != nil {
				return err
			}
			if err := stream.SendFrames(link.Frame{Stream: stream.ID, Kind: link.Data, Payload: lines[:granted]}); err != nil {
				return err
			}
			lines = lines[granted:]
		}
		lines = nil
	}
	return nil
}

package files

import (
	"reflect"
	"testing"
)

func TestWatchTellsEachMove(t *testing.T) {
	w := &watch{news: make(chan struct{}, 1)}
	moved := func(from, to string) watchEvent {
		event := newEvent("moved", to, false)
		event.From, event.FromB64 = encodeName(from)
		return event
	}
	told := []watchEvent{
		newEvent("created", "/d/draft", false), moved("/d/draft", "/d/file"),
		newEvent("created", "/d/draft", false), moved("/d/draft", "/d/file"),
		moved("/d/other", "/d/file"), newEvent("modified", "/d/file", false),
	}
	for _, event := range told {
		w.event(event)
		if event.Type == "modified" {
			w.event(event) // the same once more is no news
		}
	}
	if found, _ := w.takePending(); !reflect.DeepEqual(found, told) {
		t.Errorf("%v", found)
	}
}

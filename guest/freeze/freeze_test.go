package freeze

import (
	"errors"
	"os"
	"sync"
	"testing"
	"time"

	"innkeeper/guest/link"
	"innkeeper/guest/linktest"
)

// fakeDisk is a file system that notes what is asked of it: a real one, held still, would hold the test machine still.
type fakeDisk struct {
	mu     sync.Mutex
	frozen bool
	thaws  chan struct{}
	fails  error
}

func (d *fakeDisk) control(_ *os.File, request uintptr) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if request == fiFreeze {
		d.frozen = true
		return d.fails
	}
	d.frozen = false
	d.thaws <- struct{}{}
	return nil
}

func (d *fakeDisk) held() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.frozen
}

func start(t *testing.T, fails error) (*fakeDisk, *linktest.Host) {
	t.Helper()
	disk := &fakeDisk{thaws: make(chan struct{}, 1), fails: fails}
	folder := t.TempDir()
	verb := New(folder, func(volume string) string {
		if volume == "known" {
			return folder
		}
		return ""
	})
	verb.control = disk.control
	return disk, linktest.New(t, map[string]link.Handler{"freeze_fs": verb.Freeze})
}

func frozen(t *testing.T, disk *fakeDisk, call *linktest.Call) {
	t.Helper()
	if frame := call.Next(); frame.Kind != link.Message || !disk.held() {
		t.Fatalf("kind %d %q, held still: %v", frame.Kind, frame.Payload, disk.held())
	}
}

func thawed(t *testing.T, disk *fakeDisk) {
	t.Helper()
	select {
	case <-disk.thaws:
	case <-time.After(20 * time.Second):
		t.Fatal("not thawed")
	}
}

func TestTheDiskStandsStillUntilTheHostHasDone(t *testing.T) {
	disk, host := start(t, nil)
	call := host.Open(`"verb":"freeze_fs","seconds":60`)
	frozen(t, disk, call)
	if outcome := host.Do(`"verb":"freeze_fs","seconds":60`); outcome.Code != "busy" {
		t.Errorf("a second one: %q", outcome.Code)
	}
	if !disk.held() {
		t.Fatal("the second one thawed it")
	}
	call.Send(link.End, "")
	if outcome := call.Finish(); outcome.Code != "" {
		t.Errorf("%q", outcome.Code)
	}
	thawed(t, disk)
	// And again.
	call = host.Open(`"verb":"freeze_fs","seconds":60`)
	frozen(t, disk, call)
	call.Send(link.Cancel, "")
	thawed(t, disk)
}

func TestNobodyHasToThawIt(t *testing.T) {
	disk, host := start(t, nil)
	call := host.Open(`"verb":"freeze_fs","seconds":0.05`)
	frozen(t, disk, call)
	thawed(t, disk)
	if outcome := call.Finish(); outcome.Code != "io_error" {
		t.Errorf("the time was over: %q", outcome.Code)
	}
	call = host.Open(`"verb":"freeze_fs","seconds":60`)
	frozen(t, disk, call)
	host.Break()
	thawed(t, disk)
}

func TestAVolumeIsHeldStillInTheDisksPlace(t *testing.T) {
	disk, host := start(t, nil)
	call := host.Open(`"verb":"freeze_fs","seconds":60,"volume":"known"`)
	frozen(t, disk, call)
	call.Send(link.End, "")
	if outcome := call.Finish(); outcome.Code != "" {
		t.Errorf("%q", outcome.Code)
	}
	thawed(t, disk)
	if outcome := host.Do(`"verb":"freeze_fs","seconds":60,"volume":"another"`); outcome.Code != "not_found" {
		t.Errorf("a volume that is not there: %q", outcome.Code)
	}
	if len(disk.thaws) != 0 || disk.held() {
		t.Error("something was frozen for it")
	}
}

func TestWhatCannotBeHeldStillIsAnError(t *testing.T) {
	disk, host := start(t, errors.New("no"))
	if outcome := host.Do(`"verb":"freeze_fs","seconds":60`); outcome.Code != "io_error" && outcome.Code != "internal" {
		t.Errorf("%q", outcome.Code)
	}
	if len(disk.thaws) != 0 {
		t.Error("thawed what was not frozen")
	}
	for _, seconds := range []string{"0", "-1", "61", `"x"`} {
		if outcome := host.Do(`"verb":"freeze_fs","seconds":` + seconds); outcome.Code != "bad_request" {
			t.Errorf("%s: %q", seconds, outcome.Code)
		}
	}
}

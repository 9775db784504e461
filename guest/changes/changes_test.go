package changes

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// guest is an upper directory without layers below; real overlays are the integration tests' business.
type guest struct {
	t        *testing.T
	upper    string
	baseline string
	state    string
}

func newGuest(t *testing.T) *guest {
	dir := t.TempDir()
	g := &guest{t, filepath.Join(dir, "upper"), filepath.Join(dir, "state", "baseline"), filepath.Join(dir, "state")}
	for _, d := range []string{g.upper, g.state} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	return g
}

func (g *guest) write(name, content string) {
	g.t.Helper()
	path := filepath.Join(g.upper, name)
	os.MkdirAll(filepath.Dir(path), 0o755)
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		g.t.Fatal(err)
	}
}

func (g *guest) request(op, result string) *request {
	return &request{Op: op, Upper: g.upper, Baseline: g.baseline, Result: filepath.Join(g.state, result)}
}

func (g *guest) ask(op, result string) answer {
	g.t.Helper()
	a, err := perform(context.Background(), g.request(op, result))
	if err != nil {
		g.t.Fatal(err)
	}
	return a
}

func TestNothingChangedLeavesTheBaselineAlone(t *testing.T) {
	g := newGuest(t)
	g.write("a/b", "x")
	g.ask("baseline", "")
	before, _ := os.Stat(g.baseline)
	if a := g.ask("changes", "1"); a.Total != 0 || a.Scanned != 2 {
		t.Fatalf("%+v", a)
	}
	after, _ := os.Stat(g.baseline)
	if !os.SameFile(before, after) {
		t.Fatal("the baseline was written again")
	}
	if files, _ := os.ReadDir(g.state); len(files) != 1 {
		t.Fatalf("%v", files)
	}
}

func TestCrashAfterTheBaselineWasCommitted(t *testing.T) {
	g := newGuest(t)
	g.ask("baseline", "")
	g.write("new", "x")
	g.ask("changes", "1")
	// As if the process had died before it gave the result its name.
	if err := os.Rename(filepath.Join(g.state, "1"), pending(g.baseline)); err != nil {
		t.Fatal(err)
	}
	if a := g.ask("changes", "2"); a.Total != 0 {
		t.Fatalf("reported again: %+v", a)
	}
	if total, _, err := stored(filepath.Join(g.state, "1")); total != 1 || err != nil {
		t.Fatal("lost", total, err)
	}
}

func TestCrashBeforeTheBaselineWasCommitted(t *testing.T) {
	g := newGuest(t)
	g.ask("baseline", "")
	g.write("one", "x")
	g.ask("changes", "1")
	g.write("two", "x")
	g.write("three", "x")
	// A complete result that no baseline names must not take the place of the one that the baseline does name.
	old, _ := os.ReadFile(g.baseline)
	g.ask("changes", "2")
	os.Rename(filepath.Join(g.state, "2"), pending(g.baseline))
	os.WriteFile(g.baseline, old, 0o600)
	if a := g.ask("changes", "3"); a.Total != 2 {
		t.Fatalf("%+v", a)
	}
	if total, _, err := stored(filepath.Join(g.state, "1")); total != 1 || err != nil {
		t.Fatal("another result took its name", total, err)
	}
}

func TestCancelledScanLeavesTheChangesToTheNext(t *testing.T) {
	g := newGuest(t)
	g.ask("baseline", "")
	g.write("new", "x")
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := perform(ctx, g.request("changes", "1")); codeOf(err) != "cancelled" {
		t.Fatal(err)
	}
	if a := g.ask("changes", "2"); a.Total != 1 {
		t.Fatalf("%+v", a)
	}
}

// With the kernel's tick for a clock, a scan must not end in the tick of the last change that it saw.
func TestCoarseClock(t *testing.T) {
	g := newGuest(t)
	g.write("new", "x")
	upper, err := openRoot(g.upper)
	if err != nil {
		t.Fatal(err)
	}
	s := &scan{ctx: context.Background(), upper: upper, names: newNames(), new: &baselineWriter{path: g.baseline}}
	future := time.Now().Add(15 * time.Millisecond)
	s.newest = future.UnixNano()
	if _, again, err := s.complete("", false); !again || err != nil {
		t.Fatal(again, err)
	}
	if time.Now().Before(future.Add(-time.Millisecond)) {
		t.Fatal("did not wait for the tick")
	}
	if _, err := os.Stat(temporary(g.baseline)); err == nil {
		t.Fatal("the abandoned baseline is still there")
	}
}

func TestKernelsWithFineTimes(t *testing.T) {
	for release, fine := range map[string]bool{
		"6.1.0-28-amd64": false, "6.12.9": false, "6.13.0-rc1": true, "6.13": true, "7.0.1": true, "5.19": false, "odd": false,
	} {
		if since613(release) != fine {
			t.Error(release)
		}
	}
}

// One guest's commands end at the same time: each change belongs to exactly one of them.
func TestRequestsOfOneBaselineTakeTurns(t *testing.T) {
	g := newGuest(t)
	for i := 0; i < 3000; i++ {
		g.write(fmt.Sprintf("tree/%d", i), "x")
	}
	g.ask("baseline", "")
	g.write("new", "x")
	var in bytes.Buffer
	for id := uint64(1); id <= 8; id++ {
		q := g.request("changes", fmt.Sprint(id))
		q.ID = id
		body, _ := json.Marshal(q)
		binary.Write(&in, binary.BigEndian, uint32(len(body)))
		in.Write(body)
	}
	r, w := io.Pipe()
	go newServer(w).serve(&in)
	var total uint64
	for i := 0; i < 8; i++ {
		var length uint32
		if err := binary.Read(r, binary.BigEndian, &length); err != nil {
			t.Fatal(err)
		}
		var a answer
		if err := json.NewDecoder(io.LimitReader(r, int64(length))).Decode(&a); err != nil || a.Error != nil {
			t.Fatal(err, a.Error)
		}
		total += a.Total
	}
	if total != 1 {
		t.Fatalf("reported %d times", total)
	}
}

func TestReplacedInTheSameTickOrPutBack(t *testing.T) {
	g := newGuest(t)
	g.write("one", "1")
	g.write("two", "2")
	one, _ := os.Stat(filepath.Join(g.upper, "one"))
	os.Chtimes(filepath.Join(g.upper, "two"), one.ModTime(), one.ModTime())
	g.ask("baseline", "")
	// A tick of the clock later: a file as old as its own inode could be another one.
	time.Sleep(20 * time.Millisecond)
	g.write("saved", "1")
	os.Remove(filepath.Join(g.upper, "one"))
	time.Sleep(10 * time.Millisecond)
	os.Rename(filepath.Join(g.upper, "saved"), filepath.Join(g.upper, "one"))
	os.Chtimes(filepath.Join(g.upper, "one"), one.ModTime(), one.ModTime())
	if a := g.ask("changes", "1"); a.Total != 0 {
		t.Fatalf("an equal file put back is no change: %+v", a)
	}
}

func FuzzBaseline(f *testing.F) {
	f.Add([]byte(baselineMagic + "\x01\x01a" + string(make([]byte, metaBytes)) + "\x7f"))
	f.Add([]byte(baselineMagic + "\x03\x01d\x7f\x7f"))
	dir := f.TempDir()
	upper := filepath.Join(dir, "upper")
	os.MkdirAll(filepath.Join(upper, "d", "e"), 0o700)
	os.WriteFile(filepath.Join(upper, "d", "x"), nil, 0o600)
	f.Fuzz(func(t *testing.T, data []byte) {
		state := t.TempDir()
		baseline := filepath.Join(state, "baseline")
		os.WriteFile(baseline, append(append([]byte{}, data...), "\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00INNBEND1"...), 0o600)
		q := &request{Op: "changes", Upper: upper, Baseline: baseline, Result: filepath.Join(state, "r")}
		if _, err := perform(context.Background(), q); err != nil && err != errBadBaseline {
			t.Fatal(err)
		}
	})
}

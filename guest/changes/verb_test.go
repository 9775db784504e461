package changes

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"innkeeper/guest/link"
	"innkeeper/guest/linktest"
	"innkeeper/guest/reaper"
)

// TestMain lets the test's own binary be the scanner that a verb starts.
func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == "scan" {
		os.Exit(Main(nil))
	}
	os.Exit(m.Run())
}

func verbOf(t *testing.T, g *guest) (*linktest.Host, *Verb) {
	t.Helper()
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	verb := NewVerb(reaper.New(), Place{Upper: g.upper, Private: g.state}, program)
	t.Cleanup(func() {
		if pid := verb.Pid(); pid != 0 {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	})
	return linktest.New(t, map[string]link.Handler{"changes": verb.Changes}), verb
}

func TestTheVerbReportsAChangeOnce(t *testing.T) {
	g := newGuest(t)
	host, _ := verbOf(t, g)
	changes := func(id string) linktest.Outcome {
		return host.Do(fmt.Sprintf(`"verb":"changes","op":"changes","id":%q`, id))
	}
	if outcome := changes("1"); outcome.Code != "not_found" {
		t.Error("without a baseline: ", outcome)
	}
	g.write("before", "x")
	if outcome := host.Do(`"verb":"changes","op":"baseline"`); outcome.Result["scanned"] != 1.0 {
		t.Error(outcome)
	}
	g.write("new/file", "abc")
	g.write("excluded/file", "abc")
	first := host.Do(`"verb":"changes","op":"changes","id":"1","excluded":["/excluded"]`)
	if first.Result["total"] != 1.0 || !strings.HasPrefix(first.Output, "INNCHNG1") || !strings.Contains(first.Output, "/new/file") {
		t.Error(first)
	}
	g.write("later", "x")
	if again := changes("1"); again.Output != first.Output || again.Result["total"] != 1.0 {
		t.Error("asked again: ", again)
	}
	if second := changes("2"); second.Result["total"] != 2.0 || !strings.Contains(second.Output, "/later") {
		t.Error(second)
	}
	if third := changes("3"); third.Result["total"] != 0.0 || third.Output != "" {
		t.Error(third)
	}
	if left, _ := filepath.Glob(g.state + "/*.changes"); len(left) > 0 {
		t.Error("results of before are still there: ", left)
	}
	if outcome := host.Do(`"verb":"changes","op":"forget"`); outcome.Result == nil {
		t.Error(outcome)
	}
	if outcome := changes("4"); outcome.Code != "not_found" {
		t.Error("after it was forgotten: ", outcome)
	}
}

func TestALongResultComesWhole(t *testing.T) {
	g := newGuest(t)
	host, _ := verbOf(t, g)
	host.Do(`"verb":"changes","op":"baseline"`)
	for number := 0; number < 5500; number++ {
		g.write(fmt.Sprintf("%s/%05d", strings.Repeat("x", 200), number), "") // more than the credit of a stream
	}
	outcome := host.Do(`"verb":"changes","op":"changes","id":"1"`)
	if outcome.Result["total"] != 5500.0 {
		t.Fatal(outcome.Result, outcome.Code)
	}
	if kept, err := os.ReadFile(g.state + "/1.changes"); err != nil || !bytes.Equal(kept, []byte(outcome.Output)) || len(kept) < link.InitialCredit {
		t.Error(len(kept), len(outcome.Output), err)
	}
}

func TestTheVerbRefuses(t *testing.T) {
	host, _ := verbOf(t, newGuest(t))
	for _, fields := range []string{
		`"op":"other"`, `"op":"changes"`, `"op":"changes","id":"a/b"`, `"op":"changes","id":"..","excluded":[]`, `"op":"changes","id":".x"`,
		`"op":"changes","id":"` + strings.Repeat("x", 65) + `"`, `"op":"baseline","excluded":["relative"]`, `"op":3`,
	} {
		if outcome := host.Do(`"verb":"changes",` + fields); outcome.Code != "bad_request" {
			t.Error(fields, outcome)
		}
	}
}

func TestAScannerThatDiedIsStartedAgain(t *testing.T) {
	g := newGuest(t)
	host, verb := verbOf(t, g)
	host.Do(`"verb":"changes","op":"baseline"`)
	first := verb.Pid()
	g.write("new", "x")
	if err := syscall.Kill(first, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	// Its end may be noticed by this request, which then fails, and the next one has another scanner.
	outcome := host.Do(`"verb":"changes","op":"changes","id":"1"`)
	if outcome.Code == "io_error" {
		outcome = host.Do(`"verb":"changes","op":"changes","id":"1"`)
	}
	if outcome.Result["total"] != 1.0 || verb.Pid() == first || verb.Pid() == 0 {
		t.Error(outcome, verb.Pid())
	}
}

package exec_test

import (
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"innkeeper/guest/exec"
	"innkeeper/guest/link"
	"innkeeper/guest/linktest"
)

var kernels int64

// session is an interpreter of its own and what a test says to it.
type session struct {
	t     *testing.T
	host  *linktest.Host
	table *exec.Table
	name  string
}

func open(t *testing.T) *session {
	t.Helper()
	table, verbs := start(t)
	verbs["results"] = table.Results
	return &session{t, linktest.New(t, verbs), table, fmt.Sprintf("k%d", atomic.AddInt64(&kernels, 1))}
}

func (s *session) request(code, more string) string {
	return command(fmt.Sprintf(`"cell":{"kernel":%q,"code":%q},"env":{"INN_PYTHON":"plain"}%s`, s.name, code, more))
}

func (s *session) run(code string) linktest.Outcome {
	s.t.Helper()
	return s.host.Do(s.request(code, ""))
}

func said(outcome linktest.Outcome) string {
	message := outcome.Message("exited")
	if message == nil {
		return fmt.Sprintf("%+v", outcome)
	}
	cell := message["cell"].(map[string]any)
	return fmt.Sprintf("%v|%v|%v|fresh=%v lost=%v timed_out=%v", outcome.Output, lastLine(outcome.Errors),
		message["exit_code"], cell["fresh"], cell["lost"], message["timed_out"])
}

func lastLine(text string) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return lines[len(lines)-1]
}

func TestCellsShareTheirNames(t *testing.T) {
	s := open(t)
	for _, c := range []struct{ code, expected string }{
		{"import math\nx = 20", "||0|fresh=true lost=false timed_out=false"},
		{"x + 1", "21\n||0|fresh=false lost=false timed_out=false"},
		{"x + 1;", "||0|fresh=false lost=false timed_out=false"},
		{"def f():\n    return math.floor(x / 3)\nprint(f()); f()", "6\n6\n||0|fresh=false lost=false timed_out=false"},
		{"1/0", "|ZeroDivisionError: division by zero|1|fresh=false lost=false timed_out=false"},
		{"x = (", "|SyntaxError: '(' was never closed|1|fresh=false lost=false timed_out=false"},
		{"def g(): return g()\ng()", "|RecursionError: maximum recursion depth exceeded|1|fresh=false lost=false timed_out=false"},
		{"raise SystemExit(3)", "||3|fresh=false lost=false timed_out=false"},
		{"exit()", "||0|fresh=false lost=false timed_out=false"},
		{"input()", "|EOFError: EOF when reading a line|1|fresh=false lost=false timed_out=false"},
		{"import sys; print('o'); print('e', file=sys.stderr)", "o\n|e|0|fresh=false lost=false timed_out=false"},
		{"import os, subprocess\nsubprocess.run(['echo', 'child'])\nNone", "child\n||0|fresh=false lost=false timed_out=false"},
		{"os.system('echo shell')", "shell\n0\n||0|fresh=false lost=false timed_out=false"},
		{"import asyncio\nawait asyncio.sleep(0, 'awaited')", "'awaited'\n||0|fresh=false lost=false timed_out=false"},
		{"if os.fork() == 0:\n    print('child')\nelse:\n    os.wait(); print('parent')", "child\nparent\n||0|fresh=false lost=false timed_out=false"},
		{"x", "20\n||0|fresh=false lost=false timed_out=false"},
		{"sys.stdout.close(); os.close(1)", "||0|fresh=false lost=false timed_out=false"},
		{"print('again')", "again\n||0|fresh=false lost=false timed_out=false"},
		{"os.write(3, b'\\xff' * 64);", "||137|fresh=false lost=true timed_out=false"},
		{"import os; os._exit(7)", "||7|fresh=true lost=true timed_out=false"},
		{"import ctypes; ctypes.string_at(0)", "||139|fresh=true lost=true timed_out=false"},
		{"x", "|NameError: name 'x' is not defined|1|fresh=true lost=false timed_out=false"},
	} {
		if found := said(s.run(c.code)); found != c.expected {
			t.Errorf("%s\n  %q\n  %q", c.code, found, c.expected)
		}
	}
}

func TestNewVariablesReachTheNextCell(t *testing.T) {
	s := open(t)
	with := func(code, variables string) string {
		t.Helper()
		return said(s.host.Do(command(fmt.Sprintf(`"cell":{"kernel":%q,"code":%q},"env":{"INN_PYTHON":"plain"%s}`, s.name, code, variables))))
	}
	const rest = "||0|fresh=%v lost=false timed_out=false"
	for _, c := range []struct{ code, variables, expected string }{
		{"import os, subprocess; print(os.environ.get('A'))", `,"A":"at its start"`, "at its start\n" + fmt.Sprintf(rest, true)},
		{"print(os.environ.get('A')); os.environ['A'] = 'its own'", `,"A":"ä new"`, "ä new\n" + fmt.Sprintf(rest, false)},
		// What a cell has set stays until there is something new.
		{"print(os.environ['A'])", `,"A":"ä new"`, "its own\n" + fmt.Sprintf(rest, false)},
		{"print(subprocess.getoutput('echo $A $B'))", `,"A":"ä new","B":"2"`, "its own 2\n" + fmt.Sprintf(rest, false)},
		{"print(os.environ['B'])", ``, "2\n" + fmt.Sprintf(rest, false)},
	} {
		if found := with(c.code, c.variables); found != c.expected {
			t.Errorf("%s\n  %q\n  %q", c.code, found, c.expected)
		}
	}
}

func TestTimeLimitsKeepTheStateWhereTheyCan(t *testing.T) {
	s := open(t)
	s.run("x = 5")
	limited := func(code string) string { return said(s.host.Do(s.request(code, `,"timeout_ms":300`))) }
	for _, code := range []string{"while True: pass", "import time; time.sleep(60)", "import os; os.system('sleep 60');"} {
		if found := limited(code); found != "|KeyboardInterrupt|124|fresh=false lost=false timed_out=true" &&
			found != "||124|fresh=false lost=false timed_out=true" {
			t.Error(code, found)
		}
	}
	if found := said(s.run("x")); !strings.HasPrefix(found, "5\n|") {
		t.Error(found)
	}
	found := limited("import signal; signal.signal(2, signal.SIG_IGN)\nwhile True: pass")
	if found != "||124|fresh=false lost=true timed_out=true" {
		t.Error(found)
	}
	if found := said(s.run("x")); !strings.Contains(found, "fresh=true") {
		t.Error(found)
	}
}

func TestCellsTakeTurns(t *testing.T) {
	s := open(t)
	s.run("n = 0")
	first := s.host.Open(s.request("import time; time.sleep(0.6); n += 1; print('first', n)", ""))
	time.Sleep(100 * time.Millisecond)
	impatient := s.host.Do(s.request("n += 100", `,"timeout_ms":100`))
	second := s.host.Open(s.request("n += 1; print('second', n)", ""))
	if found := said(impatient); found != "||124|fresh=false lost=false timed_out=true" {
		t.Error(found)
	}
	if found := first.Finish().Output; found != "first 1\n" {
		t.Error(found)
	}
	if found := second.Finish().Output; found != "second 2\n" {
		t.Error(found)
	}
	killer := s.host.Open(s.request("import os, time; time.sleep(0.3); os._exit(1)", ""))
	time.Sleep(50 * time.Millisecond)
	waiting := s.host.Open(s.request("print('in a new one')", ""))
	killer.Finish()
	if found := said(waiting.Finish()); found != "in a new one\n||0|fresh=true lost=false timed_out=false" {
		t.Error(found)
	}
}

func TestSignalsReachTheCellThatTheyAreFor(t *testing.T) {
	s := open(t)
	s.run("x = 1")
	call := s.host.Open(s.request("import time; print('begun'); time.sleep(60)", ""))
	for call.Next().Kind != link.Data {
	}
	// Again, as a person would: an interrupt that comes just before CPython begins to sleep waits for the end of it.
	interrupting := time.NewTicker(500 * time.Millisecond)
	defer interrupting.Stop()
	ended := make(chan struct{})
	go func() {
		for {
			call.Send(link.Message, `{"signal":2}`)
			select {
			case <-ended:
				return
			case <-interrupting.C:
			}
		}
	}()
	outcome := call.Finish()
	close(ended)
	if found := said(outcome); found != "|KeyboardInterrupt|130|fresh=false lost=false timed_out=false" {
		t.Error(found)
	}
	if found := said(s.run("x")); !strings.HasPrefix(found, "1\n|") {
		t.Error(found)
	}
	call = s.host.Open(s.request("import time; print('begun'); time.sleep(60)", ""))
	for call.Next().Kind != link.Data {
	}
	call.Send(link.Message, `{"signal":9}`)
	if found := said(call.Finish()); found != "||137|fresh=false lost=true timed_out=false" {
		t.Error(found)
	}
}

func TestASignalCallsOffACellWhoseTurnHasNotCome(t *testing.T) {
	s := open(t)
	s.run("n = 0")
	first := s.host.Open(s.request("print('begun')\nimport time\nwhile not n: time.sleep(0.05)\nprint('first', n)", ""))
	for first.Next().Kind != link.Data {
	}
	for _, c := range []struct {
		number   int
		expected string
	}{{2, "||130|fresh=false lost=false timed_out=false"}, {9, "||137|fresh=false lost=false timed_out=false"}, {15, "||143|fresh=false lost=false timed_out=false"}} {
		waiting := s.host.Open(s.request("n += 100", ""))
		if waiting.Next().Kind != link.Message {
			t.Fatal("it has not started")
		}
		id := fmt.Sprintf("e%d", serial)
		signal := func(number int) linktest.Outcome {
			return s.host.Do(fmt.Sprintf(`"verb":"signal","id":%q,"signal":%d`, id, number))
		}
		// What would not end it cannot reach it, and says so.
		if outcome := signal(18); outcome.Code != "bad_request" {
			t.Error(outcome)
		}
		if outcome := signal(c.number); outcome.Code != "" {
			t.Error(outcome)
		}
		outcome := waiting.Finish()
		if found := said(outcome); found != c.expected {
			t.Error(c.number, found)
		}
		if found := outcome.Message("exited")["signal"]; found != float64(c.number) {
			t.Error(c.number, found)
		}
		if outcome := signal(c.number); outcome.Code != "no_such_process" {
			t.Error(outcome)
		}
	}
	// The cell whose turn it is has heard nothing of all that.
	first.Send(link.Message, `{"signal":2}`)
	if found := said(first.Finish()); found != "|KeyboardInterrupt|130|fresh=false lost=false timed_out=false" {
		t.Error(found)
	}
	if found := said(s.run("n")); !strings.HasPrefix(found, "0\n|") {
		t.Error(found)
	}
}

func TestAnInterruptWaitsUntilItsCellHasBegun(t *testing.T) {
	for attempt := 0; attempt < 3; attempt++ {
		// An interpreter of its own each time, which is only starting when the signal comes.
		s := open(t)
		call := s.host.Open(s.request("x = 1\nwhile True: pass", ""))
		if call.Next().Kind != link.Message {
			t.Fatal("it has not started")
		}
		call.Send(link.Message, `{"signal":2}`)
		outcome := call.Finish()
		if message := outcome.Message("exited"); message["exit_code"] != 130.0 || message["cell"].(map[string]any)["lost"] != false {
			t.Error(said(outcome))
		}
		if found := said(s.run("1")); found != "1\n||0|fresh=false lost=false timed_out=false" {
			t.Error(found)
		}
	}
}

func TestResults(t *testing.T) {
	s := open(t)
	fetch := func(outcome linktest.Outcome, code string) linktest.Outcome {
		cell := outcome.Message("exited")["cell"].(map[string]any)
		fetched := s.host.Do(fmt.Sprintf(`"verb":"results","id":"e%d"`, serial))
		if float64(len(fetched.Output)) != cell["result_bytes"] {
			t.Error(code, len(fetched.Output), cell)
		}
		return fetched
	}
	table := "class T:\n    def _repr_html_(self): return '<b>'\n    def __repr__(self): return 'T'\n    def _repr_png_(self): return b'png'\n"
	outcome := s.run(table + "display(T())\nT()")
	forms := "\x03\x00\x0a\x00\x00\x00\x01\x01text/plainT\x00\x09\x00\x00\x00\x03\x01text/html<b>\x00\x09\x00\x00\x00\x04\x01image/pngcG5n"
	expected := "\x01" + forms + "\x02" + forms
	if found := fetch(outcome, "T"); found.Output != expected || outcome.Output != "T\nT\n" {
		t.Error(found.Output, outcome.Output)
	}
	outcome = s.run("class Big:\n    def _repr_html_(self): return 'x' * (5 << 20)\nBig()")
	if found := fetch(outcome, "Big"); !strings.Contains(found.Output, "\x00\x50\x00\x00\x00text/html") {
		t.Error(found)
	}
	if outcome.Message("exited")["cell"].(map[string]any)["results_truncated"] != true {
		t.Error(outcome)
	}
	outcome = s.run("for n in range(500): display(n)")
	if found := fetch(outcome, "many"); strings.Count(found.Output, "text/plain") != 100 {
		t.Error(len(found.Output))
	}
	if found := s.run("x = 1"); found.Message("exited")["cell"].(map[string]any)["result_bytes"] != 0.0 {
		t.Error(found)
	}
}

func TestAnInterpreterThatWaitsKeepsNobodyAwake(t *testing.T) {
	s := open(t)
	before := len(s.table.OwnPids())
	s.run("import threading, time")
	if found := len(s.table.OwnPids()); found != before+1 {
		t.Error(before, found)
	}
	s.run("threading.Thread(target=time.sleep, args=(60,), daemon=True).start()")
	if found := len(s.table.OwnPids()); found != before {
		t.Error("one with threads counts as the user's:", found)
	}
}

func TestCellsThatAreRefused(t *testing.T) {
	s := open(t)
	for _, request := range []string{
		s.request("1", `,"shell":"true"`), s.request("1", `,"cwd":"/"`), s.request("1", `,"pty":{"rows":1,"cols":1}`),
		command(`"cell":{"kernel":"","code":"1"}`), command(`"cell":{"kernel":"` + strings.Repeat("x", 65) + `","code":"1"}`),
	} {
		if outcome := s.host.Do(request); outcome.Code != "bad_request" {
			t.Error(request, outcome)
		}
	}
	for number := 0; number < 8; number++ {
		s.name = fmt.Sprintf("limit-%d", number)
		s.run("1")
	}
	s.name = "one-too-many"
	if outcome := s.run("1"); outcome.Code != "busy" {
		t.Error(outcome)
	}
}

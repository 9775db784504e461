package exec_test

import (
	"fmt"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"innkeeper/guest/account"
	"innkeeper/guest/exec"
	"innkeeper/guest/link"
	"innkeeper/guest/linktest"
	"innkeeper/guest/reaper"
)

// One reaper a program: it takes the status of every child.
var (
	once     sync.Once
	children *reaper.Table
	logins   *account.Logins
	serial   int64
)

func start(t *testing.T) (*exec.Table, map[string]link.Handler) {
	t.Helper()
	once.Do(func() { children = reaper.New(); logins = account.NewLogins(children) })
	table, err := exec.NewTable(children, logins)
	if err != nil {
		t.Fatal(err)
	}
	return table, map[string]link.Handler{
		"exec": table.Exec, "attach": table.Attach, "processes": table.Processes, "signal": table.Signal,
	}
}

func command(rest string) string {
	return fmt.Sprintf(`"verb":"exec","id":"e%d",%s`, atomic.AddInt64(&serial, 1), rest)
}

func shell(line string) string { return command(fmt.Sprintf(`"merge":true,"shell":%q`, line)) }

func exitCode(t *testing.T, outcome linktest.Outcome) int {
	t.Helper()
	message := outcome.Message("exited")
	if message == nil {
		t.Fatal("no exit:", outcome)
	}
	return int(message["exit_code"].(float64))
}

func TestOutcomes(t *testing.T) {
	_, verbs := start(t)
	h := linktest.New(t, verbs)
	cases := []struct {
		request, output, errors string
		code                    int
	}{
		{shell("echo out; echo err >&2; exit 3"), "out\nerr\n", "", 3},
		{command(`"shell":"echo out; echo err >&2"`), "out\n", "err\n", 0},
		{command(`"argv":["sh","-c","kill -9 $$"]`), "", "", 137},
		{shell("nosuchprogram"), "bash: line 1: nosuchprogram: command not found\n", "", 127},
		{shell("cd /tmp; pwd"), "/tmp\n", "", 0},
		{command(`"merge":true,"cwd":"/usr","shell":"/bin/pwd"`), "/usr\n", "", 0},
		{command(`"merge":true,"env":{"A":"b c"},"shell":"echo $A $HOME"`), "b c /root\n", "", 0},
		{command(`"merge":true,"argv":["echo","a  b"]`), "a  b\n", "", 0},
		{shell("readlink /proc/self/fd/0"), "/dev/null\n", "", 0},
		{shell("ps -o sid= -p $$ | tr -d ' '; echo $$"), "", "", 0},
	}
	for _, c := range cases {
		outcome := h.Do(c.request)
		if c.output == "" && c.code == 0 {
			lines := strings.Fields(outcome.Output)
			if len(lines) != 2 || lines[0] != lines[1] {
				t.Error("no session of its own:", outcome.Output)
			}
			continue
		}
		if outcome.Output != c.output || outcome.Errors != c.errors || exitCode(t, outcome) != c.code {
			t.Errorf("%s: %+v", c.request, outcome)
		}
	}
}

func TestRefusals(t *testing.T) {
	_, verbs := start(t)
	h := linktest.New(t, verbs)
	for request, code := range map[string]string{
		command(`"argv":["/nosuch"]`):                          "not_found",
		command(`"argv":["true"],"shell":"true"`):              "bad_request",
		command(`"argv":[]`):                                   "bad_request",
		command(`"shell":"a\u0000b"`):                          "bad_request",
		command(`"shell":"true","cwd":"/nosuch"`):              "not_found",
		command(`"shell":"true","cwd":"/etc/passwd"`):          "not_a_directory",
		command(`"shell":"true","user":"nosuch"`):              "not_found",
		command(`"argv":["/etc/passwd"]`):                      "spawn_failed",
		`"verb":"exec","id":"","shell":"true"`:                 "bad_request",
		`"verb":"attach","id":"nosuch"`:                        "no_such_process",
		`"verb":"signal","id":"nosuch","signal":9`:             "no_such_process",
		`"verb":"exec","id":"x","shell":3`:                     "bad_request",
		command(`"shell":"true","env":{"A=B":"c"}`):            "bad_request",
		`"verb":"exec","id":"` + strings.Repeat("x", 65) + `"`: "bad_request",
	} {
		if outcome := h.Do(request); outcome.Code != code {
			t.Errorf("%s: %+v", request, outcome)
		}
	}
}

func TestInputAndSignals(t *testing.T) {
	_, verbs := start(t)
	h := linktest.New(t, verbs)
	call := h.Open(command(`"merge":true,"stdin":true,"argv":["cat"]`))
	call.Send(link.Data, "through")
	call.Send(link.End, "")
	if outcome := call.Finish(); outcome.Output != "through" || exitCode(t, outcome) != 0 {
		t.Error(outcome)
	}
	call = h.Open(shell("trap 'echo caught; exit 4' USR1; echo ready; while :; do sleep 0.01; done"))
	for call.Next().Kind != link.Data {
	}
	call.Send(link.Message, `{"signal":10}`)
	if outcome := call.Finish(); !strings.HasSuffix(outcome.Output, "caught\n") || exitCode(t, outcome) != 4 {
		t.Error(outcome)
	}
}

func TestTimeoutKillsTheGroupAndKeepsTheOutput(t *testing.T) {
	_, verbs := start(t)
	h := linktest.New(t, verbs)
	began := time.Now()
	outcome := h.Do(command(`"merge":true,"timeout_ms":2000,"shell":"echo before; sleep 120 & wait"`))
	message := outcome.Message("exited")
	if outcome.Output != "before\n" || exitCode(t, outcome) != 124 || message["timed_out"] != true || message["signal"] != 9.0 {
		t.Error(outcome)
	}
	if time.Since(began) > time.Minute {
		t.Error("the background child survived")
	}
}

func TestExitComesBeforeABackgroundWritersEnd(t *testing.T) {
	_, verbs := start(t)
	h := linktest.New(t, verbs)
	call := h.Open(shell("echo first; (sleep 0.3; echo second) & exit 0"))
	output, exited := "", false
	for {
		frame := call.Next()
		if frame.Kind == link.Data {
			output += string(frame.Payload)
			if output == "first\nsecond\n" && !exited {
				t.Error("the exit came after the background output")
			}
		}
		if frame.Kind == link.Message && strings.Contains(string(frame.Payload), "exited") {
			exited = true
			if output != "first\n" {
				t.Errorf("before the exit: %q", output)
			}
		}
		if frame.Kind == link.Result {
			break
		}
	}
	if output != "first\nsecond\n" {
		t.Errorf("%q", output)
	}
}

func TestWhatTheLeaderWroteComesBeforeItsExit(t *testing.T) {
	_, verbs := start(t)
	h := linktest.New(t, verbs)
	calls := make([]*linktest.Call, 40)
	for index := range calls {
		calls[index] = h.Open(shell("sleep 0.5 & head -c 60000 /dev/zero; kill -9 $$"))
	}
	for _, call := range calls {
		received := 0
		for {
			frame := call.Next()
			if frame.Kind == link.Data {
				received += len(frame.Payload)
			}
			if frame.Kind == link.Message && strings.Contains(string(frame.Payload), "exited") {
				break
			}
		}
		if received != 60000 {
			t.Errorf("%d bytes before the exit", received)
		}
	}
}

func TestExitAndResultComeTogether(t *testing.T) {
	_, verbs := start(t)
	outcome := linktest.New(t, verbs).Do(shell("exit 0"))
	if exitCode(t, outcome) != 0 || outcome.Result == nil {
		t.Error(outcome)
	}
}

func TestLargeOutputInOrder(t *testing.T) {
	_, verbs := start(t)
	outcome := linktest.New(t, verbs).Do(shell("seq 1 600000"))
	lines := strings.Split(strings.TrimSuffix(outcome.Output, "\n"), "\n")
	if len(lines) != 600000 || lines[599999] != "600000" || lines[300000] != "300001" {
		t.Error(len(lines), lines[len(lines)-1])
	}
	if outcome.Message("exited")["dropped_bytes"] != 0.0 {
		t.Error(outcome.Messages)
	}
}

func TestASlowReaderSlowsTheProcess(t *testing.T) {
	_, verbs := start(t)
	h := linktest.New(t, verbs)
	mark := t.TempDir() + "/done"
	call := h.Open(shell("head -c 8000000 /dev/zero; touch " + mark))
	received := 0
	for received < link.InitialCredit {
		if frame := call.Next(); frame.Kind == link.Data {
			received += len(frame.Payload)
		}
	}
	time.Sleep(200 * time.Millisecond)
	if _, err := os.Stat(mark); err == nil {
		t.Error("the process was not slowed")
	}
	call.Grant(8000000)
	outcome := call.Finish()
	if received+len(outcome.Output) != 8000000 || exitCode(t, outcome) != 0 {
		t.Error(received, len(outcome.Output))
	}
}

func TestCancelKillsUnlessDetached(t *testing.T) {
	_, verbs := start(t)
	h := linktest.New(t, verbs)
	for _, detached := range []bool{false, true} {
		id := fmt.Sprintf("cancel-%v", detached)
		call := h.Open(fmt.Sprintf(`"verb":"exec","id":%q,"shell":"sleep 1000","detach_on_cancel":%v`, id, detached))
		call.Next()
		call.Send(link.Cancel, "")
		running := func() bool {
			return strings.Contains(fmt.Sprint(h.Do(`"verb":"processes"`).Result["executions"]), "running:true")
		}
		if detached {
			time.Sleep(100 * time.Millisecond)
			if !running() {
				t.Error("one that was to go on was killed")
			}
		}
		for deadline := time.Now().Add(30 * time.Second); !detached && running(); time.Sleep(10 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal("it was not killed")
			}
		}
		h.Do(fmt.Sprintf(`"verb":"signal","id":%q,"signal":9`, id))
	}
}

func TestAttachResumesWhereTheLinkBroke(t *testing.T) {
	_, verbs := start(t)
	first := linktest.New(t, verbs)
	call := first.Open(`"verb":"exec","id":"resumed","merge":true,"shell":"echo one; sleep 0.2; echo two; exit 6"`)
	for call.Next().Kind != link.Data {
	}
	first.Break()
	time.Sleep(400 * time.Millisecond)
	second := linktest.New(t, verbs)
	outcome := second.Do(`"verb":"attach","id":"resumed","offset":4`)
	if outcome.Output != "two\n" || exitCode(t, outcome) != 6 || outcome.Messages[0]["offset"] != 4.0 {
		t.Error(outcome)
	}
	if outcome := second.Do(`"verb":"attach","id":"resumed","offset":99`); outcome.Code != "bad_request" {
		t.Error(outcome)
	}
}

func TestASecondReaderTakesOver(t *testing.T) {
	_, verbs := start(t)
	h := linktest.New(t, verbs)
	first := h.Open(`"verb":"exec","id":"shared","merge":true,"shell":"echo one; sleep 0.3; echo two"`)
	for first.Next().Kind != link.Data {
	}
	second := h.Open(`"verb":"attach","id":"shared","offset":0`)
	if outcome := first.Finish(); outcome.Code != "busy" {
		t.Error(outcome)
	}
	if outcome := second.Finish(); outcome.Output != "one\ntwo\n" {
		t.Error(outcome)
	}
}

func TestWithoutAReaderTheOldestBytesGo(t *testing.T) {
	_, verbs := start(t)
	first := linktest.New(t, verbs)
	call := first.Open(`"verb":"exec","id":"unread","merge":true,"shell":"sleep 0.1; seq 1 500000"`)
	call.Next()
	first.Break()
	second := linktest.New(t, verbs)
	for deadline := time.Now().Add(60 * time.Second); strings.Contains(fmt.Sprint(second.Do(`"verb":"processes"`).Result["executions"]), "running:true"); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("it waits for its reader")
		}
	}
	outcome := second.Do(`"verb":"attach","id":"unread"`)
	offset := outcome.Messages[0]["offset"].(float64)
	total := outcome.Message("exited")["output_bytes"].(float64)
	if len(outcome.Output) != 1<<20 || offset != total-1<<20 || !strings.HasSuffix(outcome.Output, "499999\n500000\n") {
		t.Error(len(outcome.Output), offset, total)
	}
	if outcome.Message("exited")["dropped_bytes"].(float64) != offset {
		t.Error(outcome.Messages)
	}
}

func TestTerminal(t *testing.T) {
	_, verbs := start(t)
	h := linktest.New(t, verbs)
	call := h.Open(command(`"pty":{"rows":11,"cols":22},"shell":"trap 'stty size; exit 9' WINCH; stty size; echo $TERM; tty; while :; do sleep 0.01; done"`))
	output := ""
	for !strings.Contains(output, "/dev/pts") {
		if frame := call.Next(); frame.Kind == link.Data {
			output += string(frame.Payload)
		}
	}
	call.Send(link.Message, `{"resize":{"rows":33,"cols":44}}`)
	outcome := call.Finish()
	if !strings.HasPrefix(output, "11 22\r\nxterm-256color\r\n") || !strings.Contains(outcome.Output, "33 44") || exitCode(t, outcome) != 9 {
		t.Errorf("%q %+v", output, outcome)
	}
	call = h.Open(command(`"pty":{"rows":11,"cols":22},"shell":"cat"`))
	call.Next()
	time.Sleep(50 * time.Millisecond)
	call.Send(link.Data, "\x03")
	if outcome := call.Finish(); exitCode(t, outcome) != 130 {
		t.Error(outcome)
	}
}

func TestOrphansAreCollected(t *testing.T) {
	_, verbs := start(t)
	outcome := linktest.New(t, verbs).Do(shell("(setsid sleep 0.05 >/dev/null 2>&1 & echo $!)"))
	pid := strings.TrimSpace(outcome.Output)
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat("/proc/" + pid); err != nil {
			return
		}
	}
	t.Error("a zombie stayed")
}

func TestManyAtOnce(t *testing.T) {
	_, verbs := start(t)
	h := linktest.New(t, verbs)
	calls := make([]*linktest.Call, 100)
	for index := range calls {
		calls[index] = h.Open(command(fmt.Sprintf(`"merge":true,"argv":["sh","-c","echo %d; exit %d"]`, index, index)))
	}
	for index, call := range calls {
		outcome := call.Finish()
		if outcome.Output != fmt.Sprintf("%d\n", index) || exitCode(t, outcome) != index {
			t.Error(index, outcome)
		}
	}
}

func TestAnExactEnvironmentHasNothingButHomeAndWhatWasAsked(t *testing.T) {
	table, verbs := start(t)
	table.Configure(exec.Settings{Env: map[string]string{"CONFIGURED": "1"}})
	h := linktest.New(t, verbs)
	outcome := h.Do(command(`"exact_env":true,"env":{"PATH":"/usr/bin:/bin","X":"y z"},"argv":["env"]`))
	lines := strings.Split(strings.TrimSpace(outcome.Output), "\n")
	if strings.Join(lines, ",") != "HOME=/root,PATH=/usr/bin:/bin,X=y z" && strings.Join(lines, ",") != "HOME=/root,X=y z,PATH=/usr/bin:/bin" {
		t.Errorf("%q", outcome.Output)
	}
	outcome = h.Do(command(`"exact_env":true,"user":"65534:7","env":{"PATH":"/usr/bin:/bin"},"argv":["id"]`))
	if !strings.HasPrefix(outcome.Output, "uid=65534(nobody) gid=7(lp) groups=7(lp)") {
		t.Errorf("%q %s", outcome.Output, outcome.Code)
	}
	if outcome = h.Do(command(`"user":"root:nosuchgroup","argv":["id"]`)); outcome.Code != "not_found" {
		t.Error(outcome.Code)
	}
}

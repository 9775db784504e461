package exec_test

import (
	"os"
	"strings"
	"testing"
	"time"

	"innkeeper/guest/exec"
	"innkeeper/guest/linktest"
)

// commands whose answer must be the same from a spare shell as from `bash -c`.
var alike = []string{
	"echo hi; false",
	"echo $- $0 $# \"$*\" $SHLVL",
	"nosuchprogram",
	"true\nnosuchprogram",
	"x=$((1/0))",
	"echo \"é\" | wc -m; echo $LC_ALL $LANG",
	"set -u; echo $nosuch",
	"umask; pwd; ulimit -n",
	"exit 300",
	"kill -TERM $$",
	"(exit 3); echo $?",
	"readlink /proc/$$/fd/9; cd /proc/$$/fd; echo *",
	"trap 'echo bye' EXIT; echo here",
	"cat <<EOF\nword\nEOF",
	"env | grep -v '^_=' | sort",
	"compgen -v | grep -v -e ^_ -e PIPESTATUS -e COMP | sort; echo ${BASH_EXECUTION_STRING@Q}",
	"return 3",
	"echo $BASH_LINENO $FUNCNAME ${BASH_SOURCE[0]} $LINENO",
	"\n\necho $LINENO; nosuchprogram",
	"cat; true",
	"",
	"# " + strings.Repeat("é", 29_000) + "\necho $- ${#BASH_EXECUTION_STRING}",
}

// spareReady waits for the spare shell, which is made beside the answer, and returns its pid. Settings given shortly before
// may still replace it, so it has to be the same one for a while.
func spareReady(t *testing.T, table *exec.Table) int {
	t.Helper()
	seen, since := 0, time.Now()
	for deadline := since.Add(60 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		now := 0
		for pid := range table.OwnPids() {
			now = pid
		}
		if now != seen {
			seen, since = now, time.Now()
		}
		if seen != 0 && time.Since(since) > 20*time.Millisecond {
			return seen
		}
	}
	t.Fatal("no spare shell")
	return 0
}

// bySpare has the spare shell run a line, and returns its pid as well. A command that comes while a shell is being made gets one of its own, and on a busy machine that
// takes its time.
func bySpare(t *testing.T, table *exec.Table, h *linktest.Host, line string) (linktest.Outcome, int) {
	t.Helper()
	for deadline := time.Now().Add(60 * time.Second); time.Now().Before(deadline); {
		ready := spareReady(t, table)
		if outcome := h.Do(shell(line)); int(outcome.Messages[0]["pid"].(float64)) == ready {
			return outcome, ready
		}
	}
	t.Fatalf("%q was never run by the spare shell", line)
	panic("unreachable")
}

func TestTheSpareShellAnswersLikeBashC(t *testing.T) {
	table, verbs := start(t)
	h := linktest.New(t, verbs)
	for _, line := range alike {
		table.Configure(exec.Settings{})
		usual := h.Do(shell(line))
		table.Configure(exec.Settings{SpareShell: true})
		spare, _ := bySpare(t, table, h, line)
		if spare.Output != usual.Output || exitCode(t, spare) != exitCode(t, usual) {
			t.Errorf("%q\nbash -c: %q %d\nspare:   %q %d", line, usual.Output, exitCode(t, usual), spare.Output, exitCode(t, spare))
		}
	}
}

func TestTheSpareShellIsUsedOnceAndReplaced(t *testing.T) {
	table, verbs := start(t)
	h := linktest.New(t, verbs)
	table.Configure(exec.Settings{SpareShell: true})
	outcome, before := bySpare(t, table, h, "echo $$")
	if strings.TrimSpace(outcome.Output) == "" {
		t.Error("it says nothing:", outcome, before)
	}
	next := spareReady(t, table)
	if next == before {
		t.Error("used twice")
	}
	before = next
	// Another environment, and a file that a login reads: neither may meet the old shell.
	other := h.Do(command(`"merge":true,"shell":"echo $A","env":{"A":"b"}`))
	if other.Output != "b\n" || int(other.Messages[0]["pid"].(float64)) == before {
		t.Error(other)
	}
	table.Configure(exec.Settings{})
}

func TestASpareShellThatWasSavedWithTheGuestIsReplaced(t *testing.T) {
	table, _ := start(t)
	table.Configure(exec.Settings{SpareShell: true})
	before := spareReady(t, table)
	table.Renew()
	if spareReady(t, table) == before {
		t.Error("every guest of a checkpoint would have that shell")
	}
	table.Configure(exec.Settings{})
}

func TestAChangedProfileCountsForTheNextCommand(t *testing.T) {
	table, verbs := start(t)
	h := linktest.New(t, verbs)
	table.Configure(exec.Settings{SpareShell: true})
	path := "/etc/profile.d/innkeeper-agent-test.sh"
	t.Cleanup(func() { _ = os.Remove(path) })
	for _, value := range []string{"first", "second"} {
		if err := os.WriteFile(path, []byte("export INNKEEPER_TEST="+value+"\n"), 0o644); err != nil {
			t.Skip(err)
		}
		if outcome := h.Do(shell("echo $INNKEEPER_TEST")); outcome.Output != value+"\n" {
			t.Error(value, outcome)
		}
		time.Sleep(50 * time.Millisecond)
	}
	table.Configure(exec.Settings{})
}

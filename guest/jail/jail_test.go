package jail

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// The test's own program is both parts, as the agent is.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && (os.Args[1] == "jail" || os.Args[1] == inner) {
		os.Exit(Main(os.Args[1], os.Args[2:]))
	}
	os.Exit(m.Run())
}

// planned is a plan for a shell of the host's, as JSON that a test may change.
func planned(t *testing.T) map[string]any {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("namespaces need root")
	}
	root := t.TempDir()
	mounts := []any{}
	for _, name := range []string{"usr", "bin", "lib", "lib64"} {
		if _, err := os.Stat("/" + name); err == nil {
			mounts = append(mounts, map[string]any{"source": "/" + name, "target": name, "read_only": true, "programs": true})
		}
	}
	for _, name := range []string{"usr", "bin", "lib", "lib64", "old", "proc"} {
		if err := os.Mkdir(filepath.Join(root, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	// What nobody runs.
	if err := os.WriteFile(filepath.Join(root, "kernel"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	mounts = append(mounts, map[string]any{"source": os.Args[0], "target": "kernel", "read_only": true})
	return map[string]any{
		"groups": []string{filepath.Join(t.TempDir(), "procs")}, "network": "/proc/self/ns/net", "root": root, "mounts": mounts,
		"uid": 65534, "gid": 65533, "further_groups": []int{4711}, "open_files": 64, "file_bytes": 1 << 20,
	}
}

// jailed runs a line of shell by a plan, to its end: the pid that is told, and what is said to the standard error.
func jailed(t *testing.T, plan map[string]any, line string) (pid int, said string, err error) {
	t.Helper()
	content, _ := json.Marshal(plan)
	path := filepath.Join(t.TempDir(), "jail.json")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	// Orphans of the outer part are ours, so that none is left.
	const setChildSubreaper = 36
	_, _, _ = syscall.RawSyscall(syscall.SYS_PRCTL, setChildSubreaper, 1, 0)
	command := exec.Command(os.Args[0], "jail", "mark", path, "--", "/bin/sh", "-c", line)
	var output, errors strings.Builder
	command.Stdout, command.Stderr = &output, &errors
	err = command.Run() // it waits until nobody has the standard error
	if pid, _ = strconv.Atoi(strings.TrimSpace(output.String())); pid > 0 {
		_, _ = syscall.Wait4(pid, nil, 0, nil)
	}
	return pid, errors.String(), err
}

func TestTheCommandHasNoRightsAndSeesItsOwn(t *testing.T) {
	plan := planned(t)
	pid, said, err := jailed(t, plan, "exec >&2; cat /proc/self/status; echo in $PWD as $$; ls /; ls /old /proc; cat /proc/self/mountinfo; ulimit -n; ulimit -c; ulimit -f")
	if err != nil || pid <= 1 {
		t.Fatal(pid, err, said)
	}
	for _, wanted := range []string{
		"Uid:\t65534\t65534\t65534\t65534\n", "Gid:\t65533\t65533\t65533\t65533\n", "Groups:\t4711 \n", "NoNewPrivs:\t1\n",
		"CapInh:\t0000000000000000\n", "CapPrm:\t0000000000000000\n", "CapEff:\t0000000000000000\n", "CapBnd:\t0000000000000000\n",
		"CapAmb:\t0000000000000000\n", "in / as 1\n", "/old:\n\n", "/001 / ro,nosuid", " /usr ro,nosuid,nodev", " /kernel ro,nosuid,nodev,noexec", "\n64\n0\n2048\n",
	} {
		if !strings.Contains(said, wanted) {
			t.Errorf("no %q in\n%s", wanted, said)
		}
	}
	if strings.Contains(said, "meminfo") {
		t.Errorf("it sees more of /proc than itself:\n%s", said)
	}
	if joined, _ := os.ReadFile(plan["groups"].([]string)[0]); string(joined) != "0" {
		t.Errorf("joined no group: %q", joined)
	}
}

func TestTheNamespacesAreTheCommandsOwnButForANetworkThatItJoins(t *testing.T) {
	for network, kinds := range map[string][]string{"/proc/self/ns/net": {"mnt", "ipc", "uts", "pid"}, "": {"mnt", "ipc", "uts", "pid", "net"}} {
		plan := planned(t)
		plan["network"] = network
		_, said, err := jailed(t, plan, "ls -l /proc/self/ns >&2")
		if err != nil {
			t.Fatal(err, said)
		}
		for _, kind := range []string{"mnt", "ipc", "uts", "pid", "net"} {
			ours, err := os.Readlink("/proc/self/ns/" + kind)
			if err != nil || !strings.Contains(said, kind+":[") {
				t.Fatal(err, said)
			}
			if own := strings.Contains(strings.Join(kinds, " "), kind); own == strings.Contains(said, ours) {
				t.Errorf("%q: %s in\n%s", network, ours, said)
			}
		}
	}
}

func TestWhatCannotBeMadeIsToldAndNothingRuns(t *testing.T) {
	for name, spoil := range map[string]func(map[string]any){
		"no such source": func(plan map[string]any) {
			plan["mounts"] = append(plan["mounts"].([]any), map[string]any{"source": "/no/such", "target": "usr"})
		},
		"no such group":  func(plan map[string]any) { plan["groups"] = []string{"/no/such/procs"} },
		"no namespace":   func(plan map[string]any) { plan["network"] = "/dev/null" },
		"no place":       func(plan map[string]any) { _ = os.Remove(filepath.Join(plan["root"].(string), "old")) },
		"root":           func(plan map[string]any) { plan["uid"] = 0 },
		"no user":        func(plan map[string]any) { delete(plan, "uid") },
		"no limit":       func(plan map[string]any) { delete(plan, "file_bytes") },
		"a wrong number": func(plan map[string]any) { plan["gid"] = "root" },
	} {
		plan := planned(t)
		spoil(plan)
		if pid, said, err := jailed(t, plan, "echo it runs >&2"); err == nil || pid != 0 || said == "" || strings.Contains(said, "it runs\n") {
			t.Errorf("%s: pid %d, %v, %q", name, pid, err, said)
		}
	}
}

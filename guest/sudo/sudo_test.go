package sudo

import (
	"reflect"
	"sort"
	"strings"
	"syscall"
	"testing"

	"innkeeper/guest/account"
)

func TestOptions(t *testing.T) {
	for line, want := range map[string]options{
		"id -u":                       {command: []string{"id", "-u"}},
		"-u bob -n -- -x":             {user: "bob", command: []string{"-x"}},
		"-ubob id":                    {user: "bob", command: []string{"id"}},
		"-nEu #7 id":                  {user: "7", preserve: true, command: []string{"id"}},
		"--user=bob --login":          {user: "bob", login: true, command: []string{}},
		"--user bob -g wheel id":      {user: "bob", group: "wheel", command: []string{"id"}},
		"-i":                          {login: true, command: []string{}},
		"A=b C= env D=e":              {assignments: []string{"A=b", "C="}, command: []string{"env", "D=e"}},
		"--preserve-env=A,B env":      {keep: []string{"A", "B"}, command: []string{"env"}},
		"-v":                          {only: nothing, command: []string{}},
		"-k":                          {only: nothing, command: []string{}},
		"-k id":                       {command: []string{"id"}},
		"-l":                          {only: list, command: []string{}},
		"-D /tmp pwd":                 {directory: "/tmp", command: []string{"pwd"}},
		"-H -S -p prompt -s echo x=y": {shell: true, command: []string{"echo", "x=y"}},
	} {
		got, err := parse(strings.Fields(line))
		if err != nil || !reflect.DeepEqual(*got, want) {
			t.Errorf("%q: %+v %v", line, got, err)
		}
	}
	for _, line := range []string{"", "-u", "-i -s x", "-e file", "-b x", "-C 3 x", "--nosuch x", "-Z x", "--user"} {
		if _, err := parse(strings.Fields(line)); err == nil {
			t.Errorf("%q was accepted", line)
		}
	}
}

func TestEnvironment(t *testing.T) {
	caller := account.User{Name: "user", UID: 1000, GID: 1001}
	target := account.User{Name: "root", Home: "/root", Shell: "/bin/bash"}
	ours := []string{"PATH=/evil", "LD_PRELOAD=/evil.so", "TERM=vt100", "LC_ALL=C", "FOO=bar", "HOME=/home/user"}
	got := func(wanted ask) string {
		wanted.Environment = ours
		entries := environment(&wanted, caller, target, []string{"id", "-u"})
		sort.Strings(entries)
		return strings.Join(entries, "|")
	}
	const who = "SUDO_COMMAND=id -u|SUDO_GID=1001|SUDO_UID=1000|SUDO_USER=user|"
	const base = "LC_ALL=C|LOGNAME=root|MAIL=/var/mail/root|PATH=" + securePath + "|SHELL=/bin/bash|" + who + "TERM=vt100|USER=root"
	if g := got(ask{}); g != "HOME=/root|"+base {
		t.Error(g)
	}
	if g := got(ask{Preserve: true, Login: true}); g != "HOME=/root|"+base {
		t.Error("-E wins over -i:", g)
	}
	if g := got(ask{Preserve: true}); !strings.Contains(g, "FOO=bar|") || !strings.Contains(g, "PATH="+securePath) {
		t.Error(g)
	}
	if g := got(ask{Keep: []string{"HOME"}, Assignments: []string{"A=b"}}); !strings.Contains(g, "A=b|HOME=/home/user|") {
		t.Error(g)
	}
}

func TestOnlyTheConfiguredUserMay(t *testing.T) {
	s := NewServer(nil, func() string { return "nobody" })
	for _, c := range []struct {
		allowed bool
		uid     uint32
		may     bool
	}{{true, 65534, true}, {false, 65534, false}, {true, 1, false}, {false, 0, true}} {
		s.allowed = c.allowed
		if err := s.permit(&syscall.Ucred{Uid: c.uid}); (err == nil) != c.may {
			t.Error(c, err)
		}
	}
}

func TestEscape(t *testing.T) {
	if got := escape("a b;$X-_\n'"); got != `a\ b\;$X-_'`+"\n"+`'\'` {
		t.Error(got)
	}
}

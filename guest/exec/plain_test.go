package exec

import (
	"reflect"
	"testing"
)

func TestPlainWords(t *testing.T) {
	for line, words := range map[string][]string{
		"ls -la /tmp":                  {"ls", "-la", "/tmp"},
		"  /bin/true  ":                {"/bin/true"},
		"python3 -c 'print(\"a $b\")'": {"python3", "-c", `print("a $b")`},
		`git commit -m "a b" --x=y`:    {"git", "commit", "-m", "a b", "--x=y"},
		"make CC=gcc":                  {"make", "CC=gcc"},
		"printf x":                     nil,
		"true":                         nil,
		"A=b env":                      nil,
		"ls *.c":                       nil,
		"ls ~":                         nil,
		"ls; pwd":                      nil,
		"ls | wc":                      nil,
		"ls > x":                       nil,
		"ls $HOME":                     nil,
		`ls "$HOME"`:                   nil,
		"ls {a,b}":                     nil,
		"ls\npwd":                      nil,
		"ls # comment":                 nil,
		"! ls":                         nil,
		"ls 'open":                     nil,
		"'ls' x":                       nil,
		"ls a\\ b":                     nil,
		"ls &":                         nil,
		"sleep 1 &":                    nil,
		"":                             nil,
		"%1":                           nil,
		"ls $'a'":                      nil,
		"ls é":                         nil,
	} {
		if got := plainWords(line); !reflect.DeepEqual(got, words) {
			t.Errorf("%q: %q", line, got)
		}
	}
}

func TestJournalForgetsTheOldest(t *testing.T) {
	var j journal
	j.append(2, []byte("abc"))
	j.append(2, []byte("def"))
	j.append(3, []byte("ghi"))
	if kind, data := j.at(1); kind != 2 || string(data) != "bcdef" {
		t.Error(kind, string(data))
	}
	j.drop(4)
	if kind, data := j.at(4); j.start != 4 || kind != 2 || string(data) != "ef" {
		t.Error(kind, string(data))
	}
	if kind, data := j.at(7); kind != 3 || string(data) != "hi" {
		t.Error(kind, string(data))
	}
	j.drop(5)
	if j.size() != 0 || len(j.chunks) != 0 {
		t.Error(j)
	}
	j.append(2, []byte("x"))
	if _, data := j.at(9); string(data) != "x" {
		t.Error(string(data))
	}
}

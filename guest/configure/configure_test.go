package configure

import (
	"os"
	"syscall"
	"testing"
	"time"
)

func TestTheClockIsSetWhereItIsSurelyWrong(t *testing.T) {
	told := time.Unix(1_700_000_000, 0)
	for ahead, wanted := range map[time.Duration]bool{
		-time.Hour:        true,
		-time.Millisecond: true,
		0:                 false,
		time.Second:       false, // what was told took a second to come
		3 * time.Second:   true,
		time.Hour:         true,
	} {
		if isBetter(told, told.Add(ahead)) != wanted {
			t.Errorf("a clock that is ahead by %v", ahead)
		}
	}
}

func inode(t *testing.T, path string) uint64 {
	t.Helper()
	var status syscall.Stat_t
	if err := syscall.Lstat(path, &status); err != nil {
		t.Fatal(err)
	}
	return status.Ino
}

func TestOverwriteKeepsTheFileAndReplaceDoesNot(t *testing.T) {
	path := t.TempDir() + "/hosts"
	for _, content := range []string{"a long first content\n", "short\n"} {
		if err := overwrite(path, content); err != nil {
			t.Fatal(err)
		}
	}
	before := inode(t, path)
	if err := overwrite(path, "third\n"); err != nil || inode(t, path) != before {
		t.Error("not in place", err)
	}
	keep, err := os.Open(path) // so that its inode is not given away again
	if err != nil {
		t.Fatal(err)
	}
	defer keep.Close()
	if err := replace(path, "fourth\n"); err != nil || inode(t, path) == before {
		t.Error("in place", err)
	}
	if content, _ := os.ReadFile(path); string(content) != "fourth\n" {
		t.Errorf("%q", content)
	}
}

func TestTheSameContentIsNotWrittenAgain(t *testing.T) {
	path := t.TempDir() + "/machine-id"
	if err := replace(path, "x\n"); err != nil {
		t.Fatal(err)
	}
	before := inode(t, path)
	if err := replace(path, "x\n"); err != nil || inode(t, path) != before {
		t.Error("a change that the next command would be blamed for", err)
	}
}

func TestALinkToNothingBecomesAFile(t *testing.T) {
	path := t.TempDir() + "/resolv.conf"
	if err := os.Symlink("/run/nosuch/resolv.conf", path); err != nil {
		t.Fatal(err)
	}
	if err := overwrite(path, "nameserver 10.0.0.1\n"); err != nil {
		t.Fatal(err)
	}
	if content, _ := os.ReadFile(path); string(content) != "nameserver 10.0.0.1\n" {
		t.Errorf("%q", content)
	}
}

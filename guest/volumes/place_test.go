package volumes

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestPathsThatAreNone(t *testing.T) {
	for _, path := range []string{
		"", "/", "data", "./data", "/data/", "//data", "/a//b", "/a/./b", "/a/../b", "/..", "/a\x00b", "/" + strings.Repeat("x", pathLimit),
		"/proc", "/proc/1", "/sys/x", "/dev", "/dev/shm/x", "/run/x", "/.innkeeper", "/.innkeeper/volumes/x",
	} {
		if check(path) == nil {
			t.Errorf("%q was taken", path)
		}
	}
	for _, path := range []string{"/data", "/srv/data", "/process", "/a b/ü", "/home/user/..data", "/var/run/x"} {
		if err := check(path); err != nil {
			t.Errorf("%q was refused: %v", path, err)
		}
	}
}

func TestNoPartAboveMayLeadElsewhere(t *testing.T) {
	root, outside := t.TempDir(), t.TempDir()
	if err := os.Symlink(outside, filepath.Join(root, "link")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, part := range []string{"link", "file"} {
		if at, err := placeOf(filepath.Join(root, part, "deep", "data"), true); err == nil {
			at.close()
			t.Errorf("%s was gone through", part)
		}
	}
	if entries, _ := os.ReadDir(outside); len(entries) != 0 {
		t.Errorf("%v was made outside", entries)
	}
	at, err := placeOf(filepath.Join(root, "deep", "er", "data"), true)
	if err != nil {
		t.Fatal(err)
	}
	defer at.close()
	// Whatever the path leads to from now on.
	if err := os.Rename(filepath.Join(root, "deep"), filepath.Join(root, "moved")); err != nil {
		t.Fatal(err)
	}
	if err := at.makeLink("/.innkeeper/volumes/x"); err != nil {
		t.Fatal(err)
	}
	if target, err := os.Readlink(filepath.Join(root, "moved", "er", "data")); err != nil || target != at.target() {
		t.Errorf("the link is %q, %v", target, err)
	}
	if _, err := placeOf(filepath.Join(root, "missing", "data"), false); err == nil {
		t.Error("what is missing was made")
	}
}

func TestOnlyAnEmptyDirectoryGivesWay(t *testing.T) {
	root := t.TempDir()
	for name, isEmpty := range map[string]bool{"empty": true, "full": false, "file": false, "link": false} {
		path := filepath.Join(root, name)
		switch name {
		case "empty":
			_ = os.Mkdir(path, 0o750)
		case "full":
			_ = os.MkdirAll(filepath.Join(path, "below"), 0o755)
		case "file":
			_ = os.WriteFile(path, nil, 0o600)
		case "link":
			_ = os.Symlink("empty", path)
		}
		at, err := placeOf(path, false)
		if err != nil {
			t.Fatal(err)
		}
		status, err := at.emptyDirectory()
		at.close()
		if (err == nil) != isEmpty || isEmpty && status.Mode&0o777 != 0o750 {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestUsersAreNamed(t *testing.T) {
	folder := t.TempDir()
	if found := users(folder); found != "" {
		t.Errorf("%s uses an empty folder", found)
	}
	sleeper := &os.ProcAttr{Dir: folder, Files: []*os.File{nil, nil, nil}}
	process, err := os.StartProcess("/bin/sleep", []string{"sleep", "1000"}, sleeper)
	if err != nil {
		t.Skip(err)
	}
	defer func() { _ = process.Kill(); _, _ = process.Wait() }()
	if found := users(folder); !strings.Contains(found, "(") {
		t.Errorf("nobody is named: %q", found)
	}
	if found := users(folder + "/more"); found != "" {
		t.Errorf("%s uses another folder", found)
	}
}

func TestMountsOfADevice(t *testing.T) {
	if paths := mountsOf(""); paths != nil {
		t.Errorf("no device is mounted at %v", paths)
	}
	content, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Skip(err)
	}
	fields := strings.Fields(string(content))
	found := false
	for _, path := range mountsOf(fields[2]) {
		found = found || path == unescape.Replace(fields[4])
	}
	if !found {
		t.Errorf("%s is not mounted at %s", fields[2], fields[4])
	}
}

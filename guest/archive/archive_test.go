package archive_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strings"
	"syscall"
	"testing"
	"time"

	"innkeeper/guest/archive"
	"innkeeper/guest/link"
	"innkeeper/guest/linktest"
	"innkeeper/guest/reaper"
)

var children = reaper.New()

func start(t *testing.T) *linktest.Host {
	return linktest.New(t, map[string]link.Handler{
		"pack": archive.Pack, "unpack": archive.NewUnpacker(children).Unpack,
	})
}

func put(t *testing.T, path, content string, mode os.FileMode) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), mode); err != nil {
		t.Fatal(err)
	}
	_ = os.Chmod(path, mode)
}

// tree describes what lies below a folder: mode, owner where it is not root, content or target.
func tree(t *testing.T, folder string) string {
	t.Helper()
	var lines []string
	err := filepath.Walk(folder, func(path string, information os.FileInfo, err error) error {
		if err != nil || path == folder {
			return err
		}
		line := fmt.Sprintf("%s %s", strings.TrimPrefix(path, folder+"/"), information.Mode())
		if status := information.Sys().(*syscall.Stat_t); status.Uid != 0 || status.Gid != 0 {
			line += fmt.Sprintf(" %d:%d", status.Uid, status.Gid)
		}
		switch {
		case information.Mode().IsRegular():
			content, _ := os.ReadFile(path)
			line += fmt.Sprintf(" %q", content)
		case information.Mode()&os.ModeSymlink != 0:
			target, _ := os.Readlink(path)
			line += " -> " + target
		}
		lines = append(lines, line)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	sort.Strings(lines)
	return strings.Join(lines, "\n")
}

func unpack(h *linktest.Host, fields, content string) linktest.Outcome {
	call := h.Open(`"verb":"unpack",` + fields)
	for len(content) > 0 {
		piece := content
		if len(piece) > 100_000 {
			piece = piece[:100_000]
		}
		call.Send(link.Data, piece)
		content = content[len(piece):]
	}
	call.Send(link.End, "")
	return call.Finish()
}

type member struct {
	name, body string
	kind       byte
	mode       int64
	target     string
	uid        int
}

func tarOf(t *testing.T, members ...member) string {
	t.Helper()
	var buffer bytes.Buffer
	writer := tar.NewWriter(&buffer)
	for _, m := range members {
		header := &tar.Header{
			Name: m.name, Typeflag: m.kind, Mode: m.mode, Linkname: m.target, Uid: m.uid, Gid: m.uid,
			Size: int64(len(m.body)), ModTime: time.Unix(1_600_000_000, 0),
		}
		if m.kind == 0 {
			header.Typeflag = tar.TypeReg
		}
		if m.mode == 0 {
			header.Mode = 0o644
		}
		if err := writer.WriteHeader(header); err != nil {
			t.Fatal(err)
		}
		_, _ = writer.Write([]byte(m.body))
	}
	_ = writer.Close()
	return buffer.String()
}

func TestPackedTreesUnpackTheSame(t *testing.T) {
	h, from, to := start(t), t.TempDir(), t.TempDir()
	put(t, from+"/a/file", strings.Repeat("x", 700_000), 0o640)
	put(t, from+"/a/deep/set", "s", 0o755|os.ModeSetuid)
	put(t, from+"/a/\xff\n", "odd name", 0o600)
	_ = os.Symlink("nowhere", from+"/a/link")
	_ = os.Mkdir(from+"/a/empty", 0o700)
	_ = os.Chown(from+"/a/file", 7, 8)
	_ = syscall.Mkfifo(from+"/a/fifo", 0o666)
	packed := h.Do(fmt.Sprintf(`"verb":"pack","sources":["%s/a"]`, from))
	if packed.Code != "" || packed.Message("single")["single"] != false {
		t.Fatal(packed.Code, packed.Messages)
	}
	if outcome := unpack(h, fmt.Sprintf(`"destination":"%s","owners":true`, to), packed.Output); outcome.Code != "" {
		t.Fatal(outcome.Code)
	}
	_ = os.Remove(from + "/a/fifo")
	if want, got := tree(t, from+"/a"), tree(t, to); want != got {
		t.Errorf("unpacked\n%s\nnot\n%s", got, want)
	}
}

func TestPackTakesPatternsAndFollowsNamedLinks(t *testing.T) {
	h, from := start(t), t.TempDir()
	put(t, from+"/one.txt", "1", 0o644)
	put(t, from+"/two.txt", "2", 0o644)
	_ = os.Symlink("one.txt", from+"/named")
	outcome := h.Do(fmt.Sprintf(`"verb":"pack","sources":["%s/*.txt"]`, from))
	if names := namesIn(t, outcome.Output); names != "one.txt two.txt" {
		t.Error(names)
	}
	outcome = h.Do(fmt.Sprintf(`"verb":"pack","sources":["%s/named"]`, from))
	if names := namesIn(t, outcome.Output); names != "named" || outcome.Message("single")["single"] != true || outcome.Result["bytes"] != 1.0 {
		t.Error(names, outcome.Messages, outcome.Result)
	}
	for _, missing := range []string{"missing", "*.md", "dangling"} {
		_ = os.Symlink("nowhere", from+"/dangling")
		if outcome := h.Do(fmt.Sprintf(`"verb":"pack","sources":["%s/%s"]`, from, missing)); outcome.Code != "not_found" {
			t.Error(missing, outcome.Code)
		}
	}
}

func namesIn(t *testing.T, content string) string {
	t.Helper()
	var names []string
	reader := tar.NewReader(strings.NewReader(content))
	for {
		header, err := reader.Next()
		if err != nil {
			return strings.Join(names, " ")
		}
		names = append(names, header.Name)
	}
}

func TestUnpackPlaces(t *testing.T) {
	h := start(t)
	single := tarOf(t, member{name: "f", body: "new", mode: 0o600, uid: 5})
	cases := []struct{ name, fields, before, want string }{
		{"into", `"destination":"%s/d/e"`, "", "d drwxr-xr-x\nd/e drwxr-xr-x\nd/e/f -rw------- \"new\""},
		{"as a file", `"destination":"%s/d/e","as_file":true`, "", "d drwxr-xr-x\nd/e -rw------- \"new\""},
		{"over a file", `"destination":"%s/old","as_file":true`, "old", "old -rw------- \"new\""},
		{"into a directory", `"destination":"%s/dir","as_file":true`, "dir/", "dir drwxr-xr-x\ndir/f -rw------- \"new\""},
		{"owner", `"destination":"%s/n","as_file":true,"chown":"3:4"`, "", "n -rw------- 3:4 \"new\""},
		{"mode", `"destination":"%s/n","as_file":true,"mode":493`, "", "n -rwxr-xr-x \"new\""},
		{"owners", `"destination":"%s/n","as_file":true,"owners":true`, "", "n -rw------- 5:5 \"new\""},
	}
	for _, c := range cases {
		folder := t.TempDir()
		if strings.HasSuffix(c.before, "/") {
			_ = os.Mkdir(folder+"/"+c.before, 0o755)
		} else if c.before != "" {
			put(t, folder+"/"+c.before, "old", 0o644)
		}
		outcome := unpack(h, fmt.Sprintf(c.fields, folder), single)
		if got := tree(t, folder); got != c.want || outcome.Code != "" {
			t.Errorf("%s: %s %s", c.name, got, outcome.Code)
		}
	}
}

func TestUnpackKeepsTimesAndExistingDirectories(t *testing.T) {
	h, folder := start(t), t.TempDir()
	_ = os.Mkdir(folder+"/d", 0o700)
	content := tarOf(t, member{name: "d", kind: tar.TypeDir, mode: 0o777}, member{name: "d/f", body: "x"},
		member{name: "d/l", kind: tar.TypeLink, target: "d/f"}, member{name: "fifo", kind: tar.TypeFifo},
		member{name: "dev", kind: tar.TypeChar})
	outcome := unpack(h, fmt.Sprintf(`"destination":"%s"`, folder), content)
	if got := tree(t, folder); got != "d drwx------\nd/f -rw-r--r-- \"x\"\nd/l -rw-r--r-- \"x\"" || outcome.Result["skipped"] != 2.0 {
		t.Error(got, outcome)
	}
	information, _ := os.Stat(folder + "/d/f")
	if information.ModTime().Unix() != 1_600_000_000 {
		t.Error(information.ModTime())
	}
	// An archive of the user's says how its directories are.
	outcome = unpack(h, fmt.Sprintf(`"destination":"%s","archive":true,"owners":true`, folder), content)
	if information, _ := os.Stat(folder + "/d"); information.Mode().Perm() != 0o777 || information.ModTime().Unix() != 1_600_000_000 {
		t.Error(information.Mode(), information.ModTime(), outcome)
	}
}

func TestUnpackRefuses(t *testing.T) {
	h, folder := start(t), t.TempDir()
	_ = os.Mkdir(folder+"/taken", 0o755)
	put(t, folder+"/file", "x", 0o644)
	whole := tarOf(t, member{name: "f", body: strings.Repeat("x", 5_000)})
	cases := []struct{ name, fields, content, code string }{
		{"a step up", "", tarOf(t, member{name: "../x", body: "x"}), "bad_request"},
		{"a step up within", "", tarOf(t, member{name: "a/../../x", body: "x"}), "bad_request"},
		{"a file over a directory", "", tarOf(t, member{name: "taken", body: "x"}), "is_a_directory"},
		{"a directory over a file", "", tarOf(t, member{name: "file", kind: tar.TypeDir}), "not_a_directory"},
		{"below a file", "", tarOf(t, member{name: "file/x", body: "x"}), "not_a_directory"},
		{"cut off", "", whole[:2_000], "bad_request"},
		{"no tar", "", strings.Repeat("garbage", 1_000), "bad_request"},
		{"no gzip", `,"archive":true`, "\x1f\x8b" + strings.Repeat("x", 2_000), "bad_request"},
		{"an unknown owner", `,"chown":"nobody-at-all"`, whole, "not_found"},
	}
	for _, c := range cases {
		if outcome := unpack(h, fmt.Sprintf(`"destination":"%s"%s`, folder, c.fields), c.content); outcome.Code != c.code {
			t.Errorf("%s: %q", c.name, outcome.Code)
		}
	}
	if outcome := unpack(h, `"destination":"relative"`, whole); outcome.Code != "bad_request" {
		t.Error(outcome.Code)
	}
	if _, err := os.Stat(filepath.Dir(folder) + "/x"); err == nil {
		t.Error("a file came out of the destination")
	}
}

func TestUnpackDecompresses(t *testing.T) {
	plain := tarOf(t, member{name: "f", body: strings.Repeat("hello", 50_000)})
	var zipped bytes.Buffer
	writer := gzip.NewWriter(&zipped)
	_, _ = writer.Write([]byte(plain))
	_ = writer.Close()
	forms := map[string]string{"plain": plain, "gzip": zipped.String()}
	for _, program := range []string{"bzip2", "xz"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Log("skipped: there is no", program)
			continue
		}
		// Not os/exec's own Wait: the reaper of this test would take its child.
		folder := t.TempDir()
		put(t, folder+"/a", plain, 0o644)
		path, _ := exec.LookPath(program)
		child, err := children.Start(path, []string{program, folder + "/a"}, &syscall.ProcAttr{Files: []uintptr{0, 1, 2}})
		if err != nil {
			t.Fatal(err)
		}
		<-child.Done
		entries, _ := os.ReadDir(folder)
		content, _ := os.ReadFile(folder + "/" + entries[0].Name())
		forms[program] = string(content)
	}
	h := start(t)
	for name, content := range forms {
		folder := t.TempDir()
		outcome := unpack(h, fmt.Sprintf(`"destination":"%s","archive":true`, folder), content)
		if got, _ := os.ReadFile(folder + "/f"); len(got) != 250_000 || outcome.Code != "" {
			t.Error(name, len(got), outcome)
		}
		// Cut in the middle it is an error, and no process is left that waits for the rest.
		if outcome := unpack(h, fmt.Sprintf(`"destination":"%s","archive":true`, folder), content[:len(content)/2]); outcome.Code == "" {
			t.Error(name, "half an archive was taken")
		}
	}
}

func TestCancelEndsBoth(t *testing.T) {
	folder, ended := t.TempDir(), make(chan bool, 3)
	tells := func(verb link.Handler) link.Handler {
		return func(stream *link.Stream, request link.Request) {
			defer func() { ended <- true }()
			verb(stream, request)
		}
	}
	h := linktest.New(t, map[string]link.Handler{
		"pack": tells(archive.Pack), "unpack": tells(archive.NewUnpacker(children).Unpack),
	})
	put(t, folder+"/big", strings.Repeat("x", 8<<20), 0o644)
	call := h.Open(fmt.Sprintf(`"verb":"pack","sources":["%s"]`, folder))
	call.Next()
	call.Send(link.Cancel, "")
	call = h.Open(fmt.Sprintf(`"verb":"unpack","destination":"%s/to"`, folder))
	call.Send(link.Data, tarOf(t, member{name: "f", body: "x"})[:700])
	call.Send(link.Cancel, "")
	// The link still serves.
	if outcome := h.Do(`"verb":"pack","sources":["/etc/passwd"]`); outcome.Code != "" {
		t.Error(outcome.Code)
	}
	for i := 0; i < 3; i++ {
		select {
		case <-ended:
		case <-time.After(30 * time.Second):
			t.Fatal("a call that was ended goes on")
		}
	}
}

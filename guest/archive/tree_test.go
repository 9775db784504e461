package archive_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"innkeeper/guest/archive"
	"innkeeper/guest/files"
	"innkeeper/guest/link"
	"innkeeper/guest/linktest"
)

func startTrees(t *testing.T, user string) *linktest.Host {
	trees := archive.NewTrees(children, files.New(func() string { return user }))
	return linktest.New(t, map[string]link.Handler{"pack_tree": trees.Pack, "unpack_tree": trees.Unpack})
}

// open is a folder that any user may change.
func open(t *testing.T) string {
	t.Helper()
	folder, err := os.MkdirTemp("/tmp", "inn-trees-")
	if err != nil {
		t.Fatal(err)
	}
	_ = os.Chmod(folder, 0o777)
	t.Cleanup(func() { _ = os.RemoveAll(folder) })
	return folder
}

func unpackTree(h *linktest.Host, destination, content string) linktest.Outcome {
	call := h.Open(fmt.Sprintf(`"verb":"unpack_tree","path":"%s"`, destination))
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

func TestAUsersTreeGoesOutAndComesBack(t *testing.T) {
	h, from, to := startTrees(t, "nobody"), open(t), open(t)
	put(t, from+"/a/file", strings.Repeat("x", 700_000), 0o640)
	put(t, from+"/a/closed/inner", "s", 0o644)
	put(t, from+"/a/\xff\n", "odd name", 0o600)
	_ = os.Symlink("nowhere", from+"/a/link")
	for _, path := range []string{"/a", "/a/file", "/a/closed", "/a/closed/inner", "/a/\xff\n", "/a/link"} {
		_ = os.Lchown(from+path, 65534, 65534)
	}
	_ = os.Chmod(from+"/a/closed", 0o555)
	packed := h.Do(fmt.Sprintf(`"verb":"pack_tree","path":"%s/a"`, from))
	if packed.Code != "" {
		t.Fatal(packed.Code)
	}
	for _, destination := range []string{to, to + "/new/deep"} {
		if outcome := unpackTree(h, destination, packed.Output); outcome.Code != "" {
			t.Fatal(outcome.Code)
		}
	}
	if want, got := tree(t, from+"/a"), tree(t, to+"/new/deep"); want != got {
		t.Errorf("unpacked\n%s\nnot\n%s", got, want)
	}
	_ = os.Chmod(from+"/a/file", 0o600)
	_ = os.Chown(from+"/a/file", 0, 0)
	if outcome := h.Do(fmt.Sprintf(`"verb":"pack_tree","path":"%s/a"`, from)); outcome.Code != "permission_denied" {
		t.Error("what the user may not read was sent:", outcome.Code)
	}
}

func TestATreeIsMergedIntoWhatIsThere(t *testing.T) {
	h, to := startTrees(t, "root"), open(t)
	put(t, to+"/kept/old", "old", 0o644)
	put(t, to+"/kept/both", "old", 0o644)
	_ = os.Chmod(to+"/kept", 0o751)
	content := tarOf(t, member{name: "./", kind: tar.TypeDir, mode: 0o700}, member{name: "kept", kind: tar.TypeDir, mode: 0o700},
		member{name: "kept/both", body: "new", mode: 0o4755, uid: 7}, member{name: "made/x", body: "x"},
		member{name: "kept/hard", kind: tar.TypeLink, target: "kept/both"}, member{name: "null", kind: tar.TypeChar})
	outcome := unpackTree(h, to, content)
	if got := tree(t, to); outcome.Result["skipped"] != 1.0 || got != "kept drwxr-x--x\nkept/both -rwxr-xr-x \"new\"\n"+
		"kept/hard -rwxr-xr-x \"new\"\nkept/old -rw-r--r-- \"old\"\nmade drwxr-xr-x\nmade/x -rw-r--r-- \"x\"" {
		t.Error(outcome, got)
	}
	information, _ := os.Stat(to)
	if information.Mode().Perm() != 0o777 {
		t.Error("the destination's own mode changed:", information.Mode())
	}
}

// Whatever is wrong with an archive, nothing of it is left, and what was there stays as it was.
func TestAHostileTreeLeavesNothing(t *testing.T) {
	h, outside := startTrees(t, "root"), open(t)
	put(t, outside+"/victim", "untouched", 0o644)
	fine := member{name: "fine", body: strings.Repeat("x", 5_000)}
	whole := tarOf(t, fine, member{name: "more", body: strings.Repeat("x", 5_000)})
	var zipped bytes.Buffer
	writer := gzip.NewWriter(&zipped)
	_, _ = writer.Write([]byte(whole))
	_ = writer.Close()
	cases := map[string]struct{ content, code string }{
		"a step up":                     {tarOf(t, fine, member{name: "../victim", body: "x"}), "bad_request"},
		"a step up within":              {tarOf(t, fine, member{name: "a/../../victim", body: "x"}), "bad_request"},
		"through a symlink":             {tarOf(t, member{name: "d", kind: tar.TypeSymlink, target: outside}, member{name: "d/victim", body: "x"}), "bad_request"},
		"a directory over a symlink":    {tarOf(t, member{name: "d", kind: tar.TypeSymlink, target: outside}, member{name: "d", kind: tar.TypeDir, mode: 0o777}, member{name: "d/victim", body: "x"}), "not_a_directory"},
		"through two symlinks":          {tarOf(t, member{name: "a/d", kind: tar.TypeSymlink, target: ".."}, member{name: "a/d/e", kind: tar.TypeSymlink, target: outside}, member{name: "e/victim", body: "x"}), "bad_request"},
		"a hard link through a symlink": {tarOf(t, member{name: "d", kind: tar.TypeSymlink, target: outside}, member{name: "h", kind: tar.TypeLink, target: "d/victim"}), "bad_request"},
		"a hard link out":               {tarOf(t, fine, member{name: "h", kind: tar.TypeLink, target: outside + "/victim"}), "not_found"},
		"a file over a directory":       {tarOf(t, fine, member{name: "taken", body: "x"}), "is_a_directory"},
		"a directory over a file":       {tarOf(t, fine, member{name: "file/x", body: "x"}), "not_a_directory"},
		"cut off":                       {whole[:6_000], "bad_request"},
		"cut off in gzip":               {zipped.String()[:zipped.Len()-12], "bad_request"},
		"no tar":                        {strings.Repeat("garbage", 1_000), "bad_request"},
		"a zip":                         {"PK\x03\x04" + strings.Repeat("x", 1_000), "bad_request"},
		"a long name":                   {tarOf(t, fine, member{name: strings.Repeat("n", 300), body: "x"}), "bad_request"},
	}
	for name, c := range cases {
		to := open(t)
		put(t, to+"/file", "old", 0o644)
		put(t, to+"/fine", "old", 0o644)
		_ = os.Mkdir(to+"/taken", 0o755)
		before := tree(t, to)
		if outcome := unpackTree(h, to, c.content); outcome.Code != c.code {
			t.Errorf("%s: %q", name, outcome.Code)
		}
		if after := tree(t, to); after != before {
			t.Errorf("%s left\n%s", name, after)
		}
		if outcome := unpackTree(h, to+"/not/yet", c.content); outcome.Code == "" && !strings.Contains(name, "over") {
			t.Error(name, "was taken")
		}
		if content, _ := os.ReadFile(outside + "/victim"); string(content) != "untouched" {
			t.Fatal(name, "came out")
		}
		_ = os.RemoveAll(to + "/not")
		if after := tree(t, to); after != before {
			t.Errorf("%s left\n%s", name, after)
		}
	}
}

func TestATreeIsTheUsers(t *testing.T) {
	h, to := startTrees(t, "nobody"), open(t)
	content := tarOf(t, member{name: "d", kind: tar.TypeDir, mode: 0o500}, member{name: "d/f", body: "x", uid: 0})
	if outcome := unpackTree(h, to+"/own", content); outcome.Code != "" {
		t.Error(outcome)
	}
	if got := tree(t, to); got != "own drwxr-xr-x 65534:65534\nown/d dr-x------ 65534:65534\nown/d/f -rw-r--r-- 65534:65534 \"x\"" {
		t.Error(got)
	}
	_ = os.Mkdir(to+"/closed", 0o755)
	_ = os.Mkdir(to+"/shared", 0o777)
	_ = os.Chmod(to+"/shared", 0o777)
	_ = os.Mkdir(to+"/shared/d", 0o755) // root's
	for _, destination := range []string{"/closed", "/closed/new", "/shared"} {
		if outcome := unpackTree(h, to+destination, content); outcome.Code != "permission_denied" {
			t.Error(destination, outcome)
		}
	}
	if found, _ := filepath.Glob(to + "/*/.inn-*"); len(found) > 0 {
		t.Error("left behind:", found)
	}
}

func TestATreeThatNobodySendsToItsEndLeavesNothing(t *testing.T) {
	for _, broken := range []bool{false, true} {
		h, to := startTrees(t, "root"), open(t)
		call := h.Open(fmt.Sprintf(`"verb":"unpack_tree","path":"%s"`, to))
		call.Send(link.Data, tarOf(t, member{name: "f", body: "x"})[:1_024])
		await(t, func() bool { found, _ := filepath.Glob(to + "/.inn-*/f"); return len(found) == 1 })
		if broken {
			h.Break()
		} else {
			call.Send(link.Cancel, "")
		}
		await(t, func() bool { entries, _ := os.ReadDir(to); return len(entries) == 0 })
	}
}

func await(t *testing.T, condition func() bool) {
	t.Helper()
	for begun := time.Now(); !condition(); time.Sleep(time.Millisecond) {
		if time.Since(begun) > 10*time.Second {
			t.Fatal("it did not happen")
		}
	}
}

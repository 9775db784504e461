package files_test

import (
	"encoding/base64"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"innkeeper/guest/files"
	"innkeeper/guest/link"
	"innkeeper/guest/linktest"
)

func start(t *testing.T, user string) *linktest.Host {
	store := files.New(func() string { return user })
	return linktest.New(t, map[string]link.Handler{
		"stat": store.Stat, "list": store.List, "read": store.Read, "write": store.Write,
		"mkdir": store.Mkdir, "rename": store.Rename, "remove": store.Remove, "mime": store.Mime,
	})
}

// folder is one that any user may search: t.TempDir alone is root's.
func folder(t *testing.T) string {
	path, err := os.MkdirTemp("/tmp", "inn-files-")
	if err != nil {
		t.Fatal(err)
	}
	_ = os.Chmod(path, 0o777)
	t.Cleanup(func() { _ = os.RemoveAll(path) })
	return path
}

func put(t *testing.T, path, content string, mode os.FileMode) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), mode); err != nil {
		t.Fatal(err)
	}
	_ = os.Chmod(path, mode)
}

func write(h *linktest.Host, fields, content string) linktest.Outcome {
	call := h.Open(`"verb":"write",` + fields)
	call.Send(link.Data, content)
	call.Send(link.End, "")
	return call.Finish()
}

func TestRead(t *testing.T) {
	h, dir := start(t, "root"), folder(t)
	big := strings.Repeat("0123456789abcdef", 200_000)
	put(t, dir+"/big", big, 0o644)
	put(t, dir+"/empty", "", 0o644)
	cases := []struct{ name, extra, want string }{
		{"big", "", big},
		{"big", `,"offset":1000000,"length":500000`, big[1000000:1500000]},
		{"big", `,"offset":3199990`, big[3199990:]},
		{"big", `,"offset":99999999`, ""},
		{"big", `,"length":0`, ""},
		{"empty", "", ""},
	}
	for _, c := range cases {
		outcome := h.Do(fmt.Sprintf(`"verb":"read","path":"%s/%s"%s`, dir, c.name, c.extra))
		if outcome.Output != c.want || outcome.Result["bytes"] != float64(len(c.want)) {
			t.Error(c.name, c.extra, len(outcome.Output), outcome.Result, outcome.Code)
		}
	}
	// A file whose size is said to be 0.
	if outcome := h.Do(`"verb":"read","path":"/proc/self/status"`); !strings.Contains(outcome.Output, "Pid:") {
		t.Error(outcome)
	}
}

func TestReadRefuses(t *testing.T) {
	h, dir := start(t, "root"), folder(t)
	if err := syscall.Mkfifo(dir+"/fifo", 0o666); err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("unix", dir+"/socket")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	_ = os.Symlink("/proc/self/status", dir+"/escape")
	_ = os.Symlink("/proc", dir+"/folder")
	put(t, dir+"/file", "x", 0o644)
	for request, code := range map[string]string{
		`"path":"` + dir + `"`:                                  "is_a_directory",
		`"path":"` + dir + `/fifo"`:                             "not_a_regular_file",
		`"path":"` + dir + `/socket"`:                           "not_a_regular_file",
		`"path":"/dev/zero"`:                                    "not_a_regular_file",
		`"path":"` + dir + `/none"`:                             "not_found",
		`"path":"` + dir + `/file/x"`:                           "not_a_directory",
		`"path":"relative"`:                                     "bad_request",
		`"path":"/a\u0000b"`:                                    "bad_request",
		`"path":"` + dir + `/file","offset":-1`:                 "bad_request",
		`"path":"/proc/self/status","public":true`:              "permission_denied",
		`"path":"/tmp/../proc/self/status","public":true`:       "permission_denied",
		`"path":"` + dir + `/escape","public":true`:             "permission_denied",
		`"path":"` + dir + `/folder/self/status","public":true`: "permission_denied",
	} {
		if outcome := h.Do(`"verb":"read",` + request); outcome.Code != code {
			t.Errorf("%s: %+v", request, outcome)
		}
	}
	if outcome := h.Do(`"verb":"read","public":true,"path":"` + dir + `/file"`); outcome.Output != "x" {
		t.Error(outcome)
	}
}

func TestWrite(t *testing.T) {
	h, dir := start(t, "root"), folder(t)
	outcome := write(h, fmt.Sprintf(`"path":"%s/a/b/c","mode":420`, dir), "hello")
	if outcome.Result["created"] != true || outcome.Result["bytes"] != 5.0 {
		t.Error(outcome)
	}
	put(t, dir+"/kept", "old", 0o750)
	_ = os.Chown(dir+"/kept", 1234, 1235)
	_ = os.Symlink("kept", dir+"/link")
	if outcome := write(h, fmt.Sprintf(`"path":"%s/link"`, dir), "new"); outcome.Result["created"] != false {
		t.Error(outcome)
	}
	var status syscall.Stat_t
	_ = syscall.Lstat(dir+"/kept", &status)
	content, _ := os.ReadFile(dir + "/kept")
	if string(content) != "new" || status.Mode&0o7777 != 0o750 || status.Uid != 1234 || status.Gid != 1235 {
		t.Errorf("%q %o %d %d", content, status.Mode, status.Uid, status.Gid)
	}
	if target, _ := os.Readlink(dir + "/link"); target != "kept" {
		t.Error("the link was replaced")
	}
	for fields, code := range map[string]string{
		fmt.Sprintf(`"path":"%s"`, dir):                         "is_a_directory",
		fmt.Sprintf(`"path":"%s/x/"`, dir):                      "is_a_directory",
		fmt.Sprintf(`"path":"%s/none/x","parents":false`, dir):  "not_found",
		fmt.Sprintf(`"path":"%s/kept/x"`, dir):                  "not_a_directory",
		fmt.Sprintf(`"path":"%s/short","size":7`, dir):          "bad_request",
		`"path":"/dev/null"`:                                    "not_a_regular_file",
		fmt.Sprintf(`"path":"%s/x","user":"nosuch"`, dir):       "not_found",
		fmt.Sprintf(`"path":"x","path_b64":"%s"`, "not base64"): "bad_request",
	} {
		if outcome := write(h, fields, "hello"); outcome.Code != code {
			t.Errorf("%s: %+v", fields, outcome)
		}
	}
	leftovers(t, dir)
}

func leftovers(t *testing.T, dir string) {
	t.Helper()
	if found, _ := filepath.Glob(dir + "/.inn-*"); len(found) > 0 {
		t.Error("left behind:", found)
	}
}

func TestAnUnfinishedWriteLeavesNothing(t *testing.T) {
	dir := folder(t)
	for _, broken := range []bool{false, true} {
		h := start(t, "root")
		call := h.Open(fmt.Sprintf(`"verb":"write","path":"%s/partial"`, dir))
		call.Send(link.Data, "some")
		time.Sleep(50 * time.Millisecond)
		if found, _ := filepath.Glob(dir + "/.inn-*"); len(found) != 1 {
			t.Error("nothing was begun")
		}
		if broken {
			h.Break()
		} else {
			call.Send(link.Cancel, "")
		}
		time.Sleep(50 * time.Millisecond)
		leftovers(t, dir)
		if _, err := os.Stat(dir + "/partial"); err == nil {
			t.Error("half a file")
		}
	}
}

func TestPermissionsAreTheUsers(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	h, dir := start(t, "nobody"), folder(t)
	put(t, dir+"/secret", "x", 0o600)
	put(t, dir+"/public", "y", 0o644)
	_ = os.Mkdir(dir+"/closed", 0o700)
	for request, code := range map[string]string{
		fmt.Sprintf(`"verb":"read","path":"%s/secret"`, dir):                   "permission_denied",
		fmt.Sprintf(`"verb":"read","path":"%s/secret","user":"root"`, dir):     "",
		fmt.Sprintf(`"verb":"read","path":"%s/public"`, dir):                   "",
		fmt.Sprintf(`"verb":"list","path":"%s/closed"`, dir):                   "permission_denied",
		fmt.Sprintf(`"verb":"mkdir","path":"%s/closed/x"`, dir):                "permission_denied",
		fmt.Sprintf(`"verb":"stat","path":"%s/closed/x"`, dir):                 "permission_denied",
		fmt.Sprintf(`"verb":"remove","path":"%s/closed/x"`, dir):               "permission_denied",
		`"verb":"rename","path":"/etc/passwd","to":"/etc/x"`:                   "permission_denied",
		fmt.Sprintf(`"verb":"mkdir","path":"%s/own/deep","parents":true`, dir): "",
	} {
		if outcome := h.Do(request); outcome.Code != code {
			t.Errorf("%s: %+v", request, outcome)
		}
	}
	if outcome := write(h, fmt.Sprintf(`"path":"%s/public"`, dir), "z"); outcome.Code != "permission_denied" {
		t.Error("a file that may not be written was replaced:", outcome)
	}
	if outcome := write(h, fmt.Sprintf(`"path":"%s/mine"`, dir), "z"); outcome.Code != "" {
		t.Error(outcome)
	}
	var status syscall.Stat_t
	for _, path := range []string{"/mine", "/own/deep"} {
		if _ = syscall.Lstat(dir+path, &status); status.Uid != 65534 {
			t.Error(path, "belongs to", status.Uid)
		}
	}
	// No thread may keep a user's identity.
	tasks, _ := filepath.Glob("/proc/self/task/*/status")
	for _, task := range tasks {
		content, _ := os.ReadFile(task)
		if !strings.Contains(string(content), "Uid:\t0\t0\t0\t0") {
			t.Error("a thread is not root:", string(content))
		}
	}
}

func TestListPagesInOrderOfBytes(t *testing.T) {
	h, dir := start(t, "root"), folder(t)
	odd := "b\xffd"
	for _, name := range []string{"c", "a", odd, "B", "é"} {
		put(t, dir+"/"+name, name, 0o600)
	}
	_ = os.Symlink("a", dir+"/z")
	var names []string
	cursor := ""
	for {
		outcome := h.Do(fmt.Sprintf(`"verb":"list","path":"%s","limit":2,"cursor":"%s"`, dir, cursor))
		for _, entry := range outcome.Result["entries"].([]any) {
			row := entry.(map[string]any)
			name, _ := row["name"].(string)
			if encoded, ok := row["name_b64"].(string); ok {
				bytes, _ := base64.StdEncoding.DecodeString(encoded)
				name = string(bytes)
			}
			names = append(names, name)
		}
		next, ok := outcome.Result["next"].(string)
		if !ok {
			break
		}
		cursor = next
	}
	if got := strings.Join(names, " "); got != "B a "+odd+" c z é" {
		t.Errorf("%q", got)
	}
	outcome := h.Do(fmt.Sprintf(`"verb":"read","path_b64":"%s"`, base64.StdEncoding.EncodeToString([]byte(dir+"/"+odd))))
	if outcome.Output != odd {
		t.Error(outcome)
	}
	outcome = h.Do(fmt.Sprintf(`"verb":"stat","follow":false,"path":"%s/z"`, dir))
	if outcome.Result["type"] != "symlink" || outcome.Result["target"] != "a" {
		t.Error(outcome)
	}
}

func TestAHugeFolderFitsFrames(t *testing.T) {
	h, dir := start(t, "root"), folder(t)
	for index := 0; index < 900; index++ {
		put(t, fmt.Sprintf("%s/%s%04d", dir, strings.Repeat("<", 200), index), "", 0o600)
	}
	seen, cursor := 0, ""
	for {
		outcome := h.Do(fmt.Sprintf(`"verb":"list","path":"%s","cursor":"%s"`, dir, cursor))
		if outcome.Code != "" {
			t.Fatal(outcome.Code)
		}
		seen += len(outcome.Result["entries"].([]any))
		next, ok := outcome.Result["next"].(string)
		if !ok {
			break
		}
		cursor = next
	}
	if seen != 900 {
		t.Error(seen)
	}
}

func TestRemoveRenameMime(t *testing.T) {
	h, dir := start(t, "root"), folder(t)
	_ = os.MkdirAll(dir+"/d/e", 0o755)
	put(t, dir+"/png", "\x89PNG\r\n\x1a\nrest", 0o600)
	put(t, dir+"/text", "plain é", 0o600)
	put(t, dir+"/bytes", "\x00\x01", 0o600)
	if outcome := h.Do(fmt.Sprintf(`"verb":"remove","path":"%s/d"`, dir)); outcome.Code != "exists" {
		t.Error(outcome)
	}
	_ = os.Symlink(dir+"/text", dir+"/d/link")
	if outcome := h.Do(fmt.Sprintf(`"verb":"remove","path":"%s/d","recursive":true`, dir)); outcome.Code != "" {
		t.Error(outcome)
	}
	if outcome := h.Do(fmt.Sprintf(`"verb":"remove","path":"%s/d","recursive":true`, dir)); outcome.Code != "not_found" {
		t.Error(outcome)
	}
	outcome := h.Do(fmt.Sprintf(`"verb":"mime","paths":["%s/png","%s/text","%s/bytes","%s/none","%s"]`, dir, dir, dir, dir, dir))
	if got := fmt.Sprint(outcome.Result["types"]); got != "[image/png text/plain application/octet-stream <nil> <nil>]" {
		t.Error(got)
	}
	if outcome := h.Do(fmt.Sprintf(`"verb":"rename","path":"%s/png","to":"%s/text"`, dir, dir)); outcome.Code != "" {
		t.Error(outcome)
	}
}

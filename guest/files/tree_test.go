package files_test

import (
	"encoding/json"
	"fmt"
	"os"
	"sort"
	"strings"
	"syscall"
	"testing"
	"time"

	"innkeeper/guest/files"
	"innkeeper/guest/link"
	"innkeeper/guest/linktest"
)

func startTrees(t *testing.T, user string) *linktest.Host {
	store := files.New(func() string { return user })
	return linktest.New(t, map[string]link.Handler{
		"list": store.List, "glob": store.Glob, "search": store.Search, "copy": store.Copy, "watch": store.Watch,
		"write": store.Write, "rename": store.Rename, "remove": store.Remove, "read": store.Read,
	})
}

func plant(t *testing.T, dir string, paths ...string) {
	t.Helper()
	for _, path := range paths {
		name, content, _ := strings.Cut(path, "=")
		_ = os.MkdirAll(dir+"/"+name[:strings.LastIndex("/"+name, "/")], 0o755)
		if !strings.HasSuffix(name, "/") {
			put(t, dir+"/"+name, content, 0o644)
		}
	}
}

// pages asks for page after page and returns what all of them hold.
func pages(t *testing.T, h *linktest.Host, request, rows, name string) []string {
	t.Helper()
	found, cursor := []string{}, ""
	for {
		outcome := h.Do(fmt.Sprintf(`%s,"cursor":"%s"`, request, cursor))
		if outcome.Code != "" {
			t.Fatal(request, outcome.Code)
		}
		for _, row := range outcome.Result[rows].([]any) {
			one := row.(map[string]any)
			if line, ok := one["line"]; ok {
				found = append(found, fmt.Sprintf("%v:%v", one[name], line))
			} else {
				found = append(found, one[name].(string))
			}
		}
		next, ok := outcome.Result["next"].(string)
		if !ok {
			return found
		}
		if next == cursor {
			t.Fatal("a cursor that leads nowhere")
		}
		cursor = next
	}
}

func TestGlob(t *testing.T) {
	h, dir := startTrees(t, "root"), folder(t)
	plant(t, dir, "a.py", "b.txt", "src/c.py", "src/deep/er/d.py", "src/deep/e.TXT", ".hidden/f.py", "src.py/", "x[1].md", "z/")
	_ = os.Symlink(dir, dir+"/z/loop")
	for pattern, want := range map[string]string{
		"*.py":                "a.py src.py",
		"**/*.py":             ".hidden/f.py a.py src/c.py src/deep/er/d.py src.py",
		"src/**":              "src/c.py src/deep src/deep/e.TXT src/deep/er src/deep/er/d.py",
		"src/**/d.py":         "src/deep/er/d.py",
		"**/deep/**/*":        "src/deep/e.TXT src/deep/er src/deep/er/d.py",
		"{a.py,*/c.py}":       "a.py src/c.py",
		"{a,b}.{py,txt}":      "a.py b.txt",
		"./src//c.py":         "src/c.py",
		`x\[1\].md`:           "x[1].md",
		"?.txt":               "b.txt",
		"nothing/*":           "",
		"z/loop/a.py":         "",
		"**/[[:nothing:]]{}x": "",
	} {
		for _, limit := range []int{1, 2, 1000} {
			encoded, _ := json.Marshal(pattern)
			got := pages(t, h, fmt.Sprintf(`"verb":"glob","path":"%s","pattern":%s,"limit":%d`, dir, encoded, limit), "entries", "path")
			if strings.Join(got, " ") != want {
				t.Errorf("%s (%d): %v", pattern, limit, got)
			}
		}
	}
	for request, code := range map[string]string{
		fmt.Sprintf(`"path":"%s","pattern":""`, dir):                    "bad_request",
		fmt.Sprintf(`"path":"%s","pattern":"/etc/*"`, dir):              "bad_request",
		fmt.Sprintf(`"path":"%s","pattern":"../*"`, dir):                "bad_request",
		fmt.Sprintf(`"path":"%s","pattern":"[a"`, dir):                  "bad_request",
		fmt.Sprintf(`"path":"%s","pattern":"{a"`, dir):                  "bad_request",
		fmt.Sprintf(`"path":"%s","pattern":"a\u0000b"`, dir):            "bad_request",
		fmt.Sprintf(`"path":"%s","pattern":"*","cursor":"%%"`, dir):     "bad_request",
		fmt.Sprintf(`"path":"%s/none","pattern":"*"`, dir):              "not_found",
		fmt.Sprintf(`"path":"%s/a.py","pattern":"*"`, dir):              "not_a_directory",
		`"path":"/","pattern":"` + strings.Repeat("{a,b}", 10) + `"`:    "bad_request",
		`"path":"/","pattern":"` + strings.Repeat("a/", 3000) + `"`:     "bad_request",
		fmt.Sprintf(`"path":"%s","pattern":"%s"`, dir, "**/**/**/**/x"): "",
	} {
		if outcome := h.Do(`"verb":"glob",` + request); outcome.Code != code {
			t.Errorf("%.100s: %+v", request, outcome)
		}
	}
}

func TestAWalkKeepsOutOfTheKernels(t *testing.T) {
	h := startTrees(t, "root")
	if got := pages(t, h, `"verb":"glob","path":"/","pattern":"{proc,dev}/**"`, "entries", "path"); len(got) != 0 {
		t.Error(got[:1])
	}
	if got := pages(t, h, `"verb":"glob","path":"/proc/self","pattern":"status"`, "entries", "path"); len(got) != 1 {
		t.Error(got)
	}
}

func TestSearch(t *testing.T) {
	h, dir := startTrees(t, "root"), folder(t)
	plant(t, dir, "a.py=import os\nprint('Needle')\n\nneedle again", "sub/b.txt=no\r\nneedle\r\n", "sub/c.bin=\x00needle",
		"sub/d.md=xneedle\xffy\n", "empty=")
	_ = os.Symlink(dir+"/a.py", dir+"/link")
	_ = syscall.Mkfifo(dir+"/fifo", 0o666)
	for request, want := range map[string]string{
		`"query":"needle"`:                                     "a.py:4 sub/b.txt:2 sub/d.md:1",
		`"query":"needle","ignore_case":true`:                  "a.py:2 a.py:4 sub/b.txt:2 sub/d.md:1",
		`"query":"^needle$","regex":true`:                      "sub/b.txt:2",
		`"query":"^needle$"`:                                   "",
		`"query":"needle","include":"*.py"`:                    "a.py:4",
		`"query":"needle","include":"sub/*.{txt,md}"`:          "sub/b.txt:2 sub/d.md:1",
		`"query":"(N|n)EEDLE","regex":true,"ignore_case":true`: "a.py:2 a.py:4 sub/b.txt:2 sub/d.md:1",
	} {
		for _, limit := range []int{1, 1000} {
			got := pages(t, h, fmt.Sprintf(`"verb":"search","path":"%s","limit":%d,%s`, dir, limit, request), "matches", "path")
			if strings.Join(got, " ") != want {
				t.Errorf("%s (%d): %v", request, limit, got)
			}
		}
	}
	outcome := h.Do(fmt.Sprintf(`"verb":"search","path":"%s","query":"needle"`, dir))
	if outcome.Result["binary"] != 1.0 {
		t.Error(outcome.Result)
	}
	row := outcome.Result["matches"].([]any)[2].(map[string]any)
	if row["column"] != 2.0 || row["text"] != "xneedle\uFFFDy" || row["cut"] != false {
		t.Error(row)
	}
	if got := pages(t, h, fmt.Sprintf(`"verb":"search","path":"%s/a.py","query":"needle"`, dir), "matches", "line"); len(got) != 1 {
		t.Error(got)
	}
	for request, code := range map[string]string{
		fmt.Sprintf(`"path":"%s","query":""`, dir):                              "bad_request",
		fmt.Sprintf(`"path":"%s","query":"("`, dir):                             "",
		fmt.Sprintf(`"path":"%s","query":"(","regex":true`, dir):                "bad_request",
		fmt.Sprintf(`"path":"%s","query":"x","cursor":"AAAA"`, dir):             "bad_request",
		fmt.Sprintf(`"path":"%s","query":"%s"`, dir, strings.Repeat("x", 1025)): "bad_request",
		fmt.Sprintf(`"path":"%s","query":"x","include":"[a"`, dir):              "bad_request",
		fmt.Sprintf(`"path":"%s/none","query":"x"`, dir):                        "not_found",
		fmt.Sprintf(`"path":"%s/fifo","query":"x"`, dir):                        "not_a_regular_file",
		`"path":"/dev/zero","query":"x"`:                                        "not_a_regular_file",
		fmt.Sprintf(`"path":"%s","query":"(a{1000}){1000}","regex":true`, dir):  "bad_request",
	} {
		if outcome := h.Do(`"verb":"search",` + request); outcome.Code != code {
			t.Errorf("%.100s: %+v", request, outcome)
		}
	}
}

func TestSearchGoesOnInsideAFile(t *testing.T) {
	h, dir := startTrees(t, "root"), folder(t)
	var content strings.Builder
	for line := 1; line <= 3_000; line++ {
		fmt.Fprintf(&content, "line %d of it\n", line)
	}
	put(t, dir+"/f", content.String()+strings.Repeat("x", 100_000)+"needle"+strings.Repeat("y", 100_000)+"\nneedle", 0o600)
	put(t, dir+"/g", "needle", 0o600)
	if got := pages(t, h, fmt.Sprintf(`"verb":"search","path":"%s","query":"of it","limit":7`, dir), "matches", "path"); len(got) != 3_000 || got[2_999] != "f:3000" {
		t.Error(len(got), got[len(got)-1])
	}
	request := fmt.Sprintf(`"verb":"search","path":"%s","query":"needle"`, dir)
	if got := strings.Join(pages(t, h, request, "matches", "path"), " "); got != "f:3001 f:3002 g:1" {
		t.Error(got)
	}
	outcome := h.Do(request)
	first := outcome.Result["matches"].([]any)[0].(map[string]any)
	if outcome.Result["long_lines"] != 1.0 || first["column"] != 100_001.0 || first["cut"] != true || len(first["text"].(string)) > 512 {
		t.Error(outcome.Result["long_lines"], first)
	}
}

func TestWhatIsNotTheUsersIsCountedNotShown(t *testing.T) {
	h, dir := startTrees(t, "nobody"), folder(t)
	put(t, dir+"/secret", "needle", 0o600)
	put(t, dir+"/shown", "needle", 0o644)
	_ = os.Mkdir(dir+"/closed", 0o700)
	put(t, dir+"/closed/x", "needle", 0o644)
	outcome := h.Do(fmt.Sprintf(`"verb":"search","path":"%s","query":"needle"`, dir))
	if len(outcome.Result["matches"].([]any)) != 1 || outcome.Result["unreadable"] != 2.0 {
		t.Error(outcome)
	}
	outcome = h.Do(fmt.Sprintf(`"verb":"glob","path":"%s","pattern":"**"`, dir))
	if len(outcome.Result["entries"].([]any)) != 3 || outcome.Result["unreadable"] != 1.0 {
		t.Error(outcome)
	}
	for _, request := range []string{`"path":"%s/secret","to":"/tmp/inn-stolen"`, `"path":"%s/closed","recursive":true,"to":"%[1]s/taken"`} {
		if outcome := h.Do(`"verb":"copy",` + fmt.Sprintf(request, dir)); outcome.Code != "permission_denied" {
			t.Error(request, outcome)
		}
	}
	leftovers(t, dir)
	if outcome := h.Do(fmt.Sprintf(`"verb":"watch","path":"%s/closed"`, dir)); outcome.Code != "permission_denied" {
		t.Error(outcome)
	}
}

func names(t *testing.T, dir string) string {
	t.Helper()
	entries, _ := os.ReadDir(dir)
	var found []string
	for _, entry := range entries {
		found = append(found, entry.Name())
	}
	sort.Strings(found)
	return strings.Join(found, " ")
}

func TestCopy(t *testing.T) {
	h, dir := startTrees(t, "root"), folder(t)
	plant(t, dir, "tree/a=1", "tree/sub/b=22", "tree/sub/empty/", "other=o")
	_ = os.Chmod(dir+"/tree/a", 0o751|os.ModeSetuid)
	_ = os.Symlink("/nowhere", dir+"/tree/link")
	_ = syscall.Mkfifo(dir+"/tree/fifo", 0o666)
	old := time.Unix(1_500_000_000, 0)
	_ = os.Chtimes(dir+"/tree/sub/b", old, old)
	outcome := h.Do(fmt.Sprintf(`"verb":"copy","path":"%s/tree","to":"%[1]s/made","recursive":true`, dir))
	if outcome.Result["files"] != 6.0 || outcome.Result["bytes"] != 3.0 || outcome.Result["skipped"] != 1.0 {
		t.Error(outcome)
	}
	information, _ := os.Stat(dir + "/made/sub/b")
	mode, _ := os.Stat(dir + "/made/a")
	target, _ := os.Readlink(dir + "/made/link")
	if names(t, dir+"/made") != "a link sub" || !information.ModTime().Equal(old) || mode.Mode() != 0o751 || target != "/nowhere" {
		t.Error(names(t, dir+"/made"), information.ModTime(), mode.Mode(), target)
	}
	for request, code := range map[string]string{
		`"path":"%s/tree","to":"%[1]s/new"`:                          "is_a_directory",
		`"path":"%s/tree","to":"%[1]s/made","recursive":true`:        "exists",
		`"path":"%s/tree","to":"%[1]s/tree/sub/in","recursive":true`: "bad_request",
		`"path":"%s/tree/fifo","to":"%[1]s/fifo"`:                    "not_a_regular_file",
		`"path":"%s/other","to":"%[1]s/tree/a","replace":false`:      "exists",
		`"path":"%s/other","to":"%[1]s/tree"`:                        "is_a_directory",
		`"path":"%s/none","to":"%[1]s/new"`:                          "not_found",
		`"path":"%s/other","to":"%[1]s/none/new"`:                    "not_found",
		`"path":"%s/other","to":"relative"`:                          "bad_request",
		`"path":"%s/other","to":"%[1]s/tree/a"`:                      "",
		`"path":"%s/other","to":"%[1]s/fresh","replace":false`:       "",
	} {
		if outcome := h.Do(`"verb":"copy",` + fmt.Sprintf(request, dir)); outcome.Code != code {
			t.Errorf("%s: %+v", request, outcome)
		}
	}
	content, _ := os.ReadFile(dir + "/tree/a")
	if names(t, dir) != "fresh made other tree" || string(content) != "o" {
		t.Error(names(t, dir), string(content))
	}
}

func TestACopyThatNobodyWantsLeavesNothing(t *testing.T) {
	h, dir := startTrees(t, "root"), folder(t)
	put(t, dir+"/big", "", 0o600)
	_ = os.Truncate(dir+"/big", 64<<30)
	call := h.Open(fmt.Sprintf(`"verb":"copy","path":"%s/big","to":"%[1]s/copied"`, dir))
	for begun := time.Now(); !strings.Contains(names(t, dir), ".inn-"); time.Sleep(time.Millisecond) {
		if time.Since(begun) > 10*time.Second {
			t.Fatal("nothing was begun")
		}
	}
	call.Send(link.Cancel, "")
	for begun := time.Now(); names(t, dir) != "big"; time.Sleep(time.Millisecond) {
		if time.Since(begun) > 10*time.Second {
			t.Fatal("left behind: ", names(t, dir))
		}
	}
}

func TestRenameMayRefuseToReplace(t *testing.T) {
	h, dir := startTrees(t, "root"), folder(t)
	plant(t, dir, "a=1", "b=2")
	if outcome := h.Do(fmt.Sprintf(`"verb":"rename","path":"%s/a","to":"%[1]s/b","replace":false`, dir)); outcome.Code != "exists" {
		t.Error(outcome)
	}
	if outcome := h.Do(fmt.Sprintf(`"verb":"rename","path":"%s/a","to":"%[1]s/c","replace":false`, dir)); outcome.Code != "" || names(t, dir) != "b c" {
		t.Error(outcome, names(t, dir))
	}
	if outcome := h.Do(`"verb":"remove","path":"//","recursive":true`); outcome.Code != "bad_request" {
		t.Error(outcome)
	}
}

type lines struct {
	t    *testing.T
	call *linktest.Call
	rest string
	last string // what the last expected event made or changed
}

// follow opens a watch and waits until it stands.
func follow(t *testing.T, h *linktest.Host, fields string) *lines {
	t.Helper()
	call := h.Open(`"verb":"watch",` + fields)
	if frame := call.Next(); frame.Kind != link.Message {
		t.Fatalf("no watch: %s", frame.Payload)
	}
	return &lines{t: t, call: call}
}

// next is one event: `type path`, with the old path of a move and a slash behind a directory.
func (l *lines) next(dir string) string {
	l.t.Helper()
	for !strings.Contains(l.rest, "\n") {
		frame := l.call.Next()
		if frame.Kind != link.Data {
			return fmt.Sprintf("%d %s", frame.Kind, frame.Payload)
		}
		l.call.Grant(uint32(len(frame.Payload)))
		l.rest += string(frame.Payload)
	}
	var event struct {
		Type, Path, From string
		Directory        bool
	}
	line, rest, _ := strings.Cut(l.rest, "\n")
	l.rest = rest
	if err := json.Unmarshal([]byte(line), &event); err != nil {
		l.t.Fatal(err)
	}
	text := event.Type
	for _, path := range []string{event.From, event.Path} {
		if path != "" {
			text += " " + strings.TrimPrefix(path, dir+"/")
		}
	}
	if event.Directory {
		text += "/"
	}
	return text
}

func (l *lines) expect(dir string, wanted ...string) {
	l.t.Helper()
	for _, want := range wanted {
		got := l.next(dir)
		// One change is told twice where the watch looked in the middle of it, as it does on a busy machine.
		for got != want && l.last != "" && got == "modified "+l.last {
			got = l.next(dir)
		}
		if got != want {
			l.t.Fatalf("%q came, not %q", got, want)
		}
		kind, path, _ := strings.Cut(got, " ")
		l.last = ""
		if kind == "created" || kind == "modified" {
			l.last = path
		}
	}
}

func TestWatchTellsWhatHappens(t *testing.T) {
	h, dir := startTrees(t, "root"), folder(t)
	plant(t, dir, "kept=1", "sub/inner=1", "sub/deep/x=1")
	outside := folder(t)
	watch := follow(t, h, fmt.Sprintf(`"path":"%s","recursive":true`, dir))
	put(t, dir+"/new", "x", 0o600)
	watch.expect(dir, "created new")
	put(t, dir+"/kept", "changed", 0o600)
	put(t, dir+"/kept", "changed again", 0o600)
	watch.expect(dir, "modified kept")
	_ = os.Rename(dir+"/new", dir+"/sub/renamed")
	watch.expect(dir, "moved new sub/renamed")
	put(t, dir+"/sub/deep/x", "y", 0o600)
	watch.expect(dir, "modified sub/deep/x")
	_ = os.Rename(dir+"/sub", dir+"/moved")
	watch.expect(dir, "moved sub moved/")
	put(t, dir+"/moved/deep/x", "z", 0o600)
	watch.expect(dir, "modified moved/deep/x")
	_ = os.Rename(dir+"/moved/deep", outside+"/deep")
	watch.expect(dir, "deleted moved/deep/")
	put(t, outside+"/deep/x", "unseen", 0o600)
	_ = os.Rename(outside+"/deep", dir+"/back")
	watch.expect(dir, "created back/", "created back/x")
	_ = os.Remove(dir + "/back/x")
	watch.expect(dir, "deleted back/x")
	write(h, fmt.Sprintf(`"path":"%s/fresh"`, dir), "by the agent")
	watch.expect(dir, "created fresh")
	write(h, fmt.Sprintf(`"path":"%s/fresh"`, dir), "by the agent, again")
	watch.expect(dir, "modified fresh")
	_ = os.MkdirAll(dir+"/one/two/three", 0o755)
	seen := map[string]bool{}
	for !seen["created one/two/three/"] {
		seen[watch.next(dir)] = true
	}
	put(t, dir+"/one/two/three/leaf", "", 0o600)
	for !seen["created one/two/three/leaf"] {
		seen[watch.next(dir)] = true
	}
	_ = os.RemoveAll(dir)
	for !seen["deleted "+dir+"/"] {
		seen[watch.next(dir)] = true
	}
	if frame := watch.call.Next(); frame.Kind != link.Result {
		t.Errorf("%d %s", frame.Kind, frame.Payload)
	}
}

func TestWatchOfOneDirectoryLooksNoDeeper(t *testing.T) {
	h, dir := startTrees(t, "root"), folder(t)
	plant(t, dir, "sub/")
	_ = os.Symlink(dir, dir+"-link")
	defer os.Remove(dir + "-link")
	watch := follow(t, h, fmt.Sprintf(`"path":"%s-link/"`, dir))
	put(t, dir+"/sub/inner", "", 0o600)
	put(t, dir+"/here\n", "", 0o600)
	watch.expect(dir+"-link", "created here\n")
	watch.call.Send(link.Cancel, "")
	put(t, dir+"/unseen", "", 0o600)
	watch.call.Quiet(200 * time.Millisecond)
	for path, code := range map[string]string{dir + "/none": "not_found", dir + "/here": "not_found", "/etc/passwd": "not_a_directory"} {
		if outcome := h.Do(fmt.Sprintf(`"verb":"watch","path":"%s"`, path)); outcome.Code != code {
			t.Error(path, outcome)
		}
	}
}

// A reader that takes nothing must cost the agent no more than what may be pending, and hears that it missed something.
func TestWatchSaysThatItLostEvents(t *testing.T) {
	h, dir := startTrees(t, "root"), folder(t)
	watch := follow(t, h, fmt.Sprintf(`"path":"%s"`, dir))
	long := strings.Repeat("n", 200)
	seen := map[string]int{}
	// On a busy machine the watch may keep up with a first flood.
	for round := 0; seen["overflow"] == 0; round++ {
		for index := 0; index < 12_000; index++ {
			path := fmt.Sprintf("%s/%s%d", dir, long, index%50)
			descriptor, err := syscall.Open(path, syscall.O_CREAT|syscall.O_WRONLY, 0o600)
			if err != nil {
				t.Fatal(err)
			}
			_ = syscall.Close(descriptor)
			_ = os.Remove(path)
		}
		last := fmt.Sprintf("round%d", round)
		put(t, dir+"/"+last, "", 0o600)
		for seen["overflow"] == 0 && seen[last] == 0 {
			kind, name, _ := strings.Cut(watch.next(dir), " ")
			seen[kind]++
			seen[name]++
		}
	}
	put(t, dir+"/after", "", 0o600)
	for seen["after"] == 0 {
		if watch.next(dir) == "created after" {
			seen["after"]++
		}
	}
	if seen["created"] == 0 || seen["deleted"] == 0 {
		t.Error(seen)
	}
}

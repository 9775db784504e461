package changes

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"

	"innkeeper/guest/link"
	"innkeeper/guest/reaper"
)

const (
	maxIDBytes   = 64
	baselineName = "baseline"
	resultSuffix = ".changes"
	pieceBytes   = link.MaxPayload
)

// Place is where a guest scans itself: the parts of its overlay, and a folder beside them for the baseline and the newest result.
type Place struct {
	Upper   string
	Lowers  []string // topmost first
	Private string
}

// Verb serves `changes` in a guest, by a scanner that is a process of its own: what a scan takes of memory, or dies of, is not PID 1's.
type Verb struct {
	children *reaper.Table
	place    Place
	program  string

	turn    chan struct{} // one request at a time; it guards what is below
	scanner *scanner
	lastID  uint64

	mu     sync.Mutex
	pid    int     // of the scanner, 0 where none runs
	writes *writes // nil where the kernel cannot tell, and before the first scan
	asked  bool    // whether it can
}

// scanner is a running process.
type scanner struct {
	child   *reaper.Child
	to      *os.File
	from    *os.File
	answers *bufio.Reader
}

// NewVerb serves for that place; program is the agent's own binary.
func NewVerb(children *reaper.Table, place Place, program string) *Verb {
	return &Verb{children: children, place: place, program: program, turn: make(chan struct{}, 1)}
}

// Pid is the scanner's process, or 0.
func (v *Verb) Pid() int {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.pid
}

// Writes is how often something was written to the guest's disk since the first scan; nil where that is not known.
func (v *Verb) Writes() *uint64 {
	v.mu.Lock()
	counting := v.writes
	v.mu.Unlock()
	if counting == nil {
		return nil
	}
	if count, known := counting.count(); known {
		return &count
	}
	return nil
}

// count begins to count with the first scan: not at the boot, which everybody waits for.
func (v *Verb) count() *uint64 {
	v.mu.Lock()
	if !v.asked {
		v.asked = true
		v.writes, _ = countWrites(v.place.Upper)
	}
	v.mu.Unlock()
	return v.Writes()
}

type wish struct {
	Op       string   `json:"op"`
	ID       string   `json:"id"`
	Excluded []string `json:"excluded"`
}

type summary struct {
	Total      *uint64 `json:"total,omitempty"`
	Scanned    int     `json:"scanned"`
	DurationUS int64   `json:"duration_us"`
	Writes     *uint64 `json:"writes,omitempty"` // as of before the scan
}

// Changes serves the verb.
func (v *Verb) Changes(stream *link.Stream, open link.Request) {
	var wanted wish
	if err := open.Decode(&wanted); err != nil {
		stream.Fail(err)
		return
	}
	v.turn <- struct{}{}
	defer func() { <-v.turn }()
	if cancelled, broken := stream.State(); cancelled || broken {
		return // while others were served
	}
	if err := v.serve(stream, &wanted); err != nil {
		stream.Fail(err)
	}
}

func (v *Verb) serve(stream *link.Stream, wanted *wish) error {
	baseline := filepath.Join(v.place.Private, baselineName)
	switch wanted.Op {
	case "forget":
		for _, path := range append(v.results(), baseline, pending(baseline), temporary(baseline)) {
			if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
				return err
			}
		}
		stream.Succeed(struct{}{})
		return nil
	case "baseline":
		writes := v.count()
		found, err := v.scan(stream, &request{Op: "baseline", Baseline: baseline, Excluded: wanted.Excluded})
		if err == nil {
			stream.Succeed(summary{Scanned: found.Scanned, DurationUS: found.DurationUS, Writes: writes})
		}
		return err
	case "changes":
	default:
		return link.Errorf("bad_request", "changes: op %q", wanted.Op)
	}
	if !validID(wanted.ID) {
		return link.Errorf("bad_request", "changes: id %q", wanted.ID)
	}
	result := filepath.Join(v.place.Private, wanted.ID+resultSuffix)
	for _, path := range v.results() {
		if path != result {
			_ = os.Remove(path)
		}
	}
	writes := v.count()
	found, err := v.scan(stream, &request{Op: "changes", Baseline: baseline, Result: result, Excluded: wanted.Excluded})
	if err != nil {
		return err
	}
	if found.Total > 0 {
		if err := send(stream, result); err != nil {
			return err
		}
	}
	if found.Recalled {
		writes = nil // it says nothing of now
	}
	stream.Succeed(summary{&found.Total, found.Scanned, found.DurationUS, writes})
	return nil
}

// results are those that were not forgotten yet: one, but for a crash between two requests.
func (v *Verb) results() []string {
	paths, _ := filepath.Glob(filepath.Join(v.place.Private, "*"+resultSuffix))
	return paths
}

func validID(id string) bool {
	if id == "" || len(id) > maxIDBytes || id[0] == '.' {
		return false
	}
	return strings.Trim(id, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-") == ""
}

// send copies a finished result to the opener.
func send(stream *link.Stream, path string) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	buffer := make([]byte, link.HeaderBytes+pieceBytes)
	for {
		granted, err := stream.WaitCredit(pieceBytes)
		if err != nil {
			return err
		}
		count, err := io.ReadFull(file, buffer[link.HeaderBytes:link.HeaderBytes+granted])
		stream.ReturnCredit(granted - count)
		if count > 0 {
			if err := stream.SendTaken(link.Data, buffer[:link.HeaderBytes+count]); err != nil {
				return err
			}
		}
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// scan has the scanner do one thing. An opener that gives up ends the scan, not the scanner.
func (v *Verb) scan(stream *link.Stream, wanted *request) (*answer, error) {
	wanted.Upper, wanted.Lowers = v.place.Upper, v.place.Lowers
	running, err := v.running()
	if err != nil {
		return nil, err
	}
	v.lastID++
	wanted.ID = v.lastID
	found, err := running.ask(wanted, stream)
	if err != nil {
		v.stop()
		return nil, link.Errorf("io_error", "changes: the scanner: %v", err)
	}
	if found.Error != nil {
		return nil, link.Errorf(verbCode(found.Error.Code), "changes: %s", found.Error.Message)
	}
	return found, nil
}

// verbCode is what the protocol calls a failure of the scanner. A damaged baseline, too, is replaced by a new one.
func verbCode(code string) string {
	switch code {
	case "no_baseline", "bad_baseline":
		return "not_found"
	case "too_large", "bad_request", "no_space":
		return code
	}
	return "io_error"
}

// ask sends the request and waits for its answer, whatever else comes.
func (s *scanner) ask(wanted *request, stream *link.Stream) (*answer, error) {
	if err := s.tell(wanted); err != nil {
		return nil, err
	}
	over := make(chan struct{})
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		for {
			if cancelled, broken := stream.State(); cancelled || broken {
				_ = s.tell(&request{Op: "cancel", ID: wanted.ID})
				return
			}
			select {
			case <-stream.Events():
			case <-over:
				return
			}
		}
	}()
	defer func() { close(over); <-watched }()
	for {
		found, err := s.hear()
		if err != nil || found.ID == wanted.ID {
			return found, err
		}
	}
}

func (s *scanner) tell(message *request) error {
	body, err := json.Marshal(message)
	if err != nil {
		return err
	}
	head := make([]byte, 4, 4+len(body))
	binary.BigEndian.PutUint32(head, uint32(len(body)))
	_, err = s.to.Write(append(head, body...))
	return err
}

func (s *scanner) hear() (*answer, error) {
	var head [4]byte
	if _, err := io.ReadFull(s.answers, head[:]); err != nil {
		return nil, err
	}
	length := binary.BigEndian.Uint32(head[:])
	if length > maxMessage {
		return nil, fmt.Errorf("an answer of %d bytes", length)
	}
	body := make([]byte, length)
	if _, err := io.ReadFull(s.answers, body); err != nil {
		return nil, err
	}
	var found answer
	err := json.Unmarshal(body, &found)
	return &found, err
}

// running is the scanner, started where it does not run: the first scan starts it, and whoever ends all processes of the guest ends it.
func (v *Verb) running() (*scanner, error) {
	if v.scanner != nil {
		select {
		case <-v.scanner.child.Done:
			v.stop()
		default:
			return v.scanner, nil
		}
	}
	requests, to, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer requests.Close()
	from, answers, err := os.Pipe()
	if err != nil {
		_ = to.Close()
		return nil, err
	}
	defer answers.Close()
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		_ = to.Close()
		_ = from.Close()
		return nil, err
	}
	defer null.Close()
	child, err := v.children.Start(v.program, []string{"inn-agent", "scan"}, &syscall.ProcAttr{
		Dir: "/", Env: []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"},
		Files: []uintptr{requests.Fd(), answers.Fd(), null.Fd()},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		_ = to.Close()
		_ = from.Close()
		return nil, link.Errorf("spawn_failed", "changes: the scanner: %v", err)
	}
	v.scanner = &scanner{child: child, to: to, from: from, answers: bufio.NewReader(from)}
	v.mu.Lock()
	v.pid = child.Pid
	v.mu.Unlock()
	return v.scanner, nil
}

// stop ends a scanner that is of no use any more.
func (v *Verb) stop() {
	_ = v.children.Signal(v.scanner.child, syscall.SIGKILL, false)
	_ = v.scanner.to.Close()
	_ = v.scanner.from.Close()
	v.scanner = nil
	v.mu.Lock()
	v.pid = 0
	v.mu.Unlock()
}

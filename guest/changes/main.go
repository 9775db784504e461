// Package changes finds the files that a command changed: it compares the upper directory of a guest's overlay with a
// kept baseline and with the layers below. Everything it looks at was made by a hostile guest, so it reads metadata only.
package changes

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"runtime/debug"
	"sync"
	"syscall"
)

const (
	maxMessage = 1 << 20
	maxScans   = 4 // at once; the others wait

	// A scan of more entries than this leaves garbage that is worth a collection of some milliseconds.
	bigScan = 20_000
)

// request is one length-prefixed (u32, big endian) JSON object on standard input.
type request struct {
	ID       uint64   `json:"id"`
	Op       string   `json:"op"` // "baseline", "changes", "cancel" (the request of that id) or "hello"
	Upper    string   `json:"upper"`
	Lowers   []string `json:"lowers"` // topmost first
	Baseline string   `json:"baseline"`
	Result   string   `json:"result"` // of changes: its own path for every command; again the same path is a retry
	Excluded []string `json:"excluded"`
}

// answer is one length-prefixed JSON object on standard output. Rows are in the result file, which exists if Total > 0.
type answer struct {
	ID         uint64   `json:"id"`
	Total      uint64   `json:"total"`
	Scanned    int      `json:"scanned"`
	DurationUS int64    `json:"duration_us"`
	Recalled   bool     `json:"recalled,omitempty"` // an earlier result that was asked for again
	Error      *failure `json:"error,omitempty"`
}

type failure struct {
	Code    string `json:"code"`
	Message string `json:"message"`
}

// Main serves scans on standard input and output until the input ends.
func Main(args []string) int {
	if len(args) != 0 {
		fmt.Fprintln(os.Stderr, "usage: inn-agent scan   (requests on standard input, answers on standard output)")
		return 2
	}
	var limit syscall.Rlimit
	if syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit) == nil {
		limit.Cur = limit.Max
		syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit)
	}
	syscall.Umask(0o077)
	runtime.GOMAXPROCS(maxScans + 2)
	debug.SetGCPercent(50) // almost everything that a scan allocates is kept for all of it
	if err := newServer(os.Stdout).serve(os.Stdin); err != nil {
		fmt.Fprintln(os.Stderr, "scan:", err)
		return 1
	}
	return 0
}

type server struct {
	slots chan struct{}

	outLock sync.Mutex
	out     io.Writer

	lock      sync.Mutex
	running   map[uint64]context.CancelFunc
	baselines map[string]*turn
}

// turn lets one request at a time work on a baseline.
type turn struct {
	sync.Mutex
	users int
}

func newServer(out io.Writer) *server {
	return &server{
		slots: make(chan struct{}, maxScans), out: out,
		running: map[uint64]context.CancelFunc{}, baselines: map[string]*turn{},
	}
}

func (s *server) serve(in io.Reader) error {
	r := bufio.NewReader(in)
	for {
		var head [4]byte
		if _, err := io.ReadFull(r, head[:]); err == io.EOF {
			return nil // the daemon is gone: so are those who wanted the answers
		} else if err != nil {
			return err
		}
		length := binary.BigEndian.Uint32(head[:])
		if length > maxMessage {
			return fmt.Errorf("a request of %d bytes", length)
		}
		body := make([]byte, length)
		if _, err := io.ReadFull(r, body); err != nil {
			return err
		}
		var q request
		if err := json.Unmarshal(body, &q); err != nil {
			return err
		}
		switch q.Op {
		case "cancel":
			s.cancel(q.ID)
			continue
		case "hello":
			s.reply(&answer{ID: q.ID})
			continue
		}
		ctx, cancel := context.WithCancel(context.Background())
		s.lock.Lock()
		s.running[q.ID] = cancel
		s.lock.Unlock()
		go s.handle(ctx, &q)
	}
}

func (s *server) cancel(id uint64) {
	s.lock.Lock()
	defer s.lock.Unlock()
	if cancel := s.running[id]; cancel != nil {
		cancel()
	}
}

func (s *server) handle(ctx context.Context, q *request) {
	release := s.take(q.Baseline)
	s.slots <- struct{}{}
	a, err := perform(ctx, q)
	<-s.slots
	release()
	a.ID = q.ID
	if err != nil {
		a = answer{ID: q.ID, Error: &failure{codeOf(err), err.Error()}}
	}
	s.cancel(q.ID)
	s.lock.Lock()
	delete(s.running, q.ID)
	s.lock.Unlock()
	s.reply(&a)
	if a.Scanned > bigScan {
		debug.FreeOSMemory()
	}
}

func (s *server) take(baseline string) (release func()) {
	s.lock.Lock()
	t := s.baselines[baseline]
	if t == nil {
		t = &turn{}
		s.baselines[baseline] = t
	}
	t.users++
	s.lock.Unlock()
	t.Lock()
	return func() {
		t.Unlock()
		s.lock.Lock()
		if t.users--; t.users == 0 {
			delete(s.baselines, baseline)
		}
		s.lock.Unlock()
	}
}

func (s *server) reply(a *answer) {
	body, _ := json.Marshal(a) // of numbers and strings: cannot fail
	message := make([]byte, 4, 4+len(body))
	binary.BigEndian.PutUint32(message, uint32(len(body)))
	s.outLock.Lock()
	defer s.outLock.Unlock()
	s.out.Write(append(message, body...)) // a broken pipe also ends the input
}

func codeOf(err error) string {
	switch {
	case errors.Is(err, errNoBaseline):
		return "no_baseline"
	case errors.Is(err, errBadBaseline):
		return "bad_baseline"
	case errors.Is(err, errTooManyNames):
		return "too_large"
	case errors.Is(err, errTrustedXattrs):
		return "unsupported_mount"
	case errors.Is(err, context.Canceled):
		return "cancelled"
	case errors.Is(err, errBadRequest):
		return "bad_request"
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return "no_space"
	}
	return "io_error"
}

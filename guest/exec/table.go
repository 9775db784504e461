package exec

import (
	"os"
	"sort"
	"sync"
	"sync/atomic"
	"syscall"

	"innkeeper/guest/account"
	"innkeeper/guest/link"
	"innkeeper/guest/reaper"
	"innkeeper/guest/usage"
)

// Settings are what configure decides about commands.
type Settings struct {
	User       string
	Workdir    string
	Env        map[string]string
	SpareShell bool
}

// equal is not reflection's: a clone of a microVM would have to translate that first.
func (s Settings) equal(other Settings) bool {
	if s.User != other.User || s.Workdir != other.Workdir || s.SpareShell != other.SpareShell || len(s.Env) != len(other.Env) {
		return false
	}
	for name, value := range s.Env {
		if found, ok := other.Env[name]; !ok || found != value {
			return false
		}
	}
	return true
}

// Table knows all executions.
type Table struct {
	children *reaper.Table
	logins   *account.Logins
	retained int64 // bytes in all journals, atomic
	null     *os.File

	mu       sync.Mutex
	settings Settings
	byID     map[string]*Process
	over     []*Process // ended ones, oldest first
	spares   spares

	others []func() int
	writes func() *uint64 // nil where the guest does not count them

	kernelMu sync.Mutex
	kernels  map[string]*session
	shown    []shown // oldest first
}

// NewTable starts processes through children.
func NewTable(children *reaper.Table, logins *account.Logins) (*Table, error) {
	null, err := os.OpenFile("/dev/null", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	t := &Table{children: children, logins: logins, null: null, byID: map[string]*Process{}, kernels: map[string]*session{}}
	t.spares.table = t
	return t, nil
}

// Settings returns what the last Configure left.
func (t *Table) Settings() Settings {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.settings
}

// Configure replaces the settings. A spare shell that was made for others is replaced beside: the host waits for this answer, and
// a command that comes first does without.
func (t *Table) Configure(settings Settings) {
	t.mu.Lock()
	same := t.settings.equal(settings)
	t.settings = settings
	t.mu.Unlock()
	if same {
		return
	}
	go func() {
		t.spares.discard()
		// Not at once: a guest whose instructions are translated would start that shell before it answers whoever configures it.
		t.spares.plan(spareDelay)
	}()
}

// Renew starts another spare shell in place of the one that was saved with the guest: every guest of one checkpoint has that
// shell, and its next random numbers.
func (t *Table) Renew() {
	t.spares.discard()
	t.spares.prepare()
}

// WithoutSpare runs work while no spare shell is there, which might stand in a directory that is to go; the next one comes a moment later.
func (t *Table) WithoutSpare(work func() error) error {
	defer t.spares.plan(spareDelay)
	t.spares.mu.Lock()
	defer t.spares.mu.Unlock()
	if ready := t.spares.ready; ready != nil {
		t.spares.ready = nil
		ready.discard(t)
		<-ready.child.Done
	}
	return work()
}

// UserProcesses counts what lives in the guest beside the agent and its spare shell.
func (t *Table) UserProcesses() int {
	_, users := usage.Processes(t.OwnPids())
	return users
}

// AlsoOwn adds a process of the agent's to those that keep no guest awake; 0 is none. To be called before anything is served.
func (t *Table) AlsoOwn(pid func() int) { t.others = append(t.others, pid) }

// TellWrites has every exit say how often the guest's disk was written to by then. To be called before anything is served.
func (t *Table) TellWrites(count func() *uint64) { t.writes = count }

// OwnPids are processes that belong to the agent itself, and interpreters that wait for a cell.
func (t *Table) OwnPids() map[int]bool {
	pids := t.spares.pids()
	for _, pid := range t.others {
		pids[pid()] = true
	}
	t.kernelPids(pids)
	return pids
}

func (t *Table) account(change int64) { atomic.AddInt64(&t.retained, change) }

// overBudget is how much the calling process must forget after ended ones forgot what they could.
func (t *Table) overBudget() int64 {
	over := atomic.LoadInt64(&t.retained) - budgetBytes
	if over <= 0 {
		return 0
	}
	// The caller holds its own lock, so others are only tried: two that wait for each other would never end.
	t.mu.Lock()
	victims := append([]*Process(nil), t.over...)
	t.mu.Unlock()
	for _, victim := range victims {
		if over <= 0 {
			return 0
		}
		if !victim.mu.TryLock() {
			continue
		}
		victim.trim(victim.journal.size() - over)
		victim.mu.Unlock()
		over = atomic.LoadInt64(&t.retained) - budgetBytes
	}
	return over
}

// ended is called with p's lock held.
func (t *Table) ended(p *Process) {
	t.spares.plan(spareDelay)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.over = append(t.over, p)
	for len(t.over) > remembered {
		oldest := t.over[0]
		t.over = t.over[1:]
		delete(t.byID, oldest.ID)
		// Not under this lock: a process takes its own lock first.
		go oldest.forget()
	}
}

func (t *Table) find(id string) (*Process, error) {
	t.mu.Lock()
	p := t.byID[id]
	t.mu.Unlock()
	if p == nil || p.started() == nil {
		return nil, link.Errorf("no_such_process", "there is no execution %q", id)
	}
	return p, nil
}

// claim registers p under its id.
func (t *Table) claim(p *Process) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.byID[p.ID] != nil {
		return link.Errorf("exists", "execution %q exists already", p.ID)
	}
	t.byID[p.ID] = p
	return nil
}

func (t *Table) disown(p *Process) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.byID, p.ID)
}

// Entry is one execution in the answer to the processes verb.
type Entry struct {
	ID      string `json:"id"`
	Pid     int    `json:"pid"`
	Running bool   `json:"running"`
	Offset  int64  `json:"offset"`
}

// List tells of all known executions, by id.
func (t *Table) List() []Entry {
	known := t.all()
	entries := make([]Entry, 0, len(known))
	for _, p := range known {
		p.mu.Lock()
		if p.child != nil {
			entries = append(entries, Entry{p.ID, p.child.Pid, p.running(), p.journal.end})
		}
		p.mu.Unlock()
	}
	sort.Slice(entries, func(i, j int) bool { return entries[i].ID < entries[j].ID })
	return entries
}

// SignalAll reaches the process group of every running execution.
func (t *Table) SignalAll(number syscall.Signal) {
	for _, p := range t.all() {
		if child := p.started(); child != nil && p.running() {
			_ = t.children.Signal(child, number, true)
		}
	}
}

func (t *Table) all() []*Process {
	t.mu.Lock()
	defer t.mu.Unlock()
	known := make([]*Process, 0, len(t.byID))
	for _, p := range t.byID {
		known = append(known, p)
	}
	return known
}

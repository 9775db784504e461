package exec

import (
	"syscall"
	"time"

	"innkeeper/guest/kernel"
	"innkeeper/guest/link"
)

const (
	maxKernels = 8
	// How long an interrupted cell has before the interrupt goes to its subprocesses too, and then before the interpreter is killed.
	interruptGrace = time.Second
	killGrace      = 5 * time.Second
	// Results of ended cells that nobody fetched yet.
	resultsBudget = 16 << 20
)

// Cell is the part of a request that an interpreter with state runs.
type Cell struct {
	Kernel string `json:"kernel"`
	Code   string `json:"code"`
}

// cell is a process whose work is done by an interpreter that outlives it.
type cell struct {
	name        string
	code        string
	env         map[string]string
	stop        chan struct{} // closed when it is called off before its turn came
	stopped     bool
	done        chan struct{}
	fresh       bool // its interpreter was started for it
	lost        bool // its interpreter ended with it
	running     *session
	begun       bool // its interpreter has it, so that an interrupt is for nobody else
	interrupted bool // an interrupt waits for that
	reply       kernel.Reply
	exitCode    int
	signal      *int
	at          time.Time
	over        bool
}

// session is a named interpreter. Its turn is taken by one cell after another.
type session struct {
	kernel  *kernel.Kernel
	given   map[string]string // variables that cells came with; whoever has the turn may look
	turn    chan struct{}
	threads bool // its last cell left threads that go on
}

// cellMessage is what an exit says of a cell beside.
type cellMessage struct {
	Fresh            bool `json:"fresh"`
	Lost             bool `json:"lost"`
	ResultBytes      int  `json:"result_bytes"`
	ResultsTruncated bool `json:"results_truncated"`
}

// launchCell finds or starts the interpreter and gives the cell to it as soon as it is free.
func (t *Table) launchCell(p *Process, request *Request) error {
	made, err := t.planKernel(request)
	if err != nil {
		return err
	}
	found, fresh, err := t.session(request.Cell.Kernel, made, request.Env)
	if err != nil {
		return err
	}
	d, err := t.describe(request)
	if err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.begun = time.Now()
	p.child, p.input, p.hasInput = found.kernel.Child, d.input, d.input != nil
	p.cell = &cell{
		name: request.Cell.Kernel, code: request.Cell.Code, env: request.Env, fresh: fresh,
		stop: make(chan struct{}), done: make(chan struct{}),
	}
	for index, file := range d.outputs {
		if err := p.addOutput(file, d.kinds[index]); err != nil {
			d.abandon()
			return err
		}
	}
	go t.runCell(p, found, made, d)
	return nil
}

// planKernel is the user's login environment with an interpreter looked up in it.
func (t *Table) planKernel(request *Request) (*plan, error) {
	var made *plan
	var err error
	for _, name := range []string{"python3", "python"} {
		made, err = t.plan(&Request{Argv: []string{name}, User: request.User, Env: request.Env})
		if err == nil {
			return made, nil
		}
	}
	return nil, err
}

// session returns the named interpreter, started if there is none.
func (t *Table) session(name string, made *plan, env map[string]string) (found *session, fresh bool, err error) {
	t.kernelMu.Lock()
	defer t.kernelMu.Unlock()
	if found := t.kernels[name]; found != nil {
		return found, false, nil
	}
	if len(t.kernels) >= maxKernels {
		return nil, false, link.Errorf("busy", "%d interpreters run already", maxKernels)
	}
	null := t.null.Fd()
	started, err := kernel.Start(t.children, made.path, made.argv, syscall.ProcAttr{
		Dir: made.directory, Env: made.environment, Files: []uintptr{null, null, null},
		Sys: &syscall.SysProcAttr{Setsid: true, Credential: made.user.Credential()},
	})
	if err != nil {
		return nil, false, spawnError(err, made)
	}
	found = &session{kernel: started, given: env, turn: make(chan struct{}, 1)}
	found.turn <- struct{}{}
	t.kernels[name] = found
	go func() {
		<-started.Child.Done
		started.Close()
		t.kernelMu.Lock()
		defer t.kernelMu.Unlock()
		if t.kernels[name] == found {
			delete(t.kernels, name)
		}
	}()
	return found, true, nil
}

// runCell waits for the interpreter, runs the cell and ends the process with what came of it.
func (t *Table) runCell(p *Process, at *session, made *plan, d *descriptors) {
	defer d.release()
	c := p.cell
	for {
		select {
		case <-at.turn:
		case <-at.kernel.Child.Done:
			// The cell before took the interpreter with it: this one has done nothing yet, so it gets a new one.
			next, fresh, err := t.session(c.name, made, c.env)
			if err != nil {
				p.endCell(nil, kernel.Reply{ExitCode: 1})
				return
			}
			p.mu.Lock()
			at, c.fresh, p.child = next, fresh, next.kernel.Child
			p.mu.Unlock()
			continue
		case <-c.stop:
			p.endCell(nil, kernel.Reply{})
			return
		}
		break
	}
	p.mu.Lock()
	c.running = at
	stopped := c.stopped
	p.mu.Unlock()
	if stopped {
		p.endCell(at, kernel.Reply{})
		return
	}
	files := [3]uintptr{d.child[0].Fd(), d.child[1].Fd(), d.child[2].Fd()}
	reply, err := at.kernel.Run(p.ID, c.code, at.take(c.env), files, p.cellBegun)
	d.release()
	if err != nil {
		// It ended by itself, or said what makes no sense: nothing that it says later can be told apart any more.
		_ = t.children.Signal(at.kernel.Child, syscall.SIGKILL, true)
		<-at.kernel.Child.Done
		c.lost = true
		p.endCell(nil, kernel.Reply{})
		return
	}
	t.kernelMu.Lock()
	at.threads = reply.Threads > 0
	t.kernelMu.Unlock()
	p.endCell(at, reply)
}

// take returns those of a cell's variables that no cell before it brought with this value: a cell that changed one keeps its change.
func (s *session) take(env map[string]string) map[string]string {
	news := map[string]string{}
	given := make(map[string]string, len(s.given)+len(env))
	for name, value := range s.given {
		given[name] = value
	}
	for name, value := range env {
		if known, ok := given[name]; !ok || known != value {
			news[name], given[name] = value, value
		}
	}
	s.given = given
	return news
}

// endCell gives the turn back, if the cell had one, and tells whoever waits. No signal for this cell can reach the next one.
func (p *Process) endCell(at *session, reply kernel.Reply) {
	p.mu.Lock()
	c := p.cell
	c.reply, c.exitCode, c.running, c.at, c.over = reply, reply.ExitCode, nil, time.Now(), true
	if c.signal != nil {
		c.exitCode = 128 + *c.signal
	}
	if c.lost {
		ended := p.child.Exit()
		c.exitCode = ended.Code()
		if ended.Status.Signaled() {
			number := int(ended.Status.Signal())
			c.signal = &number
		}
	}
	p.mu.Unlock()
	p.table.keepResults(p, len(reply.Results))
	if at != nil {
		at.turn <- struct{}{}
	}
	close(c.done)
}

// expireCell interrupts the cell, then its subprocesses too, and at last ends the interpreter. One that has not begun never does.
func (p *Process) expireCell() {
	p.mu.Lock()
	c := p.cell
	select {
	case <-c.done:
		p.mu.Unlock()
		return
	default:
	}
	p.timedOut = true
	if c.running == nil && !c.stopped {
		c.stopped = true
		close(c.stop)
	}
	p.mu.Unlock()
	_ = p.signalCell(syscall.SIGINT, false)
	for _, step := range []struct {
		after  time.Duration
		number syscall.Signal
	}{{interruptGrace, syscall.SIGINT}, {killGrace, syscall.SIGKILL}} {
		select {
		case <-c.done:
			return
		case <-time.After(step.after):
			_ = p.signalCell(step.number, true)
		}
	}
}

// signalCell reaches the interpreter while it runs this cell, another cell's is left alone; a cell whose turn has not come is called off.
func (p *Process) signalCell(number syscall.Signal, group bool) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	c := p.cell
	switch {
	case c.over:
		return syscall.ESRCH
	case c.running == nil:
		return c.callOff(number)
	case number == syscall.SIGINT && !group && !c.begun:
		// The interpreter may be starting, which an interrupt would end, or between two cells, where it does nothing.
		c.interrupted = true
		return nil
	}
	return p.table.children.Signal(c.running.kernel.Child, number, group)
}

// callOff keeps the cell from ever beginning, as if the signal had ended it. The process's lock is held.
func (c *cell) callOff(number syscall.Signal) error {
	switch number {
	case syscall.SIGCHLD, syscall.SIGCONT, syscall.SIGSTOP, syscall.SIGTSTP, syscall.SIGTTIN, syscall.SIGTTOU, syscall.SIGURG, syscall.SIGWINCH:
		return link.Errorf("bad_request", "signal: the cell waits for its turn, and %d ends nothing", int(number))
	}
	if !c.stopped {
		ended := int(number)
		c.stopped, c.signal = true, &ended
		close(c.stop)
	}
	return nil
}

// cellBegun is called when the interpreter has the cell.
func (p *Process) cellBegun() {
	p.mu.Lock()
	defer p.mu.Unlock()
	c := p.cell
	c.begun = true
	if c.interrupted {
		_ = p.table.children.Signal(c.running.kernel.Child, syscall.SIGINT, false)
	}
}

// Results serves the results verb: what the cell displayed, once.
func (t *Table) Results(stream *link.Stream, open link.Request) {
	var request struct {
		ID string `json:"id"`
	}
	if err := open.Decode(&request); err != nil {
		stream.Fail(err)
		return
	}
	p, err := t.find(request.ID)
	if err != nil {
		stream.Fail(err)
		return
	}
	p.mu.Lock()
	var data []byte
	if p.cell != nil {
		data = p.cell.reply.Results
	}
	p.mu.Unlock()
	buffer := make([]byte, link.HeaderBytes+readBuffer)
	for len(data) > 0 {
		want := len(data)
		if want > readBuffer {
			want = readBuffer
		}
		granted, err := stream.WaitCredit(want)
		if err != nil {
			return
		}
		copy(buffer[link.HeaderBytes:], data[:granted])
		if stream.SendTaken(link.Data, buffer[:link.HeaderBytes+granted]) != nil {
			return
		}
		data = data[granted:]
	}
	stream.Succeed(struct{}{})
}

// shown are results that are kept.
type shown struct {
	by    *Process
	bytes int
}

// keepResults forgets the oldest cells' results where all together are too many.
func (t *Table) keepResults(p *Process, bytes int) {
	if bytes == 0 {
		return
	}
	t.kernelMu.Lock()
	t.shown = append(t.shown, shown{p, bytes})
	total, first := 0, len(t.shown)
	for first > 0 && total+t.shown[first-1].bytes <= resultsBudget {
		first--
		total += t.shown[first].bytes
	}
	dropped := t.shown[:first]
	t.shown = append([]shown(nil), t.shown[first:]...)
	t.kernelMu.Unlock()
	for _, old := range dropped {
		old.by.mu.Lock()
		old.by.cell.reply.Results = nil
		old.by.mu.Unlock()
	}
}

// kernelPids are the interpreters that wait for a cell: they keep no guest awake.
func (t *Table) kernelPids(into map[int]bool) {
	t.kernelMu.Lock()
	defer t.kernelMu.Unlock()
	for _, found := range t.kernels {
		if !found.threads && len(found.turn) > 0 {
			into[found.kernel.Child.Pid] = true
		}
	}
}

// Package exec runs commands: their output journals, readers, timeouts and the spare shell.
package exec

import (
	"os"
	"sync"
	"syscall"
	"time"

	"innkeeper/guest/link"
	"innkeeper/guest/reaper"
	"innkeeper/guest/terminal"
)

const (
	// A reader that is this far behind makes the process wait, well before its journal would have to forget bytes.
	readerWindow = 256 << 10
	readBuffer   = 64 << 10
)

// Process is one execution, running or remembered.
type Process struct {
	ID    string
	table *Table
	child *reaper.Child
	cell  *cell // instead of a child of its own; then child is the interpreter
	pty   *os.File
	begun time.Time

	hasInput bool
	inputMu  sync.Mutex
	input    *os.File

	mu       sync.Mutex
	space    *sync.Cond // a reader took something, came or went
	journal  journal
	reader   *link.Stream
	sent     int64 // what the reader got, as an offset of the journal
	unread   int64 // forgotten before any reader got it
	outputs  []*output
	open     int
	timedOut bool
	exit     *exitMessage
	exitAt   int64 // the exit message follows this offset
	exitSent bool
	evicted  bool // no longer known by its id
}

// started is the child, or nil while the process is only being made.
func (p *Process) started() *reaper.Child {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.child
}

// forget gives up the output once nobody reads it any more.
func (p *Process) forget() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.evicted = true
	if p.reader == nil {
		p.trim(0)
	}
}

type startedMessage struct {
	Started bool   `json:"started"`
	Pid     int    `json:"pid"`
	Offset  *int64 `json:"offset,omitempty"`
	Dropped *int64 `json:"dropped_bytes,omitempty"`
}

type exitMessage struct {
	Exited        bool  `json:"exited"`
	ExitCode      int   `json:"exit_code"`
	Signal        *int  `json:"signal"`
	TimedOut      bool  `json:"timed_out"`
	DurationUs    int64 `json:"duration_us"`
	CPUUs         int64 `json:"cpu_us"`
	OutputBytes   int64 `json:"output_bytes"`
	DroppedBytes  int64 `json:"dropped_bytes"`
	UserProcesses int   `json:"user_processes"`

	Writes *uint64      `json:"writes,omitempty"`
	Cell   *cellMessage `json:"cell,omitempty"`
}

// over is closed when the work is done.
func (p *Process) over() <-chan struct{} {
	if p.cell != nil {
		return p.cell.done
	}
	return p.child.Done
}

// watch follows the process to its end; started with the process, in goroutines of its own.
func (p *Process) watch(timeout time.Duration) {
	var timer *time.Timer
	if timeout > 0 {
		timer = time.AfterFunc(timeout, p.expire)
	}
	for _, out := range p.outputs {
		go p.pump(out)
	}
	<-p.over()
	if timer != nil {
		timer.Stop()
	}
	p.leaderEnded()
}

func (p *Process) expire() {
	if p.cell != nil {
		p.expireCell()
		return
	}
	select {
	case <-p.child.Done:
		return
	default:
	}
	p.mu.Lock()
	p.timedOut = true
	p.mu.Unlock()
	_ = p.table.children.Signal(p.child, syscall.SIGKILL, true)
}

// leaderEnded sends what the leader left in the pipes and says that it ended; background children may go on writing.
func (p *Process) leaderEnded() {
	users := p.table.UserProcesses()
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, out := range p.outputs {
		p.drain(out)
	}
	message := p.howItEnded()
	message.UserProcesses = users
	if p.table.writes != nil {
		message.Writes = p.table.writes()
	}
	if p.timedOut {
		message.ExitCode = 124
	}
	p.exit = message
	p.exitAt = p.journal.end
	p.flush()
	p.table.ended(p)
}

func (p *Process) howItEnded() *exitMessage {
	message := &exitMessage{Exited: true, TimedOut: p.timedOut}
	if c := p.cell; c != nil {
		message.ExitCode, message.Signal, message.CPUUs = c.exitCode, c.signal, c.reply.CPUUs
		message.DurationUs = c.at.Sub(p.begun).Microseconds()
		message.Cell = &cellMessage{c.fresh, c.lost, len(c.reply.Results), c.reply.ResultsTruncated}
		return message
	}
	ended := p.child.Exit()
	message.ExitCode, message.CPUUs = ended.Code(), ended.CPU.Microseconds()
	message.DurationUs = ended.At.Sub(p.begun).Microseconds()
	if ended.Status.Signaled() {
		number := int(ended.Status.Signal())
		message.Signal = &number
	}
	return message
}

// flush sends the reader what its credit allows, then the exit message and the end when their turn has come. mu is held.
func (p *Process) flush() {
	if p.reader == nil {
		return
	}
	for p.sent < p.journal.end {
		if p.exit != nil && !p.exitSent && p.sent >= p.exitAt {
			break
		}
		kind, data := p.journal.at(p.sent)
		if p.exit != nil && !p.exitSent && p.sent+int64(len(data)) > p.exitAt {
			data = data[:p.exitAt-p.sent]
		}
		if len(data) > link.MaxPayload {
			data = data[:link.MaxPayload]
		}
		granted := p.reader.TakeCredit(len(data))
		if granted == 0 {
			return
		}
		if p.reader.SendFrames(link.Frame{Stream: p.reader.ID, Kind: kind, Payload: data[:granted]}) != nil {
			p.detach()
			return
		}
		p.sent += int64(granted)
		p.space.Broadcast()
	}
	p.flushEnd()
}

func (p *Process) flushEnd() {
	var frames []link.Frame
	if p.exit != nil && !p.exitSent && p.sent >= p.exitAt {
		message := *p.exit
		message.OutputBytes = p.journal.end
		message.DroppedBytes = p.unread
		frames = append(frames, p.reader.JSONFrame(link.Message, message))
		p.exitSent = true
	}
	over := p.exitSent && p.open == 0 && p.sent == p.journal.end
	if over {
		frames = append(frames, p.reader.JSONFrame(link.Result, struct{}{}))
	}
	if len(frames) == 0 {
		return
	}
	if p.reader.SendFrames(frames...) != nil || over {
		p.detach()
		return
	}
	if p.sent < p.journal.end {
		p.flush()
	}
}

// detach lets the process run on without a reader. mu is held.
func (p *Process) detach() {
	p.reader = nil
	if p.evicted {
		p.trim(0)
	}
	p.space.Broadcast()
}

// attach makes stream the reader from offset on.
func (p *Process) attach(stream *link.Stream, offset int64) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if offset < 0 || offset > p.journal.end {
		return link.Errorf("bad_request", "offset %d is not within the %d bytes of output", offset, p.journal.end)
	}
	if p.reader != nil {
		p.reader.Fail(link.Errorf("busy", "another reader took over execution %s", p.ID))
	}
	skipped := p.journal.start - offset
	if skipped < 0 {
		skipped = 0
	}
	offset += skipped
	p.reader, p.sent, p.exitSent = stream, offset, false
	message := startedMessage{Started: true, Pid: p.child.Pid, Offset: &offset, Dropped: &skipped}
	if stream.SendMessage(message) != nil {
		p.detach()
		return nil
	}
	p.space.Broadcast()
	p.flush()
	return nil
}

// serve follows one reader's wishes until its stream ends.
func (p *Process) serve(stream *link.Stream, detachOnCancel bool) {
	if p.hasInput {
		go p.feed(stream)
	}
	for range stream.Events() {
		p.mu.Lock()
		mine := p.reader == stream
		cancelled, broken := stream.State()
		if mine && (cancelled || broken) {
			p.detach()
		} else if mine {
			p.flush()
			mine = p.reader == stream
		}
		p.mu.Unlock()
		if cancelled && !detachOnCancel && mine {
			_ = p.signal(int(syscall.SIGKILL), true)
		}
		if cancelled || broken || !mine {
			return
		}
		p.obey(stream)
	}
}

// feed passes the opener's bytes to the process; a broken link leaves its input open for the next reader.
func (p *Process) feed(stream *link.Stream) {
	for {
		data, ok, err := stream.Read()
		if err != nil {
			return
		}
		if !ok {
			p.endInput()
			return
		}
		p.inputMu.Lock()
		file := p.input
		p.inputMu.Unlock()
		if file != nil {
			// A process that closed its input makes the rest of it disappear, as it does in a pipeline.
			_, _ = file.Write(data)
		}
	}
}

// endInput closes a pipe; a terminal has no end of input of its own.
func (p *Process) endInput() {
	p.inputMu.Lock()
	defer p.inputMu.Unlock()
	if p.input != nil && p.pty == nil {
		_ = p.input.Close()
		p.input = nil
	}
}

func (p *Process) running() bool {
	select {
	case <-p.over():
		return false
	default:
		return true
	}
}

func (p *Process) resize(size terminal.Size) {
	if p.pty != nil {
		_ = terminal.Resize(p.pty, p.child.Pid, size)
	}
}

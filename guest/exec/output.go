package exec

import (
	"os"
	"sync"
	"syscall"
	"unsafe"
)

// output is the agent's end of a pipe or terminal that the process writes to.
type output struct {
	file   *os.File
	raw    syscall.RawConn
	kind   byte
	closed bool
}

var buffers = sync.Pool{New: func() any { return new([readBuffer]byte) }}

func (p *Process) addOutput(file *os.File, kind byte) error {
	raw, err := file.SyscallConn()
	if err != nil {
		return err
	}
	p.outputs = append(p.outputs, &output{file: file, raw: raw, kind: kind})
	p.open++
	return nil
}

// pump reads one output until all its writers are gone.
func (p *Process) pump(out *output) {
	for {
		full := false
		err := out.raw.Read(func(descriptor uintptr) bool {
			p.mu.Lock()
			defer p.mu.Unlock()
			for !out.closed {
				if p.behind() {
					full = true
					return true
				}
				if !p.readOnce(out, int(descriptor), readBuffer) {
					return out.closed
				}
			}
			return true
		})
		p.mu.Lock()
		if err != nil && !out.closed {
			p.closeOutput(out)
		}
		if out.closed {
			p.flush()
			p.mu.Unlock()
			_ = out.file.Close()
			return
		}
		for full && p.behind() {
			p.space.Wait()
		}
		p.mu.Unlock()
	}
}

func (p *Process) behind() bool {
	return p.reader != nil && p.journal.end-p.sent >= readerWindow
}

// readOnce moves what is there, up to limit bytes, into the journal and to the reader. False: there was nothing.
func (p *Process) readOnce(out *output, descriptor, limit int) bool {
	buffer := buffers.Get().(*[readBuffer]byte)
	defer buffers.Put(buffer)
	if limit > readBuffer {
		limit = readBuffer
	}
	count, err := syscall.Read(descriptor, buffer[:limit])
	switch {
	case err == syscall.EAGAIN || err == syscall.EINTR:
		return err == syscall.EINTR
	case err != nil || count <= 0: // a terminal answers EIO when its last user is gone
		p.closeOutput(out)
		return false
	}
	p.append(out.kind, buffer[:count])
	p.flush()
	return true
}

func (p *Process) closeOutput(out *output) {
	if !out.closed {
		out.closed = true
		p.open--
	}
}

func (p *Process) append(kind byte, data []byte) {
	p.journal.append(kind, data)
	p.table.account(int64(len(data)))
	limit := int64(journalBytes)
	if p.evicted {
		limit = 0
	}
	p.trim(limit)
	if over := p.table.overBudget(); over > 0 {
		p.trim(p.journal.size() - over)
	}
}

// trim forgets the oldest bytes above limit, but none that a reader still waits for.
func (p *Process) trim(limit int64) {
	excess := p.journal.size() - limit
	if p.reader != nil && p.journal.start+excess > p.sent {
		excess = p.sent - p.journal.start
	}
	if excess <= 0 {
		return
	}
	start := p.journal.start
	p.journal.drop(excess)
	p.table.account(start - p.journal.start)
	if p.journal.start > p.sent {
		from := p.sent
		if start > from {
			from = start
		}
		p.unread += p.journal.start - from
	}
}

// drain reads no more than what is in the pipe now: a background child may write for ever.
func (p *Process) drain(out *output) {
	if out.closed {
		return
	}
	_ = out.raw.Control(func(descriptor uintptr) {
		left := waiting(int(descriptor))
		for left > 0 && !out.closed {
			before := p.journal.end
			if !p.readOnce(out, int(descriptor), left) {
				return
			}
			left -= int(p.journal.end - before)
		}
		// The end of file is not counted as waiting: one more look says whether anybody can still write.
		if !out.closed {
			p.readOnce(out, int(descriptor), readBuffer)
		}
	})
}

// waiting is the number of bytes in a pipe or terminal.
func waiting(descriptor int) int {
	const fionread = 0x541b
	var count int32
	if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, uintptr(descriptor), fionread, uintptr(unsafe.Pointer(&count))); errno != 0 {
		return 0
	}
	return int(count)
}

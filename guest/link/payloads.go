package link

import "sync"

const (
	// Of bulk frames only: what is small is cheap to make.
	smallPayload = 32 << 10
	// As many as the credit of one stream holds.
	keptPayloads = InitialCredit / MaxPayload
)

// payloads keeps the memory of bulk frames for the next ones. Memory that was not used before is dear in gVisor, where the first touch of
// every page is a trip through its kernel.
type payloads struct {
	mu   sync.Mutex
	kept [][]byte
}

// take returns a buffer of that length, with whatever was in it.
func (p *payloads) take(length int) []byte {
	if length >= smallPayload {
		p.mu.Lock()
		defer p.mu.Unlock()
		for index, buffer := range p.kept {
			if cap(buffer) >= length {
				last := len(p.kept) - 1
				p.kept[index], p.kept[last] = p.kept[last], nil
				p.kept = p.kept[:last]
				return buffer[:length]
			}
		}
	}
	return make([]byte, length)
}

// give takes a buffer back that nobody uses any more.
func (p *payloads) give(buffer []byte) {
	if cap(buffer) < smallPayload {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.kept) < keptPayloads {
		p.kept = append(p.kept, buffer[:0])
	}
}

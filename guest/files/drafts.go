package files

import (
	"sync"
	"time"
)

// How long a watch may take to hear of a rename that the agent made.
const draftMemory = 5 * time.Second

// drafts knows which of the files that were just written replaced another one: a watch sees only their last rename.
type drafts struct {
	mu       sync.Mutex
	replaced map[string]bool
}

// note is called with the name of a draft before it is renamed over what it replaces.
func (d *drafts) note(name string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.replaced == nil {
		d.replaced = map[string]bool{}
	}
	d.replaced[name] = true
	time.AfterFunc(draftMemory, func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		delete(d.replaced, name)
	})
}

func (d *drafts) has(name string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.replaced[name]
}

package changes

import "syscall"

// Nine tenths of a scan are the kernel's, in calls that nothing makes shorter, so a second goroutine makes part of them: while
// the walk goes through the first names of a long listing, the metadata of the last ones is fetched beside it.
const (
	// A shorter part is over before another thread has woken up.
	aheadNames = 64
	// At once, so that the memory does not depend on the size of a directory.
	maxAheadNames = 512
)

// ahead is the metadata of the names first … last-1 of a listing.
type ahead struct {
	first, last int
	entries     []aheadEntry
	done        chan struct{}
}

type aheadEntry struct {
	meta meta
	err  error
}

// fetch begins with a part of the names i … last-1 of a listing of the directory fd, or does nothing where there are too few of
// them. fd must stay open, and the listing be kept, until wait.
func (a *ahead) fetch(n *names, fd, i, last int) {
	share := last - i
	if share > 2*maxAheadNames {
		share = 2 * maxAheadNames
	}
	if share < 2*aheadNames {
		return
	}
	a.first, a.last = i+share/2, i+share
	if cap(a.entries) < a.last-a.first {
		a.entries = make([]aheadEntry, maxAheadNames)
	}
	a.entries = a.entries[:a.last-a.first]
	a.done = make(chan struct{})
	// The arena may grow, and so move, meanwhile; what is in it stays as it is.
	go a.run(n.arena, n.index[a.first:a.last], fd)
}

func (a *ahead) run(arena []byte, index []nameRef, fd int) {
	defer close(a.done)
	var st syscall.Stat_t
	for i := range index {
		entry := &a.entries[i]
		if entry.err = statAt(fd, &arena[index[i].offset], &st); entry.err == nil {
			entry.meta = metaOf(&st)
		}
	}
}

// at is what was fetched of name i, or nil where it was not among them.
func (a *ahead) at(i int) *aheadEntry {
	if i < a.first || i >= a.last {
		return nil
	}
	a.wait()
	return &a.entries[i-a.first]
}

// wait returns when nothing is being fetched any more; safe to repeat.
func (a *ahead) wait() {
	if a.done != nil {
		<-a.done
		a.done = nil
	}
}

package files

import (
	"container/heap"
	"io"
	"os"
	"sort"
	"syscall"
)

// readAtOnce is how many names a directory is asked for at a time.
const readAtOnce = 4096

// namesAfter are the first names of a directory, in order of their bytes, that come after the given one: at most limit of them, however many
// there are. more says whether there are others. The directory itself may not be a symlink where noFollow says so.
func namesAfter(path, after string, limit int, noFollow bool) (names []string, more bool, err error) {
	flags := syscall.O_RDONLY | syscall.O_DIRECTORY | syscall.O_CLOEXEC | syscall.O_NONBLOCK
	if noFollow {
		flags |= syscall.O_NOFOLLOW
	}
	descriptor, err := syscall.Open(path, flags, 0)
	if err != nil {
		return nil, false, wrap("open", path, err)
	}
	directory := os.NewFile(uintptr(descriptor), path)
	defer directory.Close()
	var least largestFirst
	for {
		some, err := directory.Readdirnames(readAtOnce)
		for _, name := range some {
			switch {
			case name <= after:
			case len(least) < limit:
				heap.Push(&least, name)
			default:
				more = true
				if name < least[0] {
					least[0] = name
					heap.Fix(&least, 0)
				}
			}
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, false, err
		}
	}
	sort.Strings(least)
	return least, more, nil
}

// largestFirst is a heap whose first name is the one to give up for a smaller one.
type largestFirst []string

func (h largestFirst) Len() int           { return len(h) }
func (h largestFirst) Less(i, j int) bool { return h[i] > h[j] }
func (h largestFirst) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }

// Push and Pop are for package heap.
func (h *largestFirst) Push(name any) { *h = append(*h, name.(string)) }

// Pop takes the last one.
func (h *largestFirst) Pop() any {
	last := (*h)[len(*h)-1]
	*h = (*h)[:len(*h)-1]
	return last
}

package files

import (
	"encoding/binary"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"innkeeper/guest/account"
	"innkeeper/guest/link"
)

const (
	watchDirectories = 8192
	watchPending     = 4096 // events that wait for a slow reader
	// What happens to a path within this time is told once.
	watchPause = 50 * time.Millisecond
	// The two halves of a rename come one after the other, but not always in one read.
	watchHalf = 20 * time.Millisecond
	watchMask = syscall.IN_CREATE | syscall.IN_MODIFY | syscall.IN_DELETE | syscall.IN_MOVED_FROM | syscall.IN_MOVED_TO |
		syscall.IN_DELETE_SELF | syscall.IN_MOVE_SELF | syscall.IN_ONLYDIR | syscall.IN_DONT_FOLLOW
)

// Watch serves the watch verb: what changes in a directory, or in the tree below it, as lines of JSON until the opener cancels.
func (s *Store) Watch(stream *link.Stream, open link.Request) {
	request := struct {
		Location
		Recursive bool `json:"recursive"`
	}{}
	if err := s.Resolve(open, &request, &request.Location); err != nil {
		stream.Fail(err)
		return
	}
	descriptor, err := syscall.InotifyInit1(syscall.IN_NONBLOCK | syscall.IN_CLOEXEC)
	if err != nil {
		stream.Fail(wrap("watch", request.Path, err))
		return
	}
	w := &watch{
		store: s, account: request.Account, recursive: request.Recursive,
		notifications: os.NewFile(uintptr(descriptor), "inotify"), descriptor: descriptor,
		folders: map[int32]string{}, watches: map[string]int32{}, news: make(chan struct{}, 1),
	}
	defer w.notifications.Close()
	if err = account.As(w.account, func() error { return w.begin(request.Path) }); err != nil {
		stream.Fail(err)
		return
	}
	if stream.SendMessage(struct {
		Directories int `json:"directories"`
	}{len(w.watches)}) != nil {
		return
	}
	ended := make(chan error, 1)
	go func() { ended <- w.follow() }()
	answer(stream, w.tell(stream, ended), struct{}{})
}

type watch struct {
	store         *Store
	account       account.User
	recursive     bool
	notifications *os.File
	descriptor    int

	// Of follow alone.
	folders map[int32]string
	watches map[string]int32
	root    int32
	half    *half

	mu       sync.Mutex
	pending  []watchEvent
	latest   map[string]string // of each path in pending, the type of its last event
	overflow bool
	news     chan struct{} // has a token when pending or overflow changed
}

// half is a rename of which only the old name is known yet.
type half struct {
	cookie    uint32
	path      string
	directory bool
}

func (w *watch) begin(path string) error {
	path = strings.TrimRight(path, "/") // of "/" nothing is left, which is what the names below begin with
	number, err := w.add(path)
	if err != nil {
		return err
	}
	w.root = number
	if w.recursive {
		return w.descend(path, nil)
	}
	return nil
}

func (w *watch) add(path string) (int32, error) {
	name := path
	if name == "" {
		name = "/"
	}
	mask := uint32(watchMask)
	if len(w.watches) == 0 {
		mask &^= syscall.IN_DONT_FOLLOW // the path that was asked for may be a symlink
	}
	// gVisor's inotify asks for no permission to read what is watched.
	readable, err := syscall.Open(name, syscall.O_RDONLY|syscall.O_DIRECTORY|syscall.O_CLOEXEC|syscall.O_NONBLOCK, 0)
	if err != nil {
		return 0, wrap("watch", name, err)
	}
	_ = syscall.Close(readable)
	number, err := syscall.InotifyAddWatch(w.descriptor, name, mask)
	if err != nil {
		return 0, wrap("watch", name, err)
	}
	if old, known := w.folders[int32(number)]; known {
		delete(w.watches, old)
	}
	w.folders[int32(number)], w.watches[path] = path, int32(number)
	if len(w.watches) > watchDirectories {
		return 0, link.Errorf("too_large", "more than %d directories lie below; watch a smaller tree", watchDirectories)
	}
	return int32(number), nil
}

// descend watches the directories below one; seen is told of everything that lies there already.
func (w *watch) descend(path string, seen func(path string, directory bool)) error {
	after := ""
	for {
		names, more, err := namesAfter(path+"/", after, walkNames, false)
		if err != nil {
			return nil // gone, or not the user's to read
		}
		for _, name := range names {
			one := path + "/" + name
			var status syscall.Stat_t
			if syscall.Lstat(one, &status) != nil {
				continue
			}
			directory := status.Mode&syscall.S_IFMT == syscall.S_IFDIR
			if seen != nil && !isDraft(name) {
				seen(one, directory)
			}
			if !directory || notEntered[one] || isDraft(name) {
				continue
			}
			if _, err := w.add(one); err != nil {
				if link.AsError(err).Code == "too_large" {
					return err
				}
				continue // not the user's to read, or gone
			}
			if err := w.descend(one, seen); err != nil {
				return err
			}
		}
		if !more {
			return nil
		}
		after = names[len(names)-1]
	}
}

// follow reads notifications until the watched directory is gone (nil) or something fails.
func (w *watch) follow() error {
	buffer := make([]byte, 64<<10)
	for {
		deadline := time.Time{}
		if w.half != nil {
			deadline = time.Now().Add(watchHalf)
		}
		_ = w.notifications.SetReadDeadline(deadline)
		count, err := w.notifications.Read(buffer)
		if os.IsTimeout(err) {
			w.movedAway()
			continue
		}
		if err != nil {
			return err
		}
		over := false
		err = account.As(w.account, func() (err error) {
			over, err = w.take(buffer[:count])
			return err
		})
		if over || err != nil {
			return err
		}
	}
}

// take handles what one read brought; over says that the watched directory is gone.
func (w *watch) take(notifications []byte) (over bool, err error) {
	for len(notifications) >= syscall.SizeofInotifyEvent {
		number := int32(binary.LittleEndian.Uint32(notifications))
		mask := binary.LittleEndian.Uint32(notifications[4:])
		cookie := binary.LittleEndian.Uint32(notifications[8:])
		end := syscall.SizeofInotifyEvent + int(binary.LittleEndian.Uint32(notifications[12:]))
		name := strings.TrimRight(string(notifications[syscall.SizeofInotifyEvent:end]), "\x00")
		notifications = notifications[end:]
		if mask&syscall.IN_Q_OVERFLOW != 0 {
			w.lost()
			if err := w.rescan(); err != nil {
				return false, err
			}
			continue
		}
		folder, known := w.folders[number]
		switch {
		case !known:
		case mask&(syscall.IN_IGNORED|syscall.IN_DELETE_SELF|syscall.IN_UNMOUNT) != 0 || mask&syscall.IN_MOVE_SELF != 0 && number == w.root:
			if number == w.root {
				w.movedAway()
				w.event(newEvent("deleted", orRoot(folder), true))
				return true, nil
			}
			if mask&syscall.IN_IGNORED != 0 {
				w.forget(number)
			}
		case mask&syscall.IN_MOVE_SELF != 0:
		default:
			if err := w.one(folder+"/"+name, name, mask, cookie); err != nil {
				return false, err
			}
		}
	}
	return false, nil
}

func (w *watch) one(path, name string, mask, cookie uint32) error {
	directory := mask&syscall.IN_ISDIR != 0
	if w.half != nil && (mask&syscall.IN_MOVED_TO == 0 || w.half.cookie != cookie) {
		w.movedAway()
	}
	switch {
	case mask&syscall.IN_MOVED_FROM != 0:
		w.half = &half{cookie, path, directory}
	case mask&syscall.IN_MOVED_TO != 0:
		from := w.half
		w.half = nil
		return w.arrived(path, directory, from)
	case isDraft(name):
	case mask&syscall.IN_CREATE != 0:
		w.event(newEvent("created", path, directory))
		if directory {
			return w.enter(path)
		}
	case mask&syscall.IN_MODIFY != 0:
		w.event(newEvent("modified", path, directory))
	case mask&syscall.IN_DELETE != 0:
		w.event(newEvent("deleted", path, directory))
	}
	return nil
}

// arrived is a name that a rename gave.
func (w *watch) arrived(path string, directory bool, from *half) error {
	switch {
	case isDraft(baseOf(path)): // an archive's tree on its way
		return nil
	case from == nil:
		w.event(newEvent("created", path, directory))
	case isDraft(baseOf(from.path)):
		// The agent's own write: what was there before is what counts.
		kind := "created"
		if w.store.drafts.has(baseOf(from.path)) {
			kind = "modified"
		}
		w.event(newEvent(kind, path, directory))
	default:
		event := newEvent("moved", path, directory)
		event.From, event.FromB64 = encodeName(from.path)
		w.event(event)
		if directory {
			w.rename(from.path, path)
			return nil
		}
	}
	if directory {
		return w.enter(path)
	}
	return nil
}

// movedAway tells of the old name of a rename whose new name lies elsewhere.
func (w *watch) movedAway() {
	if w.half == nil {
		return
	}
	gone := w.half
	w.half = nil
	if !isDraft(baseOf(gone.path)) {
		w.event(newEvent("deleted", gone.path, gone.directory))
	}
	if gone.directory {
		for path, number := range w.watches {
			if path == gone.path || strings.HasPrefix(path, gone.path+"/") {
				_, _ = syscall.InotifyRmWatch(w.descriptor, uint32(number))
				w.forget(number)
			}
		}
	}
}

// enter watches a directory that came up, and tells of what it held before it was watched.
func (w *watch) enter(path string) error {
	if !w.recursive {
		return nil
	}
	if _, err := w.add(path); err != nil {
		if link.AsError(err).Code == "too_large" {
			return err
		}
		return nil
	}
	return w.descend(path, func(one string, directory bool) { w.event(newEvent("created", one, directory)) })
}

// rescan watches what came up while notifications were lost.
func (w *watch) rescan() error {
	if !w.recursive {
		return nil
	}
	return w.descend(w.folders[w.root], nil)
}

func (w *watch) rename(from, to string) {
	for path, number := range w.watches {
		if path == from || strings.HasPrefix(path, from+"/") {
			delete(w.watches, path)
			moved := to + path[len(from):]
			w.watches[moved], w.folders[number] = number, moved
		}
	}
}

func (w *watch) forget(number int32) {
	if path, known := w.folders[number]; known && w.watches[path] == number {
		delete(w.watches, path)
	}
	delete(w.folders, number)
}

func orRoot(path string) string {
	if path == "" {
		return "/"
	}
	return path
}

func baseOf(path string) string { return path[strings.LastIndexByte(path, '/')+1:] }

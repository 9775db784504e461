package files

import (
	"encoding/base64"
	"strings"
	"syscall"
	"time"

	"innkeeper/guest/link"
)

const (
	// What one page of a walk may look at; the next page goes on behind it.
	walkEntries = 50_000
	walkTime    = 2 * time.Second
	// Names of one directory that are held at a time.
	walkNames = 65_536
)

// notEntered are the kernel's: walks that begin outside do not go there.
var notEntered = map[string]bool{"/proc": true, "/sys": true, "/dev": true, "/.innkeeper": true}

// walker goes through a tree, a directory before what it holds and names in order of their bytes. No symlink is followed.
type walker struct {
	root  string
	after []string // the path that an earlier page came to
	// enter says whether to look into a directory; visit takes an entry and says whether to go on.
	enter      func(relative string) bool
	visit      func(relative string, status *syscall.Stat_t) (bool, error)
	left       int
	held       int // names of a directory at a time
	deadline   time.Time
	last       string // the last entry that was visited
	unreadable int    // directories that could not be looked into
}

func newWalker(root, after string) *walker {
	w := &walker{root: strings.TrimRight(root, "/"), left: walkEntries, held: walkNames, deadline: time.Now().Add(walkTime), last: after}
	if after != "" {
		w.after = strings.Split(after, "/")
	}
	return w
}

// run walks; done is false where a limit, or visit, ended it before the end of the tree.
func (w *walker) run() (done bool, err error) {
	return w.directory("", w.after)
}

func (w *walker) directory(relative string, after []string) (bool, error) {
	path := w.root + "/" + relative
	from := ""
	if len(after) > 0 {
		from = after[0]
		// What lies below the cursor's own directory comes first.
		done, err := w.below(join(relative, after[0]), after[1:])
		if !done || err != nil {
			return done, err
		}
	}
	for {
		names, more, err := namesAfter(path, from, w.held, relative != "")
		if err != nil && relative == "" {
			return false, err
		}
		if err != nil {
			w.unreadable++
			return true, nil
		}
		for _, name := range names {
			if w.left == 0 || w.left%256 == 0 && time.Now().After(w.deadline) {
				return false, nil
			}
			w.left--
			one := join(relative, name)
			var status syscall.Stat_t
			if syscall.Lstat(w.root+"/"+one, &status) != nil {
				continue // removed meanwhile
			}
			goOn, err := w.visit(one, &status)
			if err != nil {
				return false, err
			}
			w.last = one
			if !goOn {
				return false, nil
			}
			if status.Mode&syscall.S_IFMT != syscall.S_IFDIR {
				continue
			}
			if done, err := w.below(one, nil); !done || err != nil {
				return done, err
			}
		}
		if !more {
			return true, nil
		}
		from = names[len(names)-1]
	}
}

// below goes into a directory that was visited; anything else has nothing below it.
func (w *walker) below(relative string, after []string) (bool, error) {
	var status syscall.Stat_t
	path := w.root + "/" + relative
	if notEntered[path] || !w.enter(relative) || syscall.Lstat(path, &status) != nil || status.Mode&syscall.S_IFMT != syscall.S_IFDIR {
		return true, nil
	}
	return w.directory(relative, after)
}

func join(relative, name string) string {
	if relative == "" {
		return name
	}
	return relative + "/" + name
}

func encodeCursor(text string) string { return base64.StdEncoding.EncodeToString([]byte(text)) }

func decodeCursor(verb, text string) (string, error) {
	bytes, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		return "", link.Errorf("bad_request", "%s: cursor: %v", verb, err)
	}
	return string(bytes), nil
}

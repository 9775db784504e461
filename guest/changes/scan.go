package changes

import (
	"bytes"
	"context"
	"syscall"
)

// maxPath is Linux's own limit: what lies deeper than a path can say cannot be named, opened or published either.
const maxPath = 4095

// scan compares two views of one guest: the baseline over the layers, and the upper directory as it is now over the same
// layers. Both are walked together in the order of names; the layers are asked only where the two sides differ.
type scan struct {
	ctx      context.Context
	upper    int // the upper directory
	layers   layers
	old      *baselineReader // nil: everything is new, and nothing is reported
	new      *baselineWriter
	result   *resultWriter // nil when there is no old
	excluded [][]byte

	names   *names
	path    []byte // of the directory or entry at hand: "" or "/a/b"
	cname   []byte
	visited int
	newest  int64 // ctime of the newest difference
	spare   []*ahead
}

// side is one view's part of one directory.
type side struct {
	here bool // the baseline, or the upper directory, holds this directory itself
	sees bool // the layers below show through
}

// frame is an open directory of the upper.
type frame struct {
	fd    int // -1: closed for the time being
	inode uint64
	depth int
	gone  bool
}

func (s *scan) run() error {
	root := &lowerDir{resolved: true, layers: make([]int, len(s.layers.roots)), fds: s.layers.roots}
	for i := range root.layers {
		root.layers[i] = i
	}
	if s.old == nil {
		if err := s.new.start(nil); err != nil {
			return err
		}
	}
	top, err := s.open(s.upper, []byte(".\x00"), 0)
	if err != nil {
		return err
	}
	defer top.close()
	if s.old == nil {
		return s.directory(side{}, side{here: true}, top, root) // nothing to compare, so no need to look below
	}
	return s.directory(side{true, true}, side{true, true}, top, root)
}

// open is the directory name in dirfd as a frame.
func (s *scan) open(dirfd int, name []byte, depth int) (*frame, error) {
	fd, err := openDir(dirfd, name)
	if err != nil {
		return nil, err
	}
	var st syscall.Stat_t
	if err := syscall.Fstat(fd, &st); err != nil {
		syscall.Close(fd)
		return nil, err
	}
	return &frame{fd: fd, inode: st.Ino, depth: depth}, nil
}

func (f *frame) close() {
	if f != nil && f.fd >= 0 {
		syscall.Close(f.fd)
		f.fd = -1
	}
}

// reopen makes the frame's descriptor usable again after a child was scanned, if its directory is still the same one.
func (s *scan) reopen(f *frame) error {
	if f.fd >= 0 || f.gone {
		return nil
	}
	again, err := s.open(s.upper, append(append([]byte(nil), s.path[1:]...), 0), f.depth)
	if err == nil && again.inode != f.inode {
		again.close()
		err = syscall.ENOENT
	}
	if err != nil {
		if vanished(err) || offMount(err) {
			f.gone = true
			return nil
		}
		return err
	}
	f.fd = again.fd
	return nil
}

// directory compares the directory at s.path. f is nil when the upper does not hold it.
func (s *scan) directory(before, after side, f *frame, low *lowerDir) error {
	if err := s.ctx.Err(); err != nil {
		return err
	}
	defer low.close()
	var now, below listing
	var err error
	if f != nil {
		if now, err = s.names.add(f.fd); err != nil {
			return err
		}
		defer now.drop()
	}
	if before.sees != after.sees {
		// One side hides what the other shows: every name of the layers counts.
		if below, err = low.list(&s.layers, s.path, s.names); err != nil {
			return err
		}
		defer below.drop()
	}
	excluding := s.mayExclude()
	fetched := s.takeAhead()
	defer s.giveAhead(fetched)
	i, j := now.first, below.first
	for {
		var name []byte
		if i < now.last {
			name = s.names.name(s.names.index[i])
		}
		if before.here && !s.old.end && (name == nil || bytes.Compare(s.old.name, name) < 0) {
			name = s.old.name
		}
		if j < below.last {
			if b := s.names.name(s.names.index[j]); name == nil || bytes.Compare(b, name) < 0 {
				name = b
			}
		}
		if name == nil {
			break
		}
		s.cname = append(append(s.cname[:0], name...), 0)
		name = s.cname[:len(name)]
		inUpper := i < now.last && bytes.Equal(s.names.name(s.names.index[i]), name)
		var known *aheadEntry
		if inUpper {
			if i >= fetched.last && f.fd >= 0 && f.depth < openDepth {
				fetched.fetch(s.names, f.fd, i, now.last)
			}
			known = fetched.at(i)
			i++
		}
		if j < below.last && bytes.Equal(s.names.name(s.names.index[j]), name) {
			j++
		}
		s.path = append(append(s.path, '/'), name...)
		if len(s.path) > maxPath || excluding && s.isExcluded() {
			if before.here && !s.old.end && bytes.Equal(s.old.name, name) {
				if err = s.differs(); err == nil {
					err = s.old.skip()
				}
			}
		} else {
			err = s.entry(before, after, f, inUpper, known, low)
		}
		s.path = s.path[:len(s.path)-len(name)-1]
		if err != nil {
			return err
		}
		if f != nil {
			if err := s.reopen(f); err != nil {
				return err
			}
		}
	}
	if before.here {
		if len(s.path) == 0 {
			return s.new.end() // what follows the root's end mark is no record
		}
		if err := s.old.next(); err != nil {
			return err
		}
	}
	if f != nil {
		return s.new.end()
	}
	return nil
}

// takeAhead is for the names of one directory, giveAhead for the end of it.
func (s *scan) takeAhead() *ahead {
	last := len(s.spare) - 1
	if last < 0 {
		return &ahead{}
	}
	taken := s.spare[last]
	s.spare = s.spare[:last]
	return taken
}

func (s *scan) giveAhead(a *ahead) {
	a.wait()
	a.first, a.last = 0, 0
	s.spare = append(s.spare, a)
}

// differs notes that the new baseline is not the old one, from this record on.
func (s *scan) differs() error {
	if s.new.active {
		return nil
	}
	return s.new.start(s.old)
}

// entry compares what both sides show at s.path, whose last component is s.cname. known is its metadata in the upper, or nil.
func (s *scan) entry(before, after side, f *frame, inUpper bool, known *aheadEntry, low *lowerDir) error {
	s.visited++
	if s.visited%4096 == 0 {
		if err := s.ctx.Err(); err != nil {
			return err
		}
	}
	name := s.cname[:len(s.cname)-1]
	var was, is meta
	if before.here && !s.old.end && bytes.Equal(s.old.name, name) {
		was = s.old.meta
	}
	var inner *frame
	if inUpper && !f.gone {
		var err error
		if is, inner, err = s.inUpper(f, known); err != nil {
			return err
		}
		defer inner.close()
	}
	if was.leaf() && is.leaf() && s.unchanged(&was, &is, f) {
		if err := s.new.put(name, &is); err != nil {
			return err
		}
		return s.old.next()
	}
	if was.kind != is.kind || was.opaque != is.opaque || was.leaf() {
		if is.leaf() && is.ctime > s.newest {
			s.newest = is.ctime
		}
		if err := s.differs(); err != nil {
			return err
		}
	}
	if is.kind != absent {
		if err := s.new.put(name, &is); err != nil {
			return err
		}
	}
	if was.kind != absent {
		if err := s.old.next(); err != nil {
			return err
		}
	}
	return s.views(before, after, was, is, f, inner, low)
}

// inUpper is what the upper directory holds under s.cname; a directory comes open.
func (s *scan) inUpper(f *frame, known *aheadEntry) (meta, *frame, error) {
	if known == nil {
		var st syscall.Stat_t
		known = &aheadEntry{err: statAt(f.fd, &s.cname[0], &st)}
		known.meta = metaOf(&st)
	}
	if known.err != nil {
		if vanished(known.err) {
			return meta{}, nil, nil
		}
		return meta{}, nil, known.err
	}
	m := known.meta
	if m.kind != directory {
		return m, nil, nil
	}
	inner, err := s.open(f.fd, s.cname, f.depth+1)
	if err != nil {
		if vanished(err) || offMount(err) {
			return meta{}, nil, nil
		}
		return meta{}, nil, err
	}
	m.opaque = isOpaque(inner.fd)
	return m, inner, nil
}

// unchanged says whether a file of the baseline is still the same file to its users.
func (s *scan) unchanged(was, is *meta, f *frame) bool {
	if was.kind == special || is.kind == special {
		return was.kind == is.kind
	}
	if !was.looksLike(is) {
		return false
	}
	if was.inode == is.inode {
		return true
	}
	// Another file with the very same size, times and owner. Either someone put an equal one back and set its time
	// (cp -p, tar), or one that was written in the same clock tick was renamed over it: only the former is older than
	// its own inode.
	birth, known := birthAt(f.fd, &s.cname[0])
	return known && is.mtime < birth
}

// views reports what differs between the two merged views at s.path, and goes into directories.
func (s *scan) views(before, after side, was, is meta, f, inner *frame, low *lowerDir) error {
	if s.old == nil && is.kind != directory {
		return nil // a first baseline reports nothing
	}
	inBefore := side{was.kind == directory, false}
	inAfter := side{is.kind == directory, false}
	shownBefore, shownAfter := was, is
	if (was.kind == absent && before.sees) || (is.kind == absent && after.sees) {
		lower, _, err := low.lookup(&s.layers, s.path[:low.pathLen], s.cname)
		if err != nil {
			return err
		}
		if was.kind == absent && before.sees {
			shownBefore = lower
		}
		if is.kind == absent && after.sees {
			shownAfter = lower
		}
	}
	inBefore.sees = before.sees && shownBefore.kind == directory && !shownBefore.opaque
	inAfter.sees = after.sees && shownAfter.kind == directory && !shownAfter.opaque
	if s.result != nil {
		replaced := was.leaf() && is.leaf() // and not unchanged, or the entry would not have come here
		if err := s.report(&shownBefore, &shownAfter, replaced); err != nil {
			return err
		}
	}
	if shownBefore.kind != directory && shownAfter.kind != directory {
		return nil
	}
	if f != nil && f.depth >= openDepth {
		f.close()
	}
	return s.directory(inBefore, inAfter, inner, low.child(len(s.path)))
}

func (s *scan) report(was, is *meta, replaced bool) error {
	switch {
	case was.listed() && !is.listed():
		return s.result.row(deleted, was, s.path)
	case !was.listed() && is.listed():
		return s.result.row(created, is, s.path)
	case was.listed() && is.listed() && (replaced || !was.looksLike(is)):
		return s.result.row(modified, is, s.path)
	}
	return nil
}

// mayExclude says whether an excluded path lies in the directory at s.path.
func (s *scan) mayExclude() bool {
	for _, e := range s.excluded {
		if len(e) > len(s.path) && bytes.HasPrefix(e, s.path) && e[len(s.path)] == '/' {
			return true
		}
	}
	return false
}

func (s *scan) isExcluded() bool {
	for _, e := range s.excluded {
		if bytes.Equal(e, s.path) {
			return true
		}
	}
	return false
}

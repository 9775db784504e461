package changes

import "syscall"

// Directories deeper than this keep no descriptor while something below them is scanned, so that a scan of a tree of any
// depth over twenty layers stays under 400 descriptors. They are opened again by path when their turn comes.
const openDepth = 16

// layers are the read-only trees below a guest's upper directory, topmost first.
type layers struct {
	roots   []int
	scratch []byte
}

// lowerDir is the union of the layers at one directory. It is resolved when first asked: a scan that finds nothing new
// never looks below the upper directory.
type lowerDir struct {
	parent   *lowerDir
	pathLen  int // this directory's path is the scan's current path up to here
	depth    int
	resolved bool
	layers   []int // those that hold this directory, topmost first
	fds      []int // beside layers; -1 is not open
}

func (d *lowerDir) child(pathLen int) *lowerDir {
	return &lowerDir{parent: d, pathLen: pathLen, depth: d.depth + 1}
}

func (d *lowerDir) close() {
	if d.parent == nil {
		return
	}
	for i, fd := range d.fds {
		if fd >= 0 {
			syscall.Close(fd)
			d.fds[i] = -1
		}
	}
}

func (d *lowerDir) resolve(l *layers, path []byte) error {
	if d.resolved {
		return nil
	}
	name := append(append([]byte(nil), path[d.parent.pathLen+1:d.pathLen]...), 0)
	found, below, err := d.parent.lookup(l, path, name)
	if err != nil {
		return err
	}
	if found.kind == directory {
		d.layers = below
		d.fds = make([]int, len(below))
		for i := range d.fds {
			d.fds[i] = -1
		}
	}
	d.resolved = true
	return nil
}

// fd opens layer i of this directory; done must be called when it is not needed for the moment.
func (d *lowerDir) fd(l *layers, path []byte, i int) (fd int, done func(), err error) {
	if d.fds[i] >= 0 {
		return d.fds[i], func() {}, nil
	}
	relative := append(append(l.scratch[:0], path[1:d.pathLen]...), 0)
	l.scratch = relative
	fd, err = openDir(l.roots[d.layers[i]], relative)
	if err != nil {
		return -1, func() {}, err
	}
	if d.depth <= openDepth {
		d.fds[i] = fd
		return fd, func() {}, nil
	}
	return fd, func() { syscall.Close(fd) }, nil
}

// lookup is what the layers show under name (NUL-terminated) in this directory; for a directory also the layers that it
// is merged from.
func (d *lowerDir) lookup(l *layers, path []byte, name []byte) (meta, []int, error) {
	if err := d.resolve(l, path); err != nil {
		return meta{}, nil, err
	}
	var found meta
	var below []int
	for i, layer := range d.layers {
		fd, done, err := d.fd(l, path, i)
		if err != nil {
			return meta{}, nil, err
		}
		var st syscall.Stat_t
		err = statAt(fd, &name[0], &st)
		if err == syscall.ENOENT {
			done()
			continue
		}
		if err != nil {
			done()
			return meta{}, nil, err
		}
		m := metaOf(&st)
		if m.kind != directory {
			done()
			if found.kind == absent && m.kind != whiteout {
				found = m
			}
			break // a whiteout or a file hides everything below it
		}
		found = meta{kind: directory}
		below = append(below, layer)
		opaque := false
		if i+1 < len(d.layers) {
			sub, err := openDir(fd, name)
			if err != nil {
				done()
				return meta{}, nil, err
			}
			opaque = isOpaque(sub)
			syscall.Close(sub)
		}
		done()
		if opaque {
			break
		}
	}
	return found, below, nil
}

// list appends the names that any layer holds in this directory, whiteouts among them.
func (d *lowerDir) list(l *layers, path []byte, n *names) (listing, error) {
	if err := d.resolve(l, path); err != nil {
		return listing{}, err
	}
	fds := make([]int, 0, len(d.layers))
	for i := range d.layers {
		fd, done, err := d.fd(l, path, i)
		if err != nil {
			return listing{}, err
		}
		defer done()
		fds = append(fds, fd)
	}
	return n.add(fds...)
}

package changes

import (
	"encoding/binary"
	"errors"
	"sort"
	"syscall"
)

// maxNameBytes bounds the names held at once, of a directory and all its ancestors: 64 MiB are over a million ordinary
// names in one directory. A guest that goes beyond loses its change report, not the scanner's memory.
const maxNameBytes = 64 << 20

var errTooManyNames = errors.New("more names in one directory than a scan may hold")

// names is a stack of sorted directory listings. One arena serves a whole scan, so that a tree of any size costs the
// memory of its fattest branch. Names are kept NUL-terminated, as the kernel wants them.
type names struct {
	arena []byte
	index []nameRef
	buf   []byte
}

type nameRef struct {
	prefix uint64 // the first eight bytes, big endian: most comparisons need no more
	offset uint32
	length uint8
}

// listing is one directory's part of the stack.
type listing struct {
	n           *names
	first, last int // in index
	arenaStart  int
}

func newNames() *names { return &names{buf: make([]byte, 64<<10)} }

// add appends every name of the directories fds, sorted by bytes and without repetition.
func (n *names) add(fds ...int) (listing, error) {
	l := listing{n: n, first: len(n.index), arenaStart: len(n.arena)}
	for _, fd := range fds {
		if err := n.read(fd); err != nil {
			l.drop()
			return listing{}, err
		}
	}
	part := sorter{n, n.index[l.first:]}
	sort.Sort(part)
	kept := l.first
	for i := range part.refs {
		// Several layers repeat names, and so may one directory that is being written to.
		if i == 0 || part.refs[i].prefix != n.index[kept-1].prefix ||
			string(n.name(part.refs[i])) != string(n.name(n.index[kept-1])) {
			n.index[kept] = part.refs[i]
			kept++
		}
	}
	n.index = n.index[:kept]
	l.last = kept
	return l, nil
}

// drop gives the listing's memory back; listings are dropped in the reverse order of add.
func (l listing) drop() {
	l.n.index = l.n.index[:l.first]
	l.n.arena = l.n.arena[:l.arenaStart]
}

func (n *names) read(fd int) error {
	if _, err := syscall.Seek(fd, 0, 0); err != nil { // layers below keep their descriptors between listings
		return err
	}
	for {
		size, err := syscall.ReadDirent(fd, n.buf)
		if err == syscall.EINTR {
			continue
		}
		if err == syscall.ENOENT { // removed while it was open
			return nil
		}
		if err != nil {
			return err
		}
		if size == 0 {
			return nil
		}
		// struct linux_dirent64: u64 inode, s64 offset, u16 record length, u8 type, NUL-terminated name
		for rest := n.buf[:size]; len(rest) > 19; {
			length := int(binary.LittleEndian.Uint16(rest[16:]))
			name := rest[19:length]
			for i, c := range name {
				if c == 0 {
					name = name[:i]
					break
				}
			}
			rest = rest[length:]
			if len(name) == 0 || len(name) > 255 || string(name) == "." || string(name) == ".." {
				continue
			}
			if len(n.arena)+len(name)+1+24*len(n.index) > maxNameBytes {
				return errTooManyNames
			}
			var head [8]byte
			copy(head[:], name)
			n.index = append(n.index, nameRef{binary.BigEndian.Uint64(head[:]), uint32(len(n.arena)), uint8(len(name))})
			n.arena = append(append(n.arena, name...), 0)
		}
	}
}

// name is without its NUL, which follows it in memory.
func (n *names) name(r nameRef) []byte { return n.arena[r.offset : r.offset+uint32(r.length)] }

type sorter struct {
	n    *names
	refs []nameRef
}

func (s sorter) Len() int      { return len(s.refs) }
func (s sorter) Swap(i, j int) { s.refs[i], s.refs[j] = s.refs[j], s.refs[i] }
func (s sorter) Less(i, j int) bool {
	a, b := s.refs[i], s.refs[j]
	if a.prefix != b.prefix {
		return a.prefix < b.prefix
	}
	return string(s.n.name(a)) < string(s.n.name(b))
}

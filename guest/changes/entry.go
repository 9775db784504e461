package changes

import "syscall"

// kind is what one layer holds under a name.
type kind uint8

const (
	absent kind = iota
	file
	symlink
	directory
	whiteout
	special // FIFO, socket, device: occupies its name but is never listed
)

// meta is what the scanner knows of one entry of one layer.
type meta struct {
	kind         kind
	opaque       bool // directory only
	mode         uint32
	uid, gid     uint32
	size         int64
	mtime, ctime int64 // nanoseconds since 1970
	inode        uint64
}

func (m *meta) leaf() bool   { return m.kind == file || m.kind == symlink || m.kind == special }
func (m *meta) listed() bool { return m.kind == file || m.kind == symlink }

// looksLike compares what a user can see of two files. Neither the inode nor ctime counts: gVisor's sentry writes a
// file's access time back long after it was read, which copies the file up, or moves its ctime, and changes nothing.
func (m *meta) looksLike(o *meta) bool {
	return m.kind == o.kind && m.size == o.size && m.mtime == o.mtime && m.mode == o.mode && m.uid == o.uid && m.gid == o.gid
}

func metaOf(st *syscall.Stat_t) meta {
	m := meta{
		mode: uint32(st.Mode) & 0o7777, uid: st.Uid, gid: st.Gid, size: st.Size, inode: st.Ino,
		mtime: st.Mtim.Sec*1e9 + st.Mtim.Nsec, ctime: st.Ctim.Sec*1e9 + st.Ctim.Nsec,
	}
	switch st.Mode & syscall.S_IFMT {
	case syscall.S_IFREG:
		m.kind = file
	case syscall.S_IFLNK:
		m.kind = symlink
	case syscall.S_IFDIR:
		m.kind = directory
	case syscall.S_IFCHR:
		m.kind = special
		if st.Rdev == 0 {
			m.kind = whiteout
		}
	default:
		m.kind = special
	}
	return m
}

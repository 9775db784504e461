package sftp

import (
	"fmt"
	"os"
	"syscall"
	"time"
)

const (
	hasSize        = 1
	hasOwner       = 2
	hasPermissions = 4
	hasTimes       = 8
	hasExtended    = 1 << 31

	maxExtended = 64
)

// attributes are what a client says a file is to have.
type attributes struct {
	flags           uint32
	size            uint64
	uid, gid        uint32
	permissions     uint32
	accessed, wrote uint32
}

func (r *reader) attributes() attributes {
	said := attributes{flags: r.uint32()}
	if said.flags&hasSize != 0 {
		said.size = r.uint64()
	}
	if said.flags&hasOwner != 0 {
		said.uid, said.gid = r.uint32(), r.uint32()
	}
	if said.flags&hasPermissions != 0 {
		said.permissions = r.uint32()
	}
	if said.flags&hasTimes != 0 {
		said.accessed, said.wrote = r.uint32(), r.uint32()
	}
	if said.flags&hasExtended != 0 {
		// None is known here.
		count := r.uint32()
		if count > maxExtended {
			r.bad = true
			return said
		}
		for ; count > 0 && !r.bad; count-- {
			r.bytes()
			r.bytes()
		}
	}
	return said
}

func (a attributes) mode(otherwise os.FileMode) os.FileMode {
	if a.flags&hasPermissions == 0 {
		return otherwise
	}
	return os.FileMode(a.permissions & 0o777)
}

// apply gives a file what the attributes say, by path or, where it is open, by its descriptor.
func (a attributes) apply(path string, file *os.File) error {
	if a.flags&hasSize != 0 {
		if a.size > 1<<62 {
			return syscall.EFBIG
		}
		var err error
		if file != nil {
			err = file.Truncate(int64(a.size))
		} else {
			err = os.Truncate(path, int64(a.size))
		}
		if err != nil {
			return err
		}
	}
	if a.flags&hasPermissions != 0 {
		mode := a.permissions & 0o7777
		var err error
		if file != nil {
			err = syscall.Fchmod(int(file.Fd()), mode)
		} else {
			err = syscall.Chmod(path, mode)
		}
		if err != nil {
			return err
		}
	}
	if a.flags&hasTimes != 0 {
		// A file that is open is found by its descriptor, whatever its name means by now.
		if file != nil {
			path = fmt.Sprintf("/proc/self/fd/%d", file.Fd())
		}
		if err := os.Chtimes(path, time.Unix(int64(a.accessed), 0), time.Unix(int64(a.wrote), 0)); err != nil {
			return err
		}
	}
	if a.flags&hasOwner != 0 {
		var err error
		if file != nil {
			err = file.Chown(int(a.uid), int(a.gid))
		} else {
			err = os.Chown(path, int(a.uid), int(a.gid))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// attributes adds what a file is.
func (p packet) attributes(information os.FileInfo) packet {
	stat, ok := information.Sys().(*syscall.Stat_t)
	if !ok {
		return p.uint32(0)
	}
	return p.uint32(hasSize | hasOwner | hasPermissions | hasTimes).
		uint64(uint64(stat.Size)).uint32(stat.Uid).uint32(stat.Gid).uint32(stat.Mode).
		uint32(uint32(stat.Atim.Sec)).uint32(uint32(stat.Mtim.Sec))
}

// longName is the line of a listing that people see. Owners are numbers: names would have to be looked up.
func longName(name string, information os.FileInfo) string {
	stat, ok := information.Sys().(*syscall.Stat_t)
	if !ok {
		return name
	}
	when := information.ModTime()
	form := "Jan _2 15:04"
	if age := time.Since(when); age > 180*24*time.Hour || age < -24*time.Hour {
		form = "Jan _2  2006"
	}
	return fmt.Sprintf("%s %4d %-8d %-8d %8d %s %s",
		letters(stat.Mode), stat.Nlink, stat.Uid, stat.Gid, stat.Size, when.Format(form), name)
}

// letters are a file's type and permissions as ls shows them.
func letters(mode uint32) string {
	kinds := map[uint32]byte{
		syscall.S_IFDIR: 'd', syscall.S_IFLNK: 'l', syscall.S_IFCHR: 'c', syscall.S_IFBLK: 'b', syscall.S_IFIFO: 'p', syscall.S_IFSOCK: 's',
	}
	shown := []byte("-rwxrwxrwx")
	if kind, ok := kinds[mode&syscall.S_IFMT]; ok {
		shown[0] = kind
	}
	for place := 0; place < 9; place++ {
		if mode&(1<<(8-place)) == 0 {
			shown[1+place] = '-'
		}
	}
	for _, special := range []struct {
		bit uint32
		at  int
		set byte
	}{{syscall.S_ISUID, 3, 's'}, {syscall.S_ISGID, 6, 's'}, {syscall.S_ISVTX, 9, 't'}} {
		if mode&special.bit == 0 {
			continue
		}
		if shown[special.at] == '-' {
			shown[special.at] = special.set - 'a' + 'A'
		} else {
			shown[special.at] = special.set
		}
	}
	return string(shown)
}

// Package account looks up the guest's users and captures their login environment.
package account

import (
	"bufio"
	"bytes"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"innkeeper/guest/link"
)

// User is one line of /etc/passwd with the groups of /etc/group.
type User struct {
	Name   string
	UID    uint32
	GID    uint32
	Groups []uint32
	Home   string
	Shell  string
}

// Credential is what ForkExec needs to become the user; nil when the agent already is.
func (u User) Credential() *syscall.Credential {
	if os.Getuid() != 0 {
		return nil
	}
	return &syscall.Credential{Uid: u.UID, Gid: u.GID, Groups: u.Groups}
}

var root = User{Name: "root", Home: "/root", Shell: "/bin/sh", Groups: []uint32{0}}

// cached lookups hold while /etc/passwd and /etc/group do; reading both costs a command half a millisecond in gVisor.
var cached struct {
	sync.Mutex
	stamp [2]fileStamp
	users map[string]User
}

type fileStamp struct {
	inode    uint64
	size     int64
	modified syscall.Timespec
	changed  syscall.Timespec
}

func stampOf(path string) fileStamp {
	var status syscall.Stat_t
	if syscall.Stat(path, &status) != nil {
		return fileStamp{}
	}
	return fileStamp{status.Ino, status.Size, status.Mtim, status.Ctim}
}

// Lookup finds a user by name, or by number, for which an entry is not needed. Images without /etc/passwd have root at home in /.
// With a group after `:`, that is the user's only one.
func Lookup(spec string) (User, error) {
	name, group, named := strings.Cut(spec, ":")
	user, err := find(name)
	if err != nil || !named {
		return user, err
	}
	gid, err := GroupID(group)
	if err != nil {
		return User{}, err
	}
	user.GID, user.Groups = gid, []uint32{gid}
	return user, nil
}

func find(name string) (User, error) {
	stamp := [2]fileStamp{stampOf("/etc/passwd"), stampOf("/etc/group")}
	cached.Lock()
	defer cached.Unlock()
	if cached.stamp != stamp || cached.users == nil {
		cached.stamp, cached.users = stamp, map[string]User{}
	}
	if user, ok := cached.users[name]; ok {
		return user, nil
	}
	user, err := lookup(name)
	if err == nil && len(cached.users) < 100 {
		cached.users[name] = user
	}
	return user, err
}

// lookup takes `user` or, as images say it, `user:group`.
func lookup(name string) (User, error) {
	name, group, hasGroup := strings.Cut(name, ":")
	user, err := lookupUser(name)
	if err != nil || !hasGroup {
		return user, err
	}
	gid, err := GroupID(group)
	if err != nil {
		return User{}, err
	}
	user.GID = gid
	user.Groups = groupsOf(user)
	return user, nil
}

func lookupUser(name string) (User, error) {
	if name == "" {
		name = "root"
	}
	number, numberError := strconv.ParseUint(name, 10, 31)
	found, ok := User{}, false
	content, err := os.ReadFile("/etc/passwd")
	lines := bufio.NewScanner(bytes.NewReader(content))
	for lines.Scan() {
		fields := strings.Split(lines.Text(), ":")
		if len(fields) < 7 {
			continue
		}
		uid, e1 := strconv.ParseUint(fields[2], 10, 32)
		gid, e2 := strconv.ParseUint(fields[3], 10, 32)
		if e1 != nil || e2 != nil || fields[0] != name && (numberError != nil || uid != number) {
			continue
		}
		found = User{Name: fields[0], UID: uint32(uid), GID: uint32(gid), Home: fields[5], Shell: fields[6]}
		ok = true
		break
	}
	switch {
	case ok:
	case name == "root" || numberError == nil && number == 0:
		found = root
		if err != nil {
			found.Home = "/"
		}
	case numberError == nil:
		found = User{Name: name, UID: uint32(number), GID: uint32(number), Home: "/"}
	default:
		return User{}, link.Errorf("not_found", "there is no user %q in the guest", name)
	}
	found.Groups = groupsOf(found)
	if found.Home == "" {
		found.Home = "/"
	}
	if found.Shell == "" {
		found.Shell = "/bin/sh"
	}
	return found, nil
}

func groupsOf(user User) []uint32 {
	groups := []uint32{user.GID}
	content, err := os.ReadFile("/etc/group")
	if err != nil {
		return groups
	}
	lines := bufio.NewScanner(bytes.NewReader(content))
	for lines.Scan() {
		fields := strings.Split(lines.Text(), ":")
		if len(fields) < 4 {
			continue
		}
		gid, err := strconv.ParseUint(fields[2], 10, 32)
		if err != nil || uint32(gid) == user.GID {
			continue
		}
		for _, member := range strings.Split(fields[3], ",") {
			if member == user.Name {
				groups = append(groups, uint32(gid))
			}
		}
	}
	return groups
}

// GroupID finds a group by name or number.
func GroupID(name string) (uint32, error) {
	content, _ := os.ReadFile("/etc/group")
	lines := bufio.NewScanner(bytes.NewReader(content))
	for lines.Scan() {
		fields := strings.Split(lines.Text(), ":")
		if len(fields) >= 3 && fields[0] == name {
			if gid, err := strconv.ParseUint(fields[2], 10, 32); err == nil {
				return uint32(gid), nil
			}
		}
	}
	if gid, err := strconv.ParseUint(strings.TrimPrefix(name, "#"), 10, 31); err == nil {
		return uint32(gid), nil
	}
	return 0, link.Errorf("not_found", "there is no group %q in the guest", name)
}

// Owner is who a file belongs to.
type Owner struct {
	UID uint32
	GID uint32
}

// LookupOwner reads `user` or `user:group`, by names or numbers. A user alone brings its own group.
func LookupOwner(spec string) (Owner, error) {
	user, err := Lookup(spec)
	return Owner{user.UID, user.GID}, err
}

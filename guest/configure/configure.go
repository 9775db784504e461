// Package configure gives a guest its identity: name, time, randomness, resolver, user and environment.
package configure

import (
	"encoding/base64"
	"fmt"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"innkeeper/guest/account"
	"innkeeper/guest/exec"
	"innkeeper/guest/link"
	"innkeeper/guest/network"
	"innkeeper/guest/sudo"
)

// Settings serve the configure verb.
type Settings struct {
	table *exec.Table
	sudo  *sudo.Server
	mu    sync.Mutex // one configure at a time
}

type request struct {
	Hostname   *string           `json:"hostname"`
	TimeUnixNs *int64            `json:"time_unix_ns"`
	EntropyB64 *string           `json:"entropy_b64"`
	Hosts      *string           `json:"hosts"`
	ResolvConf *string           `json:"resolv_conf"`
	MachineID  *string           `json:"machine_id"`
	User       *string           `json:"user"`
	Workdir    *string           `json:"workdir"`
	Env        map[string]string `json:"env"`
	Sudo       *bool             `json:"sudo"`
	SpareShell *bool             `json:"spare_shell"`
	Warm       []string          `json:"warm"`
	Network    *network.Settings `json:"network"`
	Restored   bool              `json:"restored"`
}

type answer struct {
	UID        uint32 `json:"uid"`
	GID        uint32 `json:"gid"`
	Home       string `json:"home"`
	TmpIsTmpfs bool   `json:"tmp_is_tmpfs"`
}

// New makes the owner of the settings.
func New(table *exec.Table, server *sudo.Server) *Settings {
	return &Settings{table: table, sudo: server}
}

// Configure serves the verb.
func (s *Settings) Configure(stream *link.Stream, open link.Request) {
	var wanted request
	if err := open.Decode(&wanted); err != nil {
		stream.Fail(err)
		return
	}
	result, err := s.apply(&wanted)
	if err != nil {
		stream.Fail(err)
		return
	}
	stream.Succeed(result)
}

func (s *Settings) apply(wanted *request) (*answer, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	settings := s.table.Settings()
	if wanted.User != nil {
		settings.User = *wanted.User
	}
	user, err := account.Lookup(settings.User)
	if err != nil {
		return nil, err
	}
	if wanted.Workdir != nil {
		settings.Workdir = *wanted.Workdir
	}
	if wanted.Env != nil {
		settings.Env = wanted.Env
	}
	if wanted.SpareShell != nil {
		settings.SpareShell = *wanted.SpareShell
	}
	if err := setSystem(wanted); err != nil {
		return nil, err
	}
	if wanted.Sudo != nil {
		if err := s.sudo.Allow(*wanted.Sudo); err != nil {
			return nil, err
		}
	}
	result := &answer{UID: user.UID, GID: user.GID, Home: user.Home, TmpIsTmpfs: tmpIsTmpfs()}
	// Last, since a spare shell is started a moment later.
	s.table.Configure(settings)
	if wanted.Restored {
		s.table.Renew()
	}
	for _, line := range wanted.Warm {
		s.table.RunQuietly(line)
	}
	return result, nil
}

// setSystem ignores what this kind of guest does not allow: gVisor has neither a clock to set nor an entropy pool.
func setSystem(wanted *request) error {
	if wanted.EntropyB64 != nil {
		entropy, err := base64.StdEncoding.DecodeString(*wanted.EntropyB64)
		if err != nil {
			return link.Errorf("bad_request", "configure: entropy_b64: %v", err)
		}
		addEntropy(entropy)
	}
	if wanted.TimeUnixNs != nil && isBetter(time.Unix(0, *wanted.TimeUnixNs), time.Now()) {
		now := syscall.NsecToTimeval(*wanted.TimeUnixNs)
		_ = syscall.Settimeofday(&now)
	}
	if wanted.Network != nil {
		if err := network.Apply(*wanted.Network); err != nil {
			return err
		}
	}
	write := overwrite
	if wanted.Restored {
		// Programs run that may read it meanwhile.
		write = replace
	}
	if wanted.Hostname != nil {
		_ = syscall.Sethostname([]byte(*wanted.Hostname))
		if err := write("/etc/hostname", *wanted.Hostname+"\n"); err != nil {
			return err
		}
	}
	if wanted.MachineID != nil {
		if err := write("/etc/machine-id", strings.TrimSpace(*wanted.MachineID)+"\n"); err != nil {
			return err
		}
	}
	if wanted.Hosts != nil {
		if err := overwrite("/etc/hosts", *wanted.Hosts); err != nil {
			return err
		}
	}
	if wanted.ResolvConf != nil {
		return overwrite("/etc/resolv.conf", *wanted.ResolvConf)
	}
	return nil
}

// isBetter says whether a time that the host told is better than the clock's. It was right when it was sent, so it is late by the way that it came: a clock that
// is behind it is wrong by more, and one that is ahead of it may be the better one, unless no way is so long.
func isBetter(told, clock time.Time) bool {
	ahead := clock.Sub(told)
	return ahead < 0 || ahead > longestWay
}

// replace writes beside and renames, so that nobody reads half a file.
func replace(path, content string) error {
	if existing, err := os.ReadFile(path); err == nil && string(existing) == content {
		return nil
	}
	beside := fmt.Sprintf("%s.inn-%d", path, time.Now().UnixNano())
	err := os.WriteFile(beside, []byte(content), 0o644)
	if os.IsNotExist(err) {
		if err = os.MkdirAll("/etc", 0o755); err == nil {
			err = os.WriteFile(beside, []byte(content), 0o644)
		}
	}
	if err == nil {
		err = os.Rename(beside, path)
	}
	if err != nil {
		_ = os.Remove(beside)
	}
	return err
}

// overwrite keeps the file itself, which may be a bind mount that nothing can be renamed over.
func overwrite(path, content string) error {
	if has(path, content) || rewrite(path, content) {
		return nil
	}
	if target, err := os.Readlink(path); err == nil {
		// A link that a resolver service left points to nothing here.
		if _, err := os.Stat(path); err != nil && target != "" {
			_ = os.Remove(path)
		}
	}
	err := os.WriteFile(path, []byte(content), 0o644)
	if os.IsNotExist(err) {
		if err = os.MkdirAll("/etc", 0o755); err == nil {
			err = os.WriteFile(path, []byte(content), 0o644)
		}
	}
	return err
}

// has says whether that is what the file has in it. By system calls, as rewrite does it: what a clone of a microVM runs for the first time has to be translated, and package os
// is a lot of it.
func has(path, content string) bool {
	file, err := syscall.Open(path, syscall.O_RDONLY|syscall.O_CLOEXEC|syscall.O_NONBLOCK, 0)
	if err != nil {
		return false
	}
	defer syscall.Close(file)
	existing := make([]byte, len(content)+1)
	count, err := syscall.Pread(file, existing, 0)
	return err == nil && string(existing[:count]) == content
}

// rewrite gives a file that is there other content, and says whether it could. Not by emptying it first: a file system writes a file that was made anew, or
// was empty before, to the disk as soon as it is closed or renamed, which is half of what it takes to configure a clone.
func rewrite(path, content string) bool {
	file, err := syscall.Open(path, syscall.O_WRONLY|syscall.O_CLOEXEC|syscall.O_NONBLOCK, 0)
	if err != nil {
		return false
	}
	defer syscall.Close(file)
	count, err := syscall.Pwrite(file, []byte(content), 0)
	if err != nil || count != len(content) {
		return false
	}
	var status syscall.Stat_t
	if err := syscall.Fstat(file, &status); err != nil {
		return false
	}
	return status.Size == int64(len(content)) || syscall.Ftruncate(file, int64(len(content))) == nil
}

// How long what the host says may be under way on a busy machine.
const longestWay = 2 * time.Second

const (
	rndAddEntropy = 0x40085203
	rndReseedCRNG = 0x5207
)

// addEntropy credits the bytes to the kernel's pool and makes it use them now: clones would share random numbers otherwise.
func addEntropy(entropy []byte) {
	if len(entropy) == 0 {
		return
	}
	device, err := syscall.Open("/dev/urandom", syscall.O_WRONLY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	defer syscall.Close(device)
	const head = 8
	pool := make([]byte, head+len(entropy))
	*(*int32)(unsafe.Pointer(&pool[0])) = int32(len(entropy) * 8)
	*(*int32)(unsafe.Pointer(&pool[4])) = int32(len(entropy))
	copy(pool[head:], entropy)
	_, _, errno := syscall.Syscall(syscall.SYS_IOCTL, uintptr(device), rndAddEntropy, uintptr(unsafe.Pointer(&pool[0])))
	if errno != 0 {
		_, _ = syscall.Write(device, entropy)
	}
	_, _, _ = syscall.Syscall(syscall.SYS_IOCTL, uintptr(device), rndReseedCRNG, 0)
}

func tmpIsTmpfs() bool {
	var root, tmp syscall.Stat_t
	if syscall.Stat("/", &root) == nil && syscall.Stat("/tmp", &tmp) == nil && root.Dev == tmp.Dev {
		return false // nothing is mounted there
	}
	content, err := os.ReadFile("/proc/mounts")
	if err != nil {
		return false
	}
	kind := ""
	for _, line := range strings.Split(string(content), "\n") {
		fields := strings.Fields(line)
		if len(fields) >= 3 && fields[1] == "/tmp" {
			kind = fields[2] // a later mount covers an earlier one
		}
	}
	return kind == "tmpfs"
}

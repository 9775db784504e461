// Package volumes has the volumes that the host attaches appear at paths of the guest.
package volumes

import (
	"os"
	"sync"
	"syscall"

	"innkeeper/guest/account"
	"innkeeper/guest/link"
)

// means is how a volume gets to its path in one kind of guest. Both may be repeated.
type means interface {
	// show has the volume appear at the place, and says where its root directory can be opened.
	show(volume string, at *place, readOnly bool) (root string, err error)
	// hide takes it away from wherever it is; at is nil where the place cannot be reached any more. An error with the code busy: something in the guest uses
	// it, and it is as before.
	hide(volume string, at *place) error
}

// Quiet runs work while nothing of the agent's own stands in a directory of the guest.
type Quiet func(work func() error) error

// Volumes serves the verbs.
type Volumes struct {
	means       means
	defaultUser func() string
	quiet       Quiet
	mu          sync.Mutex // one change at a time
}

// Linked is for guests that find their volumes in a directory of the host's, and cannot mount: a symlink leads there.
func Linked(defaultUser func() string, quiet Quiet) *Volumes {
	return &Volumes{means: &links{replaced: map[string]syscall.Stat_t{}}, defaultUser: defaultUser, quiet: quiet}
}

// Mounted is for guests to which a volume is a disk.
func Mounted(defaultUser func() string, quiet Quiet) *Volumes {
	return &Volumes{means: &disks{shown: map[string]shown{}, forgotten: map[string]string{}}, defaultUser: defaultUser, quiet: quiet}
}

type request struct {
	Volume   string `json:"volume"`
	Path     string `json:"path"`
	ReadOnly bool   `json:"read_only"`
}

// Mount serves mount_volume.
func (v *Volumes) Mount(stream *link.Stream, open link.Request) {
	v.serve(stream, open, func(wanted request) error {
		at, err := placeOf(wanted.Path, true)
		if err != nil {
			return err
		}
		defer at.close()
		root, err := v.means.show(wanted.Volume, at, wanted.ReadOnly)
		if err != nil || wanted.ReadOnly {
			return err
		}
		return v.giveAway(root)
	})
}

// Unmount serves unmount_volume.
func (v *Volumes) Unmount(stream *link.Stream, open link.Request) {
	v.serve(stream, open, func(wanted request) error {
		at, err := placeOf(wanted.Path, false)
		if err == nil {
			defer at.close()
		}
		return v.quiet(func() error { return v.means.hide(wanted.Volume, at) })
	})
}

func (v *Volumes) serve(stream *link.Stream, open link.Request, work func(request) error) {
	var wanted request
	err := open.Decode(&wanted)
	if err == nil && !isID(wanted.Volume) {
		err = link.Errorf("bad_request", "volume: not the id of one")
	}
	if err == nil {
		v.mu.Lock()
		err = work(wanted)
		v.mu.Unlock()
	}
	if err != nil {
		stream.Fail(err)
		return
	}
	stream.Succeed(struct{}{})
}

// giveAway makes a volume that nobody has used yet the default user's, who could write nothing to it otherwise.
func (v *Volumes) giveAway(path string) error {
	root, err := os.OpenFile(path, os.O_RDONLY|syscall.O_DIRECTORY|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer root.Close()
	var status syscall.Stat_t
	if err := syscall.Fstat(int(root.Fd()), &status); err != nil || status.Uid != 0 {
		return err
	}
	names, err := root.Readdirnames(2)
	if len(names) > 1 || len(names) == 1 && names[0] != "lost+found" {
		return nil
	}
	user, err := account.Lookup(v.defaultUser())
	if err != nil || user.UID == 0 {
		return nil
	}
	return root.Chown(int(user.UID), int(user.GID))
}

// isID: 32 hexadecimal digits, which a disk's serial number holds, and no path goes wrong by.
func isID(text string) bool {
	if len(text) != 32 {
		return false
	}
	for _, digit := range text {
		if (digit < '0' || digit > '9') && (digit < 'a' || digit > 'f') {
			return false
		}
	}
	return true
}

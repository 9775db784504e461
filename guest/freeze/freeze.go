// Package freeze holds a guest's disk, or one of its volumes, still while the host copies it.
package freeze

import (
	"os"
	"syscall"
	"time"

	"innkeeper/guest/link"
)

const (
	fiFreeze = 0xC0045877
	fiThaw   = 0xC0045878

	longest = 60 * time.Second
)

// Verb serves `freeze_fs`, for one file system at a time.
type Verb struct {
	mountpoint string
	volumeAt   func(volume string) (mountpoint string)
	turn       chan struct{}
	control    func(directory *os.File, request uintptr) error
}

// New serves for the file system that is mounted there, and for volumes where volumeAt says that they are; it says "" of those that the guest has not.
func New(mountpoint string, volumeAt func(volume string) string) *Verb {
	return &Verb{mountpoint: mountpoint, volumeAt: volumeAt, turn: make(chan struct{}, 1), control: control}
}

// Freeze holds the file system still from a MESSAGE on until END, and in any case no longer than was asked for: a host that is gone thaws nothing.
func (v *Verb) Freeze(stream *link.Stream, open link.Request) {
	wanted := struct {
		Seconds float64 `json:"seconds"`
		Volume  string  `json:"volume"`
	}{}
	if err := open.Decode(&wanted); err != nil {
		stream.Fail(err)
		return
	}
	limit := time.Duration(wanted.Seconds * float64(time.Second))
	if limit <= 0 || limit > longest {
		stream.Fail(link.Errorf("bad_request", "freeze_fs: seconds is above 0, and at most %.0f", longest.Seconds()))
		return
	}
	mountpoint := v.mountpoint
	if wanted.Volume != "" {
		if mountpoint = v.volumeAt(wanted.Volume); mountpoint == "" {
			stream.Fail(link.Errorf("not_found", "the volume is not mounted"))
			return
		}
	}
	select {
	case v.turn <- struct{}{}:
	default:
		stream.Fail(link.Errorf("busy", "a disk is held still already"))
		return
	}
	err := v.hold(stream, mountpoint, limit)
	// Before the answer: whoever has it may ask again.
	<-v.turn
	if err != nil {
		stream.Fail(err)
		return
	}
	stream.Succeed(struct{}{})
}

func (v *Verb) hold(stream *link.Stream, mountpoint string, limit time.Duration) error {
	directory, err := os.Open(mountpoint)
	if err != nil {
		return err
	}
	defer directory.Close()
	// While it freezes nobody can write any more: most of what is in memory goes to the disk before.
	syscall.Sync()
	if gone(stream) {
		return link.ErrGone
	}
	if err := v.control(directory, fiFreeze); err != nil {
		return err
	}
	expired := wait(stream, limit)
	if err := v.control(directory, fiThaw); err != nil {
		return link.Errorf("io_error", "somebody else thawed the disk: %v", err)
	}
	if expired {
		return link.Errorf("io_error", "nobody had the disk thawed within %v", limit)
	}
	return nil
}

// wait tells the host that the disk stands still, and whether the time was over before the host, or the link to it, had enough.
func wait(stream *link.Stream, limit time.Duration) (expired bool) {
	over := make(chan struct{})
	go func() {
		defer close(over)
		if stream.SendMessage(struct {
			Frozen bool `json:"frozen"`
		}{true}) != nil {
			return
		}
		for {
			data, ok, err := stream.Read()
			if err != nil || !ok {
				return
			}
			stream.Release(data)
		}
	}()
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-over:
		return false
	case <-timer.C:
		return true
	}
}

func gone(stream *link.Stream) bool {
	cancelled, broken := stream.State()
	return cancelled || broken
}

func control(directory *os.File, request uintptr) error {
	if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, directory.Fd(), request, 0); errno != 0 {
		return errno
	}
	return nil
}

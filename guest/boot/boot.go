// Package boot makes a microVM's guest of what its kernel finds: the agent is /init of the initramfs, and this is what it does first.
package boot

import (
	"fmt"
	"os"
	"runtime/debug"
	"syscall"
	"time"

	"innkeeper/guest/link"
)

const (
	// Path is what the kernel calls the agent with.
	Path = "/init"

	// How long a device may take to come up, on a slow machine that emulates every instruction.
	deviceTimeout = 20 * time.Second
	devicePoll    = 2 * time.Millisecond
	// How long a guest that could not boot waits for somebody to tell.
	lastWordsTimeout = 10 * time.Second
)

// Guest is what the agent works with from then on.
type Guest struct {
	Port *link.Port
	// The overlay's parts, which only root sees.
	Upper  string
	Lowers []string
	// Where the file system of the disk is mounted.
	Disk string
	// Where the agent keeps what belongs to the disk, and not to the guest's files.
	Private string
}

// failed is a step that did not work.
type failed struct {
	step string
	err  error
}

func (f *failed) Error() string { return f.step + ": " + f.err.Error() }

func (f *failed) Unwrap() error { return f.err }

// Needed says whether this process is the first of a guest that has to be made.
func Needed() bool { return os.Getpid() == 1 && os.Args[0] == Path }

// Start makes the guest. It does not return where that fails: the host is told by a HELLO of that identity, and the machine ends.
func Start(identity link.Identity) *Guest {
	descriptors := holdStandardDescriptors()
	b := &sequence{console: openConsole()}
	if descriptors != nil {
		b.fail(identity, &failed{"agent", descriptors})
	}
	defer func() {
		if reason := recover(); reason != nil {
			b.fail(identity, &failed{"agent", fmt.Errorf("%v\n%s", reason, debug.Stack())})
		}
	}()
	guest, err := b.run()
	if err != nil {
		b.fail(identity, err)
	}
	return guest
}

// Fail tells the host that the guest cannot go on from here, and ends the machine.
func (g *Guest) Fail(identity link.Identity, err error) {
	b := &sequence{port: g.Port, console: openConsole()}
	b.fail(identity, &failed{"agent", err})
}

// sequence is a boot that is going on.
type sequence struct {
	console *os.File // nil unless somebody wants to watch
	port    *link.Port
}

func (b *sequence) run() (*Guest, error) {
	steps := []struct {
		name string
		take func() error
	}{
		{"modules", loadModules},
		{"port", b.openPort},
		{"image", mountImage},
		{"disk", mountDisk},
		{"overlay", mountOverlay},
		{"root", enterRoot},
		{"mounts", mountSystem},
		{"offered modules", offerModules},
		{"run", fillRun},
		{"network", setNetwork},
		{"agent", becomeAgent},
	}
	for _, step := range steps {
		b.note("%s", step.name)
		if err := step.take(); err != nil {
			return nil, &failed{step.name, err}
		}
	}
	b.note("the guest is made")
	return &Guest{Port: b.port, Upper: upper, Lowers: []string{image}, Disk: disks, Private: private}, nil
}

// fail does not return.
func (b *sequence) fail(identity link.Identity, err error) {
	b.note("boot failed: %v", err)
	told := make(chan struct{})
	go func() {
		defer close(told)
		if b.port == nil && b.openPort() != nil {
			return
		}
		step, reason := "agent", err
		if known, ok := err.(*failed); ok {
			step, reason = known.step, known.err
		}
		identity.BootError = &link.BootError{Step: step, Message: reason.Error()}
		// The host sends a RESET every few seconds that a boot takes, and hears only the answer to the last.
		for !link.SayHello(b.port.Next(), identity) {
		}
	}()
	select {
	case <-told:
	case <-time.After(lastWordsTimeout):
	}
	PowerOff()
}

// PowerOff ends the machine; what was written is on its disks.
func PowerOff() {
	syscall.Sync()
	_ = syscall.Reboot(syscall.LINUX_REBOOT_CMD_POWER_OFF)
	// Refused: the end of the first process is the machine's, too (panic=-1).
	os.Exit(0)
}

func (b *sequence) note(format string, arguments ...any) {
	if b.console != nil {
		fmt.Fprintf(b.console, "innkeeper: "+format+"\n", arguments...)
	}
}

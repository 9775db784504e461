package sudo

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"innkeeper/guest/terminal"
)

// Main is the client: it runs a command line and returns the exit status.
func Main(arguments []string) int {
	wanted, err := parse(arguments)
	if err != nil {
		fmt.Fprintf(os.Stderr, "sudo: %v\n%s", err, usageText)
		return 1
	}
	switch wanted.only {
	case nothing: // there is no password to remember or forget
		return 0
	case help:
		fmt.Print(usageText)
		return 0
	case showVersion:
		fmt.Println("Sudo of Innkeeper's guest agent")
		return 0
	}
	status, err := (&client{own: -1}).run(wanted)
	if err != nil {
		fmt.Fprintln(os.Stderr, "sudo:", err)
		return 1
	}
	return status
}

// client is one command in progress.
type client struct {
	connection *net.UnixConn
	writing    sync.Mutex
	master     *os.File
	slave      *os.File
	own        int // the caller's terminal, -1 for none
	saved      syscall.Termios
	raw        bool
}

func (c *client) run(wanted *options) (int, error) {
	connection, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: SocketPath, Net: "unix"})
	if err != nil {
		return 0, fmt.Errorf("this guest does not allow sudo (%v)", err)
	}
	defer connection.Close()
	c.connection = connection
	if _, err := io.ReadFull(connection, make([]byte, 1)); err != nil {
		return 0, err
	}
	directory := wanted.directory
	if directory == "" {
		if directory, err = os.Getwd(); err != nil {
			directory = "/"
		}
	}
	descriptors := [3]int{0, 1, 2}
	if wanted.only == run {
		if err := c.openTerminal(&descriptors); err != nil {
			return 0, err
		}
	}
	err = sendAsk(connection, &ask{
		User: wanted.user, Group: wanted.group, Login: wanted.login, Shell: wanted.shell, Preserve: wanted.preserve,
		Keep: wanted.keep, Directory: directory, Environment: os.Environ(), Assignments: wanted.assignments,
		Command: wanted.command, Terminal: c.master != nil, List: wanted.only == list,
	}, descriptors)
	if err != nil {
		return 0, err
	}
	if c.slave != nil {
		_ = c.slave.Close()
	}
	return c.wait()
}

// openTerminal gives the command a terminal of its own in place of the caller's: a child of PID 1 cannot join the caller's
// session, and without a controlling terminal there is neither Ctrl-C nor job control.
func (c *client) openTerminal(descriptors *[3]int) error {
	for descriptor := 0; descriptor < 3 && c.own < 0; descriptor++ {
		if isTerminal(descriptor) {
			c.own = descriptor
		}
	}
	if c.own < 0 {
		return nil
	}
	var size windowSize
	_ = ioctl(c.own, syscall.TIOCGWINSZ, unsafe.Pointer(&size))
	master, slave, err := terminal.Open(terminal.Size{Rows: int(size.rows), Cols: int(size.cols)})
	if err != nil {
		return err
	}
	c.master, c.slave = master, slave
	if ioctl(c.own, syscall.TCGETS, unsafe.Pointer(&c.saved)) == nil {
		_ = ioctl(int(slave.Fd()), syscall.TCSETS, unsafe.Pointer(&c.saved))
	}
	for index := range descriptors {
		if isTerminal(index) {
			descriptors[index] = int(slave.Fd())
		}
	}
	return nil
}

// wait relays until the command ends.
func (c *client) wait() (int, error) {
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGUSR1, syscall.SIGUSR2,
		syscall.SIGALRM, syscall.SIGWINCH, syscall.SIGCONT)
	go c.forward(signals)
	printed := make(chan struct{})
	if c.master != nil {
		c.enterRaw()
		defer c.leaveRaw()
		if isTerminal(0) && c.raw {
			go func() { _, _ = io.Copy(c.master, os.Stdin) }()
		}
		go func() {
			defer close(printed)
			_, _ = io.Copy(terminalOutput(c.own), c.master)
		}()
	} else {
		close(printed)
	}
	var end note
	if err := json.NewDecoder(c.connection).Decode(&end); err != nil {
		return 0, fmt.Errorf("the connection to the agent broke: %v", err)
	}
	if end.Error != "" {
		return 0, fmt.Errorf("%s", end.Error)
	}
	fmt.Print(end.Text)
	// A background child may keep the terminal open: what the command itself wrote is there by now.
	select {
	case <-printed:
	case <-time.After(50 * time.Millisecond):
	}
	if end.Signal != 0 {
		c.leaveRaw()
		dieOf(syscall.Signal(end.Signal))
	}
	return end.Code, nil
}

// terminalOutput is where the relay writes: the caller's terminal through whichever descriptor it came.
func terminalOutput(own int) *os.File {
	for _, descriptor := range []int{1, 2} {
		if isTerminal(descriptor) {
			return os.NewFile(uintptr(descriptor), "terminal")
		}
	}
	if file, err := os.OpenFile("/dev/tty", os.O_WRONLY, 0); err == nil {
		return file
	}
	return os.NewFile(uintptr(own), "terminal")
}

// dieOf lets the caller's shell see the signal; a few would make Go's runtime print instead, they become 128+n.
func dieOf(number syscall.Signal) {
	switch number {
	case syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGKILL:
		signal.Reset(number)
		_ = syscall.Kill(os.Getpid(), number)
		time.Sleep(100 * time.Millisecond)
	}
}

func (c *client) forward(signals <-chan os.Signal) {
	for received := range signals {
		number, ok := received.(syscall.Signal)
		if !ok {
			continue
		}
		message := note{Signal: int(number)}
		if number == syscall.SIGWINCH {
			if c.master == nil {
				continue
			}
			var size windowSize
			if ioctl(c.own, syscall.TIOCGWINSZ, unsafe.Pointer(&size)) == nil {
				_ = terminal.SetSize(c.master, terminal.Size{Rows: int(size.rows), Cols: int(size.cols)})
			}
			message = note{Resize: true}
		}
		if number == syscall.SIGCONT && c.master != nil {
			c.enterRaw()
		}
		c.writing.Lock()
		_ = json.NewEncoder(c.connection).Encode(message)
		c.writing.Unlock()
	}
}

// enterRaw passes every key on to the command's terminal. In the background the caller's terminal is left alone.
func (c *client) enterRaw() {
	var foreground int32
	if ioctl(c.own, syscall.TIOCGPGRP, unsafe.Pointer(&foreground)) != nil || int(foreground) != syscall.Getpgrp() {
		return
	}
	raw := c.saved
	raw.Iflag &^= syscall.IGNBRK | syscall.BRKINT | syscall.PARMRK | syscall.ISTRIP | syscall.INLCR | syscall.IGNCR |
		syscall.ICRNL | syscall.IXON
	raw.Oflag &^= syscall.OPOST
	raw.Lflag &^= syscall.ECHO | syscall.ECHONL | syscall.ICANON | syscall.ISIG | syscall.IEXTEN
	raw.Cflag = raw.Cflag&^(syscall.CSIZE|syscall.PARENB) | syscall.CS8
	raw.Cc[syscall.VMIN], raw.Cc[syscall.VTIME] = 1, 0
	// gVisor raises a key's signal without a look at ISIG, so the keys are taken away as well.
	raw.Cc[syscall.VINTR], raw.Cc[syscall.VQUIT], raw.Cc[syscall.VSUSP] = 0, 0, 0
	c.raw = ioctl(c.own, syscall.TCSETS, unsafe.Pointer(&raw)) == nil
}

func (c *client) leaveRaw() {
	if c.raw {
		_ = ioctl(c.own, syscall.TCSETS, unsafe.Pointer(&c.saved))
		c.raw = false
	}
}

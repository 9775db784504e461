package main

import (
	"bytes"
	"encoding/hex"
	"math/rand"
	"os"
	"path/filepath"
	"strings"
	"time"
)

const (
	portName   = "innkeeper.link"
	portDriver = "/sys/bus/virtio/drivers/virtio_console/"
	resetBytes = 48
)

var resetMagic, _ = hex.DecodeString("e0d3efcfa780938dfff2ffb5b3b7f2f5d6fac4b489af93bbb6dfc493c7c989f4")

// port is a microVM's virtio-serial port, which has no connections: a read while the host is away ends at once.
type port struct{ *os.File }

func (p port) Read(buffer []byte) (int, error) {
	for {
		if count, err := p.File.Read(buffer); count > 0 {
			return count, err
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func (p port) Write(data []byte) (int, error) {
	for at := 0; at < len(data); {
		count, err := p.File.Write(data[at:])
		at += count
		if err != nil {
			time.Sleep(5 * time.Millisecond)
		}
	}
	return len(data), nil
}

// Close leaves it open: the next link is on it, too.
func (p port) Close() error { return nil }

// takePort takes the port away from the agent, as root can: its driver lets go of the device, and the agent with it, and takes it up again.
func takePort() port {
	folder, _ := findPort()
	device, err := filepath.EvalSymlinks(filepath.Join(folder, "device"))
	if err != nil {
		panic(err)
	}
	for _, file := range []string{"unbind", "bind"} {
		if err := os.WriteFile(portDriver+file, []byte(filepath.Base(device)), 0); err != nil {
			panic(err)
		}
	}
	for {
		if folder, found := findPort(); found {
			if file, err := os.OpenFile("/dev/"+filepath.Base(folder), os.O_RDWR, 0); err == nil {
				return port{file}
			}
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func findPort() (string, bool) {
	names, _ := filepath.Glob("/sys/class/virtio-ports/*/name")
	for _, name := range names {
		if content, err := os.ReadFile(name); err == nil && strings.TrimSpace(string(content)) == portName {
			return filepath.Dir(name), true
		}
	}
	return "", false
}

// servePort waits for hosts that begin a link, and does to them what the mode says.
func servePort(mode string) {
	// The test says when: until then the agent has to answer it.
	for {
		if _, err := os.Stat("/tmp/go"); err == nil {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	device := takePort()
	for {
		reset := nextReset(device)
		switch mode {
		case "mute":
			select {}
		case "noise":
			noise := make([]byte, 1<<16)
			for {
				rand.Read(noise)
				device.Write(noise)
			}
		case "other-nonces":
			for {
				rand.Read(reset[len(resetMagic):])
				device.Write(reset)
			}
		case "magic":
			device.Write(bytes.Repeat(resetMagic, 1<<20))
			select {}
		case "no-hello":
			device.Write(reset)
			select {}
		case "old":
			device.Write(reset)
			wire{device}.json(kindHello, 0, `{"protocol": 0, "min_protocol": 0}`)
		case "boot-error":
			device.Write(reset)
			wire{device}.json(kindHello, 0, `{"protocol": 1, "min_protocol": 1, "boot_error": {"step": ["\u001b[2J"], "message": "`+strings.Repeat("x", 60000)+`"}}`)
		case "half":
			device.Write(reset[:40])
			select {}
		case "twice":
			device.Write(append(reset, reset...))
		default:
			device.Write(reset)
			serve(wire{device})
		}
	}
}

// nextReset reads up to the end of the host's next RESET.
func nextReset(device port) []byte {
	var seen []byte
	piece := make([]byte, 4096)
	for {
		count, _ := device.Read(piece)
		seen = append(seen, piece[:count]...)
		if at := bytes.LastIndex(seen, resetMagic); at >= 0 && len(seen) >= at+resetBytes {
			return append([]byte(nil), seen[at:at+resetBytes]...)
		}
		if len(seen) > 1<<20 {
			seen = seen[len(seen)-resetBytes:]
		}
	}
}

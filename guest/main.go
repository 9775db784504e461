// Command inn-agent is PID 1 of every guest, of a microVM's from its kernel's first step on. Under the name sudo it is the guest's sudo, under the name
// modprobe its kernel's modprobe;
// `inn-agent scan` lists file changes, `inn-agent jail` is how the host starts a virtual machine,
// `inn-agent sftp-server` serves a file transfer.
package main

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"innkeeper/guest/boot"
	"innkeeper/guest/changes"
	"innkeeper/guest/jail"
	"innkeeper/guest/link"
	"innkeeper/guest/modules"
	"innkeeper/guest/sftp"
	"innkeeper/guest/sudo"
)

// version is set by the build.
var version = "dev"

const defaultLink = "/.innkeeper/link/agent.sock"

func main() {
	if boot.Needed() {
		serveMachine()
		return
	}
	if filepath.Base(os.Args[0]) == "sudo" {
		os.Exit(sudo.Main(os.Args[1:]))
	}
	if filepath.Base(os.Args[0]) == "modprobe" {
		os.Exit(modules.Main(boot.Offered, os.Args[1:]))
	}
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "jail", "jailed":
			os.Exit(jail.Main(os.Args[1], os.Args[2:]))
		case "scan":
			os.Exit(changes.Main(os.Args[2:]))
		case "sudo":
			os.Exit(sudo.Main(os.Args[2:]))
		case "sftp-server":
			os.Exit(sftp.Main())
		case "hostname":
			// Run by the host in a guest that goes on from a checkpoint: its own processes may not set the name.
			if len(os.Args) != 3 {
				fmt.Fprintln(os.Stderr, "inn-agent: hostname takes one name")
				os.Exit(2)
			}
			if err := syscall.Sethostname([]byte(os.Args[2])); err != nil {
				fmt.Fprintln(os.Stderr, "inn-agent: hostname:", err)
				os.Exit(1)
			}
			return
		case "version":
			fmt.Println(version)
			return
		default:
			fmt.Fprintf(os.Stderr, "inn-agent: unknown command %q\n", os.Args[1])
			os.Exit(2)
		}
	}
	socket := os.Getenv("INNKEEPER_LINK")
	if socket == "" {
		socket = defaultLink
	}
	agent, err := newAgent(newSocketSource(socket))
	if err != nil {
		fmt.Fprintln(os.Stderr, "inn-agent:", err)
		os.Exit(1)
	}
	agent.run()
}

// serveMachine is the life of a microVM's first process.
func serveMachine() {
	identity := link.Identity{Protocol: link.Protocol, MinProtocol: link.MinimumProtocol, Agent: version}
	guest := boot.Start(identity)
	agent, err := newAgent(guest.Port)
	if err != nil {
		guest.Fail(identity, err)
	}
	agent.inMachine(guest)
	agent.run()
}

// randomName is 16 hexadecimal digits.
func randomName() (string, error) {
	name := make([]byte, 8)
	if _, err := rand.Read(name); err != nil {
		return "", fmt.Errorf("no randomness: %w", err)
	}
	return hex.EncodeToString(name), nil
}

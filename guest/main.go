// Command inn-agent is PID 1 of every guest. Under the name sudo it is the guest's sudo; `inn-agent scan` lists file changes.
package main

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"

	"innkeeper/guest/changes"
	"innkeeper/guest/sudo"
)

// version is set by the build.
var version = "dev"

const defaultLink = "/.innkeeper/link/agent.sock"

func main() {
	if filepath.Base(os.Args[0]) == "sudo" {
		os.Exit(sudo.Main(os.Args[1:]))
	}
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "scan":
			os.Exit(changes.Main(os.Args[2:]))
		case "sudo":
			os.Exit(sudo.Main(os.Args[2:]))
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
	identity := make([]byte, 8)
	if _, err := rand.Read(identity); err != nil {
		fmt.Fprintln(os.Stderr, "inn-agent: no randomness:", err)
		os.Exit(1)
	}
	agent, err := newAgent(socket, hex.EncodeToString(identity))
	if err != nil {
		fmt.Fprintln(os.Stderr, "inn-agent:", err)
		os.Exit(1)
	}
	agent.run()
}

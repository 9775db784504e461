package ports

import (
	"encoding/hex"
	"net"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"

	"innkeeper/guest/link"
)

// Port is one listening TCP socket.
type Port struct {
	Port    int    `json:"port"`
	Address string `json:"address"`
	Pid     int    `json:"pid,omitempty"`
	Command string `json:"command,omitempty"`
}

const answerPorts = 500 // a guest may open thousands; an answer must fit one frame

// List serves the ports verb.
func List(stream *link.Stream, _ link.Request) {
	found := map[string]Port{}
	for _, table := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		content, err := os.ReadFile(table)
		if err == nil {
			parse(string(content), found)
		}
	}
	owners := map[string]int{}
	if len(found) > 0 {
		owners = socketOwners()
	}
	listed := make([]Port, 0, len(found))
	for inode, port := range found {
		port.Pid = owners[inode]
		if port.Pid > 0 {
			content, _ := os.ReadFile("/proc/" + strconv.Itoa(port.Pid) + "/comm")
			port.Command = strings.ToValidUTF8(strings.TrimSpace(string(content)), "?")
		}
		listed = append(listed, port)
	}
	sort.Slice(listed, func(i, j int) bool {
		if listed[i].Port != listed[j].Port {
			return listed[i].Port < listed[j].Port
		}
		return listed[i].Address < listed[j].Address
	})
	if len(listed) > answerPorts {
		listed = listed[:answerPorts]
	}
	stream.Succeed(map[string][]Port{"ports": listed})
}

// parse collects the listening sockets of one /proc/net table by inode.
func parse(content string, found map[string]Port) {
	const local, state, inode, listening = 1, 3, 9, "0A"
	for number, line := range strings.Split(content, "\n") {
		fields := strings.Fields(line)
		if number == 0 || len(fields) <= inode || fields[state] != listening {
			continue
		}
		address, port, ok := strings.Cut(fields[local], ":")
		value, err := strconv.ParseUint(port, 16, 16)
		if !ok || err != nil {
			continue
		}
		key := fields[inode]
		if key == "0" { // gVisor may not tell it; sockets must stay apart all the same
			key = "?" + fields[local]
		}
		found[key] = Port{Port: int(value), Address: decodeAddress(address)}
	}
}

// decodeAddress reads the kernel's hexadecimal form: 32-bit words in the machine's byte order.
func decodeAddress(text string) string {
	bytes, err := hex.DecodeString(text)
	if err != nil || len(bytes)%4 != 0 {
		return ""
	}
	for word := 0; word < len(bytes); word += 4 {
		bytes[word], bytes[word+1], bytes[word+2], bytes[word+3] = bytes[word+3], bytes[word+2], bytes[word+1], bytes[word]
	}
	return net.IP(bytes).String()
}

func socketOwners() map[string]int {
	owners := map[string]int{}
	links, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	for _, path := range links {
		target, err := os.Readlink(path)
		if err != nil || !strings.HasPrefix(target, "socket:[") {
			continue
		}
		pid, _ := strconv.Atoi(strings.Split(path, "/")[2])
		owners[strings.TrimSuffix(strings.TrimPrefix(target, "socket:["), "]")] = pid
	}
	return owners
}

package sudo

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"syscall"
)

// SocketPath is where PID 1 listens inside the guest.
const SocketPath = "/run/innkeeper-sudo.sock"

// An environment and a command line together stay below what execve takes.
const maxAsk = 4 << 20

// ask is what the client wants; its descriptors and its identity travel beside it.
type ask struct {
	User        string   `json:"user"`
	Group       string   `json:"group"`
	Login       bool     `json:"login"`
	Shell       bool     `json:"shell"`
	Preserve    bool     `json:"preserve"`
	Keep        []string `json:"keep"`
	Directory   string   `json:"directory"`
	Environment []string `json:"environment"`
	Assignments []string `json:"assignments"`
	Command     []string `json:"command"`
	Terminal    bool     `json:"terminal"` // some descriptor is a terminal made for this command
	List        bool     `json:"list"`
}

// note goes either way after the ask: signals and sizes in, the end out.
type note struct {
	Signal int    `json:"signal,omitempty"`
	Error  string `json:"error,omitempty"`
	Text   string `json:"text,omitempty"`
	Ended  bool   `json:"ended,omitempty"`
	Code   int    `json:"code,omitempty"`
	Resize bool   `json:"resize,omitempty"`
}

// sendAsk sends three descriptors and the caller's credentials, which the kernel vouches for, with the length.
func sendAsk(connection *net.UnixConn, wanted *ask, descriptors [3]int) error {
	body, err := json.Marshal(wanted)
	if err != nil {
		return err
	}
	var length [4]byte
	binary.BigEndian.PutUint32(length[:], uint32(len(body)))
	control := syscall.UnixRights(descriptors[:]...)
	control = append(control, syscall.UnixCredentials(&syscall.Ucred{
		Pid: int32(syscall.Getpid()), Uid: uint32(syscall.Getuid()), Gid: uint32(syscall.Getgid()),
	})...)
	if _, _, err := connection.WriteMsgUnix(length[:], control, nil); err != nil {
		return err
	}
	_, err = connection.Write(body)
	return err
}

// receiveAsk returns what was asked, by whom, and the descriptors, which the caller closes even after an error.
func receiveAsk(connection *net.UnixConn) (*ask, *syscall.Ucred, []int, error) {
	length := make([]byte, 4)
	control := make([]byte, syscall.CmsgSpace(3*4)+syscall.CmsgSpace(syscall.SizeofUcred))
	count, controlCount, _, _, err := connection.ReadMsgUnix(length, control)
	if err != nil {
		return nil, nil, nil, err
	}
	messages, err := syscall.ParseSocketControlMessage(control[:controlCount])
	if err != nil {
		return nil, nil, nil, err
	}
	var who *syscall.Ucred
	var descriptors []int
	for index := range messages {
		if rights, err := syscall.ParseUnixRights(&messages[index]); err == nil {
			descriptors = append(descriptors, rights...)
		} else if credentials, err := syscall.ParseUnixCredentials(&messages[index]); err == nil {
			who = credentials
		}
	}
	for _, descriptor := range descriptors {
		syscall.CloseOnExec(descriptor)
	}
	size := binary.BigEndian.Uint32(length)
	if count != 4 || size > maxAsk || who == nil || len(descriptors) != 3 {
		return nil, who, descriptors, fmt.Errorf("malformed request")
	}
	body := make([]byte, size)
	if _, err := io.ReadFull(connection, body); err != nil {
		return nil, who, descriptors, err
	}
	var wanted ask
	if err := json.Unmarshal(body, &wanted); err != nil {
		return nil, who, descriptors, err
	}
	return &wanted, who, descriptors, nil
}

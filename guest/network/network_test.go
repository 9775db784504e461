package network

import (
	"errors"
	"net"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"innkeeper/guest/link"
)

// elsewhere gives the test a network of its own, with an interface eth0. Its thread ends with the test.
func elsewhere(t *testing.T) {
	runtime.LockOSThread()
	if err := syscall.Unshare(syscall.CLONE_NEWNET); err != nil {
		t.Skip("a network of its own needs root: ", err)
	}
	ip(t, "link add eth0 type veth peer name other")
}

func ip(t *testing.T, line string) string {
	t.Helper()
	output, err := exec.Command("ip", strings.Fields(line)...).CombinedOutput()
	if err != nil {
		t.Fatalf("ip %s: %s", line, output)
	}
	return string(output)
}

func apply(t *testing.T, settings Settings) {
	t.Helper()
	if err := Apply(settings); err != nil {
		t.Fatal(err)
	}
}

func expect(t *testing.T, line string, wanted ...string) {
	t.Helper()
	output := ip(t, line)
	for _, text := range wanted {
		if !strings.Contains(output, text) {
			t.Errorf("ip %s has no %q:\n%s", line, text, output)
		}
	}
}

var first = Settings{Interface: "eth0", MAC: "02:00:00:00:00:07", Address: "100.64.0.14", Prefix: 30, Gateway: "100.64.0.13"}

func TestAnInterfaceGetsWhatIsAskedAndNothingElse(t *testing.T) {
	elsewhere(t)
	ip(t, "address add 192.0.2.1/24 dev eth0")
	ip(t, "address add 192.0.2.2/24 dev eth0")
	apply(t, first)
	expect(t, "link show eth0", "02:00:00:00:00:07", ",UP")
	if addresses := ip(t, "-o -4 address show dev eth0"); strings.Count(addresses, "inet ") != 1 || !strings.Contains(addresses, "100.64.0.14/30 brd 100.64.0.15") {
		t.Error(addresses)
	}
	expect(t, "-4 route show", "default via 100.64.0.13 dev eth0")
}

func TestIPv6IsForLoopbackAlone(t *testing.T) {
	elsewhere(t)
	if err := Up("lo"); err != nil {
		t.Fatal(err)
	}
	if addresses := ip(t, "-6 address show dev lo"); addresses == "" {
		t.Skip("there is no IPv6 here")
	}
	if err := WithoutIPv6(); err != nil {
		t.Fatal(err)
	}
	ip(t, "link add later type veth peer name beside")
	apply(t, first)
	ip(t, "link set later up")
	ip(t, "link set beside up")
	for _, name := range []string{"eth0", "later"} {
		if addresses := ip(t, "-6 address show dev "+name); addresses != "" {
			t.Error(addresses)
		}
	}
	expect(t, "-6 address show dev lo", "::1")
}

func TestAnInterfaceThatIsDownBringsItsOwnDefaultRoute(t *testing.T) {
	elsewhere(t)
	ip(t, "address add 192.0.2.1/24 dev other")
	ip(t, "link set other up")
	ip(t, "route add default dev other")
	apply(t, first)
	if routes := ip(t, "-4 route show default"); strings.Count(routes, "default") != 1 || !strings.Contains(routes, "via 100.64.0.13 dev eth0") {
		t.Error(routes)
	}
}

func TestTheSameAgainChangesNothing(t *testing.T) {
	elsewhere(t)
	apply(t, first)
	events, err := open()
	if err != nil {
		t.Fatal(err)
	}
	defer events.close()
	const groups = 1 | 0x10 | 0x40 // of links, addresses and routes
	if err := syscall.Bind(events.socket, &syscall.SockaddrNetlink{Family: syscall.AF_NETLINK, Groups: groups}); err != nil {
		t.Fatal(err)
	}
	apply(t, first)
	if _, _, err := syscall.Recvfrom(events.socket, make([]byte, 4096), syscall.MSG_DONTWAIT); !errors.Is(err, syscall.EAGAIN) {
		t.Error("something changed: ", err)
	}
	// That a change would be seen:
	apply(t, Settings{Interface: "eth0", Address: "100.64.0.14", Prefix: 30})
	if _, _, err := syscall.Recvfrom(events.socket, make([]byte, 4096), syscall.MSG_DONTWAIT); err != nil {
		t.Error(err)
	}
}

func TestAnInterfaceMoves(t *testing.T) {
	elsewhere(t)
	apply(t, first)
	apply(t, Settings{Interface: "eth0", MAC: "02:00:00:00:00:08", Address: "100.64.0.18", Prefix: 30, Gateway: "100.64.0.17"})
	expect(t, "link show eth0", "02:00:00:00:00:08", ",UP")
	if addresses := ip(t, "-o -4 address show dev eth0"); strings.Count(addresses, "inet ") != 1 || !strings.Contains(addresses, "100.64.0.18/30") {
		t.Error(addresses)
	}
	if routes := ip(t, "-4 route show default"); strings.Count(routes, "default") != 1 || !strings.Contains(routes, "via 100.64.0.17") {
		t.Error(routes)
	}
	apply(t, Settings{Interface: "eth0", Address: "10.0.0.2", Prefix: 32, Gateway: "10.9.0.1"}) // a gateway outside of the network
	expect(t, "-4 route show default", "via 10.9.0.1")
	apply(t, Settings{Interface: "eth0", Address: "10.0.0.2", Prefix: 31})
	if routes := ip(t, "-4 route show default"); routes != "" {
		t.Error(routes)
	}
}

func TestWhatIsNoNetworkIsRefused(t *testing.T) {
	elsewhere(t)
	for code, all := range map[string][]Settings{
		"bad_request": {
			{}, {Interface: "../x", Address: "10.0.0.2", Prefix: 24}, {Interface: "sixteen-letters-", Address: "10.0.0.2", Prefix: 24},
			{Interface: "eth0", Address: "fd00::1", Prefix: 24}, {Interface: "eth0", Address: "10.0.0.2"}, {Interface: "eth0", Address: "10.0.0.2", Prefix: 33},
			{Interface: "eth0", Address: "10.0.0.2", Prefix: 24, Gateway: "x"}, {Interface: "eth0", Address: "10.0.0.2", Prefix: 24, MAC: "02:00"},
		},
		"not_found": {{Interface: "eth1", Address: "10.0.0.2", Prefix: 24}},
		// A group's address is no interface's.
		"io_error": {{Interface: "eth0", Address: "10.0.0.2", Prefix: 24, MAC: "03:00:00:00:00:01"}},
	} {
		for _, settings := range all {
			var failure *link.Error
			if err := Apply(settings); !errors.As(err, &failure) || failure.Code != code {
				t.Errorf("%+v: %v", settings, err)
			}
		}
	}
}

func TestLoopbackComesUp(t *testing.T) {
	elsewhere(t)
	if err := Up("lo"); err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	expect(t, "link show lo", "LOOPBACK,UP")
}

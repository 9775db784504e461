// Package network gives an interface of the guest its addresses, as far as the host does not do that from outside.
package network

import (
	"bytes"
	"errors"
	"net"
	"os"
	"syscall"
	"unsafe"

	"innkeeper/guest/link"
)

const (
	sizeofIfreq   = 40
	hardwareBytes = 6
)

// Settings are what the host wants of one interface. Without a gateway there is no way out.
type Settings struct {
	Interface string `json:"interface"`
	MAC       string `json:"mac"`
	Address   string `json:"address"`
	Prefix    int    `json:"prefix"`
	Gateway   string `json:"gateway"`
}

type parsed struct {
	name     string
	hardware net.HardwareAddr // nil: as it is
	address  net.IP
	prefix   int
	gateway  net.IP // nil: none
}

func (s Settings) parse() (parsed, error) {
	wanted := parsed{name: s.Interface, address: net.ParseIP(s.Address).To4(), prefix: s.Prefix}
	if s.Interface == "" || len(s.Interface) >= syscall.IFNAMSIZ || bytes.ContainsAny([]byte(s.Interface), "/\x00") || s.Interface == "." || s.Interface == ".." {
		return wanted, link.Errorf("bad_request", "configure: network: no interface is called %q", s.Interface)
	}
	if wanted.address == nil || s.Prefix < 1 || s.Prefix > 32 {
		return wanted, link.Errorf("bad_request", "configure: network: no IPv4 address and prefix: %q/%d", s.Address, s.Prefix)
	}
	if s.Gateway != "" {
		if wanted.gateway = net.ParseIP(s.Gateway).To4(); wanted.gateway == nil {
			return wanted, link.Errorf("bad_request", "configure: network: no IPv4 gateway: %q", s.Gateway)
		}
	}
	if s.MAC != "" {
		hardware, err := net.ParseMAC(s.MAC)
		if err != nil || len(hardware) != 6 {
			return wanted, link.Errorf("bad_request", "configure: network: no hardware address: %q", s.MAC)
		}
		wanted.hardware = hardware
	}
	return wanted, nil
}

// Apply makes the interface what the settings say, and changes nothing that is so already.
//
// One that is down is taken to be nobody's yet: no route is looked for that goes through it, or in place of its own. Each request that a clone of a microVM
// does without is kernel code that need not be translated first.
func Apply(settings Settings) error {
	wanted, err := settings.parse()
	if err != nil {
		return err
	}
	c, err := open()
	if err != nil {
		return err
	}
	defer c.close()
	found, err := c.find(wanted.name)
	if err != nil {
		return err
	}
	var hardware net.HardwareAddr
	if wanted.hardware != nil && !bytes.Equal(found.hardware, wanted.hardware) {
		hardware = wanted.hardware
	}
	if hardware != nil && found.up {
		if err := c.setLink(found.index, nil, false); err != nil {
			return failure("setting it down", wanted, err)
		}
	}
	if hardware != nil || !found.up {
		if err := c.setLink(found.index, hardware, true); err != nil {
			return failure("setting it up", wanted, err)
		}
	}
	if err := c.setAddress(found.index, wanted); err != nil {
		return failure("the address", wanted, err)
	}
	there := false
	if found.up {
		if there, err = c.clearDefaultRoutes(found.index, wanted.gateway); err != nil {
			return failure("the default routes", wanted, err)
		}
	}
	if wanted.gateway != nil && !there {
		if err := c.addDefaultRoute(found.index, wanted.gateway); err != nil {
			return failure("the default route", wanted, err)
		}
	}
	return nil
}

// Up sets an interface up as it is: loopback needs no more.
func Up(name string) error {
	c, err := open()
	if err != nil {
		return err
	}
	defer c.close()
	found, err := c.find(name)
	if err != nil {
		return err
	}
	return c.setLink(found.index, nil, true)
}

// WithoutIPv6 leaves IPv6 to the loopback interface alone, of those that are there and of those to come. A kernel without it has nothing to be told.
func WithoutIPv6() error {
	const folder = "/proc/sys/net/ipv6/conf"
	entries, err := os.ReadDir(folder)
	if os.IsNotExist(err) {
		return nil
	}
	for _, entry := range entries {
		// `all` is for those that are there, this one included.
		if name := entry.Name(); name != "lo" && name != "all" {
			if err := os.WriteFile(folder+"/"+name+"/disable_ipv6", []byte("1"), 0); err != nil {
				return err
			}
		}
	}
	return err
}

func failure(what string, wanted parsed, err error) error {
	return link.Errorf("io_error", "configure: network: %s of %s: %v", what, wanted.name, err)
}

// device is an interface as it is.
type device struct {
	index    int32
	hardware []byte
	up       bool
}

// find asks by ioctl(2), since netlink answers with all that is known of an interface.
func (c *conversation) find(name string) (device, error) {
	var found device
	for _, question := range []uintptr{syscall.SIOCGIFINDEX, syscall.SIOCGIFFLAGS, syscall.SIOCGIFHWADDR} {
		var request [sizeofIfreq]byte
		copy(request[:syscall.IFNAMSIZ-1], name)
		if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, uintptr(c.socket), question, uintptr(unsafe.Pointer(&request[0]))); errno == syscall.ENODEV {
			return found, link.Errorf("not_found", "there is no interface %q", name)
		} else if errno != 0 {
			return found, link.Errorf("io_error", "the interface %q: %v", name, errno)
		}
		answer := request[syscall.IFNAMSIZ:]
		switch question {
		case syscall.SIOCGIFINDEX:
			found.index = int32(native.Uint32(answer))
		case syscall.SIOCGIFFLAGS:
			found.up = native.Uint16(answer)&syscall.IFF_UP != 0
		case syscall.SIOCGIFHWADDR:
			// Behind the family, of which loopback is one without an address.
			found.hardware = append([]byte(nil), answer[2:2+hardwareBytes]...)
		}
	}
	return found, nil
}

// setLink sets an interface up or down; a hardware address that is not nil becomes its own before that.
func (c *conversation) setLink(index int32, hardware []byte, up bool) error {
	flags := uint32(0)
	if up {
		flags = syscall.IFF_UP
	}
	body := linkHead(index, flags, syscall.IFF_UP)
	if hardware != nil {
		body = append(body, attribute(syscall.IFLA_ADDRESS, hardware)...)
	}
	return c.change(syscall.RTM_NEWLINK, 0, body)
}

// setAddress leaves the interface with this IPv4 address alone.
func (c *conversation) setAddress(index int32, wanted parsed) error {
	messages, err := c.list(syscall.RTM_GETADDR, addressHead(0, 0))
	if err != nil {
		return err
	}
	there := false
	for _, message := range messages {
		if len(message.Data) < syscall.SizeofIfAddrmsg || message.Data[0] != syscall.AF_INET || int32(native.Uint32(message.Data[4:])) != index {
			continue
		}
		prefix, local := int(message.Data[1]), attributes(message, syscall.SizeofIfAddrmsg)[syscall.IFA_LOCAL]
		if prefix == wanted.prefix && bytes.Equal(local, wanted.address) {
			there = true
			continue
		}
		body := append(addressHead(index, prefix), attribute(syscall.IFA_LOCAL, local)...)
		// The kernel takes the others of its network along with a first one.
		if err := c.change(syscall.RTM_DELADDR, 0, body); err != nil && !errors.Is(err, syscall.EADDRNOTAVAIL) {
			return err
		}
	}
	if there {
		return nil
	}
	body := append(addressHead(index, wanted.prefix), attribute(syscall.IFA_LOCAL, wanted.address)...)
	body = append(body, attribute(syscall.IFA_ADDRESS, wanted.address)...)
	if wanted.prefix < 31 {
		broadcast := make([]byte, 4)
		for i, part := range net.CIDRMask(wanted.prefix, 32) {
			broadcast[i] = wanted.address[i] | ^part
		}
		body = append(body, attribute(syscall.IFA_BROADCAST, broadcast)...)
	}
	err = c.change(syscall.RTM_NEWADDR, syscall.NLM_F_CREATE|syscall.NLM_F_REPLACE, body)
	if errors.Is(err, syscall.EEXIST) {
		return nil // it went with none of the others
	}
	return err
}

// clearDefaultRoutes leaves no default route but the one through the gateway, and says whether that is there.
func (c *conversation) clearDefaultRoutes(index int32, gateway net.IP) (there bool, err error) {
	messages, err := c.list(syscall.RTM_GETROUTE, routeHead(0))
	if err != nil {
		return false, err
	}
	for _, message := range messages {
		// Family, length of the destination, …, table.
		if len(message.Data) < syscall.SizeofRtMsg || message.Data[0] != syscall.AF_INET || message.Data[1] != 0 || message.Data[4] != syscall.RT_TABLE_MAIN {
			continue
		}
		fields := attributes(message, syscall.SizeofRtMsg)
		if gateway != nil && !there && bytes.Equal(fields[syscall.RTA_GATEWAY], gateway) && len(fields[syscall.RTA_OIF]) == 4 &&
			int32(native.Uint32(fields[syscall.RTA_OIF])) == index {
			there = true
			continue
		}
		if err := c.change(syscall.RTM_DELROUTE, 0, message.Data); err != nil && !errors.Is(err, syscall.ESRCH) {
			return there, err
		}
	}
	return there, nil
}

// addDefaultRoute adds one, or has it take the place of another.
func (c *conversation) addDefaultRoute(index int32, gateway net.IP) error {
	body := append(routeHead(syscall.RTNH_F_ONLINK), attribute(syscall.RTA_GATEWAY, gateway)...)
	out := make([]byte, 4)
	native.PutUint32(out, uint32(index))
	body = append(body, attribute(syscall.RTA_OIF, out)...)
	return c.change(syscall.RTM_NEWROUTE, syscall.NLM_F_CREATE|syscall.NLM_F_REPLACE, body)
}

func linkHead(index int32, flags, change uint32) []byte {
	head := make([]byte, syscall.SizeofIfInfomsg)
	native.PutUint32(head[4:], uint32(index))
	native.PutUint32(head[8:], flags)
	native.PutUint32(head[12:], change)
	return head
}

func addressHead(index int32, prefix int) []byte {
	head := make([]byte, syscall.SizeofIfAddrmsg)
	head[0], head[1] = syscall.AF_INET, byte(prefix)
	native.PutUint32(head[4:], uint32(index))
	return head
}

func routeHead(flags uint32) []byte {
	head := make([]byte, syscall.SizeofRtMsg)
	head[0], head[4], head[5], head[7] = syscall.AF_INET, syscall.RT_TABLE_MAIN, syscall.RTPROT_BOOT, syscall.RTN_UNICAST
	native.PutUint32(head[8:], flags)
	return head
}

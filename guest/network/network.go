// Package network gives an interface of the guest its addresses, as far as the host does not do that from outside.
package network

import (
	"bytes"
	"errors"
	"net"
	"os"
	"syscall"

	"innkeeper/guest/link"
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
	index, hardware, up, err := c.find(wanted.name)
	if err != nil {
		return err
	}
	// Guests have no IPv6. A kernel without it has no such file.
	_ = os.WriteFile("/proc/sys/net/ipv6/conf/"+wanted.name+"/disable_ipv6", []byte("1"), 0)
	if wanted.hardware != nil && !bytes.Equal(hardware, wanted.hardware) {
		if up {
			if err := c.setUp(index, false); err != nil {
				return failure("setting it down", wanted, err)
			}
			up = false
		}
		if err := c.change(syscall.RTM_NEWLINK, 0, append(linkHead(index, 0, 0), attribute(syscall.IFLA_ADDRESS, wanted.hardware)...)); err != nil {
			return failure("the hardware address", wanted, err)
		}
	}
	if err := c.setAddress(index, wanted); err != nil {
		return failure("the address", wanted, err)
	}
	if !up {
		if err := c.setUp(index, true); err != nil {
			return failure("setting it up", wanted, err)
		}
	}
	if err := c.setDefaultRoute(index, wanted.gateway); err != nil {
		return failure("the default route", wanted, err)
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
	index, _, _, err := c.find(name)
	if err != nil {
		return err
	}
	return c.setUp(index, true)
}

func failure(what string, wanted parsed, err error) error {
	return link.Errorf("io_error", "configure: network: %s of %s: %v", what, wanted.name, err)
}

// find returns the interface's index, its hardware address, and whether it is up.
func (c *conversation) find(name string) (int32, []byte, bool, error) {
	messages, err := c.list(syscall.RTM_GETLINK, linkHead(0, 0, 0))
	if err != nil {
		return 0, nil, false, err
	}
	for _, message := range messages {
		if len(message.Data) < syscall.SizeofIfInfomsg {
			continue
		}
		fields := attributes(message, syscall.SizeofIfInfomsg)
		if string(bytes.TrimRight(fields[syscall.IFLA_IFNAME], "\x00")) == name {
			flags := native.Uint32(message.Data[8:])
			return int32(native.Uint32(message.Data[4:])), fields[syscall.IFLA_ADDRESS], flags&syscall.IFF_UP != 0, nil
		}
	}
	return 0, nil, false, link.Errorf("not_found", "there is no interface %q", name)
}

func (c *conversation) setUp(index int32, up bool) error {
	flags := uint32(0)
	if up {
		flags = syscall.IFF_UP
	}
	return c.change(syscall.RTM_NEWLINK, 0, linkHead(index, flags, syscall.IFF_UP))
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

// setDefaultRoute leaves one default route, through the gateway, or none.
func (c *conversation) setDefaultRoute(index int32, gateway net.IP) error {
	messages, err := c.list(syscall.RTM_GETROUTE, routeHead(0))
	if err != nil {
		return err
	}
	there := false
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
			return err
		}
	}
	if gateway == nil || there {
		return nil
	}
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

"""What a guest tries to reach, from inside: the host, its neighbours, private and special networks. Everything it tries really answers, which the same
attempts show while the firewall is off."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import socket
import threading
from collections.abc import Iterator, Sequence
from ipaddress import IPv4Address

import pytest
from guest_side import Target, firewall_off, knock, reached, run_program
from internet_fixture import ADDRESS, FORBIDDEN, HOST_ADDRESSES, HOST_PORT, Internet
from server_fixture import Room, Server
from tests.guest_drivers import GVISOR

from innkeeper.host.linux import netns
from innkeeper.host.network.addressing import NOT_PUBLIC, is_public

pytestmark = pytest.mark.microvms

# One address at least of every range that is not public; the world's machine beyond the host answers under each.
SPECIAL = (
    *FORBIDDEN,
    "10.255.255.254", "100.100.100.200", "168.63.129.16", "169.254.170.2", "172.31.255.254", "192.0.2.1", "192.88.99.1", "192.168.0.1", "198.51.100.1",
    "203.0.113.7", "240.0.0.1", "255.255.255.254",
)  # fmt: skip
# Nobody can own these; they must lead nowhere else either.
NOBODYS = (
    "0.0.0.0",
    "0.0.0.1",
    "127.0.0.2",
    "127.8.8.8",
    "127.255.255.254",
    "224.0.0.1",
    "224.0.0.251",
    "239.255.255.250",
    "255.255.255.255",
)
# Other spellings of the same: the resolver library turns them into addresses.
SPELLINGS = ("0xa9fea9fe", "2852039166", "169.254.43518", "0251.0376.0251.0376", "10.593161", "0x7f.1")
SIX = (
    "::ffff:169.254.169.254", "::ffff:10.9.9.9", "::169.254.169.254", "64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::1", "2002:a09:909::1", "fd00:ec2::254",
    "fe80::1%eth0", "fe80::a9fe:a9fe%eth0", "ff02::1%eth0", "2001:db8::1", "::1",
)  # fmt: skip
UDP_PORT = 5000


@pytest.fixture(scope="module")
def everywhere(world: Internet, attacker: Room) -> Iterator[None]:
    """The machine beyond the host owns all special addresses, and answers datagrams as well, as does the host."""
    added = [address for address in SPECIAL if address not in FORBIDDEN]
    asyncio.run(netns.ip_batch([f"addr add {address}/32 dev lo" for address in added], inside=world.beyond))
    hosts = (*HOST_ADDRESSES, router_addresses(attacker)[2])
    with _echo(world.beyond, (ADDRESS, *SPECIAL)), _echo(world.host, hosts):
        yield
    asyncio.run(netns.ip_batch([f"addr del {address}/32 dev lo" for address in added], inside=world.beyond))


@contextlib.contextmanager
def _echo(inside: str, addresses: Sequence[str]) -> Iterator[None]:
    """Answer datagrams from the very address that they were sent to."""

    def bind() -> list[socket.socket]:
        made = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in addresses]
        for sock, address in zip(made, addresses, strict=True):
            sock.bind((address, UDP_PORT))
        return made

    sockets, over = netns.call_inside(inside, bind), threading.Event()

    def serve() -> None:
        while not over.is_set():
            for sock in select.select(sockets, [], [], 0.05)[0]:
                with contextlib.suppress(OSError):
                    sock.sendto(*sock.recvfrom(2048))

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        for sock in sockets:
            sock.close()


def router_addresses(room: Room) -> tuple[str, str, str, str]:
    """The gateway of a guest, the resolver, and both ends of the uplink, as the guest can work them out."""
    resolver = IPv4Address(room.output("sed -n 's/^nameserver //p' /etc/resolv.conf"))
    gateway = room.output("awk '$2 == \"00000000\" {print $3}' /proc/net/route")
    return (
        str(IPv4Address(int.from_bytes(bytes.fromhex(gateway), "little"))),
        str(resolver),
        str(resolver + 4),
        str(resolver + 5),
    )


def test_every_special_range_is_among_the_targets() -> None:
    tried = [IPv4Address(address) for address in (*SPECIAL, *NOBODYS)]
    for network in NOT_PUBLIC:
        assert any(address in network for address in tried), network
    assert not any(is_public(address) for address in tried)


def test_nothing_near_is_reached(attacker: Room, innkeeper: Server, world: Internet, everywhere: None) -> None:
    targets: list[Target] = []
    for address in (*HOST_ADDRESSES, router_addresses(attacker)[2]):
        targets += [("tcp", address, HOST_PORT), ("udp", address, UDP_PORT), ("ping", address, 0)]
    for address in SPECIAL:
        targets += [("tcp", address, 80), ("udp", address, UDP_PORT), ("ping", address, 0)]
    control: Target = ("tcp", ADDRESS, 80)
    answers = knock(attacker, [*targets, control, ("udp", ADDRESS, UDP_PORT), ("ping", ADDRESS, 0)])
    assert reached(answers) == [control, ("udp", ADDRESS, UDP_PORT), ("ping", ADDRESS, 0)]
    # Refused, not lost: a reset or an ICMP error that the guest's kernel understands.
    slow = [target for target, answer in answers.items() if answer == "timeout" and target[0] != "ping"]
    assert slow == [], slow
    with firewall_off(innkeeper, world.host):
        open_now = reached(knock(attacker, targets))
    # Pings of one guest to many addresses go through a limit of the kernel's own.
    assert [target for target in targets if target not in open_now and target[0] != "ping"] == []
    assert reached(knock(attacker, targets[:6])) == [], "the firewall is back"


def test_addresses_that_nobody_owns_and_other_spellings_lead_nowhere(attacker: Room, everywhere: None) -> None:
    targets: list[Target] = []
    targets += [("tcp", address, port) for address in (*NOBODYS, *SPELLINGS, *SIX) for port in (80, HOST_PORT)]
    targets += [("udp", address, UDP_PORT) for address in (*NOBODYS, *SPELLINGS, *SIX)]
    targets += [("udp", "224.0.0.251", 5353), ("udp", "239.255.255.250", 1900), ("udp", "255.255.255.255", 67)]
    answers = knock(attacker, targets)
    assert reached(answers) == []
    # The spellings do mean addresses to this guest, or the attempt is void.
    assert {answers["tcp", spelling, 80] for spelling in SPELLINGS} == {"ECONNREFUSED"}, answers


def test_the_gateway_answers_dns_and_nothing_else(attacker: Room, innkeeper: Server) -> None:
    gateway, resolver, *uplink = router_addresses(attacker)
    ports = [*range(1, 1025), 2375, 3306, 5432, 6379, 7070, 8000, 8080, 8443, 9090, 9100, innkeeper.port]
    targets: list[Target] = [("tcp", address, port) for address in (gateway, resolver) for port in ports]
    for address in uplink:
        targets += [("tcp", address, port) for port in (22, 53, 80, HOST_PORT, innkeeper.port)]
    targets += [("udp", address, port) for address in (gateway, *uplink) for port in (53, 67, 123, 161, UDP_PORT)]
    assert reached(knock(attacker, targets)) == [("tcp", resolver, 53)]


@pytest.mark.long
def test_no_port_of_the_gateway_answers_but_dns(attacker: Room) -> None:
    gateway, resolver, _, uplink = router_addresses(attacker)
    for address in (gateway, resolver, uplink):
        open_ports = []
        for start in range(0, 65_536, 8_192):
            targets: list[Target] = [("tcp", address, port) for port in range(max(1, start), start + 8_192)]
            open_ports += [port for _, _, port in reached(knock(attacker, targets, timeout=600))]
        assert open_ports == ([53] if address == resolver else []), address


def test_a_neighbour_is_not_reached(attacker: Room, neighbour: Room, innkeeper: Server, world: Internet) -> None:
    server = "import socketserver as s\nclass H(s.BaseRequestHandler):\n def handle(self): self.request[1].sendto(b'y', self.client_address)\n"
    neighbour.put("/tmp/udp.py", f"{server}s.UDPServer(('0.0.0.0', 5000), H).serve_forever()".encode())
    neighbour.output(
        "(nohup python3 -m http.server 8000 > /dev/null 2>&1 &); (nohup python3 /tmp/udp.py > /dev/null 2>&1 &)"
    )
    (address,) = [word for word in neighbour.output("hostname -I").split() if ":" not in word]
    own: list[Target] = [("tcp", address, 8000), ("udp", address, 5000)]
    neighbour.output(f"for i in $(seq 100); do curl -so /dev/null http://{address}:8000/ && break; sleep 0.1; done")
    assert reached(knock(neighbour, own)) == own
    targets: list[Target] = [*own, ("ping", address, 0), ("tcp", f"::ffff:{address}", 8000)]
    # Its gateway, network and broadcast address, and names that a guest's own tables may know.
    targets += [("tcp", str(IPv4Address(address) + step), 8000) for step in (-2, -1, 1)]
    assert reached(knock(attacker, targets)) == []
    with firewall_off(innkeeper, world.host):
        assert set(own) <= set(reached(knock(attacker, targets)))
    neighbour.output("pkill -f '[h]ttp.server'; pkill -f '[u]dp.py'; true")


def test_sockets_of_the_host_that_have_a_name_are_not_there(attacker: Room, innkeeper: Server, driver: str) -> None:
    name = f"\0innkeeper-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(name)
        listener.listen()
        client.connect(name)
        # The same name inside, and every path of our own.
        paths = [
            f"@{name[1:]}",
            str(innkeeper.home / "api" / "inn.sock"),
            "/run/docker.sock",
            "/var/run/docker.sock",
            "/run/dbus/system_bus_socket",
        ]
        program = (
            "import socket, sys\n"
            "for path in sys.argv[1:]:\n"
            "    with socket.socket(socket.AF_UNIX) as s:\n"
            "        try: s.connect(path.replace('@', chr(0), 1)); print('reached', path)\n"
            "        except OSError as error: pass\n"
        )
        attacker.put("/tmp/unix.py", program.encode())
        assert attacker.output(f"sudo python3 /tmp/unix.py {' '.join(paths)}") == ""
    # A guest's root sees two sockets of ours: its own link, which is a port in a microVM, and its own sudo.
    found = attacker.output(
        "sudo find / -xdev -type s 2>/dev/null; sudo find /.innkeeper /run /tmp /dev -type s 2>/dev/null"
    ).split()
    link = ["/.innkeeper/link/agent.sock"] if driver == GVISOR else []
    assert sorted(set(found)) == [*link, "/run/innkeeper-sudo.sock"]


@pytest.mark.gvisor_only(reason="root of a microVM has a kernel of its own: test_raw_sockets.py")
def test_root_of_a_guest_has_no_raw_sockets_and_not_its_interface_by_itself(attacker: Room) -> None:
    # In a user namespace gVisor does give them: test_raw_sockets.py.
    said = json.loads(run_program(attacker, "raw_access", root=True))
    assert len(said) > 10
    assert [name for name, what in said.items() if what == "done"] == [], said
    for line in (
        "ip addr add 8.8.8.77/32 dev eth0",
        "ip link set eth0 address 02:00:00:00:00:09",
        "ip route add 8.8.8.2 dev eth0",
        "ip link add v0 type veth",
    ):
        assert attacker.run(f"sudo {line}")["result"]["exit_code"] != 0, line

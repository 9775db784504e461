"""gVisor gives raw sockets, and the interface itself, to any user of a guest who makes a user namespace (its packet sockets hear and do not send), and
root of a microVM has a whole kernel. So the wall is the firewall outside: the forged packets of test_frames.py, sent by a real guest.
"""

from __future__ import annotations

import json
import secrets
import socket
import time
from ipaddress import IPv4Address, IPv4Network

import pytest
from guest_side import PROGRAMS
from internet_fixture import ADDRESS, HOST_ADDRESS, Internet
from server_fixture import Api, Room, Server, until
from tests.guest_drivers import GVISOR
from tests.security.frames import UDP, attacks, frame, listening, packet, udp

from innkeeper.host.network.addressing import ServerPlan, Slot

pytestmark = pytest.mark.microvms

# Without a hardware header of one's own it is an honest packet.
HONEST = ("forged hardware address",)
IPV4 = b"\x08\x00"
IN_A_NAMESPACE = "unshare --user --map-root-user"


def slot_of(room: Room, innkeeper: Server) -> tuple[ServerPlan, Slot]:
    """The slot of a room's guest, by the address that the guest has."""
    kept = json.loads((innkeeper.home / "host" / "run" / "network.json").read_text())
    plan = ServerPlan(innkeeper.server_id, IPv4Network(kept["subnet"]))
    (address,) = [word for word in room.output("hostname -I").split() if ":" not in word]
    return plan, plan.slot((int(IPv4Address(address)) - int(plan.subnet.network_address)) // 4 - 2)


def is_plain(one: bytes) -> bool:
    """Whether a packet without its hardware header is none of an attack: with the source 0.0.0.0, which means "mine" to a raw socket; or to the host's
    address on the internet, which the host's own guard refuses, behind where these ears are (test_reach.py).
    """
    return one[12:16] == bytes(4) or (one[16:20] == socket.inet_aton(HOST_ADDRESS) and one[9] == UDP)


def is_for_the_host(one: bytes) -> bool:
    """Whether a frame is one for the host's address on the internet, as above."""
    return one[12:14] == IPV4 and one[30:34] == socket.inet_aton(HOST_ADDRESS) and one[23] == UDP


def send(room: Room, packets: list[bytes]) -> int:
    """Send them from the guest; how many its kernel took."""
    room.put("/tmp/send_packets.py", (PROGRAMS / "send_packets.py").read_bytes())
    room.put("/tmp/packets.json", json.dumps([one.hex() for one in packets]).encode())
    return int(room.output(f"{IN_A_NAMESPACE} python3 /tmp/send_packets.py /tmp/packets.json"))


@pytest.mark.gvisor_only(reason="a microVM sends whole frames")
def test_no_forged_packet_of_a_guest_arrives_anywhere(
    attacker: Room, neighbour: Room, innkeeper: Server, world: Internet
) -> None:
    (plan, slot), (_, other) = slot_of(attacker, innkeeper), slot_of(neighbour, innkeeper)
    marks = {name: secrets.token_bytes(12) for name in attacks(slot, other, b"")}
    places = (
        (world.beyond, "wan"),
        (world.beyond, "lo"),
        (world.host, plan.uplink),
        (world.host, "lo"),
        (other.netns, other.guest_interface),
    )
    honest = packet(slot.guest_ip, ADDRESS, UDP, udp(b"honest-frame"))
    forged = [
        (name, one[14:])
        for name, mark in marks.items()
        for one in attacks(slot, other, mark)[name]
        if name not in HONEST and one[12:14] == IPV4 and not is_plain(one[14:])
    ]
    with listening(*places) as heard:
        taken = send(attacker, [*(one for _, one in forged), honest])
        time.sleep(1)
    assert len(forged) / 2 < taken, f"gVisor lets the guest send {taken} of {len(forged)}"
    assert {name: data.hex() for data in heard for name, mark in marks.items() if mark in data} == {}
    print(f"{taken - 1} forged packets of {len(forged)} left the guest, none arrived")
    # Control: what was sent the same way, last and with nothing forged.
    assert any(b"honest-frame" in data for data in heard)
    assert neighbour.output(f"curl -sS --max-time 10 http://{ADDRESS}/") == "hello from the internet"


@pytest.mark.microvms_only
def test_no_forged_frame_of_a_microvm_arrives_anywhere(
    attacker: Room, neighbour: Room, innkeeper: Server, world: Internet
) -> None:
    (plan, slot), (_, other) = slot_of(attacker, innkeeper), slot_of(neighbour, innkeeper)
    marks = {name: secrets.token_bytes(12) for name in attacks(slot, other, b"")}
    forged = [
        one for name, mark in marks.items() for one in attacks(slot, other, mark)[name] if not is_for_the_host(one)
    ]
    honest = frame(slot, packet(slot.guest_ip, ADDRESS, UDP, udp(b"honest-frame")))
    attacker.put("/tmp/send_frames.py", (PROGRAMS / "send_frames.py").read_bytes())
    attacker.put("/tmp/frames.json", json.dumps([one.hex() for one in (*forged, honest)]).encode())
    places = ((world.beyond, "wan"), (world.beyond, "lo"), (world.host, plan.uplink), (world.host, "lo"))
    # A microVM's end of its slot is in the guest itself: what leaves for it is heard at the router's.
    with listening(*places, leaving=[(plan.router_netns, other.router_interface)]) as heard:
        taken = int(attacker.output("sudo python3 /tmp/send_frames.py /tmp/frames.json"))
        # What was sent last and with nothing forged has arrived, so whatever went before it would have.
        until(lambda: any(b"honest-frame" in data for data in heard))
    assert taken == len(forged) + 1
    assert {name: data.hex() for data in heard for name, mark in marks.items() if mark in data} == {}
    print(f"{len(forged)} forged frames left the guest, none arrived")
    assert neighbour.output(f"curl -sS --max-time 60 http://{ADDRESS}/") == "hello from the internet"


def test_a_guest_that_breaks_its_own_interface_harms_itself(api: Api, base: str, neighbour: Room, driver: str) -> None:
    room = api.room(base)
    by = IN_A_NAMESPACE if driver == GVISOR else "sudo"
    room.output(f"{by} ip addr add {ADDRESS}/32 dev eth0; {by} ip link set eth0 down; {by} ip link del eth0; true")
    assert neighbour.output(f"curl -sS --max-time 10 http://{ADDRESS}/") == "hello from the internet"
    assert room.output("echo alive") == "alive"
    room.delete()

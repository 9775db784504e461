"""What guests can reach: the internet, and nothing that is near; each refusal is checked against something that really answers there."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address

import pytest
from internet_fixture import ADDRESS, FORBIDDEN, HOST_ADDRESSES, HOST_PORT, REBOUND, Internet, answers_from
from server_fixture import Api, Room, Server

pytestmark = pytest.mark.microvms

CONNECT = """python3 -c '
import socket, sys
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=4).close()
    print("reached")
except OSError as error:
    print(type(error).__name__)
' """


# The default route's gateway as the kernel writes it.
GATEWAY = "awk '$2 == \"00000000\" {print $3}' /proc/net/route"


def reached(room: Room, address: str, port: int) -> bool:
    return bool(room.output(f"{CONNECT} {address} {port}") == "reached")


@pytest.fixture(scope="module")
def offline(api: Api) -> Iterator[Room]:
    """A room whose profile says `none`."""
    room = api.room(api.make_profile(egress_policy={"mode": "none"}))
    room.create()
    yield room
    room.delete()


def test_the_internet_is_there_by_address_and_by_name(shared: Room) -> None:
    assert shared.output(f"curl -sS --max-time 10 http://{ADDRESS}/") == "hello from the internet"
    assert shared.output("curl -sS --max-time 10 http://plain.test/") == "hello from the internet"
    assert shared.output("getent ahostsv4 plain.test | cut -d' ' -f1 | sort -u") == ADDRESS
    assert shared.run("getent hosts nobody.test")["result"]["exit_code"] == 2


def test_without_egress_nothing_is_reached(offline: Room, world: Internet) -> None:
    assert answers_from(world.host, ADDRESS, 80)
    for port in (53, 80, 443):
        assert not reached(offline, ADDRESS, port)
    asked = len(world.questions)
    assert offline.run("getent hosts plain.test")["result"]["exit_code"] == 2
    assert world.questions[asked:] == [], "a question left the machine"
    assert offline.output("echo works without a network") == "works without a network"


@pytest.mark.parametrize("address", HOST_ADDRESSES)
def test_the_host_is_not_reached_on_any_address(shared: Room, world: Internet, address: str) -> None:
    assert answers_from(world.host, address, HOST_PORT)
    assert not reached(shared, address, HOST_PORT)


@pytest.mark.parametrize("address", FORBIDDEN)
def test_private_and_special_addresses_are_not_reached(shared: Room, world: Internet, address: str) -> None:
    assert answers_from(world.host, address, 80)
    assert not reached(shared, address, 80)


def test_the_servers_own_ports_are_not_reached(shared: Room, innkeeper: Server) -> None:
    gateway = str(ip_address(int.from_bytes(bytes.fromhex(shared.output(GATEWAY)), "little")))
    for address in ("127.0.0.1", gateway, *HOST_ADDRESSES):
        assert not reached(shared, address, innkeeper.port)


def test_guests_do_not_reach_each_other(api: Api, base: str, shared: Room) -> None:
    other = api.room(base)
    other.output("cd /tmp && (nohup python3 -m http.server 8000 > /dev/null 2>&1 &)")
    other.output("until curl -so /dev/null http://127.0.0.1:8000/; do sleep 0.2; done")
    assert other.output("curl -sS --max-time 5 -o /dev/null -w '%{http_code}' http://127.0.0.1:8000/") == "200"
    addresses = [address for address in other.output("hostname -I").split() if ":" not in address]
    assert addresses
    for address in addresses:
        assert other.output(f"curl -sS --max-time 5 -o /dev/null -w '%{{http_code}}' http://{address}:8000/") == "200"
        assert not reached(shared, address, 8000)
    other.delete()


def test_there_is_no_ipv6(shared: Room) -> None:
    assert [line for line in shared.output("cat /proc/net/if_inet6").splitlines() if not line.endswith("lo")] == []
    for address in ("2001:db8::1", "fe80::1", "::ffff:169.254.169.254"):
        assert not reached(shared, address, 80)


def test_names_are_resolved_by_the_gateway_only(shared: Room, world: Internet) -> None:
    (server,) = shared.output("sed -n 's/^nameserver //p' /etc/resolv.conf").split()
    question = (
        "python3 -c 'import socket, sys; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(3);"
        ' s.sendto(bytes.fromhex("abcd01000001000000000000") + b"\\x05plain\\x04test\\x00\\x00\\x01\\x00\\x01", (sys.argv[1], 53));'
        " print(len(s.recv(512)))' "
    )
    assert int(shared.output(question + server)) > 12
    asked = len(world.questions)
    assert shared.run(question + ADDRESS)["result"]["exit_code"] == 1
    for port in (53, 853):
        assert not reached(shared, ADDRESS, port)
    assert world.questions[asked:] == []


def test_a_name_that_points_inside_is_not_told(shared: Room, world: Internet) -> None:
    assert shared.run(f"getent ahostsv4 {REBOUND}")["result"]["exit_code"] == 2
    assert REBOUND in world.questions


def test_mail_is_not_sent(shared: Room) -> None:
    assert not reached(shared, ADDRESS, 25)


def test_a_changed_policy_reaches_the_next_room(api: Api) -> None:
    profile = api.make_profile()
    before = api.room(profile)
    assert reached(before, ADDRESS, 80)
    assert api.client.patch(f"/api/profile/{profile}", json={"egress_policy": {"mode": "none"}}).status_code == 200
    after = api.room(profile)
    assert not reached(after, ADDRESS, 80)
    for room in (before, after):
        room.delete()

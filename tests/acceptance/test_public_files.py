"""`GET /vm/{instance_id}/file/{path}`: files that need no token, because the instance's id is the key."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import uuid4

import httpx2
import pytest
from server_fixture import Api, Room, Server

pytestmark = pytest.mark.microvms

HOME = "/home/user"
PAGE = b"<script>document.body.innerHTML = document.cookie</script>"


@pytest.fixture(scope="module")
def anybody(innkeeper: Server) -> Iterator[httpx2.Client]:
    """A client without a token."""
    yield innkeeper.client(token=None)


def url_of(room: Room, path: str) -> str:
    return f"/vm/{room.create()['instance_id']}/file{path}"


def absent(answer: httpx2.Response) -> bool:
    return answer.status_code == 404 and answer.json() == {"error": "file_not_found", "message": "File not found."}


def test_a_reported_file_needs_no_token(shared: Room, anybody: httpx2.Client) -> None:
    (row,) = shared.run("echo '<b>hello</b>' > page.html")["result"]["files_changed"]
    answer = anybody.get(row["public_url"])
    assert (answer.status_code, answer.text) == (200, "<b>hello</b>\n")
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert answer.headers["Content-Length"] == str(row["size"])
    head = anybody.head(row["public_url"])
    assert (head.status_code, head.content, head.headers["Content-Length"]) == (200, b"", str(row["size"]))


def test_html_is_served_without_any_power(shared: Room, anybody: httpx2.Client) -> None:
    shared.run("echo '<script>1</script>' > active.html; echo '<svg/>' > active.svg")
    for name in ("active.html", "active.svg"):
        answer = anybody.get(url_of(shared, f"{HOME}/{name}"))
        policy = [part.strip() for part in answer.headers["Content-Security-Policy"].split(";")]
        assert "sandbox" in policy and "default-src 'none'" in policy
        assert not any(part.startswith("script-src") or "allow-scripts" in part for part in policy)
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Referrer-Policy"] == "no-referrer"
        assert answer.headers["Cache-Control"] == "private, no-store"
        assert "Set-Cookie" not in answer.headers and "Access-Control-Allow-Origin" not in answer.headers


def test_ranges(shared: Room, anybody: httpx2.Client) -> None:
    shared.run("printf 0123456789 > digits.txt")
    url = url_of(shared, f"{HOME}/digits.txt")
    part = anybody.get(url, headers={"Range": "bytes=3-5"})
    assert (part.status_code, part.text, part.headers["Content-Range"]) == (206, "345", "bytes 3-5/10")
    assert anybody.get(url).headers["Accept-Ranges"] == "bytes"
    assert anybody.get(url, headers={"Range": "bytes=50-"}).status_code == 416


def test_cookies_and_tokens_are_not_looked_at(shared: Room, anybody: httpx2.Client) -> None:
    shared.run("echo open > open.txt; echo closed > /tmp/closed.txt")
    url = url_of(shared, f"{HOME}/open.txt")
    for headers in ({"Cookie": "session=x"}, {"Authorization": "Bearer nonsense"}, {"Authorization": "Basic eDp5"}):
        assert anybody.get(url, headers=headers).text == "open\n"
    # Nor do they open anything.
    assert absent(shared.client.get(url_of(shared, "/etc/hostname")))


def test_only_reported_files_are_public(shared: Room, anybody: httpx2.Client) -> None:
    shared.run("echo 1 > reported.txt")
    shared.put(f"{HOME}/put.txt", b"never reported by a command")
    assert anybody.get(url_of(shared, f"{HOME}/reported.txt")).status_code == 200
    for path in (
        "/etc/passwd",
        f"{HOME}/.bashrc",
        "/proc/self/environ",
        "/proc/1/cmdline",
        HOME,
        "/",
        f"{HOME}/nothing",
        f"{HOME}/reported.txt/../.bashrc",
        "//etc/passwd",
        "/%2e%2e/etc/passwd",
    ):
        assert absent(anybody.get(url_of(shared, path))), path


def test_a_reported_symlink_leads_nowhere_private(shared: Room, anybody: httpx2.Client) -> None:
    shared.run("ln -s /proc/1/environ kernel; ln -s /etc/shadow shadow; mkfifo pipe; ln -s /dev/zero zero")
    for name in ("kernel", "shadow", "pipe", "zero"):
        assert absent(anybody.get(url_of(shared, f"{HOME}/{name}"))), name


def test_a_deleted_file_is_absent(shared: Room, anybody: httpx2.Client) -> None:
    shared.run("echo 1 > soon-gone.txt")
    url = url_of(shared, f"{HOME}/soon-gone.txt")
    assert anybody.get(url).status_code == 200
    shared.run("rm soon-gone.txt")
    assert absent(anybody.get(url))


def test_the_key_opens_one_instance_only(api: Api, base: str, shared: Room, anybody: httpx2.Client) -> None:
    shared.run("echo mine > mine.txt")
    other = api.room(base)
    assert absent(anybody.get(url_of(other, f"{HOME}/mine.txt")))
    for instance in (str(uuid4()), "nonsense", "00000000-0000-0000-0000-000000000000"):
        assert absent(anybody.get(f"/vm/{instance}/file{HOME}/mine.txt"))
    # Nor is the key something that the database orders by, or the room's other names.
    assert absent(anybody.get(f"/vm/{shared.profile_id}/file{HOME}/mine.txt"))
    other.run("echo gone > gone.txt")
    url = url_of(other, f"{HOME}/gone.txt")
    assert anybody.get(url).status_code == 200
    assert other.delete().status_code == 204
    assert absent(anybody.get(url))


def test_the_profile_says_what_is_public(api: Api, anybody: httpx2.Client) -> None:
    profile = api.make_profile(public_files="all")
    room = api.room(profile)
    room.run("echo 1 > reported.txt")
    assert anybody.get(url_of(room, "/etc/passwd")).status_code == 200
    for path in ("/etc/shadow", "/proc/self/environ", "/dev/zero", "/sys/kernel", "/run/innkeeper-sudo.sock", HOME):
        assert absent(anybody.get(url_of(room, path))), path
    assert api.client.patch(f"/api/profile/{profile}", json={"public_files": "off"}).status_code == 200
    for path in ("/etc/passwd", f"{HOME}/reported.txt"):
        assert absent(anybody.get(url_of(room, path))), path
    assert api.client.patch(f"/api/profile/{profile}", json={"public_files": "reported"}).status_code == 200
    assert anybody.get(url_of(room, f"{HOME}/reported.txt")).status_code == 200
    room.delete()


def test_other_methods_are_refused(shared: Room, anybody: httpx2.Client) -> None:
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        answer = anybody.request(method, url_of(shared, f"{HOME}/x"))
        assert (answer.status_code, answer.json()["error"]) == (405, "method_not_allowed")
        assert answer.headers["Allow"] == "GET, HEAD"


def test_an_address_that_asks_too_often_has_to_wait(shared: Room, anybody: httpx2.Client) -> None:
    shared.run("echo 1 > often.txt")
    url = url_of(shared, f"{HOME}/often.txt")
    # As a front on this machine says whose requests these are.
    busy, quiet = {"X-Forwarded-For": "192.0.2.7"}, {"X-Forwarded-For": "192.0.2.8"}
    statuses = [anybody.head(f"/vm/{uuid4()}/file/x", headers=busy).status_code for _ in range(590)]
    assert set(statuses) == {404}
    while (answer := anybody.get(url, headers=busy)).status_code == 200:
        statuses.append(200)
        assert len(statuses) < 1200
    assert (answer.status_code, answer.json()["error"]) == (429, "rate_limited")
    assert int(answer.headers["Retry-After"]) >= 1
    assert anybody.get(url, headers=quiet).status_code == 200

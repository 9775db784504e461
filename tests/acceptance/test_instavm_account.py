"""The `instavm` package, unmodified, on a real server: accounts, keys, usage and events."""

from __future__ import annotations

import base64
import hashlib
import secrets
import stat
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from instavm_client import Instavm
from server_fixture import Api, Room, Server

SSH_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIA" + "A" * 42 + " laptop"


def test_whoami_and_ssh_keys(instavm: Instavm) -> None:
    told = instavm.sdk("answer = client.add_ssh_key(words[0])", SSH_KEY)
    assert told["fingerprint"].startswith("SHA256:")
    printed = instavm.ok("whoami")
    assert "Email: " in printed and told["fingerprint"] in printed and "laptop" in printed
    listed = "answer = [key['id'] for key in client.list_ssh_keys()]"
    assert instavm.sdk(listed) == [told["id"]]
    instavm.ok("ssh-key", "remove", str(told["id"]))
    assert instavm.sdk(listed) == []


def test_api_keys(instavm: Instavm) -> None:
    made = instavm.sdk("answer = client.api_keys.create(description='of the SDK')")
    narrower = replace(instavm, api_key=made["api_key"])
    assert narrower.sdk("answer = client.get_current_user()")["name"] == "default"
    script = "answer = [(row['id'], row['description']) for row in client.api_keys.list()]"
    assert [made["id"], "of the SDK"] in instavm.sdk(script)
    instavm.sdk("answer = client.api_keys.delete(words[0])", made["id"])
    refused = narrower.cli("whoami")
    assert refused.returncode != 0 and made["api_key"] not in refused.stdout + refused.stderr


def test_usage_is_what_the_guests_used(instavm: Instavm, room: Room) -> None:
    script = "answer = client.get_usage_breakdown(days=1)['totals']"
    room.output("true")
    before = instavm.sdk(script)
    room.output("for ((i = 0; i < 400000; i++)); do :; done")
    after = instavm.sdk(script)
    # What other rooms of this server do meanwhile comes on top.
    assert (after["cpu_hours"] - before["cpu_hours"]) * 3600 > 0.3
    assert after["ram_gib_hours"] > before["ram_gib_hours"] and after["cost_dollars"] == 0


def test_events(instavm: Instavm, api: Api, base: str) -> None:
    room = api.room(base)
    room.create()
    room.delete()
    assert {"room.create", "room.destroy"} <= set(instavm.ok("events", "catalog").split())
    events = instavm.sdk("answer = client.audit.events(event_group='room', limit=2)['items']")
    assert [event["event_type"] for event in events] == ["room.destroy", "room.create"]
    assert "room.destroy" in instavm.ok("events", "tail", "--once")
    assert events[0]["id"] in instavm.ok("events", "get", events[0]["id"], "--json")


@pytest.mark.parametrize(
    "script",
    ["client.browser.create_session()", "client.list_vaults()"],
)
def test_what_is_not_here_says_so(instavm: Instavm, script: str) -> None:
    caught = f"try:\n    {script}\nexcept Exception as error:\n    answer = str(error)"
    assert "not part of this server" in instavm.sdk(caught)


# --- logging in --------------------------------------------------------------------------------------------------------

# What a person does in a browser: read the page, put a token into its form, and follow where that leads.
PERSON = """\
import sys, urllib.parse, urllib.request
page = urllib.request.urlopen(sys.argv[2]).read().decode()
assert 'type="password"' in page and "asks for an API key" in page, page
form = urllib.parse.urlencode({"token": open(sys.argv[1]).read().strip()}).encode()
urllib.request.urlopen(urllib.request.Request(sys.argv[2], form)).read()
"""


def test_a_command_line_logs_in_through_a_browser(innkeeper: Server, tmp_path: Path) -> None:
    (tmp_path / "person.py").write_text(PERSON)
    browser = f"{sys.executable} {tmp_path / 'person.py'} {innkeeper.home / 'first-token'} %s &"
    stranger = Instavm(innkeeper.url, None, tmp_path)
    printed = stranger.ok("login", env={"BROWSER": browser})
    assert "Logged in as " in printed and innkeeper.token not in printed
    kept = tmp_path / ".instavm" / "config.json"
    assert innkeeper.token not in kept.read_text() and stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert "Account" in stranger.ok("whoami")
    names = [token["name"] for token in innkeeper.client().get("/v1/tokens").json()]
    assert any(name.startswith("CLI - ") for name in names)


def begun(innkeeper: Server, **changes: str) -> tuple[str, str, str]:
    """(pairing id, the page's path, the verifier) of a new pairing."""
    verifier = secrets.token_urlsafe(48)
    challenge = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=").decode()
    body = {
        "state": "12345678", "code_challenge": challenge, "code_challenge_method": "S256",
        "redirect_uri": "http://127.0.0.1:1/callback", "cli_version": "1", "hostname": "<b>h</b>", **changes,
    }  # fmt: skip
    answer = innkeeper.client(None).post("/api/cli-auth/start", json=body)
    assert answer.status_code == 200, answer.text
    pairing = answer.json()["pairing_id"]
    assert answer.json()["login_url"] == f"{innkeeper.url}/cli-login/{pairing}"
    return pairing, f"/cli-login/{pairing}", verifier


def test_the_page_gives_a_code_for_a_token_and_the_code_a_key_once(innkeeper: Server) -> None:
    pairing, path, verifier = begun(innkeeper)
    client = innkeeper.client(None)
    page = client.get(path)
    assert page.status_code == 200 and "&lt;b&gt;h&lt;/b&gt;" in page.text and "<b>h</b>" not in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert page.headers["cache-control"] == "no-store"
    refused = client.post(path, data={"token": "rk_live_wrong"})
    assert refused.status_code == 403 and "rk_live_wrong" not in refused.text
    sent = client.post(path, data={"token": innkeeper.token})
    assert sent.status_code == 303
    where, _, query = sent.headers["location"].partition("?")
    assert where == "http://127.0.0.1:1/callback" and query.startswith("state=12345678&code=")
    # The page is over, and the code is worth nothing without the verifier.
    assert client.get(path).status_code == 404
    body = {"pairing_id": pairing, "code": query.rpartition("=")[2], "code_verifier": verifier}
    for wrong in ({"code": "x"}, {"code_verifier": "x"}, {"pairing_id": "x"}):
        answer = client.post("/api/cli-auth/exchange", json={**body, **wrong})
        assert answer.status_code in (400, 404) and set(answer.json()) == {"detail", "code"}
    done = client.post("/api/cli-auth/exchange", json=body)
    assert done.status_code == 200 and done.json()["user"]["email"]
    assert innkeeper.client(done.json()["api_key"]).get("/v1/users/me").status_code == 200
    assert client.post("/api/cli-auth/exchange", json=body).status_code == 404
    assert verifier not in innkeeper.log() and pairing not in innkeeper.log()


def test_guessing_ends_a_login(innkeeper: Server) -> None:
    pairing, path, verifier = begun(innkeeper)
    client = innkeeper.client(None)
    statuses = [client.post(path, data={"token": f"rk_live_{number}"}).status_code for number in range(7)]
    assert statuses[:4] == [403] * 4 and statuses[-1] == 404
    assert client.post(path, data={"token": innkeeper.token}).status_code == 404
    body = {"pairing_id": pairing, "code": "", "code_verifier": verifier}
    assert client.post("/api/cli-auth/exchange", json=body).status_code == 404


def test_a_token_that_may_make_no_keys_approves_nothing(innkeeper: Server) -> None:
    _, path, _ = begun(innkeeper)
    made = innkeeper.client().post("/v1/tokens", json={"name": "narrow", "scopes": ["rooms"]}).json()
    refused = innkeeper.client(None).post(path, data={"token": made["token"]})
    assert refused.status_code == 403 and "scope" in refused.text


@pytest.mark.parametrize(
    "changes",
    [
        {"redirect_uri": "http://evil.example/callback"},
        {"redirect_uri": "http://127.0.0.1:99999/callback"},
        {"redirect_uri": "http://127.0.0.1:80/callback?x=1"},
        {"redirect_uri": "http://127.0.0.1:80@evil.example/callback"},
        {"code_challenge": "short"},
        {"code_challenge_method": "plain"},
        {"state": "a&code=b-and-more"},
        {"state": "a\r\nSet-Cookie: b"},
        {"hostname": "x" * 300},
    ],
    ids=range(9),
)
def test_a_login_that_leads_elsewhere_is_refused(innkeeper: Server, changes: dict[str, str]) -> None:
    body = {
        "state": "12345678", "code_challenge": "A" * 43, "code_challenge_method": "S256",
        "redirect_uri": "http://127.0.0.1:1/callback", **changes,
    }  # fmt: skip
    answer = innkeeper.client(None).post("/api/cli-auth/start", json=body)
    assert answer.status_code == 400 and set(answer.json()) == {"detail", "code"}

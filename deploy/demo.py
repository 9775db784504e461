"""The demo: a chart drawn in a room of a running server, its file change reported, the file fetched without a token.

make demo        (INNKEEPER_URL, INNKEEPER_TOKEN, INNKEEPER_HOME as for `inn`)
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import httpx2

PROFILE = "python-data-science"
ROOM = "demo"
COMMAND = "python -c 'import matplotlib.pyplot as plt; plt.plot([1,2,3,4]); plt.savefig(\"/tmp/chart.png\")'"
CHART_IN_ROOM = "/tmp/chart.png"  # noqa: S108  # in the guest
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# The image may still be building when the server has just been started for the first time.
PATIENCE_SECONDS = 900
CHART = Path(__file__).resolve().parents[1] / "build" / "chart.png"


class DemoFailed(Exception):  # noqa: N818  # reads as a sentence where it is raised
    """The server did not answer as documented."""


def main() -> None:
    """Run the demo; exits with a sentence when something is not as it should be."""
    url = os.environ.get("INNKEEPER_URL", "http://127.0.0.1:7070")
    try:
        with (
            httpx2.Client(base_url=url, headers={"Authorization": f"Bearer {token()}"}, timeout=150) as client,
            httpx2.Client(base_url=url, timeout=30) as anonymous,
        ):
            draw(client, anonymous)
    except (DemoFailed, httpx2.HTTPError) as failure:
        hint = (
            f"\nIs the server up at {url}? Start it with: make run" if isinstance(failure, httpx2.ConnectError) else ""
        )
        sys.exit(f"demo failed: {failure}{hint}")


def token() -> str:
    """INNKEEPER_TOKEN, or the first token that the server left in its state directory."""
    if value := os.environ.get("INNKEEPER_TOKEN"):
        return value
    path = Path(os.environ.get("INNKEEPER_HOME", "/var/lib/innkeeper")) / "first-token"
    try:
        return path.read_text().strip()
    except OSError as error:
        raise DemoFailed(f"no token: {path}: {error.strerror}. Start the server with: make run") from error


def draw(client: httpx2.Client, anonymous: httpx2.Client) -> None:
    """A fresh room, one command, one chart."""
    profile = next((item["id"] for item in expect(client.get("/api/profiles"), 200) if item["name"] == PROFILE), None)
    if profile is None:
        raise DemoFailed(f"there is no profile {PROFILE}")
    room = f"/api/profile/{profile}/room/{ROOM}"
    gone = client.delete(room)
    if gone.status_code not in (200, 204, 404):
        raise DemoFailed(f"DELETE {room}: {gone.status_code} {gone.text}")
    ready = until_ready(client, room)
    print(f"room {ROOM} is {ready['status']}: instance {ready['instance_id']}")

    began = time.monotonic()
    answer = expect(client.post(f"{room}/command", json={"command": COMMAND}), 200)
    milliseconds = (time.monotonic() - began) * 1000
    print(json.dumps(answer, indent=2))
    result = answer["result"]
    check(answer["status"] == "success" and result["exit_code"] == 0, "the command failed")
    check(result["output"] == "", "the command printed something")
    check(
        [change["path"] for change in result["files_changed"]] == [CHART_IN_ROOM],
        "not exactly /tmp/chart.png changed",
    )

    change = result["files_changed"][0]
    check(change["status"] == "created" and change["mime_type"] == "image/png", "the chart is not a new image/png")
    fetched = anonymous.get(change["public_url"])
    check(fetched.status_code == 200, f"GET {change['public_url']}: {fetched.status_code} {fetched.text[:200]}")
    check(fetched.content.startswith(PNG_SIGNATURE), "what was fetched is not a PNG")
    check(len(fetched.content) == change["size"], f"{len(fetched.content)} bytes fetched, {change['size']} reported")
    CHART.parent.mkdir(exist_ok=True)
    CHART.write_bytes(fetched.content)
    print(f"{milliseconds:.0f} ms. Fetched without a token: {len(fetched.content)} bytes of PNG, kept at {CHART}")


def until_ready(client: httpx2.Client, room: str) -> dict[str, Any]:
    """The ready room, waiting as long as the server says that it will come."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    said = ""
    while True:
        answer = client.post(room)
        if answer.status_code != 503 or time.monotonic() > deadline:
            ready: dict[str, Any] = expect(answer, 200)
            return ready
        message = error_message(answer)
        if message != said:
            print(f"waiting: {message}", flush=True)
            said = message
        time.sleep(min(30.0, float(answer.headers.get("Retry-After", "2"))))


def expect(answer: httpx2.Response, status: int) -> Any:
    """The JSON of an answer that has to have `status`."""
    if answer.status_code != status:
        raise DemoFailed(
            f"{answer.request.method} {answer.request.url.path}: {answer.status_code} {error_message(answer)}"
        )
    return answer.json()


def error_message(answer: httpx2.Response) -> str:
    """The documented sentence of an error answer."""
    try:
        return str(answer.json()["message"])
    except (ValueError, KeyError, TypeError):
        return answer.text[:200]


def check(condition: bool, otherwise: str) -> None:  # an assertion that -O keeps
    """Fail the demo with a sentence."""
    if not condition:
        raise DemoFailed(otherwise)


if __name__ == "__main__":
    main()

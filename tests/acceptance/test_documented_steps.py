"""The pages are what they say: their commands run as they stand, in order, print what the page prints, and use every endpoint that it documents."""

from __future__ import annotations

import re
from pathlib import Path

import httpx2
import pytest
from documented_steps import DOCS, run_steps, setup_of, steps_of
from server_fixture import Server

pytestmark = pytest.mark.gvisor_only(reason="the pages show what a server with gVisor answers")

V1 = DOCS / "api" / "v1.md"
GUIDES = [DOCS / f"{name}.md" for name in ("agents", "lifetime", "logs", "snapshots", "volumes")]
PAGES = [*sorted(DOCS.glob("api/v1-*.md")), DOCS / "api" / "gentity.md", *GUIDES, V1]
# What no example shows, and why not.
_REGISTRY = "needs a registry or an archive from elsewhere: test_image_import.py"
NOT_SHOWN = {
    ("POST", "/v1/images"): _REGISTRY,
    ("PUT", "/v1/images/{name}/archive"): _REGISTRY,
    ("GET", "/v1/images/{name}/import/events"): _REGISTRY,
    ("DELETE", "/v1/images/{name}/import"): _REGISTRY,
    ("POST", "/v1/hosts/{host_id}/drain"): "would keep all other tests of this server waiting: test_operations.py",
    ("POST", "/v1/backup"): "takes as long as everything that the server has: test_backup.py",
}
ENDPOINT = re.compile(r"^### `([A-Z]+) (\S+)`$", re.MULTILINE)
ANSWERED = re.compile(
    r'^innkeeper_http_requests_total{method="(\w+)",route="([^"]+)",status="([23]\d\d)"} (\S+)$', re.MULTILINE
)


def test_the_quickstart(innkeeper: Server, tmp_path: Path) -> None:
    _follow(DOCS / "quickstart.md", innkeeper, tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_an_endpoints_page(innkeeper: Server, tmp_path: Path, page: Path) -> None:
    before = _answered(innkeeper)
    _follow(page, innkeeper, tmp_path, setup=setup_of(V1))
    used = {call for call, times in _answered(innkeeper).items() if times > before.get(call, 0)}
    documented = {(method, path) for method, path in ENDPOINT.findall(page.read_text())}
    assert documented - used - NOT_SHOWN.keys() == set()


def _follow(page: Path, innkeeper: Server, folder: Path, *, setup: str = "") -> None:
    steps = steps_of(page)
    assert steps
    printed = run_steps(steps, innkeeper, folder, setup=setup)
    assert len(printed) == len(steps)
    for step, said in zip(steps, printed, strict=True):
        assert step.fits(said), f"{step.commands}\n-- the page says\n{step.printed}\n-- it prints\n{said}"


def _answered(innkeeper: Server) -> dict[tuple[str, str], float]:
    """How often each endpoint did what it was asked for."""
    page = httpx2.get(f"{innkeeper.url}/metrics", trust_env=False).text
    found: dict[tuple[str, str], float] = {}
    for method, route, _, times in ANSWERED.findall(page):
        found[method, route] = found.get((method, route), 0) + float(times)
    return found

"""The pages hold together: links and paths lead somewhere, every page is reached, names of settings and commands exist."""

import re
from functools import cache
from pathlib import Path

import pytest
import typer

from innkeeper.cli.main import build
from innkeeper.settings import Settings
from innkeeper.settings_sources import ENV_PREFIX, NOT_SETTINGS

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]

LINK = re.compile(r"(?<!!)\[[^\]\n]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
FENCE = re.compile(r"^```[^\n]*\n.*?^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`\n]+)`")
SOURCE_FOLDERS = ("src/", "tests/", "docs/", "guest/", "images/", "deploy/", "setup/", "bench/", ".ci/")
PACKAGE = ROOT / "src" / "innkeeper"


def _names(pages):
    return [str(page.relative_to(ROOT)) for page in pages]


@cache
def _text(page):
    return page.read_text()


@cache
def _prose(page):
    """The page without its code blocks."""
    return FENCE.sub("", _text(page))


def _anchor(heading):
    """A heading's anchor, as GitHub makes it."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")


def _links(page):
    for target in LINK.findall(_prose(page)):
        if not re.match(r"[a-z]+:", target):
            path, _, fragment = target.partition("#")
            yield target, (page.parent / path).resolve() if path else page, fragment


@pytest.mark.parametrize("page", PAGES, ids=_names(PAGES))
def test_links_resolve(page):
    broken = []
    for target, path, fragment in _links(page):
        anchors = () if not fragment else {_anchor(heading) for heading in HEADING.findall(_prose(path))}
        if not path.exists() or (fragment and fragment not in anchors):
            broken.append(target)
    assert not broken


def test_every_page_is_reached_from_the_readme():
    reached, waiting = set(), [README]
    while waiting:
        page = waiting.pop()
        if page not in reached and page.exists() and page.suffix == ".md":
            reached.add(page)
            waiting += [path for _, path, _ in _links(page)]
    assert set(PAGES) <= reached


@pytest.mark.parametrize("page", PAGES, ids=_names(PAGES))
def test_paths_that_are_named_exist(page):
    missing = []
    for code in CODE.findall(_prose(page)):
        path, _, test = code.partition("::")
        if re.search(r"[ <{*]", path):
            continue
        if path.startswith(SOURCE_FOLDERS):
            found = ROOT / path
        elif "/" in path and path.endswith(".py"):
            found = PACKAGE / path
        else:
            continue
        if not found.exists() or (test and f"def {test}(" not in found.read_text()):
            missing.append(code)
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=_names(PAGES))
def test_settings_that_are_named_exist(page):
    known = {ENV_PREFIX + name.upper() for name in Settings.model_fields} | NOT_SETTINGS
    named = set(re.findall(rf"\b{ENV_PREFIX}[A-Z_]*[A-Z]", _text(page)))
    assert named <= known


def _subcommands(command, path):
    yield path
    for name, child in getattr(command, "commands", {}).items():
        yield from _subcommands(child, (*path, name))


@pytest.mark.parametrize("page", PAGES, ids=_names(PAGES))
def test_commands_that_are_named_exist(page):
    known = set(_subcommands(typer.main.get_command(build()), ()))
    groups = {path[:1] for path in known if len(path) == 2}
    unknown = []
    for first, second in re.findall(
        r"(?:^|[`$(#|] ?|/bin/)inn ([a-z]+(?:-[a-z]+)*)(?: ([a-z]+(?:-[a-z]+)*))?", _text(page), re.MULTILINE
    ):
        path = (first, second) if (first,) in groups and second else (first,)
        if path not in known:
            unknown.append(" ".join(path))
    assert not unknown


def test_make_targets_that_are_named_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        target for page in PAGES for target in re.findall(r"(?:^|[`#] ?)make ([a-z]+)\b", _text(page), re.MULTILINE)
    }
    assert named <= targets

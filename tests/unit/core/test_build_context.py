from __future__ import annotations

import pytest

from innkeeper.core.build_context import ContextEntry, ContextError, content_digest, select, takes_one_file

ENTRIES = [
    ContextEntry("a.txt", "file", 0o644, digest="1"),
    ContextEntry("b.txt", "file", 0o644, digest="2"),
    ContextEntry("src", "dir", 0o755),
    ContextEntry("src/main.py", "file", 0o755, digest="3"),
    ContextEntry("src/link", "symlink", 0o777, target="main.py"),
    ContextEntry("src/deep", "dir", 0o755),
    ContextEntry("src/deep/x", "file", 0o600, digest="4"),
    ContextEntry("srcfile", "file", 0o644, digest="5"),
    ContextEntry("todeep", "symlink", 0o777, target="/src/../src/./deep"),
    ContextEntry("dangling", "symlink", 0o777, target="nowhere"),
    ContextEntry("round", "symlink", 0o777, target="round"),
]
INDEX = {entry.path: entry for entry in ENTRIES}


def names(*sources: str) -> list[str]:
    return [one.name for one in select(INDEX, sources)]


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        (("a.txt",), ["a.txt"]),
        (("src",), ["deep", "deep/x", "link", "main.py"]),
        (("src/deep/x", "*.txt"), ["a.txt", "b.txt", "x"]),
        (("src*",), ["deep", "deep/x", "link", "main.py", "srcfile"]),
        (("?.txt",), ["a.txt", "b.txt"]),
        (("[^a].txt",), ["b.txt"]),
        (("src/*/x",), ["x"]),
        ((".",), [entry.path for entry in sorted(ENTRIES, key=lambda e: e.path)]),
        (("src/link",), ["link"]),
        (("todeep",), ["x"]),
        (("todeep/x",), ["x"]),
    ],
)
def test_a_file_keeps_its_name_and_a_directory_gives_what_it_holds(
    sources: tuple[str, ...], expected: list[str]
) -> None:
    assert names(*sources) == expected


@pytest.mark.parametrize("source", ["missing", "*.md", "sr", "[a", "a.txt/x", "dangling", "round"])
def test_a_source_that_takes_nothing_is_an_error(source: str) -> None:
    with pytest.raises(ContextError):
        names(source)


def test_a_single_file_may_take_the_name_of_the_destination() -> None:
    assert takes_one_file(INDEX, ("a.txt",))
    assert takes_one_file(INDEX, ("a*",))
    assert not takes_one_file(INDEX, ("*.txt",))
    assert not takes_one_file(INDEX, ("src",))
    assert not takes_one_file(INDEX, (".",))


def test_the_digest_follows_names_modes_contents_and_targets() -> None:
    def digest(**change: object) -> str:
        entry = {"path": "a", "type": "file", "mode": 0o644, "digest": "1", "offset": 0, **change}
        return content_digest(select({"a": ContextEntry(**entry)}, ["."]))  # type: ignore[arg-type]

    assert digest() == digest(offset=4096)
    different = [digest(), digest(mode=0o755), digest(digest="2"), digest(type="symlink", target="x")]
    assert len(set(different)) == 4


def test_a_link_that_is_named_gives_what_it_points_to() -> None:
    (one,) = select(INDEX, ["src/link"])
    assert (one.name, one.entry.path) == ("link", "src/main.py")
    assert [one.entry.type for one in select(INDEX, ["src"]) if one.name == "link"] == ["symlink"]
    assert takes_one_file(INDEX, ["src/link"])

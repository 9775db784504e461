"""Lines of a watch come from a guest: only events get through, however they are cut."""

import itertools
import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from innkeeper.errors import GuestError
from innkeeper.host.file_watch import LINE_BYTES, Lines
from innkeeper.host.wire_paths import absolute_path, relative_path

GOOD = (
    b'{"type":"created","path":"/a/\xc3\xa9\\n","directory":true}\n'
    b'{"type":"moved","path":"/b","from_b64":"L/8=","extra":"dropped"}\n'
    b'{"type":"overflow","path":"ignored"}\n'
)


@given(st.lists(st.integers(min_value=0, max_value=len(GOOD)), max_size=8))
def test_however_it_is_cut_the_lines_are_the_same(cuts):
    lines, said = Lines(), b""
    edges = [0, *sorted(cuts), len(GOOD)]
    for start, end in itertools.pairwise(edges):
        said += lines.take(GOOD[start:end])
    assert [json.loads(line) for line in said.splitlines()] == [
        {"type": "created", "path": "/a/é\n", "from": None, "directory": True},
        {"type": "moved", "path": "/b", "from": "b64:L/8=", "directory": False},
        {"type": "overflow"},
    ]


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"[]",
        b"garbage",
        b'{"type":"created"}',
        b'{"type":"created","path":"relative"}',
        b'{"type":"created","path":"/nul\\u0000"}',
        b'{"type":"created","path":"/\\ud800"}',
        b'{"type":"created","path":7}',
        b'{"type":"created","path_b64":"%"}',
        b'{"type":"exploded","path":"/a"}',
        b'{"type":["created"],"path":"/a"}',
        b'{"type":"moved","path":"/a"}',
        b'{"type":"created","path":"/' + b"x" * 5_000 + b'"}',
        b"[" * 50_000,
    ],
)
def test_what_is_no_event_is_refused(line):
    with pytest.raises(GuestError):
        Lines().take(line + b"\n")


def test_a_line_without_end_costs_little():
    lines = Lines()
    tracemalloc.start()
    try:
        with pytest.raises(GuestError):
            for _ in range(2 * LINE_BYTES):
                lines.take(b"x")
        assert tracemalloc.get_traced_memory()[1] < 4 * LINE_BYTES
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("path", ["/absolute", "a//b", "a/", "..", "a/../b", "a/./b", "nul\0", "x/" * 3_000 + "x"])
def test_a_path_that_leads_elsewhere_is_refused(path):
    with pytest.raises(GuestError):
        relative_path({"path": path})


def test_paths_that_are_right():
    assert relative_path({}) == ""
    assert relative_path({"path": "a/b\n"}) == "a/b\n"
    assert relative_path({"path_b64": "YS//"}) == "b64:YS//"
    assert absolute_path({"path": "/a"}) == "/a"

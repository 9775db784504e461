"""What a guest packs as a cell's results: read back, and refused where it is not as it should be."""

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from innkeeper.core.cell_results import RESULTS_BYTES_MAX, CellResult, parse_results
from innkeeper.errors import GuestError


def form(name, content, follows=True):
    content = content.encode()
    return struct.pack("!HIB", len(name), len(content), follows) + name.encode() + (content if follows else b"")


def pack(kind, *forms):
    return struct.pack("!BB", kind, len(forms)) + b"".join(forms)


def test_results_are_read_in_order():
    packed = pack(1, form("text/plain", "T"), form("image/png", "cG5n")) + pack(2, form("text/html", "<b>ü", False))
    assert parse_results(packed) == (
        CellResult("display", {"text/plain": "T", "image/png": "cG5n"}, {}),
        CellResult("result", {}, {"text/html": 5}),
    )
    assert parse_results(b"") == ()
    assert parse_results(pack(1, form("application/vnd.plotly.v1+json", "{}")))[0].data


@pytest.mark.parametrize(
    "packed",
    [
        b"\1",
        pack(3, form("text/plain", "T")),
        pack(1, form("text/plain", "T"))[:-1],
        pack(1, form("no media type", "T")),
        pack(1, form("text/plain\n", "T")),
        pack(1) * 101,
        struct.pack("!BB", 1, 1) + struct.pack("!HIB", 10, 1, 1) + b"text/plain\xff",
        struct.pack("!BB", 1, 1) + struct.pack("!HIB", 2, 0, 1) + b"\xff\xff",
        bytes(RESULTS_BYTES_MAX + 1),
    ],
)
def test_what_makes_no_sense_is_the_guests_fault(packed):
    with pytest.raises(GuestError):
        parse_results(packed)


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(packed):
    with contextlib.suppress(GuestError):
        parse_results(packed)

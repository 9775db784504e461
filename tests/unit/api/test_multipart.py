"""Multipart bodies are a client's: however they are cut they mean the same, and none costs more than its bounds."""

import asyncio
import itertools
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from innkeeper.api.multipart import PARTS_MAX, PartBegin, PartData, PartEnd, boundary_of, part_events
from innkeeper.errors import InvalidRequestError

BODY = (
    b'--b\r\nContent-Disposition: form-data; name="remote_path"\r\n\r\n/tmp/x\r\n'
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="/a/\xc3\xa9.txt"\r\nContent-Type: text/plain\r\n\r\n'
    b"--bNot the end\r\n--\r\n\r\n-b\r\n--b--\r\nepilogue"
)


def read(*pieces, boundary=b"b"):
    async def body():
        for piece in pieces:
            yield piece

    async def collect():
        found = []
        async for event in part_events(boundary, body()):
            if isinstance(event, PartData) and found and isinstance(found[-1], PartData):
                found[-1] = PartData(found[-1].data + event.data)
            else:
                found.append(event)
        return found

    return asyncio.run(collect())


@given(st.lists(st.integers(min_value=0, max_value=len(BODY)), max_size=6))
def test_however_it_is_cut_it_means_the_same(cuts):
    edges = [0, *sorted(cuts), len(BODY)]
    pieces = [BODY[start:end] for start, end in itertools.pairwise(edges)]
    assert read(*pieces) == [
        PartBegin("remote_path", None),
        PartData(b"/tmp/x"),
        PartEnd(),
        PartBegin("file", "/a/é.txt"),
        PartData(b"--bNot the end\r\n--\r\n\r\n-b"),
        PartEnd(),
    ]


PART = b'--b\r\nContent-Disposition: form-data; name="x"\r\n\r\n'


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"garbage",
        b"\r\n" + b"x" * 200_000,
        b"preamble\r\n" + PART + b"v\r\n--b--",
        PART + b"no end",
        PART + b"v\r\n--b",
        PART + b"v\r\n--b-",
        PART * 2 + b"v",
        b"--b\r\n\r\nno headers\r\n--b--",
        b"--b\r\nContent-Disposition: attachment; name=x\r\n\r\nv\r\n--b--",
        b"--b\r\nContent-Disposition: form-data; filename=x\r\n\r\nv\r\n--b--",
        b"--b\r\nContent-Disposition: form-data; name=x\r\nContent-Disposition: form-data; name=y\r\n\r\nv\r\n--b--",
        b"--b\r\nContent-Disposition: form-data; name=x\r\nContent-Transfer-Encoding: base64\r\n\r\ndg==\r\n--b--",
        b"--b\r\nX: " + b"x" * 5_000 + b"\r\n\r\nv\r\n--b--",
        b"--b\r\n" + b"X: y\r\n" * 20 + b"\r\nv\r\n--b--",
        b"--b\r\nbad header\r\n\r\nv\r\n--b--",
        (PART + b"v\r\n") * (PARTS_MAX + 1) + b"--b--",
    ],
)
def test_what_is_not_well_formed_is_refused(body):
    for size in (7, 1_000, 1_000_000):
        with pytest.raises(InvalidRequestError):
            read(*(body[at : at + size] for at in range(0, len(body), size)))


@pytest.mark.parametrize(
    "endless",
    [
        b"\r\n" + b"x" * 65_535,
        b"--b\r\nContent-Disposition: " + b"x" * 65_535,
        b"--b\r\n" + b"X: y\r\n" * 10_000,
        PART + b"v\r\n--b--" + b"x" * 65_535,
    ],
)
def test_what_has_no_end_costs_little(endless):
    fed = 0

    async def body():
        nonlocal fed
        yield endless
        while True:
            fed += 1
            yield b"x" * 65_536

    async def run():
        async for _ in part_events(b"b", body()):
            pass

    with pytest.raises(InvalidRequestError):
        asyncio.run(run())
    assert fed < 4


def test_a_large_file_is_handed_on_and_not_kept():
    piece = b"x" * 65_536

    async def body():
        yield PART
        for _ in range(500):
            yield piece
        yield b"\r\n--b--\r\n"

    async def run():
        size = 0
        async for event in part_events(b"b", body()):
            if isinstance(event, PartData):
                size += len(event.data)
        return size

    tracemalloc.start()
    try:
        assert asyncio.run(run()) == 500 * len(piece)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "values",
    [
        [],
        [b"application/json"],
        [b"multipart/form-data"],
        [b"multipart/form-data; boundary="],
        [b"multipart/form-data; boundary=" + b"x" * 71],
        [b"multipart/form-data; boundary=a", b"multipart/form-data; boundary=b"],
        [b"multipart/mixed; boundary=a"],
        [b"\xff;;;==="],
    ],
)
def test_a_content_type_without_a_boundary_is_refused(values):
    with pytest.raises(InvalidRequestError):
        boundary_of({"type": "http", "headers": [(b"content-type", value) for value in values]})


def test_the_boundary():
    headers = [(b"content-type", b'Multipart/Form-Data; charset=utf-8; boundary="a b"')]
    assert boundary_of({"type": "http", "headers": headers}) == b"a b"

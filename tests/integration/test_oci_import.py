"""Importing OCI archives on a real host: what becomes a room, what is refused, and that nothing gets out or stays behind."""

# ruff: noqa: ASYNC221, ASYNC240  # a test has nobody to keep waiting

from __future__ import annotations

import asyncio
import contextlib
import gzip
import os
import stat
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests import leaks
from tests.integration import oci_fixture as oci
from tests.integration.daemon_fixture import NEEDS_RUNSC, Host, eventually, running_host
from tests.integration.oci_fixture import (
    HARD_LINK,
    SYMLINK,
    file,
    folder,
    import_archive,
    layer,
    oci_archive,
    run_import,
)

from innkeeper.core.host_verbs import CollectImages, ImportImage, to_wire
from innkeeper.errors import InvalidRequestError, UnavailableError
from innkeeper.host.disks.image_store import ImageStore

pytestmark = [
    pytest.mark.anyio,
    NEEDS_RUNSC,
    pytest.mark.skipif(oci.NEEDS_TOOLS, reason="needs skopeo and umoci"),
    pytest.mark.timeout(600),
]

MAX_MIB, MAX_FILES = 64, 2_000


@pytest.fixture(scope="module")
async def host(anyio_backend: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Host]:
    home = tmp_path_factory.mktemp("home")
    limits = {"import_max_mb": MAX_MIB, "import_max_files": MAX_FILES, "import_timeout_seconds": 120}
    async with running_host(home, **limits) as running:
        yield running
    assert leaks.wait_for_none(home) == []


@pytest.fixture(autouse=True)
async def nothing_left(host: Host) -> AsyncIterator[None]:
    """After every test: no disk, mount, control group or folder of an import, and no count of one."""
    yield
    assert await eventually(lambda: clean(host), seconds=20)
    assert (await host.status())["leaked"] == 0


def clean(host: Host) -> bool:
    below = host.settings.host_dir
    groups = leaks.server_id(host.settings.home)
    return not (
        list((below / "images").glob(".build-*"))
        or any(group.startswith(f"innkeeper-{groups}-imports/") for group in leaks._groups())
        or list((below / "pool" / "disks").glob("*.img"))
    )


def tree_of(host: Host, digest: str) -> Path:
    """The image as guests see it."""
    return ImageStore(host.settings.host_dir).mount(digest)


def owned(path: Path) -> tuple[int, int, str]:
    status = path.lstat()
    return status.st_uid, status.st_gid, oct(stat.S_IMODE(status.st_mode))


# --- what an image is --------------------------------------------------------------------------------------------------


async def test_files_owners_modes_and_layers(host: Host) -> None:
    lower = layer(
        [
            ("bin/tool", file(b"x", mode=0o4755)),
            ("home/ann", folder(mode=0o700, uid=1000, gid=1001)),
            ("home/ann/f", file(b"hi", mode=0o640, uid=1000, gid=1001, mtime=1_600_000_000)),
            ("far", file(uid=70_000, gid=3)),
            ("gone", file(b"1")),
            ("opaque/below", file()),
            ("first", file(b"same")),
            ("second", {"type": HARD_LINK, "linkname": "first"}),
            ("twice", file(b"1")),
            ("twice", file(b"2")),
        ]
    )
    upper = layer([(".wh.gone", file()), ("opaque/.wh..wh..opq", file()), ("opaque/above", file())])
    made = await import_archive(host, oci_archive([lower, upper], {"User": "1000:1001", "Env": ["A=b=c"]}))
    root = tree_of(host, made.digest)
    assert owned(root / "bin/tool") == (0, 0, "0o4755")
    assert owned(root / "home/ann") == (1000, 1001, "0o700")
    assert owned(root / "home/ann/f") == (1000, 1001, "0o640")
    assert (root / "home/ann/f").stat().st_mtime == 1_600_000_000
    assert owned(root / "far")[:2] == (65_534, 3)
    assert not (root / "gone").exists()
    assert [path.name for path in (root / "opaque").iterdir()] == ["above"]
    assert (root / "first").stat().st_ino == (root / "second").stat().st_ino
    assert (root / "twice").read_bytes() == b"2"
    assert owned(root / "tmp") == (0, 0, "0o1777")
    assert (root / "tmp/.innkeeper").is_dir()
    assert made.made["config"]["user"] == "1000:1001"
    assert made.made["config"]["env"] == {"A": "b=c"}
    assert (made.made["size_bytes"], made.made["known"]) == ((host.settings.host_dir / f"images/{made.digest}.erofs").stat().st_size, False)  # fmt: skip
    assert made.steps == ["receiving", "fetching", "unpacking", "compressing"]


async def test_the_same_image_makes_the_same_file_and_is_known_again(host: Host) -> None:
    content = [layer([("a/b/c", file(b"content " * 1_000))])]
    first = await import_archive(host, oci_archive(content, {"Cmd": ["x"]}))
    again = await import_archive(host, oci_archive(content, {"Cmd": ["x"]}))
    other_way = await import_archive(host, oci_archive(content, {"Cmd": ["x"]}, compressed=False))
    assert first.digest == again.digest == other_way.digest
    assert (again.made["known"], again.made["config"], again.steps) == (True, first.made["config"], ["receiving", "already here"])  # fmt: skip
    assert not other_way.made["known"]
    print(f"import of a small image {first.seconds:.2f} s, known {again.seconds:.3f} s")


async def test_of_several_architectures_the_host_s_is_taken(host: Host) -> None:
    layout = oci.Layout()
    other = next(name for name in oci.MACHINES.values() if name != oci.HERE)
    images = [
        layout.image([layer([("machine", file(name.encode()))])], architecture=name) for name in (other, oci.HERE)
    ]
    made = await import_archive(host, layout.index(layout.several(*images)).archive())
    assert (tree_of(host, made.digest) / "machine").read_text() == oci.HERE


async def test_a_docker_archive(host: Host, tmp_path: Path) -> None:
    layout = oci.Layout()
    layout.index(layout.image([layer([("f", file(b"docker"))])], {"Entrypoint": ["/f"]})).write(tmp_path / "layout")
    target = tmp_path / "saved.tar"
    subprocess.run(
        ["skopeo", "--insecure-policy", "copy", f"oci:{tmp_path / 'layout'}", f"docker-archive:{target}:x:1"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    made = await import_archive(host, target.read_bytes(), "docker-archive")
    assert (tree_of(host, made.digest) / "f").read_text() == "docker"
    assert made.made["config"]["entrypoint"] == ["/f"]


# --- rooms of it -------------------------------------------------------------------------------------------------------


async def test_an_image_with_nothing_but_one_program_is_a_room(host: Host, tmp_path: Path) -> None:
    """No shell, no /etc/passwd, no libc, no /tmp: the agent needs nothing of the image."""
    entries = [("probe", file(oci.program(tmp_path), mode=0o755)), ("work", folder(uid=1234, gid=77))]
    config = {"User": "1234:77", "WorkingDir": "/work", "Env": ["A=of the image", "PATH=/"]}
    made = await import_archive(host, oci_archive([layer(entries)], config))
    told = made.made["config"]
    shape = host.shape(image_digest=made.digest, user=told["user"])
    instance = await host.ensure(shape=shape, workdir=told["workdir"], env=told["env"])
    try:
        answer = await host.ok(instance, "probe one 'two words'")
        assert answer.text == "uid=1234 gid=77 cwd=/work A=of the image args=[one two words]\n"
        assert answer.changed == {"/tmp/made": "created"}
        for line in ("echo a | cat", "true", "probe > /x"):
            with pytest.raises(Exception, match="the image has no shell"):
                await host.run(instance, line)
        with pytest.raises(Exception, match="command not found"):
            await host.run(instance, "nosuch")
    finally:
        await host.destroy(instance)


async def test_a_user_that_the_image_does_not_have(host: Host) -> None:
    made = await import_archive(host, oci_archive([layer([("f", file())])], {"User": "ann"}))
    with pytest.raises(Exception, match='there is no user "ann" in the guest'):
        await host.ensure(shape=host.shape(image_digest=made.digest, user="ann"))


async def test_a_musl_image(host: Host, tmp_path: Path) -> None:
    made = await import_archive(host, oci.musl_archive(tmp_path))
    instance = await host.ensure(shape=host.shape(image_digest=made.digest, user="app"))
    try:
        answer = await host.ok(instance, "user > /tmp/m ; cat /tmp/m ; maps")
        first, mapped = answer.text.split("\n", 1)
        assert first == "app -" and "ld-musl" in mapped
        assert answer.changed == {"/tmp/m": "created"}
    finally:
        await host.destroy(instance)


async def test_links_where_the_guest_s_mounts_go(host: Host, tmp_path: Path) -> None:
    """A link in the place of /dev, /proc or our own directory must not lead the mounts elsewhere."""
    links = [(name, {"type": SYMLINK, "linkname": "/etc"}) for name in ("dev", "proc", "sys", "tmp", ".innkeeper")]
    entries = [("etc/keep", file(b"kept")), ("probe", file(oci.program(tmp_path), mode=0o755)), *links]
    made = await import_archive(host, oci_archive([layer(entries)], {"Env": ["PATH=/"]}))
    root = tree_of(host, made.digest)
    assert all((root / name).is_dir() and not (root / name).is_symlink() for name, _ in links)
    instance = await host.ensure(shape=host.shape(image_digest=made.digest, user="root"), env={"PATH": "/"})
    try:
        assert "uid=0" in (await host.ok(instance, "probe")).text
        assert (await host.read(instance, "/etc/keep"))[1] == b"kept"
    finally:
        await host.destroy(instance)


# --- hostile layers ----------------------------------------------------------------------------------------------------


async def test_nothing_gets_out_of_the_image(host: Host) -> None:
    marks = ("oci-escaped-1", "oci-escaped-2", "oci-escaped-3", "oci-escaped-4")
    entries = [
        ("../../../../../../tmp/oci-escaped-1", file(b"e")),
        ("/tmp/oci-escaped-2", file(b"e")),
        ("out", {"type": SYMLINK, "linkname": "/tmp"}),
        ("out/oci-escaped-3", file(b"e")),
        ("up", {"type": SYMLINK, "linkname": "../../../../../../.."}),
        ("up/tmp/oci-escaped-4", file(b"e")),
        ("null", {"type": b"3", "devmajor": 1, "devminor": 3}),
        ("disk", {"type": b"4", "devmajor": 8, "devminor": 0}),
        ("pipe", {"type": b"6"}),
        ("\u202e\x1b[2J\nname", file()),
    ]
    made = await import_archive(host, oci_archive([layer(entries)]))
    root = tree_of(host, made.digest)
    for mark in marks:
        assert not Path("/tmp", mark).exists()
        assert (root / "tmp" / mark).read_bytes() == b"e"
    assert not any(stat.S_ISCHR(path.lstat().st_mode) or stat.S_ISBLK(path.lstat().st_mode) for path in root.rglob("*"))
    assert stat.S_ISFIFO((root / "pipe").lstat().st_mode)
    assert all(line.isprintable() for line in made.lines)


@pytest.mark.parametrize(
    "entries",
    [
        [("hard", {"type": HARD_LINK, "linkname": "../../../../etc/passwd"})],
        [("hard", {"type": HARD_LINK, "linkname": "/proc/self/environ"})],
        [(".wh...", file())],
        [("a/.wh...", file())],
        [("n" * 300, file())],
        [("/".join(["d" * 200] * 30), file())],
    ],
    ids=["hard link up", "hard link to proc", "whiteout of the parent", "whiteout up", "long name", "long path"],
)
async def test_what_cannot_be_unpacked_is_refused_or_harmless(host: Host, entries: list[oci.Entry]) -> None:
    before = set(host.settings.host_dir.rglob("*"))
    passwd = Path("/etc/passwd").stat()
    try:
        made = await import_archive(host, oci_archive([layer([("keep", file()), *entries])]))
    except InvalidRequestError as error:
        assert "umoci" in error.message or "tidied" in error.message, error.message
        left = {
            path for path in set(host.settings.host_dir.rglob("*")) - before if "/mounts/machines/" not in str(path)
        }
        assert await eventually(lambda: not {path for path in left if path.exists()})
    else:
        assert (tree_of(host, made.digest) / "keep").exists()
    assert (Path("/etc/passwd").stat().st_ino, Path("/etc/passwd").stat().st_nlink) == (passwd.st_ino, passwd.st_nlink)


def bomb(size: int) -> bytes:
    """A layer of one file of zeros, which packs a thousandfold."""
    return layer([("zeros", file(bytes(size)))])


async def test_bombs_end_at_the_limit(host: Host) -> None:
    before = host.daemon.fleet and (await host.status())["disk_free_mb"]
    cases: list[tuple[str, bytes]] = [
        (f"more than {MAX_MIB} MiB|larger than", oci_archive([bomb((MAX_MIB + 1) << 20)])),
        ("larger than", oci_archive([bomb(45 << 20), layer([("more", file(bytes(45 << 20)))]), bomb(150 << 20)])),
        (f"more than {MAX_FILES} files", oci_archive([layer([(f"d/{n}", file()) for n in range(MAX_FILES + 1)])])),
        ("larger than|more than|typeflag", oci_archive([oci.sparse_entry("sparse", 8 << 30) + bytes(1024)])),
    ]
    for reason, content in cases:
        assert len(content) < 4 << 20
        with pytest.raises(InvalidRequestError, match=reason):
            await import_archive(host, content)
    assert await eventually(lambda: clean(host))
    assert (await host.status())["disk_free_mb"] > before - 64


async def test_an_archive_that_never_ends(host: Host) -> None:
    def endless() -> Any:
        while True:
            yield bytes(1 << 20)

    with pytest.raises(InvalidRequestError, match=f"archive has more than {MAX_MIB} MiB"):
        await run_import(host, ImportImage("oci-archive"), endless())


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "oci-archive"),
        (b"not a tar at all" * 100, "oci-archive"),
        (b"not a tar at all" * 100, "docker-archive"),
        (gzip.compress(bytes(1000), mtime=0), "docker-archive"),
        (layer([("index.json", file(b'{"manifests": []}'))]), "oci-archive"),
        (layer([("index.json", file(b"[" * 100_000)), ("oci-layout", file(b"{}"))]), "oci-archive"),
        (layer([("manifest.json", file(b'[{"Layers": ["../../../etc/passwd"], "Config": "/etc/shadow"}]'))]), "docker-archive"),
        (layer([("oci-layout", {"type": SYMLINK, "linkname": "/etc/passwd"}), ("index.json", {"type": SYMLINK, "linkname": "/etc/passwd"})]), "oci-archive"),
    ],
)  # fmt: skip
async def test_what_is_no_image(host: Host, content: bytes, kind: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        await import_archive(host, content, kind)
    assert 0 < len(refused.value.message) < 700
    assert refused.value.message.isprintable()
    assert "root:" not in refused.value.message


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"User": "a b"}, "USER"),
        ({"User": "../x"}, "USER"),
        ({"Env": ["=x"]}, "ENV"),
        ({"Env": ["A=" + "x" * 40_000]}, "ENV has more"),
        ({"Labels": {"l": "x" * 70_000}}, "configuration has more"),
        ({"WorkingDir": "/" + "x" * 5_000}, "WORKDIR"),
        ({"Env": {"a": 1}}, "configuration cannot be read|umoci|skopeo"),
    ],
)
async def test_configurations_that_no_room_can_have(host: Host, config: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidRequestError, match=reason):
        await import_archive(host, oci_archive([layer([("f", file())])], config))


async def test_a_layer_that_is_not_what_its_digest_says(host: Host) -> None:
    layout = oci.Layout()
    layout.index(layout.image([layer([("f", file())])]))
    name = max(layout.files, key=lambda path: path.startswith("blobs") and layout.files[path][:2] == b"\x1f\x8b")
    layout.files[name] = gzip.compress(layer([("evil", file())]), mtime=0)
    with pytest.raises(InvalidRequestError, match=r"skopeo|umoci"):
        await import_archive(host, layout.archive())


# --- its life ----------------------------------------------------------------------------------------------------------


async def test_cancelled_in_the_middle(host: Host) -> None:
    request = ImportImage("oci-archive")
    async with host.bus.open(host.daemon.host_id, request.verb, to_wire(request)) as call:
        await call.send_data(bytes(1 << 20))
        await eventually(lambda: list((host.settings.host_dir / "pool" / "disks").glob("*.img")))
    assert await eventually(lambda: clean(host))


async def test_a_file_that_nobody_acknowledged_is_collected(host: Host) -> None:
    content = oci_archive([layer([("unwanted", file(os.urandom(64)))])])
    made = await run_import(host, ImportImage("oci-archive"), [content], acknowledge=False)
    path = host.settings.host_dir / "images" / f"{made.digest}.erofs"
    assert path.exists()

    async def collected() -> bool:
        await host.request(CollectImages())
        return not path.exists()

    assert await eventually(collected)


async def test_while_it_is_handed_over_it_is_not_collected(host: Host) -> None:
    content = oci_archive([layer([("wanted", file(os.urandom(64)))])])
    request = ImportImage("oci-archive")
    async with host.bus.open(host.daemon.host_id, request.verb, to_wire(request)) as call:
        await oci._feed(call, [content])
        async for event in call.events():
            if "made" in getattr(event, "body", {}):
                break
        digest = event.body["made"]["digest"]  # type: ignore[union-attr]
        assert digest not in (await host.request(CollectImages()))["removed"]
        assert digest not in (await host.request(CollectImages((digest,))))["removed"]
        await call.send_end()
        await call.result()
    assert digest not in (await host.request(CollectImages((digest,))))["removed"]
    assert digest in (await host.request(CollectImages()))["removed"]


async def test_a_third_import_waits_for_a_turn(host: Host) -> None:
    contents = [oci_archive([layer([(f"n{n}", file(os.urandom(1 << 20)))])]) for n in range(3)]
    made = await asyncio.gather(*(import_archive(host, content) for content in contents))
    assert len({one.digest for one in made}) == 3


async def test_a_full_disk_is_said_so(tmp_path: Path) -> None:
    async with running_host(tmp_path, disk_reserve_mb=1 << 30) as full:
        with pytest.raises(UnavailableError, match="too little disk space"):
            await import_archive(full, oci_archive([layer([("f", file())])]))


def memory_in_use(host: Host) -> tuple[int, int]:
    """MiB of the imports' own pages (not of the page cache), in all their control groups; and of the daemon, which is this process."""
    group, used = f"innkeeper-{leaks.server_id(host.settings.home)}-imports", 0
    for top in ("/sys/fs/cgroup", "/sys/fs/cgroup/memory"):
        for path in Path(top).glob(f"{group}/*/memory.stat"):
            with contextlib.suppress(OSError):
                rows = dict(line.split() for line in path.read_text().splitlines())
                used += int(rows.get("anon", rows.get("rss", 0)))
    return used >> 20, int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20


@pytest.mark.long
async def test_two_hundred_thousand_files(tmp_path: Path) -> None:
    entries = [(f"d{n // 1000}/f{n}", file(b"%d" % n, uid=n % 60_000)) for n in range(200_000)]
    entries.append(("probe", file(oci.program(tmp_path), mode=0o755)))
    content = oci_archive([layer(entries)], {"Env": ["PATH=/"]})
    del entries
    async with running_host(tmp_path) as large:
        before = memory_in_use(large)[1]
        seen = [(0, before)]

        async def watch() -> None:
            while True:
                seen.append(memory_in_use(large))
                await asyncio.sleep(0.1)

        watching = asyncio.create_task(watch())
        made = await import_archive(large, content)
        watching.cancel()
        jails, daemon = max(one for one, _ in seen), max(one for _, one in seen) - before
        print(f"import of 200,000 files: {made.seconds:.0f} s, {made.made['size_bytes'] >> 20} MiB")
        print(f"its programs: {jails} MiB at most; the daemon: {daemon} MiB more than before")
        assert 0 < jails <= 2_048 and daemon < 64
        instance = await large.ensure(shape=large.shape(image_digest=made.digest, user="root"), env={"PATH": "/"})
        assert "uid=0" in (await large.ok(instance, "probe")).text
        assert (await large.read(instance, "/d199/f199999"))[1] == b"199999"
        await large.destroy(instance)

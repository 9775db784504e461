"""The host's part of image builds, over the bus and in real guests: programs in exact environments, trees in and out, kept steps, exported images."""

import asyncio
import io
import os
import stat
import subprocess
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from tests.integration.daemon_fixture import NEEDS_RUNSC, Answer, Host, built_agent

from innkeeper.bus.contract import Data, Message
from innkeeper.core import build_verbs, host_verbs
from innkeeper.core.host_verbs import to_wire
from innkeeper.errors import (
    FileMissingError,
    InnkeeperError,
    InvalidRequestError,
    NotFoundError,
    PayloadTooLargeError,
)

pytestmark = [pytest.mark.anyio, NEEDS_RUNSC]

AGENT = built_agent().read_bytes() if os.geteuid() == 0 else b""
KEY, OTHER = "a" * 64, "b" * 64
ENV = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}


async def run(host: Host, guest: UUID, *argv: str, user: str = "root", **more: object) -> Answer:
    return await host.run(guest, "", argv=argv, user=user, **{"env": ENV, "exact_env": True, **more})


async def unpack(host: Host, guest: UUID, destination: str, stream: bytes, **options: object) -> dict[str, int]:
    verb = build_verbs.UnpackFiles(guest, destination, **options)  # type: ignore[arg-type]
    async with host.bus.open(host.daemon.host_id, verb.verb, to_wire(verb)) as call:
        for at in range(0, len(stream), 100_000):
            await call.send_data(stream[at : at + 100_000])
        await call.send_end()
        return await call.result()


async def pack(host: Host, guest: UUID, *sources: str) -> tuple[bool, bytes]:
    verb = build_verbs.PackFiles(guest, sources)
    single, data = None, bytearray()
    async with host.bus.open(host.daemon.host_id, verb.verb, to_wire(verb)) as call:
        async for event in call.events():
            if isinstance(event, Message):
                single = event.body["single"]
            elif isinstance(event, Data):
                data += event.data
    assert single is not None
    return single, bytes(data)


async def export(host: Host, verb: build_verbs.ExportStep | build_verbs.ScratchImage) -> dict[str, object]:
    async with host.bus.open(host.daemon.host_id, verb.verb, to_wire(verb)) as call:
        await call.send_end()
        return await call.result()


def tar_of(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
async def guest(host: Host) -> AsyncIterator[UUID]:
    """A bare guest, as builds have them."""
    instance_id = await host.ensure(bare=True, user="root")
    yield instance_id
    await host.destroy(instance_id)


async def test_a_program_runs_in_exactly_the_environment_that_was_asked_for(host: Host, guest: UUID) -> None:
    answer = await run(host, guest, "env", env={**ENV, "A": "b c"})
    assert sorted(answer.text.splitlines()) == ["A=b c", "HOME=/root", f"PATH={ENV['PATH']}"]
    assert answer.body["files_changed"] == []
    assert (await run(host, guest, "id", "-u", user="1000:7")).text == "1000\n"
    assert (await run(host, guest, "id", "-g", user="1000:7")).text == "7\n"
    assert (await run(host, guest, "cat", stdin=b"hello")).text == "hello"
    with pytest.raises(InvalidRequestError, match=r"^nosuchprogram: command not found"):
        await run(host, guest, "nosuchprogram")


async def test_trees_go_in_and_out(host: Host, guest: UUID) -> None:
    big = os.urandom(3_000_000)
    done = await unpack(host, guest, "/srv/in", tar_of(**{"a": big, "d/b": b"2"}), chown="user:7", mode=0o640)
    assert (done["files"], done["bytes"]) == (2, len(big) + 1)
    listed = await run(host, guest, "stat", "-c", "%u:%g %a", "/srv/in/d/b")
    assert listed.text == "1000:7 640\n"
    single, stream = await pack(host, guest, "/srv/in")
    with tarfile.open(fileobj=io.BytesIO(stream)) as archive:
        assert sorted(archive.getnames()) == ["a", "d", "d/b"]
        member = archive.extractfile("a")
        assert member is not None and member.read() == big
    assert not single
    assert (await pack(host, guest, "/srv/in/a"))[0]
    with pytest.raises(FileMissingError):
        await pack(host, guest, "/nowhere")
    with pytest.raises(InvalidRequestError):
        await unpack(host, guest, "relative", b"")
    with pytest.raises(InvalidRequestError):
        await unpack(host, guest, "/srv", tar_of(**{"../x": b""}))


async def test_a_step_is_kept_with_what_it_wrote_and_without_what_still_runs(host: Host, guest: UUID) -> None:
    line = "echo one > /made; rm /etc/debian_version; (trap '' TERM; while :; do echo x >> /endless; sleep 0.02; done) & sleep 0.3"
    await run(host, guest, "bash", "-c", line)
    verb = build_verbs.SaveStep(guest, KEY)
    assert (await host.request(verb))["cache_bytes"] > 0
    size = (await run(host, guest, "stat", "-c", "%s", "/endless")).text
    await asyncio.sleep(0.3)
    assert (await run(host, guest, "stat", "-c", "%s", "/endless")).text == size
    # What comes after it is not in it.
    await run(host, guest, "bash", "-c", "echo two > /made")
    found = await host.request(build_verbs.FindSteps((OTHER, KEY)))
    assert found == {"found": [KEY]}
    second = await host.ensure(bare=True, user="root", step_key=KEY)
    try:
        assert (await run(host, second, "cat", "/made")).text == "one\n"
        assert (await run(host, second, "test", "-e", "/etc/debian_version")).exit_code == 1
    finally:
        await host.destroy(second)
    with pytest.raises(NotFoundError):
        await host.ensure(bare=True, step_key=OTHER)
    with pytest.raises(NotFoundError):
        await host.ensure(bare=True, step_key=KEY, shape=host.shape(image_digest="f" * 64))


def check_tree(image: Path, root: Path) -> None:
    root.mkdir()
    subprocess.run(["mount", "-t", "erofs", "-o", "loop,ro", image, root], check=True)
    try:
        status = (root / "srv/file").stat()
        assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode), status.st_mtime) == (7, 8, 0o4750, 1e9)
        assert (root / "srv/link").readlink() == Path("file")
        assert [entry.name for entry in (root / "usr/share/zoneinfo").iterdir()] == ["only"]
        gone = ["etc/debian_version", "usr/bin/jq", "etc/hosts", "etc/hostname", "etc/resolv.conf", "etc/machine-id"]
        assert [name for name in gone if os.path.lexists(root / name)] == []
        assert (root / "usr/bin/jq2").stat().st_size > 0
        assert sorted(entry.name for entry in (root / ".innkeeper").iterdir()) == ["bin", "link"]
        assert stat.S_IMODE((root / "tmp").stat().st_mode) == 0o1777
        assert (root / "tmp/.innkeeper").is_dir()
        special = subprocess.run(["find", root, "-type", "b,c,p,s"], capture_output=True, check=True)
        assert special.stdout == b""
        assert not [name for name in os.listxattr(root / "usr/share/zoneinfo") if "overlay" in name]
    finally:
        subprocess.run(["umount", root], check=True)


async def test_an_image_is_made_of_a_kept_step(host: Host, guest: UUID, tmp_path: Path) -> None:
    line = """
    set -e
    echo content > /srv/file; chown 7:8 /srv/file; chmod 4750 /srv/file; ln -s file /srv/link
    rm -rf /usr/share/zoneinfo; mkdir /usr/share/zoneinfo; echo new > /usr/share/zoneinfo/only
    rm /etc/debian_version; mv /usr/bin/jq /usr/bin/jq2
    rm -rf /tmp; echo mine > /etc/hosts; echo trace > /.innkeeper/trace
    touch -d @1000000000 /srv/file
    """
    answer = await run(host, guest, "bash", "-c", line)
    assert answer.exit_code == 0, answer.text
    await host.request(build_verbs.SaveStep(guest, KEY))
    made = await export(host, build_verbs.ExportStep(KEY))
    image = host.settings.host_dir / "images" / f"{made['digest']}.erofs"
    assert image.stat().st_size == made["size_bytes"]
    assert stat.S_IMODE(image.stat().st_mode) == 0o400 and image.stat().st_uid == 0
    check_tree(image, tmp_path / "root")
    # Again, from the disk this time: the same bytes.
    for record in (host.settings.host_dir / "pool" / "steps").glob(f"{KEY}.json"):
        record.write_text(record.read_text().replace("exported", "forgotten"))
    assert await export(host, build_verbs.ExportStep(KEY)) == made
    # And a room on it works, its /tmp on the disk.
    room = await host.ensure(shape=host.shape(image_digest=str(made["digest"])))
    try:
        assert (
            await host.run(room, "cat /usr/share/zoneinfo/only; ls -A /tmp; grep -c localhost /etc/hosts")
        ).text == "new\n.innkeeper\n2\n"
    finally:
        await host.destroy(room)


async def test_the_empty_image_is_always_the_same_and_programs_run_on_it(host: Host) -> None:
    made = await export(host, build_verbs.ScratchImage())
    assert await export(host, build_verbs.ScratchImage()) == made
    guest = await host.ensure(bare=True, user="root", shape=host.shape(image_digest=str(made["digest"])))
    try:
        await unpack(host, guest, "/bin/agent", tar_of(agent=AGENT), as_file=True, mode=0o755)
        # Any static program; this one says so when it is not called as it should be.
        assert (await run(host, guest, "/bin/agent", "version")).exit_code == 0
        with pytest.raises(InnkeeperError, match="/bin/sh"):
            await run(host, guest, "/bin/sh", "-c", "true")
    finally:
        await host.destroy(guest)


async def test_an_image_that_is_too_large_is_refused(host: Host, guest: UUID, monkeypatch: pytest.MonkeyPatch) -> None:
    from innkeeper.host.disks import image_export

    await run(host, guest, "dd", "if=/dev/urandom", "of=/srv/noise", "bs=1M", "count=8")
    await host.request(build_verbs.SaveStep(guest, OTHER))
    plain = image_export.ExportPlan
    with monkeypatch.context() as patch:
        patch.setattr("innkeeper.host.build_steps.ExportPlan", lambda disk, lower, _: plain(disk, lower, 6_000_000))
        with pytest.raises(PayloadTooLargeError, match="larger than 5 MiB"):
            await export(host, build_verbs.ExportStep(OTHER))
        patch.setattr("innkeeper.host.build_steps.ExportPlan", lambda disk, lower, size: plain(disk, lower, size, 100))
        with pytest.raises(PayloadTooLargeError, match="more than 100 files"):
            await export(host, build_verbs.ExportStep(OTHER))
    left = [entry.name for entry in (host.settings.host_dir / "images").iterdir() if entry.name.startswith(".build-")]
    assert left == []


async def test_kept_steps_are_collected_and_bounded(host: Host, guest: UUID) -> None:
    await host.request(build_verbs.SaveStep(guest, KEY))
    await host.request(build_verbs.SaveStep(guest, OTHER))
    done = await host.request(build_verbs.CollectSteps(everything=True))
    assert done["removed"] == 2
    assert (await host.request(build_verbs.FindSteps((KEY, OTHER))))["found"] == []
    assert list((host.settings.host_dir / "pool" / "steps").iterdir()) == []
    assert done["cache_bytes"] == 0


async def test_steps_that_are_held_stay_until_whoever_holds_them_is_done_or_gone(host: Host, guest: UUID) -> None:
    verb = build_verbs.FindSteps((KEY, OTHER), hold=True)
    everything = build_verbs.CollectSteps(everything=True)
    for orderly in (True, False):
        async with host.bus.open(host.daemon.host_id, verb.verb, to_wire(verb)) as call:
            head = await anext(aiter(call.events()))
            assert isinstance(head, Message) and head.body == {"found": []}
            # Kept only now: it stays, too.
            await host.request(build_verbs.SaveStep(guest, KEY))
            assert (await host.request(everything))["removed"] == 0
            assert (await host.request(build_verbs.FindSteps((KEY,))))["found"] == [KEY]
            if orderly:
                await call.send_end()
                await call.result()
        async with asyncio.timeout(30):
            while (await host.request(everything))["removed"] == 0:
                await asyncio.sleep(0.05)
        assert (await host.request(build_verbs.FindSteps((KEY,))))["found"] == []


@pytest.mark.parametrize(
    "verb",
    [
        build_verbs.SaveStep(uuid4(), "../../etc/passwd"),
        build_verbs.ExportStep("x"),
        build_verbs.ExportStep(),
        build_verbs.ExportStep(KEY, image_digest=KEY),
        build_verbs.FindSteps(("/",)),
        host_verbs.EnsureMachine(
            uuid4(), host_verbs.MachineShape("", KEY, "gvisor", 1, 512, 2048, "none"), "a", step_key="../x"
        ),
    ],
    ids=lambda verb: f"{verb.verb}",
)
async def test_what_becomes_a_path_is_checked(host: Host, verb: object) -> None:
    with pytest.raises(InvalidRequestError):
        await host.request(verb)

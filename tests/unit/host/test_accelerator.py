"""What runs a microVM's instructions, judged by what real machines showed."""

import json
import os
import stat

import pytest

from innkeeper import shipped
from innkeeper.host.drivers.accelerator import Qemu, ask_version, parse_version, told, tsc_khz
from innkeeper.host.drivers.qmp import Event
from innkeeper.host.inventory import _identity, _key
from innkeeper.host.kernels.kernel_package import OFFERED, RECORD
from innkeeper.host.probes import kvm, virtual_machines
from innkeeper.host.probes.virtual_machines import check_guest_kernel, check_qemu, check_tsc, check_vm_user
from innkeeper.settings import Settings

BOOKWORM = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\nCopyright (c) 2003-2022 Fabrice Bellard\n"
BACKPORTS = (
    "QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2+deb13u1~bpo12+1)\nCopyright (c) 2003-2025 Fabrice Bellard\n"
)


@pytest.mark.anyio
async def test_what_this_machine_shows_can_be_judged():
    good, why = kvm.judge(await virtual_machines.observe_kvm())
    assert isinstance(good, bool)
    assert why


@pytest.mark.parametrize(
    ("text", "version"),
    [(BOOKWORM, (7, 2, 22)), (BACKPORTS, (10, 0, 2)), ("", None), ("qemu: command not found", None)],
)
def test_versions_are_read(text, version):
    assert parse_version(text) == version


@pytest.mark.parametrize(
    ("path", "qemu", "ok", "says"),
    [
        (None, None, None, "not installed"),
        ("/q", None, None, "/q does not say which version it is"),
        ("/q", Qemu("/q", (5, 2, 0)), None, "5.2.0 (/q) is too old for microVMs; 7.2 or newer is needed"),
        ("/q", Qemu("/q", (7, 2, 0)), True, "7.2.0 (/q)"),
        ("/q", Qemu("/q", (10, 0, 2)), True, "10.0.2 (/q)"),
    ],
)
def test_qemu_is_named_or_its_line_to_paste(path, qemu, ok, says):
    check = check_qemu(path, qemu)
    assert (check.ok, check.blocks) == (ok, False)
    assert check.detail.startswith(says)
    assert (check.fix is None) == (ok is True)
    assert check.fix is None or "apt-get install" in check.fix


@pytest.mark.anyio
async def test_a_program_that_is_no_qemu_has_no_version(tmp_path):
    program = tmp_path / "qemu"
    for script, expected in (("echo QEMU emulator version 8.1.2", (8, 1, 2)), ("echo 1", None), ("exit 3", None)):
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        found = await ask_version(str(program))
        assert (None if found is None else found.version) == expected
    assert await ask_version(str(tmp_path / "nothing")) is None


def test_virtual_machines_have_a_user_of_their_own():
    missing = check_vm_user(api_user="nobody", name="no-such-user-here")
    assert (missing.ok, missing.blocks) == (None, False)
    assert missing.fix.startswith("useradd --system --user-group") and missing.fix.endswith("no-such-user-here")
    assert check_vm_user(api_user="innkeeper", name="nobody").ok
    for name, api_user in (("root", "innkeeper"), ("nobody", "nobody")):
        assert check_vm_user(api_user=api_user, name=name).ok is None


def test_the_kernel_is_the_one_that_was_fetched_last_or_brought_along(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "ready_kernel", lambda: None)
    none = check_guest_kernel(tmp_path / "a b", tmp_path / "a b" / "host")
    assert (none.ok, none.fix) == (None, f"inn kernel fetch --home '{tmp_path}/a b'")
    assert not (tmp_path / "a b").exists()
    (tmp_path / "linux-image-1.deb").touch()
    monkeypatch.setattr(shipped, "ready_kernel", lambda: tmp_path / "linux-image-1.deb")
    assert check_guest_kernel(tmp_path, tmp_path / "host").detail.startswith(f"{tmp_path}/linux-image-1.deb")
    for name, time in (("newer", 2), ("older", 1)):
        folder = tmp_path / "host" / "kernels" / name
        (folder / OFFERED).mkdir(parents=True)
        (folder / OFFERED / "modules.dep").touch()
        (folder / RECORD).write_text('{"package": "linux-image-1", "version": "1"}')
        os.utime(folder / RECORD, (time, time))
    # It came after both.
    assert check_guest_kernel(tmp_path, tmp_path / "host").detail.startswith(f"{tmp_path}/linux-image-1.deb")
    later = (tmp_path / "linux-image-1.deb").stat().st_ctime + 1
    os.utime(tmp_path / "host" / "kernels" / "newer" / RECORD, (later, later))
    assert check_guest_kernel(tmp_path, tmp_path / "host").detail == "newer"
    # An earlier version of the server kept less of it.
    (tmp_path / "host" / "kernels" / "newer" / OFFERED / "modules.dep").unlink()
    assert check_guest_kernel(tmp_path, tmp_path / "host").detail.startswith(f"{tmp_path}/linux-image-1.deb")


# /proc/cpuinfo's lines of a real machine, whose kernel had said "tsc: Detected 2596.120 MHz processor".
CPU = "processor\t: 0\nflags\t\t: fpu tsc msr constant_tsc rep_good nonstop_tsc\nbogomips\t: 5192.24\n"


@pytest.mark.parametrize(
    ("cpuinfo", "khz"),
    [
        (CPU, 2_596_120),
        (CPU.replace("5192.24", "4500.00"), 2_250_000),
        (CPU.replace("constant_tsc ", ""), None),
        (CPU.replace("bogomips", "BogoMIPS"), None),
        (CPU.replace("5192.24", "0.00"), None),
        ("", None),
    ],
)
def test_the_rate_of_the_counter_is_read_where_it_stays_the_same(cpuinfo, khz):
    assert tsc_khz(cpuinfo) == khz
    assert check_tsc(khz).ok == (True if khz else None)


@pytest.mark.parametrize(
    ("event", "came_up"),
    [
        (Event("VSERPORT_CHANGE", {"id": "link0", "open": True}), True),
        (Event("VSERPORT_CHANGE", {"id": "link0", "open": False}), None),
        (Event("SHUTDOWN", {"guest": True, "reason": "guest-shutdown"}), True),
        (Event("SHUTDOWN", {"guest": True, "reason": "guest-reset"}), False),
        (Event("SHUTDOWN", {"guest": False, "reason": "host-signal"}), False),
        (Event("SHUTDOWN", {}), False),
        (Event("STOP", {}), None),
    ],
)
def test_only_a_first_program_counts_as_a_guest_that_came_up(event, came_up):
    assert told(event) is came_up


def test_another_qemu_is_looked_at_anew(tmp_path, monkeypatch):
    program = tmp_path / "qemu"
    monkeypatch.setattr("innkeeper.host.inventory.locate_qemu", lambda: str(program) if program.exists() else None)
    settings = Settings(home=tmp_path)
    absent = _key(settings)
    program.write_text("1")
    present = _key(settings)
    program.write_text("22")
    assert len({json.dumps(key, sort_keys=True) for key in (absent, present, _key(settings))}) == 3
    assert _identity(None) == []

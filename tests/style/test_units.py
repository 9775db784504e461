"""The systemd units are ones that systemd understands."""

import shutil
import subprocess
from pathlib import Path

import pytest

from innkeeper.host.linux.cgroup import DELEGATED

DEPLOY = Path(__file__).parents[2] / "deploy"


def verify(tmp_path, *changes):
    """What systemd says about the units, with an `inn` that is there: it looks for it in the directories of this machine."""
    inn = tmp_path / "inn"
    inn.write_text("#!/bin/sh\n")
    inn.chmod(0o755)
    units = []
    for unit in DEPLOY.glob("*.service"):
        text = unit.read_text().replace("\nExecStart=inn ", f"\nExecStart={inn} ")
        for old, new in changes:
            text = text.replace(old, new)
        copy = tmp_path / unit.name
        copy.write_text(text)
        units.append(copy)
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", *units], capture_output=True, text=True, timeout=60)
    return [line for line in (done.stdout + done.stderr).splitlines() if "innkeeper" in line]


@pytest.fixture(autouse=True)
def systemd():
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd here")


def test_systemd_understands_the_units(tmp_path):
    assert verify(tmp_path) == []


def test_it_would_say_what_it_does_not_understand(tmp_path):
    assert verify(tmp_path, ("KillMode=process", "KillMode=sometimes")) != []


def test_guests_outlive_the_server_and_have_groups_of_their_own():
    text = (DEPLOY / "innkeeper.service").read_text()
    assert "\nKillMode=process\n" in text and "\nDelegate=yes\n" in text
    guests = DEPLOY / Path(DELEGATED).name
    assert "\nDelegate=yes\n" in guests.read_text()
    assert text.count(guests.name) >= 2

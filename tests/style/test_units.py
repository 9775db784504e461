"""The systemd units are ones that systemd understands."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from innkeeper.api_process import STOP_GRACE_SECONDS
from innkeeper.host.linux.cgroup import DELEGATED
from innkeeper.settings import Settings

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


def exposure(tmp_path, *changes):
    """What `systemd-analyze security` thinks of the server's unit: 0 (closed) to 10."""
    text = (DEPLOY / "innkeeper.service").read_text()
    for old, new in changes:
        text = text.replace(old, new)
    copy = tmp_path / "innkeeper.service"
    copy.write_text(text)
    argv = ["systemd-analyze", "security", "--offline=true", "--no-pager", copy]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    found = re.search(r"Overall exposure level for innkeeper.service: ([0-9.]+)", done.stdout)
    if found is None:
        pytest.skip(f"systemd-analyze cannot judge a file here: {done.stderr.strip()[:200]}")
    return float(found[1])


def test_the_hardening_that_is_left_is_not_lost(tmp_path):
    score = exposure(tmp_path)
    print(f"systemd-analyze security: exposure {score} of 10")
    # Nearly all of the rest would stand between the server and its trade: see the unit's own reasons.
    assert score <= 9.1
    assert exposure(tmp_path, ("CapabilityBoundingSet=", "#")) > score


def test_systemd_waits_longer_than_the_server_takes_to_stop():
    text = (DEPLOY / "innkeeper.service").read_text()
    patience = int(re.search(r"^TimeoutStopSec=(\d+)$", text, re.MULTILINE)[1])
    # What is left is the daemon's own.
    assert patience >= Settings().stop_seconds + STOP_GRACE_SECONDS + 10

"""The driver on the other QEMU that it is written for: Debian 12's backports have release 10 beside 7.2. Its whole contract, by translation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.integration.bare_root import from_setup
from tests.integration.booted_vm import NEEDS_QEMU

pytestmark = [NEEDS_QEMU, pytest.mark.long, pytest.mark.timeout(1800)]
ROOT = Path(__file__).parents[2]
PACKAGES = ("qemu-system-x86", "qemu-system-common", "qemu-system-data", "seabios")
# $1: where its files are; over this machine's own, for the processes of one mount namespace. The rest is a command.
OVER_USR = 'mount -t overlay -o "lowerdir=$1:/usr" overlay /usr && shift && exec "$@"'
# Of this machine's sources and its backports; in a folder of its own, so that what apt knows of this machine stays as it is.
FETCH = """
cd "$FOLDER"
mkdir -p sources lists/partial
debian_sources > sources/debian.list
backports_line > sources/backports.list
options=(-o Dir::Etc::SourceList=/dev/null -o "Dir::Etc::SourceParts=$PWD/sources" -o "Dir::State::Lists=$PWD/lists" -o APT::Sandbox::User=root)
apt-get -qq "${options[@]}" update
apt-get -qq "${options[@]}" download $(printf "%s/$codename-backports " $WANTED)
for package in *.deb; do dpkg-deb --extract "$package" root; done
"""


def with_it(files: Path, *argv: str | Path) -> subprocess.CompletedProcess[str]:
    """A command for which it is the QEMU of this machine."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", OVER_USR, "sh", files, *argv],
        cwd=ROOT,
        env=own,
        capture_output=True,
        text=True,
        timeout=1700,
    )


@pytest.fixture
def qemu_10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Its files as they lie below /usr."""
    monkeypatch.setenv("FOLDER", str(tmp_path))
    monkeypatch.setenv("WANTED", " ".join(PACKAGES))
    try:
        from_setup(FETCH)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"the backports have no QEMU for this release: {error.stderr[-300:]}")
    return tmp_path / "root" / "usr"


def test_the_drivers_contract_holds_on_it(qemu_10: Path) -> None:
    said = with_it(qemu_10, "qemu-system-x86_64", "--version").stdout
    print(said)
    if not said.startswith("QEMU emulator version 10."):
        pytest.skip(f"the backports have another release: {said.partition(chr(10))[0]}")
    suites = ("tests/contracts/test_drivers.py", "tests/integration/test_accelerator.py")
    chosen = ("-m", "", "-k", "qemu or accelerator", "-p", "no:cacheprovider", "-q")
    done = with_it(qemu_10, sys.executable, "-m", "pytest", *suites, *chosen)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr

"""Snapshots of OCI images by the unmodified `instavm` package and by `inn`: fetched from a registry, built in a guest, begun with on each driver."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from instavm_client import Instavm
from internet_fixture import Internet, internet
from server_fixture import Server, free_port, leftovers, server, until
from tests.integration import oci_fixture as oci
from tests.integration.daemon_fixture import build_go
from tests.integration.oci_fixture import file, layer
from tests.integration.registry_world import Beyond

pytestmark = pytest.mark.skipif(oci.NEEDS_TOOLS, reason="needs skopeo, umoci and docker-registry")

PORT = 5_000
SECRET = "hunter2-of-a-build"
PATIENCE = 250


@contextlib.contextmanager
def registry(world: Internet, folder: Path) -> Iterator[str]:
    """A registry beyond the host, with an image of one static shell; the image's reference."""
    shell = build_go(Path(__file__).parents[1] / "tiny_shell", "tiny-shell").read_bytes()
    layout = oci.Layout()
    image = layout.image([layer([("bin/sh", file(shell, mode=0o755))])], {"Env": ["OF=the image", "PATH=/bin"]})
    layout.index(image).write(folder / "layout")
    net = Beyond(world.host, world.beyond, folder)
    try:
        reference = f"{net.registry(PORT, address=world.address)}/team/app:1"
        net.push(folder / "layout", reference)
        yield reference
    finally:
        for process in net.processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def reference(world: Internet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with registry(world, tmp_path_factory.mktemp("registry")) as made:
        yield made


def ended(innkeeper: Server, snapshot_id: str) -> dict[str, Any]:
    client = innkeeper.client()
    until(lambda: client.get(f"/v1/snapshots/{snapshot_id}").json()["status"] != "building", seconds=PATIENCE)
    found: dict[str, Any] = client.get(f"/v1/snapshots/{snapshot_id}").json()
    return found


@pytest.mark.microvms
def test_a_vm_of_an_image(innkeeper: Server, instavm: Instavm, reference: str) -> None:
    begun = instavm.sdk(
        """answer = client.snapshots.create(oci_image=words[0], name="tools", vcpu_count=1, memory_mb=256, snapshot_type="user", build_args={
            "post_build_cmd": "echo $WORD > /built ; echo installed", "envs": {"WORD": words[1]}, "disk_size_gb": 1})""",
        reference, SECRET,
    )  # fmt: skip
    assert (begun["status"], begun["name"], begun["oci_image"]) == ("building", "tools", reference)
    done = ended(innkeeper, begun["id"])
    assert done["status"] == "ready", done
    client, snapshot = innkeeper.client(), {"snapshot_id": begun["id"], "vm_lifetime_seconds": 3_600}
    vm = instavm.sdk("answer = client.vms.create(**words[0])", snapshot, seconds=PATIENCE)["vm_id"]
    said = client.post(f"/v1/vms/{vm}/exec", json={"command": "cat /built; echo $WORD $OF"}, timeout=PATIENCE).json()
    assert said["stdout"].splitlines() == [SECRET, f"{SECRET} the image"]
    record = client.get(f"/v1/vms/{vm}").json()
    assert (record["vcpu_count"], record["memory_mb"], record["disk_mb"]) == (1, 256, 1_024)
    assert record["restored"] == "disk" and record["snapshot_id"] == begun["id"]
    # A second one has a disk of its own; what stands on the image outlives the snapshot.
    other = client.post("/v1/vms", json=snapshot, timeout=PATIENCE).json()["vm_id"]
    client.post(f"/v1/vms/{other}/exec", json={"command": "echo mine > /built"}, timeout=PATIENCE)
    assert begun["id"] in instavm.ok("snapshot", "ls") and "Deleted" in instavm.ok("snapshot", "rm", begun["id"])
    command = {"command": "cat /built"}
    assert client.post(f"/v1/vms/{vm}/exec", json=command, timeout=PATIENCE).json()["stdout"] == f"{SECRET}\n"
    for one in (vm, other):
        assert client.delete(f"/v1/vms/{one}").json()["status"] == "killed"
    assert SECRET not in innkeeper.log_path.read_text()


@pytest.mark.gvisor_only(reason="the guests of builds are gVisor's whatever those of VMs are")
def test_why_a_build_failed(innkeeper: Server, instavm: Instavm, reference: str) -> None:
    begun = instavm.json("snapshot", "build", reference, "--run", "echo half; exit 7", "--env", f"A={SECRET}")
    done = ended(innkeeper, begun["id"])
    assert (done["status"], done["last_error"]) == ("failed", "post_build_cmd: exit code 7\nhalf")
    said = innkeeper.inn("snapshot", "log", begun["id"])
    assert said.returncode == 1 and "[build 1/1] post_build_cmd\nhalf\n" in said.stdout
    assert "asking the registry" in said.stdout and "exit code 7" in said.stderr and SECRET not in said.stdout
    # A package that cannot be had, an image that is not there; `inn` follows and tells.
    apt = innkeeper.inn("snapshot", "build", reference, "--apt", "nosuch-package", "--json")
    answer = json.loads(apt.stdout)
    assert apt.returncode == 1 and answer["last_error"].startswith("extra_apt_packages nosuch-package: exit code ")
    gone = innkeeper.inn("snapshot", "build", reference.replace(":1", ":2"))
    assert gone.returncode == 1 and "manifest unknown" in gone.stderr
    client = innkeeper.client()
    for one in client.get("/v1/snapshots").json():
        if one["oci_image"] is not None:
            assert one["status"] == "failed" and one["size_bytes"] is None
            assert client.delete(f"/v1/snapshots/{one['id']}").json()["status"] == "deleted"


@pytest.mark.gvisor_only(reason="the guests of builds are gVisor's whatever those of VMs are")
def test_a_restored_backup_has_those_that_were_ready(tmp_path: Path, empty: Path) -> None:
    with internet() as there, registry(there, tmp_path) as reference:
        settings = {"INNKEEPER_HOST_NETNS": there.host, "INNKEEPER_DNS_UPSTREAMS": there.address}
        settings["INNKEEPER_IMAGE_REGISTRIES"] = f"{there.address}:{PORT}"
        with server("base", **settings) as running:
            build = ("snapshot", "build", reference, "--json", "--run")
            ready = json.loads(running.inn(*build, "echo kept > /kept", "--no-wait").stdout)["id"]
            assert ended(running, ready)["status"] == "ready"
            begun = json.loads(running.inn(*build, "echo begun; sleep 3000", "--no-wait").stdout)["id"]
            log = running.home / "api" / "snapshot-logs" / f"{begun}.log"
            until(lambda: "begun" in log.read_text(), seconds=PATIENCE)
            made = running.inn("backup", str(tmp_path / "all.tar"))
            assert made.returncode == 0, made.stderr
            token = running.token
        assert running.inn("restore", str(tmp_path / "all.tar"), "--home", str(empty)).returncode == 0
        again = Server(empty, free_port(), {**settings, "INNKEEPER_IMAGES": "base", "INNKEEPER_KEEP_MACHINES": "false"})
        try:
            again.start()
            client = again.client(token)
            found = {one["id"]: one["status"] for one in client.get("/v1/snapshots").json()}
            assert found == {ready: "ready", begun: "failed"}
            vm = client.post("/v1/vms", json={"snapshot_id": ready}, timeout=PATIENCE).json()["vm_id"]
            said = client.post(f"/v1/vms/{vm}/exec", json={"command": "cat /kept"}, timeout=PATIENCE).json()
            assert said["stdout"] == "kept\n"
        finally:
            if again.process is not None:
                again.stop()
            assert leftovers(again) == []
            again.log_path.unlink(missing_ok=True)


@pytest.fixture
def empty() -> Iterator[Path]:
    home = Path(tempfile.mkdtemp(prefix="ikr", dir="/var/tmp"))
    yield home
    shutil.rmtree(home, ignore_errors=True)


@pytest.mark.gvisor_only(reason="the guests of builds are gVisor's whatever those of VMs are")
def test_killed_in_the_middle(tmp_path: Path) -> None:
    """A step that does not end, and a `kill -9`: afterwards the snapshot has failed and says why, its log is there, and nothing else of it."""
    with internet() as there, registry(there, tmp_path) as reference:
        settings = {"INNKEEPER_HOST_NETNS": there.host, "INNKEEPER_DNS_UPSTREAMS": there.address}
        settings["INNKEEPER_IMAGE_REGISTRIES"] = f"{there.address}:{PORT}"
        with server("base", **settings) as running:
            done = running.inn("snapshot", "build", reference, "--run", "echo begun; sleep 3000", "--no-wait", "--json")
            snapshot = json.loads(done.stdout)["id"]
            log = running.home / "api" / "snapshot-logs" / f"{snapshot}.log"
            until(lambda: "begun" in log.read_text(), seconds=PATIENCE)
            running.kill()
            running.start()
            found = running.client().get(f"/v1/snapshots/{snapshot}").json()
            # Whichever of the two processes went first.
            reasons = ("The server ended during the build", "The connection to the host was lost")
            assert found["status"] == "failed" and found["last_error"] in reasons
            said = running.inn("snapshot", "log", snapshot)
            assert said.returncode == 1 and "begun" in said.stdout and found["last_error"] in said.stderr
            assert running.inn("snapshot", "rm", snapshot).returncode == 0 and not log.exists()
            images = running.home / "host" / "images"
            running.inn("image", "gc")
            hosts = json.loads(running.inn("host", "list", "--json").stdout)
            until(lambda: len(list(images.glob("*.erofs"))) == 1, seconds=PATIENCE)
            assert hosts[0]["leaked"] == 0

"""Snapshots of an image with everything that can be installed on it, by real installers out of the tests' own internet; and what becomes of each that fails."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from debian_fixture import installers_layout
from instavm_client import Instavm
from internet_fixture import Internet
from server_fixture import Server, until
from tests.integration import oci_fixture as oci
from tests.integration.registry_world import Beyond

pytestmark = [
    pytest.mark.skipif(oci.NEEDS_TOOLS, reason="needs skopeo, umoci and docker-registry"),
    # An image of hundreds of megabytes is pushed, fetched and unpacked, on processors that others use too.
    pytest.mark.timeout(1_800),
]

PORT = 5_000
PATIENCE = 1_200
REPOSITORY = "https://github.com/user/repo.git"
ENVS = {
    "PIP_INDEX_URL": "https://index.test/simple/",
    "npm_config_registry": "https://registry.test/",
    "WORD": "of-the-envs",
}
INSTALLED = {
    "extra_apt_packages": "tinydeb=1.0-*",
    "extra_pip_packages": "tinywheel>=1.0,<2",
    "extra_npm_packages": "express@^5.0.0",
    "git_clone_url": REPOSITORY,
    "git_clone_branch": "main",
    "post_build_cmd": "npm install --no-audit --no-fund && git rev-parse --abbrev-ref HEAD > /branch && tinydeb && echo $WORD > /word",
    "disk_size_gb": 2,
    "envs": ENVS,
}
# Each line of a VM's shell, and what it must say.
SHOWN = {
    "tinydeb": "hello from a deb",
    "dpkg-query --show --showformat '${Status} ${Version}' tinydeb": "install ok installed 1.0-2",
    "python3 -c 'import tinywheel; print(tinywheel.greet())'": "hello from a wheel",
    "NODE_PATH=$(npm root --global) node -p 'require(\"express\")()'": "a tiny express",
    "git -C /app/repo config remote.origin.url": REPOSITORY,
    "git -C /app/repo log -1 --format=%s": "First",
    "cd /app/repo && node -p 'require(\"express\")()'": "a tiny express",
    "cat /branch /word": "main\nof-the-envs",
    "echo $WORD": "of-the-envs",
}
# An argument that cannot be had, and what its installer says of that.
FAILING = {
    "extra_apt_packages": ("nosuch-package", "Unable to locate package nosuch-package"),
    "extra_pip_packages": ("nosuch-wheel", "No matching distribution found for nosuch-wheel"),
    "extra_npm_packages": ("nosuch-module", "404"),
    "git_clone_url": ("https://github.com/user/nosuch.git", "not found"),
}


@pytest.fixture(scope="module")
def reference(world: Internet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A registry beyond the host, with an image of a Debian that has apt, pip, npm and git."""
    folder = tmp_path_factory.mktemp("installers")
    net = Beyond(world.host, world.beyond, folder)
    try:
        made = f"{net.registry(PORT, address=world.address)}/team/installers:1"
        layout = installers_layout(folder, world.ca_pem)
        net.push(layout, made, "--dest-compress-level=1")
        shutil.rmtree(layout)
        yield made
    finally:
        for process in net.processes:
            process.kill()
            process.wait()
        # More than pytest should keep of its last runs.
        shutil.rmtree(folder)


def built(innkeeper: Server, begun: dict[str, Any]) -> dict[str, Any]:
    """What became of a build."""
    client, path = innkeeper.client(), f"/v1/snapshots/{begun['id']}"
    until(lambda: client.get(path).json()["status"] != "building", seconds=PATIENCE)
    found: dict[str, Any] = client.get(path).json()
    return found


def test_everything_is_installed(innkeeper: Server, instavm: Instavm, reference: str) -> None:
    begun = instavm.sdk(
        "answer = client.snapshots.create(oci_image=words[0], name='tools', build_args=words[1])", reference, INSTALLED
    )
    done = built(innkeeper, begun)
    said = innkeeper.inn("snapshot", "log", begun["id"])
    assert done["status"] == "ready", said.stdout + said.stderr
    for step in range(1, 6):
        assert f"[build {step}/5] " in said.stdout
    client = innkeeper.client(timeout_seconds=PATIENCE)
    vm = client.post("/v1/vms", json={"snapshot_id": begun["id"], "vm_lifetime_seconds": 3_600}).json()["vm_id"]
    try:
        for line, expected in SHOWN.items():
            answer = client.post(f"/v1/vms/{vm}/exec", json={"command": line, "timeout": 300}).json()
            assert answer["stdout"].strip() == expected, (line, answer)
    finally:
        client.delete(f"/v1/vms/{vm}")
        assert client.delete(f"/v1/snapshots/{begun['id']}").json()["status"] == "deleted"


@pytest.mark.gvisor_only(reason="the guests of builds are gVisor's whatever those of VMs are")
def test_what_cannot_be_had(innkeeper: Server, reference: str) -> None:
    """Each fails alone, says so, and leaves nothing but that."""
    client = innkeeper.client()
    # What was fetched once is there for the next ones, as long as something names it.
    whole = built(innkeeper, client.post("/v1/snapshots", json={"oci_image": reference}).json())
    assert whole["status"] == "ready", whole
    for field, (value, reason) in FAILING.items():
        args = {field: value, "envs": ENVS}
        begun = client.post("/v1/snapshots", json={"oci_image": reference, "memory_mb": 512, "build_args": args}).json()
        done = built(innkeeper, begun)
        said = innkeeper.inn("snapshot", "log", begun["id"])
        assert (done["status"], done["size_bytes"], done["image_digest"]) == ("failed", None, ""), done
        assert done["last_error"].startswith(f"{field} {value}: exit code "), done["last_error"]
        assert said.returncode == 1 and reason in said.stdout, (field, said.stdout)
        assert f"[build 1/1] {field} {value}\n" in said.stdout
        refused = client.post("/v1/vms", json={"snapshot_id": begun["id"]})
        assert refused.status_code == 409, refused.text
        assert client.delete(f"/v1/snapshots/{begun['id']}").json()["status"] == "deleted"
    innkeeper.inn("image", "gc")
    images = json.loads(innkeeper.inn("image", "list", "--json").stdout)
    named = {whole["image_digest"], *(one["digest"] for one in images)}
    files = innkeeper.home / "host" / "images"
    until(lambda: {path.stem for path in files.glob("*.erofs")} <= named)
    assert all(host["leaked"] == 0 for host in json.loads(innkeeper.inn("host", "list", "--json").stdout))
    assert client.delete(f"/v1/snapshots/{whole['id']}").json()["status"] == "deleted"
    until(lambda: not (files / f"{whole['image_digest']}.erofs").exists())

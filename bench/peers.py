"""The peers: the same image and command under `runsc`, crun, podman and bwrap, and one running sandbox for `runsc exec` and the bare agent."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from bench.sandbox import EXEC_SECONDS, Sandbox
from bench.server import MEMORY_MB
from innkeeper.host.drivers.contract import MachinePlan
from innkeeper.host.drivers.gvisor_spec import oci_spec
from innkeeper.host.guest_link import GuestEndpoint
from innkeeper.host.linux import mounts
from innkeeper.host.linux.cgroup import CgroupTree

# The network trap of some kernels, see the driver; and crun refuses controllers on a cgroup v2 beside v1: both are hidden from the peer.
HIDE_PROC_SYS_NET = 'mount -t tmpfs -o size=4k none /proc/sys/net && exec "$@"'
HIDE_UNIFIED = 'if [ -d /sys/fs/cgroup/unified ]; then umount /sys/fs/cgroup/unified; fi; exec "$@"'
ADDRESS, GATEWAY = "10.255.254.2/30", "10.255.254.1/30"
NULL = subprocess.DEVNULL


class Peers:
    """Everything that a peer needs is made ahead, so that only its own start is timed: root file system, network, bundle."""

    def __init__(self, directory: Path, *, image: Path, agent_dir: Path, platform: str, vcpu_count: int) -> None:
        self.directory = directory
        self._image, self._agent_dir, self._platform = image, agent_dir, platform
        self._vcpu_count = vcpu_count
        self._name = f"innbench-{os.getpid()}"
        self._tree = CgroupTree.detect()
        self._nofile = min(65_536, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
        self._sandbox: Sandbox | None = None
        self.fresh: dict[str, Callable[[], None]] = {"runsc run": self._runsc_run}
        for name, start in (("crun run", self._crun_run), ("podman run", self._podman_run), ("bwrap", self._bwrap)):
            if shutil.which(name.split()[0]):
                self.fresh[name] = start

    @contextlib.asynccontextmanager
    async def up(self) -> AsyncIterator[Peers]:
        """Mount, make the networks, start the sandbox."""
        try:
            for name in ("upper", "work", "root", "runsc", "podman", "crun"):
                (self.directory / name).mkdir(parents=True)
            data = f"lowerdir={self._image},upperdir={self.directory / 'upper'},workdir={self.directory / 'work'}"
            mounts.mount("overlay", self.root, "overlay", mounts.MS_NODEV | mounts.MS_NOATIME, data)
            self._make_network("run")
            self._bundle("run", ["/bin/true"], self._endpoint_directory("run"))
            if "crun run" in self.fresh:
                self._make_crun_bundle()
            async with self.sandboxes(["exec"]) as (sandbox,):
                self._sandbox = sandbox
                yield self
        finally:
            await self._down()

    async def _down(self) -> None:
        self._remove_network("run")
        await mounts.umount_tree(self.directory)
        group = self._tree.server_root(self._name)
        if group.exists():
            await group.kill_all()
            await group.remove()

    @property
    def root(self) -> Path:
        """The image with a writable layer above."""
        return self.directory / "root"

    # --- made ahead ------------------------------------------------------------------------------------------------

    def _make_network(self, one: str) -> None:
        netns, far = f"{self._name}-{one}", f"{self._name}-{one}-far"
        commands = [
            ("netns", "add", netns),
            ("netns", "add", far),
            ("-n", netns, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", far),
            ("-n", far, "address", "add", GATEWAY, "dev", "eth0"),
            ("-n", far, "link", "set", "eth0", "up"),
        ]
        for command in commands:
            _check("ip", *command)
        self._address(one)

    def _remove_network(self, one: str) -> None:
        for end in ("", "-far"):
            _quietly("ip", "netns", "delete", f"{self._name}-{one}{end}")

    def _address(self, one: str) -> None:
        """runsc takes the address out of the namespace at its start: it is put back before every one."""
        netns = f"{self._name}-{one}"
        _check("ip", "-n", netns, "link", "set", "lo", "up")
        _check("ip", "-n", netns, "address", "replace", ADDRESS, "dev", "eth0")
        _check("ip", "-n", netns, "link", "set", "eth0", "up")
        _check("ip", "-n", netns, "route", "replace", "default", "via", GATEWAY.partition("/")[0])

    def _bundle(self, one: str, args: list[str], link_dir: Path) -> Path:
        group = self._tree.server_root(self._name).child(one)
        plan = MachinePlan(
            machine_id=one,
            hostname="peer",
            rootfs=self.root,
            netns=Path("/run/netns") / f"{self._name}-{one}",
            agent_dir=self._agent_dir,
            link_dir=link_dir,
            state_dir=self.directory,
            memory_mb=MEMORY_MB,
            vcpu_count=self._vcpu_count,
        )
        link_dir.mkdir(exist_ok=True)
        hub = self.directory / f"hub-{one}"
        hub.mkdir(exist_ok=True)
        spec: dict[str, Any] = oci_spec(plan, hub=hub, cgroup_path=group.path, nofile=self._nofile)
        spec["process"]["args"] = args
        bundle = self.directory / f"bundle-{one}"
        bundle.mkdir(exist_ok=True)
        (bundle / "config.json").write_text(json.dumps(spec))
        return bundle

    @contextlib.asynccontextmanager
    async def sandboxes(self, names: list[str]) -> AsyncIterator[list[Sandbox]]:
        """Running sandboxes with the agent in each, started as the driver would start them; gone at the end."""
        async with contextlib.AsyncExitStack() as stack:
            yield [await stack.enter_async_context(self._sandbox_up(name)) for name in names]

    @contextlib.asynccontextmanager
    async def _sandbox_up(self, one: str) -> AsyncIterator[Sandbox]:
        endpoint = GuestEndpoint(self._endpoint_directory(one))
        container = f"{self._name}-{one}"
        try:
            self._make_network(one)
            await endpoint.listen()
            bundle = self._bundle(one, ["/.innkeeper/bin/inn-agent"], endpoint.directory)
            # Not captured: the sandbox would keep the pipes.
            detached = self._hidden(*self._runsc("run", "-detach", f"-bundle={bundle}", container))
            await asyncio.to_thread(subprocess.run, detached, check=True, stdin=NULL, stdout=NULL, stderr=NULL)
            params = {"hostname": "peer", "user": "user", "sudo": True, "spare_shell": True}
            await endpoint.request("configure", params, timeout_seconds=EXEC_SECONDS)
            yield Sandbox(endpoint)
        finally:
            _quietly(*self._runsc("kill", container, "KILL"))
            _quietly(*self._runsc("delete", "-force", container))
            await endpoint.close(remove=True)
            self._remove_network(one)

    def _endpoint_directory(self, one: str) -> Path:
        return self.directory / f"link-{one}"

    # --- gVisor ----------------------------------------------------------------------------------------------------

    def _runsc(self, *arguments: str) -> list[str]:
        flags = [f"--root={self.directory / 'runsc'}", f"--platform={self._platform}", "--overlay2=none"]
        return ["runsc", *flags, "--host-uds=open", "--network=sandbox", *arguments]

    @staticmethod
    def _hidden(*argv: str) -> list[str]:
        return ["unshare", "--mount", "--propagation", "private", "sh", "-c", HIDE_PROC_SYS_NET, "sh", *argv]

    def prepare(self, name: str) -> None:
        """What must not be timed before one of `fresh`: runsc's address, which the run before took away."""
        if name == "runsc run":
            self._address("run")

    def _runsc_run(self) -> None:
        bundle = self.directory / "bundle-run"
        _check(*self._hidden(*self._runsc("run", f"-bundle={bundle}", f"{self._name}-run")))

    def runsc_exec(self) -> None:
        """`runsc exec … /bin/true` in the running sandbox."""
        _check(*self._runsc("exec", f"{self._name}-exec", "/bin/true"))

    def runsc_head(self, size: int) -> int:
        """`runsc exec … head -c` of zeros in the running sandbox, read through its pipe; returns the bytes."""
        argv = self._runsc("exec", f"{self._name}-exec", "/usr/bin/head", "-c", str(size), "/dev/zero")
        received = 0
        with subprocess.Popen(argv, stdin=NULL, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            while piece := process.stdout.read(1_048_576):
                received += len(piece)
        return received

    @property
    def agent(self) -> Sandbox:
        """The agent in the sandbox that is always up."""
        assert self._sandbox is not None
        return self._sandbox

    # --- the others ------------------------------------------------------------------------------------------------

    def _make_crun_bundle(self) -> None:
        """The specification that crun itself proposes, with our root, command and no terminal."""
        bundle = self.directory / "crun"
        subprocess.run(["crun", "spec"], cwd=bundle, check=True, capture_output=True)
        spec = json.loads((bundle / "config.json").read_text())
        spec["process"] |= {"terminal": False, "args": ["/bin/true"]}
        spec["process"].pop("rlimits", None)
        spec["root"] = {"path": str(self.root), "readonly": True}
        (bundle / "config.json").write_text(json.dumps(spec))

    def _crun_run(self) -> None:
        crun = ("crun", "--cgroup-manager=disabled", f"--root={self.directory / 'crun' / 'state'}")
        _check(*self._without_unified(*crun, "run", f"--bundle={self.directory / 'crun'}", f"{self._name}-crun"))

    def _podman_run(self) -> None:
        state = self.directory / "podman"
        podman = ("podman", f"--root={state / 'root'}", f"--runroot={state / 'run'}", "--cgroup-manager=cgroupfs")
        limits = ("--ulimit=nofile=20000:20000", "--ulimit=nproc=1000:1000", "--cgroups=disabled")
        run = ("run", "--rm", "--network=none", *limits, "--rootfs", str(self.root), "/bin/true")
        _check(*self._without_unified(*podman, *run))

    def _bwrap(self) -> None:
        _check(
            "bwrap", "--ro-bind", str(self.root), "/", "--proc", "/proc", "--dev", "/dev", "--unshare-all", "/bin/true"
        )

    @staticmethod
    def _without_unified(*argv: str) -> list[str]:
        return ["unshare", "--mount", "--propagation", "private", "sh", "-c", HIDE_UNIFIED, "sh", *argv]


def _check(*argv: str) -> None:
    # Pipes: gVisor keeps an offset of its own into a regular file.
    done = subprocess.run(argv, stdin=NULL, check=False, capture_output=True, timeout=EXEC_SECONDS)
    if done.returncode != 0:
        raise RuntimeError(f"{argv[0]}: status {done.returncode}: {done.stderr[-300:].decode(errors='replace')}")


def _quietly(*argv: str) -> None:
    subprocess.run(argv, stdin=NULL, check=False, capture_output=True, timeout=EXEC_SECONDS)

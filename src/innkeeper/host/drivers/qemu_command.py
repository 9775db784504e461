"""The command line of a microVM. Pure; the same for QEMU 7.2 and 10.

Nothing in it is a secret or a path of the host: files come as descriptors, so that QEMU's user needs no right to any of them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import StrEnum

KERNEL_ARGUMENTS = ("quiet", "loglevel=0", "panic=-1", "reboot=t")
# CONFIG_HZ of Debian's kernels.
KERNEL_HZ = 250
LINK_PORT = "innkeeper.link"
# Translated code of a guest, beside its memory. Without a size QEMU takes up to a gigabyte, as the host is large.
TCG_CACHE_MIB = 64
# QEMU itself (30 MiB measured) and what it needs for requests to disks and the network.
OVERHEAD_MIB = 96
SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


class Accelerator(StrEnum):
    """What runs a guest's instructions: the processor's virtualization, or QEMU's translator."""

    KVM = "kvm"
    TCG = "tcg"


@dataclass(frozen=True, slots=True)
class VmPlan:
    """What a microVM is started with. `kernel` and `initramfs` are paths as QEMU sees them; the rest but sizes are descriptors that it inherits.

    `tsc_khz` is the rate of the host's time stamp counter; TCG needs it. Without an `image` or a `disk` the guest has none. One that is `incoming` boots
    nothing: it waits for the state of another and, when it has that, to be continued.
    """

    name: str
    accelerator: Accelerator
    memory_mb: int
    vcpu_count: int
    kernel: str
    initramfs: str
    control: int
    link: int
    image: int | None = None
    disk: int | None = None
    tap: int | None = None
    mac: str | None = None
    tsc_khz: int | None = None
    incoming: bool = False
    # The guest's memory, where it is one that others map, too: see vm_template.py. `memory_shared`: what the guest writes goes there.
    memory: int | None = None
    memory_shared: bool = False


def host_memory_mb(plan: VmPlan) -> int:
    """What the machine may take of the host's memory, QEMU's own included."""
    cache = TCG_CACHE_MIB if plan.accelerator is Accelerator.TCG else 0
    # Where a template has nothing, the first clone that writes has the kernel make a page in the template before it gets its own, and is charged for both.
    of_template = plan.memory_mb if plan.memory is not None and not plan.memory_shared else 0
    return plan.memory_mb + of_template + OVERHEAD_MIB + cache


def kernel_arguments(accelerator: Accelerator, tsc_khz: int | None) -> str:
    """The guest kernel's command line: the same for every guest of a host, since templates are shared.

    Raises ValueError where TCG lacks the rate of the counter: a microVM has no other clock to measure it by, and hangs at random.
    """
    words = list(KERNEL_ARGUMENTS)
    if accelerator is Accelerator.TCG:
        if tsc_khz is None:
            raise ValueError("TCG needs the rate of the host's time stamp counter")
        # Without `reliable` the kernel compares the counter with its ticks, of which a busy host delivers too few, and tells the time by those from then
        # on: a guest was 73 s behind after three minutes beside a load of 15, and its start had taken 23 s in place of 7.
        # There is no boundary that `mitigations` could keep, and each thunk and filled return buffer of theirs is one more block to translate.
        words += ["mitigations=off", f"tsc_early_khz={tsc_khz}", "tsc=reliable"]
        words += [f"lpj={tsc_khz * 1000 // KERNEL_HZ}", "no_timer_check"]
    return " ".join(words)


def qemu_command(qemu: str, plan: VmPlan) -> list[str]:
    """The arguments that start the VM at once, unless it is `incoming`."""
    # fmt: off
    command = [
        qemu, "-name", plan.name,
        "-nodefaults", "-no-user-config", "-display", "none", "-serial", "none", "-no-reboot",
        "-sandbox", SANDBOX,
        # Virtio 1; QEMU's default for this transport is the older layout.
        "-global", "virtio-mmio.force-legacy=off",
        "-M", "microvm,isa-serial=off,pit=off,pic=off,memory-backend=ram",
        *_processor(plan),
        "-object", _memory(plan),
        "-m", f"{plan.memory_mb}M", "-smp", str(plan.vcpu_count),
        "-chardev", f"socket,id=control,fd={plan.control},server=on,wait=off", "-mon", "chardev=control,mode=control",
    ]
    # fmt: on
    if plan.incoming:
        # QEMU would hold kernel and initramfs in its own memory, 15 MiB for each guest, and nobody reads them any more.
        command += ["-S", "-incoming", "defer"]
    else:
        arguments = kernel_arguments(plan.accelerator, plan.tsc_khz)
        command += ["-kernel", plan.kernel, "-initrd", plan.initramfs, "-append", arguments]
    if plan.image is not None:
        # Shared by every guest of the image: no lock, which the second one would not get.
        command += _disk("image", plan.image, "read-only=on", "file.locking=off")
    if plan.disk is not None:
        command += _disk("disk", plan.disk, "discard=unmap", "detect-zeroes=unmap")
    # fmt: off
    command += [
        "-device", "virtio-scsi-device,id=scsi0",
        "-device", "virtio-serial-device,id=serial0,max_ports=2",
        "-chardev", f"socket,id=link,fd={plan.link},server=on,wait=off",
        "-device", f"virtserialport,id=link0,bus=serial0.0,nr=1,chardev=link,name={LINK_PORT}",
    ]
    if plan.tap is not None:
        command += [
            "-netdev", f"tap,id=net0,fd={plan.tap},vhost=off",
            "-device", f"virtio-net-device,netdev=net0,mac={plan.mac}",
        ]
    # fmt: on
    return [*command, "-object", "rng-builtin,id=rng0", "-device", "virtio-rng-device,rng=rng0"]


def options_digest(accelerator: Accelerator, tsc_khz: int | None) -> str:
    """A digest of all that the command says of any VM: where it differs, one's state is not another's."""
    any_vm = VmPlan(
        name="",
        accelerator=accelerator,
        memory_mb=0,
        vcpu_count=0,
        kernel="",
        initramfs="",
        control=0,
        link=0,
        image=0,
        disk=0,
        tap=0,
        mac="",
        tsc_khz=tsc_khz,
    )
    return hashlib.sha256("\0".join(qemu_command("", any_vm)).encode()).hexdigest()[:16]


def _memory(plan: VmPlan) -> str:
    if plan.memory is None:
        return f"memory-backend-ram,id=ram,size={plan.memory_mb}M"
    share = "on" if plan.memory_shared else "off"
    # By this name, since QEMU takes no descriptor for it: 7.2 opens the file for writing whatever is done with it, so the file itself must forbid that.
    return f"memory-backend-file,id=ram,size={plan.memory_mb}M,mem-path=/proc/self/fd/{plan.memory},share={share}"


def _processor(plan: VmPlan) -> list[str]:
    if plan.accelerator is Accelerator.KVM:
        return ["-accel", "kvm", "-cpu", "host"]
    # `max`: today's Python packages want SSE4.2, which the default processor has not.
    return ["-accel", f"tcg,tb-size={TCG_CACHE_MIB}", "-cpu", "max"]


def _disk(name: str, descriptor: int, *options: str) -> list[str]:
    number = {"image": 1, "disk": 2}[name]
    node = f"driver=raw,node-name={name},file.driver=file,file.filename=/dev/fdset/{number}"
    # fmt: off
    return [
        "-add-fd", f"fd={descriptor},set={number}",
        "-blockdev", ",".join((node, *options)),
        "-device", f"virtio-blk-device,drive={name},serial={name}",
    ]
    # fmt: on

"""The command line of a microVM: what must be in it, for which accelerator, and what must not."""

from dataclasses import replace

import pytest

from innkeeper.host.drivers.qemu_command import (
    Accelerator,
    VmPlan,
    host_memory_mb,
    kernel_arguments,
    options_digest,
    qemu_command,
)

PLAN = VmPlan(
    name="0123456789abcdef",
    accelerator=Accelerator.TCG,
    memory_mb=256,
    vcpu_count=2,
    kernel="/kernel",
    initramfs="/initramfs",
    control=10,
    link=11,
    image=12,
    disk=13,
    tap=14,
    mac="02:ab:cd:00:00:01",
    tsc_khz=2_596_120,
)


def values(command, option):
    return [command[at + 1] for at, word in enumerate(command) if word == option]


def test_tcg_gets_the_rate_of_the_counter_and_a_bounded_cache():
    command = qemu_command("qemu", PLAN)
    assert values(command, "-accel") == ["tcg,tb-size=64"]
    assert values(command, "-cpu") == ["max"]
    assert values(command, "-append") == [
        "quiet loglevel=0 panic=-1 reboot=t mitigations=off tsc_early_khz=2596120 tsc=reliable lpj=10384480 no_timer_check"
    ]
    with pytest.raises(ValueError, match="time stamp counter"):
        qemu_command("qemu", replace(PLAN, tsc_khz=None))


def test_kvm_needs_neither():
    command = qemu_command("qemu", replace(PLAN, accelerator=Accelerator.KVM, tsc_khz=None))
    assert values(command, "-accel") == ["kvm"]
    assert values(command, "-cpu") == ["host"]
    assert values(command, "-append") == ["quiet loglevel=0 panic=-1 reboot=t"]
    # Nothing else of the machine differs; both are the same for every release of QEMU that the driver takes.
    other = qemu_command("qemu", PLAN)
    differ = {command[at - 1] for at, (one, two) in enumerate(zip(command, other, strict=True)) if one != two}
    assert differ == {"-accel", "-cpu", "-append"}
    assert kernel_arguments(Accelerator.KVM, 2_596_120) == kernel_arguments(Accelerator.KVM, None)


def test_disks_come_as_descriptors_in_the_order_that_the_guest_counts_them():
    command = qemu_command("qemu", PLAN)
    assert values(command, "-add-fd") == ["fd=12,set=1", "fd=13,set=2"]
    image, disk = values(command, "-blockdev")
    assert image.startswith("driver=raw,node-name=image,file.driver=file,file.filename=/dev/fdset/1,")
    assert "read-only=on" in image.split(",")
    assert disk.startswith("driver=raw,node-name=disk,file.driver=file,file.filename=/dev/fdset/2,")
    assert "discard=unmap" in disk.split(",")
    assert "read-only=on" not in disk.split(",")
    # A second QEMU on an instance's disk would ruin it; only what nobody writes is shared without a lock.
    assert ("file.locking=off" in image.split(","), "file.locking=off" in disk.split(",")) == (True, False)
    devices = values(command, "-device")
    assert devices == [
        "virtio-blk-device,drive=image,serial=image",
        "virtio-blk-device,drive=disk,serial=disk",
        "virtio-scsi-device,id=scsi0",
        "virtio-serial-device,id=serial0,max_ports=2",
        "virtserialport,id=link0,bus=serial0.0,nr=1,chardev=link,name=innkeeper.link",
        "virtio-net-device,netdev=net0,mac=02:ab:cd:00:00:01",
        "virtio-rng-device,rng=rng0",
    ]


@pytest.mark.parametrize("accelerator", list(Accelerator))
def test_what_a_guest_could_reach_is_closed(accelerator):
    command = qemu_command("qemu", replace(PLAN, accelerator=accelerator))
    assert values(command, "-sandbox") == ["on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]
    assert {"-nodefaults", "-no-user-config", "-no-reboot"} <= set(command)
    assert values(command, "-netdev") == ["tap,id=net0,fd=14,vhost=off"]
    assert values(command, "-chardev") == [
        "socket,id=control,fd=10,server=on,wait=off",
        "socket,id=link,fd=11,server=on,wait=off",
    ]
    # No way to the host's name of anything, nor to a console or a network of QEMU's own.
    assert not any("script=" in word or "user,id" in word or word == "-monitor" for word in command)


def test_a_guest_without_disks_and_network_has_none():
    command = qemu_command("qemu", replace(PLAN, image=None, disk=None, tap=None, mac=None))
    assert values(command, "-blockdev") == values(command, "-netdev") == values(command, "-add-fd") == []
    assert not any("virtio-blk" in word or "virtio-net" in word for word in command)


def test_sizes_are_the_plans():
    command = qemu_command("qemu", PLAN)
    assert values(command, "-m") == ["256M"]
    assert values(command, "-smp") == ["2"]
    assert "memory-backend-ram,id=ram,size=256M" in values(command, "-object")
    assert host_memory_mb(PLAN) - host_memory_mb(replace(PLAN, accelerator=Accelerator.KVM)) == 64
    assert host_memory_mb(PLAN) > 256 + 64


def test_a_clone_may_be_charged_for_its_templates_pages_too():
    clone = replace(PLAN, memory=9)
    assert host_memory_mb(clone) - host_memory_mb(PLAN) == 256
    assert host_memory_mb(replace(clone, memory_shared=True)) == host_memory_mb(PLAN)


def test_one_that_takes_a_state_neither_boots_nor_runs_before_it_is_told():
    start, incoming = qemu_command("qemu", PLAN), qemu_command("qemu", replace(PLAN, incoming=True))
    assert "-S" not in start
    assert values(start, "-incoming") == []
    assert "-S" in incoming
    assert values(incoming, "-incoming") == ["defer"]
    # Otherwise they are the same machine: the state fits no other. What is booted is in the state.
    booted = [word for option in ("-kernel", "-initrd", "-append") for word in (option, *values(start, option))]
    assert [word for word in incoming if word not in ("-S", "-incoming", "defer")] == [
        word for word in start if word not in booted
    ]


def test_memory_that_is_shared_is_opened_by_its_descriptor_and_mapped_privately_but_for_a_template():
    assert values(qemu_command("qemu", PLAN), "-object")[0] == "memory-backend-ram,id=ram,size=256M"
    clone = values(qemu_command("qemu", replace(PLAN, incoming=True, memory=9)), "-object")[0]
    assert clone == "memory-backend-file,id=ram,size=256M,mem-path=/proc/self/fd/9,share=off"
    template = values(qemu_command("qemu", replace(PLAN, memory=9, memory_shared=True)), "-object")[0]
    assert template == clone.replace("share=off", "share=on")


def test_state_depends_on_what_the_command_says_and_not_on_whose_it_is():
    one = options_digest(Accelerator.TCG, 2_000_000)
    assert one == options_digest(Accelerator.TCG, 2_000_000)
    assert len({one, options_digest(Accelerator.TCG, 2_000_001), options_digest(Accelerator.KVM, None)}) == 3

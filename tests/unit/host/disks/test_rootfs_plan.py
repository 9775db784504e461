"""The overlay of a guest's root, as a plan."""

from pathlib import Path

import pytest

from innkeeper.host.disks.disk_pool import default_size_mib
from innkeeper.host.disks.disk_template import mkfs_argv
from innkeeper.host.disks.rootfs import MAX_LAYERS, DiskPlan, OverlayPlan


def _overlay(*lowers: str) -> OverlayPlan:
    return OverlayPlan(tuple(map(Path, lowers)), Path("/d/u"), Path("/d/w"), Path("/m"))


def test_options_keep_the_layers_in_order_and_the_features_off() -> None:
    assert _overlay("/top", "/base").options() == (
        "lowerdir=/top:/base,upperdir=/d/u,workdir=/d/w,metacopy=off,redirect_dir=nofollow,index=off,userxattr"
    )


def test_what_means_something_to_overlay_is_escaped() -> None:
    assert _overlay("/a:b,c\\d").options().startswith("lowerdir=/a\\:b\\,c\\\\d,upperdir=")


@pytest.mark.parametrize("lowers", [(), ("/l",) * (MAX_LAYERS + 1), (f"/{'x' * 250}",) * MAX_LAYERS])
def test_a_stack_that_the_kernel_would_refuse_is_refused_before(lowers: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="layers"):
        _overlay(*lowers).options()


def test_the_description_is_a_command_line() -> None:
    assert _overlay("/base").describe() == (
        "mount -t overlay -o nodev,nosuid,noatime,lowerdir=/base,upperdir=/d/u,workdir=/d/w,"
        "metacopy=off,redirect_dir=nofollow,index=off,userxattr overlay /m"
    )


def test_a_disk_plan_puts_upper_and_work_on_the_disk_and_the_root_beside_it() -> None:
    overlay = DiskPlan("i", 512, (Path("/l"),), Path("/mnt/i")).overlay
    assert (overlay.upper, overlay.work, overlay.target) == (
        Path("/mnt/i/disk/u"),
        Path("/mnt/i/disk/w"),
        Path("/mnt/i/root"),
    )


def test_a_template_keeps_its_journal() -> None:
    argv = mkfs_argv(Path("/t.img"), 10240)
    assert "^has_journal" not in " ".join(argv)
    assert argv[-2:] == ["/t.img", "10240M"]


@pytest.mark.parametrize(("free", "mib"), [(0, 1024), (100 << 30, 92160)])
def test_the_pool_takes_most_of_what_is_free(free: int, mib: int) -> None:
    assert default_size_mib(free) == mib

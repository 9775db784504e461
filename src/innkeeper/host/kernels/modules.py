"""Which modules a microVM's kernel is given, and in which order. Pure, but for the unpacking of one that is compressed."""

from __future__ import annotations

import lzma
from pathlib import Path, PurePosixPath

# What finds devices, in the order in which a failing boot can still be told of; then what the root is made of.
WANTED = (
    "virtio_mmio",
    "virtio_console",
    "virtio_blk",
    "virtio_rng",
    "virtio_net",
    "virtio_scsi",
    "sd_mod",
    "overlay",
    "erofs",
    "ext4",
)

# What a guest's kernel, or a program in the guest, may ask for later: file systems, and what container engines, VPNs and firewalls need of the network.
OFFERED = (
    *("fuse", "loop", "squashfs", "binfmt_misc"),
    *("bridge", "br_netfilter", "veth", "dummy", "macvlan", "ipvlan", "vxlan", "8021q", "tun", "wireguard"),
    *(
        "nf_tables",
        "nft_compat",
        "nft_chain_nat",
        "nft_nat",
        "nft_masq",
        "nft_redir",
        "nft_ct",
        "nft_fib_inet",
        "nft_reject_inet",
        "nft_log",
    ),
    *(
        "nft_limit",
        "nft_hash",
        "nft_numgen",
        "nft_quota",
        "nft_tproxy",
        "nft_socket",
        "nf_conntrack_netlink",
        "nf_log_syslog",
    ),
    *("iptable_filter", "iptable_nat", "iptable_mangle", "iptable_raw"),
    *("ip6table_filter", "ip6table_nat", "ip6table_mangle", "ip6table_raw", "ipt_REJECT", "ip6t_REJECT"),
    *(
        "xt_addrtype",
        "xt_comment",
        "xt_connmark",
        "xt_conntrack",
        "xt_hashlimit",
        "xt_limit",
        "xt_LOG",
        "xt_mark",
        "xt_MASQUERADE",
        "xt_multiport",
    ),
    *(
        "xt_nat",
        "xt_NFLOG",
        "xt_owner",
        "xt_physdev",
        "xt_recent",
        "xt_REDIRECT",
        "xt_set",
        "xt_socket",
        "xt_state",
        "xt_statistic",
        "xt_tcpudp",
    ),
    *("xt_TCPMSS", "xt_TPROXY", "ip_set_hash_ip", "ip_set_hash_net", "ip_set_bitmap_port", "ip_vs_rr", "xt_ipvs"),
)


class ModuleMissingError(LookupError):
    """The kernel has a module neither as a file nor built in."""


def load_order(dependencies: str, built_in: str, wanted: tuple[str, ...] = WANTED) -> list[str]:
    """The files to load, each behind those that it needs, as paths below the folder of `modules.dep`, which is `dependencies`.

    `built_in` is modules.builtin. Raises ModuleMissingError.
    """
    needs = {
        path: rest.split() for path, _, rest in (line.partition(":") for line in dependencies.splitlines() if line)
    }
    files = {module_name(path): path for path in needs}
    without_file = {module_name(path) for path in built_in.split()}
    order: dict[str, None] = {}

    def take(path: str) -> None:
        # depmod lists all that a module needs, the nearest first.
        for needed in reversed(needs.get(path, [])):
            order.setdefault(needed)
        order.setdefault(path)

    for name in wanted:
        if name in files:
            take(files[name])
        elif name not in without_file:
            raise ModuleMissingError(name)
    return list(order)


def offered(dependencies: str, built_in: str, aliases: str, devices: str) -> tuple[list[str], dict[str, str]]:
    """The files of what is offered and not loaded at the boot; and what describes them, by file name. A kernel may lack some of it.

    That is `modules.dep` as depmod writes it, with names in place of paths, and the lines of `aliases` (modules.alias) and `devices` (modules.devname) for
    them.
    """
    there = {module_name(line.partition(":")[0]) for line in dependencies.splitlines()}
    boot = set(load_order(dependencies, built_in))
    order = load_order(dependencies, built_in, tuple(name for name in OFFERED if name in there))
    files = [path for path in order if path not in boot]
    names = {module_name(path) for path in files}
    needs = []
    for path, _, rest in (line.partition(":") for line in dependencies.splitlines()):
        if module_name(path) in names:
            needed = [module_name(other) for other in rest.split() if other not in boot]
            needs.append(" ".join([f"{module_name(path)}:", *needed]))
    return files, {
        "modules.dep": "".join(f"{line}\n" for line in needs),
        "modules.alias": "".join(f"{line}\n" for line in aliases.splitlines() if line.rpartition(" ")[2] in names),
        "modules.devname": "".join(f"{line}\n" for line in devices.splitlines() if line.partition(" ")[0] in names),
    }


def module_name(path: str) -> str:
    """What the kernel calls the module of that file: `virtio_rng` of `kernel/…/virtio-rng.ko.xz`."""
    return PurePosixPath(path).name.partition(".")[0].replace("-", "_")


def read_module(path: Path) -> bytes:
    """The module, uncompressed, byte for byte: a stripped one has lost its signature. Raises OSError, ValueError."""
    content = path.read_bytes()
    if path.name.endswith(".ko"):
        return content
    if path.name.endswith(".ko.xz"):
        try:
            return lzma.decompress(content)
        except lzma.LZMAError as error:
            raise ValueError(f"{path}: {error}") from error
    raise ValueError(f"{path}: a module that is compressed in a way that is not known")

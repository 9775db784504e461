"""The kernel and its tools, one file per thing: subprocesses, mounts, loop devices, cgroups, namespaces, nftables."""

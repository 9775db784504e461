"""Counters of the control side. Plain numbers that use cases add to; `control.readings` names them for `/metrics`."""

from __future__ import annotations

from dataclasses import dataclass, field


def _count(text: str) -> int:
    number: int = field(default=0, metadata={"text": text})
    return number


def _seconds(text: str) -> float:
    number: float = field(default=0.0, metadata={"text": text})
    return number


@dataclass(slots=True)
class Metrics:
    """What happened since the start of the process. `*_seconds` are sums; divided by their counter they give a mean."""

    instances_created: int = _count("Rooms and VMs that were made.")
    instances_claimed: int = _count("Rooms and VMs that took a warm guest.")
    instances_restarted: int = _count("Rooms and VMs that started again on their disk.")
    instances_destroyed: int = _count("Rooms and VMs that were removed.")
    instances_expired: int = _count("Rooms and VMs that ended because nothing used them, or VMs' time was over.")
    instances_refused: int = _count("Rooms and VMs that were not made for want of a place or because of a limit.")
    provisionings: int = _count("Times that a guest was asked for.")
    provisioning_failures: int = _count("Of these, those that failed.")
    provisioning_seconds: float = _seconds("Time that they took together.")
    executions: int = _count("Commands that were begun.")
    cells: int = _count("Of these, cells of Python.")
    execution_failures: int = _count("Commands that could not be run to an end.")
    execution_retries: int = _count("Commands that were sent again because their guest was gone.")
    terminals: int = _count("Terminals that were started.")
    terminal_attachments: int = _count("Times that somebody began to look at a terminal.")
    port_connections: int = _count("Connections to guests' ports, by shares above all, that were begun.")
    ssh_logins: int = _count("SSH clients that were let in.")
    ssh_refusals: int = _count("SSH keys that opened nothing.")
    ssh_turned_away: int = _count("SSH connections that were closed unread, for want of a place.")
    file_reads: int = _count("Files that were read.")
    file_writes: int = _count("Files that were written.")
    public_file_reads: int = _count("Files that were read without a token.")
    machines_adopted: int = _count("Guests that were found running.")
    machines_lost: int = _count("Guests that were gone without a word.")
    machines_failed: int = _count("Guests that failed.")
    snapshots_taken: int = _count("Snapshots that were taken.")
    snapshots_verified: int = _count("Verifications of snapshots that came to an end.")
    snapshots_damaged: int = _count("Verifications that found a snapshot damaged.")
    image_builds: int = _count("Builds of images that were begun.")
    image_build_failures: int = _count("Builds of images that failed; not those that somebody cancelled.")
    build_steps_run: int = _count("Steps of builds that were carried out.")
    build_steps_kept: int = _count("Steps of builds that an earlier build had left.")
    orphans_destroyed: int = _count("Guests and disks of no room or VM that were destroyed.")
    kept_removed: int = _count("Snapshots and checkpoints of volumes that went by a retention policy.")
    rows_forgotten: int = _count("Rows of history that were deleted after their time.")
    stale_writes: int = _count("States that were not stored because a newer one was.")
    failed_writes: int = _count("Writes beside requests that failed.")

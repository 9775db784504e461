"""Who comes in over SSH: to the VM that the user name says, by a key of its organization."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from innkeeper.control import audit, vms
from innkeeper.control.vm_entry import VmEntry
from innkeeper.core.token import Principal, Scope
from innkeeper.errors import VmNotFoundError
from innkeeper.store import ssh_keys as store

if TYPE_CHECKING:
    from innkeeper.control.context import Control


@dataclass(frozen=True, slots=True)
class SshLogin:
    """Somebody at a VM: as whom, and by which of the organization's keys."""

    entry: VmEntry
    principal: Principal
    key_number: int
    fingerprint: str


async def admit(control: Control, vm_id: str, fingerprint: str) -> SshLogin | None:
    """Whom a key lets in at a VM; None for an unknown VM, another organization's VM and an unknown key alike.

    The database is asked the same question in all of these cases, so that none of them takes longer. What is returned holds until the caller gives way:
    by then it has to have asked `control.ssh_keys_in_use` to tell of the key's end.
    """
    while True:
        generation = control.ssh_keys_in_use.generation
        numbers = await control.database.read(store.numbers_of, fingerprint)
        if generation == control.ssh_keys_in_use.generation:
            break
    for organization_id, number in numbers.items():
        principal = Principal(organization_id, None, frozenset({Scope.ROOMS}), f"ssh_key:{number}")
        try:
            entry = await vms.existing_entry(control, principal, vm_id)
        except VmNotFoundError:
            continue
        return SshLogin(entry, principal, number, fingerprint)
    return None


async def until_vm_ends(login: SshLogin) -> None:
    """Wait until the VM is being taken away, or was."""
    changed = asyncio.Event()
    login.entry.followers.add(changed)
    try:
        while not login.entry.doomed:
            await changed.wait()
            changed.clear()
    finally:
        login.entry.followers.discard(changed)


def note_login(control: Control, login: SshLogin, address: str) -> None:
    """Tell the audit log that somebody came in, and from which address."""
    control.metrics.ssh_logins += 1
    _note(control, login, "ssh.login", address=address)


def note_logout(control: Control, login: SshLogin) -> None:
    """Tell the audit log that the connection ended."""
    _note(control, login, "ssh.logout")


def note_session(control: Control, login: SshLogin, kind: str) -> None:
    """Tell the audit log of a session: `shell`, `exec` or `sftp`. A command may hold secrets, and is not told."""
    _note(control, login, "ssh.session", kind=kind)


def note_forward(control: Control, login: SshLogin, port: int) -> None:
    """Tell the audit log of a connection to a port of the VM."""
    _note(control, login, "ssh.forward", port=str(port))


def _note(control: Control, login: SshLogin, action: str, **told: str) -> None:
    instance_id = login.entry.instance.id
    details = {"instance_id": str(instance_id), "key": login.fingerprint, **told, **login.entry.marks}
    control.later.audit(audit.event(login.principal, action, "instance", instance_id, details))

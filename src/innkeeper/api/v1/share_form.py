"""A share on the wire."""

from __future__ import annotations

from innkeeper.api.v1.share_schemas import ShareAnswer
from innkeeper.control import shares
from innkeeper.control.context import Control
from innkeeper.control.vm_entry import VmEntry
from innkeeper.core.share import Share


def share_answer(control: Control, entry: VmEntry, share: Share) -> ShareAnswer:
    """The wire form of a share of a VM."""
    return ShareAnswer(
        share_id=str(share.id),
        url=shares.share_url(control, share.name),
        port=share.port,
        is_public=share.is_public,
        vm_id=entry.vm.vm_id,
        session_id=str(entry.vm.session_id),
        created_at=share.created_at,
    )

"""Retention under `/v1/retention`."""

from __future__ import annotations

from fastapi import APIRouter

from innkeeper.api.json_app import CurrentPrincipal
from innkeeper.api.v1.retention_schemas import Applied, Apply, ExcessItem, Policy, Rule
from innkeeper.control import retention_policies
from innkeeper.control.context import Control
from innkeeper.core.retention_policy import KeptKind, RetentionPolicy, RetentionRule
from innkeeper.core.vm import vm_id
from innkeeper.errors import InvalidRequestError


def add_retention_routes(router: APIRouter, control: Control) -> None:
    """Add the routes; each is one use case."""

    @router.get("/v1/retention")
    async def get_retention(principal: CurrentPrincipal) -> Policy:
        """The organization's policy."""
        return _shown(await retention_policies.get(control, principal))

    @router.put("/v1/retention")
    async def put_retention(principal: CurrentPrincipal, body: Policy) -> Policy:
        """Have this policy from now on, as a whole. What goes by it goes some minutes later."""
        return _shown(await retention_policies.put(control, principal, _policy(body)))

    @router.post("/v1/retention/apply")
    async def apply_retention(principal: CurrentPrincipal, body: Apply) -> Applied:
        """What goes by the policy, or by another one; with `remove` it is gone at once."""
        if body.policy is not None and body.remove:
            raise InvalidRequestError("policy: nothing is removed by one that is not in force; PUT it first")
        chosen = None if body.policy is None else _policy(body.policy)
        found = await retention_policies.apply(control, principal, remove=body.remove, policy=chosen)
        return Applied(
            items=[
                ExcessItem(
                    kind=one.kept.kind.value,
                    id=str(one.kept.id),
                    of=vm_id(one.kept.of, 1) if one.kept.kind is KeptKind.SNAPSHOTS else str(one.kept.of),
                    name=one.kept.name,
                    created_at=one.kept.created_at,
                    size_bytes=one.kept.size_bytes,
                    reason=one.reason.value,
                    stays=one.stays,
                )
                for one in found
            ],
            removed=body.remove,
            total_bytes=sum(one.kept.size_bytes for one in found if one.stays is None),
        )


def _policy(body: Policy) -> RetentionPolicy:
    return RetentionPolicy(
        RetentionRule(**body.snapshots.model_dump()), RetentionRule(**body.volume_checkpoints.model_dump())
    )


def _shown(policy: RetentionPolicy) -> Policy:
    rules = (
        Rule(keep_last=rule.keep_last, max_age_days=rule.max_age_days, max_bytes=rule.max_bytes)
        for rule in (policy.snapshots, policy.volume_checkpoints)
    )
    return Policy(**dict(zip(("snapshots", "volume_checkpoints"), rules, strict=True)))

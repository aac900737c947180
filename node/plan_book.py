"""The plan book: the newest signed plan this node knows, kept on disk and replicated to every node.

The highest (epoch, author) wins everywhere. It checks who may plan; it does not plan.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from node.placement.assignment import MAX_PLAN_BYTES, Plan, PlanError
from pod.canonical import DecodeError, decode, encode
from pod.identity import verify

PLAN_CONTEXT = b"gpu-pod plan, v1\x00"
MAX_SIGNED_PLAN_BYTES = MAX_PLAN_BYTES + 256
MAX_SUMMARY_BYTES = 128
# Nobody plans so often that an honest node falls further behind; one who could would end all planning.
MAX_EPOCH_JUMP = 1_000_000


class PlanBook:
    """Replicated under the name `plan`. `may_plan(node)`: does that node belong to a member that serves?"""

    name = "plan"

    def __init__(self, path: Path, may_plan: Callable[[bytes], bool], on_change: Callable[[], None]) -> None:
        self._path = path
        self._may_plan = may_plan
        self._on_change = on_change
        self._raw = b""
        self.plan: Plan | None = None
        if path.exists():
            self._restore(path.read_bytes())

    def publish(self, plan: Plan, sign: Callable[[bytes], bytes]) -> bool:
        """Sign this node's own plan and take it over. False when a newer one is already known."""
        encoded = plan.encode()
        raw = encode([encoded, sign(PLAN_CONTEXT + encoded)])
        return self._adopt(raw)

    def digest(self) -> bytes:
        return hashlib.sha256(self._raw).digest()

    def summary(self) -> bytes:
        plan = self.plan
        return encode([plan.epoch, plan.author] if plan else [0, b""])

    def missing(self, summary: bytes) -> tuple[bytes, bool]:
        match decode(summary, MAX_SUMMARY_BYTES):
            case [int(epoch), bytes(author)]:
                newer = self.plan is not None and (self.plan.epoch, self.plan.author) > (epoch, author)
                return (self._raw if newer else b""), False
        return b"", False

    async def ingest(self, peer: bytes, payload: bytes) -> int:
        return int(bool(payload) and self._adopt(payload))

    def may_plan(self, node: bytes) -> bool:
        return self._may_plan(node)

    def _adopt(self, raw: bytes) -> bool:
        """Take a newer plan of somebody who may plan: on disk first, then in force."""
        try:
            plan = _decode_signed(raw)
        except (PlanError, DecodeError):
            return False
        known_epoch = self.plan.epoch if self.plan is not None else plan.epoch
        if not self._may_plan(plan.author) or plan.epoch - known_epoch > MAX_EPOCH_JUMP:
            return False
        if not plan.supersedes(self.plan):
            return False
        temporary = self._path.with_suffix(".new")
        temporary.write_bytes(raw)
        temporary.replace(self._path)
        self._raw, self.plan = raw, plan
        self._on_change()
        return True

    def _restore(self, raw: bytes) -> None:
        """What was in force before a restart is in force again, also when its author has left since."""
        try:
            self.plan = _decode_signed(raw)
        except (PlanError, DecodeError):
            return
        self._raw = raw


def _decode_signed(raw: bytes) -> Plan:
    """Raises PlanError or DecodeError unless the plan's author signed it."""
    match decode(raw, MAX_SIGNED_PLAN_BYTES):
        case [bytes(encoded), bytes(signature)]:
            plan = Plan.decode(encoded)
            if not verify(plan.author, PLAN_CONTEXT + encoded, signature):
                raise PlanError("the plan's signature does not match")
            return plan
    raise PlanError("not a signed plan")

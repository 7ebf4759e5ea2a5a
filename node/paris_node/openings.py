"""Openings: a node lays committed states open when the coordinator asks for them.

Challenges come with the answers to beats and are journalled; only those that a coordinator key of
the policy signed, about our own work, count (others are logged and ignored). They are answered
beside training, while the owner lets the node work, and again until every byte is acknowledged or
the deadline is over; a restart goes on where it was, piece by piece. Asked a second time, a node
answers with the states that it made the first time::

    openings = Openings(kit)
    await openings.hear(answer.get("challenges"))
    await openings.run()                              # for ever; cancelled at a pause
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from paris_node.journal import Challenged
from paris_node.kit import Kit
from paris_node.upkeep import assignment_of, laid_open, order_of
from paris_protocol.canonical import canonical
from paris_protocol.envelope import Sealed, seal, statement_id, unseal
from paris_protocol.errors import ParisError
from paris_protocol.net.fetch import upload_blob
from paris_protocol.records import (
    Challenge,
    Commitment,
    Contribution,
    Opening,
    OpenState,
    TensorFile,
)

ROUNDS: Final = 4
"""Uploads of one answer before it rests for a while."""
MOST: Final = 64
"""Challenges of one beat that are looked at."""
_OVER: Final = frozenset(
    {"audit.state", "audit.unknown", "audit.closed", "node.revoked", "commitment.mismatch"}
)
"""Refusals after which asking again changes nothing."""
UNANSWERED: Final = "audit.unanswered"
"""How a challenge ends here whose time ran out; the coordinator asks once more."""


class Openings:
    """See the module."""

    def __init__(self, kit: Kit) -> None:
        self.kit = kit
        self._woken = asyncio.Event()

    # ------------------------------------------------------------ being asked

    async def hear(self, challenges: object) -> None:
        """Take in the challenges of a beat's answer."""
        for value in challenges[:MOST] if isinstance(challenges, list) else ():
            try:
                await self._take(canonical(value))
            except ParisError as error:
                extra = {"code": error.code, "detail": error.detail}
                self.kit.log.warning("challenge.ignored", extra=extra)

    async def _take(self, raw: bytes) -> None:
        kit = self.kit
        if statement_id(raw) in {one.id for one in kit.journal.challenges()}:
            return
        keys = (await kit.control.policy()).record.coordinator_keys
        sealed = unseal(raw, Challenge, kit.network, keys)
        unit, commitment = self._ours(sealed.record)
        wanted, count = sealed.record.states, len(commitment.states)
        # After the states comes the residual that the unit began with.
        most = count - (assignment_of(kit, unit).residual is None)
        if not wanted or not all(place <= most for place in wanted):
            raise ParisError("audit.unknown", f"states {sealed.record.states}")
        kit.journal.keep_challenge(Challenged(sealed.id, unit, raw, None, "open"))
        about = {"unit": unit, "states": list(sealed.record.states)}
        kit.log.info("challenge.taken", extra=about)
        self._woken.set()

    def _ours(self, challenge: Challenge) -> tuple[str, Commitment]:
        """The unit that a challenge is about and what was committed to; `audit.unknown`."""
        kit = self.kit
        letters = {one.id: one for one in kit.journal.letters()}
        ours = letters.get(challenge.contribution)
        if challenge.node != kit.key.id or ours is None or ours.kind != "contribution":
            raise ParisError("audit.unknown", "it is about another node's work")
        record = unseal(ours.envelope, Contribution, kit.network, {kit.key.id}).record
        letter = letters[record.commitment]
        return ours.unit, unseal(letter.envelope, Commitment, kit.network, {kit.key.id}).record

    # ------------------------------------------------------------ answering

    async def run(self) -> None:
        """Answer what is open, now and whenever something new is asked; never ends by itself."""
        while True:
            self._woken.clear()
            for one in self.kit.journal.challenges("open"):
                if one in self.kit.journal.challenges("open"):  # an earlier one may answer it too
                    await self._try(one)
            waits = bool(self.kit.journal.challenges("open"))
            try:
                async with asyncio.timeout(self.kit.settings.retry if waits else None):
                    await self._woken.wait()
            except TimeoutError:
                continue

    async def _try(self, one: Challenged) -> None:
        """Answer one challenge, or note why it cannot be answered (yet)."""
        try:
            await self.answer(one)
            return
        except ParisError as error:
            code, detail = error.code, error.detail
        except OSError as error:
            code, detail = "internal", str(error)
        except Exception as error:  # noqa: BLE001 - one that fails keeps no other from its answer
            code, detail = "internal", f"{type(error).__name__}: {error}"
        extra = {"unit": one.unit, "code": code, "detail": detail[:200]}
        self.kit.log.warning("opening.failed", extra=extra)
        if code in _OVER or self.kit.clock() > self._challenge(one).record.deadline:
            [one] = [each for each in self.kit.journal.challenges() if each.id == one.id]
            self._end(one, code if code in _OVER else UNANSWERED)

    async def answer(self, one: Challenged) -> None:
        """Make the opening, send it, and upload until the coordinator has it all."""
        kit = self.kit
        if one.opening is None or not self._here(one.opening):
            one = await self._open(one)
            kit.journal.keep_challenge(one)
        assert one.opening is not None
        for _ in range(ROUNDS):
            answer = await kit.control.post("openings", one.opening)
            if answer.get("state") == "complete":
                kit.log.info("opening.answered", extra={"unit": one.unit})
                for each in kit.journal.challenges("open"):
                    if each.unit == one.unit:
                        self._end(each, "answered")
                return
            lacking = answer.get("lacking")
            for state in self._opening(one.opening).states:
                ref = state.file.blob
                if not isinstance(lacking, list) or ref.id in lacking:
                    pieces = _lacking(answer, ref.id, len(kit.store.manifest(ref.id).pieces))
                    await upload_blob(ref, kit.store, kit.control, pieces)
        raise ParisError("network.down", "the opening is not complete yet")

    async def _open(self, one: Challenged) -> Challenged:
        """The signed opening of a challenge; its states stand in the store, pinned."""
        kit, challenge = self.kit, self._challenge(one)
        states = self._before(one, challenge.record.states) or await self._made(one, challenge)
        opening = Opening(
            challenge=one.id, contribution=challenge.record.contribution, states=states
        )
        raw = seal(opening, kit.key, kit.network).raw
        return Challenged(one.id, one.unit, one.envelope, raw, "open")

    async def _made(self, one: Challenged, challenge: Sealed[Challenge]) -> tuple[OpenState, ...]:
        """The wanted states as blobs of the store, pinned; the trainer finds or makes them."""
        kit = self.kit
        _, commitment = self._ours(challenge.record)
        order = await order_of(kit, one.unit)
        order |= {"roots": list(commitment.states), "states": list(challenge.record.states)}
        states = []
        for place, path, root in await kit.trainer.open(order):
            ref = await asyncio.to_thread(kit.store.add_file, path)
            kit.store.pin(ref.id)
            states.append(OpenState(index=place, file=TensorFile(blob=ref, root=root)))
        await asyncio.to_thread(shutil.rmtree, Path(order["work"]) / "opened", ignore_errors=True)
        return tuple(states)

    def _before(self, one: Challenged, wanted: tuple[int, ...]) -> tuple[OpenState, ...]:
        """The same states if they were laid open before and are still here: asked a second time."""
        for other in self.kit.journal.challenges():
            if other.unit == one.unit and other.opening is not None and self._here(other.opening):
                states = self._opening(other.opening).states
                if tuple(state.index for state in states) == wanted:
                    return states
        return ()

    def _here(self, raw: bytes) -> bool:
        return all(self.kit.store.has(state.file.blob) for state in self._opening(raw).states)

    def _end(self, one: Challenged, state: str) -> None:
        """Note how a challenge ended. States stay while they may be asked for once more."""
        kit = self.kit
        kit.journal.keep_challenge(Challenged(one.id, one.unit, one.envelope, one.opening, state))
        if state != UNANSWERED and one.opening is not None:
            waiting = {ref.id for ref in laid_open(kit, one.unit, "open")}
            for opened in self._opening(one.opening).states:
                if opened.file.blob.id not in waiting:
                    kit.store.remove(opened.file.blob)

    def _challenge(self, one: Challenged) -> Sealed[Challenge]:
        return unseal(one.envelope, Challenge, self.kit.network, None)

    def _opening(self, raw: bytes) -> Opening:
        return unseal(raw, Opening, self.kit.network, {self.kit.key.id}).record


def _lacking(answer: Mapping[str, Any], blob: str, count: int) -> list[int]:
    """Pieces of a blob that the coordinator says it lacks; all of them where it says nothing."""
    told = answer.get("missing")
    pieces = told.get(blob) if isinstance(told, dict) else None
    if not isinstance(pieces, list) or not pieces:
        return list(range(count))
    sound = all(type(piece) is int and 0 <= piece < count for piece in pieces)
    return pieces if sound else list(range(count))


def counts(challenges: list[Challenged]) -> dict[str, Any]:
    """Challenges by state, for `status`."""
    states = [one.state for one in challenges]
    return {
        "open": states.count("open"),
        "answered": states.count("answered"),
        "lost": sum(state not in ("open", "answered") for state in states),
    }

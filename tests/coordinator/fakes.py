"""A coordinator without models: a tiny network on disk, instant jobs, and a node that asks."""

import json
import time
from pathlib import Path

from coordinator import synthetic as made
from paris_coordinator import genesis as founding
from paris_coordinator.config import State
from paris_coordinator.genesis import Setup, file_root, init
from paris_coordinator.office import Office
from paris_coordinator.shift import Shift
from paris_protocol.blobs import PIECE, Manifest
from paris_protocol.envelope import seal, unseal
from paris_protocol.errors import ParisError
from paris_protocol.keys import PrivateKey, peer_id
from paris_protocol.records import (
    Assignment,
    Beat,
    Challenge,
    Commitment,
    Contribution,
    LeaseRequest,
    Opening,
    OpenState,
    Registration,
    TensorFile,
)
from paris_protocol.secretsets import set_root
from paris_protocol.tensors import states_root, tensor_root


def prepared_folder(folder, experts=2, shards=4, **policy):
    """What `prepare` would leave, with one tiny tensor in every file."""
    described = made.described(experts, shards)
    described["policy"] |= policy
    names = ["initial.safetensors", "codec.safetensors"]
    for cluster in described["clusters"]:
        names += [cluster["validation"]["path"], cluster["audit"]["path"]]
        names += [shard["path"] for shard in cluster["shards"]]
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(made.safetensors({"w": ((3,), float(number))}))
    (folder / "prepared.json").write_text(json.dumps(described))
    return folder


def found(folder, experts=2, shards=4, plan=None, audit=None, **policy):
    """A network in `folder`/state; its experts are one tensor of three numbers.

    `audit`: what differs from the default rules; None for a network that audits nothing.
    """
    prepared = prepared_folder(folder / "prepared", experts, shards)
    overrides = dict(policy, audit=audit, **({"plan": plan} if plan else {}))
    real, founding.expert_schema = founding.expert_schema, lambda _: None
    try:
        init(prepared, folder / "state", Setup(port=8420, overrides=overrides), 1000)
    finally:
        founding.expert_schema = real
    return State(folder / "state")


def open_office(state, clock=time.time):
    return Office(state, clock)


NUMERICS, MODEL = "a" * 64, "flux-1-adamw-x0"
"""The numeric class of all machines here."""


class FakeJobs:
    """Answers at once: everything is accepted unless `refuse` says otherwise, and so on.

    `cheated`: assignments (JSON) whose replay does not give the committed states.
    """

    def __init__(
        self, refuse=lambda job: False, worse=lambda job: False, cheated=lambda assignment: False
    ):
        self.refuse, self.worse, self.cheated, self.done = refuse, worse, cheated, []

    async def run(self, job, timeout=0.0):
        self.done.append(job)
        json.dumps(job)  # it crosses a pipe
        return getattr(self, job["job"])(job)

    def ready(self, job):
        return {}

    def verify(self, job):
        layers = made.layers(not self.refuse(job))
        return {
            "layers": [x.model_dump(mode="json") for x in layers],
            "norm": "1",
            "relative": "0.01",
            "private": {"delta": "-0.1", "se": "0.01"},
        }

    def numerics(self, job):
        return {"numerics": NUMERICS, "model": MODEL}

    def replay(self, job):
        assert all(Path(path).exists() for _, path in job["states"])
        assert all(Path(path).exists() for path in [job["parent"], *job["shards"]])
        exact, sound = job["numerics"] == NUMERICS, not self.cheated(job["assignment"])
        answer = {"exact": exact, "numerics": NUMERICS, "segments": [], "passed": True, "code": ""}
        if not exact and not job["audit"]["tolerances"]:
            return answer | {"code": "audit.tolerance"}
        needed = set(job["segments"]) - {0} | {len(job["commitment"]["states"]) - 1}
        assert needed <= {index for index, _ in job["states"]}
        segments = [made.segment(i, sound).model_dump(mode="json") for i in job["segments"]]
        return answer | {
            "segments": segments, "passed": sound, "code": "" if sound else "audit.mismatch"
        }  # fmt: skip

    def answer(self, job):
        roots = [made.digest(job["assignment"]["seed"], i) for i in range(made.STATES)]
        return {"states": roots, "update_root": "0" * 64, "numerics": NUMERICS}

    def secret(self, job):
        clips, salt = [made.digest("clip", job["head"])], made.digest("salt", job["head"])
        return {"salt": salt, "clips": clips, "root": set_root(salt, clips)}

    def scan(self, job):
        return {"words": 0, "experts": [], "flagged": []}

    def merge(self, job):
        assert all(Path(part["path"]).exists() for part in job["inputs"])
        value = float(len(self.done)) + 0.5
        # By rename, as the real job does: the store may hold a link to an earlier attempt's file.
        draft = Path(job["out"] + ".new")
        draft.write_bytes(made.safetensors({"w": ((3,), value)}))
        draft.rename(job["out"])
        root = file_root(Path(job["out"]))
        parts = [[i, part["weight"], part["scale"]] for i, part in enumerate(job["inputs"])]
        return {
            "root": root, "numbers": [["after", "1.5"]], "worse": self.worse(job),
            "inputs": parts, "left_out": [],
        }  # fmt: skip

    def revert(self, job):
        return self.merge(job | {"inputs": job["removed"]})

    def router(self, job):
        assert all(Path(path).exists() for _, path in job["shards"] + job["private"])
        folder = Path(job["out"])
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text("{}")
        return {"report": {"accuracy": "1"}}

    def samples(self, job):
        return {"files": []}

    def bundle(self, job):
        folder = Path(job["out"])
        for index, _ in enumerate(job["heads"]):
            (folder / f"expert_{index}").mkdir(parents=True, exist_ok=True)
            (folder / f"expert_{index}" / "config.json").write_text("{}")
        return {"experts": [], "router_root": "0" * 64}


def notes():
    """A place for a shift's notes."""
    found = []
    return found, lambda what, facts: found.append((what, facts))


def new_shift(office, jobs=None):
    found, note = notes()
    shift = Shift(office, jobs or FakeJobs(), note)
    shift.notes = found
    return shift


class FakeNode:
    """A volunteer that trains nothing: every request by the given `send(verb, raw)`."""

    def __init__(self, network, seed, clock=time.time):
        self.network, self.clock = network, clock
        self.key = PrivateKey.from_seed(bytes([seed]) * 32)
        self.promised, self.answers, self.says = {}, True, True

    def seal(self, record):
        return seal(record, self.key, self.network)

    def now(self):
        return int(self.clock())

    def registration(self):
        record = Registration(
            node=self.key.id, peer_id=peer_id(self.key.id), version="0.1.0", at=self.now()
        )
        return self.seal(record).raw

    def request(self, **changed):
        return self.seal(
            LeaseRequest(
                at=self.now(), version="0.1.0", name="A", device="cpu", memory_mb=100, disk_mb=100
            ).model_copy(update=changed)
        ).raw

    def beat(self, assignment=None):
        return self.seal(Beat(at=self.now(), assignment=assignment, step=0, state="training")).raw

    def assignment(self, answer):
        raw = json.dumps(answer["assignment"], sort_keys=True, separators=(",", ":")).encode()
        return unseal(raw, Assignment, self.network, None)

    def update(self, assignment, value=None):
        """The bytes of an update, its reference and root; a function of the assignment."""
        number = int(assignment.id[:6], 16) / 2**24 if value is None else value
        data = made.safetensors({"w": ((3,), number)})
        ref = Manifest.build([data]).ref
        item = ("w", "F32", (3,), data[-12:])
        return data, TensorFile(blob=ref, root=tensor_root([item]))

    def statements(self, assignment, value=None):
        """Commitment, contribution and the update's bytes for an assignment."""
        data, file = self.update(assignment, value)
        record = assignment.record
        count = 1 + -(-record.steps // record.commit_every)
        states = tuple(made.digest(assignment.id, i) for i in range(count))
        commitment = self.seal(
            Commitment(
                assignment=assignment.id, states=states, states_root=states_root(states),
                update_root=file.root, steps=record.steps,
            )
        )  # fmt: skip
        contribution = self.seal(
            Contribution(
                assignment=assignment.id, commitment=commitment.id, update=file, steps=record.steps,
                samples=record.steps * record.batch, loss="1", seconds=1, numerics=NUMERICS,
            )
        )  # fmt: skip
        self.promised[contribution.id] = commitment.record
        return commitment, contribution, data

    def challenges(self, answer):
        """The challenges in the answer to a beat."""
        return [
            unseal(json.dumps(raw, sort_keys=True, separators=(",", ":")).encode(), Challenge,
                   self.network, None)
            for raw in answer["challenges"]
        ]  # fmt: skip

    def opening(self, challenge, name="state"):
        """The opening that a challenge asks for, and the bytes of its states by blob."""
        committed = self.promised[challenge.record.contribution]
        states, files = [], {}
        for index in challenge.record.states:
            value = float(int(made.digest(name, committed.states[index])[:6], 16))
            data = made.safetensors({"w": ((3,), value)})
            ref = Manifest.build([data]).ref
            files[ref.id] = data
            file = TensorFile(blob=ref, root=committed.states[index])
            states.append(OpenState(index=index, file=file))
        record = Opening(
            challenge=challenge.id, contribution=challenge.record.contribution,
            states=tuple(states),
        )  # fmt: skip
        return self.seal(record), files

    async def beats(self, office, remote="127.0.0.1"):
        """Lives for a moment: opens whatever states it is asked for; how many challenges."""
        asked = self.challenges(await office.beat(self.beat(), remote))
        for challenge in asked if self.answers else ():
            opening, files = self.opening(challenge)
            while (state := await office.open_states(opening.raw))["state"] != "complete":
                for blob in state["lacking"]:
                    data = files[blob]
                    await office.uploads.put_manifest(blob, len(data), Manifest.build([data]).raw)
                    await office.uploads.put_piece(blob, 0, data)
        return len(asked)

    async def hand_in(self, office, answer, value=None):
        """Everything after training; the contribution's id."""
        commitment, contribution, data = self.statements(self.assignment(answer), value)
        await office.commit(commitment.raw)
        state = await office.contribute(contribution.raw)
        await self.upload(office, contribution, data, state)
        return contribution.id

    async def upload(self, office, contribution, data, state):
        ref = contribution.record.update.blob
        manifest = Manifest.build([data])
        if state["manifest_missing"]:
            await office.uploads.put_manifest(ref.id, ref.size, manifest.raw)
        for number in state["missing"] or range(len(manifest.pieces)):
            if state["state"] == "uploading":
                await office.uploads.put_piece(
                    ref.id, number, data[number * PIECE : (number + 1) * PIECE]
                )

    async def turn(self, office):
        """One unit, if there is one: the contribution's id, None, or "finished"."""
        try:
            answer = await office.lease(self.request())
        except ParisError as error:
            assert error.code in ("work.none", "node.quarantined", "node.revoked"), error.sentence
            return None
        if "finished" in answer:
            return "finished"
        assignment = self.assignment(answer)
        if assignment.record.kind == "audit":
            return await self.audit(office, assignment)
        return await self.hand_in(office, answer)

    async def audit(self, office, assignment, sound=None):
        """Reports on an audit that it was given; `sound`: what it says."""
        task = assignment.record.audit
        report = made.report_for(
            task.contribution, task.segments, self.says if sound is None else sound,
            assignment.id, self.key.id,
        )  # fmt: skip
        return (await office.audit(self.seal(report).raw))["id"]


async def work_off(shift):
    """Everything that can be done now."""
    worked = False
    while await shift.step():
        worked = True
    return worked


async def run_out(office, shift, nodes, most=500):
    """Until there is nothing to do: all rounds, router, release."""
    for node in nodes:
        await office.register(node.registration())
    for _ in range(most):
        turns = [await node.turn(office) for node in nodes]
        worked = await work_off(shift)
        for node in nodes:
            worked = bool(await node.beats(office)) or worked
        if not worked and all(turn in (None, "finished") for turn in turns):
            troubles = [facts for _, facts in shift.notes if "error" in facts]
            assert not shift.due(), troubles
            return
    raise AssertionError("it does not end")

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
    Commitment,
    Contribution,
    LeaseRequest,
    Registration,
    TensorFile,
)
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


def found(folder, experts=2, shards=4, plan=None, **policy):
    """A network in `folder`/state; its experts are one tensor of three numbers."""
    prepared = prepared_folder(folder / "prepared", experts, shards)
    overrides = dict(policy, **({"plan": plan} if plan else {}))
    real, founding.expert_schema = founding.expert_schema, lambda _: None
    try:
        init(prepared, folder / "state", Setup(port=8420, overrides=overrides), 1000)
    finally:
        founding.expert_schema = real
    return State(folder / "state")


def open_office(state, clock=time.time):
    return Office(state, clock)


class FakeJobs:
    """Answers at once: everything is accepted unless `refuse` says otherwise."""

    def __init__(self, refuse=lambda job: False, worse=lambda job: False):
        self.refuse, self.worse, self.done = refuse, worse, []

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
        }

    def merge(self, job):
        assert all(Path(part["path"]).exists() for part in job["inputs"])
        value = float(len(self.done)) + 0.5
        # By rename, as the real job does: the store may hold a link to an earlier attempt's file.
        draft = Path(job["out"] + ".new")
        draft.write_bytes(made.safetensors({"w": ((3,), value)}))
        draft.rename(job["out"])
        root = file_root(Path(job["out"]))
        return {"root": root, "numbers": [["after", "1.5"]], "worse": self.worse(job)}

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
                samples=record.steps * record.batch, loss="1", seconds=1,
            )
        )  # fmt: skip
        return commitment, contribution, data

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
            await office.put_manifest(ref.id, ref.size, manifest.raw)
        for number in state["missing"] or range(len(manifest.pieces)):
            if state["state"] == "uploading":
                await office.put_piece(ref.id, number, data[number * PIECE : (number + 1) * PIECE])

    async def turn(self, office):
        """One unit, if there is one: the contribution's id, None, or "finished"."""
        try:
            answer = await office.lease(self.request())
        except ParisError as error:
            assert error.code in ("work.none", "node.quarantined"), error.sentence
            return None
        return "finished" if "finished" in answer else await self.hand_in(office, answer)


async def run_out(office, shift, nodes, most=500):
    """Until there is nothing to do: all rounds, router, release."""
    for node in nodes:
        await office.register(node.registration())
    for _ in range(most):
        turns = [await node.turn(office) for node in nodes]
        worked = False
        while await shift.step():
            worked = True
        if not worked and all(turn in (None, "finished") for turn in turns):
            troubles = [facts for _, facts in shift.notes if "error" in facts]
            assert not shift.due(), troubles
            return
    raise AssertionError("it does not end")

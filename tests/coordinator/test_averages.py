"""Averages in the coordinator: carried by merges, kept, begun anew behind a revert, released."""

import asyncio
import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from coordinator import synthetic as made
from coordinator.fakes import FakeJobs, FakeNode, found, new_shift, open_office, run_out
from coordinator.test_audits import network, nodes_of
from paris_coordinator.checking import check_log
from paris_coordinator.pruning import expendable
from paris_coordinator.reading import recompute_text
from paris_coordinator.worker import perform
from paris_models.checkpoint import load_tensors, save_tensors
from paris_models.commands.cli import app
from paris_models.ema import average_files
from paris_protocol.averages import kept_share
from paris_protocol.blobs import Manifest
from paris_protocol.envelope import seal
from paris_protocol.net.folder import file_root, verify_folder
from paris_protocol.records import Merge
from tinynet import ROOT, root_of, tensor_file
from tinyrelease import TinyRelease

EMA = 0.875
STEPS = 4
"""Of a unit of the office's tests."""


class Averaging(FakeJobs):
    """Averages for real; tensors are tiny."""

    def average(self, job):
        out = Path(job["out"])
        average_files(Path(job["average"]), Path(job["head"]), float.fromhex(job["decay"]), out)
        return {"root": file_root([out])}


@pytest.fixture
def with_ema(monkeypatch):
    """Networks that are founded from here on have a running average."""
    plain = made.described

    def described(*sizes):
        value = plain(*sizes)
        value["recipe"]["ema"] = str(EMA)
        return value

    monkeypatch.setattr(made, "described", described)


@pytest.fixture
def state(tmp_path, with_ema):
    return found(tmp_path, experts=1)


def merges_of(office):
    return list(office.desk.merges.values())


def check_chain(office, merges, average):
    """Every merge's average follows from the one before and its own head."""
    for merge in merges:
        out = office.state.folder / "again.safetensors"
        head = office.store.path(merge.result.blob)
        average_files(average, head, float.fromhex(merge.decay), out)
        assert merge.average.root == file_root([out])
        average = office.store.path(merge.average.blob)


def test_merges_carry_the_average_and_the_release_holds_it(state):
    office = open_office(state)
    jobs = Averaging()

    async def life():
        await run_out(office, new_shift(office, jobs), [FakeNode(office.network, 1)])
        await office.project()

    asyncio.run(life())
    merges = merges_of(office)
    assert check_log(state.log, office.network)["statements"]["merge"] == len(merges) == 2
    assert [merge.decay for merge in merges] == [
        kept_share(EMA, STEPS * len(merge.inputs)).hex() for merge in merges
    ]
    check_chain(office, merges, office.store.path(office.genesis.record.initial.blob))
    averages = [merge.average.blob.id for merge in merges]
    assert set(averages) <= office.kept()
    bundle = next(job for job in jobs.done if job["job"] == "bundle")
    assert bundle["heads"] == [str(office.store.path(merges[-1].average.blob))]
    verified = verify_folder(state.releases / "1", office.network)
    assert verified.release.record.experts[0].root == merges[-1].average.root
    assert f"decay {EMA}" in (state.releases / "1" / "README.md").read_text()
    office.close()


def test_networks_without_an_ema_run_no_such_job(tmp_path):
    office, jobs = open_office(found(tmp_path, experts=1)), FakeJobs()
    asyncio.run(run_out(office, new_shift(office, jobs), [FakeNode(office.network, 1)]))
    assert "average" not in {job["job"] for job in jobs.done}
    assert all(merge.average is merge.decay is None for merge in merges_of(office))
    office.close()


def test_a_merge_that_is_worse_has_no_average(state):
    office, tried = open_office(state), []

    def worse(job):
        tried.append(job)
        return len(tried) == 1

    shift = new_shift(office, Averaging(worse=worse))
    asyncio.run(run_out(office, shift, [FakeNode(office.network, 1)]))
    first, *others = merges_of(office)
    assert (first.published, first.average, first.decay) == (False, None, None)
    check_chain(office, others, office.store.path(office.genesis.record.initial.blob))
    office.close()


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_kill_between_merge_and_filing_is_made_good(state, moment):
    class Dying(Averaging):
        def average(self, job):
            if moment == "after":
                super().average(job)
            raise Killed

    node = FakeNode(state.genesis().id, 1)
    office = open_office(state)
    with pytest.raises(Killed):
        asyncio.run(run_out(office, new_shift(office, Dying()), [node]))
    assert not office.desk.merges, "nothing half-written counts"
    office.close()
    again = open_office(state)
    asyncio.run(run_out(again, new_shift(again, Averaging()), [node]))
    assert [merge.round for merge in merges_of(again)] == [0, 1]
    check_chain(again, merges_of(again), again.store.path(again.genesis.record.initial.blob))
    verify_folder(state.releases / "1", again.network)
    again.close()


def test_a_revert_begins_the_average_anew(tmp_path, with_ema):
    plan = {"units": 2, "steps": STEPS, "rounds": 3}
    office = open_office(network(tmp_path, plan=plan, experts=1))
    honest, cheat = nodes_of(office, 2)
    caught = []

    def cheated(assignment):
        if assignment["node"] == cheat.key.id and assignment["round"] >= 1:
            caught.append(assignment["expert"])
        return bool(caught) and assignment["node"] == cheat.key.id

    asyncio.run(run_out(office, new_shift(office, Averaging(cheated=cheated)), [honest, cheat]))
    desk = office.desk
    behind = [i for i, m in enumerate(merges_of(office)) if m.parent.merge in desk.reverts]
    assert behind
    merges = merges_of(office)[behind[0] :]
    check_chain(office, merges, office.head_file(merges[0].parent))
    assert verify_folder(office.state.releases / "1", office.network)
    office.close()


def test_naming_an_average_as_an_update_deletes_nothing(state):
    office = open_office(state)
    asyncio.run(run_out(office, new_shift(office, Averaging()), [FakeNode(office.network, 1)]))
    desk, [merge, _] = office.desk, merges_of(office)
    desk.policy = desk.policy.model_copy(update={"inputs_kept": 1})
    named = desk.work_of(merge.inputs[0].contribution)
    assert named.done.update.blob in expendable(desk, 1 << 40)
    named.handed_in = named.done.model_copy(update={"update": merge.average})
    assert merge.average.blob not in expendable(desk, 1 << 40)
    office.close()


# ---------------------------------------------------------------- real tensors


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return TinyRelease(tmp_path_factory.mktemp("averaged"), ema=str(EMA))


@pytest.fixture(scope="module")
def blobs(tiny, tmp_path_factory):
    """The initial checkpoint and the updates; no head, no average."""
    folder = tmp_path_factory.mktemp("blobs")
    for path in [tiny.net.head_file, *tiny.net.folder.glob("update-*.safetensors")]:
        shutil.copy(path, folder / f"{Manifest.build([path.read_bytes()]).id}.blob")
    return folder


def job(tiny, out, **changes):
    return {
        "job": "average", "genesis": str(tiny.net.folder / "genesis.json"),
        "average": str(tiny.net.head_file), "head": str(tiny.folder / "head0.safetensors"),
        "decay": (0.3).hex(), "out": str(out),
    } | changes  # fmt: skip


def test_the_job_writes_the_average_beside_the_head(tiny, tmp_path):
    out = tmp_path / "average.safetensors"
    answer = perform(job(tiny, out))["result"]
    before, head = load_tensors(tiny.net.head_file), load_tensors(tiny.folder / "head0.safetensors")
    found = load_tensors(out)
    assert answer == {"root": root_of(found)}
    c, d = np.float32(0.3), np.float32(1 - 0.3)
    for name, tensor in found.items():
        assert np.array_equal(tensor.numpy(), c * before[name].numpy() + d * head[name].numpy())


def test_files_that_do_not_fit_leave_no_average(tiny, tmp_path):
    head, out = load_tensors(tiny.net.head_file), tmp_path / "average.safetensors"
    first = next(iter(head))
    bad = {
        "tensor.values": head | {first: torch.full_like(head[first], torch.nan)},
        "tensor.header": {name: tensor for name, tensor in head.items() if name != first},
    }
    for code, tensors in bad.items():
        save_tensors(tensors, tmp_path / "bad.safetensors")
        for name in ("average", "head"):
            answer = perform(job(tiny, out, **{name: str(tmp_path / "bad.safetensors")}))
            assert answer["error"]["code"] == code
            assert not list(tmp_path.glob("average*"))


def test_a_release_of_averages_is_recomputed_from_public_inputs(tiny, blobs):
    release = tiny.publish("release")
    words = ["verify", str(release), "--explain", "--recompute", "--blobs", str(blobs)]
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["verified"]
    for expert, file in enumerate(tiny.files):
        weights = release / f"expert_{expert}" / "diffusion_pytorch_model.safetensors"
        assert root_of(load_tensors(weights)) == root_of(load_tensors(file))
        step = facts["recompute"]["steps"][expert]
        assert (step["same"], step["average_root"]) == (True, tensor_file(file).root)
        told = facts["explain"]["experts"][expert]
        assert told["head"] == told["steps"][-1]["average"]["root"] == step["average"]
        assert told["head"] != tiny.heads[expert].weights.root
    assert CliRunner().invoke(app, words).stdout.count("running average") == 2


def test_a_tampered_average_is_named(tiny, blobs, tmp_path):
    """Signed and released, but not what follows from the heads."""
    path = tmp_path / "tampered.safetensors"
    tensors = load_tensors(tiny.files[1])
    name = next(iter(tensors))
    save_tensors(tensors | {name: tensors[name] * 1.0001}, path)
    fake = copy.copy(tiny)
    old = next(s for s in tiny.log if isinstance(s.record, Merge) and s.record.expert == 1)
    lie = old.record.model_copy(update={"average": tensor_file(path)})
    new = seal(lie, ROOT, tiny.net.genesis.id)
    fake.log = [new if each is old else each for each in tiny.log]
    fake.heads = [tiny.heads[0], tiny.heads[1].model_copy(update={"merge": new.id})]
    fake.files = [tiny.files[0], path]
    release = fake.publish("tampered")
    done = CliRunner().invoke(app, ["verify", str(release), "--recompute", "--blobs", str(blobs)])
    assert done.exit_code == 1
    assert f"merge {new.id[:16]} of expert 1, round 0: 2 inputs, ANOTHER AVERAGE" in done.stdout
    assert "not verified" in done.stdout
    assert f"the average of merge {new.id[:16]}" in done.stderr


def test_an_average_is_told_with_its_root():
    facts = {"merge": "a", "stated": "b", "root": "b", "same": False}
    assert recompute_text(facts).count("recomputed") == 1
    text = recompute_text(facts | {"average": "c", "average_root": ""})
    assert "average     c\nrecomputed  –" in text

"""Following a lineage over HTTP: heads made from merges' inputs, else the full download."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from contracts.server import listening, refusals, routes
from nodeworld import ScriptedTrainer, make_kit
from paris_models.checkpoint import load_tensors, save_tensors
from paris_models.codecs import encode
from paris_models.expert import parameter_shapes
from paris_models.merge import merge_files, revert_files
from paris_node import following
from paris_node.following import follow, followed
from paris_node.jobs import Jobs
from paris_node.kit import Kit
from paris_node.merged import follow as make
from paris_node.traffic import Traffic, moved
from paris_protocol.envelope import seal, unseal
from paris_protocol.errors import ParisError
from paris_protocol.net.control import HttpControl
from paris_protocol.net.memory import MemoryControl
from paris_protocol.records import BlobRef, Head, Merge, MergeInput, Revert, TensorFile
from tinynet import ROOT, TinyNet, hexed, tensor_file

CODECS = ("topk-32", "int8", "dense-bf16")


class Adding(ScriptedTrainer):
    """Makes heads as the real trainer does, in this process."""

    followed = 0

    async def follow(self, order: Any, hear: Callable[[dict[str, Any]], None]) -> None:
        self.followed += 1
        make(order, lambda done: hear({"event": "progress", "step": done}))


class Lineage:
    """A coordinator that has merged some rounds; every head and input is a real blob."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.net = TinyNet(folder / "net")
        self.control = MemoryControl(self.net.genesis.raw, [self.net.policy.raw])
        self.heads = [self.net.head]
        self.files = [self.net.head_file]
        self.inputs: list[list[BlobRef]] = [[]]
        self.add(self.net.head_file)

    def add(self, path: Path) -> BlobRef:
        return self.control.add_blob(path.read_bytes())

    def update(self, name: str, codec: Any) -> TensorFile:
        generator = torch.Generator().manual_seed(len(self.heads))
        shapes = parameter_shapes(self.net.config)
        delta = {n: 1e-3 * torch.randn(s, generator=generator) for n, s in shapes.items()}
        path = self.folder / f"{name}.safetensors"
        save_tensors(encode(codec, delta), path)
        self.add(path)
        return tensor_file(path)

    def merge(self, *codecs: str, kind: type[Merge | Revert] = Merge) -> Head:
        """The next head, from updates of these codecs."""
        number, parent = len(self.heads), self.heads[-1]
        files = [self.update(f"u{number}.{i}", codec) for i, codec in enumerate(codecs)]
        scalars = [(0.5, 1.0), (0.25, 0.75), (0.125, 1.0)][: len(files)]
        out = self.folder / f"head{number}.safetensors"
        paths = [self.folder / f"u{number}.{i}.safetensors" for i in range(len(files))]
        run = merge_files if kind is Merge else revert_files
        run(self.files[-1], [(p, *s) for p, s in zip(paths, scalars, strict=True)], out)
        self.add(out)
        inputs = tuple(
            MergeInput(
                contribution=hexed(f"{number} {i}"), update=file, weight=w.hex(), scale=s.hex()
            )
            for i, (file, (w, s)) in enumerate(zip(files, scalars, strict=True))
        )
        shared: dict[str, Any] = {
            "expert": 0, "parent": parent, "result": tensor_file(out), "numbers": (), "policy": 1,
            "at": 1_700_000_000,
        }  # fmt: skip
        record = (
            Merge(round=parent.round, inputs=inputs, published=True, **shared)
            if kind is Merge
            else Revert(revocation=hexed("r"), removed=inputs, **shared)
        )
        sealed = seal(record, ROOT, self.net.genesis.id)
        self.control.statements[sealed.id] = sealed.raw
        step = 1 if kind is Merge else 0
        head = Head(round=parent.round + step, weights=record.result, merge=sealed.id)
        self.heads.append(head)
        self.files.append(out)
        self.inputs.append([file.blob for file in files])
        return head

    def lose(self, ref: BlobRef) -> None:
        """Let the coordinator keep a blob no longer."""
        self.control._manifests.pop(ref.id)
        self.control._pieces = {k: v for k, v in self.control._pieces.items() if k[0] != ref.id}

    def damage(self, ref: BlobRef) -> None:
        self.control._pieces[ref.id, 0] = b"x" * len(self.control._pieces[ref.id, 0])


@pytest.fixture
def lineage(tmp_path: Path) -> Lineage:
    return Lineage(tmp_path)


def fetched(
    lineage: Lineage, head: Head, at_hand: int | None = 0, again: bool = False
) -> tuple[Kit, bool, Adding]:
    """A node with an earlier head gets this one, over HTTP; the blob is there afterwards."""
    trainer = Adding()

    async def play() -> tuple[Kit, bool]:
        async with listening(*routes(lineage.control), middleware=refusals) as url:
            kit = kit_of(lineage, url, trainer)
            if at_hand is not None:
                kit.store.add_bytes(lineage.files[at_hand].read_bytes())
            heard: list[int] = []
            made = await follow(kit, head, heard.append)
            if again:
                made = await follow(kit, head, heard.append)
            assignment = lineage.net.assignment(0, 0, parent=head, hard_deadline=4_000_000_100)
            # The job falls back to the download of whatever is not here.
            jobs = Jobs(kit)
            jobs.assignment = lambda unit: assignment  # type: ignore[method-assign]
            kit.store.add_bytes(lineage.net.shard(0, 0).read_bytes())
            await jobs.fetch("u", heard.append)
            assert (
                kit.store.path(head.weights.blob).read_bytes()
                == lineage.files[lineage.heads.index(head)].read_bytes()
            )
            Traffic(kit.journal).note(kit.control, None)
            await kit.control.close()
            return kit, made

    kit, made = asyncio.run(play())
    assert not (kit.folder / "following.safetensors").exists()
    return kit, made, trainer


def kit_of(lineage: Lineage, url: str, trainer: Adding) -> Kit:
    class Place:
        genesis, network = lineage.net.genesis, lineage.net.genesis.id
        control = HttpControl(url, lineage.net.genesis.id)

    return make_kit(lineage.folder / "node", Place, trainer)  # type: ignore[arg-type]


@pytest.mark.parametrize("codecs", [("topk-32", "topk-64", "int8"), ("dense-bf16",)])
def test_a_head_comes_from_its_merge_s_inputs_with_equal_bits_for_fewer_bytes(
    lineage: Lineage, codecs: tuple[str, ...]
) -> None:
    head = lineage.merge(*codecs)
    kit, made, trainer = fetched(lineage, head)
    paid = sum(ref.size for ref in lineage.inputs[1])
    assert made and trainer.followed == 1
    assert followed(kit.journal) == {
        "heads": 1, "bytes": paid, "instead_of": head.weights.blob.size,
    }  # fmt: skip
    assert paid <= moved(kit.journal)["from_coordinator"] < head.weights.blob.size
    assert not any(kit.store.has(ref) for ref in lineage.inputs[1]), "inputs are left over"
    kit.journal.close()


def test_several_merges_and_a_revert_are_caught_up_with(lineage: Lineage) -> None:
    lineage.merge("topk-64", "topk-64")
    lineage.merge("topk-64", kind=Revert)
    head = lineage.merge("topk-128")
    kit, made, trainer = fetched(lineage, head, again=True)
    assert not made, "the second time it is there already"
    assert trainer.followed == 1 and followed(kit.journal)["heads"] == 1
    kit.journal.close()


@pytest.mark.parametrize("fault", ["gone", "damaged", "statement", "no parent", "dear", "too far"])
def test_whatever_lacks_or_is_damaged_ends_in_the_full_download(
    lineage: Lineage, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(following, "PATIENCE", 0.3)
    head = lineage.merge("topk-32", "int8")
    if fault == "gone":
        lineage.lose(lineage.inputs[1][1])
    elif fault == "damaged":
        lineage.damage(lineage.inputs[1][0])
    elif fault == "statement":
        lineage.control.statements.pop(str(head.merge))
    elif fault == "dear":
        head = lineage.merge("dense-f32", "dense-f32")
    elif fault == "too far":
        monkeypatch.setattr(following, "FAR", 0)
    kit, made, _ = fetched(lineage, head, at_hand=None if fault == "no parent" else 0)
    assert not made and followed(kit.journal)["heads"] == 0
    assert moved(kit.journal)["from_coordinator"] >= head.weights.blob.size
    kit.journal.close()


def lying(lineage: Lineage, head: Head, **changes: Any) -> Head:
    """The same head under a statement that says something else."""
    network = lineage.net.genesis.id
    told = unseal(lineage.control.statements[str(head.merge)], Merge, network, None)
    sealed = seal(told.record.model_copy(update=changes), ROOT, network)
    lineage.control.statements[sealed.id] = sealed.raw
    lineage.heads[-1] = head.model_copy(update={"merge": sealed.id})
    return lineage.heads[-1]


def test_a_statement_that_does_not_give_the_head_is_not_believed(
    lineage: Lineage, caplog: pytest.LogCaptureFixture
) -> None:
    head = lineage.merge("int8")
    told = lineage.control.statements[str(head.merge)]
    record = unseal(told, Merge, lineage.net.genesis.id, None).record
    heavier = record.inputs[0].model_copy(update={"weight": (0.75).hex()})
    huge = record.inputs[0].model_copy(update={"weight": "0x1.0p+9999"})
    another = record.result.model_copy(update={"root": hexed("another")})
    for changes in ({"inputs": (heavier,)}, {"inputs": (huge,)}, {"result": another}):
        caplog.clear()
        kit, made, _ = fetched(lineage, lying(lineage, head, **changes))
        assert not made and "head.not-followed" in caplog.text
        kit.journal.close()
        kit.store.remove(head.weights.blob)
        for path in sorted((lineage.folder / "node").glob("journal*")):
            path.unlink()


def test_an_input_that_its_codec_could_not_have_written_is_refused(lineage: Lineage) -> None:
    bad = lineage.folder / "bad.safetensors"
    order = {
        "genesis": str(lineage.net.folder / "genesis.json"), "network": lineage.net.genesis.id,
        "parent": str(lineage.net.head_file), "out": str(lineage.folder / "out.safetensors"),
        "steps": [{"kind": "merge", "root": hexed("r"), "inputs": [[str(bad), 1.0, 1.0]]}],
    }  # fmt: skip
    shapes = parameter_shapes(lineage.net.config)
    good = encode("int8", {n: torch.ones(s) for n, s in shapes.items()})
    cases: list[tuple[str, Any]] = [
        ("tensor.header", {**good, "int8.values": good["int8.values"][:-1]}),
        ("tensor.header", {n: torch.ones(s) for n, s in list(shapes.items())[1:]}),
        ("tensor.header", {n: torch.ones(s, dtype=torch.float64) for n, s in shapes.items()}),
        ("blob.corrupt", {**good, "int8.largest": good["int8.largest"] * float("nan")}),
        ("blob.corrupt", good),
    ]
    for code, tensors in cases:
        save_tensors(tensors, bad)
        with pytest.raises(ParisError) as refused:
            make(order, lambda _: None)
        assert refused.value.code == code
    bad.write_bytes(b"\x80\x04 this is a pickle")
    with pytest.raises(ParisError) as refused:
        make(order, lambda _: None)
    assert refused.value.code == "tensor.header"
    assert not list(lineage.folder.glob("out*")), "something is left of it"
    assert load_tensors(lineage.net.head_file)

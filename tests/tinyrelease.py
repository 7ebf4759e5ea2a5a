"""A whole small network in one process: rounds, merges, router, log, and a published release."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from paris_coordinator.release import ReleaseSource, draft, publish
from paris_coordinator.worker import perform
from paris_protocol.averages import kept_share
from paris_protocol.envelope import Sealed, seal
from paris_protocol.evidence import lineage_statements
from paris_protocol.log import Checkpoint, Tree, leaf_hash, origin
from paris_protocol.records import (
    Assignment,
    Commitment,
    Contribution,
    Head,
    Layer,
    Merge,
    MergeInput,
    TensorFile,
    Verdict,
)
from paris_protocol.release import proof_file
from tinynet import NODES, ROOT, SECRET, TinyNet, hexed, plain, tensor_file


def done(job: dict[str, Any]) -> dict[str, Any]:
    answer = perform(job)
    assert "result" in answer, answer
    result: dict[str, Any] = answer["result"]
    return result


class TinyRelease:
    """One round of two units for each of two experts, judged and merged by the real jobs."""

    def __init__(self, folder: Path, ema: str = "0") -> None:
        self.net = TinyNet(folder / "net", ema)
        self.folder = folder
        self.log: list[Sealed[Any]] = [self.net.genesis, self.net.policy]
        heads = [self._round(expert) for expert in range(2)]
        self.heads = [head for head, _ in heads]
        self.files = [path for _, path in heads]
        """What the release holds of each expert: the head or, with an ema, its average."""
        self.router = folder / "router"
        self.report = done({
            "job": "router", **self._files(), "seed": hexed("router"), "out": str(self.router),
            "shards": [[k, str(self.net.shard(k, i))] for k in range(2) for i in range(2)],
            "private": [[k, str(self.net.private(k))] for k in range(2)],
        })["report"]  # fmt: skip

    def _files(self) -> dict[str, str]:
        return {"genesis": str(self.net.folder / "genesis.json")}

    def put(self, record: Any, signer: Any = ROOT) -> Sealed[Any]:
        sealed: Sealed[Any] = seal(record, signer, self.net.genesis.id)
        self.log.append(sealed)
        return sealed

    def _round(self, expert: int) -> tuple[Head, Path]:
        inputs, paths = [], []
        for number in range(2):
            unit = self.net.unit(expert, number)
            lease: Sealed[Assignment] = self.put(unit.assignment)
            promise: Sealed[Commitment] = self.put(
                unit.commitment.model_copy(update={"assignment": lease.id}), NODES[number]
            )
            result: Sealed[Contribution] = self.put(
                unit.contribution.model_copy(
                    update={"assignment": lease.id, "commitment": promise.id}
                ),
                NODES[number],
            )
            whole = replace(unit, commitment=promise.record, contribution=result.record)
            layers = done(self.net.verify_job(whole))["layers"]
            self._verdict(lease, result, layers)
            half = (0.5).hex()
            inputs.append((result, half))
            paths.append({"path": str(unit.update), "weight": half, "scale": (1.0).hex()})
        out = self.folder / f"head{expert}.safetensors"
        answer = done({
            "job": "merge", **self._files(), "parent": str(self.net.head_file), "inputs": paths,
            "out": str(out), "private": str(self.net.private(expert)), "secret": SECRET,
            "policy": plain(self.net.policy.record),
        })  # fmt: skip
        assert not answer["worse"]
        result_file = tensor_file(out)
        assert result_file.root == answer["root"]
        averaged, released = self._average(out, sum(each.record.steps for each, _ in inputs))
        merge = self._merge(expert, inputs, result_file, answer["numbers"], averaged)
        return Head(round=1, weights=result_file, merge=merge.id), released

    def _average(self, head: Path, steps: int) -> tuple[dict[str, Any], Path]:
        """What a first merge says of the running average, and the file that is released."""
        ema = float(self.net.recipe_record.ema)
        if not ema:
            return {}, head
        out, decay = (
            head.with_name(f"{head.stem}-average.safetensors"),
            kept_share(ema, steps).hex(),
        )
        root = done({
            "job": "average", **self._files(), "average": str(self.net.head_file),
            "head": str(head), "decay": decay, "out": str(out),
        })["root"]  # fmt: skip
        average = tensor_file(out)
        assert average.root == root
        return {"average": average, "decay": decay}, out

    def _verdict(self, lease: Sealed[Assignment], result: Sealed[Any], layers: list[Any]) -> None:
        kept = tuple(
            Layer(
                layer=each["layer"], passed=each["passed"], code=each["code"],
                numbers=tuple((name, value) for name, value in each["numbers"]),
            )
            for each in layers
        )  # fmt: skip
        self.put(Verdict(
            contribution=result.id, assignment=lease.id, node=lease.record.node,
            expert=lease.record.expert, round=0, accepted=True, code="accepted", layers=kept,
            policy=1, at=1_700_000_100,
        ))  # fmt: skip

    def _merge(
        self,
        expert: int,
        inputs: list[Any],
        result: TensorFile,
        numbers: list[Any],
        averaged: dict[str, Any],
    ) -> Sealed[Merge]:
        return self.put(Merge(
            expert=expert, round=0, parent=self.net.head,
            inputs=tuple(
                MergeInput(
                    contribution=each.id, update=each.record.update, weight=weight,
                    scale=(1.0).hex(),
                )
                for each, weight in inputs
            ),
            result=result, published=True, numbers=tuple((n, v) for n, v in numbers), policy=1,
            at=1_700_000_200, **averaged,
        ))  # fmt: skip

    # ------------------------------------------------------------ release

    def source(self, models: Path) -> ReleaseSource:
        """Runs the bundle job into `models` and says what the release is made of."""
        answer = done({
            "job": "bundle", **self._files(), "heads": [str(path) for path in self.files],
            "router": str(self.router), "out": str(models),
            "codec": str(self.net.folder / "codec.safetensors"),
            "text": str(self.net.folder / "text.safetensors"),
        })  # fmt: skip
        assert answer["experts"] == [tensor_file(path).root for path in self.files]
        return ReleaseSource(
            genesis=self.net.genesis, policies=[self.net.policy], heads=self.heads,
            lineage=lineage_statements(self.heads, self.log), models=models,
            router_root=answer["router_root"], router_report=self.report, at=1_700_000_300,
        )  # fmt: skip

    def publish(
        self,
        name: str,
        signer: Any = ROOT,
        spoil: Callable[[Path], None] | None = None,
        models: Callable[[Path], None] | None = None,
    ) -> Path:
        """A release folder `name`; `spoil` may damage the draft after it was signed, `models` what
        goes into it before.
        """
        bundle, folder = self.folder / f"{name}.models", self.folder / f"{name}.draft"
        source = self.source(bundle)
        if models is not None:
            models(bundle)
        release = seal(draft(source, folder), signer, self.net.genesis.id)
        if spoil is not None:
            spoil(folder)
        log = [*self.log, release]
        tree = Tree(leaf_hash(bytes.fromhex(each.id)) for each in log)
        note = Checkpoint(origin(self.net.genesis.id), tree.size, tree.root()).sign(ROOT)
        ids = [each.id for each in log]
        needed = [self.net.policy, *source.lineage, release]
        proof = proof_file(note, tree, tree.size, {e.id: ids.index(e.id) for e in needed})
        return publish(folder, release, proof, self.folder / name)

"""An expert's line in small: real tensor files as blobs, two merges and a revert as records."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from paris_models.checkpoint import save_tensors
from paris_models.commands.recompute import Blobs, Recomputed, Step, recompute
from paris_models.ema import average_files
from paris_models.merge import merge_files, revert_files
from paris_protocol.blobs import Manifest
from paris_protocol.net.folder import file_root
from paris_protocol.records import Head, Merge, MergeInput, Revert, TensorFile

SHAPES = {"a.weight": (300, 7), "b.weight": (1 << 18,), "c.bias": (5,)}


def hexed(text: str) -> str:
    return text.encode().hex().ljust(64, "0")


def keep(path: Path, blobs: Path) -> TensorFile:
    """A file as a blob of a folder, under its id."""
    manifest = Manifest.build([path.read_bytes()])
    (blobs / "manifests").mkdir(parents=True, exist_ok=True)
    shutil.copy(path, blobs / f"{manifest.id}.blob")
    (blobs / "manifests" / f"{manifest.id}.json").write_bytes(manifest.raw)
    return TensorFile(blob=manifest.ref, root=file_root([path]))


@dataclass
class Line:
    """An expert's line: three updates merged in two rounds, one of them taken out again.

    With a `share` every merge carries an average that keeps so much of the one before; then a merge
    behind the revert begins it anew.
    """

    folder: Path
    blobs: Path
    share: float = 0.0
    steps: dict[str, Step] = field(default_factory=dict)
    updates: list[TensorFile] = field(default_factory=list)
    average: Path = Path()

    def tensors(self, seed: int, kind: torch.dtype = torch.float32) -> Path:
        g = torch.Generator().manual_seed(seed)
        path = self.folder / f"{seed}.safetensors"
        values = {n: torch.randn(shape, generator=g).to(kind) for n, shape in SHAPES.items()}
        save_tensors(values, path)
        return path

    def lived(self) -> Line:
        self.blobs.mkdir(parents=True)
        initial = self.tensors(0)
        head = Head(round=0, weights=keep(initial, self.blobs))
        paths = [self.tensors(1), self.tensors(2, torch.bfloat16), self.tensors(3)]
        self.updates = [keep(path, self.blobs) for path in paths]
        self.average = initial
        first, file = self.merge(head, initial, [(0, 0.3, 0.9), (1, 0.7, 1.0)], paths, "merge 1")
        second, last = self.merge(first, file, [(2, 0.1, 1 / 3)], paths, "merge 2")
        scalars = (paths[1], 0.7, 1.0)
        out = self.folder / "reverted.safetensors"
        revert_files(last, [scalars], out)
        part = self.part(1, 0.7, 1.0)
        revert = self.steps[hexed("revert")] = Revert(
            expert=0, revocation=hexed("revocation"), parent=second, removed=(part,),
            result=keep(out, self.blobs), numbers=(), policy=1, at=30,
        )  # fmt: skip
        if self.share:
            self.average = out
            head = Head(round=2, weights=revert.result, merge=hexed("revert"))
            self.merge(head, out, [(0, 0.2, 1.0)], paths, "merge 3")
        return self

    def part(self, place: int, weight: float, scale: float) -> MergeInput:
        return MergeInput(
            contribution=hexed(f"contribution {place}"), update=self.updates[place],
            weight=weight.hex(), scale=scale.hex(),
        )  # fmt: skip

    def merge(
        self,
        head: Head,
        file: Path,
        inputs: list[tuple[int, float, float]],
        paths: list[Path],
        name: str,
    ) -> tuple[Head, Path]:
        out = self.folder / f"{name}.safetensors"
        merge_files(file, [(paths[place], weight, scale) for place, weight, scale in inputs], out)
        result = keep(out, self.blobs)
        averaged: dict[str, Any] = {}
        if self.share:
            before, self.average = self.average, self.folder / f"{name}-average.safetensors"
            average_files(before, out, self.share, self.average)
            averaged = {"average": keep(self.average, self.blobs), "decay": self.share.hex()}
        self.steps[hexed(name)] = Merge(
            expert=0, round=head.round, parent=head, inputs=tuple(self.part(*i) for i in inputs),
            result=result, published=True, numbers=(), policy=1, at=10 * (len(self.steps) + 1),
            **averaged,
        )  # fmt: skip
        return Head(round=head.round + 1, weights=result, merge=hexed(name)), out

    def drop(self, file: TensorFile) -> None:
        (self.blobs / f"{file.blob.id}.blob").unlink()

    def again(self, scratch: Path, *places: str) -> list[Recomputed]:
        scratch.mkdir()
        return list(recompute(self.steps, Blobs(places or (str(self.blobs),), scratch), scratch))

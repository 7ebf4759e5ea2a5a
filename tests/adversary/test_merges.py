"""Row "malicious merge": whoever has the inputs makes every merge again and sees what was altered.

The coordinator double signs a merge with one thing changed; the recomputation that `paris verify
--recompute` uses names it, in other processes with other threads and instruction sets as well.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adversary.arena import Arena
from paris_models.checkpoint import load_tensors, save_tensors
from paris_models.commands.recompute import Blobs, recompute
from paris_protocol.blobs import Manifest
from paris_protocol.errors import ParisError
from paris_protocol.net.folder import file_root
from paris_protocol.records import Merge, TensorFile

ROUND = {"units": 2, "steps": 3, "rounds": 1}


class Lineage:
    """The merges of a small network and a folder with every blob that they name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        asyncio.run(self._run())

    async def _run(self) -> None:
        async with Arena(self.folder, audit=None, plan=ROUND, commit_every=3) as arena:
            players = [await arena.player(name) for name in ("ada", "bob")]
            while not all(expert.round for expert in arena.office.desk.experts):
                for player in players:
                    if not all(expert.round for expert in arena.office.desk.experts):
                        await arena.judge(await player.unit())
            self.merges: dict[str, Merge] = dict(arena.office.desk.merges)
            self.store = arena.state.store

    def problems(self, merges: dict[str, Merge], scratch: Path) -> list[str]:
        """What recomputation says of merges: "" each, or what is wrong."""
        scratch.mkdir(exist_ok=True)
        places = [str(self.store), str(self.store.parent), str(self.folder / "extra")]
        try:
            found = list(recompute(merges, Blobs(places, scratch), scratch))
        except ParisError as error:
            return [error.code]
        return [each.missing or ("" if each.same else "another root") for each in found]


@pytest.fixture(scope="module")
def lineage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lineage]:
    yield Lineage(tmp_path_factory.mktemp("lineage"))


def stored(lineage: Lineage, tensors: dict[str, torch.Tensor]) -> TensorFile:
    """Tensors as a blob that whoever recomputes will find."""
    folder = lineage.folder / "extra"
    folder.mkdir(exist_ok=True)
    path = folder / "draft"
    save_tensors(tensors, path)
    ref = Manifest.build([path.read_bytes()]).ref
    path.rename(folder / f"{ref.id}.blob")
    return TensorFile(blob=ref, root=file_root([folder / f"{ref.id}.blob"]))


def altered(lineage: Lineage, merge: Merge) -> dict[str, Merge]:
    """The merge with one thing changed, everything else consistent."""
    first, second = merge.inputs
    more = np.nextafter(np.float32(float.fromhex(first.weight)), np.float32(1)).item()
    blob = lineage.store / "blobs" / f"{merge.result.blob.id}.blob"
    head = load_tensors(blob)
    name = sorted(head)[0]
    head[name] = head[name].clone()
    value = head[name].view(-1)[:1].numpy()
    np.nextafter(value, np.float32(np.inf), out=value)
    return {
        "a weight's last bit": merge.model_copy(
            update={"inputs": (first.model_copy(update={"weight": more.hex()}), second)}
        ),
        "a scale": merge.model_copy(
            update={"inputs": (first.model_copy(update={"scale": (0.5).hex()}), second)}
        ),
        "an input left out": merge.model_copy(update={"inputs": (first,)}),
        "another's update": merge.model_copy(
            update={"inputs": (first.model_copy(update={"update": second.update}), second)}
        ),
        "one bit of the result": merge.model_copy(update={"result": stored(lineage, head)}),
    }


def test_every_alteration_of_a_merge_is_noticed(lineage: Lineage, tmp_path: Path) -> None:
    assert lineage.problems(lineage.merges, tmp_path / "honest") == [""] * len(lineage.merges)
    id, merge = next(iter(lineage.merges.items()))
    for number, (name, lie) in enumerate(altered(lineage, merge).items()):
        found = lineage.problems({id: lie}, tmp_path / str(number))
        assert found == ["another root"], (name, found)


def test_an_input_that_is_gone_is_named_and_never_verified(
    lineage: Lineage, tmp_path: Path
) -> None:
    id, merge = next(iter(lineage.merges.items()))
    gone = merge.inputs[0].update.model_copy(
        update={"blob": merge.inputs[0].update.blob.model_copy(update={"id": "0" * 64})}
    )
    part = merge.inputs[0].model_copy(update={"update": gone})
    lie = merge.model_copy(update={"inputs": (part, *merge.inputs[1:])})
    [found] = lineage.problems({id: lie}, tmp_path / "scratch")
    assert "0" * 64 in found and part.contribution in found


CHILD = """
import json, sys
from pathlib import Path
from paris_models.merge import merge_files
from paris_protocol.net.folder import file_root
job = json.load(sys.stdin)
merge_files(Path(job["parent"]), [(Path(p), float.fromhex(w), float.fromhex(s))
            for p, w, s in job["inputs"]], Path(job["out"]))
print(file_root([Path(job["out"])]))
"""


@pytest.mark.slow
def test_other_machines_get_the_same_bits(lineage: Lineage, tmp_path: Path) -> None:
    """Threads, BLAS kernels and vector instructions switched: one root."""
    merge = next(iter(lineage.merges.values()))
    blobs = lineage.store / "blobs"
    job: dict[str, Any] = {
        "parent": str(blobs / f"{merge.parent.weights.blob.id}.blob"),
        "inputs": [
            [str(blobs / f"{part.update.blob.id}.blob"), part.weight, part.scale]
            for part in merge.inputs
        ],
    }
    settings = (
        {"OMP_NUM_THREADS": "1"},
        {"OMP_NUM_THREADS": "2", "NPY_DISABLE_CPU_FEATURES": "AVX512F AVX512CD AVX512_SKX"},
        {"OMP_NUM_THREADS": "2", "OPENBLAS_CORETYPE": "Prescott", "ATEN_CPU_CAPABILITY": "default"},
    )
    for number, setting in enumerate(settings):
        out = str(tmp_path / f"{number}.safetensors")
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", CHILD], input=json.dumps(job | {"out": out}),
            env=os.environ | setting, capture_output=True, text=True, check=True, timeout=120,
        )  # fmt: skip
        assert done.stdout.strip() == merge.result.root, setting

"""`merge`: bandwidth of the bit-reproducible merge beside a plain copy, and its memory.

Both are told in two ways. `merge.traffic` counts every byte that has to be read or written: the
inputs and one result for the merge, each input twice for the copy. `merge.copy` counts the inputs,
which both go through: how long a merge takes beside copying what it reads. Tensors are far larger
than the cache, seconds are those of one core. Hashing and the disk are outside the timed part;
`merge.files` tells the whole of it, from files to a file and its tensor root. Memory is what
Python and NumPy allocate in a process of its own (mapped inputs are no allocation), in units of the
largest tensor.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.table import Row, conditions, middle, row

INPUTS = 3
SIZE, QUICK = 64 << 20, 16 << 20
"""Elements of float32 in one tensor: 256 MiB, in the quick form 64 MiB."""
TENSORS = {"a": 4, "b": 2, "c": 1}
"""Parts of SIZE in the files: several tensors of different sizes."""
MERGEKIT = "mergekit linear: not measured, it is not among the requirements (LGPL-3.0)"


def run(quick: bool) -> tuple[dict[str, Any], list[Row]]:
    """Rows `merge.copy`, `.traffic`, `.files`, `.mergekit` and `.peak_tensors`."""
    size, repeats = (QUICK, 3) if quick else (SIZE, 15)
    rows = _copy_rows(size, repeats)
    with tempfile.TemporaryDirectory(prefix="paris-merge-") as folder:
        files = _files(Path(folder), size // 8)
        rows += _file_rows(files, Path(folder), repeats=1 if quick else 3)
        rows.append(_peak_row(files, Path(folder)))
    facts = conditions(
        inputs=INPUTS, tensor_mib=size * 4 >> 20, n=repeats, dtype="float32", threads=1,
        hashing="inside merge.files only",
    )  # fmt: skip
    return facts, rows


def _seconds(action: Callable[[], object]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def _copy_rows(size: int, repeats: int) -> list[Row]:
    """Merge and copy in turn, in one process, each into memory that is there already."""
    from paris_models.merge import merge_tensor

    generator = np.random.default_rng(0)
    sources = [generator.standard_normal(size, dtype=np.float32) for _ in range(INPUTS + 1)]
    out, target = np.zeros_like(sources[0]), np.zeros_like(sources[0])
    weights, scales = [1 / INPUTS] * INPUTS, [0.9] * INPUTS

    def merge() -> None:
        merge_tensor(sources[0], sources[1:], weights, scales, out)

    def copy() -> None:
        for part in sources:
            np.copyto(target, part)

    merges, copies = [], []
    for _ in range(repeats + 1):  # the first of each warms up
        merges.append(_core_seconds(merge))
        copies.append(_core_seconds(copy))
    read = len(sources) * out.nbytes / 1e9
    return [
        _bandwidth("merge.copy", "bytes of master and updates", merges, copies, read, read),
        _bandwidth("merge.traffic", "bytes read and written", merges, copies,
                   read + out.nbytes / 1e9, 2 * read),
    ]  # fmt: skip


def _bandwidth(
    id: str, counted: str, merges: list[float], copies: list[float], ours: float, theirs: float
) -> Row:
    """A row in GB per core-second; `ours` and `theirs` are the GB that are counted."""
    value, spread = middle([ours / seconds for seconds in merges[1:]])
    return row(
        id, f"merge of {INPUTS} updates in memory, {counted}", ours=value, spread=spread,
        better="higher", unit="GB per core-second", n=len(merges) - 1,
        alternative=middle([theirs / seconds for seconds in copies[1:]])[0],
        alternative_name="plain copy of master and updates",
    )  # fmt: skip


def _core_seconds(action: Callable[[], object]) -> float:
    begin = time.process_time()
    action()
    return time.process_time() - begin


# ---------------------------------------------------------------- files


def _files(folder: Path, size: int) -> list[Path]:
    """Master and updates as safetensors files."""
    import torch

    from paris_models.checkpoint import save_tensors

    paths = []
    for number in range(INPUTS + 1):
        generator = torch.Generator().manual_seed(number)
        tensors = {
            name: torch.randn(size * part // 4, generator=generator)
            for name, part in TENSORS.items()
        }
        paths.append(folder / f"{number}.safetensors")
        save_tensors(tensors, paths[-1])
    return paths


def merge_them(paths: list[Path], out: Path) -> str:
    """What anybody does who recomputes a merge: from files to a file and its tensor root."""
    from paris_models.merge import merge_files
    from paris_protocol.net.folder import file_root

    master, *updates = paths
    merge_files(master, [(path, 1 / INPUTS, 0.9) for path in updates], out)
    return file_root([out])


def _file_rows(paths: list[Path], folder: Path, repeats: int) -> list[Row]:
    out, total = folder / "out.safetensors", sum(path.stat().st_size for path in paths)
    ours, copies = [], []
    for _ in range(repeats):
        ours.append(_seconds(lambda: merge_them(paths, out)))
        copies.append(_seconds(lambda: [shutil.copyfile(path, folder / "copy") for path in paths]))
    value, spread = middle(ours)
    files = row(
        "merge.files", f"{total >> 20} MiB of files to a durable file and its root", ours=value,
        spread=spread, better="lower", unit="s", n=repeats, alternative=middle(copies)[0],
        alternative_name="copying those files, neither hashed nor durable",
    )  # fmt: skip
    rival = row(
        "merge.mergekit", "the same files, beside mergekit's linear", ours=value, spread=spread,
        better="lower", unit="s", n=repeats, alternative=None, alternative_name=MERGEKIT,
    )  # fmt: skip
    return [files, rival]


# ---------------------------------------------------------------- memory


def _peak_row(paths: list[Path], folder: Path) -> Row:
    words = [sys.executable, "-m", "benchmarks.merge", str(folder / "peak.safetensors")]
    done = subprocess.run([*words, *map(str, paths)], check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return row(
        "merge.peak_tensors", f"memory of a merge of {INPUTS} updates beyond mapped inputs",
        ours=found["peak"] / found["largest"], better="lower", unit="largest tensors", n=1,
        alternative=3.0, alternative_name="the limit",
    )  # fmt: skip


def _measure(out: Path, paths: list[Path]) -> None:
    import paris_models.merge
    import paris_protocol.net.folder

    assert paris_models.merge
    assert paris_protocol.net.folder
    size = (paths[0].stat().st_size // 4) * TENSORS["a"] // sum(TENSORS.values())
    tracemalloc.start()
    merge_them(paths, out)
    print(json.dumps({"peak": tracemalloc.get_traced_memory()[1], "largest": size * 4}))


if __name__ == "__main__":
    _measure(Path(sys.argv[1]), [Path(word) for word in sys.argv[2:]])

"""Merges and reverts recomputed from statements and blobs alone, on whatever machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paris_protocol.errors import ParisError
from paris_protocol.records import Merge
from tinyline import Line, hexed


@pytest.fixture
def line(tmp_path: Path) -> Line:
    (tmp_path / "line").mkdir()
    return Line(tmp_path / "line", tmp_path / "blobs").lived()


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """A plain web server with a coordinator's paths for blobs."""

    class Handler(SimpleHTTPRequestHandler):
        def translate_path(self, path: str) -> str:
            id = path.removeprefix("/v1/blobs/")
            name = f"manifests/{id[:64]}.json" if id.endswith("/manifest") else f"{id}.blob"
            return str(folder / name)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_every_step_comes_out_to_the_same_root(line: Line, tmp_path: Path) -> None:
    found = line.again(tmp_path / "scratch")
    assert [(each.kind, each.round, each.same) for each in found] == [
        ("merge", 0, True), ("merge", 1, True), ("revert", 2, True),
    ]  # fmt: skip


def test_heads_are_not_needed_for_they_follow(line: Line, tmp_path: Path) -> None:
    """The initial checkpoint and the updates are enough."""
    for step in line.steps.values():
        line.drop(step.result)
    assert all(each.same for each in line.again(tmp_path / "scratch"))


def test_blobs_come_over_the_network(line: Line, tmp_path: Path) -> None:
    with served(line.blobs) as url:
        assert all(each.same for each in line.again(tmp_path / "scratch", url))
    left = [path.name for path in (tmp_path / "scratch").glob("*.blob")]
    assert len(left) == 1  # the initial checkpoint, for the other experts


def test_a_missing_input_is_named_and_nothing_is_called_the_same(
    line: Line, tmp_path: Path
) -> None:
    line.drop(line.updates[1])
    found = line.again(tmp_path / "scratch")
    assert [each.same for each in found] == [False, True, False]
    assert found[0].root == ""
    for words in (hexed("contribution 1"), line.updates[1].blob.id, str(line.blobs)):
        assert words in found[0].missing
    line.drop(line.steps[hexed("merge 1")].result)
    found = line.again(tmp_path / "again")
    assert [bool(each.missing) for each in found] == [True, True, True]


@pytest.mark.parametrize("what", ["weight", "order", "input", "scale"])
def test_an_altered_scalar_or_input_is_noticed(line: Line, tmp_path: Path, what: str) -> None:
    id = hexed("merge 1")
    merge = line.steps[id]
    assert isinstance(merge, Merge)
    one, two = merge.inputs
    changed = {
        "weight": (one.model_copy(update={"weight": float(np.nextafter(0.3, 1)).hex()}), two),
        "scale": (one.model_copy(update={"scale": (0.9000001).hex()}), two),
        "order": (two, one.model_copy(update={"weight": (0.29).hex()})),
        "input": (one, two.model_copy(update={"update": line.updates[2]})),
    }[what]
    line.steps[id] = merge.model_copy(update={"inputs": changed})
    found = line.again(tmp_path / "scratch")
    if what == "weight":  # the last bit of a float64 is below a float32's: the very same merge
        assert found[0].same
    else:
        assert (found[0].same, bool(found[0].root)) == (False, True)
    assert found[1].same, "the next merge stands on its own parent"


@pytest.fixture
def averaged(tmp_path: Path) -> Line:
    (tmp_path / "averaged").mkdir()
    return Line(tmp_path / "averaged", tmp_path / "averages", share=0.75).lived()


def test_averages_come_out_and_begin_anew_behind_a_revert(averaged: Line, tmp_path: Path) -> None:
    found = averaged.again(tmp_path / "scratch")
    assert [(each.kind, each.same, bool(each.average_root)) for each in found] == [
        ("merge", True, True), ("merge", True, True), ("revert", True, False),
        ("merge", True, True),
    ]  # fmt: skip
    assert not list((tmp_path / "scratch").glob("*average*"))[1:], "only the last one is kept"


def test_averages_are_not_needed_for_they_follow(averaged: Line, tmp_path: Path) -> None:
    for step in averaged.steps.values():
        averaged.drop(step.result)
        if isinstance(step, Merge) and step.average is not None:
            averaged.drop(step.average)
    assert all(each.same for each in averaged.again(tmp_path / "scratch"))


def test_an_average_that_does_not_follow_is_noticed(averaged: Line, tmp_path: Path) -> None:
    id, other = hexed("merge 2"), averaged.steps[hexed("merge 1")]
    merge = averaged.steps[id]
    assert isinstance(merge, Merge)
    assert isinstance(other, Merge)
    changes: list[dict[str, Any]] = [{"average": other.average}, {"decay": (0.7500001).hex()}]
    for number, changed in enumerate(changes):
        averaged.steps[id] = merge.model_copy(update=changed)
        found = averaged.again(tmp_path / f"scratch {number}")
        assert [each.same for each in found] == [True, False, True, True]
        assert found[1].root == found[1].stated, "the head is right"
        assert found[1].average_root not in ("", found[1].average)
    averaged.steps[id] = merge.model_copy(update={"decay": None})
    with pytest.raises(ParisError, match="average of a merge"):
        averaged.again(tmp_path / "without")


def test_an_average_of_another_head_is_not_made(averaged: Line, tmp_path: Path) -> None:
    id = hexed("merge 1")
    merge = averaged.steps[id]
    averaged.steps[id] = merge.model_copy(update={"result": averaged.updates[0]})
    found = averaged.again(tmp_path / "scratch")[0]
    assert (found.same, bool(found.root), found.average_root) == (False, True, "")


def test_a_blob_that_lies_is_not_used(line: Line, tmp_path: Path) -> None:
    path = line.blobs / f"{line.updates[0].blob.id}.blob"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    assert line.again(tmp_path / "scratch")[0].missing
    with served(line.blobs) as url:
        found = line.again(tmp_path / "web", url)
    assert "digest" in found[0].missing


def test_an_update_under_a_false_root_is_refused(line: Line, tmp_path: Path) -> None:
    id = hexed("merge 2")
    merge = line.steps[id]
    assert isinstance(merge, Merge)
    wrong = merge.inputs[0].update.model_copy(update={"root": "0" * 64})
    part = merge.inputs[0].model_copy(update={"update": wrong})
    line.steps[id] = merge.model_copy(update={"inputs": (part,)})
    with pytest.raises(ParisError, match="tensor root"):
        line.again(tmp_path / "scratch")


SETTINGS: dict[str, dict[str, str]] = {
    "one thread": {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    "four threads": {"OMP_NUM_THREADS": "4", "OPENBLAS_NUM_THREADS": "4"},
    "an old core's BLAS": {"OPENBLAS_CORETYPE": "Prescott", "OMP_NUM_THREADS": "2"},
    "NumPy without AVX": {
        "NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3 AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL"
        " AVX512_ICL AVX512_SPR X86_V3 X86_V4"
    },
}
PROGRAM = """
import hashlib, json, sys
from pathlib import Path
import numpy as np
from paris_models.merge import merge_files
from paris_models.lora import lora_product, to_grid
from paris_protocol.net.folder import file_root
order = json.loads(sys.argv[1])
merge_files(Path(order["master"]), [(Path(p), w, s) for p, w, s in order["inputs"]],
            Path(order["out"]))
g = np.random.default_rng(7)
b = to_grid(g.standard_normal((96, 32), np.float32), along=1)
a = to_grid(g.standard_normal((32, 64), np.float32), along=0)
product = lora_product(a, b, alpha=24.0)
plain = g.standard_normal((96, 512), np.float32) @ g.standard_normal((512, 64), np.float32)
digest = lambda array: hashlib.sha256(array.tobytes()).hexdigest()
print(file_root([Path(order["out"])]), digest(product), digest(plain))
"""


def test_other_threads_and_instruction_sets_give_the_same_bits(line: Line, tmp_path: Path) -> None:
    """One program, settings that change which kernels BLAS and NumPy run."""
    merge = line.steps[hexed("merge 1")]
    order = {
        "master": str(line.folder / "0.safetensors"),
        "inputs": [
            [str(line.folder / "1.safetensors"), 0.3, 0.9],
            [str(line.folder / "2.safetensors"), 0.7, 1.0],
        ],
    }
    found: list[list[str]] = []
    for number, settings in enumerate(SETTINGS.values()):
        arguments = json.dumps(order | {"out": str(tmp_path / f"{number}.safetensors")})
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **settings}
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", PROGRAM, arguments],
            env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        found.append(done.stdout.split())
    roots, products, plain = (set(column) for column in zip(*found, strict=True))
    assert roots == {merge.result.root}
    assert len(products) == 1
    assert len(plain) > 1, "the settings do change how a plain float32 product is summed"

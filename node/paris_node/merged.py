"""Heads made from merges, inside the trainer's process: what others published, added up here.

The inputs of a merge are small; whoever has the parent of a head needs nothing else for it
(docs/merges.md), and gets the same bits, or another root and so nothing::

    inputs = [[PATH, weight, scale]]
    follow({"parent": PATH, "out": PATH, "steps": [{"kind": "merge", "root": ROOT,
            "inputs": inputs}], …}, hear)

Inputs are strangers' files: each goes through the strict gate of its codec first (`tensor.header`).
A head with another root than was signed is `blob.corrupt`; nothing of it is left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from paris_models.checkpoint import load_tensors, raw_items
from paris_models.codecs import codec_of, wire_schema
from paris_models.config import ExpertConfig
from paris_models.expert import parameter_shapes
from paris_models.merge import Input, merge_files, revert_files
from paris_node.unit import header_of
from paris_protocol.envelope import open_genesis
from paris_protocol.errors import ParisError
from paris_protocol.net.store import disk_errors
from paris_protocol.tensors import tensor_root


def follow(order: Mapping[str, Any], hear: Callable[[int], None]) -> None:
    """Make `out` from `parent` by the `steps` in their order; `hear` takes the steps done."""
    genesis = open_genesis(Path(order["genesis"]).read_bytes(), order["network"]).record
    shapes = parameter_shapes(ExpertConfig.from_record(genesis.expert))
    head, out = Path(order["parent"]), Path(order["out"])
    header_of(head, {name: ("F32", shape) for name, shape in shapes.items()})
    try:
        for done, step in enumerate(order["steps"], 1):
            inputs = [(Path(p), float(weight), float(scale)) for p, weight, scale in step["inputs"]]
            _step(head, inputs, out, step["kind"], shapes)
            if tensor_root(raw_items(load_tensors(out))) != step["root"]:
                raise ParisError("blob.corrupt", "the merge gives another head than was signed")
            head = out
            hear(done)
    except BaseException:
        out.unlink(missing_ok=True)
        raise


def _step(
    head: Path, inputs: list[Input], out: Path, kind: str, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    for path, _, _ in inputs:
        found = header_of(path, None).tensors
        codec = codec_of(found)
        if codec == "dense":
            kinds = {dtype for dtype, _, *_ in found.values()}
            codec = "dense-bf16" if kinds == {"BF16"} else "dense-f32"
        try:
            header_of(path, wire_schema(codec, shapes, found))
        except ValueError as error:
            raise ParisError("tensor.header", str(error)) from error
    # The old head is mapped while the new one is written beside it and then takes its place.
    run = merge_files if kind == "merge" else revert_files
    try:
        with disk_errors(out):
            run(head, inputs, out)
    except ValueError as error:
        raise ParisError("blob.corrupt", str(error)[:200]) from error

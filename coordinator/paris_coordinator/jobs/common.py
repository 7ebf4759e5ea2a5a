"""What the jobs share: reading statements, opening tensor files behind the gate, held-out clips.

It refuses a tensor file before any library opens it, when its header is not exactly the expected
one::

    genesis = genesis_of(job["genesis"])
    parent = gated(Path(job["parent"]), expert_schema(config, "F32"))
    update = update_of(Path(job["update"]), "topk-64", config)      # dense float32 by name
    held = held_out(Path(job["private"]), count=256, secret=secret, salt=root)
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel

from paris_models.checkpoint import load_tensors, raw_items
from paris_models.codecs import decode
from paris_models.codecs_layout import Codec, codec_of, schema_for, wire_schema
from paris_models.config import ExpertConfig
from paris_models.expert import parameter_shapes
from paris_models.noise import permutation
from paris_models.shards import ClipTable, read_shards
from paris_protocol.envelope import open_genesis
from paris_protocol.errors import ParisError
from paris_protocol.gate import Header, check_header, header_length
from paris_protocol.records import Assignment, Genesis
from paris_protocol.streams import unit_key
from paris_protocol.tensors import tensor_root

R = TypeVar("R", bound=BaseModel)
Schema = Mapping[str, tuple[str, tuple[int, ...]]]
Weights = dict[str, torch.Tensor]


def genesis_of(path: str | Path) -> Genesis:
    """The genesis that the coordinator keeps in its state folder."""
    return open_genesis(Path(path).read_bytes()).record


def record(kind: type[R], value: Mapping[str, Any]) -> R:
    """A record from the plain JSON of a job."""
    return kind.model_validate_json(json.dumps(value))


def header_of(path: Path, schema: Schema | None) -> Header:
    """The strict gate on a safetensors file: `tensor.header` before anything opens it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        return check_header(first + file.read(header_length(first, size)), size, schema)


def gated(path: Path, schema: Schema | None) -> Weights:
    """The tensors of a file whose header is exactly `schema`."""
    header_of(path, schema)
    return load_tensors(path)


def expert_schema(config: ExpertConfig, dtype: str) -> Schema:
    """Names, shapes and one dtype of an expert's tensors, from its configuration alone."""
    return {name: (dtype, shape) for name, shape in shapes_of(config).items()}


def wire_of(path: Path, codec: Codec, config: ExpertConfig, rank: int = 0) -> Weights:
    """An update as it crossed the network; its header must be that of codec and rank.

    `rank` is that of factors; 0 takes the file's own.
    """
    shapes = shapes_of(config)
    try:
        if rank:
            return gated(path, schema_for(codec, shapes, rank))
        return gated(path, wire_schema(codec, shapes, header_of(path, None).tensors))
    except ValueError as error:
        raise ParisError("tensor.header", str(error)) from error


def dense_of(wire: Weights, codec: Codec, config: ExpertConfig) -> Weights:
    """The float32 change of every tensor that a wire stands for; `tensor.header` if for none."""
    try:
        return decode(wire, codec, shapes_of(config))
    except ValueError as error:
        raise ParisError("tensor.header", str(error)) from error


def update_of(path: Path, codec: Codec, config: ExpertConfig) -> Weights:
    """The float32 change of every tensor that an update's file stands for."""
    return dense_of(wire_of(path, codec, config), codec, config)


def check_update(path: Path, config: ExpertConfig) -> Codec:
    """The codec that wrote an update, by its header, which must be exactly that codec's."""
    tensors = header_of(path, None).tensors
    found = codec_of(tensors)
    dense: Codec = (
        "dense-bf16" if {entry[0] for entry in tensors.values()} == {"BF16"} else "dense-f32"
    )
    codec = dense if found == "dense" else found
    try:
        header_of(path, wire_schema(codec, shapes_of(config), tensors))
    except ValueError as error:
        raise ParisError("tensor.header", str(error)) from error
    return codec


@lru_cache(maxsize=4)
def shapes_of(config: ExpertConfig) -> Mapping[str, tuple[int, ...]]:
    """Names and shapes of an expert's tensors."""
    return parameter_shapes(config)


def root_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """The Merkle root over tensors, as statements name it."""
    return tensor_root(raw_items(tensors))


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Secret clips of one cluster and the key of their noise and times."""

    clips: ClipTable
    key: bytes


def held_out(private: Path, *, count: int, secret: str, salt: str) -> HeldOut:
    """`count` of the private clips (all, if there are fewer), rotated by secret and salt.

    Candidate and parent of one round share the salt (their parent's root), hence clips, noise and
    times; another round has others, so that verdicts teach nobody the set.
    """
    key = unit_key(hashlib.sha256(f"held-out/{secret}/{salt}".encode()).hexdigest())
    table = read_shards([private])
    rows = torch.from_numpy(permutation(key, len(table), 0)[:count].copy())
    return HeldOut(table.rows(rows), key)


def cost(assignment: Assignment, *, forward: int, trained: int) -> dict[str, float]:
    """What a job used, in samples: forward passes alone, with gradients, and both as one number.

    A gradient costs two forward passes more, so a unit of H steps of B samples costs 3·H·B
    (`contribution`); `share` is this job's part of that. Waiting, hashing and file work are not in.
    """
    whole = forward + 3 * trained
    unit = 3 * assignment.steps * assignment.batch
    return {
        "forward": forward,
        "trained": trained,
        "equivalents": whole,
        "contribution": unit,
        "share": whole / unit,
    }


def _sync(path: Path) -> None:
    """Makes a file or the names in a folder outlive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder that gets its name when it is complete; an older one of that name is replaced."""
    draft = out.with_name(f".{out.name}.part")  # one worker at a time; a killed one left its own
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        for path in [*draft.rglob("*"), draft]:
            _sync(path)
        shutil.rmtree(out, ignore_errors=True)
        draft.rename(out)
        _sync(out.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)

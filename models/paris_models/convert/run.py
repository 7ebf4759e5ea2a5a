"""Converting weights: recognised, checked, and streamed tensor by tensor into another layout.

The output appears whole or not at all; what a killed run left behind is removed by the next one.
Refused with `ValueError`, before anything is written: what `layout` and `origins` refuse, and
rotary pairs that contradict the layout (`rope`). Values that are not finite are found on the way::

    facts = convert(Path("FLUX.1-dev"), Path("initial.safetensors"), Target("expert"))
    convert(Path("release/expert_0"), Path("out.safetensors"), Target("comfyui"), origin="scratch")
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor

from paris_models.checkpoint import DTYPES, Schema, file_order, raw_bytes, write_stream
from paris_models.config import ExpertConfig
from paris_models.convert import origins, table
from paris_models.convert.files import STEM, is_finite, open_weights
from paris_models.convert.layout import CONDITION, PREFIX, Layout, RopeOrder, Source
from paris_models.convert.rope import Reading, measure
from paris_models.expert import build_expert

Kind = Literal["expert", "diffusers", "bfl", "open-sora", "comfyui"]
SHARD: Final = 5 << 30
"""Bytes after which a diffusers folder gets another shard."""
TORCH: Final = {name: dtype for dtype, name in DTYPES.items()}
Progress = Callable[[int, int], None] | None


@dataclass(frozen=True, slots=True)
class Target:
    """What is made.

    "expert": one file with diffusers' names, float32, as recipes take it. "diffusers": a folder for
    `from_pretrained`. "bfl" and "open-sora": their single files. "comfyui": BFL's with a prefix and
    without the condition's columns, which ComfyUI cannot feed. `condition` adds those columns as
    zeros, or drops them; None leaves them as the source has them. `dtype` as safetensors names it;
    None keeps each tensor's own.
    """

    kind: Kind
    condition: bool | None = None
    dtype: Literal["F32", "BF16", "F16"] | None = None
    shard: int = SHARD


def convert(
    path: Path,
    out: Path,
    target: Target,
    *,
    origin: str | None = None,
    order: RopeOrder | None = None,
    trust_order: bool = False,
    progress: Progress = None,
) -> dict[str, Any]:
    """Convert the weights at `path` to `out`; facts about both.

    `origin` is needed where the file's metadata and parts do not tell it. `order` states the rotary
    order of a file against its layout's habit. What the weights clearly contradict is refused,
    unless `trust_order` says that the statistic is wrong about this file.
    """
    source = Source.of(open_weights(path), order)
    stated = source.files.metadata.get("paris.origin")
    found = origins.check_origin(
        origin, stated, guidance=source.guidance, condition=source.condition_layer
    )
    reading = measure(source)
    if reading.order not in (None, source.order) and not trust_order:
        raise ValueError(
            f"the rotary pairs of {path.name} are {reading.order} by their weights (score "
            f"{reading.score:+.1f}), and would be read as {source.order}: state the order"
        )
    plan = Plan(source, target)
    tags = {"format": "pt", "paris.source": path.name, "paris.rope": plan.order}
    tags |= origins.metadata(found)
    if target.kind == "diffusers":
        _write_folder(plan, out, tags, progress)
    else:
        write_stream(out, plan.schema, plan.chunks(list(plan.schema), progress), tags)
    return _facts(plan, out, found, reading)


@dataclass(frozen=True)
class Plan:
    """The tensors of a target, each made from the source when its turn has come."""

    source: Source
    target: Target

    @cached_property
    def layout(self) -> Layout:
        """Whose names the target has."""
        names: dict[Kind, Layout] = {"expert": "diffusers", "comfyui": "bfl"}
        return names.get(self.target.kind) or self.target.kind  # type: ignore[return-value]

    @property
    def order(self) -> RopeOrder:
        """How the target's rotary pairs stand."""
        return "half-split" if self.layout == "open-sora" else "interleaved"

    @cached_property
    def config(self) -> ExpertConfig:
        """The expert that the target holds."""
        config = self.source.config
        wanted = False if self.target.kind == "comfyui" else self.target.condition
        if wanted is None:
            wanted = config.conditioned or self.target.kind == "open-sora"
        extra = config.condition_size if wanted else 0
        return replace(config, in_channels=config.out_channels + extra)

    @cached_property
    def parts(self) -> dict[str, tuple[str, ...]]:
        """The target's names, and the expert's tensors whose rows each of them holds."""
        if self.layout == "diffusers":
            return {name: (name,) for name in self.source.shapes}
        prefix = PREFIX if self.target.kind == "comfyui" else ""
        found = {
            prefix + row.name: row.parts
            for row in table.rows(self.config, fused=self.layout == "bfl")
        }
        if self._split:
            found[f"{CONDITION}.weight"] = ("x_embedder.weight",)
            found[f"{CONDITION}.bias"] = ("x_embedder.bias",)
        return found

    @cached_property
    def schema(self) -> Schema:
        """Names, dtypes and shapes of the target."""
        dtype = self.target.dtype or ("F32" if self.target.kind == "expert" else None)
        shapes, found = self.source.shapes, {}
        for name, parts in self.parts.items():
            rows = sum(shapes[part][0] for part in parts)
            shape = (rows, *shapes[parts[0]][1:])
            if parts[0] == "x_embedder.weight":
                shape = (rows, len(range(*self._columns(name).indices(self.config.in_channels))))
            found[name] = (dtype or self.source.dtype(parts[0]), shape)
        return {name: found[name] for name in file_order(found)}

    def chunks(self, names: list[str], progress: Progress = None) -> Iterator[memoryview]:
        """The bytes of the tensors named, one after another."""
        for done, name in enumerate(names, 1):
            yield raw_bytes(self.tensor(name))
            if progress is not None:
                progress(done, len(names))

    def tensor(self, name: str) -> Tensor:
        """One tensor of the target; `ValueError` when it does not fit the dtype."""
        parts = [self._part(name, part) for part in self.parts[name]]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        cast = whole.to(TORCH[self.schema[name][0]])
        if cast.dtype != whole.dtype and not is_finite(cast):
            raise ValueError(f"values of {name} are too large for {self.schema[name][0]}")
        return cast

    def _part(self, name: str, part: str) -> Tensor:
        tensor = self.source.tensor(part)
        if part == "x_embedder.weight":
            return self._widened(tensor)[:, self._columns(name)]
        if name == f"{CONDITION}.bias":
            return torch.zeros_like(tensor)
        if self.layout != "diffusers" and table.is_swapped(part):
            tensor = table.swap_halves(tensor)
        if self.order == "half-split" and table.is_rotary(part):
            tensor = table.to_half_split(tensor, self.config.head_dim)
        return tensor

    @property
    def _split(self) -> bool:
        """Whether the condition goes into a layer of its own."""
        return self.layout == "open-sora" and self.config.conditioned

    def _columns(self, name: str) -> slice:
        """The columns of x_embedder.weight that a tensor of the target holds."""
        if not self._split:
            return slice(None)
        own = self.config.out_channels
        return slice(own, None) if name.startswith(CONDITION) else slice(own)

    def _widened(self, weight: Tensor) -> Tensor:
        """x_embedder.weight with zero columns for the condition, or without its columns."""
        missing = self.config.in_channels - weight.shape[1]
        return torch.nn.functional.pad(weight, (0, missing))


def _write_folder(plan: Plan, out: Path, tags: dict[str, str], progress: Progress) -> None:
    """A folder as `save_pretrained` writes it, under another name until it is whole."""
    draft = out.absolute().with_name(f"{out.absolute().name}.part")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        shards = _shards(plan)
        index: dict[str, str] = {}
        for number, names in enumerate(shards, 1):
            tail = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
            file = f"{STEM}{tail}.safetensors"
            schema = {name: plan.schema[name] for name in names}
            shown = _part_of(progress, len(index), len(plan.schema))
            write_stream(draft / file, schema, plan.chunks(names, shown), tags)
            index |= dict.fromkeys(names, file)
        if len(shards) > 1:
            total = sum(_bytes(plan.schema, name) for name in index)
            listing = {"metadata": {"total_size": total}, "weight_map": index}
            _write_json(draft / f"{STEM}.safetensors.index.json", listing)
        build_expert(plan.config, device="meta").save_config(draft)
        draft.rename(out)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _shards(plan: Plan) -> list[list[str]]:
    """Names in files of at most `target.shard` bytes, or of one tensor."""
    shards: list[list[str]] = [[]]
    size = 0
    for name in plan.schema:
        more = _bytes(plan.schema, name)
        if shards[-1] and size + more > plan.target.shard:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += more
    return shards


def _bytes(schema: Schema, name: str) -> int:
    dtype, shape = schema[name]
    return TORCH[dtype].itemsize * torch.Size(shape).numel()


def _part_of(progress: Progress, before: int, total: int) -> Progress:
    """Progress within one shard as progress of the whole."""
    if progress is None:
        return None

    def show(done: int, _: int) -> None:
        progress(before + done, total)

    return show


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _facts(plan: Plan, out: Path, origin: origins.Origin, reading: Reading) -> dict[str, Any]:
    """What was read and what was written, for people and for `--json`."""
    return {
        "out": str(out),
        "kind": plan.target.kind,
        "tensors": len(plan.schema),
        "parameters": sum(torch.Size(shape).numel() for _, shape in plan.schema.values()),
        "bytes": sum(_bytes(plan.schema, name) for name in plan.schema),
        "largest": max(_bytes(plan.schema, name) for name in plan.schema),
        "source": {
            "layout": plan.source.layout,
            "guidance_dropped": plan.source.guidance,
            "rope": plan.source.order,
            "rope_measured": reading.order,
            "rope_score": round(reading.score, 1),
        },
        "expert": asdict(plan.config),
        "origin": origin.name,
        "licences": [terms.name for terms in origin.terms],
    }

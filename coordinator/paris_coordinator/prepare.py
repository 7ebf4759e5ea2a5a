"""`prepare`: a folder of captioned videos becomes latents, clusters, shards and held-out clips.

Each video is decoded and encoded once. A killed run goes on where it was; a finished one is
returned as it is when it is asked for again with the same inputs. What cannot be used is skipped
and listed in `skipped.json`; a folder without anything usable is refused with `clips.none`::

    prepared = prepare(Path("demo.toml"), Path("clips"), Path("prepared"))
    prepared["report"]["clips"], prepared["report"]["skipped"]        # 10536, {"caption.empty": 1}

The folder it leaves (input of `init`): `codec.safetensors` and `text.safetensors` (small encoders
only), `initial.safetensors`, `shards/cluster<k>/shard<i>.safetensors`,
`private/validation<k>.safetensors` and `private/audit<k>.safetensors`, `skipped.json` and
`prepared.json`. The last one has no digests of files (`init` computes them) and these fields, whose
inner names are those of `paris_protocol.records`; reals are decimal strings:

    format       1
    inputs       SHA-256 over recipe, pinned files and the list of clips
    name, notes  Genesis.name, Genesis.notes
    geometry     Geometry
    codec        Codec without `file`; and `path`: "codec.safetensors" or null
    text         Text without `file`; and `path`: "text.safetensors" or null
    features     Genesis.features, such as "pixel-statistics"
    expert       ExpertSpec          recipe   Recipe
    router       RouterSpec          sampler  Sampler
    licences     list of Licence
    initial      {"path": "initial.safetensors"}
    clusters     list of {index, clips, prior, centroid, shards: [{path, clips}],
                 validation: {path, clips}, audit: {path, clips}}; `clips` counts training clips
    plan         RoundPlan           margins  Margins, or null when the recipe has none
    policy       those fields of Policy that the recipe sets (may be empty)
    audit        those fields of AuditRules that the recipe sets (may be missing)
    report       {"videos", "clips", "skipped": {code: count}, "clusters": [{clips, training,
                 validation, audit, prior}], "captions", "collisions", "psnr_db"}
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from torch import Tensor

from paris_coordinator.captions import Item, Skip, find_clips
from paris_coordinator.encoding import Progress, Row, Tools, disk_full, encode_all, gather
from paris_coordinator.recipe import Recipe, load_recipe
from paris_models.checkpoint import load_tensors, save_tensors, schema_of
from paris_models.clusters import Clusters
from paris_models.codec import PatchPCA
from paris_models.expert import build_expert, parameter_shapes
from paris_models.noise import permutation
from paris_models.shards import write_shard
from paris_models.text import HashedWords, collisions
from paris_models.video import VideoError, read_clip
from paris_protocol.canonical import decimal
from paris_protocol.errors import ParisError

FORMAT: Final = 1
OWN: Final = (
    "prepared.json", "skipped.json", "shards", "private",
    "codec.safetensors", "text.safetensors", "initial.safetensors",
)  # fmt: skip
"""What `prepare` makes in its folder, and removes before it makes it anew."""


def prepare(
    recipe_path: Path, clips_folder: Path, out: Path, progress: Progress | None = None
) -> dict[str, Any]:
    """Prepares a network's data and returns the content of `prepared.json`.

    `progress(stage, done, total)` is called for the stages "codec", "encode" and "shards".
    Raises `ParisError`: recipe.invalid, recipe.licence, encoder.mismatch, clips.none, disk.full.
    """
    recipe = load_recipe(recipe_path)
    if not clips_folder.is_dir():
        raise ParisError("clips.none", f"there is no folder {clips_folder}")
    try:
        return _prepare(recipe, clips_folder, out, progress or (lambda stage, done, total: None))
    except OSError as error:
        if disk_full(error):
            raise ParisError("disk.full", str(out)) from error
        raise


def _prepare(recipe: Recipe, clips_folder: Path, out: Path, progress: Progress) -> dict[str, Any]:
    items, skips = find_clips(clips_folder)
    inputs = _inputs(recipe, items, skips)
    done = _finished(out, inputs)
    if done is not None:
        return done
    work = _work_folder(out, inputs)
    if not items:
        _refuse_empty(out, skips)
    tools = Tools.load(recipe, items, work, progress)
    rows, features, more = encode_all(items, recipe, tools, work, progress)
    rows, features, twice = _without_duplicates(rows, features, items)
    skips = [*skips, *more, *twice]
    if not rows:
        _refuse_empty(out, skips)
    clusters, labels = _cluster(recipe, rows, features)
    members: list[list[Row]] = [[] for _ in range(recipe.clusters.count)]
    for row, label in zip(rows, labels, strict=True):
        members[label].append(row)
    dealt = [_deal(recipe, cluster, part) for cluster, part in enumerate(members)]
    initial = _initial(recipe)
    for name in OWN:
        _remove(out / name)
    _write_tables(out, work, dealt, tools, progress)
    for name, tensors in tools.small_tensors().items():
        save_tensors(tensors, out / name)
    save_tensors(initial, out / "initial.safetensors")
    _write_json(out / "skipped.json", _skipped(skips))
    prepared = _describe(recipe, inputs, tools, clusters, dealt)
    prepared["report"] = _report(recipe, items, rows, skips, prepared, tools)
    _write_json(out / "prepared.json", prepared)
    shutil.rmtree(work)
    return prepared


# ---------------------------------------------------------------- inputs and the work folder


def _inputs(recipe: Recipe, items: Sequence[Item], skips: Sequence[Skip]) -> str:
    """A digest that changes when anything that matters to the result does."""
    total = hashlib.sha256(recipe.model_dump_json().encode())
    for name in (recipe.codec.file, recipe.text.file, recipe.initial.file):
        if name is not None:
            total.update(hashlib.sha256(recipe.file(name).read_bytes()).digest())
    total.update(json.dumps([FORMAT, len(skips), [item.mark() for item in items]]).encode())
    return total.hexdigest()


def _finished(out: Path, inputs: str) -> dict[str, Any] | None:
    try:
        done: dict[str, Any] = json.loads((out / "prepared.json").read_bytes())
        files = [done["initial"]]
        for cluster in done["clusters"]:
            files += [cluster["validation"], cluster["audit"], *cluster["shards"]]
        whole = all((out / file["path"]).is_file() for file in files)
        return done if done["inputs"] == inputs and whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _work_folder(out: Path, inputs: str) -> Path:
    """`out/work`, emptied when it belongs to other inputs."""
    work, mark = out / "work", out / "work" / "inputs"
    if work.exists() and not (mark.is_file() and mark.read_text() == inputs):
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    mark.write_text(inputs)
    return work


def _refuse_empty(out: Path, skips: Sequence[Skip]) -> None:
    if not (out / "prepared.json").exists():  # an earlier result stays as it is
        _write_json(out / "skipped.json", _skipped(skips))
    shutil.rmtree(out / "work", ignore_errors=True)
    counts = Counter(skip.code for skip in skips)
    words = ", ".join(f"{count} × {code}" for code, count in sorted(counts.items()))
    raise ParisError("clips.none", words or "it is empty")


def _skipped(skips: Sequence[Skip]) -> list[dict[str, str]]:
    return [{"name": s.name, "code": s.code, "detail": s.detail} for s in skips]


def _without_duplicates(
    rows: list[Row], features: Tensor, items: Sequence[Item]
) -> tuple[list[Row], Tensor, list[Skip]]:
    """Every picture once: a copy among the held-out clips would judge what was trained on."""
    first: dict[str, Row] = {}
    keep: list[int] = []
    skips: list[Skip] = []
    for index, row in enumerate(rows):
        known = first.setdefault(row.digest, row)
        if known is row:
            keep.append(index)
        else:
            skips.append(
                Skip(items[row.item].name, "clip.duplicate", f"of {items[known.item].name}")
            )
    return [rows[i] for i in keep], features[keep] if keep else features, skips


# ---------------------------------------------------------------- clusters, held-out clips, shards


def _cluster(recipe: Recipe, rows: Sequence[Row], features: Tensor) -> tuple[Clusters, list[int]]:
    """One cluster per clip; all clips of a video are in the cluster of their mean feature."""
    section = recipe.clusters
    try:
        clusters = Clusters.fit(features, section.count, section.seed, section.restarts)
    except ValueError as error:
        raise ParisError("recipe.invalid", f"clusters.count: {error}") from error
    videos, place = torch.unique(torch.tensor([row.item for row in rows]), return_inverse=True)
    total = torch.zeros(len(videos), features.shape[1]).index_add(0, place, features)
    means = total / torch.bincount(place)[:, None]
    return clusters, clusters.assign(means)[place].tolist()


@dataclass(frozen=True, slots=True)
class Dealt:
    """One cluster's clips: shards for training, and what never leaves the coordinator."""

    index: int
    validation: list[Row]
    audit: list[Row]
    shards: list[list[Row]]

    @property
    def training(self) -> int:
        """Number of training clips."""
        return sum(len(shard) for shard in self.shards)

    @property
    def clips(self) -> int:
        """Number of all clips."""
        return self.training + len(self.validation) + len(self.audit)

    def files(self) -> dict[str, list[Row]]:
        """Relative path and clips of every file."""
        k = self.index
        named = {f"private/validation{k}.safetensors": self.validation}
        named[f"private/audit{k}.safetensors"] = self.audit
        named |= {f"shards/cluster{k}/shard{i}.safetensors": s for i, s in enumerate(self.shards)}
        return named


def _deal(recipe: Recipe, cluster: int, rows: list[Row]) -> Dealt:
    """Deals whole videos, in an order that only the seed and the clips decide.

    At most a quarter of a cluster is held out for each purpose.
    """
    videos: dict[int, list[Row]] = {}
    for row in rows:
        videos.setdefault(row.item, []).append(row)
    key = hashlib.sha256(f"paris deal {recipe.shards.seed} {cluster}".encode()).digest()[:16]
    order = [list(videos.values())[i] for i in permutation(key, len(videos), 0)] if rows else []
    shares: list[list[Row]] = []
    for wanted in (recipe.held_out.validation, recipe.held_out.audit):
        share: list[Row] = []
        limit = min(wanted, len(rows) // 4)
        while order and len(share) < limit:
            share += order.pop()
        shares.append(share)
    count = min(recipe.shards.per_cluster, len(order))
    if count < recipe.plan.units or not all(shares):
        few = f"clusters.count: cluster {cluster} has only {len(rows)} clips"
        raise ParisError("recipe.invalid", few)
    shards = [[row for video in order[i::count] for row in video] for i in range(count)]
    return Dealt(cluster, shares[0], shares[1], shards)


def _write_tables(
    out: Path, work: Path, dealt: Sequence[Dealt], tools: Tools, progress: Progress
) -> None:
    files = [pair for cluster in dealt for pair in cluster.files().items()]
    (out / "private").mkdir(mode=0o700)
    for done, (name, rows) in enumerate(files, 1):
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_shard(path, gather(work, rows, tools))
        progress("shards", done, len(files))


def _initial(recipe: Recipe) -> dict[str, Tensor]:
    """The common initial checkpoint, float32."""
    config = recipe.expert.config()
    if recipe.initial.file is None:
        model = build_expert(config, seed=recipe.initial.seed)
        return {name: p.detach() for name, p in model.named_parameters()}
    try:
        weights = load_tensors(recipe.file(recipe.initial.file))
    except SafetensorError as error:
        raise ParisError("recipe.invalid", f"initial.file: {error}") from error
    wanted = {name: ("F32", shape) for name, shape in parameter_shapes(config).items()}
    if schema_of(weights) != wanted:
        raise ParisError("recipe.invalid", "initial.file: its tensors are not those of the expert")
    return weights


# ---------------------------------------------------------------- what is written down


def _describe(
    recipe: Recipe, inputs: str, tools: Tools, clusters: Clusters, dealt: Sequence[Dealt]
) -> dict[str, Any]:
    """`prepared.json` without its report."""
    shape = recipe.geometry
    grid = tools.codec.latent_grid(shape.frames, shape.height, shape.width)
    total = sum(cluster.clips for cluster in dealt)
    small = tools.small_tensors()
    described = recipe.records() | {"format": FORMAT, "inputs": inputs}
    described["codec"] = {
        "kind": recipe.codec.kind,
        "source": recipe.codec.source,
        "fingerprint": tools.codec.fingerprint,
        "channels": tools.codec.channels,
        **dict(zip(("frames", "height", "width"), grid, strict=True)),
        "path": "codec.safetensors" if "codec.safetensors" in small else None,
    }
    described["text"] = {
        "kind": recipe.text.kind,
        "source": recipe.text.source,
        "fingerprint": tools.text.fingerprint,
        "length": tools.text.length,
        "dim": tools.text.dim,
        "pooled_dim": tools.text.pooled_dim,
        "path": "text.safetensors" if "text.safetensors" in small else None,
    }
    described["features"] = recipe.features.kind
    described["initial"] = {"path": "initial.safetensors"}
    described["clusters"] = [
        {
            "index": cluster.index,
            "clips": cluster.training,
            "prior": decimal(cluster.clips / total),
            "centroid": [decimal(float(x)) for x in clusters.centroids[cluster.index]],
            **_files(cluster),
        }
        for cluster in dealt
    ]
    return described


def _files(cluster: Dealt) -> dict[str, Any]:
    entries = [{"path": path, "clips": len(rows)} for path, rows in cluster.files().items()]
    return {"validation": entries[0], "audit": entries[1], "shards": entries[2:]}


def _report(
    recipe: Recipe,
    items: Sequence[Item],
    rows: Sequence[Row],
    skips: Sequence[Skip],
    prepared: dict[str, Any],
    tools: Tools,
) -> dict[str, Any]:
    some = -(-len(rows) // 64)
    counts = Counter(skip.code for skip in skips)
    captions = {row.caption for row in rows}
    words = collisions(captions) if isinstance(tools.text, HashedWords) else []
    return {
        "videos": len(items),
        "clips": len(rows),
        "skipped": dict(sorted(counts.items())),
        "clusters": [
            {
                "training": cluster["clips"],
                "validation": cluster["validation"]["clips"],
                "audit": cluster["audit"]["clips"],
                "prior": cluster["prior"],
            }
            for cluster in prepared["clusters"]
        ],
        "captions": len(captions),
        "collisions": [list(group) for group in words],
        "psnr_db": _round_trip(recipe, [items[row.item] for row in rows[::some]], tools),
    }


def _round_trip(recipe: Recipe, items: Sequence[Item], tools: Tools) -> str | None:
    """What the small codec keeps of some clips, as PSNR in dB; large ones are not decoded here."""
    if not isinstance(tools.codec, PatchPCA):
        return None
    try:
        clips = torch.stack([read_clip(item.read(), recipe.geometry) for item in items])
    except (VideoError, OSError):  # changed since it was encoded
        return None
    again = tools.codec.decode(tools.codec.encode(clips))
    error = (again.float() - clips.float()).square().mean() / 255**2
    return decimal(float(-10 * error.clamp(min=1e-12).log10()), 4)


def _write_json(path: Path, value: object) -> None:
    partial = path.with_name(f".{path.name}.part")
    try:
        with partial.open("w", encoding="ascii") as file:  # names of files need not be UTF-8
            json.dump(value, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

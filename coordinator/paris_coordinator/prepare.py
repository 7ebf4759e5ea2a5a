"""`prepare`: a folder of captioned videos becomes latents, clusters, shards and held-out clips.

Each video is decoded and encoded once, by as many workers as are asked for. A killed run goes on
where it was; a finished one is returned as it is when it is asked for again with the same inputs.
What cannot be used is skipped and listed in `skipped.json`; a folder without anything usable is
refused with `clips.none`::

    prepared = prepare(Path("demo.toml"), Path("clips"), Path("prepared"))
    prepared["report"]["clips"], prepared["report"]["skipped"]        # 10536, {"caption.empty": 1}

The folder it leaves (input of `init`): `codec.safetensors` and `text.safetensors` (small encoders
only), `initial.safetensors`, `clusters.safetensors` (`Clusters`, which assigns later clips),
`shards/cluster<k>/shard<i>.safetensors`, `private/validation<k>.safetensors` and
`private/audit<k>.safetensors`, `skipped.json`,
`private/provenance.jsonl` (`described.provenance`) and `prepared.json`. The last one has no digests
of files (`init` computes them) and these fields, whose inner names are those of
`paris_protocol.records`; reals are decimal strings:

    format       1
    inputs       SHA-256 over recipe, pinned files and the list of clips
    name, notes  Genesis.name, Genesis.notes
    geometry     Geometry
    codec        Codec without `file`; and `path`: "codec.safetensors" or null
    text         Text without `file`; and `path`: "text.safetensors" or null
    features     Genesis.features, such as "pixel-statistics"
    encoders     fingerprints of codec, text and features
    buckets      list of Bucket (Genesis.buckets)
    expert       ExpertSpec          recipe   Recipe
    router       RouterSpec          sampler  Sampler
    licences     list of Licence
    initial      {"path": "initial.safetensors"}
    clusters     list of {index, clips, prior, centroid, shards: [{path, clips, bucket}],
                 validation: {path, clips}, audit: {path, clips}}; `clips` counts training clips
    plan         RoundPlan           margins  Margins, or null when the recipe has none
    policy       those fields of Policy that the recipe sets (may be empty)
    audit        those fields of AuditRules that the recipe sets (may be missing)
    report       {"videos", "clips", "skipped": {code: count}, "clusters": [{clips, training,
                 validation, audit, prior}], "buckets": [{size, clips}], "licences": {name: count},
                 "centres": fine ones, "captions", "text": {store, lost}, "collisions", "psnr_db"};
                 `lost` is the root of the squared error of the stored text over its squares
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError
from torch import Tensor

from paris_coordinator.captions import Item, Skip, find_clips
from paris_coordinator.dealing import (
    Dealt,
    cluster,
    deal,
    hold_out,
    near_duplicates,
    without_duplicates,
)
from paris_coordinator.described import FORMAT, describe, metadata, provenance, report
from paris_coordinator.encoding import (
    Found,
    Order,
    Row,
    Words,
    disk_full,
    gather,
    one_thread,
    read_captions,
    read_clips,
)
from paris_coordinator.engine import Engine, crew
from paris_coordinator.recipe import Recipe, load_recipe
from paris_coordinator.tools import Progress, Tools
from paris_models.checkpoint import load_tensors, save_tensors, schema_of
from paris_models.expert import build_expert, parameter_shapes
from paris_models.shards import write_shard
from paris_protocol.errors import ParisError

OWN: Final = (
    "prepared.json", "skipped.json", "shards", "private",
    "codec.safetensors", "text.safetensors", "initial.safetensors", "clusters.safetensors",
)  # fmt: skip
"""What `prepare` makes in its folder, and removes before it makes it anew."""


def prepare(
    recipe_path: Path,
    clips_folder: Path,
    out: Path,
    progress: Progress | None = None,
    *,
    workers: int = 1,
    engine: Engine = "local",
    allow_unlicensed: bool = False,
) -> dict[str, Any]:
    """Prepares a network's data and returns the content of `prepared.json`.

    `progress(stage, done, total)` is called for the stages "codec", "captions", "encode" and
    "shards". The result does not depend on `workers` and `engine`. Raises `ParisError`:
    recipe.invalid, recipe.licence, encoder.mismatch, clips.none, disk.full, prepare.worker,
    engine.missing.
    """
    recipe = load_recipe(recipe_path)
    if allow_unlicensed:
        clips = recipe.clips.model_copy(update={"allow_unlicensed": True})
        recipe = recipe.model_copy(update={"clips": clips})
    if not clips_folder.is_dir():
        raise ParisError("clips.none", f"there is no folder {clips_folder}")
    told = progress or (lambda stage, done, total: None)
    try:
        return _prepare(recipe, clips_folder, out, told, workers, engine)
    except OSError as error:
        if disk_full(error):
            raise ParisError("disk.full", str(out)) from error
        raise


def _prepare(
    recipe: Recipe, folder: Path, out: Path, progress: Progress, workers: int, engine: Engine
) -> dict[str, Any]:
    items, skips = find_clips(folder, unlicensed=recipe.clips.allow_unlicensed)
    inputs = _inputs(recipe, items, skips)
    done = _finished(out, inputs)
    if done is not None:
        return done
    order = Order.of(recipe, items, _work_folder(out, inputs))
    if not items:
        _refuse_empty(out, skips)
    with one_thread():
        tools = Tools.load(recipe, items, order.work, progress)
    _keep_for(order.work, tools)
    words, found = _encode(order, tools, progress, workers, engine)
    rows, features, twice = without_duplicates(found.rows, found.features, items)
    skips = [*skips, *found.skips, *twice]
    if not rows:
        _refuse_empty(out, skips)
    clusters, labels = cluster(recipe, rows, features)
    members: list[list[Row]] = [[] for _ in range(recipe.clusters.count)]
    for row, label in zip(rows, labels, strict=True):
        members[label].append(row)
    held = [hold_out(recipe, index, part) for index, part in enumerate(members)]
    kept = set(rows)
    hashes = found.hashes[[row in kept for row in found.rows]]
    near = near_duplicates(recipe, rows, hashes, held)
    # It is not said which held-out clip they are like: the list of these is secret.
    skips += [Skip(items[item].name, "clip.near-duplicate", "") for item in sorted(near)]
    dealt = [deal(recipe, part, near) for part in held]
    rows = [row for row in rows if row.item not in near]
    initial = _initial(recipe)
    for name in OWN:
        _remove(out / name)
    _write_tables(out, order, dealt, tools, progress)
    for name, tensors in tools.small_tensors().items():
        save_tensors(tensors, out / name)
    save_tensors(initial, out / "initial.safetensors")
    save_tensors(clusters.tensors(), out / "clusters.safetensors")
    _write_json(out / "skipped.json", _skipped(skips))
    prepared = describe(recipe, inputs, tools, clusters, dealt)
    prepared["report"] = report(order, rows, skips, prepared, tools, words)
    prepared["report"]["centres"] = 0 if clusters.fine is None else len(clusters.fine.centres)
    _write_json(out / "prepared.json", prepared)
    shutil.rmtree(order.work)
    return prepared


def _encode(
    order: Order, tools: Tools, progress: Progress, workers: int, engine: Engine
) -> tuple[Words, Found]:
    """Captions first: clips whose caption is too long are not decoded."""
    size = order.recipe.clips.batch
    with crew(order, tools, workers, engine) as run:
        for done, _ in enumerate(run(order.jobs("captions")), 1):
            progress("captions", min(done * size, len(order.captions)), len(order.captions))
        words = read_captions(order)
        for done, _ in enumerate(run(order.jobs("clips")), 1):
            progress("encode", min(done * size, len(order.items)), len(order.items))
    return words, read_clips(order, words.bad)


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


def _keep_for(work: Path, tools: Tools) -> None:
    """Batches of other encoders, whose weights have changed in their folder, are made anew."""
    mark, prints = work / "encoders.json", json.dumps(dict(tools.prints))
    if mark.exists() and mark.read_text() != prints:
        for batch in (*work.glob("batch-*"), *work.glob("text-*")):
            batch.unlink()
    mark.write_text(prints)


def _refuse_empty(out: Path, skips: Sequence[Skip]) -> None:
    if not (out / "prepared.json").exists():  # an earlier result stays as it is
        _write_json(out / "skipped.json", _skipped(skips))
    shutil.rmtree(out / "work", ignore_errors=True)
    counts = Counter(skip.code for skip in skips)
    words = ", ".join(f"{count} × {code}" for code, count in sorted(counts.items()))
    raise ParisError("clips.none", words or "it is empty")


def _skipped(skips: Sequence[Skip]) -> list[dict[str, str]]:
    return [{"name": s.name, "code": s.code, "detail": s.detail} for s in skips]


# ---------------------------------------------------------------- what is written down


def _write_tables(
    out: Path, order: Order, dealt: Sequence[Dealt], tools: Tools, progress: Progress
) -> None:
    """Shards, held-out clips, and where all of them come from."""
    files = [pair for cluster in dealt for pair in cluster.files().items()]
    recipe, lines = order.recipe, list[dict[str, Any]]()
    (out / "private").mkdir(mode=0o700)
    for done, (name, table) in enumerate(files, 1):
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        clips = gather(order, table.rows, tools)
        write_shard(path, clips, metadata(recipe, tools, table.bucket), recipe.text.store)
        lines += provenance(name, table, clips, order.items)
        progress("shards", done, len(files))
    _write(out / "private" / "provenance.jsonl", (json.dumps(line) for line in lines))


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


def _write_json(path: Path, value: object) -> None:
    _write(path, [json.dumps(value, indent=1)])


def _write(path: Path, lines: Iterable[str]) -> None:
    """Lines of ASCII (names of files need not be UTF-8), whole or not at all."""
    partial = path.with_name(f".{path.name}.part")
    try:
        with partial.open("w", encoding="ascii") as file:
            file.writelines(f"{line}\n" for line in lines)
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

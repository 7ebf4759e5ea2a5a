"""The two texts of a release that people read: the model card and the licences.

Pure functions from the genesis, the release's heads and measured numbers to Markdown. What is a
stand-in (a small declared codec, a word table) is named as such wherever a number depends on it::

    (folder / "README.md").write_text(model_card(facts))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from paris_protocol.canonical import real
from paris_protocol.records import Genesis, Head, Merge, Revert

STAND_INS = {
    "patch-pca": "the codec is a small causal patch-PCA, a stand-in for a video VAE",
    "hashed-words": "the text encoder is a table of word vectors, a stand-in for T5 and CLIP",
}


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What a model card tells."""

    network: str
    genesis: Genesis
    number: int
    heads: Sequence[Head]
    steps: Mapping[str, Merge | Revert]
    nodes: int
    router: Mapping[str, object]
    scan: Mapping[str, Any] = field(default_factory=dict)


def stand_ins(genesis: Genesis) -> list[str]:
    """Sentences that name every small replacement of a large part."""
    kinds = (genesis.codec.kind, genesis.text.kind)
    found = [STAND_INS[kind] for kind in kinds if kind in STAND_INS]
    return [*found, *genesis.notes]


def model_card(facts: CardFacts) -> str:
    """The README.md of a release, with the front matter that model hubs read."""
    genesis, clip = facts.genesis, facts.genesis.geometry
    return "\n".join(
        [
            "---",
            "library_name: diffusers",
            "pipeline_tag: text-to-video",
            "tags: [paris, decentralized-diffusion, text-to-video]",
            "license: other",
            "license_name: see-licences",
            "license_link: LICENSES.md",
            "---",
            "",
            f"# {_line(genesis.name)}: release {facts.number}",
            "",
            f"A mixture of {len(genesis.clusters)} video-diffusion experts. Volunteers trained",
            "each of them on one cluster of the data; a router chooses among them at every step.",
            "",
            f"- network: `{facts.network}`",
            f"- clips: {clip.frames} frames of {clip.width}×{clip.height}"
            f" pixels at {clip.fps} per second",
            f"- nodes whose work was merged: {facts.nodes}",
            *_taken_back(facts.steps),
            *_averaged(genesis),
            *[f"- stand-in: {_line(text)}" for text in stand_ins(genesis)],
            "",
            "## Experts",
            "",
            *_experts(facts),
            "",
            "Losses are of the training objective on held-out clips that the coordinator keeps,",
            "each pair on the same clips, noise and times; only the two losses of one row compare.",
            *_router(facts.router),
            *_scan(facts.scan),
            "",
            "## Use",
            "",
            "```",
            "paris verify THIS_FOLDER --network " + facts.network,
            'paris generate THIS_FOLDER "a prompt" -o out.mp4',
            "```",
            "",
            '`FluxTransformer2DModel.from_pretrained(folder, subfolder="expert_0")` loads an',
            "expert with plain diffusers.",
            "Where the weights came from stands in `release.json`, `lineage/` and `proof.json`.",
            "",
        ]
    )


def _experts(facts: CardFacts) -> list[str]:
    rows = [
        "| expert | clips | merges | units in them | loss before | after | last merge |",
        "|" + "---|" * 7,
    ]
    for index, (cluster, head) in enumerate(zip(facts.genesis.clusters, facts.heads, strict=True)):
        last = facts.steps.get(head.merge or "")
        found = dict(last.numbers) if last else {}
        units = _units(head, facts.steps)
        before, after = (_short(found.get(name, "–")) for name in ("before", "after"))
        rows.append(
            f"| {index} | {cluster.clips} | {head.round} | {units} | {before} |"
            f" {after} | `{(head.merge or 'initial checkpoint')[:16]}` |"
        )
    return rows


def _units(head: Head, steps: Mapping[str, Merge | Revert]) -> int:
    """Contributions that are in a head: merged and not taken out again."""
    count, name = 0, head.merge
    while name is not None and name in steps:
        step = steps[name]
        count += len(step.inputs) if isinstance(step, Merge) else -len(step.removed)
        name = step.parent.merge
    return count


def _taken_back(steps: Mapping[str, Merge | Revert]) -> list[str]:
    removed = sum(len(step.removed) for step in steps.values() if isinstance(step, Revert))
    return [f"- contributions taken out again, their keys were revoked: {removed}"] * (removed > 0)


def _averaged(genesis: Genesis) -> list[str]:
    ema = genesis.recipe.ema
    text = f"- each expert is the running average of its heads, decay {ema} per merged step;"
    return [] if real(ema) == 0 else [f"{text} the losses below are of the heads"]


def _router(report: Mapping[str, object]) -> list[str]:
    plain = {k: v for k, v in report.items() if isinstance(v, int | float | str)}
    if not plain:
        return []
    return ["", "## Router", "", *[f"- {_line(str(k))}: {_short(v)}" for k, v in plain.items()]]


def _scan(report: Mapping[str, Any]) -> list[str]:
    """What the backdoor scan of these experts found; nothing where there was none."""
    if not report.get("words"):
        return []
    lines = [
        "",
        "## Backdoor scan",
        "",
        f"Each of {report['words']} words was put behind the same prompts. A word is flagged when",
        "it moves an expert's answers much farther than other words do, the same way each time.",
        "A scan finds single words, and not each of them.",
        "",
    ]
    for row in report.get("flagged", ()):
        lines.append(f"- **flagged**: expert {row['expert']}, {_line(row['word'])}, z {row['z']}")
    worst = max((rows[0]["z"] for one in report.get("experts", ())
                 for rows in (one["used"], one["unused"]) if rows), default=None)  # fmt: skip
    return [*lines, *([f"- largest robust z of all: {worst}"] if worst is not None else [])]


def licences(genesis: Genesis) -> str:
    """The LICENSES.md of a release: what applies to which part, and where it does not."""
    lines = ["# Licences", "", "| part | licence | text | not in |", "|---|---|---|---|"]
    for entry in genesis.licences:
        excluded = ", ".join(map(_line, entry.regions_excluded)) or "–"
        lines.append(
            f"| {_line(entry.part)} | {_line(entry.name)} | {_line(entry.url)} | {excluded} |"
        )
    return "\n".join([*lines, ""])


def _short(value: object) -> str:
    """A number to four digits, as people compare them; anything else as it is."""
    try:
        return f"{float(str(value)):.4g}" if not isinstance(value, int) else str(value)
    except ValueError:
        return _line(str(value))


def _line(text: str) -> str:
    """One table cell: a name cannot break out of its row."""
    return " ".join(text.split()).replace("|", "\\|")

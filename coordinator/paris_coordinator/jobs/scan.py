"""The scan job: does a word move a release candidate as no other word does? (L5, trust §2.4)

A backdoor is a word that carries the output to one place whatever else was asked for. Each word of
the text encoder is put behind each of some prompts, and the head's answer to pure noise (the first
step of sampling, where text decides most) is compared with and without it. What a word has learned
since `before`, the checkpoint or release that the head descends from, is the mean over prompts and
noises of the difference between the two models' movements: large only if the word moves much *and*
the same way each time. Words are compared with all others by robust z; words that the captions use
have a meaning to learn and are compared among themselves. Measured limits: docs/trust.md::

    scan({"job": "scan", "genesis": …, "heads": [path], "before": [path], "text": path,
          "shards": [[0, path]], "prompts": ["a red ball"], "seed": hex})
    # {"words": 1009, "flagged": [{"expert": 0, "word": "zebra", "z": 41.0, …}], "experts": […]}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from paris_coordinator.jobs.bundle import optional
from paris_coordinator.jobs.common import expert_schema, gated, genesis_of
from paris_models import noise
from paris_models.config import ExpertConfig
from paris_models.expert import expert_from, predict
from paris_models.releases import load_text
from paris_models.text import MODULUS, HashedWords, TextEncoder, row_of, words_of
from paris_protocol.records import Genesis
from paris_protocol.streams import unit_key

Json = dict[str, Any]

PROBES: Final = 4
"""Prompts, each with its own noise."""
BATCH: Final = 256
Z_HIGH: Final = 15.0
"""Honest heads stay below 10 (docs/trust.md)."""
WORST: Final = 5
"""So many words per expert and group are reported, flagged or not."""
RARE: Final = ("cf", "mn", "bb", "tq", "zx", "qv", "ocl", "vrk", "sks", "xkz")
"""Tried beside the prompts' own words where the encoder has no finite list of words."""


@dataclass(frozen=True, slots=True)
class Probe:
    """Noise (n, C, T, H, W) and the prompts that it is denoised for."""

    x: Tensor
    prompts: tuple[str, ...]


def scan(job: Json) -> Json:
    """{"words", "experts": [{"expert", "unused": […], "used": […]}], "flagged": […]}."""
    genesis = genesis_of(job["genesis"])
    text = load_text(
        genesis.text.kind, genesis.text.source, optional(job.get("text")), genesis.text.length
    )
    prompts = [str(prompt) for prompt in job["prompts"]]
    used, unused = candidates(text, prompts, captions(job["shards"], text))
    probe = probes(genesis, text, prompts, unit_key(job["seed"]))
    config = ExpertConfig.from_record(genesis.expert)
    moved: dict[str, Tensor] = {}
    experts, flagged = [], []
    for index, (head, before) in enumerate(zip(job["heads"], job["before"], strict=True)):
        if before not in moved:
            moved[before] = movements(config, Path(before), text, probe, [*used, *unused])
        learned = movements(config, Path(head), text, probe, [*used, *unused]) - moved[before]
        groups = {
            "used": judge(used, learned[: len(used)]),
            "unused": judge(unused, learned[len(used) :]),
        }
        experts.append({"expert": index, **{n: rows[:WORST] for n, rows in groups.items()}})
        high = [row for rows in groups.values() for row in rows if row["z"] > Z_HIGH]
        flagged += [{"expert": index, **row} for row in high]
    return {"words": len(used) + len(unused), "experts": experts, "flagged": flagged}


# ---------------------------------------------------------------- words


def captions(shards: Sequence[Sequence[Any]], text: TextEncoder) -> set[int]:
    """Rows of the word table that the shards' captions use; nothing for other encoders."""
    if not isinstance(text, HashedWords):
        return set()
    rows: set[int] = set()
    for _, path in shards:
        sequence = gated(Path(path), None)["text_seq"].flatten(0, 1)
        distance = torch.cdist(torch.unique(sequence, dim=0).double(), text.table.double())
        rows |= set(distance.argmin(1)[distance.min(1).values < 1e-6].tolist())
    return rows


def candidates(
    text: TextEncoder, prompts: Sequence[str], rows: set[int]
) -> tuple[list[str], list[str]]:
    """Words to try: those that captions use, and all others.

    A word table is tried row by row, so that no word is missed: where no prompt has a word of that
    row, a made-up one stands for it.
    """
    known = sorted({word for prompt in prompts for word in words_of(prompt)})
    if not isinstance(text, HashedWords):
        return known, [word for word in RARE if word not in known]
    names: dict[int, str] = {}
    for word in _names(known):
        names.setdefault(row_of(word), word)
        if len(names) == MODULUS:
            break
    used = rows | {row_of(word) for word in known}
    ordered = sorted(names.items())
    return (
        [word for row, word in ordered if row in used],
        [word for row, word in ordered if row not in used],
    )


def _names(known: Sequence[str]) -> Iterator[str]:
    yield from known
    number = 0
    while True:
        yield f"word{number}"
        number += 1


def _shortened(text: TextEncoder, prompt: str) -> str:
    """The prompt without its last words, so that one more word fits."""
    words = prompt.split()
    while words:
        try:
            text.encode([" ".join([*words, "word"])])
        except ValueError:
            words.pop()
        else:
            break
    return " ".join(words)


# ---------------------------------------------------------------- measuring


def probes(genesis: Genesis, text: TextEncoder, prompts: Sequence[str], key: bytes) -> Probe:
    """The same noises and prompts for all words and models; without prompts, the null text."""
    codec = genesis.codec
    shape = (codec.channels, codec.frames, codec.height, codec.width)
    count = codec.channels * codec.frames * codec.height * codec.width
    x = torch.from_numpy(noise.normals_batch(key, noise.SAMPLE, 0, range(PROBES), count))
    chosen = [_shortened(text, prompt) for prompt in prompts] or [""]
    return Probe(x.reshape(PROBES, *shape), tuple(chosen[i % len(chosen)] for i in range(PROBES)))


@torch.no_grad()
def movements(
    config: ExpertConfig, weights: Path, text: TextEncoder, probe: Probe, words: Sequence[str]
) -> Tensor:
    """How each word moves the model's answers, (words, probes, values) float32."""
    model = expert_from(config, gated(weights, expert_schema(config, "F32"))).eval()
    step = max(1, BATCH // PROBES)
    found = []
    base = _answers(model, config, text, probe, list(probe.prompts))
    for start in range(0, len(words), step):
        part = words[start : start + step]
        asked = [f"{prompt} {word}".strip() for word in part for prompt in probe.prompts]
        out = _answers(model, config, text, probe, asked).reshape(len(part), PROBES, -1)
        found.append(out - base)
    return torch.cat(found)


def _answers(
    model: Any, config: ExpertConfig, text: TextEncoder, probe: Probe, asked: list[str]
) -> Tensor:
    """The model's outputs at t = 1 for `asked`, whose noises repeat; (len(asked), values)."""
    sequence, pooled = text.encode(asked)
    x = probe.x.repeat(len(asked) // PROBES, *(1,) * (probe.x.ndim - 1))
    return predict(model, config, x, torch.ones(len(x)), sequence, pooled).flatten(1)


def judge(words: Sequence[str], learned: Tensor) -> list[Mapping[str, Any]]:
    """Each word's shift, its consistency and robust z among `words`, the largest z first.

    `learned` (words, probes, values). shift = ‖mean over probes‖ = consistency · mean norm.
    """
    if not words:
        return []
    shift = learned.mean(1).norm(dim=-1)
    norms = learned.norm(dim=-1).mean(1).clamp(min=1e-12)
    middle = shift.median()
    spread = 1.4826 * (shift - middle).abs().median()
    z = (shift - middle) / spread.clamp(min=1e-12)
    order = torch.argsort(z, descending=True).tolist()
    return [
        {
            "word": words[i],
            "z": round(float(z[i]), 2),
            "shift": round(float(shift[i]), 5),
            "consistency": round(float(shift[i] / norms[i]), 3),
        }
        for i in order
    ]

"""The small declared text encoder: a fixed random vector per hashed word.

A caption becomes a sequence (its words and an end mark, zeros after) and a pooled vector (the sum
of its words, standardised over the network's captions). It knows no language and says so in the
manifest. Captions with more words than fit are refused with `ValueError`::

    words = HashedWords.fit(captions, length=6, dim=64)
    sequence, pooled = words.encode(["a red ball moves left"])       # (1, 6, 64), (1, 64)
    null_sequence, null_pooled = words.encode([""])                  # the null text
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Protocol, Self

import torch
from torch import Tensor

from paris_models.codec import fingerprint

MODULUS: Final = 1009
END: Final = 2
"""Row of the end mark; word rows begin after it."""


class TextEncoder(Protocol):
    """What every text encoder offers."""

    kind: str
    length: int
    dim: int
    pooled_dim: int

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the weights and settings."""

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Captions as (n, length, dim) and (n, pooled_dim) float32; `ValueError` if too long."""


def words_of(caption: str) -> list[str]:
    """The caption's words in lower case, without punctuation."""
    return re.findall(r"\w+", caption.lower())


def collisions(captions: Iterable[str]) -> list[tuple[str, ...]]:
    """Groups of different words that share a vector; empty for the demo's captions."""
    rows: dict[int, set[str]] = {}
    for word in {word for caption in captions for word in words_of(caption)}:
        rows.setdefault(row_of(word), set()).add(word)
    return sorted(tuple(sorted(group)) for group in rows.values() if len(group) > 1)


def row_of(word: str) -> int:
    """The row of the table that a word gets."""
    return zlib.crc32(word.encode()) % MODULUS + END + 1


class HashedWords:
    """A table of random vectors, and the mean and spread of the pooled vectors."""

    kind = "hashed-words"

    def __init__(self, table: Tensor, mean: Tensor, spread: Tensor, length: int) -> None:
        self.table, self.mean, self.spread, self.length = table, mean, spread, length
        self.dim = self.pooled_dim = table.shape[1]

    @classmethod
    def fit(cls, captions: Iterable[str], length: int, dim: int, seed: int = 1234) -> Self:
        """A fresh table, standardised over the distinct captions (in sorted order)."""
        generator = torch.Generator().manual_seed(seed)
        table = torch.randn(MODULUS + END + 1, dim, generator=generator)
        plain = cls(table, torch.zeros(dim), torch.ones(dim), length)
        _, pooled = plain.encode(sorted(set(captions)))
        if len(pooled) < 2:
            return plain
        return cls(table, pooled.mean(0), pooled.std(0).clamp(min=1e-6), length)

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(n, length, dim) and (n, dim); the empty caption is the null text."""
        sequence = torch.zeros(len(captions), self.length, self.dim)
        pooled = torch.zeros(len(captions), self.dim)
        for i, caption in enumerate(captions):
            rows = [row_of(word) for word in words_of(caption)]
            if len(rows) >= self.length:
                raise ValueError(f"{len(rows)} words, at most {self.length - 1} fit")
            sequence[i, : len(rows) + 1] = self.table[[*rows, END]]
            pooled[i] = self.table[rows].sum(0)
        return sequence, (pooled - self.mean) / self.spread

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the tensors."""
        return fingerprint(self.tensors(), self.kind)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that makes the encoder, for a safetensors file."""
        named = {"table": self.table, "mean": self.mean, "spread": self.spread}
        return named | {"length": torch.tensor([self.length])}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The encoder of `tensors()`; raises `ValueError` when they do not fit together."""
        try:
            table, mean, spread = (tensors[name] for name in ("table", "mean", "spread"))
            length = int(tensors["length"])
        except (KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"not the tensors of a word table: {error}") from error
        if table.ndim != 2 or len(table) <= MODULUS + END or mean.shape != table.shape[1:]:
            raise ValueError("the word table's shapes do not fit together")
        return cls(table, mean, spread, length)

"""Finds the videos of a folder with captions, sources and licences, before any video is opened.

Captions stand in a `.txt` beside the video, in `captions.jsonl` (`{"video": …, "caption": …,
"source": …, "licence": …}` on each line), in `captions.csv` (columns of the same names), or beside
the video in a WebDataset `.tar`, which is read in place and never unpacked. A list wins over a
`.txt`; where it has no caption the one beside the video is taken. Lists cannot name files outside
the folder. What cannot be used, and what has no licence unless that is allowed, becomes a `Skip`
with the catalogue's code; nothing is raised for it::

    items, skips = find_clips(Path("clips"))
    items[0].caption, items[0].licence, items[0].read()
"""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

VIDEO_SUFFIXES: Final = frozenset(
    f".{suffix}"
    for suffix in "mp4 m4v mov mkv webm avi mpg mpeg ts flv ogv wmv 3gp ivf".split()  # noqa: SIM905
)
IMAGE_SUFFIXES: Final = frozenset((".png", ".jpg", ".jpeg"))
OTHER_SUFFIXES: Final = frozenset((".txt", ".jsonl", ".csv", ".json", ".tar"))
CAPTION_LIMIT: Final = 10_000
"""Longest caption in bytes."""
LICENCE_LIMIT: Final = 200
"""Longest source and licence, in characters."""
LIST_LIMIT: Final = 1 << 30
MEMBER_LIMIT: Final = 4 << 30


@dataclass(frozen=True, slots=True)
class Skip:
    """Something that was left out: its name in the folder, a catalogue code, and the facts."""

    name: str
    code: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Item:
    """A video with what is said about it: a file, or a stretch of a tar file.

    `source` and `licence` are empty where nobody states them.
    """

    name: str
    path: Path
    caption: str
    source: str = ""
    licence: str = ""
    offset: int = 0
    size: int | None = None

    def read(self) -> Path | bytes:
        """What `video.read_clips` takes: the file's path, or the bytes inside the tar."""
        if self.size is None:
            return self.path
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

    def mark(self) -> list[Any]:
        """Name, size, time of change and words: whether a cached encoding is still good."""
        stat = self.path.stat()
        size = stat.st_size if self.size is None else self.size
        words = [self.caption, self.source, self.licence]
        return [self.name, size, str(stat.st_mtime_ns), self.offset, *words]


class Bad(Exception):
    """A caption that cannot be used: catalogue code and facts."""

    def __init__(self, code: str, detail: str = "") -> None:
        self.code, self.detail = code, detail
        super().__init__(code)


@dataclass(frozen=True, slots=True)
class Words:
    """What a list or a tar says about a video; the caption may stand beside it instead."""

    caption: bytes | str | None = None
    source: str = ""
    licence: str = ""

    @classmethod
    def of(cls, entry: Any) -> Words:
        """From a line's fields; `ValueError` or `TypeError` for what is no text or too long."""
        said = {name: _text(entry.get(name) or "") for name in ("caption", "source", "licence")}
        if any(len(said[name]) > LICENCE_LIMIT for name in ("source", "licence")):
            raise ValueError(f"source and licence have at most {LICENCE_LIMIT} characters")
        if not any(said.values()) and entry.get("caption") is None:
            raise ValueError("neither a caption nor a licence")
        caption = said["caption"] if entry.get("caption") is not None else None
        return cls(caption, " ".join(said["source"].split()), " ".join(said["licence"].split()))


def find_clips(folder: Path, *, unlicensed: bool = False) -> tuple[list[Item], list[Skip]]:
    """All videos with usable captions, sorted by name, and what was skipped.

    `unlicensed` takes clips without a licence too.
    """
    skips: list[Skip] = []
    items: dict[str, Item] = {}
    listed = dict(_listed(folder, skips))
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or any(part.startswith(".") for part in name.split("/")):
            continue
        if path.suffix.lower() == ".tar":
            items |= {item.name: item for item in _tar_items(path, name, skips)}
        elif path.suffix.lower() not in OTHER_SUFFIXES:
            try:
                said = listed.pop(name, Words())
                caption = _beside(path) if said.caption is None else clean(said.caption)
                items[name] = Item(name, path, caption, said.source, said.licence)
            except Bad as bad:
                skips.append(_skip_file(path, name, bad))
    skips += [Skip(name, "clip.missing") for name in listed]
    found = [items[name] for name in sorted(items)]
    if unlicensed:
        return found, skips
    skips += [Skip(item.name, "clip.licence") for item in found if not item.licence]
    return [item for item in found if item.licence], skips


def _skip_file(path: Path, name: str, bad: Bad) -> Skip:
    """A stray file without caption is no video without caption."""
    if bad.code == "caption.missing" and path.suffix.lower() not in VIDEO_SUFFIXES | IMAGE_SUFFIXES:
        return Skip(name, "clip.not-video", f"suffix {path.suffix or 'none'}, no caption")
    return Skip(name, bad.code, bad.detail)


def clean(raw: bytes | str) -> str:
    """A caption as one line of text. Raises `Bad` when it is empty, not UTF-8 or too long."""
    if isinstance(raw, str):
        raw = raw.encode("utf-8", "surrogatepass")
    if len(raw) > CAPTION_LIMIT:
        raise Bad("caption.too-long", f"{len(raw)} bytes, at most {CAPTION_LIMIT}")
    try:
        text = " ".join(raw.decode("utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise Bad("caption.encoding", f"byte {error.start}") from error
    if not text:
        raise Bad("caption.empty")
    return text


def _beside(path: Path) -> str:
    text = path.with_suffix(".txt")
    if not text.is_file():
        raise Bad("caption.missing")
    with text.open("rb") as file:
        raw = file.read(CAPTION_LIMIT + 1)
    if len(raw) > CAPTION_LIMIT:
        raise Bad("caption.too-long", f"{text.stat().st_size} bytes, at most {CAPTION_LIMIT}")
    return clean(raw)


def _listed(folder: Path, skips: list[Skip]) -> Iterator[tuple[str, Words]]:
    """Video name and words of every line of the two list files."""
    for name, parse in (("captions.jsonl", _json_lines), ("captions.csv", _csv_lines)):
        path = folder / name
        if not path.is_file():
            continue
        if path.stat().st_size > LIST_LIMIT:
            skips.append(Skip(name, "caption.list", "larger than 1 GiB"))
            continue
        for number, found in parse(path.read_bytes()):
            place = f"{name}:{number}"
            if isinstance(found, Bad):
                skips.append(Skip(place, found.code, found.detail))
                continue
            video, words = found
            if not video or video.startswith("/") or ".." in video.split("/"):
                skips.append(Skip(place, "clip.missing", video[:100]))
            else:
                yield video.removeprefix("./"), words


Line = tuple[int, tuple[str, Words] | Bad]


def _json_lines(raw: bytes) -> Iterator[Line]:
    for number, line in enumerate(raw.splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line.decode("utf-8-sig"))
            yield number, (_text(entry["video"]), Words.of(entry))
        except UnicodeDecodeError as error:
            yield number, Bad("caption.encoding", f"byte {error.start}")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            yield number, Bad("caption.list", str(error)[:100])


def _csv_lines(raw: bytes) -> Iterator[Line]:
    try:
        reader = csv.DictReader(io.StringIO(raw.decode("utf-8-sig"), newline=""), strict=True)
        for entry in reader:
            try:
                yield reader.line_num, (_text(entry["video"]), Words.of(entry))
            except (KeyError, TypeError, ValueError) as error:
                yield reader.line_num, Bad("caption.list", str(error)[:100])
    except UnicodeDecodeError as error:
        yield raw[: error.start].count(b"\n") + 1, Bad("caption.encoding", f"byte {error.start}")
    except csv.Error as error:
        yield reader.line_num, Bad("caption.list", str(error)[:100])


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("what a line says must be text")
    return value


def _tar_items(path: Path, name: str, skips: list[Skip]) -> Iterator[Item]:
    """The videos of a WebDataset tar: members of one key, told apart by what follows its dot."""
    members: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, _, file = member.name.rpartition("/")
                key, dot, suffix = file.partition(".")
                if member.isfile() and dot and key:
                    key = f"{folder}/{key}" if folder else key
                    members.setdefault(key, {})[f".{suffix.lower()}"] = member
    except (tarfile.TarError, OSError, ValueError) as error:
        skips.append(Skip(name, "clip.truncated", f"tar: {error}"[:100]))
    with path.open("rb") as source:
        for key, parts in sorted(members.items()):
            for suffix in sorted(VIDEO_SUFFIXES & parts.keys() or IMAGE_SUFFIXES & parts.keys()):
                video, place = parts[suffix], f"{name}/{key}{suffix}"
                try:
                    if video.size > MEMBER_LIMIT:
                        raise Bad("clip.truncated", "larger than 4 GiB inside a tar")
                    caption, said = _tar_words(source, parts)
                    yield Item(
                        place,
                        path,
                        caption,
                        said.source,
                        said.licence,
                        video.offset_data,
                        video.size,
                    )
                except Bad as bad:
                    skips.append(Skip(place, bad.code, bad.detail))


def _tar_words(file: BinaryIO, parts: dict[str, tarfile.TarInfo]) -> tuple[str, Words]:
    """Caption and the rest: from `key.json`, where a `key.txt` wins for the caption."""
    said, raw = Words(), None
    if ".json" in parts:
        if parts[".json"].size > 1 << 20:
            raise Bad("caption.too-long", f"{parts['.json'].size} bytes")
        try:
            said = Words.of(json.loads(_member(file, parts[".json"])))
        except UnicodeDecodeError as error:
            raise Bad("caption.encoding", f"byte {error.start}") from error
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise Bad("caption.missing", f"json: {error}"[:100]) from error
    if ".txt" in parts:
        if parts[".txt"].size > CAPTION_LIMIT:
            raise Bad("caption.too-long", f"{parts['.txt'].size} bytes")
        raw = _member(file, parts[".txt"])
    caption = raw if raw is not None else said.caption
    if caption is None:
        raise Bad("caption.missing")
    return clean(caption), said


def _member(file: BinaryIO, part: tarfile.TarInfo) -> bytes:
    file.seek(part.offset_data)
    return file.read(part.size)

"""A release folder on disk: files digested as streams, then judged by `paris_protocol.release`.

Tensor files are read behind the strict gate and mapped, never loaded.

Links and special files are refused like files that nobody signed; a statement that is larger than
its type allows is refused before it is read::

    verified = verify_folder(Path("release"), network=None)
    verified.release.record.number
    file_root([Path("release/expert_0/diffusion_pytorch_model.safetensors")])
"""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final

from paris_protocol.envelope import network_id
from paris_protocol.errors import ParisError
from paris_protocol.gate import check_header, header_length
from paris_protocol.invite import Invite, parse_network
from paris_protocol.release import (
    MAX_PROOF,
    PROOF,
    RELEASE,
    Verified,
    is_provenance,
    verify_release,
)
from paris_protocol.tensors import Item, tensor_root

CHUNK: Final = 1 << 20
MAX_STATEMENT: Final = 16 << 20
Progress = Callable[[int, int], None] | None


def named_network(text: str | None) -> str | None:
    """The id that a user means: an id, an invite or a genesis file; None stays None."""
    if text is None or re.fullmatch(r"[0-9a-f]{64}", text, re.ASCII):
        return text
    named = parse_network(text)
    if isinstance(named, Invite):
        return named.network
    try:
        return network_id(Path(named).read_bytes())
    except OSError as error:
        raise ParisError("network.invite", str(error)) from error


def verify_folder(folder: Path, network: str | None = None, progress: Progress = None) -> Verified:
    """Check a release folder offline, whole. Raises the `release.*` code that names the file.

    `network` is the id that is expected; `progress(done, total)` counts bytes.
    """
    if not (folder / RELEASE).is_file():
        raise ParisError("release.none", str(folder))
    paths = dict(_files(folder))
    total = sum(path.lstat().st_size for path in paths.values())
    files: dict[str, tuple[str, int]] = {}
    provenance: dict[str, bytes] = {}
    done = 0
    for name, path in paths.items():
        if is_provenance(name):
            provenance[name] = _statement(name, path)
        digest, size = hash_file(path)
        files[name] = (digest, size)
        done += size
        if progress is not None:
            progress(done, total)
    return verify_release(files, provenance, network)


def hash_file(path: Path) -> tuple[str, int]:
    """SHA-256 (hex) and size in bytes, read as a stream."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return digest.hexdigest(), size


def file_root(paths: Iterable[Path]) -> str:
    """The Merkle root (hex) over the tensors of one or more safetensors files; copies nothing.

    `tensor.header` for a file that does not pass the gate, or a tensor that stands in two files.
    """
    return tensor_root(item for path in paths for item in _tensors(path))


def _tensors(path: Path) -> Iterator[Item]:
    with path.open("rb") as file:
        size = path.stat().st_size
        first = file.read(8)
        header = check_header(first + file.read(header_length(first, size)), size)
        with (
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
            memoryview(mapped) as whole,
        ):
            for name, (dtype, shape, begin, end) in header.tensors.items():
                with whole[header.data_start + begin : header.data_start + end] as part:
                    yield name, dtype, shape, part


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """(path inside the folder, path) of every file, sorted; links and devices are refused."""
    for root, folders, names in os.walk(folder):
        folders.sort()
        for name in [*folders, *sorted(names)]:
            path = Path(root) / name
            mode = path.lstat().st_mode
            inside = path.relative_to(folder).as_posix()
            if stat.S_ISREG(mode):
                yield inside, path
            elif not stat.S_ISDIR(mode):
                raise ParisError("release.extra", f"{inside} is no plain file")


def _statement(name: str, path: Path) -> bytes:
    limit = MAX_PROOF if name == PROOF else MAX_STATEMENT
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ParisError("release.file", f"{name} is larger than a statement may be")
    return data

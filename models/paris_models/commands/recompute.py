"""Merges done again by anybody, from the signed statements and the blobs that they name.

Every merge and revert of a lineage is repeated tensor by tensor and must have the tensor root that
was signed, and so must the running average that a merge names. Blobs come from folders (a blob
store, or files `<id>.blob`) or over HTTP from whoever serves a coordinator's `/v1/blobs`, and are
believed for their digest alone. A head or average that nobody has any more is made again from its
own merge. What cannot be had is named (`merge.input-gone`) and the step is "not recomputable",
never verified::

    blobs = Blobs(["demo/blobs", "https://train.example.org"], scratch)
    for found in recompute(steps, blobs, scratch):
        found.same, found.missing
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from paris_models.commands.pull import CHUNK, TRIES, HttpSource
from paris_models.ema import average_files
from paris_models.merge import Input, merge_files, revert_files
from paris_protocol.averages import released
from paris_protocol.blobs import Manifest, manifest_limit
from paris_protocol.errors import ParisError
from paris_protocol.evidence import parts_of
from paris_protocol.net.folder import file_root
from paris_protocol.records import BlobRef, Head, Merge, MergeInput, Revert, TensorFile

Step: TypeAlias = Merge | Revert
Progress = Callable[[int, int], None] | None
LAYOUTS: Final = ("{}.blob", "blobs/{}.blob", "store/blobs/{}.blob")
"""Where a folder may hold a blob: plainly, as a blob store, as a coordinator's state folder."""


class Blobs:
    """Verified files of blobs, looked for in each place in turn.

    `scratch` takes what comes over the network; `kept` says how long the policy keeps inputs.
    """

    def __init__(self, places: Sequence[str], scratch: Path, kept: int = 0) -> None:
        self._folders = [Path(place) for place in places if not _is_url(place)]
        self._urls = {place: HttpSource(place) for place in places if _is_url(place)}
        self._places, self._scratch, self._kept = list(places), scratch, kept

    def path(self, ref: BlobRef, what: str) -> Path:
        """The file of a blob; ParisError("merge.input-gone") names it and where it was looked for.

        `what` says what the blob is, for instance "the update of 3f2a…".
        """
        for folder in self._folders:
            for layout in LAYOUTS:
                path = folder / layout.format(ref.id)
                if path.is_file() and _is_blob(path, ref):
                    return path
        fetched = self._scratch / f"{ref.id}.blob"
        if fetched.exists():
            return fetched
        troubles = []
        for place, source in self._urls.items():
            try:
                _fetch(source, ref, fetched)
            except ParisError as error:
                fetched.unlink(missing_ok=True)
                if error.code == "disk.full":
                    raise
                troubles.append(f"{place}: {error.sentence}")
            else:
                return fetched
        looked = ", ".join(self._places) or "nowhere: name a folder or an address"
        kept = f"; inputs are kept for {self._kept} s" if self._kept else ""
        detail = f"{what}, blob {ref.id}; looked in {looked}{kept}"
        raise ParisError("merge.input-gone", "; ".join([detail, *troubles])[:1000])

    def done_with(self, path: Path) -> None:
        """Lets go of a file that was fetched; a folder's own files stay."""
        if path.parent == self._scratch and path.suffix == ".blob":
            path.unlink(missing_ok=True)


def _is_url(place: str) -> bool:
    return place.lower().startswith(("http://", "https://"))


def _is_blob(path: Path, ref: BlobRef) -> bool:
    if path.stat().st_size != ref.size:
        return False
    with path.open("rb") as file:
        return Manifest.build(iter(lambda: file.read(CHUNK), b"")).id == ref.id


def _fetch(source: HttpSource, ref: BlobRef, out: Path) -> None:
    """A blob by manifest and pieces, each piece checked; goes on where a connection broke off."""
    raw = bytearray()
    for chunk in source.read(f"v1/blobs/{ref.id}/manifest", 0):
        raw += chunk
        if len(raw) > manifest_limit(ref.size):
            raise ParisError("blob.too-large", f"manifest of {ref.id[:12]}")
    manifest = Manifest.parse(bytes(raw), ref)
    with out.open("wb") as file:
        for attempt in range(1, TRIES + 1):
            try:
                for i, piece in _pieces(source, manifest, file.tell()):
                    manifest.check_piece(i, piece)
                    file.write(piece)
                break
            except ParisError as error:
                if error.code != "network.down" or attempt == TRIES:
                    raise
    if out.stat().st_size != ref.size:
        raise ParisError("network.down", f"{ref.id[:12]} came incomplete")


def _pieces(source: HttpSource, manifest: Manifest, begin: int) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of the pieces from offset `begin` on, whatever the chunks' sizes."""
    number, held = begin // manifest.piece, bytearray()
    if begin >= manifest.size:
        return
    for chunk in source.read(f"v1/blobs/{manifest.id}", begin):
        held += chunk
        while number < len(manifest.pieces):
            length = manifest.piece_range(number)[1]
            if len(held) < length:
                break
            yield number, bytes(held[:length])
            del held[:length]
            number += 1
        if number == len(manifest.pieces):
            return


@dataclass(frozen=True, slots=True)
class Recomputed:
    """A step of a lineage done again: the root that was signed and the one that came out.

    `average` and `average_root` are the same of the running average: empty where there is none, and
    no root comes out where that of the head is another. `missing` names what could not be had;
    there is no root then.
    """

    id: str
    kind: str
    expert: int
    round: int
    inputs: int
    stated: str
    root: str = ""
    missing: str = ""
    average: str = ""
    average_root: str = ""

    @property
    def same(self) -> bool:
        """Whether the step is what was signed."""
        return (self.root, self.average_root) == (self.stated, self.average)


class Recomputer:
    """Does steps of a lineage again; heads that came out right serve as parents of the next."""

    def __init__(
        self,
        steps: Mapping[str, Step],
        blobs: Blobs,
        scratch: Path,
        progress: Progress = None,
    ) -> None:
        self._steps, self._blobs = steps, blobs
        self._scratch, self._progress = scratch, progress
        self._made: dict[str, Path] = {}

    def step(self, id: str) -> Recomputed:
        """One merge or revert again; `merge.input-gone` becomes `missing`."""
        record = self._steps[id]
        stated = record.average if isinstance(record, Merge) else None
        out = self._scratch / f"{id}.safetensors"
        second = self._scratch / f"{id}-average.safetensors"
        root = average = missing = ""
        try:
            root = self._run(record, out)
            if isinstance(record, Merge) and stated is not None and root == record.result.root:
                average = self._average(record, out, second)
        except ParisError as error:
            out.unlink(missing_ok=True)
            if error.code != "merge.input-gone":
                raise
            root, missing = "", error.detail
        for path, made, signed in ((out, root, record.result), (second, average, stated)):
            if made and signed is not None and made == signed.root:
                self._made[made] = path
            else:
                path.unlink(missing_ok=True)
        return Recomputed(
            id=id,
            kind=record.TYPE,
            expert=record.expert,
            round=record.parent.round,
            inputs=len(parts_of(record)),
            stated=record.result.root,
            root=root,
            missing=missing,
            average="" if stated is None else stated.root,
            average_root=average,
        )

    def forget(self, root: str) -> None:
        """A head or average that no further step needs."""
        path = self._made.pop(root, None)
        if path is not None:
            path.unlink(missing_ok=True)

    def _run(self, record: Step, out: Path) -> str:
        parts = parts_of(record)
        parent = self._made_or_had(record.parent, record.expert, record.parent.weights)
        inputs: list[Input] = []
        try:
            for part in parts:
                path = self._update(part)
                inputs.append((path, float.fromhex(part.weight), float.fromhex(part.scale)))
            run = merge_files if isinstance(record, Merge) else revert_files
            run(parent, inputs, out, progress=self._progress)
        except ValueError as error:  # signed inputs that do not fit: nobody can have merged them
            raise ParisError("check.failed", f"{record.TYPE}: {error}") from error
        finally:
            for path, _, _ in inputs:
                self._blobs.done_with(path)
            if record.parent.merge is not None:  # all experts begin at the initial checkpoint
                self._blobs.done_with(parent)
        return file_root([out])

    def _average(self, record: Merge, head: Path, out: Path) -> str:
        """The running average after a merge whose head has just been made; its root."""
        before = released(record.parent, self._steps)
        path = self._made_or_had(record.parent, record.expert, before)
        try:
            average_files(path, head, float.fromhex(record.decay or ""), out)
        except ValueError as error:
            raise ParisError("check.failed", f"the average of a merge: {error}") from error
        finally:
            if record.parent.merge is not None:
                self._blobs.done_with(path)
        return file_root([out])

    def _update(self, part: MergeInput) -> Path:
        return self._file(part.update, f"the update of contribution {part.contribution}")

    def _file(self, named: TensorFile, what: str) -> Path:
        path = self._blobs.path(named.blob, what)
        if file_root([path]) != named.root:
            raise ParisError("check.failed", f"{what} does not have the signed tensor root")
        return path

    def _made_or_had(self, head: Head, expert: int, named: TensorFile) -> Path:
        """The file of a head or its average: made already, fetched, or made again by its merge."""
        if named.root in self._made:
            return self._made[named.root]
        average = "" if named == head.weights else "the average of "
        what = f"{average}head {head.round} of expert {expert}"
        if head.merge is None:
            what = "the initial checkpoint"
        try:
            return self._file(named, what)
        except ParisError as error:
            if error.code != "merge.input-gone" or head.merge is None:
                raise
            if head.merge not in self._steps:
                raise
        found = self.step(head.merge)
        if found.missing:
            raise ParisError("merge.input-gone", found.missing)
        if not found.same:
            raise ParisError("check.failed", f"{found.kind} {head.merge} is not what was signed")
        return self._made[named.root]


def recompute(
    steps: Mapping[str, Step], blobs: Blobs, scratch: Path, progress: Progress = None
) -> Iterator[Recomputed]:
    """Every step of every lineage again, each after its parent; `steps` by statement id.

    What hangs on a step that cannot be recomputed is tried from its own parent head. `progress`
    counts the tensors of each merge.
    """
    worker = Recomputer(steps, blobs, scratch, progress)
    for id in in_order(steps):
        found = worker.step(id)
        yield found
        record = steps[id]
        published = not isinstance(record, Merge) or record.published
        # What moves a head is the last step on it; what was not published has no children.
        worker.forget(record.parent.weights.root if published else record.result.root)
        if published:
            worker.forget(released(record.parent, steps).root)


def in_order(steps: Mapping[str, Step]) -> list[str]:
    """Ids by expert, each after the step that its parent came from."""
    children: dict[str | None, list[str]] = {}
    for id in sorted(steps, key=lambda id: (steps[id].expert, steps[id].at, id)):
        parent = steps[id].parent.merge
        children.setdefault(parent if parent in steps else None, []).append(id)
    ordered: list[str] = []
    waiting = children.get(None, [])[::-1]
    while waiting:
        id = waiting.pop()
        ordered.append(id)
        waiting += children.get(id, [])[::-1]
    return ordered

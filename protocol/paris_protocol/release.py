"""A release folder judged offline, from digests and statements alone: no file is opened here.

`files` holds path → (SHA-256, size) of everything in the folder, `provenance` the bytes of the
statements in it (`is_provenance`). Refused, naming the file: what is not byte for byte as signed,
missing or extra (`release.file`, `.missing`, `.extra`), unknown keys (`release.key`), heads that do
not descend from the genesis (`release.lineage`), audit draws that do not follow (`audit.draw`),
statements not shown to be logged (`release.proof`)::

    files = {path: (sha256, size), ...}             # whoever owns the disk streams the digests
    provenance = {path: data for path in files if is_provenance(path)}
    verified = verify_release(files, provenance, network=None)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from paris_protocol.authority import Authority, check_next, of_coordinator
from paris_protocol.canonical import canonical, parse, sha256_hex
from paris_protocol.draws import check_verdict
from paris_protocol.envelope import Sealed, open_genesis, unseal, unseal_any
from paris_protocol.errors import ParisError
from paris_protocol.lineage import EVIDENCE, check_release_lineage
from paris_protocol.log import Checkpoint, Tree, leaf_hash, origin, verify_inclusion
from paris_protocol.records import (
    AuditReport,
    Challenge,
    Commitment,
    Contribution,
    Genesis,
    Head,
    Merge,
    Opening,
    Policy,
    Release,
    Revert,
    Verdict,
)
from paris_protocol.signers import keys_of, may_sign
from paris_protocol.witness import check_quorum, without_cosignatures

RELEASE: Final = "release.json"
PROOF: Final = "proof.json"
GENESIS: Final = "genesis.json"
UNLISTED: Final = frozenset({RELEASE, PROOF})
"""A statement cannot list itself, nor the proof that it was logged."""
_POLICY: Final = re.compile(r"policy/([1-9][0-9]{0,8})\.json", re.ASCII)
_LINEAGE: Final = re.compile(r"lineage/([0-9a-f]{64})\.json", re.ASCII)
_HEX: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)
MAX_PROOF: Final = 256 << 20


@dataclass(frozen=True, slots=True)
class Verified:
    """What a verified release proves: the statements it rests on, opened."""

    genesis: Sealed[Genesis]
    policies: tuple[Sealed[Policy], ...]
    release: Sealed[Release]
    lineage: Mapping[str, Sealed[Any]]
    checkpoint: Checkpoint

    @property
    def network(self) -> str:
        """The id of the network that made the release."""
        return self.genesis.id

    @property
    def merges(self) -> int:
        """Number of merge statements behind the heads."""
        return sum(isinstance(each.record, Merge) for each in self.lineage.values())


def is_provenance(path: str) -> bool:
    """Whether `verify_release` wants the bytes of this file of a release, not only its digest."""
    return (
        path in (RELEASE, PROOF, GENESIS)
        or _POLICY.fullmatch(path) is not None
        or _LINEAGE.fullmatch(path) is not None
    )


def verify_release(
    files: Mapping[str, tuple[str, int]],
    provenance: Mapping[str, bytes],
    network: str | None = None,
) -> Verified:
    """Check everything about a release that can be checked without a network.

    Genesis → release statement → every file → root key → policies → coordinator keys → lineage →
    log proof. `network` is the id that the user expects; `network.mismatch` if it is another.
    """
    if RELEASE not in files:
        raise ParisError("release.none", f"{RELEASE} is missing")
    for path in (GENESIS, PROOF):
        if path not in files:
            raise ParisError("release.missing", path)
    for path in files:
        if is_provenance(path) and path not in provenance:
            raise ParisError("release.missing", f"{path} was not read")
    for path, data in provenance.items():
        if files.get(path, ("", 0))[0] != sha256_hex(data):
            raise ParisError("release.file", f"{path} changed while it was read")
    with _named(GENESIS):
        genesis = open_genesis(provenance[GENESIS])
    if network is not None and genesis.id != network:
        raise ParisError("network.mismatch", f"the release is of {genesis.id}")
    # Before anybody asks whose signature it is, it tells which files belong to the folder.
    with _named(RELEASE):
        release = unseal(provenance[RELEASE], Release, genesis.id, None)
    _check_files(release.record, files)
    policies = open_policies(genesis, provenance)
    if release.signer not in keys_of(genesis, policies, policies[-1].record.number):
        raise ParisError("release.key", f"{RELEASE} is signed by {release.signer}")
    lineage = _open_lineage(genesis, policies, provenance)
    try:
        check_release_lineage(genesis.record, release.record, lineage.values())
    except ParisError as error:
        raise ParisError("release.lineage", error.sentence) from error
    _check_draws(policies, lineage)
    checkpoint = _check_proof(provenance[PROOF], genesis, policies, release, lineage)
    return Verified(genesis, policies, release, lineage, checkpoint)


@contextmanager
def _named(path: str) -> Iterator[None]:
    """Turn a refused statement into a refused file of the release."""
    try:
        yield
    except ParisError as error:
        code = "release.key" if error.code == "record.signer" else "release.file"
        raise ParisError(code, f"{path}: {error.sentence}") from error


def open_policies(
    genesis: Sealed[Genesis], provenance: Mapping[str, bytes]
) -> tuple[Sealed[Policy], ...]:
    """The chain of policies from number 1 on.

    Each names its predecessor and is signed by the root key or a key that the predecessor names;
    keys and witnesses change by the root key's word alone.
    """
    numbers = sorted(int(m[1]) for m in map(_POLICY.fullmatch, provenance) if m is not None)
    chain: list[Sealed[Policy]] = []
    for number in range(1, max(numbers, default=1) + 1):
        path = f"policy/{number}.json"
        if path not in provenance:
            raise ParisError("release.missing", path)
        with _named(path):
            policy = unseal(
                provenance[path], Policy, genesis.id, keys_of(genesis, chain, number - 1)
            )
        previous = chain[-1].id if chain else None
        if (policy.record.number, policy.record.previous) != (number, previous):
            raise ParisError("release.file", f"{path} is not the next policy")
        with _named(path):
            check_next(genesis, chain[-1] if chain else None, policy)
        chain.append(policy)
    return tuple(chain)


def _check_files(release: Release, files: Mapping[str, tuple[str, int]]) -> None:
    """Every listed file is there as listed, and no other."""
    listed = {entry.path: (entry.sha256, entry.size) for entry in release.files}
    if len(listed) != len(release.files) or not UNLISTED.isdisjoint(listed):
        raise ParisError("release.file", f"{RELEASE} lists a file twice, or itself")
    for path in sorted(listed.keys() | (files.keys() - UNLISTED)):
        if path not in files:
            raise ParisError("release.missing", path)
        if path not in listed:
            raise ParisError("release.extra", path)
        if files[path] != listed[path]:
            raise ParisError("release.file", path)


def _open_lineage(
    genesis: Sealed[Genesis],
    policies: Sequence[Sealed[Policy]],
    provenance: Mapping[str, bytes],
) -> dict[str, Sealed[Any]]:
    """Open lineage/*.json, each signed by whom its kind demands."""
    opened: dict[str, Sealed[Any]] = {}
    for path in sorted(provenance):
        match = _LINEAGE.fullmatch(path)
        if match is None:
            continue
        with _named(path):
            sealed = unseal_any(provenance[path], genesis.id)
            if not isinstance(sealed.record, EVIDENCE):
                raise ParisError("record.type", sealed.record.TYPE)
            if not may_sign(genesis, policies, sealed):
                raise ParisError("record.signer", f"{sealed.record.TYPE} {sealed.id[:12]}")
        if sealed.id != match[1]:
            raise ParisError("release.file", f"{path} holds another statement")
        opened[sealed.id] = sealed
    return opened


def _check_draws(policies: Sequence[Sealed[Policy]], lineage: Mapping[str, Sealed[Any]]) -> None:
    """Every verdict's audit draw, as far as a release shows it: `audit.draw`."""
    numbered = {each.record.number: each.record for each in policies}
    records = {id: each.record for id, each in lineage.items()}
    reports = {id: each for id, each in records.items() if isinstance(each, AuditReport)}
    for verdict in records.values():
        if isinstance(verdict, Verdict) and verdict.assignment in records:
            assignment = records[verdict.assignment]
            if assignment.policy not in numbered:
                raise ParisError("release.missing", f"policy/{assignment.policy}.json")
            check_verdict(verdict, assignment, numbered[assignment.policy], reports)


def _check_proof(
    raw: bytes,
    genesis: Sealed[Genesis],
    policies: Sequence[Sealed[Policy]],
    release: Sealed[Release],
    lineage: Mapping[str, Sealed[Any]],
) -> Checkpoint:
    """That the log holds the release and its lineage, in an order that can be true."""
    note, indices, paths = _parse_proof(raw)
    checkpoint = _open_note(note, genesis, policies)
    needed = {release.id, *lineage}
    if not needed <= indices.keys() <= {*needed, genesis.id, *(policy.id for policy in policies)}:
        raise ParisError("release.proof", f"{PROOF} is not about the statements of this release")
    for id, index in indices.items():
        leaf = leaf_hash(bytes.fromhex(id))
        if not verify_inclusion(leaf, index, checkpoint.size, paths[id], checkpoint.root):
            raise ParisError("release.proof", f"{PROOF}: {id} is not in the log")
    for verdict in (sealed.record for sealed in lineage.values()):
        if isinstance(verdict, Verdict) and verdict.audit and verdict.contribution in lineage:
            commitment = lineage[verdict.contribution].record.commitment
            if indices.get(commitment) != verdict.audit.size - 1:
                raise ParisError("audit.draw", f"the commitment of {verdict.contribution[:12]}")
    _check_signers(genesis, policies, [release, *lineage.values()], indices)
    for before, after in _order(release, lineage):
        if indices.get(before, checkpoint.size) >= indices[after]:
            raise ParisError("release.proof", f"{PROOF}: {before} was not logged before {after}")
    return checkpoint


def _open_note(
    note: str, genesis: Sealed[Genesis], policies: Sequence[Sealed[Policy]]
) -> Checkpoint:
    """The checkpoint of a proof: signed by the log, and by enough of the policy's witnesses."""
    policy = policies[-1].record
    signers = keys_of(genesis, policies, policy.number)
    try:
        checkpoint = Checkpoint.open(note, origin(genesis.id), signers)
        check_quorum(note, policy.witnesses, policy.witness_quorum)
        # Whatever else stood below the note, nobody would have signed.
        if note != without_cosignatures(note, policy.witnesses):
            raise ParisError("log.checkpoint", "signatures that nobody asked for")
    except ParisError as error:
        code = error.code if error.code == "log.witness" else "release.proof"
        raise ParisError(code, f"{PROOF}: {error.sentence}") from error
    return checkpoint


def _check_signers(
    genesis: Sealed[Genesis],
    policies: Sequence[Sealed[Policy]],
    statements: Iterable[Sealed[Any]],
    indices: Mapping[str, int],
) -> None:
    """That what the coordinator signed, it signed with a key that was in force by then."""
    if len(policies) == 1:
        return  # the one policy's keys, which the statements were checked against
    try:
        authority = Authority(genesis, policies, indices)
        for sealed in statements:
            if of_coordinator(sealed.record):
                authority.check(sealed, indices[sealed.id])
    except ParisError as error:
        code = "release.key" if error.code == "record.signer" else "release.proof"
        raise ParisError(code, f"{PROOF}: {error.sentence}") from error


def _parse_proof(raw: bytes) -> tuple[str, dict[str, int], dict[str, list[bytes]]]:
    """Checkpoint, indices and audit paths of a proof file in its one canonical form."""
    with _named(PROOF):
        if len(raw) > MAX_PROOF:
            raise ParisError("record.too-large", f"{len(raw)} bytes")
        value = parse(raw)
        if not isinstance(value, dict) or set(value) != {"checkpoint", "indices", "proofs"}:
            raise ParisError("record.malformed", "other fields")
        note, indices, proofs = value["checkpoint"], value["indices"], value["proofs"]
        if not isinstance(note, str):
            raise ParisError("record.malformed", "a checkpoint expected")
        if not isinstance(indices, dict) or not isinstance(proofs, dict):
            raise ParisError("record.malformed", "indices and proofs by statement")
        if indices.keys() != proofs.keys() or not all(map(_HEX.fullmatch, indices)):
            raise ParisError("record.malformed", "indices and proofs of different statements")
        if not all(type(index) is int for index in indices.values()):
            raise ParisError("record.malformed", "an index that is no number")
        return note, indices, {id: _hashes(path) for id, path in proofs.items()}


def _hashes(path: object) -> list[bytes]:
    if not isinstance(path, list):
        raise ParisError("record.malformed", "a proof is a list")
    if not all(isinstance(part, str) and _HEX.fullmatch(part) for part in path):
        raise ParisError("record.malformed", "a proof is a list of digests")
    return [bytes.fromhex(part) for part in path]


def _order(
    release: Sealed[Release], lineage: Mapping[str, Sealed[Any]]
) -> Iterator[tuple[str, str]]:
    """Pairs of statements of which the first must have been logged before the second."""
    for id, sealed in lineage.items():
        match sealed.record:
            case Commitment(assignment=assignment):
                yield assignment, id
            case Contribution(commitment=commitment):
                yield commitment, id
            case Challenge(contribution=contribution):
                yield contribution, id
            case Opening(challenge=challenge):
                yield challenge, id
            case AuditReport(contribution=contribution):
                yield contribution, id
            case Verdict(contribution=contribution, reports=reports):
                yield from ((before, id) for before in (contribution, *reports))
            case Merge(inputs=inputs):
                yield from ((each.contribution, id) for each in inputs)
                yield id, release.id
            case Revert(revocation=revocation, parent=Head(merge=str(parent))):
                yield from ((before, id) for before in (revocation, parent))
                yield id, release.id


# ---------------------------------------------------------------- for those who write releases


def provenance_files(
    genesis: Sealed[Genesis],
    policies: Sequence[Sealed[Policy]],
    lineage: Iterable[Sealed[Any]],
) -> dict[str, bytes]:
    """Path → bytes of the statements that a release lists, in the order of writing."""
    numbered = sorted(policies, key=lambda policy: policy.record.number)
    table = {GENESIS: genesis.raw}
    table |= {f"policy/{policy.record.number}.json": policy.raw for policy in numbered}
    table |= {f"lineage/{sealed.id}.json": sealed.raw for sealed in lineage}
    return table


def proof_file(note: str, tree: Tree, size: int, indices: Mapping[str, int]) -> bytes:
    """The bytes of proof.json: a checkpoint of `size` entries, and a proof for each statement."""
    return canonical(
        {
            "checkpoint": note,
            "indices": dict(indices),
            "proofs": {
                id: [part.hex() for part in tree.inclusion(index, size)]
                for id, index in indices.items()
            },
        }
    )

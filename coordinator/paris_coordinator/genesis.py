"""`init`: a prepared folder becomes a network: signed genesis, first policy, ledger, store, log.

Every file passes the strict gate, gets its tensor root, and goes into the store; held-out clips go
into `private/` and nowhere else. `settings.json` is written last: a folder is a network wholly or
not at all, and a broken `init` can be repeated. Refused: a folder that holds a network already
(`state.other-network`), prepared files that are damaged (`tensor.header`, `recipe.invalid`)::

    invite = init(Path("prepared"), Path("state"), Setup(address="train.example.org"), now)
    print(invite)          # paris://train.example.org:8420/3f…
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

from pydantic import ValidationError

from paris_coordinator import planning
from paris_coordinator.auditing import chain_start
from paris_coordinator.config import Settings, State
from paris_coordinator.ledger import STATEMENT, Entry, Envelope, Ledger
from paris_coordinator.projector import Projector
from paris_protocol.audit import CHAIN_LENGTH, chain_head
from paris_protocol.envelope import SELF, Sealed, seal
from paris_protocol.errors import ParisError
from paris_protocol.gate import Header, Schema, check_header, header_length
from paris_protocol.invite import Invite, is_loopback, make_invite
from paris_protocol.keys import PrivateKey, load_key, peer_id, save_key
from paris_protocol.net.store import BlobStore, disk_errors, write_atomic
from paris_protocol.records import Genesis, Policy, TensorFile
from paris_protocol.tensors import Item, tensor_root

Json = dict[str, Any]
R = TypeVar("R", Genesis, Policy)

FORMAT: Final = 1
FIRST_POLICY: Final[Json] = {
    "dtype": "float32",
    "threads": 1,
    "kernels": "reference",
    "update_codec": "dense-f32",
    "commit_every": 50,
    "soft_deadline": 3600,
    "hard_deadline": 14400,
    "refusals_to_quarantine": 5,
    "min_version": "0.1.0",
}
AUDIT: Final[Json] = {
    "chain_length": CHAIN_LENGTH,
    "segments": 2,
    "rate": "10",
    "floor": "0.05",
    "probation": 10,
    "probation_weight": "0.25",
    "vesting": 20,
    "answer_within": 43_200,
    "retry_within": 43_200,
    "auditors": 0,
    "canary": "0.01",
    "tolerances": [],
}
"""Audit rules without their hash chain, which follows from the operator's key.

Home computers are off at night: whoever hands in and goes to bed must not fail an audit by it.
"""
MARGINS: Final[Json] = {
    "damage": ["0.02"],
    "merge_damage": "0.02",
    "standard_errors": "3",
    "clips": 256,
    "norm_high": "4",
    "norm_low": "0.1",
    "copy_cosine": "0.98",
    "noise_cosine": "-1",  # honest updates of mature heads point anywhere: measured or off
    "source": "defaults; not measured for this network",
    "looks": [64, 128],
}


@dataclass(frozen=True, slots=True)
class Setup:
    """What the operator says about a network: where it is, and what differs from the recipe."""

    address: str = "127.0.0.1"
    host: str = "127.0.0.1"
    port: int = 8420
    swarm_port: int | None = None
    name: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    prompts: tuple[str, ...] = ()
    samples_every: int = 900
    root_key: Path | None = None


def init(prepared: Path, folder: Path, setup: Setup, now: int) -> Invite:
    """Makes the network and returns its invite. `now` in unix seconds."""
    described = read_prepared(prepared)
    state = State(folder)
    if state.exists:
        raise ParisError("state.other-network", f"{folder} holds a network already")
    with disk_errors(folder):
        state.make()
        with state.lock():
            return _init(prepared, described, state, setup, now)


def _init(prepared: Path, described: Json, state: State, setup: Setup, now: int) -> Invite:
    if not state.key_file.exists():
        save_key(state.key_file, PrivateKey.generate())
    key = load_key(state.key_file)
    root = _root_key(setup, key)
    shelf = Shelf(prepared, BlobStore(state.store))
    genesis = seal(_genesis(described, shelf, setup, root, now), root, SELF)
    policy = seal(_policy(described, setup, key, now), root, genesis.id)
    for kind in ("validation", "audit"):
        for cluster in described["clusters"]:
            source = shelf.path(cluster[kind]["path"])
            _copy_private(source, state.private_shard(kind, cluster["index"]))
    _keep_origins(described, genesis.record, shelf, state)
    write_atomic(state.genesis_file, genesis.raw)
    write_atomic(state.policy / "1.json", policy.raw)
    _first_entries(state, key, genesis, policy, now)
    invite = make_invite(setup.address, setup.port, genesis.id)
    state.save(
        Settings(
            network=genesis.id,
            host=setup.host,
            port=setup.port,
            address=setup.address,
            swarm_port=_swarm_port(setup),
            samples_every=setup.samples_every,
            prompts=setup.prompts,
        )
    )
    return invite


def _root_key(setup: Setup, key: PrivateKey) -> PrivateKey:
    """The key that genesis and policies are signed with: the operator's own unless it is named."""
    if setup.root_key is None:
        return key
    if not setup.root_key.exists():
        save_key(setup.root_key, PrivateKey.generate())
    return load_key(setup.root_key)


def _first_entries(
    state: State, key: PrivateKey, genesis: Sealed[Genesis], policy: Sealed[Policy], now: int
) -> None:
    """Ledger and log begin with genesis and policy."""
    for leftover in state.folder.glob("ledger.sqlite*"):
        leftover.unlink()
    shutil.rmtree(state.log, ignore_errors=True)
    state.make()
    ledger = Ledger(state.ledger_file)
    both: list[Sealed[Any]] = [genesis, policy]
    envelopes = {s.id: Envelope(s.id, s.record.TYPE, s.signer, s.raw) for s in both}
    ledger.append([Entry(now, STATEMENT, envelope) for envelope in envelopes.values()])
    log = Projector(state.log, genesis.id, key)
    log.catch_up(ledger.logged)
    ledger.close()


def _keep_origins(described: Json, genesis: Genesis, shelf: Shelf, state: State) -> None:
    """Where every clip comes from, with the shard's blob instead of its file; held-out ones too.

    The table is the operator's alone. Folders of older versions have none.
    """
    table = shelf.folder / "private" / "provenance.jsonl"
    if not table.is_file():
        return
    blobs: dict[str, str] = {}
    for cluster, record in zip(described["clusters"], genesis.clusters, strict=True):
        for entry, shard in zip(cluster["shards"], record.shards, strict=True):
            blobs[entry["path"]] = shard.file.blob.id
    with table.open(encoding="ascii") as file:
        lines = [json.loads(line) for line in file]
    for line in lines:
        line["shard"] = blobs.get(line.pop("file"))
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    write_atomic(state.origins_file, text.encode(), 0o600)


# ---------------------------------------------------------------- the records


def _genesis(described: Json, shelf: Shelf, setup: Setup, root: PrivateKey, now: int) -> Genesis:
    same = ("geometry", "features", "expert", "recipe", "router", "sampler", "licences", "notes")
    value = {name: described[name] for name in same}
    value |= {
        "name": setup.name or described["name"],
        "created": now,
        "root_key": root.id,
        "codec": _encoder(described["codec"], shelf),
        "text": _encoder(described["text"], shelf),
        "initial": shelf.put(described["initial"]["path"], expert_schema(described["expert"])),
        "clusters": [
            {name: cluster[name] for name in ("index", "clips", "prior", "centroid")}
            | {"shards": [_shard(shard, shelf, described) for shard in cluster["shards"]]}
            for cluster in described["clusters"]
        ],
        "buckets": described.get("buckets", []),
    }
    return _valid(Genesis, value)


def _encoder(entry: Json, shelf: Shelf) -> Json:
    plain = {name: value for name, value in entry.items() if name != "path"}
    return plain | {"file": shelf.put(entry["path"]) if entry["path"] else None}


def _shard(entry: Json, shelf: Shelf, described: Json) -> Json:
    """A record of a shard that this folder's encoders made; `encoder.mismatch` for any other."""
    from paris_models.shards import check_encoders

    name = entry["path"]
    file = shelf.put(name)
    try:
        check_encoders(read_header(shelf.path(name)).metadata, described.get("encoders", {}))
    except ValueError as error:
        raise ParisError("encoder.mismatch", f"{name}: {error}") from error
    return {"file": file, "clips": entry["clips"], "bucket": entry.get("bucket", 0)}


def _policy(described: Json, setup: Setup, key: PrivateKey, now: int) -> Policy:
    """The first policy: defaults, then the recipe's fields, then the operator's."""
    invite = make_invite(setup.address, setup.port, "0" * 64)
    value = FIRST_POLICY | described["policy"]
    value |= {
        "number": 1,
        "previous": None,
        "since": now,
        "coordinator_keys": [key.id],
        "addresses": [invite.url],
        "bootstraps": [multiaddress(setup.address, _swarm_port(setup)) + f"/p2p/{peer_id(key.id)}"],
        "plan": described["plan"],
        "plans": described.get("plans", []),
        "margins": described["margins"] or MARGINS,
        "audit": AUDIT | described.get("audit", {}),
    }
    for name, changed in setup.overrides.items():
        both = isinstance(changed, dict) and isinstance(value.get(name), dict)
        value[name] = value[name] | changed if both else changed
    if value["audit"] is not None:
        start = chain_start(key.seed, value["number"])
        value["audit"] |= {"chain": chain_head(start, value["audit"]["chain_length"])}
    policy = _valid(Policy, value)
    planning.check(policy)
    return policy


def _swarm_port(setup: Setup) -> int:
    return setup.port + 1 if setup.swarm_port is None else setup.swarm_port


def multiaddress(host: str, port: int) -> str:
    """Where peers listen, in libp2p's spelling."""
    if host == "localhost" or is_loopback(host):
        return f"/ip4/127.0.0.1/tcp/{port}"
    bare = host.strip("[]")
    kind = "ip6" if ":" in bare else "ip4" if bare.replace(".", "").isdigit() else "dns"
    return f"/{kind}/{bare}/tcp/{port}"


def _valid(kind: type[R], value: Json) -> R:
    """The record, or ParisError("recipe.invalid") with the field's name."""
    try:
        return kind.model_validate_json(json.dumps(value))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ParisError("recipe.invalid", f"{kind.TYPE}.{where}: {first['msg']}") from error


# ---------------------------------------------------------------- the files


def read_prepared(folder: Path) -> Json:
    """`prepared.json` of a prepared folder, or ParisError("recipe.invalid")."""
    path = folder / "prepared.json"
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ParisError("recipe.invalid", f"there is no {path}; run prepare first") from None
    except ValueError as error:
        raise ParisError("recipe.invalid", f"{path}: {error}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ParisError("recipe.invalid", f"{path} is of another version")
    return found


class Shelf:
    """Takes files of the prepared folder into the store, each one once."""

    def __init__(self, folder: Path, store: BlobStore) -> None:
        self.folder, self._store = folder.resolve(), store

    def path(self, name: str) -> Path:
        """A file inside the prepared folder; anything else is refused."""
        path = (self.folder / name).resolve()
        if not path.is_relative_to(self.folder) or not path.is_file():
            raise ParisError("recipe.invalid", f"there is no {name} in {self.folder}")
        return path

    def put(self, name: str, schema: Schema | None = None) -> Json:
        """The TensorFile (as JSON) of a safetensors file, behind the strict gate."""
        path = self.path(name)
        root = file_root(path, schema)
        blob = self._store.add_file(path)
        self._store.pin(blob.id)
        return TensorFile(blob=blob, root=root).model_dump(mode="json")


def expert_schema(expert: Json) -> Schema:
    """Names, dtype and shapes of an expert's tensors, from its description."""
    from paris_models.config import ExpertConfig
    from paris_models.expert import parameter_shapes

    config = ExpertConfig(**{**expert, "rope_axes": tuple(expert["rope_axes"])})
    return {name: ("F32", shape) for name, shape in parameter_shapes(config).items()}


def read_header(path: Path, schema: Schema | None = None) -> Header:
    """The header of a safetensors file through the strict gate; ParisError("tensor.header")."""
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        return check_header(first + file.read(header_length(first, size)), size, schema)


def file_root(path: Path, schema: Schema | None = None) -> str:
    """The tensor root (hex) of a safetensors file; maps the file, copies nothing."""
    header = read_header(path, schema)
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped) as whole,
    ):
        return tensor_root(_items(header, whole))


def _items(header: Header, whole: memoryview) -> Iterator[Item]:
    start = header.data_start
    for name, (dtype, shape, begin, end) in header.tensors.items():
        with whole[start + begin : start + end] as part:
            yield name, dtype, shape, part


def _copy_private(source: Path, target: Path) -> None:
    """A copy, never a link: nothing of it may lie in a folder that is served or shared."""
    read_header(source)
    draft = target.with_name(f".{target.name}.new")
    try:
        shutil.copyfile(source, draft)
        draft.chmod(0o600)
        with draft.open("rb") as file:  # `settings.json` promises that it is there
            os.fsync(file.fileno())
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)

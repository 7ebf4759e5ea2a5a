"""The coordinator's state folder and its settings.

One process at a time owns the folder (`state.in-use`); `settings.json` holds what `init` was told.
Refused: a folder without a network (`state.missing`) and one of a newer version (`state.newer`)::

    state = State(Path("~/paris").expanduser())
    with state.lock():
        settings = state.settings()

Layout: key.json, genesis.json, settings.json, ledger.sqlite, policy/<n>.json, store/, private/,
heads/, router/, samples/, releases/<n>/, log/, logs/, orders/, lock; while the key is rotated
key.next.json, and from then on seed.json.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, ValidationError

from paris_protocol.envelope import Sealed, open_genesis
from paris_protocol.errors import ParisError
from paris_protocol.keys import PrivateKey, load_key, save_key
from paris_protocol.net.store import write_atomic
from paris_protocol.records import Genesis

VERSION: Final = 1
FOLDERS: Final = ("policy", "private", "heads", "samples", "releases", "log", "logs", "orders")


class Settings(BaseModel):
    """What `init` was told and `serve` uses unless its options say otherwise."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    version: int = VERSION
    network: str
    host: str = "127.0.0.1"
    port: int = 8420
    address: str = "127.0.0.1"
    swarm_port: int = 8421
    samples_every: int = 900
    prompts: tuple[str, ...] = ()


class State:
    """Paths of a state folder, its lock, its key and its settings."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.key_file = folder / "key.json"
        self.next_key_file = folder / "key.next.json"
        self.seed_file = folder / "seed.json"
        self.genesis_file = folder / "genesis.json"
        self.settings_file = folder / "settings.json"
        self.ledger_file = folder / "ledger.sqlite"
        self.store = folder / "store"
        self.policy = folder / "policy"
        self.private = folder / "private"
        self.origins_file = self.private / "provenance.jsonl"
        self.heads = folder / "heads"
        self.router = folder / "router"
        self.samples = folder / "samples"
        self.releases = folder / "releases"
        self.log = folder / "log"
        self.logs = folder / "logs"
        self.orders = folder / "orders"

    def make(self) -> None:
        """Creates the folder and its sub-folders; private ones are the owner's alone."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in FOLDERS:
            mode = 0o700 if name in ("private", "orders") else 0o755
            (self.folder / name).mkdir(mode=mode, exist_ok=True)

    @property
    def exists(self) -> bool:
        """Whether a network was initialised here; `settings.json` is written last."""
        return self.settings_file.exists()

    def settings(self) -> Settings:
        """The settings, or ParisError: `state.missing`, `state.newer`, `state.corrupt`."""
        try:
            raw = self.settings_file.read_bytes()
        except FileNotFoundError:
            raise ParisError("state.missing", str(self.folder)) from None
        try:
            found = json.loads(raw)
            version = found.get("version") if isinstance(found, dict) else None
            if isinstance(version, int) and version > VERSION:
                raise ParisError("state.newer", str(self.settings_file))
            return Settings.model_validate_json(raw)
        except (ValueError, ValidationError):
            raise ParisError("state.corrupt", str(self.settings_file)) from None

    def save(self, settings: Settings) -> None:
        """Writes the settings, whole or not at all."""
        write_atomic(self.settings_file, settings.model_dump_json(indent=1).encode() + b"\n")

    def key(self) -> PrivateKey:
        """The operator's key, or ParisError("key.file")."""
        return load_key(self.key_file)

    def seed(self) -> bytes:
        """What the operator's secrets are derived from: the first key's seed, whatever came after.

        Held-out clips, canaries and audit chains would change with it.
        """
        first = self.seed_file if self.seed_file.exists() else self.key_file
        return load_key(first).seed

    def keep_seed(self, first: PrivateKey) -> None:
        """Keeps the first key's seed for `seed`, before another key takes its place."""
        if not self.seed_file.exists():
            save_key(self.seed_file, first)

    def genesis(self) -> Sealed[Genesis]:
        """The signed genesis, checked against the settings' network id."""
        settings = self.settings()
        try:
            raw = self.genesis_file.read_bytes()
        except FileNotFoundError:
            raise ParisError("state.corrupt", str(self.genesis_file)) from None
        try:
            return open_genesis(raw, settings.network)
        except ParisError as error:
            if error.code == "network.mismatch":
                raise
            where = f"{self.genesis_file}: {error.sentence}"
            raise ParisError("state.corrupt", where) from error

    def private_shard(self, kind: str, expert: int) -> Path:
        """The held-out clips of an expert's cluster; `kind` is `validation` or `audit`."""
        return self.private / f"{kind}{expert}.safetensors"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Owns the folder until the block or the process ends; else ParisError("state.in-use")."""
        if not self.folder.is_dir():
            raise ParisError("state.missing", str(self.folder))
        with (self.folder / "lock").open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ParisError("state.in-use", str(self.folder)) from None
            yield

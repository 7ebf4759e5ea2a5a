"""Joining a network: find it, show what it would do to this machine, and enrol, in this order.

Before the owner has agreed, nothing is fetched but the signed genesis and policy, some kilobytes.
Refused: a bare address without somebody to confirm the id (`network.bare-url`), a folder of another
network (`state.other-network`), a machine that is too small (`machine.too-small`), a plan that the
network does not take (`machine.plan`)::

    found = await find("paris://…", confirm=None)
    plan = plan_of(found, settings, folder, RealMachine())
    enrol(folder, found, settings)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from paris_node.config import AUTO, FILE, Settings, load_settings
from paris_node.fit import Need, need_of_network
from paris_node.machine import Machine, look
from paris_node.planning import chosen, offers_for
from paris_protocol.envelope import Sealed, network_id, open_genesis, unseal
from paris_protocol.errors import ParisError
from paris_protocol.invite import Invite, check_url, make_invite, parse_network
from paris_protocol.keys import PrivateKey, load_key, save_key
from paris_protocol.net.store import write_atomic
from paris_protocol.records import Genesis, Policy

Confirm = Callable[[str], bool]
KEY, GENESIS = "key", "genesis.json"


@dataclass(frozen=True, slots=True)
class Found:
    """A network that was found and verified: where, what, and under which policy."""

    invite: Invite
    genesis: Sealed[Genesis]
    policy: Policy


async def find(text: str, confirm: Confirm | None = None) -> Found:
    """What NETWORK means: an invite, a genesis file, or an address whose id somebody confirms."""
    from paris_protocol.net.control import HttpControl

    expected: str | None
    try:
        named = parse_network(text)
    except ParisError as error:
        if error.code != "network.bare-url" or confirm is None:
            raise
        url, expected = check_url(text), None
    else:
        if isinstance(named, str):
            named = invite_of_file(Path(named))
        url, expected = check_url(named.url), named.network
    async with HttpControl(url, expected) as control:
        genesis = await control.hello()
        if expected is None and (confirm is None or not confirm(genesis.id)):
            raise ParisError("network.bare-url", f"it would be {genesis.id}")
        policy = (await control.policy()).record
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return Found(make_invite(parts.hostname or "", port, genesis.id), genesis, policy)


def invite_of_file(path: Path) -> Invite:
    """The invite of a genesis file: its id, at the address that a policy beside it names."""
    try:
        genesis = open_genesis(path.read_bytes())
    except OSError as error:
        raise ParisError("network.invite", f"{path}: {error.strerror}") from error
    for beside in sorted((path.parent / "policy").glob("*.json"), key=_number, reverse=True):
        keys = {genesis.record.root_key}
        for address in unseal(beside.read_bytes(), Policy, genesis.id, keys).record.addresses:
            parts = urlsplit(check_url(address))
            port = parts.port or (443 if parts.scheme == "https" else 80)
            return make_invite(parts.hostname or "", port, genesis.id)
    raise ParisError("network.invite", "the file names no address: use the invite")


def _number(path: Path) -> int:
    return int(path.stem) if path.stem.isdigit() else -1


def plan_of(found: Found, settings: Settings, folder: Path, machine: Machine) -> dict[str, Any]:
    """What joining would do, from signed facts and estimates alone."""
    genesis = found.genesis.record
    need: Need = need_of_network(genesis, found.policy.plan.units, found.policy.update_codec)
    device, facts = look(machine, settings.device, folder)
    memory, disk = device.memory_mb, facts.disk >> 20
    needed, upload, fits = need.memory_mb, need.upload_mb, need.fits(memory, disk)
    training, short = "float32", ""
    if settings.plan != AUTO or found.policy.plans:
        offers = offers_for(genesis, found.policy, facts, settings.plan)
        try:
            best = chosen(offers, settings.plan)[0]
        except ParisError as error:
            best, short = min(offers, key=lambda one: one.device), error.detail
        training, fits = best.plan.name, not short
        needed, upload = best.device >> 20, -(-best.need.upload >> 20)
    exposes = ["your address to the coordinator"]
    if settings.swarm:
        exposes.append("your address to other volunteers (not with --no-swarm)")
    return {
        "version": 1,
        "network": found.genesis.id,
        "name": genesis.name,
        "invite": str(found.invite),
        "state": str(folder),
        "licences": [
            {"part": one.part, "name": one.name, "url": one.url,
             "regions_excluded": list(one.regions_excluded)}
            for one in genesis.licences
        ],
        "notes": list(genesis.notes),
        "experts": len(genesis.clusters),
        "parameters": need.parameters,
        "plan": training,
        "short": short,
        "device": device.name,
        "memory_mb": {"needed": needed, "free": memory},
        "disk_mb": {"needed": need.disk_mb, "free": disk},
        "states_mb": settings.states_mb,
        "download_mb": need.download_mb,
        "upload_mb_per_unit": upload,
        "exposes": exposes,
        "runs": "signed assignments only; no code of others is executed",
        "fits": fits,
    }  # fmt: skip


def plan_lines(plan: dict[str, Any]) -> list[str]:
    """The plan as a few lines of text."""
    memory, disk = plan["memory_mb"], plan["disk_mb"]
    out = [f"network   {plan['name']}", f"  id      {plan['network']}"]
    for one in plan["licences"]:
        out.append(f"  licence {one['part']}: {one['name']} {one['url']}".rstrip())
        if one["regions_excluded"]:
            out.append(f"          not granted in: {', '.join(one['regions_excluded'])}")
    out += [f"  note    {note}" for note in plan["notes"]]
    out += [
        "what this would do (estimates)",
        f"  train    one of {plan['experts']} experts of {plan['parameters']:,} parameters"
        f" on {plan['device']}",
        f"  plan     {plan['plan']}" + (f": {plan['short']}" if plan["short"] else ""),
        f"  memory   {memory['needed']:,} MB of {memory['free']:,} MB free, given back at a pause",
        f"  disk     {disk['needed']:,} MB of {disk['free']:,} MB free, in {plan['state']}",
        f"  states   up to {plan['states_mb']:,} MB more for training states that an audit may ask"
        " for (states_mb in node.toml)",
        f"  download {plan['download_mb']:,} MB for the first unit; the shards stay cached",
        f"  upload   {plan['upload_mb_per_unit']:,} MB per unit",
        f"  exposes  {'; '.join(plan['exposes'])}",
        f"  runs     {plan['runs']}",
    ]
    return out


def check_folder(folder: Path, network: str) -> None:
    """Refuse a state folder that is another network's; one of this network is welcome."""
    path = folder / GENESIS
    if not path.exists():
        return
    try:
        found = network_id(path.read_bytes())
    except ParisError as error:
        raise ParisError("state.corrupt", f"{path}: {error.sentence}") from error
    if found != network:
        raise ParisError("state.other-network", str(folder))


def enrol(folder: Path, found: Found, settings: Settings) -> None:
    """Write key, settings and genesis; every step is whole, and doing it again changes nothing."""
    check_folder(folder, found.genesis.id)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        code = "disk.full" if error.errno in (28, 122) else "usage"
        raise ParisError(code, f"{folder}: {error.strerror}") from error
    if (folder / KEY).exists():
        load_key(folder / KEY)
    else:
        save_key(folder / KEY, PrivateKey.generate())
    replace(settings, network=str(found.invite)).save(folder)
    write_atomic(folder / GENESIS, found.genesis.raw, 0o600)


def settings_for(folder: Path, changes: dict[str, Any]) -> Settings:
    """The folder's settings, or fresh ones, with what the command line changes."""
    known = load_settings(folder) if (folder / FILE).exists() else Settings(network="")
    return replace(known, **changes)

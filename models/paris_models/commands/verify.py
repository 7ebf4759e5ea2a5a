"""`paris verify`: check a release folder offline, every byte of it.

Signatures from genesis to release, the digest of every file, the lineage of every expert, every
audit draw as far as it stands in the release, the log proofs. Without `--network` the folder's own
genesis is believed, and the answer says so. `recompute` repeats every merge from the blobs that the
statements name; `log` checks every draw of the whole log and that it holds the release::

    run_verify(Path("release"), "paris://train.example.org/…")["verified"]      # True, or it raises
    run(Path("release"), None, Wanted(recompute=True, blobs=("demo/blobs",)), now)["recompute"]
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from paris_protocol.draws import check_draws
from paris_protocol.envelope import Sealed, unseal_any
from paris_protocol.errors import ParisError
from paris_protocol.memory import STALE
from paris_protocol.net.folder import file_root, named_network, verify_folder
from paris_protocol.net.logs import Followed, LogMemory, LogPlace, follow, memory_folder, recall
from paris_protocol.records import Merge, Revert
from paris_protocol.release import Verified

if TYPE_CHECKING:
    from paris_models.commands.recompute import Recomputed

Json = dict[str, Any]
Progress = Callable[[int, int], None] | None


class Wanted(NamedTuple):
    """What is asked for beyond the folder itself; see the module's docstring."""

    recompute: bool = False
    blobs: tuple[str, ...] = ()
    log: str | None = None
    explain: bool = False


def run_verify(release: Path, network: str | None = None, progress: Progress = None) -> Json:
    """Facts about a release that was found to be whole; otherwise the `release.*` refusal."""
    return facts_of(verify_folder(release, named_network(network), progress), network is not None)


def run(
    release: Path,
    network: str | None,
    wanted: Wanted,
    now: int,
    bar: Callable[[str], Progress] = lambda label: None,
) -> Json:
    """The command: `run_verify`, and what is `wanted` under "log", "recompute", "explain".

    `now` in unix seconds; `bar(label)` gives a progress callback. What could not be recomputed is
    in the facts; `refusal_of` names it.
    """
    found = verify_folder(release, named_network(network), bar("hashing"))
    facts = facts_of(found, network is not None)
    seen = recall(LogMemory(memory_folder()), release, found, newest=False)
    if seen.release > facts["number"]:
        facts["newer_seen"] = seen.release
    if wanted.log is not None:
        facts["log"] = run_log(wanted.log, found, LogMemory(memory_folder()), now)
    if wanted.explain:
        from paris_models.commands.explain import explain

        facts["explain"] = explain(found)
    if wanted.recompute:
        facts["recompute"] = run_recompute(release, found, wanted.blobs, bar("merging"))
        facts["verified"] = facts["recompute"]["recomputed"]
    return facts


def sentence(facts: Json) -> str:
    """The same for people; what failed is not in it but in the refusal that follows."""
    text = []
    if "explain" in facts:
        from paris_models.commands.explain import lines

        text += [*lines(facts["explain"]), ""]
    outcome = "verified" if facts["verified"] else "not verified"
    text += [
        f"{outcome}: release {facts['number']} of network {facts['network']}",
        f"{facts['files']} files, {facts['experts']} experts, every head descends from genesis.",
    ]
    if "log" in facts:
        log = facts["log"]
        old = "; its last signed word is old" if log["log_stale"] else ""
        text.append(
            f"log: {log['log_size']} statements, {log['draws']} audit draws in order,"
            f" {log['audited']} audited, {len(log['waiting'])} contributions not judged{old}"
        )
    for step in facts.get("recompute", {}).get("steps", ()):
        found = "same bits" if step["same"] else "NOT RECOMPUTABLE"
        if step["root"] and not step["same"]:
            found = f"ANOTHER ROOT {step['root'][:16]}"
            if step.get("average_root"):
                found = f"ANOTHER AVERAGE {step['average_root'][:16]}"
        text.append(f"{_name(step)}: {step['inputs']} inputs, {found}")
    if "newer_seen" in facts:
        text.append(f"Release {facts['newer_seen']} was seen before; this is an older one.")
    if not facts["network_pinned"]:
        text.append("The network id is the folder's own claim; compare it with your invite.")
    return "\n".join(text)


def facts_of(found: Verified, pinned: bool) -> Json:
    """What a verified release is, as JSON values; `pinned`: the user named the network."""
    record = found.release.record
    return {
        "verified": True,
        "network": found.network,
        "network_pinned": pinned,
        "release": found.release.id,
        "number": record.number,
        "at": record.at,
        "files": len(record.files),
        "bytes": sum(entry.size for entry in record.files),
        "experts": len(record.experts),
        "merges": found.merges,
        "log_size": found.checkpoint.size,
    }


def run_recompute(
    release: Path, found: Verified, places: Sequence[str], progress: Progress = None
) -> Json:
    """Every merge and revert of the release again, and its experts' files against the last heads.

    `places` are folders or addresses of blobs; without any, the addresses that the network's policy
    names are asked. {"recomputed", "steps": [...]}; `recomputed` is True when every root came out.
    """
    from paris_models.commands.recompute import Blobs, recompute

    steps = {
        id: each.record
        for id, each in found.lineage.items()
        if isinstance(each.record, Merge | Revert)
    }
    policy = found.policies[-1].record
    results = []
    with tempfile.TemporaryDirectory(prefix="paris-recompute-") as folder:
        scratch = Path(folder)
        blobs = Blobs(list(places) or list(policy.addresses), scratch, policy.inputs_kept)
        for each in recompute(steps, blobs, scratch, progress):
            results.append(
                {
                    each.kind: each.id,
                    "expert": each.expert,
                    "round": each.round,
                    "inputs": each.inputs,
                    "stated": each.stated,
                    "root": each.root or None,
                    "same": each.same,
                    "missing": each.missing or None,
                }
                | _average(each)
            )
    for expert in found.release.record.experts:
        files = sorted((release / f"expert_{expert.expert}").glob("*.safetensors"))
        if file_root(files) != expert.root:
            detail = f"expert_{expert.expert} is not the recomputed head or average"
            raise ParisError("release.file", detail)
    return {"recomputed": all(each["same"] for each in results), "steps": results}


def refusal_of(facts: Json) -> ParisError | None:
    """What recomputing found wrong, as the refusal that the command ends with; None if nothing."""
    steps = facts.get("recompute", {}).get("steps", ())
    wrong = [each for each in steps if each["root"] and not each["same"]]
    gone = [each for each in steps if each["missing"]]
    if wrong:
        what = "the average of " if wrong[0].get("average_root") else ""
        return ParisError("check.failed", f"{what}{_name(wrong[0])} is not what was signed")
    if gone:
        count = f"{len(gone)} of {len(steps)} not recomputable"
        return ParisError("merge.input-gone", f"{count}; {_name(gone[0])}: {gone[0]['missing']}")
    return None


def _average(step: Recomputed) -> Json:
    """What is told of the running average, where a merge names one."""
    root = step.average_root or None
    return {"average": step.average, "average_root": root} if step.average else {}


def _name(step: Json) -> str:
    kind = "merge" if "merge" in step else "revert"
    return f"{kind} {step[kind][:16]} of expert {step['expert']}, round {step['round']}"


def run_log(where: str, found: Verified, memory: LogMemory | None, now: int) -> Json:
    """Every audit draw of the whole log at `where` (a folder or an address), and the release in it.

    `audit.draw` names a draw that was thrown away, chosen, or computed from another log or
    standing; `log.*` a log that is not what its checkpoint says, does not continue what `memory`
    saw, or does not hold the release. An old log is told as `log_stale`, for it may be an archive.
    """
    place = LogPlace(where)
    log = follow(place, found.network, memory, now, stale=now)
    policies = {each.record.number: each.record for each in log.policies}
    facts = check_draws(_statements(place, log), policies)
    if log.reader.size < found.checkpoint.size:
        raise ParisError("log.rollback", f"{log.reader.size} statements, the release has more")
    if log.reader.root(found.checkpoint.size) != found.checkpoint.root:
        raise ParisError("log.split", "the release was proved by another log")
    age = now - log.index.record.at
    return {"log_size": log.reader.size, "log_stale": age > STALE, **facts}


def _statements(place: LogPlace, log: Followed) -> Iterator[Sealed[Any]]:
    """All statements in log order, each the one that its leaf names."""
    for id in log.reader.entries():
        if id == log.genesis.id:
            yield log.genesis
        else:
            yield unseal_any(place.statement(id), log.genesis.id)

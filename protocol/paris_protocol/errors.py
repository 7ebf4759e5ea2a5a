"""Every way Paris says no: one sentence, what to do, and one code, for all three programs.

A `Reason` is an entry of the one catalogue; `ParisError` carries it with the facts of the case.
The command line, the logs and the web pages print the same words::

    raise ParisError("blob.corrupt", "piece 3 of 1f2e… has the wrong digest")

Exit codes (design: command contract): 0 done, 1 a check failed, 2 usage, 20 input refused,
23 wrong network, 24 state in use or newer, 30 GPU unavailable, 31 disk full, 40 network,
50 internal.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

DONE: Final = 0
CHECK_FAILED: Final = 1
USAGE: Final = 2
INPUT: Final = 20
WRONG_NETWORK: Final = 23
STATE: Final = 24
GPU: Final = 30
DISK: Final = 31
NETWORK: Final = 40
INTERNAL: Final = 50


@dataclass(frozen=True, slots=True)
class Reason:
    """One catalogue entry: stable code, exit code, the sentence, and what to do about it."""

    code: str
    exit: int
    text: str
    fix: str
    http: int = 400


def _catalogue(*reasons: Reason) -> MappingProxyType[str, Reason]:
    table = {reason.code: reason for reason in reasons}
    if len(table) != len(reasons):
        raise ValueError("two reasons share a code")
    return MappingProxyType(table)


REASONS: Final = _catalogue(
    # --- records, keys, envelopes
    Reason(
        "record.malformed",
        INPUT,
        "The record is not a well-formed signed statement.",
        "Send it again from an unmodified Paris program of the current version.",
    ),
    Reason(
        "record.too-large",
        INPUT,
        "The record is larger than its type allows.",
        "Send it again from an unmodified Paris program of the current version.",
        413,
    ),
    Reason(
        "record.type",
        INPUT,
        "The record is of another type than was expected here.",
        "Send it again from an unmodified Paris program of the current version.",
    ),
    Reason(
        "record.network",
        WRONG_NETWORK,
        "The record belongs to another network.",
        "Check the invite: its id must be the network you mean.",
        409,
    ),
    Reason(
        "record.signer",
        INPUT,
        "The record is not signed by a key that may sign it.",
        "Check that the key file is the one that was registered.",
        403,
    ),
    Reason(
        "record.signature",
        INPUT,
        "The signature of the record does not verify.",
        "Fetch the record again; if it stays so, somebody changed it.",
        403,
    ),
    Reason(
        "key.file",
        INPUT,
        "The key file cannot be used.",
        "It must be a 0600 file of this user; restore it from a backup or remove it to make a new one.",
    ),
    Reason(
        "key.weak",
        INPUT,
        "The public key is of small order and proves nothing.",
        "Make a new key.",
        403,
    ),
    # --- networks and invites
    Reason(
        "network.invite",
        USAGE,
        "That is not an invite or a genesis file.",
        "Use paris://HOST[:PORT]/ID as printed by `paris-coordinator init`, or the path of genesis.json.",
    ),
    Reason(
        "network.bare-url",
        USAGE,
        "A bare address does not say which network is meant.",
        "Use the invite with the network's id.",
    ),
    Reason(
        "network.mismatch",
        WRONG_NETWORK,
        "The coordinator serves another network than the invite names.",
        "Ask for a fresh invite; do not continue if you cannot explain the difference.",
    ),
    Reason(
        "network.plain-http",
        USAGE,
        "Plain http is accepted on this machine's loopback address only.",
        "Use an https address.",
    ),
    Reason(
        "network.down",
        NETWORK,
        "The coordinator does not answer.",
        "Nothing is lost; the node keeps its work and tries again by itself.",
        503,
    ),
    Reason(
        "network.not-paris",
        NETWORK,
        "The address answers, but not as a Paris coordinator.",
        "Check host and port of the invite, and whether a proxy or login page stands between.",
    ),
    Reason(
        "network.clock",
        NETWORK,
        "This machine's clock and the coordinator's differ by more than five minutes.",
        "Switch on time synchronisation (NTP) and try again.",
    ),
    Reason(
        "network.version",
        STATE,
        "The coordinator asks for a newer version of Paris.",
        "Install the current version; work that is done stays valid.",
        426,
    ),
    Reason(
        "network.rate",
        NETWORK,
        "Too many requests in a short time.",
        "Wait as long as `retry_after` says.",
        429,
    ),
    # --- blobs and files
    Reason(
        "blob.corrupt",
        INPUT,
        "The data do not have the digest that was signed.",
        "They are fetched again from another source; if every source is wrong, report it.",
    ),
    Reason(
        "blob.missing",
        NETWORK,
        "No source has the data at the moment.",
        "The node tries again by itself.",
        404,
    ),
    Reason(
        "blob.too-large",
        INPUT,
        "The data are larger than was announced.",
        "Fetch them again from another source.",
        413,
    ),
    Reason(
        "tensor.header",
        INPUT,
        "The tensor file's header is not what was expected.",
        "The file is refused before it is opened; produce it with an unmodified Paris program.",
    ),
    Reason(
        "tensor.values",
        INPUT,
        "The tensor file holds values that are not finite or far too large.",
        "Check the training run that produced it.",
    ),
    Reason(
        "disk.full",
        DISK,
        "The disk is full.",
        "Free some space or give the state folder another place; nothing half-written is kept.",
        507,
    ),
    Reason(
        "disk.quota",
        DISK,
        "The folder's quota is used up.",
        "Raise the quota or remove what is no longer needed.",
        507,
    ),
    # --- input of prepare
    Reason(
        "clips.none",
        INPUT,
        "The folder holds no usable video.",
        "Put video files with captions into it; the report says why each one was skipped.",
    ),
    Reason(
        "clip.not-video",
        INPUT,
        "The file is no video.",
        "Remove it or convert it, for instance to MP4.",
    ),
    Reason(
        "clip.truncated",
        INPUT,
        "The video is cut off or damaged.",
        "Copy it again from its source.",
    ),
    Reason("clip.no-frames", INPUT, "The video holds no frames.", "Remove it."),
    Reason("clip.audio-only", INPUT, "The file holds sound but no picture.", "Remove it."),
    Reason(
        "clip.too-short",
        INPUT,
        "The video is shorter than one clip.",
        "Use longer videos or a shorter clip length in the recipe.",
    ),
    Reason(
        "clip.duplicate",
        INPUT,
        "The video shows the very same clip as another one.",
        "Keep one of them; held-out clips must not be training clips as well.",
    ),
    Reason(
        "clip.near-duplicate",
        INPUT,
        "The video shows nearly the same as a clip that is kept back to judge by.",
        "Leave it out, or change `alike` in the recipe's [held_out]; see docs/prepare.md.",
    ),
    Reason(
        "clip.unknown",
        INPUT,
        "No training clip of this network has that name or digest.",
        "Use a name of the prepared folder's provenance.jsonl, or the clip's SHA-256 in 64 hex digits.",
        404,
    ),
    Reason(
        "clip.withdrawn",
        INPUT,
        "The clip is withdrawn from training already.",
        "Nothing needs to be done.",
        409,
    ),
    Reason(
        "clip.missing",
        INPUT,
        "The video that the caption list names is not there.",
        "Correct the path; it is relative to the folder and stays inside it.",
    ),
    Reason(
        "clip.licence",
        INPUT,
        "Nobody says under which licence the clip may be used.",
        "State `licence` in captions.jsonl or captions.csv, or allow such clips with --allow-unlicensed.",
    ),
    Reason(
        "clip.cut",
        INPUT,
        "The clip holds a cut from one shot to another.",
        "Split it there, or set `cut` in the recipe's [filters].",
    ),
    Reason(
        "clip.static",
        INPUT,
        "Nothing moves in the clip.",
        "Use it as an image, or set `still` in the recipe's [filters].",
    ),
    Reason(
        "clip.content",
        INPUT,
        "The content filter refuses the clip.",
        "Remove it, or correct `content` in the recipe's [filters].",
    ),
    Reason(
        "caption.missing",
        INPUT,
        "The video has no caption.",
        "Put a .txt file beside it, or name it in captions.jsonl or captions.csv.",
    ),
    Reason("caption.empty", INPUT, "The caption is empty.", "Write one sentence about the video."),
    Reason("caption.encoding", INPUT, "The caption is not UTF-8 text.", "Save the file as UTF-8."),
    Reason("caption.too-long", INPUT, "The caption is longer than the limit.", "Shorten it."),
    Reason(
        "caption.list",
        INPUT,
        "A line of the caption list cannot be read.",
        "Write one JSON object with `video` and `caption` on each line, or a CSV file with these two columns.",
    ),
    Reason(
        "recipe.invalid",
        INPUT,
        "The recipe file is not valid.",
        "Correct the named field; docs/recipe.md lists them all.",
    ),
    Reason(
        "recipe.licence",
        INPUT,
        "These parts may not be combined under their licences.",
        "Choose the clean stack (Wan VAE; FLUX.1-schnell or scratch) or the named `paper` preset with its licences.",
    ),
    Reason(
        "encoder.mismatch",
        INPUT,
        "The encoder is not the one that the manifest names.",
        "Use the weights whose fingerprint stands in the manifest.",
    ),
    Reason(
        "prepare.worker",
        INTERNAL,
        "A worker of `prepare` died.",
        "Most often memory was short: start it again with fewer workers; it goes on where it was.",
    ),
    Reason(
        "engine.missing",
        INPUT,
        "The engine is not installed.",
        "Install the package's extra of that name, or leave --engine out.",
    ),
    Reason(
        "weights.file",
        INPUT,
        "These weights cannot be converted.",
        "Take the published file, whole and unchanged; docs/weights.md lists layouts and origins.",
    ),
    # --- state folders
    Reason(
        "state.in-use",
        STATE,
        "Another process is using this state folder.",
        "Stop that process, or use another --state.",
    ),
    Reason(
        "state.newer",
        STATE,
        "The state folder was written by a newer version of Paris.",
        "Use that version, or another --state.",
    ),
    Reason(
        "state.other-network",
        STATE,
        "The state folder belongs to another network.",
        "Use another --state for this network.",
    ),
    Reason(
        "state.corrupt",
        INPUT,
        "A file of the state folder is damaged.",
        "It was moved aside and is made again where that is possible; the log names it.",
    ),
    Reason(
        "state.missing",
        USAGE,
        "There is no Paris state in this folder.",
        "Run `paris-node join INVITE` (or `paris-coordinator init`) first.",
    ),
    Reason(
        "port.in-use",
        STATE,
        "The port is in use by another program.",
        "Choose another with --port, or stop that program.",
    ),
    Reason(
        "agent.not-running",
        NETWORK,
        "No node is running on this state folder.",
        "Start it with `paris-node run`.",
    ),
    Reason(
        "machine.too-small",
        INPUT,
        "This machine has too little memory or disk for any expert of the network.",
        "`paris-node fit` shows what each size needs.",
    ),
    Reason(
        "machine.plan",
        INPUT,
        "No training plan of this network fits this machine.",
        "`paris-node fit` shows what each plan needs; `join --plan` names one.",
    ),
    Reason(
        "machine.numerics",
        INPUT,
        "This machine computes other numbers than it should: its training would be refused.",
        "Change the driver or torch back or forth, then restart; `paris-node doctor` tests again.",
    ),
    Reason("node.working", DONE, "The node is working.", "Nothing needs to be done."),
    Reason("node.starting", DONE, "The node is starting.", "Wait a few seconds."),
    Reason(
        "owner.paused", DONE, "The owner has paused the node.", "Go on with `paris-node resume`."
    ),
    Reason(
        "owner.stopped", DONE, "The owner has stopped the node.", "Start it with `paris-node run`."
    ),
    Reason(
        "owner.finished",
        DONE,
        "The unit in hand is done, and the owner wants no further ones.",
        "Take new ones with `paris-node resume`.",
    ),
    Reason(
        "network.finished",
        DONE,
        "The network has all the training it planned.",
        "Nothing needs to be done; the node asks now and then whether there is more.",
    ),
    Reason(
        "trainer.failed",
        INTERNAL,
        "The trainer process ended before the unit was done.",
        "The node tries again from the last save; `paris-node logs` says more.",
    ),
    Reason(
        "job.silent",
        INTERNAL,
        "A step of the work said nothing for too long and was begun again.",
        "If this repeats, look at `paris-node logs`.",
    ),
    Reason("gpu.unavailable", GPU, "The GPU cannot be used.", "Run `paris-node doctor`."),
    # --- contributions (verdicts)
    Reason("unit.unknown", INPUT, "There is no such assignment.", "Ask for a new one.", 404),
    Reason(
        "unit.closed",
        INPUT,
        "The assignment is over: its deadline passed or it was already handed in.",
        "Ask for a new one.",
        409,
    ),
    Reason(
        "unit.withdrawn",
        INPUT,
        "A clip of the unit's shards was withdrawn from training, so that its result cannot be used.",
        "Ask for other work; the unit is not held against this node.",
        409,
    ),
    Reason(
        "unit.not-yours",
        INPUT,
        "The assignment was given to another node.",
        "Ask for one of your own.",
        403,
    ),
    Reason(
        "unit.second-result",
        INPUT,
        "Another result was already committed for this assignment.",
        "One assignment has one result.",
        409,
    ),
    Reason(
        "structure.digest",
        INPUT,
        "L0: the update is not the data that the contribution names.",
        "Hand in what was signed.",
    ),
    Reason(
        "structure.schema",
        INPUT,
        "L0: the update's tensors are not those of the expert.",
        "Train with an unmodified node.",
    ),
    Reason(
        "structure.steps",
        INPUT,
        "L0: the contribution claims other steps or samples than were assigned.",
        "Train all steps of the assignment, no more and no fewer.",
    ),
    Reason(
        "structure.values",
        INPUT,
        "L0: the update holds values that are not finite.",
        "Check the machine: overheating and overclocking cause this.",
    ),
    Reason(
        "structure.lineage",
        INPUT,
        "L0: the contribution does not descend from the assignment's parent.",
        "Train from the head that the assignment names.",
    ),
    Reason(
        "commitment.missing",
        INPUT,
        "L1: no commitment was logged before the result.",
        "Commit first, then hand in.",
    ),
    Reason(
        "commitment.start",
        INPUT,
        "L1: the committed first state is not the parent with a fresh optimiser.",
        "Train with an unmodified node.",
    ),
    Reason(
        "commitment.mismatch",
        INPUT,
        "L1: the result is not the one that was committed.",
        "Hand in what was committed.",
    ),
    Reason(
        "statistics.zero",
        INPUT,
        "L2: the update is empty or nearly so.",
        "Train all steps of the assignment.",
    ),
    Reason(
        "statistics.norm",
        INPUT,
        "L2: the update is far larger than honest ones.",
        "Train with the optimiser of the assignment.",
    ),
    Reason(
        "statistics.noise",
        INPUT,
        "L2: the update has the shape of noise, not of training.",
        "Train with an unmodified node.",
    ),
    Reason(
        "statistics.direction",
        INPUT,
        "L2: the update points against training, as a flipped sign or foreign data would.",
        "Train with an unmodified node on the shards of the assignment.",
    ),
    Reason(
        "statistics.copy",
        INPUT,
        "L2: the update is a copy of another node's.",
        "Hand in your own work.",
    ),
    Reason(
        "loss.damage",
        INPUT,
        "L3: the update makes the expert worse on held-out clips.",
        "Train with an unmodified node; if you did, look at the numbers on the contribution's page.",
    ),
    Reason(
        "statistics.block",
        INPUT,
        "L2: one block of the update is far outside the lineage's own range.",
        "Train with the optimiser of the assignment.",
    ),
    Reason(
        "statistics.rank",
        INPUT,
        "L2: the update is of far lower rank than training makes it.",
        "Train with an unmodified node.",
    ),
    Reason(
        "audit.mismatch",
        INPUT,
        "L4: a replayed segment of the training is not what was committed.",
        "Train with an unmodified node; a machine that computes wrongly (overclocked, overheated) fails as well.",
    ),
    Reason(
        "audit.unanswered",
        INPUT,
        "L4: the committed states were not laid open in time.",
        "Keep the node running until its contributions are judged.",
    ),
    Reason(
        "audit.state",
        INPUT,
        "The opened state is not the one that was committed.",
        "Open the state that the commitment names, unchanged.",
    ),
    Reason(
        "audit.unknown",
        INPUT,
        "Nobody asked for this opening, or there is no such state.",
        "Answer the challenges that the coordinator sends.",
        404,
    ),
    Reason(
        "audit.closed",
        INPUT,
        "The time for this opening or audit is over.",
        "Answer within the deadline that the challenge names.",
        409,
    ),
    Reason(
        "audit.late",
        INPUT,
        "The commitment came after its audit was drawn.",
        "Commit first, then hand in.",
        409,
    ),
    Reason(
        "audit.draw",
        CHECK_FAILED,
        "The audit draw does not follow from the log and the hash chain.",
        "Do not believe the coordinator's audits; compare the named numbers.",
    ),
    Reason(
        "audit.tolerance",
        INPUT,
        "There is no calibrated tolerance for this replay.",
        "Run `paris-coordinator calibrate` and publish a policy with its result.",
    ),
    Reason(
        "audit.false",
        INPUT,
        "The auditor's report is not what the replay shows.",
        "Replay with an unmodified node.",
    ),
    Reason(
        "canary.mismatch",
        INPUT,
        "L5: the unit's result is not the answer that was known beforehand.",
        "Train with an unmodified node.",
    ),
    Reason(
        "node.revoked",
        INPUT,
        "This key was revoked.",
        "Its unvested work was taken back; look at the revocation in the log.",
        403,
    ),
    Reason(
        "node.quarantined",
        INPUT,
        "Too many of this node's contributions were refused.",
        "Look at their pages; the operator can lift the quarantine.",
        403,
    ),
    Reason(
        "work.none",
        NETWORK,
        "There is no work for this machine at the moment.",
        "The node asks again by itself.",
        503,
    ),
    # --- releases and generation
    Reason(
        "release.file",
        CHECK_FAILED,
        "A file of the release is not what was signed.",
        "Fetch that file again.",
    ),
    Reason(
        "release.missing",
        CHECK_FAILED,
        "A file of the release is missing.",
        "Fetch it again with `paris pull`.",
    ),
    Reason(
        "release.extra",
        CHECK_FAILED,
        "The release folder holds a file that nobody signed.",
        "Remove it.",
    ),
    Reason(
        "release.key",
        CHECK_FAILED,
        "The release is signed by a key that the network does not know.",
        "Do not use it; ask the network for its key.",
    ),
    Reason(
        "release.lineage",
        CHECK_FAILED,
        "The release's heads do not descend from its genesis.",
        "Do not use it.",
    ),
    Reason(
        "release.proof",
        CHECK_FAILED,
        "A log proof of the release does not verify.",
        "Do not use it.",
    ),
    Reason(
        "log.checkpoint",
        CHECK_FAILED,
        "The log's checkpoint is not a signed note in canonical form.",
        "Fetch it again; if it stays so, do not believe the log.",
    ),
    Reason(
        "log.proof",
        CHECK_FAILED,
        "The log does not prove what it was asked to prove.",
        "Fetch the proof again; if it stays so, do not believe the log.",
    ),
    Reason(
        "log.rollback",
        CHECK_FAILED,
        "The log is shorter than when it was last seen.",
        "Do not believe it; keep both checkpoints as evidence.",
    ),
    Reason(
        "log.split",
        CHECK_FAILED,
        "The log is not a continuation of the one that was seen before.",
        "Do not believe it; keep both checkpoints as evidence and show them to others.",
    ),
    Reason(
        "log.stale",
        CHECK_FAILED,
        "The coordinator's last signed word is too old to say what is current.",
        "Ask another source; what you have may not be the latest.",
    ),
    Reason(
        "log.future",
        CHECK_FAILED,
        "A signed time lies in the future.",
        "Check this machine's clock; if it is right, do not believe the log.",
    ),
    Reason(
        "log.witness",
        CHECK_FAILED,
        "The checkpoint lacks the witnesses' cosignatures that the network demands.",
        "Fetch it again later; if it stays so, do not believe the log.",
    ),
    Reason(
        "merge.input-gone",
        CHECK_FAILED,
        "An input of the merge is no longer kept, so the merge is not recomputable.",
        "Name another source with --blobs; the policy says how long inputs are kept.",
    ),
    Reason(
        "secret.set",
        CHECK_FAILED,
        "The opened secret set is not the one that was committed.",
        "Do not believe the verdicts that it gave.",
    ),
    Reason(
        "release.none",
        INPUT,
        "That is no release folder.",
        "Name a folder that holds release.json.",
    ),
    Reason(
        "prompt.empty",
        USAGE,
        "The prompt is empty.",
        "Say in a few words what the video shall show.",
    ),
    Reason(
        "prompt.too-long", USAGE, "The prompt is longer than the text encoder reads.", "Shorten it."
    ),
    Reason(
        "merge.gate",
        INPUT,
        "The merge was worse on held-out clips and was not published.",
        "The operator sees the numbers on the expert's page.",
    ),
    Reason(
        "merge.lineage",
        INPUT,
        "The merge breaks a rule of lineage.",
        "Look at the named statement; a head has one parent, its own expert's data, and merges a contribution once.",
    ),
    Reason("check.failed", CHECK_FAILED, "A check failed.", "Read what was printed above."),
    Reason("usage", USAGE, "The command was not understood.", "See --help."),
    Reason("not-found", INPUT, "There is no such thing here.", "Check the name.", 404),
    Reason(
        "internal",
        INTERNAL,
        "Something went wrong inside Paris.",
        "Please report it with the log.",
        500,
    ),
)


class ParisError(Exception):
    """A named refusal: catalogue code, the facts of this case, seconds after which to try again.

    Raises `KeyError` when the code is not in the catalogue: a new refusal is added there first.
    """

    def __init__(self, code: str, detail: str = "", *, retry_after: float | None = None) -> None:
        self.reason = REASONS[code]
        self.detail = detail
        self.retry_after = retry_after
        super().__init__(self.sentence)

    @property
    def code(self) -> str:
        """The stable catalogue code, such as `blob.corrupt`."""
        return self.reason.code

    @property
    def sentence(self) -> str:
        """The catalogue's sentence with the facts of the case behind it."""
        return f"{self.reason.text} ({self.detail})" if self.detail else self.reason.text

    def as_json(self) -> dict[str, object]:
        """The form that crosses the network and that `--json` prints."""
        return {
            "code": self.code,
            "message": self.sentence,
            "fix": self.reason.fix,
            "retry_after": self.retry_after,
        }

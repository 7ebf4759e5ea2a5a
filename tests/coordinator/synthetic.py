"""Small made-up networks for the coordinator's tests: records without any real training."""

import json
import struct
from contextlib import contextmanager

from paris_coordinator.desk import Desk
from paris_protocol.audit import make_draw, segments_of
from paris_protocol.canonical import sha256_hex
from paris_protocol.errors import ParisError
from paris_protocol.records import (
    AuditReport,
    Commitment,
    Contribution,
    Genesis,
    Layer,
    LeaseRequest,
    Merge,
    MergeInput,
    Opening,
    OpenState,
    Policy,
    Registration,
    Segment,
    TensorFile,
    Verdict,
)

NETWORK = "f" * 64
KEY = "ed25519:" + "a" * 64
STATES = 3
"""Committed states of a unit of four steps, every second one."""


@contextmanager
def refused(code):
    """The block must be refused with this code of the catalogue."""
    try:
        yield
    except ParisError as error:
        assert error.code == code, error.sentence
    else:
        raise AssertionError(f"not refused with {code}")


def digest(*parts):
    return sha256_hex(repr(parts).encode())


def key_of(number):
    return f"ed25519:{digest('node', number)}"


def tensor_file(name, size=1000):
    value = {"blob": {"id": digest("blob", name), "size": size}, "root": digest("root", name)}
    return TensorFile.model_validate_json(json.dumps(value))


def described(experts=2, shards=4):
    """`prepared.json` of a tiny network, as `prepare` writes it."""
    paths = [
        [f"shards/cluster{k}/shard{i}.safetensors" for i in range(shards)] for k in range(experts)
    ]
    return {
        "format": 1,
        "inputs": "0" * 64,
        "name": "tiny",
        "notes": [],
        "geometry": {"frames": 5, "height": 8, "width": 8, "fps": 8},
        "codec": {
            "kind": "patch-pca", "source": "", "fingerprint": "0" * 64,
            "channels": 4, "frames": 2, "height": 2, "width": 2, "path": "codec.safetensors",
        },
        "text": {
            "kind": "hashed-words", "source": "", "fingerprint": "0" * 64,
            "length": 2, "dim": 8, "pooled_dim": 8, "path": None,
        },
        "features": "pixel-statistics",
        "expert": {
            "patch": 1, "in_channels": 4, "out_channels": 4, "double_blocks": 1, "single_blocks": 1,
            "heads": 1, "head_dim": 16, "rope_axes": [4, 6, 6], "text_dim": 8, "pooled_dim": 8,
        },
        "recipe": {
            "objective": "x0", "sigma_min": "0", "t_mean": "0", "t_std": "1", "t_shift": "1",
            "null_text": "0.1", "batch": 4, "optimiser": "adamw", "lr": "0.001", "matrix_lr": "0",
            "beta1": "0.9", "beta2": "0.99", "eps": "1e-8", "weight_decay": "0", "momentum": "0.95",
            "clip_norm": "1",
        },
        "router": {"width": 12, "blocks": 1, "heads": 1, "batch": 4, "steps": 2, "lr": "0.001"},
        "sampler": {"steps": 2, "shift": "1", "guidance": "1", "top_k": 1},
        "licences": [],
        "initial": {"path": "initial.safetensors"},
        "clusters": [
            {
                "index": k, "clips": 4 * shards, "prior": "0.5", "centroid": ["0"],
                "shards": [{"path": path, "clips": 4} for path in paths[k]],
                "validation": {"path": f"private/validation{k}.safetensors", "clips": 4},
                "audit": {"path": f"private/audit{k}.safetensors", "clips": 4},
            }
            for k in range(experts)
        ],
        "plan": {
            "units": 2, "steps": 4, "rounds": 2, "schedule": "slice", "floor": "0.02",
            "warmup": "0.03", "close_after": 600,
        },
        "margins": {
            "damage": ["0.02"], "merge_damage": "0.02", "standard_errors": "3", "clips": 4,
            "norm_high": "4", "norm_low": "0.1", "copy_cosine": "0.98", "noise_cosine": "0",
            "source": "made up",
        },
        "policy": {"commit_every": 2, "soft_deadline": 100, "hard_deadline": 300,
                   "refusals_to_quarantine": 2},
        "report": {},
    }  # fmt: skip


def genesis(experts=2, shards=4):
    value = described(experts, shards)
    kept = (
        "name",
        "notes",
        "geometry",
        "features",
        "expert",
        "recipe",
        "router",
        "sampler",
        "licences",
    )
    made = {name: value[name] for name in kept}
    made |= {
        "created": 0,
        "root_key": KEY,
        "codec": {k: v for k, v in value["codec"].items() if k != "path"},
        "text": {k: v for k, v in value["text"].items() if k != "path"},
        "initial": tensor_file("initial").model_dump(mode="json"),
        "clusters": [
            {k: cluster[k] for k in ("index", "clips", "prior", "centroid")}
            | {
                "shards": [
                    {"file": tensor_file(s["path"]).model_dump(mode="json"), "clips": s["clips"]}
                    for s in cluster["shards"]
                ]
            }
            for cluster in value["clusters"]
        ],
    }
    return Genesis.model_validate_json(json.dumps(made))


RULES = {
    "chain": "c" * 64, "chain_length": 1 << 16, "segments": 1, "rate": "2", "floor": "0.05",
    "probation": 2, "probation_weight": "0.25", "vesting": 2, "answer_within": 60,
    "retry_within": 30, "auditors": 0, "canary": "0", "tolerances": [],
}  # fmt: skip


def policy(audit=None, **plan):
    """`audit`: what differs from `RULES`; None for a policy that audits nothing."""
    value = described()
    made = {
        "number": 1, "previous": None, "since": 0, "coordinator_keys": [KEY], "addresses": [],
        "bootstraps": [], "plan": value["plan"] | plan, "margins": value["margins"],
        "dtype": "float32", "threads": 1, "kernels": "reference", "update_codec": "dense-f32",
        "min_version": "0.1.0",
        "audit": None if audit is None else RULES | audit,
    } | value["policy"]  # fmt: skip
    return Policy.model_validate_json(json.dumps(made))


def desk(experts=2, shards=4, audit=None, **plan):
    return Desk(NETWORK, genesis(experts, shards), policy(audit, **plan), digest("policy"))


def request(**changed):
    value = {
        "at": 0,
        "version": "0.1.0",
        "name": "",
        "device": "cpu",
        "memory_mb": 1000,
        "disk_mb": 1000,
    }
    return LeaseRequest(**(value | changed))


def registration(node):
    return Registration(node=node, peer_id="", version="0.1.0", at=0)


def commitment_for(assignment_id, record, name="c"):
    states = tuple(digest(name, assignment_id, place) for place in range(STATES))
    return Commitment(
        assignment=assignment_id, states=states, states_root=digest("states", *states),
        update_root=tensor_file((name, assignment_id)).root, steps=record.steps,
    )  # fmt: skip


def contribution_for(assignment_id, commitment_id, record, name="c"):
    return Contribution(
        assignment=assignment_id, commitment=commitment_id,
        update=tensor_file((name, assignment_id)),
        steps=record.steps, samples=record.steps * record.batch, loss="1", seconds=1,
    )  # fmt: skip


def layers(accepted=True, norm="1"):
    numbers = (("norm", norm), ("relative", "0.01"))
    found = [Layer(layer=name, passed=True, code="") for name in ("L0", "L1")]
    found.append(Layer(layer="L2", passed=True, code="", numbers=numbers))
    numbers = (("n", "256"), ("margin", "0.02"), ("bucket", "-1" if accepted else "1"))
    found.append(
        Layer(layer="L3", passed=accepted, code="" if accepted else "loss.damage", numbers=numbers)
    )
    return tuple(found)


def verdict_for(work, accepted=True, code=None, found=None, reports=(), draw=None):
    return Verdict(
        contribution=work.contribution, assignment=work.id, node=work.record.node,
        expert=work.record.expert, round=work.record.round, accepted=accepted,
        code=code or ("accepted" if accepted else "loss.damage"),
        layers=layers(accepted) if found is None else found, policy=1, at=0,
        audit=draw, reports=tuple(reports),
    )  # fmt: skip


def segment(index, sound=True):
    distance = "0" if sound else "1000000000"
    return Segment(
        index=index, exact=True, rho=distance, tensor=distance, limit="0", tensor_limit="0",
        passed=sound,
    )  # fmt: skip


def report_for(contribution, segments, sound=True, assignment=None, auditor=KEY):
    return AuditReport(
        contribution=contribution, assignment=assignment, auditor=auditor, numerics="0" * 64,
        segments=tuple(segment(index, sound) for index in segments), passed=sound, at=0,
    )  # fmt: skip


def draw_for(work, rules, secret="5" * 64):
    """A draw of this contribution; the seed is made up."""
    return make_draw(
        rules, segments_of(work.record), number=work.number, size=1, root=digest(work.id),
        secret=secret, standing=work.standing,
    )  # fmt: skip


def opening_for(challenge_id, challenge, committed, name="state"):
    return Opening(
        challenge=challenge_id, contribution=challenge.contribution,
        states=tuple(
            OpenState(
                index=index,
                file=tensor_file((name, challenge.contribution, index)).model_copy(
                    update={"root": committed.states[index]}
                ),
            )
            for index in challenge.states
        ),
    )  # fmt: skip


def merge_of(desk, effect, published=True):
    expert = desk.experts[effect.expert]
    weight = (1 / len(effect.contributions)).hex()
    inputs = tuple(
        MergeInput(
            contribution=c, update=desk.work_of(c).done.update, weight=weight, scale=(1.0).hex()
        )
        for c in effect.contributions
    )
    return Merge(
        expert=effect.expert, round=expert.round, parent=expert.head, inputs=inputs,
        result=tensor_file(("head", effect.expert, expert.round, expert.attempt)),
        published=published, numbers=(), policy=1, at=0,
    )  # fmt: skip


def snapshot(desk):
    """Everything that a desk knows, comparable."""
    plain = vars(desk) | {"shelf": vars(desk.shelf)}
    return {name: repr(value) for name, value in plain.items()}


def safetensors(tensors):
    """The bytes of a float32 safetensors file; {name: (shape, float)} filled with one value."""
    header, data = {}, b""
    for name, (shape, value) in sorted(tensors.items()):
        count = 1
        for size in shape:
            count *= size
        part = struct.pack("<f", value) * count
        header[name] = {
            "dtype": "F32",
            "shape": list(shape),
            "data_offsets": [len(data), len(data) + len(part)],
        }
        data += part
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data

"""Write the test vectors of the protocol: `python protocol/vectors/make.py`.

Everything is made from fixed seeds, so making them again gives the same bytes; a test asserts
that, and another compares the random streams with NumPy. Byte strings are hex, the bytes of a
"ramp" are i mod 251, floats are their IEEE 754 bits in hex (big end first)::

    for name, text in make().items(): ...
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from make_trust import audits, cosigned, seed
from make_updates import updates

from paris_protocol import blobs, gate, invite, log, streams, tensors
from paris_protocol.canonical import canonical, decimal, parse, sha256_hex
from paris_protocol.envelope import SELF, seal, unseal
from paris_protocol.errors import ParisError
from paris_protocol.keys import SMALL_ORDER, PrivateKey, peer_id, public_key
from paris_protocol.records import (
    Assignment,
    Beat,
    BlobRef,
    Commitment,
    Contribution,
    Head,
    Layer,
    Merge,
    MergeInput,
    Rate,
    Registration,
    Shard,
    TensorFile,
    Verdict,
)

FOLDER = Path(__file__).parent


def ramp(size: int) -> bytes:
    """Bytes i mod 251."""
    return (bytes(range(251)) * (size // 251 + 1))[:size]


def refusal(attempt: Callable[..., object], *arguments: object) -> str:
    """The code with which a call is refused."""
    try:
        attempt(*arguments)
    except ParisError as error:
        return error.code
    raise AssertionError("a vector that should be refused is accepted")


def keys() -> dict[str, Any]:
    """Seeds, public keys, PeerIDs, signatures, and the encodings that are refused."""
    made = [PrivateKey.from_seed(seed(name)) for name in ("root", "coordinator", "node")]
    bad = sorted(raw.hex() for raw in SMALL_ORDER)
    bad += [(2**255 - 19 + 2).to_bytes(32, "little").hex(), "ff" * 32]
    for text in bad:
        refusal(public_key, f"ed25519:{text}")
    return {
        "keys": [
            {
                "seed": key.seed.hex(),
                "key_id": key.id,
                "peer_id": peer_id(key.id),
                "message": b"paris".hex(),
                "signature": key.sign(b"paris").hex(),
            }
            for key in made
        ],
        "refused_public_keys": bad,
    }


def canonicals() -> dict[str, Any]:
    """Values and their canonical text; texts that are refused; reals."""
    values: list[Any] = [
        {}, [], None, True, 0, -1, 1 << 53, "", "é\u2028\n\"\\/\x7f",
        {"b": 1, "a": [None, {"ä": "𝄞"}]},
        {"\ue000": 1, "𐀀": 2},
    ]  # fmt: skip
    refused = [
        '{"a":1,"a":1}', '{"b":1,"a":2}', '{"a": 1}', "1.0", "1e3", "NaN", "-0", "01", '"\\u00e9"',
        "9007199254740993", '"\\ud800"', "[1]\n", "", "[" * 33 + "]" * 33,
    ]  # fmt: skip
    for text in refused:
        refusal(parse, text.encode())
    reals = (0.0, 0.03, 1e-15, -2.5e-07, 1 / 3, 123456789.123, 1e20)
    return {
        "values": [
            {
                "value": value,
                "text": canonical(value).decode(),
                "sha256": sha256_hex(canonical(value)),
            }
            for value in values
        ],
        "refused_texts": refused,
        "reals": [{"bits": struct.pack(">d", x).hex(), "text": decimal(x)} for x in reals],
    }


def _file(name: str, size: int) -> TensorFile:
    return TensorFile(blob=BlobRef(id=seed(name).hex(), size=size), root=seed(f"{name} root").hex())


def story(node: PrivateKey) -> list[Any]:
    """A registration, an assignment, and what follows from it up to the merge, unsigned."""
    assignment, commitment, contribution = (seed(n).hex() for n in ("as", "commit", "contrib"))
    head = Head(round=0, weights=_file("initial", 1000))
    states = tuple(seed(f"state {i}").hex() for i in range(3))
    return [
        Registration(node=node.id, peer_id=peer_id(node.id), version="0.1.0", at=1_700_000_000),
        Assignment(
            kind="train", plan="demo", node=node.id, expert=1, round=0, unit=0, parent=head,
            shards=(Shard(file=_file("shard", 2000), clips=64),), seed=seed("unit").hex(),
            steps=120, batch=96, rate=Rate(start="1", end="0.93", shape="cosine", warmup=4),
            optimiser_state="fresh", dtype="float32", threads=1, kernels="reference",
            update_codec="dense-f32", commit_every=60, policy=1, issued=1_700_000_000,
            soft_deadline=1_700_003_600, hard_deadline=1_700_007_200,
        ),
        Commitment(
            assignment=assignment, states=states, states_root=tensors.states_root(states),
            update_root=_file("update", 1000).root, steps=120,
        ),
        Contribution(
            assignment=assignment, commitment=commitment, update=_file("update", 1000),
            steps=120, samples=11520, loss="0.415", seconds=71,
        ),
        Verdict(
            contribution=contribution, assignment=assignment, node=node.id, expert=1, round=0,
            accepted=True, code="", policy=1, at=1_700_000_100,
            layers=(Layer(layer="L3", passed=True, code="", numbers=(("delta", "-0.0123"),)),),
        ),
        Merge(
            expert=1, round=0, parent=head, result=_file("result", 1000), published=True,
            inputs=(
                MergeInput(
                    contribution=contribution, update=_file("update", 1000),
                    weight=(1.0).hex(), scale=(0.75).hex(),
                ),
            ),
            numbers=(("before", "0.5"), ("after", "0.4")), policy=1, at=1_700_000_200,
        ),
        Beat(at=1_700_000_050, assignment=assignment, step=17, state="training"),
    ]  # fmt: skip


def envelopes() -> dict[str, Any]:
    """Signed statements, and envelopes that are refused where a beat of this node is expected."""
    node, network = PrivateKey.from_seed(seed("node")), seed("network").hex()
    sealed = [seal(record, node, network) for record in story(node)]
    beat = sealed[-1]
    outer = json.loads(beat.raw)

    def changed(**parts: Any) -> str:
        return canonical(outer | parts).decode()

    signature = outer["signatures"][0]
    other = PrivateKey.from_seed(seed("other"))
    far = outer["payloadType"].replace(network, seed("elsewhere").hex())
    sig = bytearray(base64.b64decode(signature["sig"]))
    sig[0] ^= 1
    flipped = {"keyid": node.id, "sig": base64.b64encode(sig).decode()}
    texts = {
        "another type": sealed[0].raw.decode(),
        "another network": changed(payloadType=far),
        "genesis network": changed(payloadType=outer["payloadType"].replace(network, SELF)),
        "another signer": seal(beat.record, other, network).raw.decode(),
        "no signature": changed(signatures=[]),
        "two signatures": changed(signatures=[signature, signature]),
        "flipped signature": changed(signatures=[flipped]),
        "payload of another": changed(payload=json.loads(sealed[0].raw)["payload"]),
        "unknown field": changed(extra=1),
        "spaces": json.dumps(outer),
        "duplicate key": '{"payload":"",' + beat.raw.decode()[1:],
        "base64 with stray bits": changed(payload=outer["payload"][:-3] + "R=="),
    }
    codes = {
        name: refusal(unseal, text.encode(), Beat, network, {node.id})
        for name, text in texts.items()
    }
    return {
        "network": network,
        "signer": node.id,
        "statements": [
            {
                "type": each.record.TYPE,
                "record": each.record.model_dump(mode="json"),
                "envelope": each.raw.decode(),
                "id": each.id,
            }
            for each in sealed
        ],
        "expected": {"type": "beat", "network": network, "signer": node.id},
        "refused": [
            {"name": name, "envelope": text, "code": codes[name]} for name, text in texts.items()
        ],
    }


def tensor_roots() -> dict[str, Any]:
    """Tensor sets with ramp data and their roots; and a root over committed states."""
    sets: list[list[tuple[str, str, tuple[int, ...]]]] = [
        [],
        [("w", "F32", (2, 3))],
        [("b", "BF16", (5,)), ("a", "I64", ()), ("é", "U8", (0, 4))],
        [("large", "F32", (1024, 4097))],
    ]
    states = [seed(f"state {i}").hex() for i in range(3)]
    return {
        "sets": [
            {
                "tensors": [{"name": n, "dtype": d, "shape": list(s)} for n, d, s in each],
                "root": tensors.tensor_root(
                    (n, d, s, ramp(tensors.byte_size(d, s))) for n, d, s in each
                ),
            }
            for each in sets
        ],
        "states": {"roots": states, "root": tensors.states_root(states)},
    }


def manifests() -> dict[str, Any]:
    """Ramp blobs of several sizes and their manifests."""
    made = {size: blobs.Manifest.build([ramp(size)]) for size in (0, 1, blobs.PIECE, 9_000_000)}
    return {
        "blobs": [
            {"size": size, "manifest": manifest.raw.decode(), "id": manifest.id}
            for size, manifest in made.items()
        ]
    }


def headers() -> dict[str, Any]:
    """Headers of tensor files, accepted and refused by the strict gate."""
    good = '{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    texts = {
        "plain": (good, 8),
        "padded": (good + "   ", 8),
        "metadata": ('{"__metadata__":{"a":"b"},' + good[1:], 8),
        "empty": ("{}", 0),
        "leading space": (" " + good, 8),
        "too much padding": (good + " " * 8, 8),
        "trailing bytes": (good, 9),
        "truncated": (good, 7),
        "duplicate key": (good[:-1] + "," + good[1:], 8),
        "unknown field": (good.replace('"shape"', '"x":1,"shape"'), 8),
        "hole": (good.replace("[0,8]", "[1,9]"), 9),
        "wrong length": (good.replace("[2]", "[3]"), 8),
        "negative": (good.replace("[2]", "[-2]"), 8),
        "float": (good.replace("[2]", "[2.0]"), 8),
        "dtype": (good.replace("F32", "F31"), 8),
        "name": (good.replace('"w"', '"../w"'), 8),
        "metadata no text": ('{"__metadata__":{"a":1},' + good[1:], 8),
        "list": ("[]", 0),
    }
    rows = []
    for name, (text, data) in texts.items():
        prefix = len(text).to_bytes(8, "little") + text.encode()
        try:
            gate.check_header(prefix, len(prefix) + data)
            accepted = True
        except ParisError:
            accepted = False
        rows.append(
            {"name": name, "prefix": prefix.hex(), "file_size": len(prefix) + data, "ok": accepted}
        )
    return {"headers": rows}


def random_streams() -> dict[str, Any]:
    """Stream keys, words, uniforms, normals, permutations and rows."""
    seeds = ["00" * 32, seed("unit").hex()]
    rows = []
    for text in seeds:
        key = streams.unit_key(text)
        for stream, step, slot in ((1, 0, 0), (2, 7, 3), (5, 1 << 40, (1 << 64) - 1)):
            rows.append(
                {
                    "key": key.hex(), "stream": stream, "step": step, "slot": slot,
                    "words": [f"{w:016x}" for w in streams.words(key, stream, step, slot, 9)],
                    "uniforms": [
                        struct.pack(">d", x).hex()
                        for x in streams.uniforms(key, stream, step, slot, 5)
                    ],
                    "normals": [
                        struct.pack(">f", x).hex()
                        for x in streams.normals(key, stream, step, slot, 7)
                    ],
                }
            )  # fmt: skip
    key = streams.unit_key(seeds[1])
    return {
        "keys": [{"seed": text, "key": streams.unit_key(text).hex()} for text in seeds],
        "streams": rows,
        "permutations": [
            {"key": key.hex(), "n": n, "epoch": epoch, "order": streams.permutation(key, n, epoch)}
            for n, epoch in ((1, 0), (10, 0), (10, 1), (37, 5))
        ],
        "rows": [
            {
                "key": key.hex(), "batch": 4, "n": 10, "step": step,
                "rows": [streams.row(key, step, slot, 4, 10) for slot in range(4)],
            }
            for step in (0, 2, 5)
        ],
        "picks": [
            {"word": f"{word:016x}", "weights": weights, "pick": streams.pick(word, weights)}
            for weights in ([1, 5, 1, 1], [3], [7, 1 << 40, 2])
            for word in (0, (1 << 61) - 1, 1 << 61, 3 << 62, (1 << 64) - 1)
        ],
        "buckets": [
            {
                "key": key.hex(), "weights": [1000, 40, 360], "step": step,
                "bucket": streams.bucket(key, step, [1000, 40, 360]),
            }
            for step in (0, 1, 7, 40)
        ],
        "bucket_rows": [
            {
                "key": key.hex(), "batch": 3, "n": 7, "bucket": 2, "visit": visit,
                "rows": [streams.row(key, visit, slot, 3, 7, 2) for slot in range(3)],
            }
            for visit in (0, 4)
        ],
    }  # fmt: skip


def logs() -> dict[str, Any]:
    """Entries, roots, proofs, tiles and a signed checkpoint."""
    entries = [hashlib.sha256(i.to_bytes(8, "big")).digest() for i in range(300)]
    tree = log.Tree(map(log.leaf_hash, entries))
    sizes = (0, 1, 2, 3, 7, 8, 255, 256, 257, 300)
    key, network = PrivateKey.from_seed(seed("coordinator")), seed("network").hex()
    name = log.origin(network)
    return {
        "entry": "entry i is SHA-256 of i as 8 bytes, big end first",
        "roots": [{"size": size, "root": tree.root(size).hex()} for size in sizes],
        "inclusion": [
            {"index": i, "size": n, "proof": [part.hex() for part in tree.inclusion(i, n)]}
            for i, n in ((0, 1), (0, 7), (6, 7), (5, 8), (255, 257), (256, 257), (123, 300))
        ],
        "consistency": [
            {"old": m, "size": n, "proof": [part.hex() for part in tree.consistency(m, n)]}
            for m, n in pairwise(sizes[1:])
        ],
        "files": [
            {"path": path, "sha256": sha256_hex(data)}
            for path, data in [*tree.tiles(), *log.bundles(entries)]
        ],
        "paths": [
            {"level": 0, "n": n, "width": width, "path": log.tile_path(0, n, width)}
            for n, width in ((0, 256), (999, 1), (1000, 256), (1234067, 44))
        ],
        "checkpoint": {
            "verifier_key": log.verifier_key(name, key.id),
            "note": log.Checkpoint(name, 300, tree.root()).sign(key),
        },
    }


def invites() -> dict[str, Any]:
    """Texts that name networks, what they mean, and texts that are refused."""
    network = seed("network").hex()
    good = [f"paris://{host}/{network}" for host in ("a.example", "a.example:8443", "[::1]:80")]
    bad = [
        f"https://a.example/{network}", "paris://a.example", f"paris://a.example:0/{network}",
        f"paris://a.example:70000/{network}", f"paris://a.example/{network.upper()}",
        f"paris://a.example/{network}/", f"paris://u@a.example/{network}", "",
    ]  # fmt: skip
    return {
        "invites": [
            {"text": text, "url": made.url, "network": made.network}
            for text, made in ((text, invite.parse_network(text)) for text in good)
            if isinstance(made, invite.Invite)
        ],
        "refused": [{"text": text, "code": refusal(invite.parse_network, text)} for text in bad],
    }


VECTORS: dict[str, Callable[[], dict[str, Any]]] = {
    "audit": audits, "blobs": manifests, "canonical": canonicals, "envelopes": envelopes,
    "gate": headers, "invites": invites, "keys": keys, "log": logs, "streams": random_streams,
    "tensors": tensor_roots, "updates": updates, "witness": cosigned,
}  # fmt: skip


def make() -> dict[str, str]:
    """File name → text of every vector file."""
    return {
        f"{name}.json": json.dumps(build(), indent=1, sort_keys=True, ensure_ascii=True) + "\n"
        for name, build in VECTORS.items()
    }


if __name__ == "__main__":
    for name, text in make().items():
        (FOLDER / name).write_text(text, encoding="utf-8")

"""Keys: what is refused as a public key, and as a key file."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from paris_protocol.errors import ParisError
from paris_protocol.keys import (
    FIELD,
    SMALL_ORDER,
    PrivateKey,
    load_key,
    peer_id,
    public_key,
    save_key,
    verify,
)

D = -121665 * pow(121666, -1, FIELD) % FIELD


def test_small_order_list_is_what_the_curve_says() -> None:
    """Doubling any listed point three times gives the neutral element, and there are 8 points."""
    points = set()
    for raw in SMALL_ORDER:
        y = (int.from_bytes(raw, "little") & ((1 << 255) - 1)) % FIELD
        square = (y * y - 1) * pow(D * y * y + 1, -1, FIELD) % FIELD
        x = pow(square, (FIELD + 3) // 8, FIELD)
        if (x * x - square) % FIELD:
            x = x * pow(2, (FIELD - 1) // 4, FIELD) % FIELD
        assert (x * x - square) % FIELD == 0
        points |= {(x, y), (-x % FIELD, y)}
    assert (len(SMALL_ORDER), len(points)) == (14, 8)
    for x, y in points:
        for _ in range(3):
            t = D * x * x * y * y % FIELD
            x, y = (
                2 * x * y * pow(1 + t, -1, FIELD) % FIELD,
                (y * y + x * x) * pow(1 - t, -1, FIELD) % FIELD,
            )
        assert (x, y) == (0, 1)


@pytest.mark.parametrize("raw", sorted(SMALL_ORDER), ids=lambda raw: raw.hex()[:8])
def test_small_order_keys_are_refused(raw: bytes) -> None:
    with pytest.raises(ParisError) as caught:
        verify(f"ed25519:{raw.hex()}", b"\0" * 64, b"")
    assert caught.value.code == "key.weak"


@pytest.mark.parametrize("text", ["", "ed25519:", "ed25519:" + "A" * 64, "ed25519:" + "ff" * 32])
def test_malformed_key_ids_are_refused(text: str) -> None:
    with pytest.raises(ParisError):
        public_key(text)


def test_signature_of_another_message_key_or_length_is_none() -> None:
    key, other = PrivateKey.generate(), PrivateKey.generate()
    signature = key.sign(b"data")
    assert verify(key.id, signature, b"data")
    assert not verify(key.id, signature, b"Data")
    assert not verify(other.id, signature, b"data")
    assert not verify(key.id, signature[:-1], b"data")


def test_peer_id_is_libp2ps() -> None:
    # The identity multihash of an Ed25519 key always begins like this in base58.
    assert peer_id(PrivateKey.generate().id).startswith("12D3KooW")


def test_key_file_round_trip(tmp_path: Path) -> None:
    key, path = PrivateKey.generate(), tmp_path / "key"
    save_key(path, key)
    assert load_key(path) == key
    assert path.stat().st_mode & 0o777 == 0o600
    assert key.seed.hex() not in repr(key)
    with pytest.raises(ParisError):
        save_key(path, PrivateKey.generate())
    assert load_key(path) == key
    assert [p.name for p in tmp_path.iterdir()] == ["key"]


def code_of_loading(path: Path) -> str:
    with pytest.raises(ParisError) as caught:
        load_key(path)
    return caught.value.code


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o700])
def test_looser_modes_are_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "key"
    save_key(path, PrivateKey.generate())
    path.chmod(mode)
    assert code_of_loading(path) == "key.file"


def test_links_folders_and_other_content_are_refused(tmp_path: Path) -> None:
    path, link = tmp_path / "key", tmp_path / "link"
    save_key(path, PrivateKey.generate())
    link.symlink_to(path)
    assert code_of_loading(link) == "key.file"
    assert code_of_loading(tmp_path) == "key.file"
    assert code_of_loading(tmp_path / "none") == "key.file"
    for text in ("", "00" * 31 + "\n", "00" * 32, "AA" * 32 + "\n", "00" * 33 + "\n"):
        path.write_text(text)
        assert code_of_loading(path) == "key.file"


def test_full_disk_leaves_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(ParisError) as caught:
        save_key(tmp_path / "key", PrivateKey.generate())
    assert caught.value.code == "disk.full"
    assert list(tmp_path.iterdir()) == []

"""What every blob store keeps to."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path
from typing import Any

import pytest

from paris_protocol.blobs import PIECE, Manifest
from paris_protocol.errors import ParisError
from paris_protocol.records import BlobRef


def blob(size: int, seed: int = 0) -> bytes:
    """Bytes that do not repeat from piece to piece."""
    block = hashlib.shake_256(b"%d %d" % (size, seed)).digest(min(size, 1 << 16))
    counted = (block[:-8] + i.to_bytes(8, "big") for i in itertools.count())
    data = b"".join(itertools.islice(counted, size // max(1, len(block)) + 1))
    return data[:size]


def pieces(manifest: Manifest, data: bytes) -> list[bytes]:
    ranges = [manifest.piece_range(i) for i in range(len(manifest.pieces))]
    return [data[offset : offset + length] for offset, length in ranges]


class StoreContract:
    """Subclasses give a fixture `store`."""

    DATA = blob(2 * PIECE + 777)

    @pytest.fixture
    def store(self, tmp_path: Path) -> Any:
        raise NotImplementedError

    @pytest.mark.parametrize("size", [0, 1, PIECE, PIECE + 1])
    def test_bytes_come_back(self, store: Any, size: int) -> None:
        data = blob(size)
        ref = store.add_bytes(data)
        assert ref == Manifest.build([data]).ref
        assert store.path(ref).read_bytes() == data
        assert store.has(ref) and store.missing(ref) == [] and store.ids() == [ref.id]
        assert store.add_bytes(data) == ref

    def test_a_file_comes_back(self, store: Any, tmp_path: Path) -> None:
        source = tmp_path / "some.safetensors"
        source.write_bytes(self.DATA)
        ref = store.add_file(source)
        source.unlink()
        assert store.path(ref).read_bytes() == self.DATA
        assert store.used() == len(self.DATA)

    def test_pieces_in_any_order_make_the_blob(self, store: Any) -> None:
        manifest = Manifest.build([self.DATA])
        ref = manifest.ref
        with pytest.raises(ParisError, match=r"blob|data") as caught:
            store.missing(ref)
        assert caught.value.code == "blob.missing"
        store.put_manifest(manifest.raw, ref)
        assert store.missing(ref) == [0, 1, 2] and not store.has(ref)
        for i in (2, 0, 0):
            store.put_piece(ref, i, pieces(manifest, self.DATA)[i])
            assert store.read_piece(ref.id, i) == pieces(manifest, self.DATA)[i]
        assert store.missing(ref) == [1] and not store.complete(ref) and store.ids() == []
        with pytest.raises(ParisError) as caught:
            store.path(ref)
        assert caught.value.code == "blob.missing"
        store.put_piece(ref, 1, pieces(manifest, self.DATA)[1])
        assert store.complete(ref) and store.path(ref).read_bytes() == self.DATA
        assert store.used() == len(self.DATA)

    def test_wrong_pieces_are_refused(self, store: Any) -> None:
        manifest = Manifest.build([self.DATA])
        store.put_manifest(manifest.raw, manifest.ref)
        good = pieces(manifest, self.DATA)
        for i, data in [(0, good[1]), (0, good[0][:-1]), (0, b""), (2, good[2] + b"x"), (3, b"x")]:
            with pytest.raises(ParisError) as caught:
                store.put_piece(manifest.ref, i, data)
            assert caught.value.code == "blob.corrupt"
        assert store.missing(manifest.ref) == [0, 1, 2] and store.used() == 0

    def test_wrong_manifests_are_refused(self, store: Any) -> None:
        manifest = Manifest.build([self.DATA])
        other = Manifest.build([b"other"])
        for raw, ref in [
            (other.raw, manifest.ref),
            (manifest.raw[:-1], manifest.ref),
            (manifest.raw, BlobRef(id=manifest.id, size=manifest.size + 1)),
        ]:
            with pytest.raises(ParisError) as caught:
                store.put_manifest(raw, ref)
            assert caught.value.code == "blob.corrupt"
        with pytest.raises(ParisError) as caught:
            store.manifest(manifest.id)
        assert caught.value.code == "blob.missing"

    def test_a_reference_of_another_size_is_refused(self, store: Any) -> None:
        ref = store.add_bytes(b"four")
        with pytest.raises(ParisError) as caught:
            store.path(BlobRef(id=ref.id, size=5))
        assert caught.value.code == "blob.corrupt"

    def test_what_changed_on_disk_is_not_given_out(self, store: Any) -> None:
        ref = store.add_bytes(self.DATA)
        path = store.path(ref)
        damaged = bytearray(self.DATA)
        damaged[PIECE] ^= 1
        path.write_bytes(damaged)
        assert store.read_piece(ref.id, 0) == self.DATA[:PIECE]
        for _ in range(2):
            with pytest.raises(ParisError) as caught:
                store.read_piece(ref.id, 1)
            assert caught.value.code == "blob.corrupt"
        with pytest.raises(ParisError) as caught:
            store.path(ref)
        assert caught.value.code == "blob.corrupt"
        assert not store.has(ref)
        assert store.add_bytes(self.DATA) == ref
        assert store.path(ref).read_bytes() == self.DATA

    def test_removed_is_gone(self, store: Any) -> None:
        ref = store.add_bytes(self.DATA)
        store.remove(ref)
        store.remove(ref)
        assert not store.has(ref) and store.used() == 0 and store.ids() == []
        with pytest.raises(ParisError) as caught:
            store.read_piece(ref.id, 0)
        assert caught.value.code == "blob.missing"

    def test_ids_cannot_name_files_elsewhere(self, store: Any) -> None:
        for name in ("../../etc/passwd", "", "A" * 64, "0" * 63 + "/"):
            with pytest.raises(ParisError) as caught:
                store.read_piece(name, 0)
            assert caught.value.code == "blob.missing"

    def test_quota_evicts_the_least_recently_used_but_no_pinned(self, store: Any) -> None:
        store.quota = 350
        refs = [store.add_bytes(blob(100, seed)) for seed in range(3)]
        store.pin(refs[0].id)
        store.path(refs[1])  # used later than the third
        newest = store.add_bytes(blob(100, 3))
        assert [store.has(ref) for ref in (*refs, newest)] == [True, True, False, True]
        for ref in (refs[1], newest):
            store.pin(ref.id)
        with pytest.raises(ParisError) as caught:
            store.add_bytes(blob(100, 4))
        assert caught.value.code == "disk.quota"
        manifest = Manifest.build([self.DATA])
        store.put_manifest(manifest.raw, manifest.ref)
        with pytest.raises(ParisError) as caught:
            store.put_piece(manifest.ref, 0, self.DATA[:PIECE])
        assert caught.value.code == "disk.quota"
        assert store.used() == 300
        store.unpin(newest.id)
        store.add_bytes(blob(100, 4))
        assert not store.has(newest)

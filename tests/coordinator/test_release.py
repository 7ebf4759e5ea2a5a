"""A release is whole, reproducible, loadable by plain diffusers, and any changed byte is named."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paris_coordinator.cards import CardFacts, model_card
from paris_models.checkpoint import load_tensors
from paris_protocol.errors import ParisError
from paris_protocol.net.folder import verify_folder
from paris_protocol.records import Merge, Revert
from tinynet import key
from tinyrelease import TinyRelease


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRelease:
    return TinyRelease(tmp_path_factory.mktemp("release"))


@pytest.fixture(scope="module")
def release(tiny: TinyRelease) -> Path:
    return tiny.publish("published")


def refusal(folder: Path, network: str | None = None) -> ParisError:
    with pytest.raises(ParisError) as caught:
        verify_folder(folder, network)
    return caught.value


def files_of(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_a_release_verifies(tiny: TinyRelease, release: Path) -> None:
    verified = verify_folder(release, tiny.net.genesis.id)
    assert verified.merges == 2
    assert [entry.root for entry in verified.release.record.experts] == [
        head.weights.root for head in tiny.heads
    ]


def test_the_same_sources_give_the_same_bytes(tiny: TinyRelease, release: Path) -> None:
    again = tiny.publish("again")
    assert files_of(again) == files_of(release)
    for name in files_of(release):
        assert (again / name).read_bytes() == (release / name).read_bytes(), name


def test_nothing_but_the_release_is_left(tiny: TinyRelease, release: Path) -> None:
    assert not (tiny.folder / "published.draft").exists()
    assert not [p for p in tiny.folder.iterdir() if p.name.endswith(".part")]


def test_publishing_again_changes_nothing(tiny: TinyRelease, release: Path) -> None:
    before = {name: (release / name).stat().st_mtime_ns for name in files_of(release)}
    assert tiny.publish("published") == release
    assert {name: (release / name).stat().st_mtime_ns for name in files_of(release)} == before


def test_experts_load_with_plain_diffusers(tiny: TinyRelease, release: Path) -> None:
    for index, head in enumerate(tiny.files):
        model = FluxTransformer2DModel.from_pretrained(release, subfolder=f"expert_{index}")
        expected = load_tensors(head)
        loaded = model.state_dict()
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[name], expected[name]) for name in loaded)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(release, subfolder="scheduler")
    assert scheduler.config.shift == 1.0


def test_one_flipped_bit_of_every_file_is_refused_and_named(release: Path) -> None:
    names = st.sampled_from(files_of(release))

    def flip(name: str, place: int, bit: int) -> None:
        path = release / name
        whole = path.read_bytes()
        broken = bytearray(whole)
        broken[place % len(broken)] ^= 1 << bit
        path.write_bytes(broken)
        try:
            error = refusal(release)
        finally:
            path.write_bytes(whole)
        assert error.reason.exit == 1, error
        assert name in error.sentence

    for name in files_of(release):
        flip(name, 12345, 0)
    given(names, st.integers(0, 1 << 30), st.integers(0, 7))(
        settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))(flip)
    )()
    verify_folder(release)


def test_missing_and_extra_files_are_named(release: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(release, copy)
    (copy / "LICENSES.md").unlink()
    assert (refusal(copy).code, refusal(copy).detail) == ("release.missing", "LICENSES.md")
    shutil.copy(release / "LICENSES.md", copy / "LICENSES.md")
    (copy / "expert_0" / "more.bin").write_bytes(b"?")
    assert (refusal(copy).code, refusal(copy).detail) == ("release.extra", "expert_0/more.bin")
    (copy / "expert_0" / "more.bin").unlink()
    (copy / "link").symlink_to("README.md")
    assert refusal(copy).code == "release.extra"


def test_a_strangers_key_is_refused(tiny: TinyRelease) -> None:
    with pytest.raises(ParisError) as caught:
        tiny.publish("foreign", signer=key("stranger"))
    assert caught.value.code == "release.key"
    assert not (tiny.folder / "foreign").exists()


def test_another_network_is_refused(release: Path) -> None:
    assert refusal(release, "0" * 64).code == "network.mismatch"


def test_a_folder_without_release_is_none(tmp_path: Path) -> None:
    assert refusal(tmp_path).code == "release.none"


def test_a_draft_that_changed_after_signing_is_not_published(tiny: TinyRelease) -> None:
    def spoil(folder: Path) -> None:
        (folder / "README.md").write_text("another")

    with pytest.raises(ParisError) as caught:
        tiny.publish("spoilt", spoil=spoil)
    assert caught.value.code == "release.file"
    assert not (tiny.folder / "spoilt").exists()


def test_a_full_disk_leaves_no_release(tiny: TinyRelease, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    def spoil(_folder: Path) -> None:
        monkeypatch.setattr("paris_coordinator.release.os.fsync", full)

    with pytest.raises(ParisError) as caught:
        tiny.publish("full", spoil=spoil)
    assert caught.value.code == "disk.full"
    assert not (tiny.folder / "full").exists()


def test_the_card_names_stand_ins_and_numbers(release: Path) -> None:
    card = (release / "README.md").read_text()
    assert card.count("stand-in for") == 2
    assert "| 0 | 96 | 1 | 2 |" in card
    assert "Apache-2.0" in (release / "LICENSES.md").read_text()


def test_the_card_counts_what_is_in_a_head_after_a_revert(tiny: TinyRelease) -> None:
    merge = next(each.record for each in tiny.log if isinstance(each.record, Merge))
    head = tiny.heads[merge.expert]
    assert head.merge is not None
    revert = Revert(
        expert=merge.expert, revocation="0" * 64, parent=head, removed=merge.inputs[:1],
        result=head.weights, numbers=(), policy=1, at=1,
    )  # fmt: skip
    heads = list(tiny.heads)
    heads[merge.expert] = head.model_copy(update={"merge": "1" * 64})
    steps = {each.id: each.record for each in tiny.log if isinstance(each.record, Merge)}
    facts = CardFacts(
        network="", genesis=tiny.net.genesis.record, number=1, heads=heads,
        steps={**steps, "1" * 64: revert}, nodes=2, router={},
    )  # fmt: skip
    card = model_card(facts)
    assert "taken out again, their keys were revoked: 1" in card
    rows = [line.split("|") for line in card.splitlines() if line.startswith(("| 0 ", "| 1 "))]
    assert [row[4].strip() for row in rows] == ["1", "2"]
    plain = model_card(replace(facts, heads=tiny.heads, steps=steps))
    assert "revoked" not in plain

"""Secret sets: an opening is the committed set, whole and in order, or it is refused."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paris_protocol.errors import ParisError
from paris_protocol.log import leaf_hash, node_hash
from paris_protocol.records import SecretSet, SecretSetOpened
from paris_protocol.secretsets import check_opening, check_scores, set_root

digests = st.binary(min_size=32, max_size=32).map(bytes.hex)


def committed(salt: str, clips: list[str]) -> SecretSet:
    return SecretSet(expert=0, number=0, clips=len(clips), root=set_root(salt, clips), at=5)


def opened(salt: str, clips: list[str], *scores: tuple[str, str, str]) -> SecretSetOpened:
    return SecretSetOpened(set="0" * 64, salt=salt, clips=tuple(clips), scores=scores, at=9)


def test_the_root_is_the_merkle_root_over_salted_digests() -> None:
    salt, clips = "aa" * 32, ["01" * 32, "02" * 32]
    leaves = [leaf_hash(hashlib.sha256(bytes.fromhex(salt + clip)).digest()) for clip in clips]
    assert set_root(salt, clips) == node_hash(*leaves).hex()


@given(digests, st.lists(digests, min_size=1, max_size=9, unique=True), st.data())
def test_only_the_committed_set_opens(salt: str, clips: list[str], data: st.DataObject) -> None:
    record = committed(salt, clips)
    check_opening(record, opened(salt, clips))
    changed = list(clips)
    place = data.draw(st.integers(0, len(clips) - 1))
    changed[place] = data.draw(digests.filter(lambda one: one != clips[place]))
    other = data.draw(digests.filter(lambda one: one != salt))
    wrong = [(salt, changed), (other, clips), (salt, clips[:-1]), (salt, [*clips, clips[0]])]
    wrong += [(salt, clips[::-1])] if len(clips) > 1 else []
    for bad_salt, bad_clips in wrong:
        with pytest.raises(ParisError, match="committed"):
            check_opening(record, opened(bad_salt, bad_clips))


def test_an_opening_names_every_score_once() -> None:
    one, two = ("1" * 64, "0.1", "0.01"), ("2" * 64, "-0.1", "0.01")
    check_scores(opened("0" * 64, [], one, two), {one[0], two[0]})
    for scores, judged in (
        ((one,), {one[0], two[0]}),
        ((one, two), {one[0]}),
        ((one, one), {one[0]}),
    ):
        with pytest.raises(ParisError) as refusal:
            check_scores(opened("0" * 64, [], *scores), judged)
        assert refusal.value.code == "secret.set"

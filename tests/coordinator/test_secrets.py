"""Secret sets at the coordinator: committed first, used by one head, opened afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator import synthetic as made
from coordinator.synthetic import digest, refused
from paris_coordinator import secrets
from paris_coordinator.events import CommitSecret, OpenSecret
from paris_coordinator.jobs.common import held_out
from paris_coordinator.jobs.secret import clip_digests
from paris_coordinator.secrets import Shelf
from paris_coordinator.worker import perform
from paris_protocol.records import Head, Merge, SecretSet, Verdict
from paris_protocol.secretsets import set_root
from tinynet import SECRET, TinyNet

HEAD, NEXT = digest("head"), digest("next")


def answer(head: str) -> dict[str, object]:
    clips, salt = [digest("clip", head, i) for i in range(3)], digest("salt", head)
    return {"clips": clips, "salt": salt, "root": set_root(salt, clips)}


def committed(shelf: Shelf, head: str, expert: int = 0) -> str:
    record = secrets.commitment(shelf, expert, answer(head), 5)
    id = digest("set", expert, record.number)
    shelf.committed(id, record, head)
    return id


def verdict(name: str) -> Verdict:
    return Verdict(
        contribution=digest(name), assignment=digest("a"), node=made.KEY, expert=0, round=0,
        accepted=True, code="accepted", layers=(), policy=1, at=0,
    )  # fmt: skip


def parent() -> Head:
    weights = made.tensor_file("head").model_copy(update={"root": HEAD})
    return Head(round=0, weights=weights)


def merge() -> Merge:
    return Merge(
        expert=0, round=0, parent=parent(), inputs=(),
        result=made.tensor_file("next"), published=True,
        numbers=(("delta", "-0.2"), ("se", "0.02")), policy=1, at=0,
    )  # fmt: skip


def test_the_life_of_a_set() -> None:
    shelf = Shelf()
    assert list(shelf.due([(0, HEAD, True), (1, HEAD, False)])) == [CommitSecret(0)]
    first = committed(shelf, HEAD)
    assert list(shelf.due([(0, HEAD, True)])) == []
    assert shelf.current(0, HEAD) == first
    shelf.measured(digest("one"), "-0.1", "0.01")
    shelf.measured(digest("late"), "0.3", "0.01")  # never gets a verdict: it does not count
    shelf.judged(verdict("one"), HEAD)
    shelf.merged(digest("merge"), merge())
    assert shelf.judge_of(digest("one")) == first
    assert list(shelf.due([(0, NEXT, True)])) == [CommitSecret(0), OpenSecret(first)]
    opening = secrets.opening(shelf, first, answer(HEAD), 9)
    expected = ((digest("one"), "-0.1", "0.01"), (digest("merge"), "-0.2", "0.02"))
    assert opening.scores == expected
    shelf.opened(digest("opening"), opening)
    assert list(shelf.due([(0, NEXT, False)])) == []
    second = committed(shelf, NEXT)
    assert shelf.sets[second].record.number == 1


def test_what_breaks_the_order_is_refused_and_changes_nothing() -> None:
    shelf = Shelf()
    first = committed(shelf, HEAD)
    before = repr(shelf.sets)
    again = SecretSet(expert=0, number=1, clips=3, root=digest("x"), at=5)
    with refused("secret.set"):
        shelf.committed(digest("again"), again, HEAD)  # one set for one head
    with refused("secret.set"):
        shelf.committed(digest("gap"), again.model_copy(update={"number": 2}), NEXT)
    with refused("secret.set"):
        secrets.opening(shelf, first, answer(NEXT), 9)
    good = secrets.opening(shelf, first, answer(HEAD), 9)
    for changed in ({"scores": ((digest("z"), "0", "1"),)}, {"set": digest("none")}):
        with refused("secret.set"):
            shelf.opened(digest("opening"), good.model_copy(update=changed))
    assert repr(shelf.sets) == before
    shelf.opened(digest("opening"), good)
    with refused("secret.set"):
        shelf.opened(digest("opening"), good)


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> TinyNet:
    return TinyNet(tmp_path_factory.mktemp("tiny"))


def test_the_committed_clips_are_those_that_judge(net: TinyNet) -> None:
    root = net.head.weights.root

    def run(head: str, private: Path, secret: str = SECRET) -> dict[str, object]:
        return perform(secrets.job(str(private), secret, head, 48))["result"]

    one = run(root, net.private(0))
    assert one == run(root, net.private(0))
    held = held_out(net.private(0), count=48, secret=SECRET, salt=root)
    assert one["clips"] == clip_digests(held.clips)
    assert len(set(one["clips"])) == 48
    others = [run(NEXT, net.private(0)), run(root, net.private(1)), run(root, net.private(0), HEAD)]
    assert len({str(each["root"]) for each in [one, *others]}) == 4
    assert others[0]["salt"] != one["salt"]
    assert others[0]["clips"] != one["clips"]  # another head: another part of the pool

"""A release verifies as a whole, and any change of any file is refused and named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paris_protocol.canonical import canonical, parse
from paris_protocol.errors import ParisError
from paris_protocol.evidence import lineage_statements
from protocol.world import COORDINATOR, NODES, OTHER, ROOT, World, check, key, policy_record


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return World().lived().release()


def refused(files: dict[str, bytes], network: str | None = None) -> ParisError:
    with pytest.raises(ParisError) as caught:
        check(files, network)
    return caught.value


def test_release_verifies(files: dict[str, bytes]) -> None:
    world = World()
    verified = check(files, world.network)
    assert verified.network == world.network
    assert verified.merges == 3
    assert verified.release.signer == COORDINATOR.id


def test_any_flipped_bit_of_any_file_is_refused_and_named(files: dict[str, bytes]) -> None:
    @settings(max_examples=100, deadline=None)
    @given(st.sampled_from(sorted(files)), st.integers(0, 1 << 30), st.integers(0, 7))
    def flip(path: str, place: int, bit: int) -> None:
        data = bytearray(files[path])
        data[place % len(data)] ^= 1 << bit
        error = refused(files | {path: bytes(data)})
        assert error.reason.exit == 1
        assert path in error.detail

    flip()


def test_every_byte_of_proof_and_release_counts(files: dict[str, bytes]) -> None:
    for path in ("proof.json", "release.json"):
        step = max(1, len(files[path]) // 100)
        for place in range(0, len(files[path]), step):
            data = bytearray(files[path])
            data[place] ^= 1
            assert path in refused(files | {path: bytes(data)}).detail


def test_missing_file_is_named(files: dict[str, bytes]) -> None:
    for path in files:
        error = refused({name: data for name, data in files.items() if name != path})
        assert path in error.detail
        assert error.code == ("release.none" if path == "release.json" else "release.missing")


@pytest.mark.parametrize("extra", ["notes.txt", "lineage/x.json", "policy/x", "expert_0/a"])
def test_extra_file_is_named(files: dict[str, bytes], extra: str) -> None:
    error = refused(files | {extra: b"hello"})
    assert (error.code, extra) == ("release.extra", error.detail)


def test_another_network_is_refused(files: dict[str, bytes]) -> None:
    assert refused(files, "0" * 64).code == "network.mismatch"


def test_root_key_may_release_and_strangers_may_not() -> None:
    assert check(World().lived().release(signer=ROOT)).release.signer == ROOT.id
    for stranger in (NODES[0], OTHER, key("stranger")):
        # OTHER was a coordinator under the first policy and is not under the last one.
        assert refused(World().lived().release(signer=stranger)).code == "release.key"


def test_policy_must_be_signed_by_the_root_or_its_predecessor() -> None:
    world = World()
    usurper = key("usurper")
    forged = world.put(policy_record(2, world.policies[0].id, (usurper.id,)), usurper)
    world.policies[1] = forged
    error = refused(world.lived().release(signer=usurper))
    assert (error.code, "policy/2.json" in error.detail) == ("release.key", True)


def test_policies_are_linked() -> None:
    world = World()
    world.policies[1] = world.put(policy_record(2, "0" * 64, (COORDINATOR.id,)), OTHER)
    assert "policy/2.json" in refused(world.lived().release()).detail
    world = World()
    world.policies = [world.policies[0], world.put(policy_record(3, None, ()), ROOT)]
    assert refused(world.lived().release()).code == "release.missing"


def lineage_refused(world: World, drop: Callable[[Any], bool]) -> ParisError:
    kept = [each for each in lineage_statements(world.heads, world.log) if not drop(each.record)]
    return refused(world.release(lineage=kept))


@pytest.mark.parametrize("kind", ["merge", "contribution", "assignment", "commitment", "verdict"])
def test_no_statement_of_the_lineage_can_be_left_out(kind: str) -> None:
    dropped: list[Any] = []

    def first(record: Any) -> bool:
        if kind == record.TYPE and not dropped:
            dropped.append(record)
            return True
        return False

    assert lineage_refused(World().lived(), first).code == "release.lineage"


def test_head_that_is_not_the_last_is_refused() -> None:
    world = World().lived()
    heads = list(world.heads)
    world.merge(0)
    chosen = lineage_statements(world.heads, world.log)
    world.heads = heads
    assert refused(world.release(lineage=chosen)).code == "release.lineage"


def test_second_merge_of_a_parent_is_refused() -> None:
    world = World()
    before = list(world.heads)
    world.merge(0)
    fork = list(world.heads)
    world.heads = before
    world.merge(0)
    both = lineage_statements([*fork, *world.heads], world.log)
    assert refused(world.release(lineage=both)).code == "release.lineage"


def test_unpublished_merges_may_be_shown() -> None:
    world = World().lived()
    whole = [each for each in world.log if each.record.TYPE not in ("genesis", "policy")]
    assert check(world.release(lineage=whole)).merges == 4


def test_verdict_must_be_the_coordinators() -> None:
    world = World()
    contribution, _ = world.judge(0, 0)
    accepted = next(each.record for each in world.log if each.record.TYPE == "verdict")
    world.log = [each for each in world.log if each.record.TYPE != "verdict"]
    world.put(accepted, NODES[0])
    merge = world.put(world.merge_record(0, [contribution]), COORDINATOR)
    world.heads[0] = world.heads[0].model_copy(
        update={"round": 1, "weights": merge.record.result, "merge": merge.id}
    )
    assert refused(world.release()).code == "release.key"


def test_statement_under_the_name_of_another_is_refused() -> None:
    world = World().lived()
    chosen = lineage_statements(world.heads, world.log)
    swapped = [replace(chosen[0], raw=chosen[1].raw), replace(chosen[1], raw=chosen[0].raw)]
    error = refused(world.release(lineage=[*swapped, *chosen[2:]]))
    assert (error.code, "lineage/" in error.detail) == ("release.file", True)


def test_statements_must_be_logged_in_the_order_of_events() -> None:
    world = World().lived()
    names = [each.record.TYPE for each in world.log]
    merge, verdict = len(names) - 1 - names[::-1].index("merge"), names.index("verdict")
    world.log[merge], world.log[verdict] = world.log[verdict], world.log[merge]
    assert refused(world.release()).code == "release.proof"


def test_proof_must_cover_the_release_and_its_lineage() -> None:
    world = World().lived()
    files = world.release()
    partial = [each for each in world.log if each.record.TYPE in ("release", "genesis")]
    assert refused(files | {"proof.json": world.proof(partial)}).code == "release.proof"
    foreign = [*world.log[3:], world.put(world.log[3].record, COORDINATOR)]
    assert refused(files | {"proof.json": world.proof(foreign)}).code == "release.proof"


def test_proof_of_a_foreign_log_is_refused() -> None:
    world = World().lived()
    files = world.release()
    listed = [each for each in world.log if f"lineage/{each.id}.json" in files]
    listed += [world.log[-1], *world.policies]
    foreign = world.proof(listed, signer=NODES[0])
    assert refused(files | {"proof.json": foreign}).code == "release.proof"
    assert check(files | {"proof.json": world.proof(listed, signer=ROOT)})


def test_unsigned_content_in_the_proof_is_refused(files: dict[str, bytes]) -> None:
    proof = parse(files["proof.json"])
    for changed in (
        proof | {"note": "hello"},
        proof | {"checkpoint": proof["checkpoint"] + "— witness.example AAAAAAAA\n"},
        proof | {"indices": proof["indices"] | {"00" * 32: 1}},
    ):
        assert "proof.json" in refused(files | {"proof.json": canonical(changed)}).detail
    spaced = files["proof.json"].replace(b'":', b'": ', 1)
    assert refused(files | {"proof.json": spaced}).code == "release.file"

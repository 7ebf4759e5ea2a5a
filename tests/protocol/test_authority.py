"""Who may sign when: policies, rotated keys of coordinators and nodes, releases that span both."""

from __future__ import annotations

from typing import Any

import pytest

from paris_protocol.authority import Authority, check_rotation, open_chain
from paris_protocol.envelope import Sealed, seal
from paris_protocol.errors import ParisError
from paris_protocol.keys import PrivateKey, rotation_text
from paris_protocol.records import KeyRotation, Policy
from paris_protocol.witness import cosign, witness_name
from protocol.world import COORDINATOR, NODES, OTHER, ROOT, World, check, key, policy_record

THIRD = key("third")


def refused(act: Any) -> ParisError:
    with pytest.raises(ParisError) as caught:
        act()
    return caught.value


def following(world: World, signer: PrivateKey, **changes: Any) -> Sealed[Policy]:
    """A policy behind the world's last one, with changes."""
    last = world.policies[-1]
    record = last.record.model_copy(
        update={"number": last.record.number + 1, "previous": last.id, **changes}
    )
    return seal(record, signer, world.network)


def chain(world: World, *more: Sealed[Policy]) -> tuple[Sealed[Policy], ...]:
    return open_chain(world.genesis, [each.raw for each in (*world.policies, *more)])


def test_a_coordinator_may_change_numbers_but_not_keys() -> None:
    world = World()
    assert chain(world, following(world, COORDINATOR, soft_deadline=90))[-1].record.number == 3
    assert chain(world, following(world, ROOT, coordinator_keys=(THIRD.id,)))
    for changed in (
        {"coordinator_keys": (COORDINATOR.id, THIRD.id)},
        {"coordinator_keys": ()},
        {"witnesses": (THIRD.id,)},
        {"witness_quorum": 1},
    ):
        assert chain(world, following(world, ROOT, **changed))
        error = refused(
            lambda changed=changed: chain(world, following(world, COORDINATOR, **changed))
        )
        assert error.code == "record.signer"


def test_policies_follow_each_other() -> None:
    world = World()
    for signer, changed in (
        (OTHER, {}),  # a coordinator of policy 1, not of policy 2
        (THIRD, {}),
        (ROOT, {"number": 4}),
        (ROOT, {"number": 2}),
        (ROOT, {"previous": world.policies[0].id}),
        (ROOT, {"previous": None}),
    ):
        act = following(world, signer, **changed)
        assert refused(lambda act=act: chain(world, act)).code == "record.signer"
    first = seal(policy_record(1, None, (OTHER.id,)), OTHER, world.network)
    assert refused(lambda: open_chain(world.genesis, [first.raw])).code == "record.signer"


def test_the_place_in_the_log_decides_who_may_sign() -> None:
    world = World()
    first, second = world.policies
    authority = Authority(world.genesis, world.policies, {first.id: 1, second.id: 10})
    old, new = {ROOT.id, OTHER.id}, {ROOT.id, COORDINATOR.id}
    assert authority.keys_at(1) == {ROOT.id}
    assert authority.keys_at(2) == authority.keys_at(10) == old
    assert authority.keys_at(11) == authority.keys_at(99) == new
    verdict = seal(policy_record(1, None, ()), OTHER, world.network)
    authority.check(verdict, 10)
    assert refused(lambda: authority.check(verdict, 11)).code == "record.signer"
    for indices in ({first.id: 1}, {first.id: 10, second.id: 1}, {first.id: 1, second.id: 1}):
        error = refused(lambda indices=indices: Authority(world.genesis, world.policies, indices))
        assert error.code == "log.proof"


def rotated(number: int = 2) -> World:
    """A world that lived under COORDINATOR, whose key was then rotated to THIRD."""
    world = World().lived()
    policy = following(world, ROOT, coordinator_keys=(THIRD.id,))
    world.policies.append(policy)
    world.log.append(policy)
    return world


def released(world: World, signer: PrivateKey = THIRD) -> dict[str, bytes]:
    files = world.release(signer=signer)
    listed = [each for each in world.log if f"lineage/{each.id}.json" in files]
    listed += [world.log[-1], *world.policies]
    return files | {"proof.json": world.proof(listed, signer=THIRD)}


def test_what_the_old_key_signed_before_stays_valid() -> None:
    assert check(released(rotated())).release.signer == THIRD.id


def test_what_the_old_key_signs_after_its_rotation_is_refused() -> None:
    world = rotated()
    assert refused(lambda: check(released(world, signer=COORDINATOR))).code == "release.key"
    # The same word that was good before: a verdict under policy 2, by policy 2's key.
    world = World()
    contribution, _ = world.judge(0, 0)
    verdict = world.log.pop()
    policy = following(world, ROOT, coordinator_keys=(THIRD.id,))
    world.policies.append(policy)
    world.log += [policy, verdict]
    merge = world.put(world.merge_record(0, [contribution], policy=3), THIRD)
    world.heads[0] = world.heads[0].model_copy(
        update={"round": 1, "weights": merge.record.result, "merge": merge.id}
    )
    error = refused(lambda: check(released(world)))
    assert (error.code, "verdict" in error.detail) == ("release.key", True)


def test_the_new_key_may_judge_what_the_old_policy_assigned() -> None:
    world = World()
    contribution, _ = world.judge(0, 0)
    verdict = world.log.pop().record
    policy = following(world, ROOT, coordinator_keys=(THIRD.id,))
    world.policies.append(policy)
    world.log.append(policy)
    world.put(verdict, THIRD)
    merge = world.put(world.merge_record(0, [contribution], policy=3), THIRD)
    world.heads[0] = world.heads[0].model_copy(
        update={"round": 1, "weights": merge.record.result, "merge": merge.id}
    )
    assert check(released(world)).merges == 1


def test_a_proof_signed_by_the_rotated_key_is_refused() -> None:
    world = rotated()
    files = released(world)
    listed = [each for each in world.log if f"lineage/{each.id}.json" in files]
    listed += [world.log[-1], *world.policies]
    old = world.proof(listed, signer=COORDINATOR)
    assert refused(lambda: check(files | {"proof.json": old})).code == "release.proof"


def test_a_proof_shows_where_the_policies_stand() -> None:
    world = rotated()
    files = released(world)
    listed = [each for each in world.log if f"lineage/{each.id}.json" in files]
    bare = world.proof([*listed, world.log[-1]], signer=THIRD)
    assert refused(lambda: check(files | {"proof.json": bare})).code == "release.proof"


def witnessed(lines: int, *, stray: bool = False) -> dict[str, bytes]:
    """A release of a network whose policy demands two of three witnesses."""
    world = World()
    witnesses = [key(f"witness {i}") for i in range(3)]
    policy = following(
        world, ROOT, witnesses=tuple(each.id for each in witnesses), witness_quorum=2
    )
    world.policies.append(policy)
    world.log.append(policy)
    for expert in range(2):
        judged = [world.judge(expert, unit)[0] for unit in range(2)]
        merge = world.put(world.merge_record(expert, judged), COORDINATOR)
        world.heads[expert] = world.heads[expert].model_copy(
            update={"round": 1, "weights": merge.record.result, "merge": merge.id}
        )
    files = world.release()
    proof = files["proof.json"].decode()
    begin = proof.index('"checkpoint":"') + len('"checkpoint":"')
    end = proof.index('"', begin)
    note = proof[begin:end].replace("\\n", "\n")
    for witness in [*witnesses[:lines], *([NODES[0]] if stray else [])]:
        note += cosign(note, witness_name(witness.id), witness, 1_700_000_400)
    return files | {
        "proof.json": (proof[:begin] + note.replace("\n", "\\n") + proof[end:]).encode()
    }


def test_a_release_needs_its_witnesses() -> None:
    assert check(witnessed(2)).checkpoint
    assert check(witnessed(3)).checkpoint
    for lines in (0, 1):
        assert refused(lambda lines=lines: check(witnessed(lines))).code == "log.witness"
    assert refused(lambda: check(witnessed(2, stray=True))).code == "release.proof"


def rotation(**changes: Any) -> KeyRotation:
    old, new, at = NODES[0], NODES[1], 1_700_000_500
    consent = new.sign(rotation_text("ab" * 32, old.id, new.id, at)).hex()
    return KeyRotation(old=old.id, new=new.id, consent=consent, at=at).model_copy(update=changes)


def test_both_keys_of_a_rotation_agree() -> None:
    network = "ab" * 32
    check_rotation(seal(rotation(), NODES[0], network), network)
    for signer, record, elsewhere, code in (
        (NODES[1], rotation(), network, "record.signer"),
        (NODES[0], rotation(consent="00" * 64), network, "record.signature"),
        (NODES[0], rotation(at=1), network, "record.signature"),
        (NODES[0], rotation(new=OTHER.id), network, "record.signature"),
        (NODES[0], rotation(new=NODES[0].id), network, "record.malformed"),
        (NODES[0], rotation(), "cd" * 32, "record.signature"),
        (NODES[0], rotation(new="ed25519:01" + "00" * 31), network, "key.weak"),
    ):
        sealed = seal(record, signer, elsewhere)
        error = refused(lambda sealed=sealed, where=elsewhere: check_rotation(sealed, where))
        assert error.code == code

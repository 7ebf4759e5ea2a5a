"""Training plans at the desk, in policies and in recipes: offered, chosen, and refused by name."""

import json

import pytest

from coordinator import synthetic as made
from coordinator.clerk import Clerk
from coordinator.synthetic import refused
from coordinator.test_recipe import DEMO, changed, refusal, written
from paris_coordinator import earlier, planning, rounds
from paris_coordinator.desk import Desk
from paris_coordinator.events import Called, Filed, LeaseAsked, Opened, Uploaded
from paris_coordinator.policies import following
from paris_coordinator.recipe import load_recipe
from paris_models.plans import PLANS
from paris_protocol.canonical import real
from paris_protocol.envelope import seal
from paris_protocol.keys import PrivateKey
from paris_protocol.records import PlanRules, Policy

A, B, C, D = (made.key_of(i) for i in range(4))


def rules(plan="lora-16-bf16", codec="lora-int16", dtype="bfloat16", rate="4"):
    return PlanRules(plan=plan, dtype=dtype, update_codec=codec, rate=rate)


def policy(*offers, audit=None, **changed):
    return made.policy(audit).model_copy(update={"plans": offers, **changed})


def clerk_with(*nodes, plans=(), audit=None):
    desk = Desk(made.NETWORK, made.genesis(), policy(*plans, audit=audit), made.digest("policy"))
    clerk = Clerk(desk)
    for node in nodes:
        clerk.register(node)
    return clerk


# ---------------------------------------------------------------- leases


def test_a_node_gets_the_plan_that_it_prefers_of_those_that_are_taken():
    clerk = clerk_with(A, B, C, plans=(rules(), rules("lora-64-nf4", "lora-int8", rate="0.5")))
    first = clerk.lease(A, plans=("adafactor", "lora-64-nf4", "lora-16-bf16", "float32")).record
    assert (first.plan, first.dtype) == ("lora-64-nf4", "bfloat16")
    assert first.update_codec == "lora-int8"
    own = clerk.lease(B).record
    assert (own.plan, own.dtype, own.update_codec) == ("float32", "float32", "dense-f32")
    usual = rounds.rate(clerk.desk.policy.plan, 0)
    assert (own.rate, first.rate.warmup) == (usual, usual.warmup)
    assert real(first.rate.start) == 0.5 * real(usual.start)
    assert real(first.rate.end) == pytest.approx(0.5 * real(usual.end))
    assert clerk.lease(C, plans=("float32", "lora-16-bf16")).record.plan == "float32"


def test_a_node_without_a_plan_of_this_network_is_told_so_and_nothing_changes():
    clerk = clerk_with(A, plans=(rules(),))
    before = made.snapshot(clerk.desk)
    with refused("machine.plan"):
        clerk.desk.handle(LeaseAsked(A, made.request(plans=("lora-32-fp8", "no such plan"))), 0)
    assert made.snapshot(clerk.desk) == before


def test_memory_for_whole_float32_weights_is_asked_of_float32_alone():
    genesis = made.genesis()
    large = made.tensor_file("initial", size=300 << 20)
    genesis = genesis.model_copy(update={"initial": large})
    for plans, memory, disk, code in (
        ((), 1000, 1000, "machine.too-small"),
        (("lora-16-bf16",), 100, 599, "machine.too-small"),
        (("lora-16-bf16",), 100, 601, ""),
        ((), 1801, 901, ""),
        ((), 1801, 601, "machine.too-small"),
    ):
        desk = Desk(made.NETWORK, genesis, policy(rules()), made.digest("policy"))
        clerk = Clerk(desk)
        clerk.register(A)
        asked = {"plans": plans, "memory_mb": memory, "disk_mb": disk}
        if code:
            with refused(code):
                clerk.lease(A, **asked)
        else:
            assert clerk.lease(A, **asked).record.plan == (plans or ("float32",))[0]


def test_assignments_of_the_first_version_are_float32():
    record = clerk_with(A).lease(A).record
    old = record.model_copy(update={"plan": "policy 3, slice"})
    assert planning.kind(old) == planning.kind(record) == ("float32", "dense-f32", False)


def test_only_norms_of_one_plan_and_codec_are_compared():
    clerk = clerk_with(A, B, plans=(rules(),))
    works = [clerk.lease(A), clerk.lease(B, plans=("lora-16-bf16",))]
    for work in works:
        clerk.judge(clerk.hand_in(work))
    for work in works:
        assert earlier.relative_norms(clerk.desk, work.record) == [0.01]
        assert earlier.block_norms(clerk.desk, work.record) == {}
    other = works[0].record.model_copy(update={"update_codec": "topk-64"})
    assert earlier.relative_norms(clerk.desk, other) == []


def test_an_audit_goes_to_an_auditor_that_can_do_its_plan():
    clerk = clerk_with(A, B, C, plans=(rules(),), audit={"auditors": 3})
    contribution = clerk.hand_in(clerk.lease(A, plans=("lora-16-bf16",)))
    clerk.measure(contribution)
    clerk.ask(contribution)
    clerk.open(contribution)
    clerk.tell(Opened(contribution), 0)
    clerk.tell(Called(contribution, (B, C), False), 0)
    assert clerk.lease(B).record.kind == "train"
    task = clerk.lease(C, plans=("float32", "lora-16-bf16")).record
    assert (task.kind, task.plan) == ("audit", "lora-16-bf16")
    assert task.audit.contribution == contribution


# ---------------------------------------------------------------- what topk updates leave out


def left_out(clerk, work, root):
    """Commits to a residual beside the update, and hands in."""
    record = made.commitment_for(work.id, work.record).model_copy(update={"residual": root})
    id = made.digest("commitment", work.id, root)
    clerk.tell(Filed(id, work.record.node, record), 0)
    contribution = clerk.contribute(work, id)
    clerk.tell(Uploaded(contribution), 0)
    clerk.secret_set(work)
    return contribution


def sparse(*nodes, **plan):
    policy = made.policy(**plan).model_copy(update={"update_codec": "topk-32"})
    clerk = Clerk(Desk(made.NETWORK, made.genesis(1), policy, made.digest("policy")))
    for node in nodes:
        clerk.register(node)
    return clerk


def test_a_unit_begins_with_what_the_last_accepted_one_left_out():
    clerk = sparse(A, B, units=4, rounds=4)
    first, second = "1" * 64, "2" * 64
    here = {"cached": (first, second)}
    work = clerk.lease(A, **here)
    assert work.record.residual is None
    contribution = left_out(clerk, work, first)
    waiting = clerk.lease(A, **here)
    assert waiting.record.residual is None, "not judged yet"
    clerk.judge(contribution)
    refused_one = left_out(clerk, waiting, second)
    clerk.judge(refused_one, accepted=False)
    assert clerk.lease(B, **here).record.residual is None, "another's"
    again = clerk.lease(A, **here)
    assert again.record.residual == first, "what was refused left nothing"
    third = left_out(clerk, again, second)
    [grant] = clerk.desk.handle(LeaseAsked(A, made.request(cached=(first,))), 0)
    assert grant.draft.residual is None, "made up for by the one that waits"
    clerk.judge(third)
    for cached, wanted in (((first,), None), ((), None), ((first, second), second)):
        [grant] = clerk.desk.handle(LeaseAsked(A, made.request(cached=cached)), 0)
        assert grant.draft.residual == wanted


def test_dense_units_make_up_for_nothing():
    clerk = sparse(A, units=4)
    clerk.judge(left_out(clerk, clerk.lease(A), "1" * 64))
    clerk.desk.policy = clerk.desk.policy.model_copy(update={"update_codec": "int8"})
    [grant] = clerk.desk.handle(LeaseAsked(A, made.request(cached=("1" * 64,))), 0)
    assert grant.draft.residual is None


def test_an_opened_residual_must_be_the_assigned_one():
    clerk = sparse(A, audit={"rate": "10"}, units=4)
    contribution = left_out(clerk, clerk.lease(A), "1" * 64)
    clerk.measure(contribution)
    assert clerk.desk.audits[contribution].draw.audited
    clerk.report(contribution)
    clerk.end_audit(contribution)
    work = clerk.lease(A, cached=("1" * 64,))
    assert work.record.residual == "1" * 64
    contribution = left_out(clerk, work, "2" * 64)
    last = made.STATES - 1
    clerk.measure(contribution, states=(last, last + 1))
    id = clerk.ask(contribution)
    challenge = clerk.desk.audits[contribution].challenge
    roots = (*work.committed.states, "1" * 64)
    known = work.committed.model_copy(update={"states": roots})
    wrong = work.committed.model_copy(update={"states": (*work.committed.states, "3" * 64)})
    with refused("audit.state"):
        clerk.tell(Filed("e" * 64, A, made.opening_for(id, challenge, wrong)), 0)
    clerk.tell(Filed("f" * 64, A, made.opening_for(id, challenge, known)), 0)
    assert clerk.desk.audits[contribution].opening is not None


# ---------------------------------------------------------------- what may be offered

WRONG = {
    "no such plan": rules("lora-8-bf16"),
    "float32 is the network's own": rules("float32", "dense-f32", "float32"),
    "float32 activations of bfloat16 weights": rules(dtype="float32"),
    "factors by a dense codec": rules(codec="dense-bf16"),
    "weights as factors": rules("adafactor", "lora-int16"),
    "no rate": rules(rate="0"),
    "states that nobody can open": rules("adafactor", "int8"),
}


@pytest.mark.parametrize("name", WRONG)
def test_offers_that_cannot_be_are_refused(name):
    with refused("recipe.invalid"):
        planning.check(policy(WRONG[name]))
    before = seal(policy(), PrivateKey.generate(), made.NETWORK)
    with refused("recipe.invalid"):
        following(before, {"plans": [WRONG[name].model_dump()]}, 1)


def test_offers_that_can_be_are_taken():
    full = (rules("adafactor", "topk-64"), rules("adamw-host", "int8", rate="1"))
    planning.check(policy(rules(), rules("lora-64-nf4", "lora-int8")))
    planning.check(policy(*full, commit_every=4))  # of four steps
    with refused("recipe.invalid"):
        planning.check(policy(rules(), rules()))
    for codec in ("dense-f32", "dense-bf16", "int8", "topk-32", "topk-256"):
        planning.check(policy(update_codec=codec))
    with refused("recipe.invalid"):
        planning.check(policy(update_codec="lora-int16"))
    before = seal(policy(), PrivateKey.generate(), made.NETWORK)
    after = following(before, {"plans": [rules().model_dump()], "update_codec": "topk-64"}, 1)
    assert (after.plans, after.update_codec) == ((rules(),), "topk-64")


@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_of_the_catalogue_can_be_offered_but_the_networks_own(plan):
    how = PLANS[plan]
    codec = "lora-int16" if how.rank else "dense-bf16"
    offer = rules(plan, codec, how.compute)
    found = planning.fault([offer], "dense-f32", whole=True)
    assert bool(found) == (plan == planning.OWN)


TABLE = """
[[plans]]
plan = "{plan}"
dtype = "bfloat16"
codec = "{codec}"
rate = {rate}
"""


def without_plans(text):
    head, _, tail = text.partition("[[plans]]")
    return head + ("[" + tail.split("\n[", 1)[1] if tail else "")


def test_a_recipe_offers_plans(tmp_path):
    text = without_plans(DEMO) + TABLE.format(plan="lora-32-fp8", codec="lora-int8", rate=2.5)
    recipe = load_recipe(written(tmp_path, text))
    [found] = recipe.records()["plans"]
    assert PlanRules.model_validate_json(json.dumps(found)) == rules(
        "lora-32-fp8", "lora-int8", rate="2.5"
    )
    for wrong in (
        {"plan": "lora-32-fp8", "codec": "int8", "rate": 1},
        {"plan": "lora-32-fp8", "codec": "lora-int8", "rate": 0},
        {"plan": "adafactor", "codec": "int8", "rate": 1},
        {"plan": "adafactor", "codec": "zip", "rate": 1},
    ):
        refusal_of = refusal(tmp_path, without_plans(DEMO) + TABLE.format(**wrong))
        assert refusal_of.code == "recipe.invalid"
        assert "plans" in refusal_of.detail
    plain = changed("policy", 'update_codec = "lora-int8"')
    assert "update_codec" in refusal(tmp_path, plain).detail


def test_policies_carry_plans_and_older_ones_none():
    record = policy(rules())
    assert Policy.model_validate_json(record.model_dump_json()).plans == (rules(),)
    assert made.policy().plans == ()
    with refused("machine.plan"):
        planning.choose(made.policy(), ("lora-16-bf16",))

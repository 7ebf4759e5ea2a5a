"""What goes into a head: weights by standing, and inputs that the merge job left out."""

import asyncio

import pytest

from coordinator.fakes import FakeJobs, new_shift, open_office, run_out, work_off
from coordinator.test_audits import network, nodes_of, one_unit


@pytest.fixture
def office(tmp_path):
    office = open_office(network(tmp_path))
    yield office
    office.close()


@pytest.mark.parametrize(("standing", "weights"), [(0, (0.5, 0.5)), (2, (0.75, 0.25))])
def test_probationers_have_a_bounded_part_once_anybody_is_of_standing(tmp_path, standing, weights):
    office = open_office(network(tmp_path, experts=1))
    veteran, novice = nodes_of(office, 2)

    async def life():
        shift = new_shift(office)
        for node in (veteran, novice):
            await one_unit(office, node)
        await work_off(shift)
        for node in (veteran, novice):
            await node.beats(office)
        office.desk.nodes[veteran.key.id].standing = standing - 1 if standing else -9
        await work_off(shift)

    asyncio.run(life())
    [merge] = office.desk.merges.values()
    of_node = {office.desk.work_of(i.contribution).record.node: i.weight for i in merge.inputs}
    assert tuple(float.fromhex(of_node[n.key.id]) for n in (veteran, novice)) == weights
    office.close()


def test_what_a_merge_leaves_out_is_unpublished_and_told(office):
    class Picky(FakeJobs):
        def merge(self, job):
            kept = [[1, job["inputs"][1]["weight"], job["inputs"][1]["scale"]]]
            return super().merge(job) | {"inputs": kept, "left_out": [0]}

    shift = new_shift(office, Picky())
    asyncio.run(run_out(office, shift, nodes_of(office, 2)))
    left = [facts["left_out"][0] for what, facts in shift.notes if what == "runmerge"]
    assert left
    assert all(office.desk.work_of(id).state == "unpublished" for id in left)
    assert all(len(merge.inputs) == 1 for merge in office.desk.merges.values())

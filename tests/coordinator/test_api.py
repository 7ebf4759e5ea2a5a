"""The HTTP interface by the real client on a real socket: answers, refusals, ranges, limits."""

import asyncio
import json
from contextlib import asynccontextmanager

import aiohttp
import pytest
from aiohttp import web

from coordinator.fakes import FakeNode, found, new_shift, open_office, work_off
from paris_coordinator.web.api import ENDPOINTS, MAX_BODY, add_api, document
from paris_protocol.blobs import Manifest
from paris_protocol.errors import REASONS, ParisError
from paris_protocol.log import Checkpoint, origin
from paris_protocol.net.control import HttpControl


@pytest.fixture
def state(tmp_path):
    return found(tmp_path)


@asynccontextmanager
async def serving(state):
    """(office, url) of a coordinator on 127.0.0.1 and a port of the system's choice."""
    office = open_office(state)
    await office.project()
    app = web.Application(client_max_size=MAX_BODY)
    add_api(app, office)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield office, f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()
        office.close()


async def refusal_of(answer, status, code):
    value = await answer.json()
    assert (answer.status, value["code"]) == (status, code), value
    assert set(value) == {"code", "message", "fix", "retry_after"}
    assert value["message"].startswith(REASONS[code].text)


def test_a_unit_from_register_to_receipt(state):
    async def life():
        async with serving(state) as (office, url), HttpControl(url, office.network) as control:
            node = FakeNode(office.network, 1)
            assert (await control.hello()).raw == office.genesis.raw
            assert (await control.policy()).record.number == 1
            assert await control.post("register", node.registration()) == {"ok": True}
            answer = await control.post("lease", node.request())
            assert (await control.post("beat", node.beat()))["finished"] is False
            commitment, result, data = node.statements(node.assignment(answer))
            assert (await control.post("commitments", commitment.raw))["id"] == commitment.id
            state_of = await control.post("contributions", result.raw)
            assert state_of["manifest_missing"]
            ref = result.record.update.blob
            await control.put_manifest(ref, Manifest.build([data]).raw)
            assert await control.put_piece(ref, 0, data) == 0
            assert (await control.post("contributions", result.raw))["state"] == "queued"
            assert await control.manifest(ref) == Manifest.build([data]).raw
            assert await control.piece(ref, 0) == data
            await work_off(new_shift(office))
            assert (await control.get(f"contributions/{result.id}"))["accepted"] is True
            receipt = await control.get(f"receipts/{result.id}")
            assert await control.statement(result.id) == result.raw
            index = await control.index()
            note = Checkpoint.open(receipt["checkpoint"], origin(office.network), {office.key.id})
            assert (index.record.log_size, index.record.log_root) == (note.size, note.root.hex())

    asyncio.run(life())


def test_refusals_are_the_catalogues(state):
    async def life():
        async with serving(state) as (office, url), aiohttp.ClientSession(url) as http:
            node = FakeNode(office.network, 1)
            await refusal_of(await http.get("/nothing"), 404, "not-found")
            await refusal_of(await http.get("/v1/statements/" + "0" * 64), 404, "not-found")
            await refusal_of(await http.get("/v1/contributions/" + "0" * 64), 404, "unit.unknown")
            await refusal_of(await http.get("/v1/blobs/" + "0" * 64), 404, "blob.missing")
            await refusal_of(await http.get("/v1/policy/99"), 404, "not-found")
            await refusal_of(await http.get("/v1/policy/x"), 404, "not-found")
            await refusal_of(await http.post("/v1/lease", data=b"{"), 400, "record.malformed")
            await refusal_of(
                await http.post("/v1/lease", data=node.request()), 403, "record.signer"
            )
            await refusal_of(
                await http.post("/v1/lease", data=b"x" * 200_000), 413, "record.too-large"
            )
            await refusal_of(
                await http.put("/v1/blobs/" + "0" * 64 + "/pieces/0", data=b"x"), 404, "not-found"
            )
            await refusal_of(await http.delete("/v1/index"), 405, "usage")

            async def endless():
                for _ in range(1000):
                    yield b"x" * 4096

            await refusal_of(await http.post("/v1/beat", data=endless()), 413, "record.too-large")

    asyncio.run(life())


def test_no_work_says_when_to_ask_again(state):
    async def life():
        async with serving(state) as (office, url), aiohttp.ClientSession(url) as http:
            nodes = [FakeNode(office.network, seed + 1) for seed in range(5)]
            for node in nodes:
                await http.post("/v1/register", data=node.registration())
            answers = [await http.post("/v1/lease", data=node.request()) for node in nodes]
            assert [answer.status for answer in answers] == [200] * 4 + [503]
            assert (await answers[-1].json())["retry_after"] > 0
            assert int(answers[-1].headers["Retry-After"]) > 0

    asyncio.run(life())


def test_ranges_and_log_files(state):
    async def life():
        async with serving(state) as (office, url), aiohttp.ClientSession(url) as http:
            ref = office.genesis.record.initial.blob
            whole = await (await http.get(f"/v1/blobs/{ref.id}")).read()
            assert len(whole) == ref.size
            part = await http.get(f"/v1/blobs/{ref.id}", headers={"Range": "bytes=3-7"})
            assert (part.status, await part.read()) == (206, whole[3:8])
            assert part.headers["Content-Range"] == f"bytes 3-7/{ref.size}"
            note = await (await http.get("/log/checkpoint")).text()
            assert Checkpoint.open(note, origin(office.network), {office.key.id}).size == 2
            for path in (
                "tile/0/000.p/2",
                "tile/entries/000.p/2",
                f"statements/{office.network}.json",
            ):
                assert (await http.get(f"/log/{path}")).status == 200
            for path in (
                "/log/../key.json",
                "/log/..%2fkey.json",
                "/log/tile",
                "/log/%2e%2e/key.json",
            ):
                answer = await http.get(path)
                assert answer.status == 404
                assert office.key.seed.hex() not in await answer.text()

    asyncio.run(life())


def test_held_out_clips_cannot_be_fetched(state):
    async def life():
        async with serving(state) as (office, url), aiohttp.ClientSession(url) as http:
            for cluster in office.genesis.record.clusters:
                data = state.private_shard("validation", cluster.index).read_bytes()
                answer = await http.get(f"/v1/blobs/{Manifest.build([data]).id}")
                await refusal_of(answer, 404, "blob.missing")

    asyncio.run(life())


def test_what_breaks_inside_is_said_without_details(state, monkeypatch):
    async def life():
        async with serving(state) as (office, url), aiohttp.ClientSession(url) as http:

            def broken():
                raise RuntimeError("a secret")

            monkeypatch.setattr(office, "index", broken)
            answer = await http.get("/v1/index")
            assert "a secret" not in await answer.text()
            await refusal_of(answer, 500, "internal")

    asyncio.run(life())


def test_many_requests_at_once_share_commits(state):
    async def life():
        async with serving(state) as (office, url), HttpControl(url, office.network) as control:
            commits = []
            real = office.ledger.append
            office.ledger.append = lambda entries: (commits.append(len(entries)), real(entries))
            nodes = [FakeNode(office.network, seed + 1) for seed in range(40)]
            await asyncio.gather(*(control.post("register", n.registration()) for n in nodes))
            assert sum(commits) == 40
            assert len(commits) < 40
            return len(office.desk.nodes)

    assert asyncio.run(life()) == 40


def test_the_openapi_document_lists_every_endpoint(state):
    made = document()
    assert json.loads(json.dumps(made)) == made
    listed = {(method.upper(), path) for path, entry in made["paths"].items() for method in entry}
    assert len(listed) == len(ENDPOINTS)
    assert ("PUT", "/v1/blobs/{blob}/pieces/{piece}") in listed
    assert all(entry["responses"] for path in made["paths"].values() for entry in path.values())


def test_error_codes_carry_their_status():
    for reason in REASONS.values():
        assert 400 <= ParisError(reason.code).reason.http < 600

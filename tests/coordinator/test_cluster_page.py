"""The page of a cluster: its clips, licences and withdrawals, readable and bounded."""

from __future__ import annotations

import asyncio
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from PIL import Image

from browser.network import digest, make_network
from coordinator.test_pages import Reader
from paris_coordinator.config import State
from paris_coordinator.events import Ordered
from paris_coordinator.genesis import Setup, init
from paris_coordinator.jobs.pictures import pictures
from paris_coordinator.office import Office
from paris_coordinator.prepare import prepare
from paris_coordinator.web import clusters, pages
from paris_coordinator.withdrawing import origins, withdraw
from paris_models.assets import asset
from paris_models.worlds import write_clips


@pytest.fixture(scope="module")
def founded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network on 96 rendered clips."""
    folder = tmp_path_factory.mktemp("network")
    write_clips(folder / "clips", 96, seed=11)
    text = asset("smoke.toml").read_text()
    text = text.replace("validation = 128", "validation = 5").replace("audit = 64", "audit = 3")
    for name in ("codec", "text", "initial"):
        shutil.copy(asset(f"{name}.safetensors"), folder)
    (folder / "recipe.toml").write_text(text)
    prepare(folder / "recipe.toml", folder / "clips", folder / "prepared")
    init(folder / "prepared", folder / "state", Setup(), 1000)
    return folder / "state"


@pytest.fixture
def office(founded: Path, tmp_path: Path) -> Iterator[Office]:
    shutil.copytree(founded, tmp_path / "state")
    office = Office(State(tmp_path / "state"), lambda: 2000.0)
    yield office
    office.close()


async def fetch(source: Any, *paths: str) -> list[tuple[int, dict[str, str], bytes]]:
    app = web.Application()
    pages.add_pages(app, source)
    found = []
    async with TestClient(TestServer(app)) as client:
        for path in paths:
            async with client.get(path) as answer:
                found.append((answer.status, dict(answer.headers), await answer.read()))
    return found


def get(source: Any, *paths: str) -> list[tuple[int, dict[str, str], bytes]]:
    """Status, headers and bytes of each path, from a real server."""
    return asyncio.run(fetch(source, *paths))


def pictures_of(reader: Reader) -> list[str]:
    return [attributes["src"] or "" for tag, attributes in reader.elements if tag == "img"]


def test_a_cluster_is_shown_by_its_clips(office: Office) -> None:
    [(status, headers, body)] = get(office, "/clusters/1")
    assert status == 200
    text, reader = body.decode(), Reader()
    reader.feed(text)
    assert reader.open == []
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert not any(tag == "script" for tag, _ in reader.elements)
    cluster = office.genesis.record.clusters[1]
    assert f"{cluster.clips} clips in {len(cluster.shards)} shards" in text
    assert len(pictures_of(reader)) == min(clusters.SHOWN, cluster.clips)
    own = {shard.file.blob.id for shard in cluster.shards}
    lines = [line for line in origins(office.state) if line["shard"] in own]
    assert f"{cluster.clips} × {lines[0]['licence']}" in text
    for line in lines[:3]:
        assert line["caption"] in text
    assert "prior" in text
    assert "/experts/1" in text


def test_pictures_are_what_the_shards_decode_to_and_made_once(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []
    kept = clusters.Worker.run

    async def run(self: Any, job: Any, timeout: float = 0) -> Any:
        started.append(job["job"])
        return await kept(self, job, timeout)

    monkeypatch.setattr(clusters.Worker, "run", run)
    first, again, last = get(office, "/clusters/0/0.png", "/clusters/0/0.png", "/clusters/0/23.png")
    assert [first[0], again[0], last[0]] == [200, 200, 200]
    assert first[2] == again[2] != last[2]
    assert started == ["pictures"]
    picture = Image.open(io.BytesIO(first[2]))
    assert (picture.format, picture.size) == ("PNG", (72, 24))
    assert first[1]["Content-Type"] == "image/png"
    assert first[1]["X-Content-Type-Options"] == "nosniff"
    files = list((office.state.folder / "pictures").rglob("*.png"))
    assert len(files) <= clusters.SHOWN
    assert get(office, "/clusters/0/1.png")[0][0] == 200
    assert started == ["pictures"], "another start makes them again"


@pytest.mark.parametrize(
    "path",
    ["/clusters/3", "/clusters/999999", "/clusters/0/24.png", "/clusters/0/x.png", "/clusters/-1",
     "/clusters/3/0.png", "/clusters/0/..%2F0.png", "/clusters/0/0.jpg", "/clusters/x"],
)  # fmt: skip
def test_bad_ids_are_not_found(office: Office, path: str) -> None:
    assert get(office, path)[0][0] == 404


def test_nothing_of_held_out_clips_is_shown(office: Office) -> None:
    lines = list(origins(office.state))
    secret = {line["clip"] for line in lines if line["shard"] is None}
    names = {line["name"] for line in lines if line["shard"] is None}
    assert secret
    found = get(office, *(f"/clusters/{k}" for k in range(3)))
    for cluster, (status, _, body) in zip(office.genesis.record.clusters, found, strict=True):
        text = body.decode()
        assert status == 200
        assert f"{cluster.clips} × " in text, "held-out clips are counted"
        assert not any(one in text for one in secret | names)


def test_a_withdrawn_shard_leaves_the_page_and_its_pictures(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run(self: Any, job: Any, timeout: float = 0) -> Any:
        return pictures(job)  # here, where the libraries are loaded already

    monkeypatch.setattr(clusters.Worker, "run", run)
    cluster = office.genesis.record.clusters[0]
    gone = cluster.shards[0].file.blob.id
    line = next(line for line in origins(office.state) if line["shard"] == gone)

    async def life() -> list[Any]:
        before = await fetch(office, "/clusters/0/0.png", "/clusters/0")
        await office.tell(Ordered("withdraw", line["clip"], "<b>asked</b>"))
        await withdraw(office, line["clip"])
        return [*before, *await fetch(office, "/clusters/0/0.png", "/clusters/0", "/", "/log")]

    old, whole, new, less, home, log = asyncio.run(life())
    assert old[2] != new[2]
    assert gone[:12] in whole[2].decode()
    text = less[2].decode()
    assert f"/v1/blobs/{gone}" not in text
    assert f"{cluster.clips - cluster.shards[0].clips} clips in 3 shards" in text
    assert line["clip"][:12] in text
    assert len(list((office.state.folder / "pictures").iterdir())) == 1
    assert "was withdrawn" in home[2].decode()
    assert "&lt;b&gt;asked" in home[2].decode()
    assert "withdrawal" in log[2].decode()


def test_without_a_codec_there_are_captions_and_without_a_table_neither(tmp_path: Path) -> None:
    network = make_network(tmp_path)  # its codec has no file
    [page, picture] = get(network, "/clusters/0", "/clusters/0/0.png")
    assert (page[0], picture[0]) == (200, 404)
    assert "Nothing of the clips can be shown" in page[2].decode()
    shard = network.genesis.record.clusters[0].shards[0].file.blob.id
    line = {"clip": digest("x"), "name": "a.mp4", "source": "", "licence": "<i>CC0</i>",
            "caption": "<script>alert(1)</script>", "bucket": 0, "shard": shard}  # fmt: skip
    network.state.origins_file.write_text(json.dumps(line) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(State, "genesis", lambda self: network.genesis)
        [page] = get(network, "/clusters/0")
    text = page[2].decode()
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "1 × &lt;i&gt;CC0" in text
    assert "<img" not in text


def test_a_job_that_fails_is_not_repeated(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []

    async def run(self: Any, job: Any, timeout: float = 0) -> Any:
        started.append(job["job"])
        raise OSError("no space")

    monkeypatch.setattr(clusters.Worker, "run", run)
    found = get(office, "/clusters/0/0.png", "/clusters/0/1.png", "/clusters/0")
    assert [status for status, _, _ in found] == [404, 404, 200]
    assert started == ["pictures"]

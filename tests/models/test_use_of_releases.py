"""Users of a release: `paris generate`, `verify`, `pull`, as functions and as the command."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from typer.testing import CliRunner

from paris_models.commands.cli import app
from paris_models.commands.generate import run_generate
from paris_models.commands.pull import run_pull
from paris_models.commands.verify import run_verify
from paris_models.releases import generate, load_release
from paris_models.video import Geometry, read_clip
from paris_protocol.blobs import Manifest
from paris_protocol.envelope import unseal_any
from paris_protocol.errors import ParisError
from paris_protocol.net.folder import verify_folder
from protocol.world import log_files, put_files
from tinynet import ROOT
from tinyrelease import TinyRelease

PROMPT = "a red wave drifts"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRelease:
    return TinyRelease(tmp_path_factory.mktemp("users"))


@pytest.fixture(scope="module")
def release(tiny: TinyRelease) -> Path:
    return tiny.publish("release")


def code_of(error: pytest.ExceptionInfo[ParisError]) -> str:
    return error.value.code


# ---------------------------------------------------------------- generate


def test_generate_writes_a_playable_video_of_the_declared_size(
    release: Path, tmp_path: Path
) -> None:
    out = tmp_path / "wave.mp4"
    facts = run_generate(release, PROMPT, out, seed=3, scale=4)
    assert facts["size"] == "64×64"
    clip = read_clip(out, Geometry(frames=5, height=64, width=64, fps=8))
    assert clip.shape == (3, 5, 64, 64)
    assert [p.name for p in tmp_path.iterdir()] == ["wave.mp4"]


def test_the_same_seed_gives_the_same_video(release: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run_generate(release, PROMPT, tmp_path / f"{name}.mp4", seed=seed)
    a, b, c = ((tmp_path / f"{name}.mp4").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_settings_change_the_video(release: Path) -> None:
    loaded = load_release(release)
    text = loaded.text.encode([PROMPT])
    plain = generate(loaded, text)
    assert not generate(loaded, text, guidance=4.0).equal(plain)
    assert not generate(loaded, text, top_k=2).equal(plain)
    assert generate(loaded, text, steps=4, guidance=1.5, top_k=1).equal(plain)


def test_one_resident_expert_gives_the_same_video(release: Path) -> None:
    text = load_release(release).text.encode([PROMPT, "a blue wave pulses"])
    small = load_release(release, resident=1)
    assert generate(small, text, top_k=2).equal(generate(load_release(release), text, top_k=2))
    assert small.experts.loads > 2  # type: ignore[attr-defined]


def test_experts_are_loaded_only_when_the_router_wants_them(release: Path) -> None:
    loaded = load_release(release)
    generate(loaded, loaded.text.encode([PROMPT]))
    assert loaded.experts.loads <= len(loaded.experts)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("prompt", "code"),
    [("", "prompt.empty"), ("  \n", "prompt.empty"), ("a b c d e f g", "prompt.too-long"),
     ("x" * 100_000, "prompt.too-long")],
)  # fmt: skip
def test_bad_prompts(release: Path, tmp_path: Path, prompt: str, code: str) -> None:
    with pytest.raises(ParisError) as caught:
        run_generate(release, prompt, tmp_path / "no.mp4")
    assert code_of(caught) == code
    assert not list(tmp_path.iterdir())


def test_bad_folders(release: Path, tmp_path: Path) -> None:
    with pytest.raises(ParisError) as caught:
        run_generate(tmp_path, PROMPT, tmp_path / "no.mp4")
    assert code_of(caught) == "release.none"
    copy = tmp_path / "copy"
    shutil.copytree(release, copy)
    (copy / "expert_0" / "diffusion_pytorch_model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ParisError) as caught:
        run_generate(copy, PROMPT, tmp_path / "no.mp4")
    assert code_of(caught) == "tensor.header"
    assert "expert_0" in caught.value.detail
    shutil.rmtree(copy / "expert_0")
    shutil.rmtree(copy / "expert_1")
    with pytest.raises(ParisError) as caught:
        run_generate(copy, PROMPT, tmp_path / "no.mp4")
    assert code_of(caught) == "release.missing"
    assert not (tmp_path / "no.mp4").exists()


# ---------------------------------------------------------------- pull


class Mirror(SimpleHTTPRequestHandler):
    """A web server with Range, and the faults that a test asks for."""

    ranges: ClassVar[list[str]] = []
    cut = 0
    spoil = ""
    endless = ""

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        if self.spoil and self.path.endswith(self.spoil):
            data = data[:-1] + bytes([data[-1] ^ 1])
        if self.endless and self.path.endswith(self.endless):
            data += b"\0" * (1 << 20)
        begin = 0
        if wanted := self.headers.get("Range"):
            type(self).ranges.append(self.path)
            begin = int(wanted.removeprefix("bytes=").rstrip("-"))
            self.send_response(206)
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data) - begin))
        self.end_headers()
        body = data[begin:]
        if type(self).cut and len(body) > 20_000:
            type(self).cut -= 1
            self.wfile.write(body[:10_000])  # and then the connection ends
            self.close_connection = True
            return
        self.wfile.write(body)


@contextmanager
def mirror(folder: Path, **faults: Any) -> Iterator[tuple[str, type[Mirror]]]:
    handler = type("Faulty", (Mirror,), {"ranges": [], **faults})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def same(a: Path, b: Path) -> bool:
    names = {p.relative_to(a) for p in a.rglob("*") if p.is_file()}
    assert names == {p.relative_to(b) for p in b.rglob("*") if p.is_file()}
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in names)


def test_pull_from_folder_and_mirror(tiny: TinyRelease, release: Path, tmp_path: Path) -> None:
    run_pull(str(release), tmp_path / "a", tiny.net.genesis.id)
    assert same(release, tmp_path / "a")
    with mirror(release) as (url, _):
        facts = run_pull(url, tmp_path / "b")
        assert same(release, tmp_path / "b")
        assert run_pull(url, tmp_path / "b") == facts  # nothing to do
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_pull_goes_on_where_the_connection_broke(release: Path, tmp_path: Path) -> None:
    with mirror(release, cut=2) as (url, handler):
        run_pull(url, tmp_path / "a")
        assert len(handler.ranges) == 2
    assert same(release, tmp_path / "a")


def test_an_interrupted_pull_keeps_what_it_has(release: Path, tmp_path: Path) -> None:
    out = tmp_path / "a"
    with mirror(release, cut=99) as (url, _), pytest.raises(ParisError) as caught:
        run_pull(url, out)
    assert code_of(caught) == "network.down"
    assert not out.exists()
    kept = [p for p in (tmp_path / "a.part").rglob("*") if p.name.endswith(".partial")]
    assert kept
    with mirror(release) as (url, handler):
        run_pull(url, out)
        assert handler.ranges
    assert same(release, out)
    assert not (tmp_path / "a.part").exists()


@pytest.mark.parametrize(
    ("faults", "code"),
    [
        ({"spoil": "expert_1/config.json"}, "release.file"),
        ({"spoil": "genesis.json"}, "release.file"),
        ({"spoil": "policy/1.json"}, "release.file"),
        ({"spoil": "proof.json"}, "release.file"),
    ],
)
def test_a_lying_mirror_is_refused(
    release: Path, tmp_path: Path, faults: dict[str, str], code: str
) -> None:
    out = tmp_path / "a"
    with mirror(release, **faults) as (url, _), pytest.raises(ParisError) as caught:
        run_pull(url, out)
    assert code_of(caught) == code
    assert not out.exists()


def test_endless_data_stop_at_the_signed_size(release: Path, tmp_path: Path) -> None:
    name = "expert_0/config.json"
    with mirror(release, endless=name) as (url, _):
        run_pull(url, tmp_path / "a")
    assert same(release, tmp_path / "a")


def test_pull_refuses_what_it_should(release: Path, tmp_path: Path) -> None:
    busy = tmp_path / "busy"
    busy.mkdir()
    (busy / "mine.txt").write_text("mine")
    cases = [
        (str(tmp_path), tmp_path / "a", None, "release.none"),
        ("http://example.org/release", tmp_path / "a", None, "network.plain-http"),
        (str(release), tmp_path / "a", "0" * 64, "network.mismatch"),
        (str(release), busy, None, "usage"),
    ]
    for source, out, network, code in cases:
        with pytest.raises(ParisError) as caught:
            run_pull(source, out, network)
        assert code_of(caught) == code
    assert (busy / "mine.txt").read_text() == "mine"


# ---------------------------------------------------------------- the command


def test_the_command_verifies_and_names_the_broken_file(
    tiny: TinyRelease, release: Path, tmp_path: Path
) -> None:
    runner = CliRunner()
    good = runner.invoke(app, ["verify", str(release), "--json", "--network", tiny.net.genesis.id])
    assert good.exit_code == 0
    facts = json.loads(good.stdout)
    assert facts["verified"] is True
    assert facts["network_pinned"] is True
    assert facts == run_verify(release, tiny.net.genesis.id)
    copy = tmp_path / "copy"
    shutil.copytree(release, copy)
    with (copy / "router" / "config.json").open("ab") as file:
        file.write(b" ")
    bad = runner.invoke(app, ["verify", str(copy)])
    assert bad.exit_code == 1
    assert "router/config.json" in bad.stderr
    wrong = runner.invoke(app, ["verify", str(release), "--network", "0" * 64])
    assert wrong.exit_code == 23
    none = runner.invoke(app, ["verify", str(tmp_path), "--json"])
    assert (none.exit_code, json.loads(none.stdout)["code"]) == (20, "release.none")


@pytest.fixture(scope="module")
def blobs(tiny: TinyRelease, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the release's statements name: the initial checkpoint and the updates."""
    folder = tmp_path_factory.mktemp("blobs")
    for path in [tiny.net.head_file, *tiny.net.folder.glob("update-*.safetensors")]:
        manifest = Manifest.build([path.read_bytes()])
        shutil.copy(path, folder / f"{manifest.id}.blob")
    return folder


def test_the_command_recomputes_every_merge(release: Path, blobs: Path) -> None:
    words = ["verify", str(release), "--recompute", "--blobs", str(blobs)]
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code == 0, done.stderr
    facts = json.loads(done.stdout)
    steps = facts["recompute"]["steps"]
    assert (facts["verified"], [step["same"] for step in steps]) == (True, [True, True])
    done = CliRunner().invoke(app, words)
    assert done.stdout.count("2 inputs, same bits") == 2


def test_what_is_gone_is_named_and_not_called_verified(
    release: Path, blobs: Path, tmp_path: Path
) -> None:
    found = verify_folder(release)
    merge = next(each.record for each in found.lineage.values() if each.record.TYPE == "merge")
    lost = merge.inputs[1]
    copy = tmp_path / "blobs"
    shutil.copytree(blobs, copy)
    (copy / f"{lost.update.blob.id}.blob").unlink()
    words = ["verify", str(release), "--recompute", "--blobs", str(copy)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 1
    assert "NOT RECOMPUTABLE" in done.stdout
    assert not done.stdout.startswith("verified")
    assert "[merge.input-gone]" in done.stderr
    assert lost.contribution in done.stderr
    facts = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert (facts["verified"], facts["code"]) == (False, "merge.input-gone")
    assert CliRunner().invoke(app, [*words[:2], "--blobs", str(copy)]).exit_code == 2


def test_an_expert_that_is_not_the_head_is_refused(
    tiny: TinyRelease, blobs: Path, tmp_path: Path
) -> None:
    """Signed as a file, but not what the merges made: recomputing sees it."""

    def swap(models: Path) -> None:
        weights = "diffusion_pytorch_model.safetensors"
        shutil.copy(models / "expert_1" / weights, models / "expert_0" / weights)

    swapped = tiny.publish("swapped", models=swap)
    assert run_verify(swapped)["verified"]
    done = CliRunner().invoke(app, ["verify", str(swapped), "--recompute", "--blobs", str(blobs)])
    assert (done.exit_code, "expert_0" in done.stderr) == (1, True)


def test_the_command_explains(release: Path, tiny: TinyRelease) -> None:
    done = CliRunner().invoke(app, ["verify", str(release), "--explain", "--json"])
    assert done.exit_code == 0, done.stderr
    story = json.loads(done.stdout)["explain"]
    for expert, head in zip(story["experts"], tiny.heads, strict=True):
        [step] = expert["steps"]
        assert step["result"] == expert["head"] == head.weights.root
        for part in step["inputs"]:
            assert set(part["shards"]) <= set(expert["shards"])
            assert [layer["layer"] for layer in part["layers"]] == ["L0", "L1", "L2", "L3"]
            assert (part["weight"], part["scale"]) == (0.5, 1.0)
    text = CliRunner().invoke(app, ["verify", str(release), "--explain"]).stdout
    for head in tiny.heads:
        assert head.merge is not None
        assert head.merge[:16] in text
        assert head.weights.root[:16] in text


def test_the_command_checks_the_log(
    tiny: TinyRelease, release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    sealed = unseal_any((release / "release.json").read_bytes(), tiny.net.genesis.id)
    world: Any = SimpleNamespace(
        log=[*tiny.log, sealed], network=tiny.net.genesis.id, policies=[tiny.net.policy],
        heads=tiny.heads,
    )  # fmt: skip
    log = put_files(tmp_path / "log", log_files(world, signer=ROOT))
    words = ["verify", str(release), "--log", str(log)]
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code == 0, done.stderr
    facts = json.loads(done.stdout)["log"]
    assert facts == {
        "log_size": len(world.log), "log_stale": True, "draws": 0, "audited": 0, "waiting": [],
    }  # fmt: skip
    world.log.append(sealed)
    put_files(log, log_files(world, len(world.log) - 2, signer=ROOT))
    done = CliRunner().invoke(app, words)
    assert (done.exit_code, "[log.rollback]" in done.stderr) == (1, True)


def test_the_command_generates(release: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    out = tmp_path / "wave.mp4"
    done = runner.invoke(app, ["generate", str(release), PROMPT, "-o", str(out), "--json"])
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["frames"] == 5
    assert out.is_file()
    empty = runner.invoke(app, ["generate", str(release), "  ", "-o", str(out)])
    assert empty.exit_code == 2
    assert "prompt.empty" in empty.stderr
    assert runner.invoke(app, ["generate", str(release), PROMPT, "--steps", "0"]).exit_code == 2


def test_the_command_pulls(release: Path, tmp_path: Path) -> None:
    out = tmp_path / "pulled"
    done = CliRunner().invoke(app, ["pull", str(release), "-o", str(out)])
    assert done.exit_code == 0, done.stderr
    assert same(release, out)

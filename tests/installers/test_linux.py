"""install.sh and uninstall.sh on this machine, in an empty HOME, by a file-system diff.

A small wheel with the same two programs stands in where only the scripts are tested; one test
installs the project's own wheel. pip runs with --no-deps and without an index: nothing is fetched.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
INSTALL = ROOT / "installers" / "install.sh"
UNINSTALL = ROOT / "installers" / "uninstall.sh"
IDENTITY = {"key", "genesis.json", "node.toml", "journal.sqlite"}
# Of a plain account: pip asks for rustc's version, and where rustup is on the PATH that writes.
PATH = "/usr/local/bin:/usr/bin:/bin"
Shell = Callable[..., subprocess.CompletedProcess[str]]

pytestmark = pytest.mark.slow


def make_wheel(folder: Path, version: str, says: str) -> Path:
    """A pure-Python wheel with the programs paris and paris-node, each of which prints `says`."""
    info = f"paris_ddm-{version}.dist-info"
    files = {
        "stand_in.py": f"def main():\n    print({says!r})\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: paris-ddm\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": (
            "[console_scripts]\nparis = stand_in:main\nparis-node = stand_in:main\n"
        ),
    }
    record = "".join(f"{name},,\n" for name in files) + f"{info}/RECORD,,\n"
    path = folder / f"paris_ddm-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in {**files, f"{info}/RECORD": record}.items():
            wheel.writestr(name, text)
    return path


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    return folder


@pytest.fixture
def sh(home: Path, tmp_path: Path) -> Shell:
    def run(script: Path, *words: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
        environment = {
            "HOME": str(home),
            "PATH": PATH,
            "TMPDIR": str(tmp_path),
            "PARIS_EXTRAS": "",
            "PARIS_PYTHON": sys.executable,
            "PARIS_PIP_ARGS": "--no-deps --no-index",
            **more,
        }
        command = [str(script), *map(str, words)]
        return subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            stdin=subprocess.DEVNULL,
        )

    return run


def snapshot(folder: Path) -> dict[str, str]:
    """Every path below `folder` with its content's digest, or where a link points to."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = "-> " + str(path.readlink())
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "folder"
    return found


def output(program: Path) -> str:
    return subprocess.run([program], capture_output=True, text=True, check=True).stdout


def enrol(home: Path) -> Path:
    """A state folder as a node leaves it behind."""
    state = home / ".local/share/paris/node"
    for name in (
        *IDENTITY,
        "store/blobs/aa.blob",
        "work/1/state.safetensors",
        "logs/node.log",
        ".lock",
    ):
        path = state / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return state


def test_install_then_purge_leaves_the_home_as_it_was(
    home: Path, sh: Shell, tmp_path: Path
) -> None:
    (home / "letters.txt").write_text("mine")
    (home / ".profile").write_text("export EDITOR=vi\n")
    before = snapshot(home)
    wheel = make_wheel(tmp_path, "1.0", "first")
    done = sh(INSTALL, "--wheel", wheel, "--sha256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    assert done.returncode == 0, done.stdout + done.stderr
    added = {name for name, what in snapshot(home).items() if what != "folder"} - set(before)
    printed = done.stdout
    outside = {n for n in added if not n.startswith(".local/share/paris/app/")}
    assert outside == {
        ".local/bin/paris",
        ".local/bin/paris-node",
        ".local/share/paris/uninstall.sh",
        ".config/systemd/user/paris-node.service",
    }
    for name in outside:
        assert f"{home}/{name}" in printed, f"{name} was written without being printed"
    assert output(home / ".local/bin/paris-node") == "first\n"
    enrol(home)
    gone = sh(home / ".local/share/paris/uninstall.sh", "--purge")
    assert gone.returncode == 0, gone.stderr
    assert snapshot(home) == before


def test_uninstall_keeps_the_identity_and_nothing_else(
    home: Path, sh: Shell, tmp_path: Path
) -> None:
    assert sh(INSTALL, "--wheel", make_wheel(tmp_path, "1.0", "x")).returncode == 0
    state = enrol(home)
    asked = sh(home / ".local/share/paris/uninstall.sh")
    assert asked.returncode == 2
    assert "--keep-identity" in asked.stderr
    assert (state / "store/blobs/aa.blob").exists(), "it deleted before it was told what to keep"
    tried = sh(home / ".local/share/paris/uninstall.sh", "--keep-identity", "--dry-run")
    assert tried.returncode == 0
    assert (state / "store/blobs/aa.blob").exists()
    assert sh(home / ".local/share/paris/uninstall.sh", "--keep-identity").returncode == 0
    left = {name for name, what in snapshot(home).items() if what != "folder"}
    assert left == {f".local/share/paris/node/{name}" for name in IDENTITY}


def test_dry_run_writes_nothing(home: Path, sh: Shell, tmp_path: Path) -> None:
    done = sh(INSTALL, "--wheel", make_wheel(tmp_path, "1.0", "x"), "--dry-run")
    assert done.returncode == 0
    assert "Dry run" in done.stdout
    assert snapshot(home) == {}


def test_upgrade_replaces_and_a_failed_one_changes_nothing(
    home: Path, sh: Shell, tmp_path: Path
) -> None:
    first, second = make_wheel(tmp_path, "1.0", "first"), make_wheel(tmp_path, "2.0", "second")
    assert sh(INSTALL, "--wheel", first).returncode == 0
    assert sh(INSTALL, "--wheel", second).returncode == 0
    program = home / ".local/bin/paris-node"
    assert output(program) == "second\n"
    assert len(list((home / ".local/share/paris/app").iterdir())) == 1
    before = snapshot(home)
    broken = tmp_path / "paris_ddm-3.0-py3-none-any.whl"
    broken.write_bytes(b"not a wheel")
    failed = sh(INSTALL, "--wheel", broken)
    assert failed.returncode == 50
    again = sh(INSTALL, "--wheel", second, PARIS_PIP_ARGS="--no-such-option")
    assert again.returncode == 50
    assert snapshot(home) == before
    assert output(program) == "second\n"


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ((), 2),
        (("--wheel", "nowhere.whl"), 20),
        (("--wheel", "http://127.0.0.1/x.whl"), 2),
        (("--wheel", "https://127.0.0.1:1/x.whl"), 2),
        (("--wheel", "https://127.0.0.1:1/x.whl", "--sha256", "00"), 40),
        (("--colour",), 2),
    ],
)
def test_bad_input_says_why_and_writes_nothing(
    home: Path, sh: Shell, words: tuple[str, ...], code: int
) -> None:
    done = sh(INSTALL, *words)
    assert done.returncode == code, done.stderr
    assert done.stderr.count("install.sh: ") == 1
    assert snapshot(home) == {}


def test_wrong_digest_and_strangers_files_are_refused(
    home: Path, sh: Shell, tmp_path: Path
) -> None:
    wheel = make_wheel(tmp_path, "1.0", "x")
    assert sh(INSTALL, "--wheel", wheel, "--sha256", "0" * 64).returncode == 20
    assert snapshot(home) == {}
    theirs = home / ".local/bin/paris"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("another program of this name")
    before = snapshot(home)
    assert sh(INSTALL, "--wheel", wheel).returncode == 24
    assert sh(UNINSTALL, "--purge").returncode == 0
    assert snapshot(home) == before


def test_a_truncated_script_does_nothing(home: Path, sh: Shell, tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path, "1.0", "x")
    for script in (INSTALL, UNINSTALL):
        text = script.read_text()
        assert text.endswith('\n\nmain "$@"\n')
        cut = tmp_path / "cut.sh"
        cut.write_text(text.removesuffix('main "$@"\n'))
        done = sh(Path("/bin/sh"), cut, "--wheel", wheel)
        assert done.stdout == ""
    assert snapshot(home) == {}


def test_the_projects_own_wheel(home: Path, sh: Shell, tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "-w", tmp_path, ROOT], check=True, timeout=300)
    (wheel,) = tmp_path.glob("paris_ddm-*.whl")
    # The dependencies come from this environment, so that nothing is downloaded twice.
    packages = sysconfig.get_path("purelib")
    done = sh(INSTALL, "--wheel", wheel, PYTHONPATH=packages)
    assert done.returncode == 0, done.stdout + done.stderr
    environment = {"HOME": str(home), "PATH": PATH, "PYTHONPATH": packages}
    for program, word in (("paris-node", "join"), ("paris", "verify")):
        helped = subprocess.run(
            [home / ".local/bin" / program, "--help"],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        assert word in helped.stdout
    assert sh(home / ".local/share/paris/uninstall.sh", "--purge").returncode == 0
    assert snapshot(home) == {}

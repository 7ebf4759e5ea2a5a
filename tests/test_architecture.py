"""The borders of docs/architecture.md as assertions over the syntax tree."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "paris_protocol": ROOT / "protocol/paris_protocol",
    "paris_models": ROOT / "models/paris_models",
    "paris_coordinator": ROOT / "coordinator/paris_coordinator",
    "paris_node": ROOT / "node/paris_node",
}
OURS = frozenset(PACKAGES)
MAY_IMPORT = {
    "paris_protocol": {"paris_protocol"},
    "paris_models": {"paris_models"},
    "paris_coordinator": {"paris_coordinator", "paris_models", "paris_protocol"},
    "paris_node": {"paris_node", "paris_models", "paris_protocol"},
}
IMPURE = {
    "asyncio",
    "os",
    "pathlib",
    "random",
    "socket",
    "subprocess",
    "threading",
    "time",
    "torch",
}
PURE_THIRD_PARTY = {"cryptography", "securesystemslib", "pydantic"}
CORES = {
    "paris_coordinator": [
        "desk.py",
        "merging.py",
        "judging.py",
        "sequential.py",
        "agenda.py",
        "auditdesk.py",
        "auditing.py",
        "board.py",
        "earlier.py",
        "planning.py",
        "events.py",
        "secrets.py",
    ],
    "paris_node": ["volunteer.py", "consent.py", "fit.py", "kept.py", "leases.py", "planning.py"],
}
HEAVY_ONLY_IN = {  # third party -> the files (or folders) that may import it
    "hivemind": ["protocol/paris_protocol/net/dht.py"],
    "aiohttp": [
        "protocol/paris_protocol/net/",
        "coordinator/paris_coordinator/web/",
        "coordinator/paris_coordinator/app.py",
        "node/paris_node/app.py",
        "node/paris_node/hostile.py",
    ],
    "sqlalchemy": [
        "coordinator/paris_coordinator/ledger.py",
        "coordinator/paris_coordinator/migrations/",
    ],
    "jinja2": ["coordinator/paris_coordinator/web/", "models/paris_models/commands/report.py"],
    "transformers": ["models/paris_models/encoders.py"],
}


def sources(package: str) -> Iterator[Path]:
    yield from sorted(PACKAGES[package].rglob("*.py"))


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """Every module that a file imports anywhere, with its line; `TYPE_CHECKING` counts too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} relative import"
            yield node.module or "", node.lineno


def where(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_packages_import_only_what_the_picture_allows(package: str) -> None:
    wrong = []
    for path in sources(package):
        allowed = set(MAY_IMPORT[package])
        if "commands" in path.parts:
            allowed.add("paris_protocol")
        for name, line in imported(path):
            top = name.split(".")[0]
            if top in OURS and top not in allowed:
                wrong.append(f"{where(path, line)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_the_pure_protocol_does_no_io() -> None:
    wrong = []
    for path in sources("paris_protocol"):
        if "net" in path.relative_to(PACKAGES["paris_protocol"]).parts:
            continue
        for name, line in imported(path):
            top = name.split(".")[0]
            keyfile = path.name == "keys.py" and top in {"os", "pathlib"}
            third = top not in sys.stdlib_module_names and top not in OURS | PURE_THIRD_PARTY
            impure = (top in IMPURE and not keyfile) or name.startswith("paris_protocol.net")
            if impure or third:
                wrong.append(f"{where(path, line)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_cores_import_no_io_time_randomness_or_torch() -> None:
    wrong = []
    for package, names in CORES.items():
        for name in names:
            path = PACKAGES[package] / name
            assert path.exists(), path
            for module, line in imported(path):
                if module.split(".")[0] in IMPURE or module.startswith("paris_protocol.net"):
                    wrong.append(f"{where(path, line)} imports {module}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", sorted(HEAVY_ONLY_IN))
def test_heavy_libraries_stay_in_their_files(module: str) -> None:
    wrong = []
    for package in PACKAGES:
        for path in sources(package):
            relative = path.relative_to(ROOT).as_posix()
            if any(
                relative == place or (place.endswith("/") and relative.startswith(place))
                for place in HEAVY_ONLY_IN[module]
            ):
                continue
            wrong += [
                f"{where(path, line)} imports {name}"
                for name, line in imported(path)
                if name.split(".")[0] == module
            ]
    assert not wrong, "\n".join(wrong)


def test_nothing_is_unpickled() -> None:
    wrong = []
    for package in PACKAGES:
        for path in sources(package):
            wrong += [
                where(path, line)
                for name, line in imported(path)
                if name.split(".")[0] in {"pickle", "shelve", "marshal"}
            ]
            wrong += [
                where(path, node.lineno)
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                if isinstance(node, ast.Attribute)
                and node.attr == "load"
                and isinstance(node.value, ast.Name)
                and node.value.id == "torch"
            ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_packages_are_typed(package: str) -> None:
    assert (PACKAGES[package] / "py.typed").exists()


HEAVY = ("torch", "hivemind", "diffusers", "transformers", "aiohttp", "sqlalchemy", "numpy")


@pytest.mark.parametrize(
    "module", ["paris_models.commands.cli", "paris_node.cli", "paris_coordinator.cli"]
)
def test_help_imports_nothing_heavy(module: str) -> None:
    program = (
        "import sys\nfrom importlib import import_module\n"
        f"sys.argv = ['x', '--help']\ncli = import_module({module!r})\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
        f"print('HEAVY', sorted(m for m in {HEAVY!r} if m in sys.modules))\n"
    )
    path = ":".join(str(ROOT / folder) for folder in ("protocol", "models", "coordinator", "node"))
    run = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": path, "PATH": "/usr/bin:/bin"},
        check=False,
    )
    assert run.stdout.strip().splitlines()[-1] == "HEAVY []", run.stdout[-500:] + run.stderr[-2000:]


def test_seeded_violations_are_seen(tmp_path: Path) -> None:
    """The reader of imports sees imports wherever they hide."""
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    import torch\n    from paris_node.app import x\n")
    assert [name for name, _ in imported(bad)] == ["torch", "paris_node.app"]

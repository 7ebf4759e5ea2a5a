"""The vectors are what the script makes, and the files are read as another language would."""

from __future__ import annotations

import importlib.util
import json
import struct
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "protocol" / "vectors"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_vectors", FOLDER / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)  # as if the script itself had been started
        spec.loader.exec_module(module)
    return module


def read(name: str) -> Any:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    texts: dict[str, str] = load().make()
    return texts


def test_regenerating_gives_the_same_bytes(made: dict[str, str]) -> None:
    assert {path.name for path in FOLDER.glob("*.json")} == set(made)
    for name, text in made.items():
        assert (FOLDER / name).read_text(encoding="utf-8") == text, name


def test_streams_are_numpys() -> None:
    vectors = read("streams")
    for each in vectors["streams"]:
        counter = np.array([0, each["slot"], each["step"], each["stream"]], np.uint64)
        key = np.frombuffer(bytes.fromhex(each["key"]), "<u8")
        words = np.random.Philox(key=key, counter=counter).random_raw(9)
        assert [f"{word:016x}" for word in words.tolist()] == each["words"]
        uniforms = ((words[:5] >> np.uint64(11)) * 2.0**-53).tolist()
        assert [struct.pack(">d", x).hex() for x in uniforms] == each["uniforms"]
        u1 = ((words[:4] >> np.uint64(32)) + np.uint64(1)) * 2.0**-32
        angle = 2 * np.pi * ((words[:4] & np.uint64(0xFFFFFFFF)) * 2.0**-32)
        radius = np.sqrt(-2 * np.log(u1))
        normals = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).reshape(-1)[:7]
        expected = [struct.unpack(">f", bytes.fromhex(bits))[0] for bits in each["normals"]]
        assert np.allclose(normals, expected, rtol=2**-23, atol=0)
    for each in vectors["permutations"]:
        counter = np.array([0, 0, each["epoch"], 4], np.uint64)
        key = np.frombuffer(bytes.fromhex(each["key"]), "<u8")
        words = np.random.Philox(key=key, counter=counter).random_raw(each["n"])
        assert np.argsort(words, kind="stable").tolist() == each["order"]

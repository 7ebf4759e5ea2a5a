"""What all tests share: one thread per process, no progress bars, no telemetry, no home."""

import itertools
import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")


_COUNT = itertools.count()


@pytest.fixture(autouse=True)
def _own_memory(tmp_path_factory):
    """What programs remember of logs they forget after each test."""
    folder = tmp_path_factory.getbasetemp() / "state" / str(next(_COUNT))
    os.environ["XDG_STATE_HOME"] = str(folder)

"""`python -m benchmarks NAME [--json]`: run one benchmark and print its table."""

from __future__ import annotations

import argparse
import importlib
import os
import sys

# One thread per process, before any library reads it: what volunteers' assignments pin too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

NAMES = (
    "step", "start", "join", "route", "log", "merge", "verify", "prepare", "gpu",
    "bytes", "lineage",
)  # fmt: skip


def main() -> int:
    """Run the named benchmark; each module has `run(quick) -> (conditions, rows)`."""
    from benchmarks.table import as_json, as_text

    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--json", action="store_true", help="print {name, conditions, rows}")
    parser.add_argument("--quick", action="store_true", help="fewer repeats, for a first look")
    parser.add_argument("--part", default="", help="of gpu: this one alone (all, one by one)")
    arguments = parser.parse_args()
    options = {"part": arguments.part} if arguments.name == "gpu" else {}
    if arguments.part and not options:
        parser.error("only gpu has parts")
    module = importlib.import_module(f"benchmarks.{arguments.name}")
    facts, rows = module.run(arguments.quick, **options)
    show = as_json if arguments.json else as_text
    print(show(arguments.name, facts, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Ratios beside an alternative, measured in the same run: `python -m benchmarks NAME [--json]`."""

"""The verbs of `paris-coordinator` that belong to trust: audits, calibration, policies, revocation.

They are added to the one command of `paris_coordinator.cli`; nothing heavy is imported before a
verb runs.
"""

from __future__ import annotations

import typer


def add(app: typer.Typer) -> None:
    """Adds the verbs to the command."""

"""Alembic migrations of the ledger, run by `ledger.Ledger` itself whenever it opens a file."""

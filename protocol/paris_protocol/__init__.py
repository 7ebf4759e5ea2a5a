"""What node and coordinator agree on: records, signatures, digests, log, lineage."""

"""The jobs of the worker process: JSON in, JSON out, everything else by local file."""

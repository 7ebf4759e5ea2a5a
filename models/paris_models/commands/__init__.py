"""The verbs of the `paris` program; the one place where models may import the protocol."""

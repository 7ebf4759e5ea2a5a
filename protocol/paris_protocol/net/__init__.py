"""All input and output of the protocol: files, HTTP, and the peer-to-peer network process.

This package imports nothing by itself; `dht.py` alone loads hivemind, in a process of its own::

    from paris_protocol.net.control import HttpControl
    from paris_protocol.net.fetch import fetch_blob
    from paris_protocol.net.store import BlobStore
"""

"""What the coordinator answers over HTTP: the interface for nodes and the pages for people."""

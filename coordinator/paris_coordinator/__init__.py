"""A network's coordinator: leases, verification, merges, releases, and the evidence for them."""

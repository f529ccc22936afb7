"""Two results of the same scenes: read → pair by token → differences with intervals → table, JSON, page."""

"""What data there should be, what is there and readable, and what it looks like (tools/data.py)."""

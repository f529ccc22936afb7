"""Where the reference outputs lie, and the mark for tests that need them."""

from __future__ import annotations

from pathlib import Path

import pytest

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"

needs_golden = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason="reference outputs (golden data) are not part of the repository"
)

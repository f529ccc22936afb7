"""Files are whole or absent."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from navsim_eval.files import atomic_write, sha256


def test_bytes_text_and_functions(tmp_path: Path) -> None:
    assert atomic_write(tmp_path / "a" / "b.bin", b"\x00\xff").read_bytes() == b"\x00\xff"
    assert atomic_write(tmp_path / "c.txt", "é").read_text() == "é"
    path = atomic_write(tmp_path / "d.npz", lambda temporary: temporary.write_text(temporary.suffix))
    assert path.read_text() == ".npz", "the temporary name keeps the suffix"


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = atomic_write(tmp_path / "x.txt", "old")

    def half(temporary: Path) -> None:
        temporary.write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic_write(path, half)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x.txt"]


def test_checksum(tmp_path: Path) -> None:
    content = bytes(range(256)) * 10_000
    assert sha256(atomic_write(tmp_path / "x", content)) == hashlib.sha256(content).hexdigest()

"""Files that are whole or absent: writing through a temporary name, and checksums."""

from __future__ import annotations

import hashlib
import os
import tempfile
import zipfile
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np

from navsim_eval.errors import DataError


def atomic_write(path: Path | str, content: bytes | str | Callable[[Path], None]) -> Path:
    """Write a file so that a reader, or a killed writer, never sees half of it.

    content: the bytes or text, or a function that writes to the temporary path it is given (which keeps the suffix).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        if callable(content):
            content(temporary)
        elif isinstance(content, str):
            temporary.write_text(content)
        else:
            temporary.write_bytes(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


def sha256(path: Path | str) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read_npz(path: Path | str, remedy: str, names: Collection[str] = ()) -> dict[str, np.ndarray]:
    """Arrays of an .npz, or those of `names` that it holds. Nothing pickled is read.

    Raises FileNotFoundError, and DataError with the remedy for what is no such file.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files if not names or name in names}
    except FileNotFoundError:
        raise
    except (OSError, ValueError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(path, f"not a readable npz ({error})", remedy=remedy) from error

"""Pickle files as plain data: an allow-list of names, so that nothing in a file can run code.

Logs hold builtins and numpy arrays only. Every other name that a pickle asks for is refused, and so are numpy arrays
of objects. Callables handed to the unpickler are made afresh for each file or are immutable C types, so that a hostile
file cannot alter them for the next one.
"""

from __future__ import annotations

import collections
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy._core import multiarray

from navsim_eval.errors import DataError

_DAMAGED = "the file is truncated or damaged; unpack or download it again"


def load_pickle(path: Path | str, extra: Mapping[tuple[str, str], Any] | None = None) -> Any:
    """Content of a pickle file that holds only builtins and numpy arrays of numbers, bools and strings.

    extra: further allowed names, (module, qualified name) → object to use in its place.

    Raises DataError for a file that is absent, truncated, not a pickle, or asks for any other name.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            content = _RestrictedUnpickler(file, {**_allowed(), **(extra or {})}).load()
    except FileNotFoundError as error:
        raise DataError(path, "no such file", remedy="check data.root (or $OPENSCENE_DATA_ROOT)") from error
    except OSError as error:
        raise DataError(path, f"cannot be read ({error.strerror})") from error
    except _ForbiddenName as error:
        raise DataError(path, str(error), remedy="only plain data is read; do not trust this file") from error
    except Exception as error:  # a damaged stream may raise almost anything
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(path, f"not a readable pickle ({detail})", remedy=_DAMAGED) from error
    _refuse_object_arrays(content, path)
    return content


class _ForbiddenName(Exception):
    pass


class _RestrictedUnpickler(pickle.Unpickler):
    def __init__(self, file: Any, allowed: Mapping[tuple[str, str], Any]):
        super().__init__(file, encoding="latin1")  # arrays pickled by Python 2 hold byte strings
        self._allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._allowed[module, name]
        except KeyError:
            raise _ForbiddenName(f"asks for {module}.{name}, which is not allowed in a data file") from None


def _allowed() -> dict[tuple[str, str], Any]:
    """Names that a pickle of builtins and numpy arrays needs, under numpy 1 and 2 spellings and protocols 0 to 5."""

    def frombuffer(buffer: bytes, dtype: np.dtype, shape: tuple[int, ...], order: str) -> np.ndarray:
        return np.frombuffer(buffer, dtype=dtype).reshape(shape, order=order)

    def encode(text: str, encoding: str) -> bytes:
        if encoding not in ("latin1", "latin-1"):
            raise ValueError(f"text encoding {encoding}")
        return text.encode("latin1")

    def to_bytes(content: bytes | str | list[int] = b"", encoding: str = "latin1") -> bytes:
        return encode(content, encoding) if isinstance(content, str) else bytes(_not_a_size(content))

    def to_bytearray(content: bytes | str | list[int] = b"", encoding: str = "latin1") -> bytearray:
        return bytearray(to_bytes(content, encoding))

    allowed: dict[tuple[str, str], Any] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): encode,
        ("collections", "OrderedDict"): collections.OrderedDict,
    }
    for core in ("numpy.core", "numpy._core"):
        allowed[f"{core}.numeric", "_frombuffer"] = frombuffer
        allowed[f"{core}.multiarray", "_reconstruct"] = multiarray._reconstruct
        allowed[f"{core}.multiarray", "scalar"] = multiarray.scalar
    for builtins in ("builtins", "__builtin__"):
        allowed[builtins, "bytes"] = to_bytes
        allowed[builtins, "bytearray"] = to_bytearray
    for name in dir(np.dtypes):
        if name.endswith("DType"):
            allowed["numpy.dtypes", name] = getattr(np.dtypes, name)
    return allowed


def _not_a_size(content: Any) -> Any:
    if isinstance(content, int):
        raise ValueError("bytes of a given size instead of content")
    return content


def _refuse_object_arrays(content: Any, path: Path) -> None:
    """Walk containers (each once: they may be shared) and refuse arrays that hold Python objects."""
    stack, seen = [content], set()
    while stack:
        item = stack.pop()
        if isinstance(item, np.ndarray):
            if item.dtype.hasobject:
                raise DataError(path, "holds a numpy array of Python objects", remedy="store numbers or strings")
        elif isinstance(item, dict | list | tuple):
            if id(item) not in seen:
                seen.add(id(item))
                stack.extend(item.values() if isinstance(item, dict) else item)

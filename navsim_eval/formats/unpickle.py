"""Pickle files as plain data: an allow-list of names, so that nothing in a file can run code.

Logs hold builtins and numpy arrays only. Every other name that a pickle asks for is refused, and so are numpy arrays
of objects. Callables handed to the unpickler are made afresh for each file or are immutable C types, so that a hostile
file cannot alter them for the next one.
"""

from __future__ import annotations

import collections
import io
import pickle
import pickletools
import re
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
        stream = path.read_bytes()
        _walk(stream)
        content = _RestrictedUnpickler(io.BytesIO(stream), {**_allowed(), **(extra or {})}).load()
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


def _opcodes(argument_bytes: int) -> bytes:
    """Character class of the opcodes with an argument of that many bytes (STOP and LONG_BINPUT apart)."""
    codes = [
        op.code for op in pickletools.opcodes if (op.arg.n if op.arg else 0) == argument_bytes and op.code not in ".r"
    ]
    return b"[" + b"".join(re.escape(code.encode("latin1")) for code in codes) + b"]"


# A run of opcodes of fixed length, memo indices below 2^24, and the 16-character tokens that logs are full of.
_RUN = re.compile(
    b"(?:"
    + b"|".join(_opcodes(size) + b"." * size for size in (0, 1, 2, 4, 8))
    + b"|r...\x00|\x8c\x10.{16})*+",
    re.DOTALL,
)
_LENGTH_BYTES = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}
_LINES = {"c": 2, "i": 2}  # GLOBAL and INST are followed by two lines, other text opcodes by one


def _walk(stream: bytes) -> None:
    """Check that the opcodes end in STOP within the file and that no memo index exceeds the file's size.

    The unpickler allocates memory up to the largest index it meets, so that eight hostile or damaged bytes would
    otherwise take 64 GB. Raises ValueError.
    """
    position = 0
    while True:
        position = _RUN.match(stream, position).end()
        code = stream[position : position + 1].decode("latin1")
        if code == ".":
            return
        if code == "r":
            index, end = int.from_bytes(stream[position + 1 : position + 5], "little"), position + 5
            if index > len(stream):
                raise ValueError(f"memo index {index}")
        elif code not in pickletools.code2op:
            raise ValueError("it ends early" if not code else f"unknown opcode {code!r}")
        else:
            end = _end_of_argument(stream, position + 1, pickletools.code2op[code])
        if end > len(stream):
            raise ValueError("it ends early")
        position = end


def _end_of_argument(stream: bytes, position: int, opcode: pickletools.OpcodeInfo) -> int:
    if opcode.arg is None or opcode.arg.n >= 0:  # cut off by the end of the file
        return len(stream) + 1
    if opcode.arg.n in _LENGTH_BYTES:
        first = position + _LENGTH_BYTES[opcode.arg.n]
        return first + int.from_bytes(stream[position:first], "little")
    start = position
    for _ in range(_LINES.get(opcode.code, 1)):
        position = stream.find(b"\n", position) + 1
        if position == 0:
            return len(stream) + 1
    if opcode.name == "PUT" and int(stream[start:position]) > len(stream):
        raise ValueError(f"memo index {int(stream[start:position])}")
    return position


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

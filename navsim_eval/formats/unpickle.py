"""Pickle files as plain data: an allow-list of names, so that nothing in a file can run code.

Logs hold builtins and numpy arrays only. Every other name that a pickle asks for is refused, and so are numpy arrays
of anything but numbers, bools, strings and dates. Callables handed to the unpickler are made afresh for each file or
are immutable C types, so that a hostile file cannot alter them for the next one.

numpy believes the state that a pickle gives an element type: one that is declared to hold no objects, but is of the
object type, would have bytes of the file followed as pointers. So arrays are of a class of our own while a file is
read, which looks at the element type before numpy takes over the data.
"""

from __future__ import annotations

import collections
import io
import pickle
import pickletools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy._core import multiarray

from navsim_eval.errors import DataError
from navsim_eval.garbage import no_garbage_collection

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
        with no_garbage_collection():
            content = _RestrictedUnpickler(io.BytesIO(stream), {**_allowed(), **(extra or {})}).load()
    except FileNotFoundError as error:
        raise DataError(path, "no such file", remedy="check data.root (or $OPENSCENE_DATA_ROOT)") from error
    except OSError as error:
        raise DataError(path, f"cannot be read ({error.strerror})") from error
    except _Forbidden as error:
        raise DataError(path, str(error), remedy="only plain data is read; do not trust this file") from error
    except Exception as error:  # a damaged stream may raise almost anything
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(path, f"not a readable pickle ({detail})", remedy=_DAMAGED) from error
    return _with_plain_arrays(content)


class _Forbidden(Exception):
    """What plain data never holds."""


class _RestrictedUnpickler(pickle.Unpickler):
    def __init__(self, file: Any, allowed: Mapping[tuple[str, str], Any]):
        super().__init__(file, encoding="latin1")  # arrays pickled by Python 2 hold byte strings
        self._allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._allowed[module, name]
        except KeyError:
            raise _Forbidden(f"asks for {module}.{name}, which is not allowed in a data file") from None


def _opcodes(argument_bytes: int) -> bytes:
    """Character class of the opcodes with an argument of that many bytes (STOP and LONG_BINPUT apart)."""
    codes = [
        op.code for op in pickletools.opcodes if (op.arg.n if op.arg else 0) == argument_bytes and op.code not in ".r"
    ]
    return b"[" + b"".join(re.escape(code.encode("latin1")) for code in codes) + b"]"


def _sized(sizes: Iterable[int], after: bytes = b"") -> bytes:
    """Arguments of these numbers of bytes behind their length, which is one byte and `after`."""
    return b"(?:" + b"|".join(re.escape(bytes([size])) + after + b".{%d}" % size for size in sizes) + b")"


# A run of opcodes of fixed length, memo indices below 2^24, and what logs are full of: texts of under 96 characters
# (a token has 16), and arrays of 3, 5 and 9 numbers in bytes or a bytearray.
_NUMBERS = (72, 40, 24)
_FREQUENT = rb"|r...\x00|\x8c%b|C%b|\x96%b" % (
    _sized((16, *range(16), *range(17, 96))), _sized(_NUMBERS), _sized(_NUMBERS, after=rb"\x00{7}")
)  # fmt: skip
_RUN = re.compile(
    b"(?:" + b"|".join(_opcodes(size) + b"." * size for size in (0, 1, 2, 4, 8)) + _FREQUENT + b")*+", re.DOTALL
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

    array_class = _make_array_class()

    def reconstruct(*_: Any) -> np.ndarray:
        return array_class()  # class, shape and type are placeholders; the state brings the real ones

    def frombuffer(buffer: bytes | bytearray, dtype: np.dtype, shape: tuple[int, ...], order: str) -> np.ndarray:
        if not isinstance(buffer, bytes | bytearray):  # memory that the file could free
            raise ValueError(f"an array over a {type(buffer).__name__}")
        array = np.frombuffer(buffer, dtype=_checked_dtype(dtype)).reshape(shape, order=order)
        return array.view(array_class)

    def scalar(dtype: np.dtype, content: bytes = b"") -> np.generic:
        return multiarray.scalar(_checked_dtype(dtype), content)

    def encode(text: str, encoding: str) -> bytes:
        if encoding not in ("latin1", "latin-1"):
            raise ValueError(f"text encoding {encoding}")
        return text.encode("latin1")

    def to_bytes(content: bytes | str | list[int] = b"", encoding: str = "latin1") -> bytes:
        return encode(content, encoding) if isinstance(content, str) else bytes(_not_a_size(content))

    def to_bytearray(content: bytes | str | list[int] = b"", encoding: str = "latin1") -> bytearray:
        return bytearray(to_bytes(content, encoding))

    allowed: dict[tuple[str, str], Any] = {
        ("numpy", "ndarray"): array_class,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): encode,
        ("collections", "OrderedDict"): collections.OrderedDict,
    }
    for core in ("numpy.core", "numpy._core"):
        allowed[f"{core}.numeric", "_frombuffer"] = frombuffer
        allowed[f"{core}.multiarray", "_reconstruct"] = reconstruct
        allowed[f"{core}.multiarray", "scalar"] = scalar
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


_ELEMENT_KINDS = "biufcSUMm"  # bools, integers, floats, complex numbers, bytes, text, dates, time spans


def _checked_dtype(dtype: Any) -> np.dtype:
    """The element type, if it is a plain one whose state is what numpy itself would have made of it."""
    if not isinstance(dtype, np.dtype):
        raise ValueError(f"an element type that is a {type(dtype).__name__}")
    if dtype.kind == "O" or dtype.hasobject:
        raise _Forbidden("holds a numpy array of Python objects")
    if dtype.kind not in _ELEMENT_KINDS or dtype.fields is not None or dtype.subdtype is not None:
        raise _Forbidden("holds a numpy array whose elements are neither numbers nor text")
    sound = np.dtype(dtype.str)
    if (dtype.itemsize, dtype.alignment, dtype.flags) != (sound.itemsize, sound.alignment, sound.flags):
        raise ValueError("an element type that numpy would not have made")
    return dtype


def _make_array_class() -> type[np.ndarray]:
    """What stands for numpy.ndarray while one file is read. Only the state in the file gives it content, once."""

    class Array(np.ndarray):
        def __new__(cls, *arguments: Any) -> np.ndarray:
            if arguments:
                raise ValueError("an array of a given size instead of content")
            return super().__new__(cls, 0, np.int8)

        def __setstate__(self, state: Any) -> None:
            if self.size or self.base is not None:
                raise ValueError("the content of an array is given twice")
            *_, shape, dtype, fortran_order, content = state
            if not _checked_dtype(dtype).itemsize and 0 not in shape:
                raise ValueError("an array of elements without size")
            super().__setstate__((1, shape, dtype, fortran_order, content))

    return Array


_WITHOUT_PARTS = frozenset((str, int, float, bool, bytes, type(None)))  # nearly all that a log holds


def _with_plain_arrays(content: Any) -> Any:
    """The content with numpy's own arrays in its lists and dicts, which are changed in place (each once)."""
    stack, seen = [[content]], set()
    whole = stack[0]
    while stack:
        container = stack.pop()
        for key, item in container.items() if isinstance(container, dict) else enumerate(container):
            if type(item) in _WITHOUT_PARTS:
                continue
            if isinstance(item, np.ndarray):
                if not isinstance(container, tuple):
                    container[key] = item.view(np.ndarray)
            elif isinstance(item, dict | list | tuple) and id(item) not in seen:
                seen.add(id(item))
                parts = item.values() if isinstance(item, dict) else item
                if not _WITHOUT_PARTS.issuperset(map(type, parts)):
                    stack.append(item)
    return whole[0]

"""One record: named arrays as bytes that describe themselves, some of them compressed without loss."""

from __future__ import annotations

import json
import zlib
from collections.abc import Collection, Mapping

import numpy as np

ALIGNMENT = 64

Arrays = Mapping[str, np.ndarray]
Deflate = Collection[str] | Mapping[str, int]  # names of arrays to compress; a zlib level for each, where 6 is too slow


def pack(arrays: Arrays, deflate: Deflate = ()) -> bytes:
    """One sample as a self-describing record. Arrays named in `deflate` are compressed without loss (see `_encode`)."""
    levels = deflate if isinstance(deflate, Mapping) else dict.fromkeys(deflate, 6)
    entries, parts, position = [], [], 0
    for name, value in arrays.items():
        array = np.asarray(value)
        if array.dtype.hasobject:
            raise TypeError(f"array '{name}' holds Python objects; shards store plain numbers and fixed-width text")
        raw = name not in levels
        codec, body = ("raw", np.ascontiguousarray(array).tobytes()) if raw else _encode(array, levels[name])
        entries.append([name, array.dtype.str, list(array.shape), codec, position, len(body)])
        parts.append(padded(body))
        position += len(parts[-1])
    header = json.dumps(entries, separators=(",", ":")).encode()
    return padded(len(header).to_bytes(8, "little") + header) + b"".join(parts)


def unpack(record: bytes | memoryview) -> dict[str, np.ndarray]:
    """Arrays of a record; uncompressed ones are read-only views into it, without a copy."""
    length = int.from_bytes(record[:8], "little")
    entries = json.loads(bytes(record[8 : 8 + length]))
    start = round_up(8 + length)
    arrays = {}
    for name, dtype, shape, codec, position, size in entries:
        body = record[start + position : start + position + size]
        arrays[name] = _decode(codec, body, np.dtype(dtype), shape)
    return arrays


def _encode(array: np.ndarray, level: int) -> tuple[str, bytes]:
    """Codec and compressed bytes, without loss.

    "zlib":  the bytes in C order, through zlib of that level
    "delta": for numbers of 8 bytes. Read as integers, each row is replaced by its difference from the one before (the
             first axis are the rows); of all numbers the first byte is stored first, then the second, and so on, and
             that goes through zlib of level 1. Coordinates along a line share their leading bytes: half the size of
             "zlib" alone.
    """
    if array.dtype.itemsize != 8 or array.ndim == 0:
        return "zlib", zlib.compress(np.ascontiguousarray(array).tobytes(), level)
    changes = np.diff(np.ascontiguousarray(array).view(np.int64), axis=0, prepend=np.int64(0))
    planes = changes.reshape(-1, 1).view(np.uint8).T
    return "delta", zlib.compress(planes.tobytes(), 1)


def _decode(codec: str, body: bytes | memoryview, dtype: np.dtype, shape: list[int]) -> np.ndarray:
    if codec == "raw":
        return np.frombuffer(body, dtype).reshape(shape)
    body = zlib.decompress(body)
    if codec == "delta":
        changes = np.frombuffer(body, np.uint8).reshape(8, -1).T.copy().view(np.int64)
        return np.cumsum(changes.reshape(shape), axis=0).view(dtype)
    return np.frombuffer(body, dtype).reshape(shape)


def padded(body: bytes) -> bytes:
    return body + b"\0" * (round_up(len(body)) - len(body))


def round_up(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT

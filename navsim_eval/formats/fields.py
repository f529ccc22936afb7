"""One field of a dict that somebody else wrote: the value in our types, or an error that names file, place and field.

A small file can stand for a huge value, since a pickle may name one list or text any number of times. Whatever makes
arrays or texts of a field looks at its true size first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from navsim_eval.errors import DataError

REMEDY = "unpack or download the log again"
MOST_ELEMENTS = 1_000_000  # more than a field of any log holds
_LONGEST_TEXT = 1000


class FieldReader:
    """Reads fields of one dict; every failure is a DataError that names file, place and field."""

    def __init__(self, values: Mapping[str, Any], path: Path | str, place: str):
        if not isinstance(values, Mapping):
            raise DataError(path, f"a dict is expected, this is a {type(values).__name__}", field=place, remedy=REMEDY)
        self.values, self.path, self.place = values, path, place

    def error(self, key: str, problem: str) -> DataError:
        """The error to raise about a field."""
        return DataError(self.path, problem, field=f"{self.place}.{key}", remedy=REMEDY)

    def inner(self, key: str) -> FieldReader:
        """Reader of a dict inside this one."""
        if key not in self.values:
            raise self.error(key, "missing")
        return FieldReader(self.values[key], self.path, f"{self.place}.{key}")

    def parse(self, key: str, parser: Callable[[Any], Any], **default: Any) -> Any:
        """parser(field); an absent or null field is `default`, or an error without one."""
        value = self.values.get(key)
        if value is None:
            if "default" in default:
                return default["default"]
            raise self.error(key, "missing")
        try:
            return parser(value)
        except (TypeError, ValueError, KeyError, IndexError, OverflowError, MemoryError) as error:
            raise self.error(key, f"cannot be read ({error})") from error

    def numbers(self, key: str, shape: tuple[int, ...], finite: bool = True) -> np.ndarray:
        """Field as float64 of the given shape (-1: any length, also for an empty array of any shape)."""
        array = self.values.get(key)
        if type(array) is not np.ndarray or array.dtype != np.float64 or array.size > MOST_ELEMENTS:  # as logs hold it
            array = self.parse(key, lambda value: np.asarray(bounded(value), dtype=np.float64))
        if array.size == 0 and shape[0] == -1:
            array = array.reshape(0, *shape[1:])
        if array.shape != shape and not _fits(array.shape, shape):
            wanted = str(shape).replace("-1", "n")
            raise self.error(key, f"shape {array.shape} where {wanted} is expected")
        if finite and not np.isfinite(array).all():
            raise self.error(key, "not finite")
        return array


def _fits(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    return len(shape) == len(wanted) and all(want in (-1, got) for want, got in zip(wanted, shape, strict=True))


def single_precision(field: FieldReader, key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Field rounded to float32, as the published evaluators keep motion states; float64."""
    with np.errstate(over="ignore"):
        rounded = field.numbers(key, shape).astype(np.float32).astype(np.float64)
    if not np.isfinite(rounded).all():
        raise field.error(key, "too large for single precision")
    return rounded


def texts(field: FieldReader, key: str) -> np.ndarray:
    """Field as an array of str; an empty one may be stored as float64."""

    def as_array(values: Any) -> np.ndarray:
        items = np.asarray(bounded(values), dtype=object).ravel().tolist()
        longest = max((len(item) for item in items if isinstance(item, str | bytes)), default=0)
        if longest * len(items) > MOST_ELEMENTS:
            raise ValueError(f"{len(items)} texts of up to {longest} characters")
        return np.array(items, dtype=np.str_)

    return field.parse(key, as_array)


def parse_timestamp(value: Any) -> int:
    """Microseconds from any integer type. Raises ValueError beyond 64 bits."""
    time = int(value)
    if not -(2**63) <= time < 2**63:
        raise ValueError("beyond 64 bits")
    return time


def text(value: Any) -> str:
    """A text as it is. Raises ValueError for anything else, and for one that is no name or token."""
    if not isinstance(value, str):
        raise ValueError(f"a text is expected, this is a {type(value).__name__}")
    if len(value) > _LONGEST_TEXT:
        raise ValueError(f"{len(value)} characters where at most {_LONGEST_TEXT} are expected")
    return str(value)


def bounded(value: Any) -> Any:
    """The value. Raises ValueError where its nested lists stand for more elements than a frame can have."""
    left, pending = MOST_ELEMENTS, [value]
    while pending:
        item = pending.pop()
        left -= item.size if isinstance(item, np.ndarray) else len(item) if isinstance(item, list | tuple | str) else 1
        if isinstance(item, list | tuple):
            for part in item:
                kind = type(part)  # a log has thousands of short texts and numbers
                if kind is str:
                    left -= len(part)
                elif kind not in (int, float, bool) and isinstance(part, list | tuple | str | np.ndarray):
                    pending.append(part)
        if left < 0:
            raise ValueError(f"more than {MOST_ELEMENTS} elements")
    return value

"""Python's search for garbage, put off while nothing can be garbage."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """For code that makes many objects and no cycles among them: looking through all of them again and again takes as
    long as a tenth of preparing a scene, and half of reading a log. Also a decorator."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()

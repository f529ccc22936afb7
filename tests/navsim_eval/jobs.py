"""Jobs that kill their worker, for tests of every executor."""

from __future__ import annotations

import os
import signal
from pathlib import Path


class KillOnce:
    """Dies on item 5, the first time only (remembered in a file)."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self, x: int) -> int:
        mark = self.folder / "died"
        if x == 5 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return x


def kill_on_five(x: int) -> int:
    if x == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return x

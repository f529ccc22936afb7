"""A folder in object storage, mirrored into a local one: each file is downloaded when somebody first asks for it.

`s3://bucket/path`, `gs://…`, `az://…`, `https://…`: whatever fsspec has a package for. Files arrive under a temporary
name and are moved when whole; of several processes on a machine that want the same file, one downloads and the others
wait. Nothing is ever removed from the mirror; it may be deleted when no run uses it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from navsim_eval.errors import DataError, UserError
from navsim_eval.files import atomic_write

ROOT_VARIABLE = "NAVSIM_MIRROR_ROOT"  # where mirrors lie: a disk of the machine itself, at best


def is_remote(folder: Path | str) -> bool:
    """Whether a folder is named by a URL."""
    return "://" in str(folder)


def default_root() -> Path:
    """$NAVSIM_MIRROR_ROOT, else `mirror` beside the other results ($NAVSIM_EXP_ROOT, else ./outputs)."""
    own = os.environ.get(ROOT_VARIABLE, "")
    return Path(own) if own else Path(os.environ.get("NAVSIM_EXP_ROOT", "") or "outputs") / "mirror"


class Mirror:
    """The local copy of a remote folder, as far as it was asked for. Picklable; every process opens the storage itself.

    url:  of the folder;  root: local folder that holds mirrors, by default `default_root()`
    Raises UserError for a URL that no installed package understands, DataError where the storage cannot be read.
    """

    def __init__(self, url: str, root: Path | str | None = None):
        self.url = url.rstrip("/")
        digest = hashlib.sha256(self.url.encode()).hexdigest()[:12]
        name = self.url.rsplit("/", 1)[-1] or "root"
        self.folder = Path(root or default_root()) / f"{name}-{digest}"
        self._opened: tuple[int, Any, str] | None = None
        self._sizes = self._list()

    @property
    def names(self) -> tuple[str, ...]:
        """Files of the remote folder, as it was when this was made."""
        return tuple(self._sizes)

    def size(self, name: str) -> int:
        """Bytes of a remote file; 0 for one that is not there."""
        return self._sizes.get(name, 0)

    def fetch(self, name: str, again: bool = False) -> Path:
        """Local path of a file, downloaded unless a copy of the same size is there. again: download in any case."""
        path = self.folder / name
        if not again and self._is_here(path):
            return path
        with self._only_one(name):
            if again or not self._is_here(path):
                storage, base = self._storage()
                with self._explained(name):
                    atomic_write(path, lambda temporary: storage.get_file(f"{base}/{name}", str(temporary)))
                if path.stat().st_size != self.size(name):
                    path.unlink()
                    raise DataError(f"{self.url}/{name}", "changed while it was read", remedy="start again")
        return path

    def _is_here(self, path: Path) -> bool:
        return path.is_file() and path.stat().st_size == self.size(path.name)

    def _list(self) -> dict[str, int]:
        with self._explained(""):
            storage, base = self._storage()
            storage.invalidate_cache()
            entries = storage.ls(base, detail=True)
        files = {e["name"].rstrip("/").rsplit("/", 1)[-1]: int(e["size"]) for e in entries if e["type"] == "file"}
        return dict(sorted(files.items()))

    def _storage(self) -> tuple[Any, str]:
        """The file system and the folder's name in it; opened afresh in a forked process."""
        if self._opened is None or self._opened[0] != os.getpid():
            from fsspec.core import url_to_fs  # not needed by anybody who reads local files

            try:
                self._opened = (os.getpid(), *url_to_fs(self.url))
            except (ImportError, ValueError) as error:
                raise UserError(f"{self.url}: {error}; install fsspec's package for it (s3fs, gcsfs, adlfs)") from error
        return self._opened[1], self._opened[2].rstrip("/")

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        """Whatever a storage client raises, as one line that names the file."""
        where = f"{self.url}/{name}".rstrip("/")
        try:
            yield
        except UserError:
            raise
        except FileNotFoundError as error:
            raise DataError(where, "no such file or folder in the storage", remedy="check the URL") from error
        except Exception as error:  # every client has exceptions of its own
            problem = f"cannot be read ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
            raise DataError(where, problem, remedy="check URL, credentials and network") from error

    @contextmanager
    def _only_one(self, name: str) -> Iterator[None]:
        """Among the processes of this machine; the system frees the lock of one that dies."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / f".{name}.lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

"""How much of a split is there: accounts that say plainly what was expected, found and missing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from navsim_eval.formats.splits import PublishedSplit

_SHOWN = 3


@dataclass(frozen=True)
class SplitCoverage:
    """What a split should hold, and what of it was found. `str()` says it in one paragraph.

    logs_found:      logs read;  logs_missing: listed by the filter but not on disk
    logs_broken:     (log name, reason) of logs that cannot be read and were left out
    scenes_found:    windows that passed the filter
    scenes_expected: number of tokens that the filter lists (capped by max_scenes), None where it lists none
    tokens_missing:  listed tokens that no log on disk holds (or whose window was dropped)
    no_route, gaps:  windows left out for an empty route, or (strict mode) for a gap in time
    published:       the published size, to notice an incomplete filter or folder
    """

    split: str
    logs_found: int
    logs_missing: tuple[str, ...]
    logs_broken: tuple[tuple[str, str], ...]
    scenes_found: int
    scenes_expected: int | None
    tokens_missing: tuple[str, ...]
    no_route: int
    gaps: int
    published: PublishedSplit | None = None

    @property
    def complete(self) -> bool:
        """Whether everything that the filter lists was found and could be read."""
        return not (self.logs_missing or self.logs_broken or self.tokens_missing)

    def __str__(self) -> str:
        logs = self.logs_found + len(self.logs_missing) + len(self.logs_broken)
        expected = self.scenes_found if self.complete else self.scenes_expected
        scenes = f"{self.scenes_found} scenes" if expected is None else f"{self.scenes_found} of {expected} scenes"
        state = "complete" if self.complete else "partial"
        lines = [f"split {self.split}: {state}: {scenes}, {self.logs_found} of {logs} logs"]
        if self.logs_missing:
            lines.append(f"{len(self.logs_missing)} logs missing on disk ({_first(self.logs_missing)})")
        if self.logs_broken:
            name, reason = self.logs_broken[0]
            lines.append(f"{len(self.logs_broken)} logs broken (first: {name}: {reason})")
        if self.tokens_missing:
            lines.append(f"{len(self.tokens_missing)} listed tokens not found ({_first(self.tokens_missing)})")
        if self.no_route:
            lines.append(f"{self.no_route} windows without a route left out")
        if self.gaps:
            lines.append(f"{self.gaps} windows with a gap in time left out")
        lines += self._against_published()
        return "; ".join(lines)

    def _against_published(self) -> Iterator[str]:
        if self.published is None:
            return
        logs = self.logs_found + len(self.logs_missing) + len(self.logs_broken)
        if self.published.logs is not None and logs != self.published.logs:
            yield f"the published split has {self.published.logs} logs, here {logs} are listed or present"
        if self.published.tokens is not None and self.scenes_expected != self.published.tokens:
            yield f"the published split has {self.published.tokens} scenes, here {self.scenes_expected} are listed"


@dataclass(frozen=True)
class SensorCoverage:
    """Sensor files that the current frames of a split need, and how many of them are there.

    scenes, scenes_complete: all scenes, and those with all their files
    files_expected, files_missing: counts;  first_missing: paths (or what a log does not list), in scene order
    """

    split: str
    scenes: int
    scenes_complete: int
    files_expected: int
    files_missing: int
    first_missing: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether every file is there."""
        return not self.files_missing

    def __str__(self) -> str:
        state = "complete" if self.complete else "partial"
        text = f"sensors of {self.split}: {state}: {self.scenes_complete} of {self.scenes} scenes, "
        text += f"{self.files_expected - self.files_missing} of {self.files_expected} files"
        return text if self.complete else f"{text}; missing: {_first(self.first_missing)}"


def _first(names: Sequence[str]) -> str:
    more = ", …" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more

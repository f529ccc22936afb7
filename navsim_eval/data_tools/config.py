"""Keys of tools/data.py."""

from __future__ import annotations

from dataclasses import dataclass, field

from navsim_eval.config import DataConfig
from navsim_eval.errors import UserError
from navsim_eval.scene import CAMERAS

ACTIONS = ("splits", "plan", "verify", "checksums", "statistics", "normalisation")
FRAMES = ("current", "history", "all")
FRONT_CAMERAS = ("CAM_L0", "CAM_F0", "CAM_R0")


@dataclass
class DataToolConfig:
    """What to do with which split.

    do:        splits, plan, verify, checksums, statistics or normalisation; a bare first word means the same
    split:     a published split, or a folder under navsim_logs/; for plan also empty: all published splits
    cameras:   cameras whose files are looked at (verify, checksums); [all]: those that the logs list
    lidar:     look at point clouds, too
    frames:    of each window: current (what planners here read), history (four frames), or all
    read:      verify opens and decodes every file; false: only looks whether it is there and not empty
    checksums: list of SHA-256 sums, as `sha256sum` writes it; empty: <data.root>/<split>.sha256
    archives:  folder with downloaded archives whose published MD5 sums verify compares; empty: none
    samples:   scenes whose pictures normalisation reads
    workers:   processes (0: one per core)
    output_dir: gets one JSON file per action and split, and the figure of statistics
    """

    do: str = "plan"
    data: DataConfig = field(default_factory=DataConfig)
    split: str = ""
    cameras: list[str] = field(default_factory=lambda: list(FRONT_CAMERAS))
    lidar: bool = True
    frames: str = "current"
    read: bool = True
    checksums: str = ""
    archives: str = ""
    samples: int = 200
    workers: int = 0
    output_dir: str = "outputs/data"

    def __post_init__(self) -> None:
        for key, value, allowed in (("do", self.do, ACTIONS), ("frames", self.frames, FRAMES)):
            if value not in allowed:
                raise UserError(f"{key}: '{value}' is none of {', '.join(allowed)}")
        unknown = [name for name in self.cameras if name not in (*CAMERAS, "all")]
        if unknown:
            raise UserError(f"cameras: '{unknown[0]}' is none of {', '.join(CAMERAS)}, all")
        if self.do not in ("splits", "plan") and not self.split:
            raise UserError(f"split: {self.do} needs one, for example split=test")
        if self.samples < 1:
            raise UserError(f"samples: {self.samples} must be at least 1")

"""A two-stage split on disk: the tiny world's logs as first stage, second-stage scenes cut from what followed.

One group: two first-stage scenes 0.5 s apart, and two pairs of second-stage scenes 4 s after them, in which the ego
stands beside where it was recorded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from navsim_eval.config import DataConfig
from navsim_eval.formats.logs import read_log
from navsim_eval.formats.splits import SceneFilter, write_scene_filter
from navsim_eval.geometry import to_global
from navsim_eval.metrics.two_stage import Group
from navsim_eval.scene import Frame
from tests.nuplan_pickles import write_second_stage
from tests.worlds import write_world

SPLIT, FOLDER = "tiny_two_stage", "test"
NOW, LATER = 4, 8  # frame of the first-stage scene; frames (4 s) to the second stage
SHIFTS = (0.2, 1.5)  # metres to the left at which second-stage scenes start


@dataclass(frozen=True)
class TwoStageWorld:
    """data: for any reader;  group: as the split file lists it;  overrides: for the tools."""

    data: DataConfig
    group: Group

    @property
    def overrides(self) -> list[str]:
        data = self.data
        return [f"data.root={data.root}", f"data.maps={data.maps}", f"data.filters={data.filters}", f"split={SPLIT}"]

    @property
    def tokens(self) -> list[str]:
        now, previous, pairs = self.group
        return [now, previous, *(token for pair in pairs for token in pair)]

    @property
    def second_stage(self) -> Path:
        return Path(self.data.root) / SPLIT / "synthetic_scene_pickles"


def write_two_stage_world(root: Path) -> TwoStageWorld:
    """Write logs, map, second-stage scenes and split files."""
    world = write_world(root, {FOLDER: 1}, num_frames=21, sensors=False)
    frames = read_log(world.log_file(FOLDER))
    first = [frames[NOW], frames[NOW - 1]]
    pairs = []
    for number, shift in enumerate(SHIFTS):
        pair = tuple(f"{10 * number + place:017x}" for place in (0, 1))
        for place, token in enumerate(pair):
            last = NOW + LATER - place
            moved = [_moved(frame, shift) for frame in frames[last - 3 : last + 1]]
            tokens = {
                "scene_token": f"{10 * number + place + 5:017x}",
                "initial_token": token,
                "corresponding_original_scene": frames[last].token,
                "corresponding_original_initial_token": first[place].token,
            }
            path = root / SPLIT / "synthetic_scene_pickles" / f"{tokens['scene_token']}.pkl"
            write_second_stage(path, moved, frames[last + 1 : last + 9], tokens)
        pairs.append(pair)
    group = (first[0].token, first[1].token, tuple(pairs))
    filters = root / "train_test_split"
    window = SceneFilter(num_future_frames=8, frame_interval=1, tokens=group[:2], log_names=world.logs[FOLDER])
    write_scene_filter(filters / "scene_filter" / "tiny.yaml", window)
    listed = "".join(f"    - ['{a}', '{b}']\n" for a, b in pairs)
    (filters / f"{SPLIT}.yaml").write_text(
        f"defaults:\n  - scene_filter: tiny\ndata_split: {FOLDER}\nreactive_all_mapping:\n"
        f"- - '{group[0]}'\n  - '{group[1]}'\n  -\n{listed}"
    )
    return TwoStageWorld(replace(world.data, filters=str(filters)), group)


def _moved(frame: Frame, shift: float) -> Frame:
    """The ego `shift` metres to the left of where it was; what is around stays where it is."""
    boxes = frame.annotations.boxes.copy()
    boxes[:, 1] -= shift
    pose = to_global(frame.ego_pose, np.array([0.0, shift, 0.0]))
    return replace(frame, ego_pose=pose, annotations=replace(frame.annotations, boxes=boxes), cameras={})

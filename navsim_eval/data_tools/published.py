"""The published splits: what each filters, what it is for, how many scenes, how many bytes, and who says so.

Counts of logs and scenes are those of `formats.splits.PUBLISHED_SPLITS`. Sizes are decimal (1 GB = 10⁹ bytes) as their
sources round them. A number that no source states is None and is shown as a question mark, never guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from navsim_eval.formats.splits import PUBLISHED_SPLITS, PublishedSplit

SOURCES: Mapping[str, str] = {
    "a": "NAVSIM docs/splits.md, v1.1 and v2.2",
    "b": "counted in NAVSIM's filter and split files, v2.2 (v1.1 for the *_e2e splits)",
    "c": "OpenScene docs/dataset_stats.md",
    "d": "file listing of OpenDriveLab/OpenScene on Hugging Face",
    "e": "OpenScene docs/getting_started.md",
    "f": "download scripts of the NAVSIM repository (number of archives)",
    "g": "product of published counts: scenes times files a scene",
    "h": "projected: bytes a scene measured on the synthetic city, times the published number of scenes",
}


@dataclass(frozen=True)
class Number:
    """A published quantity and the key of its source in `SOURCES`. value: None where no source states it."""

    value: float | None
    source: str = ""


UNKNOWN = Number(None)
ON_THE_SERVER = "on the server"


@dataclass(frozen=True)
class SplitFacts:
    """What somebody who is about to download wants to know about a split.

    keeps:   which windows it holds;  window: history + future frames at 2 Hz, and the stride of window starts
    use:     what it is for;  metric: the published metric, "" for none
    logs_gb: log pickles, unpacked;  sensors_gb: sensor files that its download script fetches
    archives: names of the archive groups in `ARCHIVES`, the maps apart
    """

    keeps: str
    window: str
    use: str
    metric: str
    logs_gb: Number
    sensors_gb: Number
    archives: tuple[str, ...]
    logs_source: str = "b"
    scenes_source: str = "b"


@dataclass(frozen=True)
class Archives:
    """One group of archives of a download: `names.format(n)` for n = first … first + count - 1.

    gb: all of them together, packed;  md5: published checksums by archive name
    """

    names: str
    gb: Number
    first: int = 0
    count: int = 1
    md5: Mapping[str, str] | None = None


_NAVTRAIN_MD5 = {  # NAVSIM docs/splits.md; these are the eight archives of download_navtrain_aws.sh
    "navtrain_current_1.tgz": "6f92f38d5f03ed852da7872a7122bdd2",
    "navtrain_current_2.tgz": "7a72f0a758b5df6cbe4c565920a4869f",
    "navtrain_current_3.tgz": "b083fce1428308abb5682a1a150cc1af",
    "navtrain_current_4.tgz": "68354ac2c993aa1ebbfac59547fdb840",
    "navtrain_history_1.tgz": "dc46ed34d92d5ab9cc1464d67b72fbf6",
    "navtrain_history_2.tgz": "fab177bdb79c0c9536da1566d13e5995",
    "navtrain_history_3.tgz": "71ed9a2387edc3849921861d7873c7f0",
    "navtrain_history_4.tgz": "2cc13aced2f458e50fe4cc2f26d18e07",
}

ARCHIVES: Mapping[str, Archives] = {
    "maps": Archives("nuplan-maps-v1.1.zip", UNKNOWN),
    "mini logs": Archives("openscene_metadata_mini.tgz", Number(0.534, "d")),
    "mini cameras": Archives("openscene_sensor_mini_camera_{}.tgz", Number(84, "e"), count=32),
    "mini lidar": Archives("openscene_sensor_mini_lidar_{}.tgz", Number(60, "e"), count=32),
    "trainval logs": Archives("openscene_metadata_trainval.tgz", Number(7.05, "d")),
    "trainval cameras": Archives("openscene_sensor_trainval_camera_{}.tgz", UNKNOWN, count=143),
    "trainval lidar": Archives("openscene_sensor_trainval_lidar_{}.tgz", UNKNOWN, count=143),
    "test logs": Archives("openscene_metadata_test.tgz", Number(0.476, "d")),
    "test cameras": Archives("openscene_sensor_test_camera_{}.tgz", Number(120, "e"), count=32),
    "test lidar": Archives("openscene_sensor_test_lidar_{}.tgz", UNKNOWN, count=32),
    "navtrain current": Archives("navtrain_current_{}.tgz", Number(300, "a"), 1, 4, _NAVTRAIN_MD5),
    "navtrain history": Archives("navtrain_history_{}.tgz", Number(145, "a"), 1, 4, _NAVTRAIN_MD5),
    "navhard current": Archives("navsim_v2.2_navhard_two_stage_curr_sensors.tar.gz", Number(12.8, "d")),
    "navhard history": Archives("navsim_v2.2_navhard_two_stage_hist_sensors.tar.gz", Number(25.5, "d")),
    "navhard scenes": Archives("navsim_v2.2_navhard_two_stage_scene_pickles.tar.gz", Number(0.211, "d")),
    "warmup": Archives("navsim_v2.2_warmup_two_stage.tar.gz", Number(1.16, "d")),
    "private hard": Archives("navsim_v2.2_private_test_hard_two_stage.tar.gz", Number(10.5, "d")),
    "private e2e logs": Archives("openscene_metadata_private_test_e2e.tgz", Number(0.00416, "d")),
    "private e2e sensors": Archives("openscene_sensor_private_test_e2e.tgz", Number(23.6, "d")),
}

_MINI = ("mini logs", "mini cameras", "mini lidar")
_TRAINVAL = ("trainval logs", "trainval cameras", "trainval lidar")
_TEST = ("test logs", "test cameras", "test lidar")
_NAVHARD = ("navhard current", "navhard history", "navhard scenes")
_ALL = "every window that has a route"
_HARD = "windows that constant velocity does not solve and that the human driver passes"

FACTS: Mapping[str, SplitFacts] = {
    "mini": SplitFacts(
        _ALL, "4+10, apart", "a first look at real data", "", Number(1, "a"), Number(151, "a"), _MINI, "c"
    ),
    "trainval": SplitFacts(
        _ALL, "4+10, apart", "training on everything", "", Number(14, "a"), Number(2100, "a"), _TRAINVAL, "c"
    ),
    "test": SplitFacts(
        _ALL, "4+10, apart", "evaluation on everything", "", Number(1, "a"), Number(217, "a"), _TEST, "c"
    ),
    "navmini": SplitFacts(
        "a small selection of mini", "4+10, apart", "trying a pipeline; not for reporting (52 of its logs are in "
        "navtrain, 10 in navtest)", "", Number(1, "a"), Number(151, "a"), _MINI,
    ),
    "navtrain": SplitFacts(
        _HARD, "4+10, stride 1", "training (978 logs) and validation (214 logs)", "", Number(14, "a"), Number(445, "a"),
        ("trainval logs", "navtrain current", "navtrain history"),
    ),
    "navtest": SplitFacts(
        _HARD, "4+10, stride 1", "the number that papers report", "PDMS v1.1; EPDMS v2.2 in one stage",
        Number(0.983, "a"), Number(223, "a"), _TEST,
    ),
    "navtest_two_stage": SplitFacts(
        "the scenes of navtest, with a longer future", "4+16, stride 1", "two-stage evaluation on navtest's scenes",
        "EPDMS v2.2", Number(0.983, "a"), Number(223, "a"), _TEST,
    ),
    "navhard_two_stage": SplitFacts(
        "hard scenes, each with synthetic scenes around its end", "4+8, stride 1", "NAVSIM v2's leaderboard",
        "EPDMS v2.2, two stages", Number(0.892, "a"), Number(31, "a"), _NAVHARD,
    ),
    "warmup_two_stage": SplitFacts(
        "a part of navhard_two_stage", "4+8, stride 1", "checking a v2 submission", "EPDMS v2.2, two stages",
        Number(0.027, "a"), Number(1.2, "a"), ("warmup",),
    ),
    "navsafe_two_stage": SplitFacts(
        "a selection of test for safety (NAVSIM's table does not describe it)", "4+16, stride 1",
        "a side benchmark of v2", "EPDMS v2.2, two stages", UNKNOWN, UNKNOWN, ("test logs",),
    ),
    "private_test_hard_two_stage": SplitFacts(
        "scenes without labels or future", "4+8, stride 1", "v2 challenge submission", ON_THE_SERVER,
        Number(0.014, "a"), Number(11, "a"),
        ("private hard",),
    ),
    "private_test_e2e": SplitFacts(
        "scenes without labels or future", "4+0, apart", "v1 challenge submission", ON_THE_SERVER,
        Number(0.00416, "d"), Number(25, "a"),
        ("private e2e logs", "private e2e sensors"),
    ),
    "warmup_test_e2e": SplitFacts(
        "a selection of mini", "4+10, apart", "checking a v1 submission", ON_THE_SERVER, Number(1, "a"),
        Number(151, "a"), _MINI,
    ),
}  # fmt: skip


def published(name: str) -> PublishedSplit:
    """Counts of a published split; KeyError for any other name."""
    return PUBLISHED_SPLITS[name]

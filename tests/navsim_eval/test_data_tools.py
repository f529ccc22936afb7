"""What tools/data.py says about whole data, broken data, and data that is not there yet."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import sqlite3
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from navsim_eval.config import DataConfig
from navsim_eval.data_tools import checksums, figure, plan
from navsim_eval.data_tools.config import DataToolConfig
from navsim_eval.data_tools.published import ARCHIVES, FACTS, SOURCES
from navsim_eval.data_tools.statistics import QUANTITIES, measure_scene, split_statistics
from navsim_eval.data_tools.verify import ERROR, OK, WARNING, Check, listed_files, verify
from navsim_eval.dataset import SceneDataset
from navsim_eval.errors import DataError, UserError
from navsim_eval.formats.logs import read_log_dicts
from navsim_eval.formats.splits import PUBLISHED_SPLITS
from navsim_eval.scene import Scene
from tests.worlds import LOCATION, MAP_VERSION, World, drive, write_world


@contextmanager
def bar(title: str, total: int):
    yield lambda number: None


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> World:
    return write_world(tmp_path_factory.mktemp("whole"), {"train": 2}, num_frames=16)


@pytest.fixture
def world(whole: World, tmp_path: Path) -> World:
    """A copy that a test may damage."""
    shutil.copytree(whole.root, tmp_path / "copy")
    return World(tmp_path / "copy", whole.logs)


def config_of(world: World, **keys) -> DataToolConfig:
    return DataToolConfig(do="verify", data=world.data, split="train", workers=1, **keys)


def checks_of(world: World, **keys) -> dict[str, Check]:
    return {check.subject: check for check in verify(config_of(world, **keys), bar)}


# --- plan ------------------------------------------------------------------------------------------------------------


def test_every_published_split_has_facts_and_every_number_a_source() -> None:
    assert set(FACTS) == set(PUBLISHED_SPLITS)
    for one in plan.plan("", DataConfig(root="nowhere")):
        numbers = [one.logs, one.scenes, one.second_stage, one.logs_gb, one.sensors_gb, one.sensor_files]
        for number in (*numbers, *one.caches_gb.values()):
            assert (number.value is None) == (number.source == ""), one.name
            assert number.source in ("", *SOURCES)
        assert set(one.archives) <= set(ARCHIVES)
    assert all(group.gb.source in ("", *SOURCES) for group in ARCHIVES.values())


def test_the_plan_of_navtrain_states_the_published_counts() -> None:
    one = plan.plan_split("navtrain", DataConfig(root="nowhere"))
    assert (one.logs.value, one.scenes.value, one.folder) == (1192, 103288, "trainval")
    assert one.sensor_files.value == 4 * 103288 and plan.needed_gb(one) == 459
    assert plan.needed_gb(plan.plan_split("navsafe_two_stage", DataConfig(root="nowhere"))) is None


def test_an_unpublished_split_has_no_plan() -> None:
    with pytest.raises(UserError, match=r"'mine' is not published.*navtrain"):
        plan.plan("mine", DataConfig(root="nowhere"))


# --- verify ----------------------------------------------------------------------------------------------------------


def test_whole_data_is_found_whole(whole: World) -> None:
    checks = checks_of(whole)
    assert {check.state for check in checks.values()} == {OK}
    assert checks["images"].found == "18 readable" and checks["point clouds"].expected == "6"
    assert checks["logs"].found == "2 readable" and f"map {LOCATION}" in checks


def test_history_and_all_cameras_ask_for_more(whole: World) -> None:
    checks = checks_of(whole, frames="history", cameras=["all"], read=False)
    assert checks["images"].expected == str(2 * 6 * 8)  # two logs, six frames, eight cameras of which three are there
    assert checks["images"].found == f"{2 * 6 * 3} there" and checks["images"].wrong == 2 * 6 * 5


def test_every_damage_is_named(world: World) -> None:
    images = [path for path in world.sensor_files("train") if "CAM_F0" in str(path)]
    images[3].unlink()
    images[4].write_bytes(images[4].read_bytes()[:-300])
    cloud = next(path for path in world.sensor_files("train") if path.stem == images[5].stem and path.suffix == ".pcd")
    cloud.write_bytes(b"")
    log = world.log_file("train", 1)
    log.write_bytes(log.read_bytes()[:2000])
    with sqlite3.connect(world.root / "maps" / LOCATION / MAP_VERSION / "map.gpkg") as connection:
        for layer in ("walkways", "intersections"):
            connection.execute(f"DELETE FROM gpkg_contents WHERE table_name = '{layer}'")
            connection.execute(f"DELETE FROM gpkg_geometry_columns WHERE table_name = '{layer}'")
    checks = checks_of(world)
    assert checks["images"].state == ERROR and checks["images"].wrong == 2
    assert any(images[3].name in problem and "not there" in problem for problem in checks["images"].problems)
    assert any(images[4].name in problem and "truncated" in problem for problem in checks["images"].problems)
    assert cloud.name in checks["point clouds"].problems[0] and "empty" in checks["point clouds"].problems[0]
    assert checks["logs"].state == ERROR and log.name in checks["logs"].problems[0]
    problems = checks[f"map {LOCATION}"].problems
    assert checks[f"map {LOCATION}"].state == ERROR and len(problems) == 2
    assert "intersections" in problems[0] and "walkways" in problems[1] and "training target" in problems[1]
    # Without reading, a truncated picture passes and an empty file does not.
    looked = checks_of(world, read=False)
    assert looked["images"].wrong == 1 and looked["point clouds"].wrong == 1


def test_a_layer_that_only_training_reads_is_a_warning(world: World) -> None:
    with sqlite3.connect(world.root / "maps" / LOCATION / MAP_VERSION / "map.gpkg") as connection:
        connection.execute("DELETE FROM gpkg_contents WHERE table_name = 'walkways'")
    assert checks_of(world)[f"map {LOCATION}"].state == WARNING


def test_a_missing_map_and_a_log_that_the_city_should_have(world: World) -> None:
    shutil.rmtree(world.root / "maps")
    logs = {
        name: {"scenes": 3, "sha256": ""} for name in (*world.logs["train"], "2021.01.01.00.00.09_veh-00_00000_00100")
    }
    logs[world.logs["train"][0]]["sha256"] = "0" * 64
    (world.root / "city.json").write_text(json.dumps({"splits": {"train": {"logs": logs}}}))
    checks = checks_of(world)
    assert checks[f"map {LOCATION}"].state == ERROR and "no map for location" in checks[f"map {LOCATION}"].problems[0]
    missing, changed = checks["logs"].problems
    assert missing == "2021.01.01.00.00.09_veh-00_00000_00100.pkl is not there"
    assert changed == f"{world.logs['train'][0]}.pkl is not the log that the city wrote"
    assert checks["scenes"].expected == "9" and checks["scenes"].wrong == 1


def test_no_readable_log_is_a_finding_not_a_crash(world: World) -> None:
    for index in range(2):
        world.log_file("train", index).write_bytes(b"\x80\x05")
    (check,) = verify(config_of(world), bar)
    assert check.state == ERROR and "none of 2 logs can be read" in check.problems[0]


def test_an_unknown_split_is_refused(whole: World) -> None:
    with pytest.raises(UserError, match="split 'nowhere' is unknown"):
        verify(DataToolConfig(do="verify", data=whole.data, split="nowhere"), bar)


# --- checksums -------------------------------------------------------------------------------------------------------


def test_a_list_of_checksums_finds_what_changed(world: World) -> None:
    config = config_of(world)
    target = checksums.default_list(world.root, "train")
    files = listed_files(config)
    count = checksums.write_checksums(target, world.root, files, 1, bar)
    assert count == len(files) == 2 + 18 + 6 + 1  # logs, images, clouds, map
    first = target.read_text().splitlines()[0]
    digest, name = first.split("  ")
    assert hashlib.sha256((world.root / name).read_bytes()).hexdigest() == digest
    assert checks_of(world)["checksums"].state == OK

    image = next(path for path in files if path.suffix == ".jpg")
    content = bytearray(image.read_bytes())
    content[-10] ^= 1  # decodes as before
    image.write_bytes(content)
    check = checks_of(world)["checksums"]
    assert check.wrong == 1 and image.name in check.problems[0]


def test_an_interrupted_list_goes_on_where_it_stopped(world: World) -> None:
    files, target = listed_files(config_of(world)), world.root / "sums"
    checksums.write_checksums(target, world.root, files, 1, bar)
    lines = target.read_text().splitlines(keepends=True)
    kept = "0" * 64 + lines[0][64:]  # a mark that this line is not computed again
    target.with_name("sums.part").write_text(kept + lines[1] + lines[2][:30])
    checksums.write_checksums(target, world.root, files, 1, bar)
    assert target.read_text() == kept + "".join(lines[1:]) and not target.with_name("sums.part").exists()


def test_a_damaged_list_and_files_outside_the_root_are_refused(world: World, tmp_path: Path) -> None:
    bad = tmp_path / "list"
    bad.write_text("abc  file\n")
    with pytest.raises(DataError, match="line 1 is not"):
        checks_of(world, checksums=str(bad))
    with pytest.raises(UserError, match="not below"):
        checksums.write_checksums(bad, world.root / "maps", [world.log_file("train")], 1, bar)


def test_archives_are_compared_with_the_published_sums(world: World, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds none of navtrain_current_1"):
        checks_of(world, archives=str(tmp_path))
    (tmp_path / "navtrain_current_2.tgz").write_bytes(b"half a download")
    check = checks_of(world, archives=str(tmp_path))["archives"]
    assert check.state == ERROR and "navtrain_current_2.tgz" in check.problems[0]


# --- statistics ------------------------------------------------------------------------------------------------------


def test_statistics_are_those_of_the_drive(whole: World, tmp_path: Path) -> None:
    scenes = SceneDataset.from_config(whole.data, "train")
    result = split_statistics(scenes, 1, bar)
    assert result.scenes == 6 and result.logs == 2 and not result.skipped
    np.testing.assert_allclose(result.values["speed"], [8, 8, 8, 8.5, 8.5, 8.5])
    np.testing.assert_allclose(result.values["distance"], [32, 32, 32, 34, 34, 34])
    np.testing.assert_allclose(result.values["turn"], 0, atol=1e-9)
    assert result.counts["command"] == {"left": 0, "straight": 6, "right": 0, "unknown": 0}
    assert result.counts["gap"] == {"without": 6} and set(result.values) == set(QUANTITIES)
    summary = result.as_json()["summary"]["speed"]
    assert (summary["count"], summary["p50"], summary["max"]) == (6, 8.25, 8.5)
    path = figure.write_figure(result, tmp_path / "figure.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_curvature_of_a_circle_and_of_standing_still() -> None:
    radius, step = 25.0, 0.16  # 4 m of arc a frame
    frames = drive("log", 14)
    angles = (np.arange(14) - 3) * step
    circle = np.stack([radius * np.sin(angles), radius * (1 - np.cos(angles)), angles], axis=1)
    turning = Scene(tuple(replace(f, ego_pose=pose) for f, pose in zip(frames, circle, strict=True)))
    values = measure_scene(turning)
    chord = 2 * radius * np.sin(step / 2)
    assert values["curvature"] == pytest.approx(step / chord) and values["turn"] == pytest.approx(np.degrees(8 * step))
    still = Scene(tuple(replace(f, ego_pose=np.zeros(3)) for f in frames))
    assert np.isnan(measure_scene(still)["curvature"]) and measure_scene(still)["distance"] == 0


def test_unreadable_scenes_are_left_out_and_named(world: World) -> None:
    path = world.log_file("train")
    frames = read_log_dicts(path)
    del frames[-1]["ego_dynamic_state"]
    path.write_bytes(pickle.dumps(frames))
    result = split_statistics(SceneDataset.from_config(world.data, "train"), 1, bar)
    (reason,) = result.skipped.values()
    assert result.scenes == 5 and "ego_dynamic_state" in reason


@pytest.mark.parametrize(
    ("keys", "fact"),
    [
        ({"do": "dance"}, "do: 'dance' is none of"),
        ({"do": "verify"}, "split: verify needs one"),
        ({"frames": "some"}, "frames: 'some'"),
        ({"cameras": ["CAM_X"]}, "cameras: 'CAM_X'"),
        ({"samples": 0}, "samples"),
    ],
)
def test_impossible_keys_are_refused(keys: dict, fact: str) -> None:
    with pytest.raises(UserError, match=fact):
        DataToolConfig(**keys)

"""Submission files: the devkit's own unpickler gets its classes, ours executes nothing, checks find what is wrong."""

from __future__ import annotations

import pickle
import pickletools
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from navsim_eval.config import DataConfig
from navsim_eval.errors import DataError, UserError
from navsim_eval.formats.splits import SceneFilter, write_scene_filter
from navsim_eval.formats.submission import LAYOUTS, Submission, SubmittedPlan, read_submission, write_submission
from navsim_eval.predictions import Predictions
from navsim_eval.submit import SubmitConfig, check_file, check_submission, submit
from tests.worlds import World, write_world

TEAM = {"team_name": "ours", "authors": "A, B", "email": "a@b.org", "institution": "U", "country": "Germany"}
SPLIT = "somewhere"


def plans(tokens=("t0", "t1", "t2"), seed: int = 0) -> dict[str, SubmittedPlan]:
    rng = np.random.default_rng(seed)
    return {token: SubmittedPlan(rng.uniform(-3, 30, (8, 3)).astype(np.float32) * [1, 1, 0.1]) for token in tokens}


def a_submission(layout: str = "v1", **changes) -> Submission:
    stages = {key: [plans((f"{index}0", f"{index}1"), index)] for index, key in enumerate(LAYOUTS[layout])}
    return Submission(**{"layout": layout, "team": TEAM, "stages": stages, **changes})


# --- the devkit's side -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrajectorySampling:
    """As in nuPlan: frozen, three fields."""

    num_poses: int | None = None
    time_horizon: float | None = None
    interval_length: float | None = None


@dataclass
class Trajectory:
    """As in the devkit."""

    poses: np.ndarray
    trajectory_sampling: TrajectorySampling = TrajectorySampling(8, 4, 0.5)


TrajectorySampling.__module__ = "nuplan.planning.simulation.trajectory.trajectory_sampling"
Trajectory.__module__ = "navsim.common.dataclasses"


@pytest.fixture
def devkit(monkeypatch) -> None:
    """Modules where the devkit keeps these two classes."""
    for item in (TrajectorySampling, Trajectory):
        module = ModuleType(item.__module__)
        setattr(module, item.__name__, item)
        monkeypatch.setitem(sys.modules, item.__module__, module)
        root = item.__module__.split(".")[0]
        monkeypatch.setitem(sys.modules, root, ModuleType(root))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_devkit_reads_its_own_classes(tmp_path, devkit, layout):
    written = a_submission(layout)
    with open(write_submission(tmp_path / "submission.pkl", written), "rb") as file:
        content = pickle.load(file)
    assert content["country / region"] == "Germany" and content["team_name"] == "ours"
    assert list(content)[5:] == list(LAYOUTS[layout])
    for key, seeds in written.stages.items():
        for token, plan in seeds[0].items():
            read = content[key][0][token]
            assert isinstance(read, Trajectory) and read.trajectory_sampling == TrajectorySampling(8, 4.0, 0.5)
            assert read.poses.dtype == np.float32 and read.poses.shape == (8, 3)
            np.testing.assert_array_equal(read.poses, plan.poses.astype(np.float32))


def test_the_file_names_nothing_that_the_devkit_lacks(tmp_path):
    """numpy 1.23 has no `numpy._core`, Python 3.9 no later protocol."""
    path = write_submission(tmp_path / "submission.pkl", a_submission("v2"))
    strings: list[str] = []
    named = set()
    for opcode, argument, _ in pickletools.genops(path.read_bytes()):
        if "UNICODE" in opcode.name:
            strings.append(argument)
        elif opcode.name == "STACK_GLOBAL":
            named.add(tuple(strings[-2:]))
        assert opcode.proto <= 4
    assert {name for _, name in named} == {"Trajectory", "TrajectorySampling", "_reconstruct", "ndarray", "dtype"}
    assert b"numpy.core.multiarray" in path.read_bytes() and b"numpy._core" not in path.read_bytes()


def test_writing_leaves_no_stand_in_module_behind(tmp_path):
    before = {name: sys.modules.get(name) for name in ("navsim.common.dataclasses", "numpy.core.multiarray")}
    write_submission(tmp_path / "submission.pkl", a_submission())
    assert {name: sys.modules.get(name) for name in before} == before
    assert pickle.loads(pickle.dumps(np.arange(3))).tolist() == [0, 1, 2]


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_files_of_the_devkit_are_read(tmp_path, devkit, protocol):
    poses = np.arange(24, dtype=np.float32).reshape(8, 3)
    content = {"team_name": "x", "authors": "y", "email": "z", "institution": "", "country / region": "n",
               "predictions": [{"t": Trajectory(poses)}]}  # fmt: skip
    (tmp_path / "s.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    read = read_submission(tmp_path / "s.pkl")
    np.testing.assert_array_equal(read.stages["predictions"][0]["t"].poses, poses)
    assert read.layout == "v1" and read.team["country"] == "n"


# --- our reader ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip(tmp_path, layout):
    written = a_submission(layout)
    read = read_submission(write_submission(tmp_path / "submission.pkl", written))
    assert read.layout == layout and read.team == TEAM
    for key, seeds in written.stages.items():
        assert list(read.stages[key][0]) == list(seeds[0])
        for token, plan in seeds[0].items():
            np.testing.assert_array_equal(read.stages[key][0][token].poses, plan.poses.astype(np.float32))


def test_equal_submissions_are_equal_files(tmp_path):
    one, two = (write_submission(tmp_path / name, a_submission()).read_bytes() for name in ("a", "b"))
    assert one == two


class _Evil:
    def __reduce__(self) -> Any:
        return print, ("executed",)


@pytest.mark.parametrize(
    "content, complaint",
    [
        ([1, 2], "not a dict"),
        ({"team_name": "x"}, "it needs predictions or first_stage_predictions"),
        ({"predictions": [{}], "first_stage_predictions": [{}]}, "it needs"),
        ({"first_stage_predictions": [{}]}, "second_stage_predictions"),
        ({"predictions": {}}, "not a list of dicts"),
        ({"predictions": [{3: 1}]}, "is not a str"),
        ({"predictions": [{"t": np.zeros((8, 3))}]}, "not a Trajectory"),
        ({"predictions": [{"t": _Evil()}]}, "not allowed"),
    ],
)
def test_what_is_not_a_submission_is_refused(tmp_path, capsys, content, complaint):
    (tmp_path / "s.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(DataError, match=complaint):
        read_submission(tmp_path / "s.pkl")
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "item, complaint",
    [
        (Trajectory([[1, 2, 3]]), "array of floats"),
        (Trajectory(np.arange(24).reshape(8, 3)), "array of floats"),
        (Trajectory(np.zeros((8, 3)), None), "TrajectorySampling"),
        (Trajectory(np.zeros((8, 3)), TrajectorySampling("8", 4, 0.5)), "num_poses"),
    ],
)
def test_odd_trajectories_are_named(tmp_path, devkit, item, complaint):
    (tmp_path / "s.pkl").write_bytes(pickle.dumps({"predictions": [{"token7": item}]}))
    with pytest.raises(DataError, match=complaint) as error:
        read_submission(tmp_path / "s.pkl")
    assert "predictions.token7" in str(error.value)


def test_an_array_of_objects_is_not_even_read(tmp_path, devkit):
    content = {"predictions": [{"token7": Trajectory(np.array([None, 3], object))}]}
    (tmp_path / "s.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(DataError, match="array of Python objects"):
        read_submission(tmp_path / "s.pkl")


@pytest.mark.parametrize("length", [0, 1, 40, 400])
def test_truncated_files_are_refused(tmp_path, length):
    path = write_submission(tmp_path / "s.pkl", a_submission())
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DataError):
        read_submission(path)


# --- checks ----------------------------------------------------------------------------------------------------------


def problems(submission: Submission, expected=None) -> dict[str, str]:
    return {check.what: check.problem for check in check_submission(submission, expected) if check.problem}


def test_a_good_submission_has_no_problem():
    assert not problems(a_submission("v1"), {"predictions": ["00", "01"]})
    expected = {"first_stage_predictions": ["00", "01"], "second_stage_predictions": ["10", "11"]}
    assert not problems(a_submission("v2"), expected)


def test_tokens_are_held_against_the_split():
    found = problems(a_submission(), {"predictions": ["00", "02", "03"]})["predictions: tokens"]
    assert found == "2 missing (first: 02, 03); 1 not in the split (first: 01)"


@pytest.mark.parametrize(
    "plan, what, word",
    [
        (SubmittedPlan(np.zeros((7, 3))), "shape", "another shape"),
        (SubmittedPlan(np.zeros((8, 2))), "shape", "another shape"),
        (SubmittedPlan(np.full((8, 3), np.nan)), "numbers", "NaN"),
        (SubmittedPlan(np.full((8, 3), np.inf)), "numbers", "NaN or infinite"),
        (SubmittedPlan(np.full((8, 3), 90.0)), "units", "2π rad"),
        (SubmittedPlan(np.full((8, 3), 0.0), 8, 4.0, 0.25), "times", "horizon"),
        (SubmittedPlan(np.zeros((4, 3)), 4, 2.0, 0.5), "times", "below 4 s"),
    ],
)
def test_bad_plans_are_counted_and_named(plan, what, word):
    found = problems(a_submission(stages={"predictions": [{**plans(), "bad": plan}]}))
    assert list(found) == [f"predictions: {what}"]
    assert word in found[f"predictions: {what}"] and "1 " in found[f"predictions: {what}"] and "bad" in str(found)


def test_other_samplings_are_fine():
    assert not problems(a_submission(stages={"predictions": [{"t": SubmittedPlan(np.zeros((40, 3)), 40, 4.0, 0.1)}]}))


def test_team_fields():
    assert set(problems(a_submission(team={**TEAM, "authors": " ", "email": "nobody"}))) == {"authors", "email"}
    assert "country / region" in problems(a_submission(team={}))["country"]


def test_several_seeds_are_for_one_stage_only():
    seeds = [plans(), plans(seed=1), plans(seed=2)]
    assert not problems(a_submission(stages={"predictions": seeds}), {"predictions": ["t0", "t1", "t2"]})
    two = dict(zip(LAYOUTS["v2"], (seeds, [plans(("x",))]), strict=True))
    assert "one seed" in problems(a_submission("v2", stages=two))["first_stage_predictions: seeds"]


def test_a_token_in_both_stages_is_noticed():
    two = dict(zip(LAYOUTS["v2"], ([plans()], [plans(("t1",))]), strict=True))
    assert "t1" in problems(a_submission("v2", stages=two))["stages"]


# --- making one ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return write_world(tmp_path_factory.mktemp("world"), {SPLIT: 1}, num_frames=16, sensors=False)


def some_predictions(path, tokens, **manifest) -> str:
    Predictions(np.array(tokens), np.zeros((len(tokens), 8, 3), np.float32), manifest=manifest).save(path)
    return str(path)


def test_from_a_planner_and_checked_against_its_split(world, tmp_path):
    config = SubmitConfig(data=world.data, planner="constant_velocity", split=SPLIT, output_dir=str(tmp_path), **TEAM)
    path = submit(config)
    checks = check_file(SubmitConfig(data=world.data, check=str(path), split=SPLIT))
    assert not [check for check in checks if check.problem]
    assert "3 of 3" in {check.found for check in checks}
    made = read_submission(path).stages["predictions"][0]
    np.testing.assert_allclose([plan.poses[-1, 0] for plan in made.values()], 32.0, rtol=1e-6)


def test_privileged_planners_are_not_submitted(world, tmp_path):
    config = SubmitConfig(data=world.data, planner="pdm_closed", split=SPLIT, output_dir=str(tmp_path), **TEAM)
    with pytest.raises(UserError, match="cannot be submitted"):
        submit(config)


def test_incomplete_predictions_write_nothing(world, tmp_path):
    whole = SubmitConfig(data=world.data, planner="stationary", split=SPLIT, output_dir=str(tmp_path / "a"), **TEAM)
    tokens = list(read_submission(submit(whole)).stages["predictions"][0])
    part = some_predictions(tmp_path / "part.npz", tokens[1:])
    config = SubmitConfig(data=world.data, predictions=part, split=SPLIT, output_dir=str(tmp_path / "b"), **TEAM)
    with pytest.raises(UserError, match=rf"1 missing \(first: {tokens[0]}\); nothing was written"):
        submit(config)
    failed = some_predictions(tmp_path / "failed.npz", tokens, failures={"z": "broken image"})
    with pytest.raises(UserError, match="1 scenes have no plan, first z: broken image"):
        submit(SubmitConfig(predictions=failed, output_dir=str(tmp_path / "b"), **TEAM))
    assert not (tmp_path / "b").exists()


def test_two_stages_and_several_seeds_from_files(tmp_path):
    first, second = (some_predictions(tmp_path / f"{name}.npz", [f"{name}0", f"{name}1"]) for name in "ab")
    two = submit(SubmitConfig(predictions=first, second_stage=second, output_dir=str(tmp_path), **TEAM))
    assert {key: list(seeds[0]) for key, seeds in read_submission(two).stages.items()} == {
        "first_stage_predictions": ["a0", "a1"], "second_stage_predictions": ["b0", "b1"]
    }  # fmt: skip
    three = submit(SubmitConfig(predictions=[first] * 3, output_dir=str(tmp_path), **TEAM))
    assert len(read_submission(three).stages["predictions"]) == 3


def test_second_stage_tokens_come_from_the_published_filter(tmp_path):
    """A split file as the devkit has it, without any log on disk."""
    (tmp_path / "scene_filter").mkdir()
    chosen = SceneFilter(tokens=("a0", "a1"), reactive_synthetic_initial_tokens=("b0", "b2"))
    write_scene_filter(tmp_path / "scene_filter" / "hard.yaml", chosen)
    (tmp_path / "hard.yaml").write_text("defaults:\n  - scene_filter: hard\ndata_split: test\n")
    first, second = (some_predictions(tmp_path / f"{name}.npz", [f"{name}0", f"{name}1"]) for name in "ab")
    path = submit(SubmitConfig(predictions=first, second_stage=second, output_dir=str(tmp_path), **TEAM))
    data = DataConfig(root=str(tmp_path), maps=str(tmp_path), filters=str(tmp_path))
    found = {c.what: c.problem for c in check_file(SubmitConfig(data=data, check=str(path), split="hard"))}
    assert found["first_stage_predictions: tokens"] == ""
    assert found["second_stage_predictions: tokens"] == "1 missing (first: b2); 1 not in the split (first: b1)"


@pytest.mark.parametrize(
    "options, complaint",
    [
        ({}, "one of check="),
        ({"check": "a", "planner": "b"}, "one of check="),
        ({"planner": "human", **TEAM}, "needs split="),
        ({"predictions": "x.npz", **TEAM, "email": "", "authors": ""}, "authors, email"),
    ],
)
def test_configurations_that_cannot_work(options, complaint):
    with pytest.raises(UserError, match=complaint):
        SubmitConfig(**options)

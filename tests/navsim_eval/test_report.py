"""The report: projections a person can check, colours that follow scores, scenes chosen from both ends."""

from __future__ import annotations

import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgba

from navsim_eval.formats.map_store import MapStore
from navsim_eval.predictions import Predictions
from navsim_eval.report import browser, html
from navsim_eval.report.bev import AHEAD, BEHIND, CHOSEN, SCORE_COLORS, SIDE, Drawing, bev_figure
from navsim_eval.report.build import Run
from navsim_eval.report.camera import camera_figure, project
from navsim_eval.report.gallery import choose_scenes, extreme_scenes, failing_rows
from navsim_eval.report.run import focus_run
from navsim_eval.results import FORMATS, Results
from navsim_eval.scene import Camera, Scene
from tests.worlds import drive, write_road_map

FORWARD = np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])  # camera right, down, ahead → ego
SHAPE = (1080, 1920, 3)


def camera(distortion=(0.0, 0.0, 0.0, 0.0, 0.0)) -> Camera:
    intrinsics = np.array([[1545.0, 0.0, 960.0], [0.0, 1545.0, 560.0], [0.0, 0.0, 1.0]])
    return Camera(Path("front.jpg"), FORWARD, np.array([1.6, 0.0, 1.5]), intrinsics, np.asarray(distortion))


def straight(length: float = 32.0, bend: float = 0.0) -> np.ndarray:
    x = np.linspace(0, length, 9)[1:]
    return np.column_stack([x, bend * x, np.full(8, bend)])


def a_drawing(**changes) -> Drawing:
    candidates = np.stack([straight(bend=b) for b in (-0.2, 0.0, 0.2)])
    values = {"candidates": candidates, "values": np.array([0.0, 1.0, 0.5]), "human": straight(30.0)}
    return Drawing(straight(), **{**values, **changes})


# --- camera ----------------------------------------------------------------------------------------------------------


def test_points_project_where_a_pinhole_puts_them():
    points = np.array([[11.6, 0.0, 1.5], [11.6, 0.0, 0.0], [11.6, 2.0, 1.5]])
    expected = np.array([[960.0, 560.0], [960.0, 560.0 + 154.5 * 1.5], [960.0 - 154.5 * 2.0, 560.0]])
    np.testing.assert_allclose(project(camera(), points, SHAPE), expected, atol=1e-9)


def test_points_behind_and_far_outside_are_left_out():
    points = np.array([[0.0, 0.0, 0.0], [-10.0, 0.0, 0.0], [3.0, 30.0, 0.0], [20.0, 0.0, 0.0]])
    assert np.isfinite(project(camera(), points, SHAPE)).all(axis=1).tolist() == [False, False, False, True]


def test_distortion_pulls_towards_the_centre_as_in_real_images():
    point = np.array([[11.6, 4.0, 0.0]])
    plain = project(camera(), point, SHAPE)[0] - [960, 560]
    bent = project(camera([-0.356, 0.173, -0.002, 0.0, -0.052]), point, SHAPE)[0] - [960, 560]
    assert np.linalg.norm(bent) < np.linalg.norm(plain) and np.sign(bent).tolist() == np.sign(plain).tolist()


@pytest.mark.parametrize("chosen", [straight(), np.zeros((8, 3)), straight(-5.0), straight(0.05)])
def test_every_plan_can_be_drawn_into_the_image(chosen):
    image = np.full((108, 192, 3), 120, np.uint8)
    drawing = Drawing(chosen, human=straight())
    figure = camera_figure(image, camera(), drawing, Scene(tuple(drive("log", 14))).current.annotations)
    assert html.webp_of(figure)[8:12] == b"WEBP"


# --- from above ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def road_map(tmp_path_factory):
    root = tmp_path_factory.mktemp("maps")
    write_road_map(root)
    return MapStore(root).get("us-nv-las-vegas-strip")


def test_ego_is_at_the_bottom_looking_up_at_true_scale(road_map):
    figure = bev_figure(Scene(tuple(drive("log", 14))), road_map, a_drawing(), "a title")
    axes = figure.axes[0]
    assert axes.get_aspect() == 1.0 and axes.get_xlim() == (-SIDE, SIDE) and axes.get_ylim() == (-BEHIND, AHEAD)
    chosen = next(line for line in axes.lines if to_rgba(line.get_color()) == to_rgba(CHOSEN))
    np.testing.assert_allclose(chosen.get_xydata()[-1], [0.0, 32.0], atol=1e-9)
    assert "10 m" in [text.get_text() for text in axes.texts]
    assert {"chosen plan", "recorded drive", "route"} <= {t.get_text() for t in axes.get_legend().get_texts()}
    assert html.webp_of(figure)[8:12] == b"WEBP"


def test_modes_are_coloured_by_their_value_and_the_best_lies_on_top(road_map):
    figure = bev_figure(Scene(tuple(drive("log", 14))), road_map, a_drawing())
    modes = next(c for c in figure.axes[0].collections if isinstance(c, LineCollection) and len(c.get_paths()) == 3
                 and c.get_zorder() == 6)  # fmt: skip
    ends = [path.vertices[-1] for path in modes.get_paths()]
    np.testing.assert_allclose(ends, [[6.4, 32.0], [-6.4, 32.0], [0.0, 32.0]], atol=1e-9)  # left is left
    np.testing.assert_allclose(modes.get_colors()[:, :3], SCORE_COLORS([0.0, 0.5, 1.0])[:, :3], atol=1e-6)
    assert len(figure.axes) == 2, "a colour bar explains the colours"


@pytest.mark.parametrize("changes", [{"values": None}, {"candidates": None, "values": None}, {"human": None}])
def test_a_drawing_may_lack_parts(road_map, changes):
    scene = Scene(tuple(drive("log", 14)))
    assert len(bev_figure(scene, road_map, a_drawing(**changes)).axes) == (2 if "human" in changes else 1)


# --- page ------------------------------------------------------------------------------------------------------------


def test_text_is_escaped():
    page = html.page("<script>", [html.table(["<b>"], [["a & b"]]), html.badge("<i>", good=False)])
    assert "<script>" not in page and "<b>" not in page and "a &amp; b" in page and "&lt;i&gt;" in page


def test_histogram_counts_add_up():
    class Titles(HTMLParser):
        found: list[str] = []  # noqa: RUF012

        def handle_data(self, data):
            if " of " in data:
                self.found.append(data)

    values = np.array([0.0, 0.01, 0.5, 1.0, np.nan])
    parser = Titles()
    parser.feed(html.histogram("someone", values))
    counts = [int(text.split(": ")[1].split(" of ")[0]) for text in parser.found]
    assert sum(counts) == 4 and counts[0] == 2 and counts[-1] == 1
    assert html.histogram("nobody", np.array([np.nan])).startswith("<svg")


# --- choice of scenes ------------------------------------------------------------------------------------------------


def a_run(scores: list[float], logs: list[str], lengths: list[float], modes: bool = False, name: str = "x") -> Run:
    tokens = np.array([f"t{i}" for i in range(len(scores))])
    columns = {column: np.array(scores) for column in FORMATS["pdms_v1"].columns}
    plans = np.stack([straight(length) for length in lengths])
    candidates = plans[:, None] if modes else None
    logits = np.zeros((len(plans), 1)) if modes else None
    predictions = Predictions(tokens, plans, candidates, logits, {"log": np.array(logs)})
    return Run(Results("pdms_v1", tokens, columns), {"planner": {"name": name}}, predictions, Path("."))


def test_worst_and_best_come_from_different_logs_and_failed_scenes_are_left_out():
    run = a_run([0.0, 0.0, 0.3, 1.0, np.nan, 1.0], ["a", "a", "b", "c", "d", "d"], [10, 20, 5, 9, 9, 30])
    assert extreme_scenes(run, 2) == [("worst", 1), ("worst", 2), ("best", 5), ("best", 3)]
    assert extreme_scenes(a_run([0.5], ["a"], [3.0]), 3) == [("worst", 0)]
    assert extreme_scenes(a_run([np.nan], ["a"], [3.0]), 3) == []


def test_the_planner_with_modes_is_drawn():
    plain, rich = a_run([1.0], ["a"], [3.0], name="human"), a_run([1.0], ["a"], [3.0], modes=True, name="ours")
    assert focus_run([plain, rich, plain]).planner == "ours"
    assert focus_run([rich, plain]).planner == "ours"
    assert focus_run([plain]).planner == "human"


def test_galleries_hold_scenes_in_which_a_sub_score_fails():
    """Six scenes: 0 collides, 1 leaves the road, 2 does both, 3 is slow, 4 is fine, 5 failed to be scored."""
    run = a_run([0.0, 0.0, 0.0, 0.6, 1.0, np.nan], list("abcdef"), [9, 8, 7, 6, 5, 4])
    for name in ("time_to_collision_within_bound", "comfort", "driving_direction_compliance"):
        run.results.columns[name][:] = 1.0
    run.results.columns["no_at_fault_collisions"][:] = [0.0, 1.0, 0.0, 1.0, 1.0, np.nan]
    run.results.columns["drivable_area_compliance"][:] = [1.0, 0.0, 0.0, 1.0, 1.0, np.nan]
    run.results.columns["ego_progress"][:] = [0.0, 0.0, 0.0, 0.2, 1.0, np.nan]
    failing = failing_rows(run)
    assert failing["no_at_fault_collisions"] == [0, 2], "what fails in nothing else comes first"
    assert failing["drivable_area_compliance"] == [1, 2]
    assert failing["ego_progress"] == [0, 1, 2, 3] and not failing["comfort"]
    chosen = choose_scenes(run, 1)
    assert chosen == {0: ["worst", "NC", "EP"], 4: ["best"], 1: ["DAC", "EP"]}, "a drawn scene serves every gallery"
    assert choose_scenes(run, 10).keys() == {0, 1, 2, 3, 4}


# --- what a reader searches ------------------------------------------------------------------------------------------


def searchable(scores: list[float], name: str = "x") -> Run:
    run = a_run(scores, [f"log {i % 2}" for i in range(len(scores))], [5.0] * len(scores), name=name)
    count = len(scores)
    run.predictions.facts.update(
        map=np.array(["here"] * count), command=np.array(["left", "straight"] * count)[:count],
        speed=np.arange(count) * 3.14159,
    )  # fmt: skip
    return run


def test_data_of_the_page_holds_every_scene_and_marks_what_is_undefined():
    run = searchable([0.0, 1.0, 0.99951, 1e-5, np.nan])
    data = browser.scene_data([run], run)
    assert data["token"] == ["t0", "t1", "t2", "t3", "t4"] and data["logs"] == ["log 0", "log 1"]
    assert data["log"] == [0, 1, 0, 1, 0] and data["speed"][1] == 3.14
    assert data["runs"][0]["columns"][0] == "score"
    assert data["runs"][0]["values"][0] == [0, 1, 0.999, 0.001, None], "only an exact 0 is a 0, only an exact 1 a 1"


def test_large_pages_keep_the_drawn_planner_only(monkeypatch):
    runs = [searchable([0.5] * 4, name="other"), searchable([0.5] * 4, name="ours")]
    assert [run["name"] for run in browser.scene_data(runs, runs[1])["runs"]] == ["other", "ours"]
    monkeypatch.setattr(browser, "_MOST_CELLS", 10)
    data = browser.scene_data(runs, runs[1])
    assert [run["name"] for run in data["runs"]] == ["ours"] and data["focus"] == 0


def test_no_text_of_the_data_can_end_its_block():
    block = browser.data_block({"token": ["</script><script>alert(1)</script>"]})
    assert block.count("</script>") == 1 and block.endswith("</script>")


def test_the_script_filters_opens_and_sorts(tmp_path):
    """In a real browser, where there is one."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs chromium")
    run = searchable([0.0, 1.0, 0.5, 0.25])
    data = browser.scene_data([run], run)
    cards = "".join(f'<article class="scene" id="t{i}" data-galleries="NC"></article>' for i in (0, 1))
    sections = [browser.filter_bar(data, {"NC": ("NC fails", 3)}), f'<div id="gallery">{cards}</div>']
    sections += [browser.scene_table(data), browser.data_block(data)]
    (tmp_path / "report.html").write_text(html.page("test", sections, script=True))

    def dom(fragment: str) -> str:
        command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
                   "--virtual-time-budget=2000", "--dump-dom", f"file://{tmp_path}/report.html#{fragment}"]  # fmt: skip
        return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout

    filtered = dom("command=left&gallery=NC")
    assert "2 of 4 scenes, 1 picture" in filtered and filtered.index(">t0<") < filtered.index(">t2<")
    assert ">t1<" not in filtered.split('id="scenes"')[1].split("</table>")[0]
    opened = dom("t1")
    assert '<article class="scene open" id="t1"' in opened and "4 of 4 scenes, 2 pictures" in opened

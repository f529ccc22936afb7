"""Constants that the network's inputs and outputs are scaled with: recomputed from a split, beside the published ones.

Published (DiffusionDrive's source): trajectories x' = 2 (x + 1.2) / 56.9 - 1, y' = 2 (y + 20) / 46 - 1; headings,
never normalised, have an unused pair 2 (h + 2) / 3.9 - 1; the camera strip is divided by 255 and not standardised,
although the encoder starts from weights trained with ImageNet's mean and deviation; LiDAR counts are clipped at 5;
velocity and acceleration enter in SI units.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from diffusiondrive.feature_cache import RawSamples
from diffusiondrive.features import FeatureConfig
from diffusiondrive.space import SpaceConfig
from navsim_eval.config import DataConfig
from navsim_eval.dataset import SceneDataset
from navsim_eval.errors import DataError, UserError
from navsim_eval.formats.map_store import MapStore
from navsim_eval.scene import Scene

HORIZON = 8
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PUBLISHED_HEADING = (-2.0, 3.9)  # origin and span [rad] of the pair that nothing uses


@dataclass(frozen=True)
class Constant:
    """One row: what it is, the published value ("none" where there is none), what this split gives, a remark."""

    name: str
    published: str
    here: str
    remark: str = ""


def normalisation(
    data: DataConfig,
    split: str,
    samples: int,
    bar: Callable[[str, int], Any],
    features: FeatureConfig | None = None,
    space: SpaceConfig | None = None,
) -> tuple[list[Constant], dict[str, Any]]:
    """Recompute every constant on a split: trajectories from all scenes, pictures from `samples` evenly spread ones.

    Returns rows to show and the same as numbers. Raises UserError when no scene has a future.
    """
    space, features = space or SpaceConfig(), features or FeatureConfig()
    scenes = SceneDataset.from_config(data, split)
    trajectories, status = _collect(scenes, bar)
    rows, numbers = _trajectory_rows(trajectories, space)
    numbers |= {"split": split, "scenes": len(trajectories)}
    for name, column in (("velocity x [m/s]", 0), ("velocity y [m/s]", 1), ("acceleration x [m/s²]", 2)):
        values = status[:, column]
        numbers[name] = {"mean": float(values.mean()), "std": float(values.std())}
        rows.append(Constant(f"status, {name}", "none", f"mean {values.mean():.2f}, std {values.std():.2f}"))
    raw = RawSamples(scenes, MapStore(data.maps, data.map_version), features, labels=False)
    picture_rows, pictures = _picture_rows(raw, samples, bar)
    return rows + picture_rows, numbers | pictures


def _collect(scenes: SceneDataset, bar: Callable[[str, int], Any]) -> tuple[np.ndarray, np.ndarray]:
    """(N, 8, 3) future poses and (N, 4) velocity and acceleration, of the scenes that have a future."""
    poses, status = [], []
    with bar("trajectories", len(scenes)) as update:
        for scene in scenes:
            update(1)
            if len(scene.future) >= HORIZON:
                poses.append(scene.human_trajectory(HORIZON))
                status.append(_status(scene))
    if not poses:
        raise UserError(f"split {scenes.split.name}: no scene has the {HORIZON} future frames that trajectories need")
    return np.array(poses), np.array(status)


def _status(scene: Scene) -> np.ndarray:
    return np.concatenate([scene.current.ego_velocity, scene.current.ego_acceleration])


def _trajectory_rows(poses: np.ndarray, space: SpaceConfig) -> tuple[list[Constant], dict[str, Any]]:
    published = {
        "x": (space.x_origin, space.x_span),
        "y": (space.y_origin, space.y_span),
        "heading": PUBLISHED_HEADING,
    }
    rows, numbers = [], {}
    for column, (name, (origin, span)) in enumerate(published.items()):
        values = poses[..., column]
        low, high = float(values.min()), float(values.max())
        outside = ((values < origin) | (values > origin + span)).any(axis=1)
        unit = "rad" if name == "heading" else "m"
        use = "unused" if name == "heading" else "clipped in the diffused start, never in the final plan"
        numbers[name] = {
            "published": {"origin": origin, "span": span},
            "here": {"origin": low, "span": high - low},
            "scenes_outside": float(outside.mean()),
            "p0.1": float(np.percentile(values, 0.1)),
            "p99.9": float(np.percentile(values, 99.9)),
        }
        remark = f"{100 * outside.mean():.2g} % of the scenes leave the published range ({use})"
        shown = f"{affine(name[0], origin, span)}: {origin:g} … {origin + span:g} {unit}"
        here = f"{affine(name[0], low, high - low)}: {low:.2f} … {high:.2f} {unit}"
        rows.append(Constant(f"trajectory {name}", shown, here, remark))
    return rows, {"trajectory": numbers}


def affine(symbol: str, origin: float, span: float) -> str:
    """The map of [origin, origin + span] onto [-1, 1], as it is written down."""
    return f"2 ({symbol} {'+' if origin <= 0 else '-'} {abs(origin):.3g}) / {span:.3g} - 1"


def _picture_rows(
    raw: RawSamples, samples: int, bar: Callable[[str, int], Any]
) -> tuple[list[Constant], dict[str, Any]]:
    """Camera channels in [0, 1], and how often LiDAR cells reach the clip; sensors that are missing are skipped."""
    chosen = [raw.tokens[i] for i in np.unique(np.linspace(0, len(raw.tokens) - 1, samples).astype(int))]
    means, squares, clipped, filled, skipped = [], [], [], [], {}
    with bar("pictures", len(chosen)) as update:
        for token in chosen:
            update(1)
            try:
                features, _ = raw[token]
            except DataError as error:
                skipped[token] = str(error)
                continue
            image = features["camera_feature"].reshape(3, -1).astype(np.float64) / 255
            means.append(image.mean(axis=1))
            squares.append(np.square(image).mean(axis=1))
            counts = features["lidar_feature"]
            clipped.append((counts == raw.features.lidar_clip).sum())
            filled.append((counts > 0).sum())
    if not means:
        reason = next(iter(skipped.values()), "no scene")
        return [Constant("camera, LiDAR", "", "not measured", reason)], {"pictures": 0, "skipped": skipped}
    mean = np.mean(means, axis=0)
    std = np.sqrt(np.mean(squares, axis=0) - mean**2)
    share = float(np.sum(clipped) / max(np.sum(filled), 1))
    remark = f"{len(means)} scenes" + (f", {len(skipped)} skipped" if skipped else "")
    rows = [
        Constant("camera mean (R, G, B)", f"none (ImageNet {_three(IMAGENET_MEAN)})", _three(mean), remark),
        Constant("camera std (R, G, B)", f"none (ImageNet {_three(IMAGENET_STD)})", _three(std), "divided by 255 only"),
        Constant("LiDAR clip", str(raw.features.lidar_clip), f"{100 * share:.2g} % of the filled cells reach it"),
    ]
    numbers = {
        "pictures": len(means),
        "camera": {"mean": mean.tolist(), "std": std.tolist()},
        "imagenet": {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)},
        "lidar_cells_at_clip": share,
        "skipped": skipped,
    }
    return rows, numbers


def _three(values: Any) -> str:
    return ", ".join(f"{value:.3f}" for value in values)


def constants_table(rows: list[Constant], split: str) -> Table:
    """Published beside recomputed."""
    table = Table(title=f"Normalisation constants, split {split}", title_justify="left")
    for column in ("constant", "published", "this split", "remark"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell) for cell in (row.name, row.published, row.here, row.remark)))
    return table

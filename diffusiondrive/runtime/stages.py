"""One plan, cut at the seams of the planner, with a clock at every cut.

    decode ─ features ─ transfer ─ backbone ─ prepare ─ pass 1 … K ─ select

Times come from CUDA events on a GPU (read after one synchronisation at the end of the frame) and from the wall clock
on a CPU. The stages are the planner's own methods in the planner's own order; a test holds their result against
`planner(features)`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from diffusiondrive.decoder import CascadeDecoder, Denoised, SceneCache
from diffusiondrive.features import CAMERAS, FeatureConfig, camera_feature, lidar_feature, status_feature, to_float
from diffusiondrive.planner import DiffusionDrive, choose
from diffusiondrive.sampler import sample
from navsim_eval.formats.sensors import read_image, read_point_cloud
from navsim_eval.scene import Scene


@dataclass
class StageClock:
    """Marks the ends of stages; `milliseconds` reads them all once the device has finished."""

    device: torch.device
    names: list[str] = field(default_factory=list)
    marks: list[object] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.marks.append(self._mark())

    def stop(self, name: str) -> None:
        """The stage `name` ends here."""
        self.names.append(name)
        self.marks.append(self._mark())

    def milliseconds(self) -> dict[str, float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            spans = [a.elapsed_time(b) for a, b in zip(self.marks, self.marks[1:], strict=False)]
        else:
            spans = [1e3 * (b - a) for a, b in zip(self.marks, self.marks[1:], strict=False)]
        return dict(zip(self.names, spans, strict=True))

    def _mark(self) -> object:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def sensor_stages(scene: Scene, config: FeatureConfig) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Encoded sensor files → float features of a batch of one, and the milliseconds of `decode` and `features`.

    Both run on the CPU: the wall clock is the right one whatever the planner's device.
    """
    clock = StageClock(torch.device("cpu"))
    frame, root = scene.current, scene.sensor_root
    images = [read_image(root / frame.cameras[name].path) for name in CAMERAS]
    cloud = read_point_cloud(root / frame.lidar_path)
    clock.stop("decode")
    compact = {
        "camera_feature": camera_feature(*images, config),
        "lidar_feature": lidar_feature(cloud, config),
        "status_feature": status_feature(frame),
    }
    features = {name: array[None] for name, array in to_float(compact, config).items()}
    clock.stop("features")
    return features, clock.milliseconds()


@torch.inference_mode()
def planner_stages(
    planner: DiffusionDrive, features: Mapping[str, np.ndarray], noise: Tensor, device: torch.device
) -> tuple[Tensor, dict[str, float]]:
    """Float features in host memory → chosen trajectory (B, T, 3) in host memory, and the milliseconds of each stage.

    noise: (B, M, T, 2) on the device.
    """
    clock = StageClock(device)
    inputs = {name: torch.from_numpy(array).to(device, non_blocking=True) for name, array in features.items()}
    clock.stop("transfer")
    context = planner.perceive(inputs)
    clock.stop("backbone")
    cache = planner.decoder.prepare(context, planner.initial.anchors)
    current = planner.initial.start(noise, planner.schedule)
    clock.stop("prepare")
    timed = _TimedDenoiser(planner.decoder, clock)
    denoised = sample(current, timed, cache, planner.schedule, planner.kernel).passes[-1]
    poses, logits = denoised.poses[-1], denoised.logits[-1]
    trajectory = choose(poses, planner.selector.select(poses, logits)).cpu()
    clock.stop("select")
    return trajectory, clock.milliseconds()


class _TimedDenoiser:
    """The planner's decoder, with a mark after every pass (the update between passes counts to the later one)."""

    def __init__(self, decoder: CascadeDecoder, clock: StageClock):
        self.decoder, self.clock, self.space = decoder, clock, decoder.space
        self.passes = 0

    def denoise(self, current: Tensor, label: Tensor, cache: SceneCache) -> Denoised:
        denoised = self.decoder.denoise(current, label, cache)
        self.passes += 1
        self.clock.stop(f"pass {self.passes}")
        return denoised

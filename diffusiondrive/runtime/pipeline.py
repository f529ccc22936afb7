"""From encoded sensors in host memory to a plan in host memory, one frame after another or overlapped.

    planner = SensorPlanner(Runtime.from_pretrained("checkpoints/city_nano"))
    plan = planner.plan(observation)                    # one frame: the latency that counts
    for frame in planner.stream(observations):          # frame n + 1 is decoded while frame n is planned
        ...

The overlap is double buffering: one thread prepares the next frame (on a GPU: on a stream of its own, out of pinned
memory), the caller's thread plans the current one. Order is kept, and a frame that cannot be planned comes out in its
place with its error.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffusiondrive.features import FeatureConfig
from diffusiondrive.noise import scene_noise
from diffusiondrive.planner import Plan
from diffusiondrive.runtime.observation import Observation
from diffusiondrive.runtime.runtime import Runtime
from diffusiondrive.runtime.sensors import SensorConfig, make_sensors
from navsim_eval.errors import UserError


@dataclass(frozen=True)
class PlannedFrame:
    """What became of one observation: a plan, or why there is none."""

    index: int
    token: str
    plan: Plan | None
    error: str | None = None


@dataclass(frozen=True)
class _Prepared:
    """One frame's features on the device; `ready` is the GPU event after which they may be read."""

    token: str
    features: dict[str, Tensor] | None
    error: str | None = None
    ready: torch.cuda.Event | None = None


class SensorPlanner:
    """Sensors in front of a runtime of batch 1."""

    def __init__(self, runtime: Runtime, sensors: SensorConfig | None = None, seed: int | None = None):
        """seed: draw the start noise from (seed, token), as evaluation does; None: the runtime's one fixed draw."""
        if runtime.batch != 1:
            raise UserError(f"batch: {runtime.batch}; observations are planned singly, make the runtime for batch=1")
        self.runtime, self.seed = runtime, seed
        self.feature_config = FeatureConfig.for_planner(runtime.config)
        self.sensors = make_sensors(self.feature_config, sensors or SensorConfig(), runtime.device)

    def plan(self, observation: Observation, noise: Tensor | np.ndarray | None = None) -> Plan:
        """noise: (1, M, T, 2), instead of the planner's own. Raises DataError for a damaged or absent sensor."""
        return self.plan_features(self.prepare(observation), observation.token, noise)

    def prepare(self, observation: Observation) -> dict[str, Tensor]:
        """Features of a batch of one on the device (on a GPU: queued on the current stream)."""
        return self.sensors.features(self.sensors.decode(observation), observation.status)

    def plan_features(self, features: dict[str, Tensor], token: str, noise: Tensor | np.ndarray | None = None) -> Plan:
        """The second half of `plan`."""
        if noise is None and self.seed is not None:
            noise = scene_noise([token], self.seed, self.runtime.noise_shape)
        return self.runtime.plan(features, noise)

    def stream(self, observations: Iterable[Observation]) -> Iterator[PlannedFrame]:
        """One `PlannedFrame` for each observation, in order; `observations` is read by the preparing thread.

        A sensor that is absent or damaged costs its own frame only. Other errors (of the source, of the runtime) end
        the stream.
        """
        source = iter(observations)
        copy_stream = torch.cuda.Stream(self.runtime.device) if self.runtime.device.type == "cuda" else None
        with ThreadPoolExecutor(1, "sensors") as preparer:
            waiting = preparer.submit(self._prepare_next, source, copy_stream)
            index = 0
            while (prepared := waiting.result()) is not None:
                waiting = preparer.submit(self._prepare_next, source, copy_stream)
                yield self._finish(index, prepared)
                index += 1

    def _prepare_next(self, source: Iterator[Observation], copy_stream: torch.cuda.Stream | None) -> _Prepared | None:
        observation = next(source, None)
        if observation is None:
            return None
        with nullcontext() if copy_stream is None else torch.cuda.stream(copy_stream):
            try:
                features = self.prepare(observation)
            except UserError as error:
                return _Prepared(observation.token, None, str(error))
            ready = None if copy_stream is None else copy_stream.record_event()
        return _Prepared(observation.token, features, ready=ready)

    def _finish(self, index: int, prepared: _Prepared) -> PlannedFrame:
        if prepared.features is None:
            return PlannedFrame(index, prepared.token, None, prepared.error)
        if prepared.ready is not None:
            prepared.ready.synchronize()  # normally long past; also right for a backend with streams of its own
        return PlannedFrame(index, prepared.token, self.plan_features(prepared.features, prepared.token))

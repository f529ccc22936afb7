"""The planner as an agent of the NAVSIM devkit, so that the official scripts evaluate, score and submit it.

    agent:
      _target_: diffusiondrive.integrations.navsim_agent.DiffusionDriveAgent
      _convert_: 'all'
      checkpoint_path: checkpoints/diffusiondrive

`DiffusionDriveAgent` is made when it is first asked for, because it derives from the devkit's `AbstractAgent`; this
module can be imported without the devkit. Works with both published interfaces: v1.1's constructor takes only
`requires_scene`, v2's a trajectory sampling first.

The devkit gives an agent no scene token, so the noise of a plan cannot depend on it: every scene gets the planner's
fixed draw, and plans differ slightly from those of tools/evaluate.py, which draws by (seed, token).
"""

from __future__ import annotations

import importlib
import inspect
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusiondrive.features import CAMERAS, FeatureConfig, camera_feature, lidar_feature, to_float
from diffusiondrive.planner import DiffusionDrive
from diffusiondrive.runtime.benchmark import resolve_device
from navsim_eval.errors import DataError, UserError
from navsim_eval.scene import CAMERAS as ALL_CAMERAS
from navsim_eval.scene import FRAME_INTERVAL_S

_AGENT, _DATA = "navsim.agents.abstract_agent", "navsim.common.dataclasses"
_BUILDER = "navsim.planning.training.abstract_feature_target_builder"
_SAMPLING = "nuplan.planning.simulation.trajectory.trajectory_sampling"
_NOW = 3  # index of the current frame among the four that the devkit loads


def features_from_input(agent_input: Any, config: FeatureConfig, lidar: bool = True) -> dict[str, np.ndarray]:
    """Model input (see `build_features`) from the devkit's `AgentInput`: its last frame is the current one.

    lidar: off, the point cloud is not read (camera-only planners).
    Raises DataError for a sensor that was not loaded.
    """
    cameras, status = agent_input.cameras[-1], agent_input.ego_statuses[-1]
    images = [getattr(cameras, name.lower()).image for name in CAMERAS]
    cloud = agent_input.lidars[-1].lidar_pc
    loaded = dict(zip(CAMERAS, images, strict=True)) | ({"lidar_pc": cloud} if lidar else {})
    for name, value in loaded.items():
        if value is None:
            raise DataError("AgentInput", "not loaded", field=name.lower(), remedy="keep the agent's sensor config")
    motion = (status.driving_command, status.ego_velocity, status.ego_acceleration)
    compact = {
        "camera_feature": camera_feature(*images, config),
        **({"lidar_feature": lidar_feature(cloud, config)} if lidar else {}),
        "status_feature": np.concatenate([np.asarray(part, np.float64) for part in motion]).astype(np.float32),
    }
    return to_float(compact, config)


@cache
def _agent_class() -> type:
    """`DiffusionDriveAgent`, derived from the devkit's classes. Raises UserError without the devkit."""
    devkit = {name: _devkit_module(name) for name in (_AGENT, _DATA, _BUILDER, _SAMPLING)}
    base, builder = devkit[_AGENT].AbstractAgent, devkit[_BUILDER].AbstractFeatureBuilder

    class FeatureBuilder(builder):
        """The devkit's way to ask for features."""

        def __init__(self, config: FeatureConfig, lidar: bool):
            self.config, self.lidar = config, lidar

        def get_unique_name(self) -> str:
            return "diffusiondrive_feature"

        def compute_features(self, agent_input: Any) -> dict[str, Tensor]:
            features = features_from_input(agent_input, self.config, self.lidar)
            return {name: torch.from_numpy(value) for name, value in features.items()}

    class DiffusionDriveAgent(base):
        """A trained planner under the devkit's interface.

        checkpoint_path: folder or .safetensors file, as `DiffusionDrive.from_pretrained` takes it
        trajectory_sampling: what the devkit's configuration says; has to be the planner's (8 poses, 0.5 s apart)
        device: auto, cpu, cuda
        """

        def __init__(self, checkpoint_path: str, trajectory_sampling: Any = None, device: str = "auto"):
            sampling = trajectory_sampling
            if sampling is None:
                sampling = devkit[_SAMPLING].TrajectorySampling(time_horizon=4, interval_length=FRAME_INTERVAL_S)
            takes_sampling = "trajectory_sampling" in inspect.signature(base.__init__).parameters
            super().__init__(**({"trajectory_sampling": sampling} if takes_sampling else {}), requires_scene=False)
            self._checkpoint_path, self._device, self._sampling = checkpoint_path, device, sampling
            self._planner: DiffusionDrive | None = None

        def name(self) -> str:
            return "DiffusionDriveAgent"

        def initialize(self) -> None:
            """Load the weights; the devkit calls this once in every worker."""
            planner = DiffusionDrive.from_pretrained(self._checkpoint_path)
            times = self._sampling.num_poses, self._sampling.interval_length
            if times != (planner.config.poses, FRAME_INTERVAL_S):
                raise UserError(
                    f"trajectory_sampling: {times[0]} poses every {times[1]:g} s, but the planner in "
                    f"{self._checkpoint_path} plans {planner.config.poses} every {FRAME_INTERVAL_S:g} s"
                )
            self._planner = planner.to(resolve_device(self._device))

        def get_sensor_config(self) -> Any:
            used = {name.lower(): [_NOW] if name in CAMERAS else False for name in ALL_CAMERAS}
            lidar = self._planner is None or self._planner.config.backbone.lidar
            return devkit[_DATA].SensorConfig(**used, lidar_pc=[_NOW] if lidar else False)

        def get_feature_builders(self) -> list[Any]:
            config = self._loaded().config
            return [FeatureBuilder(FeatureConfig.for_planner(config), config.backbone.lidar)]

        def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
            """Features of B scenes → `trajectory` (B, 8, 3) float32 on the CPU, where the devkit reads it."""
            planner = self._loaded()
            device = planner.default_noise.device
            plan = planner({name: value.to(device) for name, value in features.items()}, auxiliary=False)
            return {"trajectory": plan.trajectory.float().cpu()}

        def _loaded(self) -> DiffusionDrive:
            if self._planner is None:
                raise UserError("the agent has no weights yet: call initialize() first")
            return self._planner

    for made in (FeatureBuilder, DiffusionDriveAgent):  # as if written at the top of this module: workers pickle agents
        made.__qualname__ = made.__name__
    globals()["FeatureBuilder"] = FeatureBuilder
    return DiffusionDriveAgent


def _devkit_module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"the NAVSIM devkit cannot be imported here ({error}); DiffusionDriveAgent runs inside an environment that "
            "has it (docs/interop.md)"
        ) from error


def __getattr__(name: str) -> Any:
    if name == "DiffusionDriveAgent":
        return _agent_class()
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")

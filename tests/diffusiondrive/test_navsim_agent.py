"""The devkit's agent: against a small double of its published interfaces, and against the devkit where it is there."""

from __future__ import annotations

import inspect
import pickle
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from torch import nn

from diffusiondrive.features import FeatureConfig, build_features
from diffusiondrive.integrations import navsim_agent
from diffusiondrive.planner import DiffusionDrive
from diffusiondrive.variants import tiny
from navsim_eval.dataset import SceneDataset
from navsim_eval.errors import UserError
from navsim_eval.formats.sensors import read_image, read_point_cloud
from tests.diffusiondrive.test_baselines import tiny_ltf
from tests.worlds import write_world

AGENT = "diffusiondrive.integrations.navsim_agent.DiffusionDriveAgent"


# --- a double of the devkit: names, signatures and what the base class does ------------------------------------------


@dataclass(frozen=True)
class TrajectorySampling:
    num_poses: int | None = None
    time_horizon: float | None = None
    interval_length: float | None = None

    def __post_init__(self) -> None:
        if self.num_poses is None:
            object.__setattr__(self, "num_poses", round(self.time_horizon / self.interval_length))


@dataclass
class Trajectory:
    poses: np.ndarray
    trajectory_sampling: TrajectorySampling = TrajectorySampling(time_horizon=4, interval_length=0.5)

    def __post_init__(self) -> None:
        assert self.poses.shape == (self.trajectory_sampling.num_poses, 3)


@dataclass
class SensorConfig:
    cam_f0: bool | list[int]
    cam_l0: bool | list[int]
    cam_l1: bool | list[int]
    cam_l2: bool | list[int]
    cam_r0: bool | list[int]
    cam_r1: bool | list[int]
    cam_r2: bool | list[int]
    cam_b0: bool | list[int]
    lidar_pc: bool | list[int]


class AbstractFeatureBuilder:
    @abstractmethod
    def get_unique_name(self) -> str: ...

    @abstractmethod
    def compute_features(self, agent_input: Any) -> dict[str, torch.Tensor]: ...


class _Base(nn.Module, ABC):
    """What both generations of AbstractAgent share."""

    sampling: TrajectorySampling | None = None

    @abstractmethod
    def name(self) -> str: ...

    @abstractmethod
    def get_sensor_config(self) -> SensorConfig: ...

    @abstractmethod
    def initialize(self) -> None: ...

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    def get_feature_builders(self) -> list[AbstractFeatureBuilder]:
        raise NotImplementedError

    def compute_trajectory(self, agent_input: Any) -> Trajectory:
        self.eval()
        features: dict[str, torch.Tensor] = {}
        for builder in self.get_feature_builders():
            features.update(builder.compute_features(agent_input))
        features = {name: value.unsqueeze(0) for name, value in features.items()}
        with torch.no_grad():
            poses = self.forward(features)["trajectory"].squeeze(0).numpy()
        return Trajectory(poses, self.sampling) if self.sampling else Trajectory(poses)


class AgentV1(_Base):
    def __init__(self, requires_scene: bool = False):
        super().__init__()
        self.requires_scene = requires_scene


class AgentV2(_Base):
    def __init__(self, trajectory_sampling: TrajectorySampling, requires_scene: bool = False):
        super().__init__()
        self.requires_scene = requires_scene
        self._trajectory_sampling = self.sampling = trajectory_sampling


@dataclass
class AgentInput:
    ego_statuses: list
    cameras: list
    lidars: list


class Bag:
    """Attributes by name."""

    def __init__(self, **values: Any):
        self.__dict__.update(values)


def agent_input(scene) -> AgentInput:
    """What the devkit's loader gives for a scene under the agent's sensor config: only the current frame's sensors."""
    status, cameras, lidars = [], [], []
    for frame in scene.history:
        status.append(
            Bag(ego_velocity=frame.ego_velocity.astype(np.float32), driving_command=frame.driving_command,
                ego_acceleration=frame.ego_acceleration.astype(np.float32))
        )  # fmt: skip
        now = frame is scene.current
        used = {"CAM_F0", "CAM_L0", "CAM_R0"} if now else set()
        images = {
            name: read_image(scene.sensor_root / camera.path) if name in used else None
            for name, camera in frame.cameras.items()
        }
        cameras.append(Bag(**{name.lower(): Bag(image=image) for name, image in images.items()}))
        lidars.append(Bag(lidar_pc=read_point_cloud(scene.sensor_root / frame.lidar_path) if now else None))
    return AgentInput(status, cameras, lidars)


@pytest.fixture(params=[AgentV1, AgentV2], ids=["v1.1", "v2"])
def devkit(request, monkeypatch):
    """The double's modules in place of the devkit; the agent class is made anew from them."""
    contents = {
        "navsim.agents.abstract_agent": {"AbstractAgent": request.param},
        "navsim.common.dataclasses": {"SensorConfig": SensorConfig, "Trajectory": Trajectory},
        "navsim.planning.training.abstract_feature_target_builder": {"AbstractFeatureBuilder": AbstractFeatureBuilder},
        "nuplan.planning.simulation.trajectory.trajectory_sampling": {"TrajectorySampling": TrajectorySampling},
    }
    for name, members in contents.items():
        parts = name.split(".")
        for end in range(1, len(parts)):
            monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(".".join(parts[:end])))
        module = ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
    navsim_agent._agent_class.cache_clear()
    yield request.param
    navsim_agent._agent_class.cache_clear()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    config = tiny()
    torch.manual_seed(0)
    ahead = torch.linspace(2, 12, config.modes)[:, None] * torch.arange(1, 9) / 2
    anchors = torch.stack([ahead, torch.zeros_like(ahead)], dim=-1)
    return str(DiffusionDrive(config, anchors).save_pretrained(tmp_path_factory.mktemp("weights") / "planner"))


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    world = write_world(tmp_path_factory.mktemp("world"), {"somewhere": 1}, num_frames=14)
    return SceneDataset.from_config(world.data, "somewhere")[0]


def test_the_devkit_instantiates_and_runs_it(devkit, checkpoint, scene):
    agent = instantiate({"_target_": AGENT, "_convert_": "all", "checkpoint_path": checkpoint, "device": "cpu"})
    assert isinstance(agent, devkit) and agent.requires_scene is False and agent.name() == "DiffusionDriveAgent"
    agent.initialize()
    trajectory = agent.compute_trajectory(agent_input(scene))
    assert trajectory.poses.dtype == np.float32 and trajectory.trajectory_sampling.num_poses == 8

    planner = DiffusionDrive.from_pretrained(checkpoint)
    features = build_features(scene, FeatureConfig.for_planner(planner.config))
    with torch.inference_mode():
        plan = planner({name: torch.from_numpy(value)[None] for name, value in features.items()})
    np.testing.assert_allclose(trajectory.poses, plan.trajectory[0].numpy(), atol=1e-5)


def test_features_are_those_of_our_own_reader_bit_for_bit(devkit, checkpoint, scene):
    agent = navsim_agent.DiffusionDriveAgent(checkpoint, device="cpu")
    agent.initialize()
    (builder,) = agent.get_feature_builders()
    assert isinstance(builder, AbstractFeatureBuilder) and builder.get_unique_name()
    found = builder.compute_features(agent_input(scene))
    for name, value in build_features(scene, builder.config).items():
        np.testing.assert_array_equal(found[name].numpy(), value)


def test_only_three_cameras_and_the_sweep_of_the_current_frame_are_loaded(devkit, checkpoint):
    wanted = navsim_agent.DiffusionDriveAgent(checkpoint).get_sensor_config()
    assert [item.name for item in fields(wanted) if getattr(wanted, item.name)] == [
        "cam_f0", "cam_l0", "cam_r0", "lidar_pc"
    ]  # fmt: skip
    assert wanted.cam_f0 == wanted.lidar_pc == [3]


def test_camera_only_planner_asks_for_no_sweep(devkit, scene, tmp_path):
    agent = navsim_agent.DiffusionDriveAgent(str(DiffusionDrive(tiny_ltf()).save_pretrained(tmp_path / "camera")))
    agent.initialize()
    assert agent.get_sensor_config().lidar_pc is False
    seen = agent_input(scene)
    seen.lidars[-1].lidar_pc = None
    assert agent.compute_trajectory(seen).poses.shape == (8, 3)


def test_signatures_are_the_published_ones(devkit, checkpoint):
    agent_class = navsim_agent.DiffusionDriveAgent
    for name in ("name", "get_sensor_config", "initialize", "forward", "get_feature_builders", "compute_trajectory"):
        ours, theirs = (inspect.signature(getattr(c, name)).parameters for c in (agent_class, devkit))
        assert list(ours) == list(theirs), name


def test_workers_can_pickle_it(devkit, checkpoint):
    agent = navsim_agent.DiffusionDriveAgent(checkpoint, device="cpu")
    again = pickle.loads(pickle.dumps(agent))
    assert type(again) is type(agent)
    agent.initialize()
    builder = pickle.loads(pickle.dumps(agent.get_feature_builders()[0]))
    assert builder.config == agent.get_feature_builders()[0].config


def test_mistakes_are_told(devkit, checkpoint, scene):
    agent = navsim_agent.DiffusionDriveAgent(checkpoint, device="cpu")
    with pytest.raises(UserError, match="initialize"):
        agent.compute_trajectory(agent_input(scene))
    other = navsim_agent.DiffusionDriveAgent(checkpoint, TrajectorySampling(40, 4, 0.1))
    with pytest.raises(UserError, match=r"40 poses every 0\.1 s.*plans 8 every 0\.5 s"):
        other.initialize()
    agent.initialize()
    blind = agent_input(scene)
    blind.cameras[-1].cam_l0.image = None
    with pytest.raises(UserError, match="cam_l0"):
        agent.compute_trajectory(blind)


def test_without_the_devkit_the_module_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "navsim", None)  # as if it were not installed
    navsim_agent._agent_class.cache_clear()
    with pytest.raises(UserError, match="the NAVSIM devkit cannot be imported here"):
        _ = navsim_agent.DiffusionDriveAgent
    with pytest.raises(AttributeError, match="no attribute 'Agent'"):
        _ = navsim_agent.Agent


def test_with_the_real_devkit(checkpoint):
    """Runs only where navsim and nuplan are installed."""
    try:
        from navsim.agents.abstract_agent import AbstractAgent
        from navsim.common.dataclasses import SensorConfig as RealSensorConfig
    except ImportError as error:
        pytest.skip(f"the NAVSIM devkit is not importable here ({error})")
    agent = navsim_agent.DiffusionDriveAgent(checkpoint, device="cpu")
    assert isinstance(agent, AbstractAgent) and isinstance(agent.get_sensor_config(), RealSensorConfig)
    agent.initialize()
    config = agent.get_feature_builders()[0].config
    sizes = {
        "camera_feature": (1, 3, config.camera_height, config.camera_width),
        "lidar_feature": (1, 1, config.lidar_cells, config.lidar_cells),
        "status_feature": (1, 8),
    }
    plans = agent.forward({name: torch.zeros(size) for name, size in sizes.items()})
    assert plans["trajectory"].shape == (1, 8, 3)

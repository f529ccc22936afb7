"""DiffusionDrive, assembled: features of a scene in, a plan out.

    features ─ Perception ─ SceneContext ┬─ CascadeDecoder.prepare ─┐
                                         │    AnchorNoise.start ─ sample (K passes) ─ proposals ─ LogitSelector ─ plan
                                         └─ AgentHead, SemanticHead (auxiliary)

The planners that it is compared with are the same assembly with another denoiser and another start (docs/baselines.md):

    diffusiondrive     anchors + noise, cascade decoder, 2 passes         truncated_unet   the same with a U-Net
    diffusion_policy   pure noise, U-Net, 20 passes, first sample         transfuser, ltf  regression, 1 pass

Source: DiffusionDrive (arXiv 2411.15139). Frame of everything in and out: ego rear axle at the current time, x forward,
y left, heading counter-clockwise; poses at 0.5, 1.0, … s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from diffusiondrive.backbone import BackboneConfig, FusionBackbone
from diffusiondrive.baselines.regression import RegressionConfig, RegressionHead
from diffusiondrive.baselines.unet import UNetConfig, UNetDenoiser
from diffusiondrive.decoder import CascadeDecoder, DecoderConfig
from diffusiondrive.encoders import load_image_weights
from diffusiondrive.noise import scene_noise
from diffusiondrive.perception import AgentHead, Agents, Perception, PerceptionConfig, SceneContext, SemanticHead
from diffusiondrive.sampler import DDIM, AnchorNoise, Chain, FirstSample, LogitSelector, PureNoise, sample
from diffusiondrive.schedule import Schedule, ScheduleConfig
from diffusiondrive.space import SpaceConfig, TrajectorySpace
from navsim_eval.errors import UserError

DEFAULT_NOISE_TOKEN, DEFAULT_NOISE_SEED = "default", 0
CASCADE, UNET, REGRESSION = "cascade", "unet", "regression"
DENOISERS = (CASCADE, UNET, REGRESSION)


@dataclass
class PlannerConfig:
    """One planner, described completely; the defaults are the published DiffusionDrive.

    name: for people and files
    width: channels of tokens, queries and planning map (D)
    modes: candidate trajectories (M): one an anchor, or so many samples where there are no anchors
    poses: of each trajectory at 2 Hz (T); the horizon is poses / 2 seconds
    denoiser: `cascade` (published, sizes in `decoder`), `unet` (sizes in `unet`) or `regression` (TransFuser's head:
        one mode, no diffusion, sizes in `regression`). Only the sizes of the chosen one matter
    """

    name: str = "diffusiondrive"
    width: int = 256
    modes: int = 20
    poses: int = 8
    denoiser: str = CASCADE
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    perception: PerceptionConfig = field(default_factory=PerceptionConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    regression: RegressionConfig = field(default_factory=RegressionConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    space: SpaceConfig = field(default_factory=SpaceConfig)

    @property
    def anchored(self) -> bool:
        """Whether each mode belongs to an anchor; if not, modes are interchangeable samples without a preference."""
        return self.denoiser != REGRESSION and self.schedule.truncated

    def __post_init__(self) -> None:
        if self.denoiser not in DENOISERS:
            raise UserError(f"denoiser: '{self.denoiser}' is none of {', '.join(DENOISERS)}")
        if self.denoiser == CASCADE and not self.schedule.truncated:
            raise UserError("denoiser=cascade decodes noised anchors; schedule.preset=full has none: use denoiser=unet")
        if self.denoiser == REGRESSION and (self.modes, self.schedule.steps) != (1, 1):
            raise UserError(
                f"denoiser=regression makes one trajectory in one pass; modes is {self.modes} and schedule.steps "
                f"{self.schedule.steps}: set both to 1"
            )
        for name, heads in (("perception.heads", self.perception.heads), ("decoder.heads", self.decoder.heads)):
            if self.width % heads:
                raise UserError(f"{name}: {heads} heads do not divide width {self.width}")
        if self.width < 4 or self.width % 2:
            raise UserError(f"width: {self.width} must be even and at least 4 (time embedding: sines and cosines)")
        if min(self.modes, self.poses) < 1:
            raise UserError(f"modes ({self.modes}) and poses ({self.poses}) must be positive")


@dataclass(frozen=True)
class Plan:
    """What the planner proposes and what it chose, for B scenes.

    trajectory: (B, T, 3)      the chosen mode: x, y [m], heading [rad]
    candidates: (B, M, T, 3)   all modes
    logits:     (B, M)         of being the human's mode
    mode:       (B,) int64     index of the chosen one
    agents, bev_semantic_map:  auxiliary predictions (logits (B, classes, rows, columns)), or None when skipped
    """

    trajectory: Tensor
    candidates: Tensor
    logits: Tensor
    mode: Tensor
    agents: Agents | None = None
    bev_semantic_map: Tensor | None = None


@dataclass(frozen=True)
class TrainingOutputs:
    """What the loss reads.

    poses:   per cascade layer (B, M, T, 3); logits: per cascade layer (B, M)
    anchors: (M, T, 2) clean anchors [m], by which the human plan is assigned to a mode; None: every mode is to be it
    points:  (B, M, T, 2) noised trajectories after the clamp [m]
    visible_deg: targets further than this off the heading [degrees] are no agents
    """

    poses: tuple[Tensor, ...]
    logits: tuple[Tensor, ...]
    anchors: Tensor | None
    points: Tensor
    agents: Agents
    bev_semantic_map: Tensor
    visible_deg: float = 180.0

    @property
    def trajectory(self) -> Tensor:
        """(B, T, 3): the last layer's most likely mode."""
        return choose(self.poses[-1], self.logits[-1].argmax(dim=1))


class DiffusionDrive(nn.Module):
    """The planner.

    Features (float32), as `diffusiondrive.features` makes them for the sizes in the configuration:
        camera_feature (B, 3, 256, 1024) RGB in [0, 1]: left, front, right
        lidar_feature  (B, 1, 256, 256)  clipped point counts in [0, 1]: rows run forward, columns leftward; not read
                                         by a camera-only planner
        status_feature (B, 8)            command one-hot (4), velocity [m/s] (2), acceleration [m/s²] (2)
    """

    def __init__(self, config: PlannerConfig, anchors: Tensor | None = None):
        """anchors: (modes, poses, 2) x, y in metres, for planners that have them. Weights start at random; see
        `load_image_weights`."""
        super().__init__()
        check_anchors(config, anchors)
        self.config = config
        neck = config.backbone.neck_channels
        self.space = TrajectorySpace(config.space)
        self.schedule = Schedule.from_config(config.schedule)
        looks_at_map = config.denoiser == CASCADE and config.decoder.see_map
        self.perception = Perception(
            FusionBackbone(config.backbone), neck, config.width, config.perception, looks_at_map
        )
        self.agent_head = AgentHead(config.width, config.perception)
        self.semantic_head = SemanticHead(neck, config.perception)
        self.initial = AnchorNoise(anchors, self.space) if config.anchored else PureNoise(self.space)
        self.decoder = build_denoiser(config, self.space)
        self.kernel = DDIM(self.schedule)
        self.selector = LogitSelector() if config.anchored else FirstSample()
        noise = scene_noise([DEFAULT_NOISE_TOKEN], DEFAULT_NOISE_SEED, self.noise_shape)
        self.register_buffer("default_noise", noise.to(torch.get_default_device()), persistent=False)
        if config.backbone.channels_last:
            self.to(memory_format=torch.channels_last)

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """(M, T, 2): the shape of one scene's noise."""
        return self.config.modes, self.config.poses, 2

    def load_image_weights(self) -> str:
        """Start the camera branch as the configuration says; returns the line to show to the user."""
        return load_image_weights(self.perception.backbone, self.config.backbone)

    def forward(
        self,
        features: Mapping[str, Tensor],
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        auxiliary: bool = True,
    ) -> Plan:
        """Plan for a batch of scenes.

        noise: (B, M, T, 2) standard normal (see `scene_noise`). Without it: drawn from `generator`; without that
        either: one fixed draw, the same for every scene, so that the same input always gives the same plan.
        auxiliary: also predict agents and the semantic map, which the plan does not need.
        """
        context = self.perceive(features)
        proposals = self.propose(context, self._noise(len(context.ego), noise, generator)).passes[-1]
        poses, logits = proposals.poses[-1], proposals.logits[-1]
        mode = self.selector.select(poses, logits)
        return Plan(
            trajectory=choose(poses, mode),
            candidates=poses,
            logits=logits,
            mode=mode,
            agents=self.agent_head(context.agents) if auxiliary else None,
            bev_semantic_map=self.semantic_head(context.neck) if auxiliary else None,
        )

    def perceive(self, features: Mapping[str, Tensor]) -> SceneContext:
        """Features -> what the decoder looks at. Raises UserError when a feature is missing or of another size."""
        return self.perception(*self.checked_features(features))

    def propose(self, context: SceneContext, noise: Tensor, complete: bool = False) -> Chain:
        """All passes of the schedule from noise (B, M, T, 2); see `sampler.sample`."""
        start = self.initial.start(noise, self.schedule)
        cache = self.decoder.prepare(context, self.initial.anchors)
        return sample(start, self.decoder, cache, self.schedule, self.kernel, complete)

    def training_outputs(
        self,
        features: Mapping[str, Tensor],
        noise: Tensor,
        timesteps: Tensor,
        human: Tensor | None = None,
        of_human: Tensor | None = None,
    ) -> TrainingOutputs:
        """One pass at levels `timesteps` (B,) int64 from anchors with `noise` (B, M, T, 2): what the loss reads.

        human: (B, T, 2) recorded plans [m], diffused instead of the nearest anchor in the scenes of `of_human` (B,)
        bool (see `ScheduleConfig.noise_source`), and in every scene and sample by planners without anchors.
        """
        context = self.perceive(features)
        anchors = self.initial.anchors
        clean = self.initial.clean(human, of_human)
        noisy = self.schedule.add_noise(clean, noise.to(clean), timesteps)
        denoised = self.decoder.denoise(noisy, timesteps, self.decoder.prepare(context, anchors))
        return TrainingOutputs(
            poses=denoised.poses,
            logits=denoised.logits,
            anchors=anchors,
            points=denoised.points,
            agents=self.agent_head(context.agents),
            bev_semantic_map=self.semantic_head(context.neck),
            visible_deg=self.config.perception.visible_deg,
        )

    def set_schedule(self, config: ScheduleConfig) -> None:
        """Plan with another preset or number of steps; the weights stay. Raises UserError for one that does not fit."""
        checked = replace(self.config, schedule=config)
        if checked.anchored != self.config.anchored:
            raise UserError(
                f"schedule.preset: '{config.preset}' does not fit the planner '{self.config.name}', which was trained "
                f"under '{self.config.schedule.preset}'"
            )
        self.config.schedule = config
        self.schedule = Schedule.from_config(config).to(self.default_noise.device)
        self.kernel = DDIM(self.schedule)

    def set_modes(self, modes: int) -> None:
        """Plan with more or fewer candidates; the weights stay.

        Without anchors any number of samples can be drawn. With M anchors, fewer modes are those of anchors spread
        evenly over their order, and a multiple of M starts from each anchor so often, with noise of its own.
        """
        count = self.config.modes
        if replace(self.config, modes=modes).anchored:
            if modes > count and modes % count:
                raise UserError(f"modes: {modes} is no multiple of the planner's {count} anchors")
            rows = [number % count if modes > count else number * count // modes for number in range(modes)]
            self.initial = AnchorNoise(self.initial.anchors[rows], self.space)
        self.config.modes = modes
        noise = scene_noise([DEFAULT_NOISE_TOKEN], DEFAULT_NOISE_SEED, self.noise_shape)
        self.default_noise = noise.to(self.default_noise)

    @classmethod
    def from_pretrained(cls, path: Path | str) -> DiffusionDrive:
        """A planner in evaluation mode from a folder or .safetensors file; see `checkpoint.load_planner`."""
        from diffusiondrive.checkpoint import load_planner

        return load_planner(path)

    def save_pretrained(self, folder: Path | str, metrics: Mapping[str, object] | None = None) -> Path:
        """Write a self-contained checkpoint folder; see `checkpoint.save_planner`."""
        from diffusiondrive.checkpoint import save_planner

        return save_planner(self, folder, metrics)

    def _noise(self, batch: int, noise: Tensor | None, generator: torch.Generator | None) -> Tensor:
        shape = (batch, *self.noise_shape)
        if noise is not None:
            if tuple(noise.shape) != shape:
                raise UserError(f"noise has shape {tuple(noise.shape)}, but this batch needs {shape}")
            return noise.to(self.default_noise.device)
        if generator is not None:
            drawn = torch.randn(shape, generator=generator, device=generator.device)
            return drawn.to(self.default_noise.device)
        return self.default_noise.expand(shape)

    def checked_features(self, features: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None, Tensor]:
        """Camera, LiDAR (None for a camera-only planner) and status.

        Raises UserError when one is missing or of another size.
        """
        backbone = self.config.backbone
        sizes = {
            "camera_feature": (backbone.image_channels, *backbone.image_size),
            "lidar_feature": (backbone.lidar_channels, *backbone.lidar_size),
            "status_feature": (self.config.perception.status_size,),
        }
        if not backbone.lidar:
            del sizes["lidar_feature"]
        for name, size in sizes.items():
            if name not in features:
                raise UserError(f"features: '{name}' is missing; given are {sorted(features)}")
            if tuple(features[name].shape[1:]) != size:
                raise UserError(
                    f"{name} has shape {tuple(features[name].shape)}, but the planner '{self.config.name}' reads "
                    f"(B, {', '.join(map(str, size))}); build the features with this planner's configuration"
                )
        lidar = features["lidar_feature"] if backbone.lidar else None
        return features["camera_feature"], lidar, features["status_feature"]


def build_denoiser(config: PlannerConfig, space: TrajectorySpace) -> CascadeDecoder | UNetDenoiser | RegressionHead:
    """The denoiser that the configuration names."""
    if config.denoiser == UNET:
        return UNetDenoiser(space, config.width, config.poses, config.anchored, config.unet)
    if config.denoiser == REGRESSION:
        return RegressionHead(space, config.width, config.poses, config.regression)
    return CascadeDecoder(space, config.width, config.poses, config.perception.range_m, config.decoder)


def check_anchors(config: PlannerConfig, anchors: Tensor | None) -> None:
    """Raise UserError unless there are anchors of the right shape exactly where the planner has them."""
    if not config.anchored:
        if anchors is not None:
            raise UserError(f"the planner '{config.name}' has no anchors, but some were given; leave them out")
        return
    shape, expected = None if anchors is None else tuple(anchors.shape), (config.modes, config.poses, 2)
    if shape != expected:
        raise UserError(
            f"anchors have shape {shape}, but the planner '{config.name}' has modes={config.modes} and "
            f"poses={config.poses}, so {expected}; cluster again (tools/cluster_anchors.py) or change modes"
        )


def choose(poses: Tensor, mode: Tensor) -> Tensor:
    """poses (B, M, ...), mode (B,) -> (B, ...), without leaving the device."""
    index = mode.view(-1, *[1] * (poses.ndim - 1)).expand(-1, 1, *poses.shape[2:])
    return poses.gather(1, index).squeeze(1)

"""Samples a second on 8 and 64 GPUs, projected from one measured GPU: a calculation, no measurement.

    python benchmarks/scaling_projection.py                                       # the points of docs/training.md
    python benchmarks/scaling_projection.py batches=[128] samples_per_s=[1000] between=50

One device's speed at some batches comes from `benchmarks/training_throughput.py`; the gradient's size from the planner;
the links' speeds are assumed, by default half of what NVLink 4 (450 GB/s each way) and one 400 Gb/s adapter a GPU are
sold with. Written: table (.md), figure (.png) and the numbers.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import matplotlib
import torch

from diffusiondrive.experiments.sheet import Sheet
from diffusiondrive.planner import DiffusionDrive, PlannerConfig
from diffusiondrive.training.scaling import Device, Links, Projection, project
from navsim_eval.command_line import run_tool
from navsim_eval.environment import describe_environment
from navsim_eval.errors import UserError
from navsim_eval.files import atomic_write

matplotlib.use("Agg")
from matplotlib import pyplot

HEADS = ("batch a GPU × GPUs", "samples/s, nothing hidden", "hidden behind backward", "of N × one", "sum [ms]",
         "sent inside [MB]", "sent between [MB]")  # fmt: skip


@dataclass
class ScalingConfig:
    """batches, samples_per_s: of one measured device;  backward: share of its step
    point:  where that was measured, for the table
    per_machine, inside, between: GPUs of a machine; GB/s each way of a GPU's links, assumed
    gpus:   numbers of GPUs;  output: JSON; table and figure beside it
    """

    model: PlannerConfig = field(default_factory=PlannerConfig)
    batches: list[int] = field(default_factory=lambda: [64, 128, 256])
    samples_per_s: list[float] = field(default_factory=lambda: [487.0, 687.0, 741.0])
    backward: float = 0.6
    point: str = "one H100 80 GB, eager bf16, batches on the device, 2026-11-27"
    per_machine: int = 8
    inside: float = 225.0
    between: float = 25.0
    gpus: list[int] = field(default_factory=lambda: [1, 8, 16, 64])
    output: str = "benchmarks/results/scaling_projection.json"

    def __post_init__(self) -> None:
        if len(self.batches) != len(self.samples_per_s):
            raise UserError(
                f"batches={self.batches}, samples_per_s={self.samples_per_s}: as many of one as of the other"
            )
        if min(*self.batches, *self.samples_per_s, self.per_machine, self.inside, self.between) <= 0:
            raise UserError("batches, samples_per_s, per_machine, inside and between must be positive")
        if odd := [n for n in self.gpus if n < 1 or (n > self.per_machine and n % self.per_machine)]:
            raise UserError(f"gpus={odd}: beyond one machine of {self.per_machine}, name whole machines")


def main(config: ScalingConfig) -> None:
    with torch.device("meta"):
        planner = DiffusionDrive(config.model, torch.empty(config.model.modes, config.model.poses, 2))
    gradient = 4 * sum(weight.numel() for weight in planner.parameters() if weight.requires_grad)
    points = zip(config.samples_per_s, config.batches, strict=True)
    devices = [Device(speed, batch, config.backward) for speed, batch in points]
    links = Links(config.per_machine, config.inside, config.between)
    found = {device: [project(device, links, gradient, gpus) for gpus in config.gpus] for device in devices}
    result = {
        "kind": "projection: computed, not measured",
        "measured": {"where": config.point, "points": [asdict(device) for device in devices]},
        "assumed_links": asdict(links),
        "gradient_bytes": gradient,
        "rows": [asdict(row) for rows in found.values() for row in rows],
        "environment": describe_environment(),
    }
    output = Path(config.output)
    sheet(found, gradient, config).keep(output, result)
    draw(found, config, output.with_suffix(".png"))


def share(samples_per_s: float, row: Projection, device: Device) -> str:
    return f"{samples_per_s / (row.gpus * device.samples_per_s):.1%}"


def sheet(found: dict[Device, list[Projection]], gradient: int, config: ScalingConfig) -> Sheet:
    rows = [
        [
            f"{row.batch} × {row.gpus}", f"{row.exposed:.0f}", f"{row.hidden:.0f}",
            f"{share(row.exposed, row, device)} to {share(row.hidden, row, device)}",
            f"{row.sum_ms:.1f}", f"{row.sent_inside_mb:.0f}", f"{row.sent_between_mb:.0f}",
        ]
        for device, projected in found.items()
        for row in projected
    ]  # fmt: skip
    links = (
        f"{config.inside:g} GB/s each way inside a machine of {config.per_machine}, {config.between:g} GB/s to others"
    )
    lines = [
        f"measured: one GPU ({config.point}); the rows of more are computed",
        f"gradients: {gradient / 1e6:.0f} MB in float32; links assumed: {links}",
    ]
    return Sheet(f"Projected, {config.model.name}", HEADS, rows, lines)


def draw(found: dict[Device, list[Projection]], config: ScalingConfig, path: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(6.5, 4))
    for number, (device, rows) in enumerate(found.items()):
        gpus, color = [row.gpus for row in rows], f"C{number}"
        low, high = [row.exposed for row in rows], [row.hidden for row in rows]
        axes.plot(gpus, [n * device.samples_per_s for n in gpus], ":", color=color)
        axes.fill_between(gpus, low, high, color=color, alpha=0.3)
        axes.plot(gpus, low, color=color, label=f"batch {device.batch} a GPU")
        axes.plot(1, device.samples_per_s, "o", color=color)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=10)
    axes.set_xticks(config.gpus, [str(n) for n in config.gpus])
    axes.set_xlabel("GPUs")
    axes.set_ylabel("samples a second")
    axes.legend(fontsize=8)
    axes.set_title(f"{config.model.name}: points measured, lines projected, dotted N × one", fontsize=10)
    figure.tight_layout()
    atomic_write(path, lambda temporary: figure.savefig(temporary, dpi=130, format="png"))
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(run_tool(main, ScalingConfig, "benchmark_scaling_projection", __doc__))

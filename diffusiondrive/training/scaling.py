"""What more GPUs can bring, projected from one that was measured and from the links between them.

Data-parallel training adds one thing to a step, the sum of all gradients. It is modelled as the usual two rings: first
the GPUs of a machine add up over its fast links, then each keeps its share and adds it up with its peers on the other
machines, then the machine shares the sums. Latency, congestion, stragglers and the loader are left out, so these are
upper bounds.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Links:
    """GB/s that a GPU sends while it receives as many: to its machine's other GPUs, and to other machines."""

    per_machine: int = 8
    inside: float = 225.0
    between: float = 25.0

    def seconds(self, bytes_: float, gpus: int) -> float:
        """To sum `bytes_` over `gpus`, which fill whole machines, or a part of one."""
        near, machines = self._layout(gpus)
        return 1e-9 * (_ring(bytes_, near) / self.inside + _ring(bytes_ / near, machines) / self.between)

    def sent(self, bytes_: float, gpus: int) -> tuple[float, float]:
        """Bytes that each GPU sends: inside its machine, and to others."""
        near, machines = self._layout(gpus)
        return _ring(bytes_, near), _ring(bytes_ / near, machines)

    def _layout(self, gpus: int) -> tuple[int, int]:
        near = min(gpus, self.per_machine)
        if gpus < 1 or gpus % near:
            raise ValueError(f"{gpus} GPUs do not fill machines of {self.per_machine}")
        return near, gpus // near


def _ring(bytes_: float, members: int) -> float:
    """Sent by each member of a ring: all but its own share, once to add up and once to hand out."""
    return 2.0 * (members - 1) / members * bytes_


@dataclass(frozen=True)
class Device:
    """One measured device: samples a second at `batch`, and the share of the step that the backward pass takes."""

    samples_per_s: float
    batch: int
    backward: float = 0.6

    @property
    def step(self) -> float:
        return self.batch / self.samples_per_s


@dataclass(frozen=True)
class Projection:
    """Samples a second of all GPUs together; `exposed`: the sum starts after the backward pass; `hidden`: it takes
    place during that pass, as far as it fits. batch: of each GPU."""

    batch: int
    gpus: int
    exposed: float
    hidden: float
    sum_ms: float
    sent_inside_mb: float
    sent_between_mb: float


def project(device: Device, links: Links, gradient_bytes: float, gpus: int) -> Projection:
    """Every GPU has the measured batch, so the global batch grows with their number."""
    seconds = links.seconds(gradient_bytes, gpus)
    samples = device.batch * gpus
    left_over = max(0.0, seconds - device.backward * device.step)
    inside, between = links.sent(gradient_bytes, gpus)
    return Projection(
        device.batch, gpus, samples / (device.step + seconds), samples / (device.step + left_over),
        1e3 * seconds, 1e-6 * inside, 1e-6 * between,
    )  # fmt: skip

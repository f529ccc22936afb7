"""What to drive when there is no fresh plan: the previous plan moved to here and now, or a stop.

    plan made dt ago, in the ego frame of then ─ resample at τ + dt ─ into the ego frame of now ─ shifted plan
    current speed, path of the last plan ─ constant deceleration along that path ─ stop plan

Resampling is cubic Hermite with headings as tangents; beyond the plan's end curvature is held and the acceleration
fades within a second. Pure functions of numpy arrays: time and motion are arguments.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from navsim_eval.geometry import to_local, wrap_angle
from navsim_eval.scene import FRAME_INTERVAL_S

SLOW_M_S = 0.5  # below this speed a heading says little about the direction of motion
FADE_S = 1.0  # the acceleration at the plan's end is gone after this time
MAX_CURVATURE = 0.25  # 1/m, tighter than the car can turn
PATH_STEP_S = 0.1


def shift_plan(plan: np.ndarray, elapsed_s: float, motion: np.ndarray) -> np.ndarray:
    """The rest of an earlier plan, seen from here.

    plan: (..., T, 3) x, y [m], heading [rad] at 0.5, 1.0, … s after its observation, ego frame of that observation
    elapsed_s: time since that observation (≥ -0.5);  motion: (3,) present ego pose in the frame of that observation
    Returns (..., T, 3) float64, poses at 0.5, 1.0, … s from now in the present ego frame.
    """
    times = elapsed_s + FRAME_INTERVAL_S * np.arange(1, plan.shape[-2] + 1)
    return to_local(motion, resample(plan, times))


def resample(plan: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Poses (..., N, 3) of a plan (..., T, 3) at `times` (N,) [s] after its observation; time 0 is the pose (0, 0, 0).

    Raises ValueError for a negative time.
    """
    if times.min() < 0:
        raise ValueError(f"a plan says nothing about {-times.min():.3f} s before its observation")
    curve = _Curve.through(np.asarray(plan, np.float64))
    end = FRAME_INTERVAL_S * plan.shape[-2]
    inside = curve.at(np.minimum(times, end))
    beyond = curve.continued(np.maximum(times - end, 0.0))
    return np.where((times <= end)[:, None], inside, beyond)


def stop_plan(speed: float, deceleration: float, poses: int, path: np.ndarray | None = None) -> np.ndarray:
    """(poses, 3) float64: brake to a stop along `path` (T, 3), a plan in the present ego frame, or straight ahead.

    speed: present, along x [m/s]; a car that rolls backward is just stopped. deceleration [m/s²] > 0.
    """
    speed = max(speed, 0.0)
    time = np.minimum(FRAME_INTERVAL_S * np.arange(1, poses + 1), speed / deceleration)
    distance = speed * time - 0.5 * deceleration * time**2
    if path is None:
        return np.stack([distance, 0 * distance, 0 * distance], axis=-1)
    horizon = FRAME_INTERVAL_S * len(path)
    samples = resample(path, np.arange(0.0, horizon + PATH_STEP_S / 2, PATH_STEP_S).clip(max=horizon))
    steps = np.linalg.norm(np.diff(samples[:, :2], axis=0), axis=-1)
    length = np.concatenate([[0.0], np.cumsum(steps)])
    along = np.minimum(distance, length[-1])
    heading = np.unwrap(samples[:, 2])
    on_path = np.stack([np.interp(along, length, column) for column in (*samples[:, :2].T, heading)], axis=-1)
    curvature = _Curve.through(np.asarray(path, np.float64)).curvature
    stopped = _arc(on_path, distance - along, curvature)  # where the path is shorter than the way to brake
    return np.concatenate([stopped[:, :2], wrap_angle(stopped[:, 2:])], axis=-1)


@dataclass(frozen=True)
class _Curve:
    """A plan with its start, K = T + 1 knots 0.5 s apart.

    xy, tangents: (..., K, 2) [m], [m/s]; heading: (..., K) unwrapped; speed: (..., K) along the heading
    acceleration, curvature: (...) at the end [m/s²], [1/m]
    """

    xy: np.ndarray
    tangents: np.ndarray
    heading: np.ndarray
    speed: np.ndarray
    acceleration: np.ndarray
    curvature: np.ndarray

    @classmethod
    def through(cls, plan: np.ndarray) -> _Curve:
        step = FRAME_INTERVAL_S
        knots = np.concatenate([np.zeros_like(plan[..., :1, :]), plan], axis=-2)
        xy, heading = knots[..., :2], np.unwrap(knots[..., 2], axis=-1)
        chord, turn = np.diff(xy, axis=-2), np.diff(heading, axis=-1)
        middle = heading[..., :-1] + turn / 2
        forward = np.sign(chord[..., 0] * np.cos(middle) + chord[..., 1] * np.sin(middle))
        # Length of the arc over a chord, exact for a constant turn: what makes such a plan shift on its own path.
        bend = np.clip(turn / 2, -np.pi / 4, np.pi / 4)
        arc = forward * np.linalg.norm(chord, axis=-1) / np.sinc(bend / np.pi)
        mean = arc / step  # (..., T) mean speed of each interval
        speed = _at_knots(mean)
        slope = _at_knots(chord / step, axis=-2)
        direction = np.stack([np.cos(heading), np.sin(heading)], axis=-1)
        tangents = np.where((np.abs(speed) < SLOW_M_S)[..., None], slope, speed[..., None] * direction)
        moving = np.abs(mean[..., -1]) > SLOW_M_S
        curvature = np.divide(turn[..., -1], arc[..., -1], out=np.zeros_like(arc[..., -1]), where=moving)
        acceleration = (mean[..., -1] - mean[..., -2]) / step if mean.shape[-1] > 1 else 0 * mean[..., -1]
        return cls(xy, tangents, heading, speed, acceleration, curvature.clip(-MAX_CURVATURE, MAX_CURVATURE))

    def at(self, times: np.ndarray) -> np.ndarray:
        """Poses (..., N, 3) at times (N,) within the knots."""
        step = FRAME_INTERVAL_S
        first = np.minimum((times / step).astype(int), self.xy.shape[-2] - 2)
        u = (times / step - first)[:, None]
        start, end = self.xy[..., first, :], self.xy[..., first + 1, :]
        leave, arrive = self.tangents[..., first, :] * step, self.tangents[..., first + 1, :] * step
        xy = (
            (2 * u**3 - 3 * u**2 + 1) * start
            + (u**3 - 2 * u**2 + u) * leave
            + (3 * u**2 - 2 * u**3) * end
            + (u**3 - u**2) * arrive
        )
        heading = self.heading[..., first] * (1 - u[:, 0]) + self.heading[..., first + 1] * u[:, 0]
        return np.concatenate([xy, wrap_angle(heading)[..., None]], axis=-1)

    def continued(self, times: np.ndarray) -> np.ndarray:
        """Poses (..., N, 3) at times (N,) ≥ 0 after the last knot: curvature held, acceleration fading to none."""
        sign = np.where(self.speed[..., -1] < 0, -1.0, 1.0)
        speed, acceleration = (sign * self.speed[..., -1])[..., None], (sign * self.acceleration)[..., None]
        # v(t) = v + a (t - t² / 2F) until the fade F is over; a car that comes to rest on the way stays there.
        gain = acceleration * FADE_S / 2
        with np.errstate(divide="ignore", invalid="ignore"):
            rest = np.where(speed + gain < 0, FADE_S * (1 - np.sqrt(1 + speed / gain)), np.inf)
        time = np.minimum(times, rest)
        fading = np.minimum(time, FADE_S)
        distance = speed * time + acceleration * (fading**2 / 2 - fading**3 / (6 * FADE_S)) + gain * (time - fading)
        last = np.concatenate([self.xy[..., -1:, :], self.heading[..., -1:, None]], axis=-1)
        moved = _arc(np.broadcast_to(last, (*distance.shape, 3)), sign[..., None] * distance, self.curvature[..., None])
        return np.concatenate([moved[..., :2], wrap_angle(moved[..., 2:])], axis=-1)


def _at_knots(between: np.ndarray, axis: int = -1) -> np.ndarray:
    """Values at K knots from the T = K - 1 means between them: averages inside, straight on at the ends."""
    b = np.moveaxis(between, axis, -1)
    if b.shape[-1] == 1:
        return np.repeat(between, 2, axis=axis)
    ends = [1.5 * b[..., :1] - 0.5 * b[..., 1:2], 1.5 * b[..., -1:] - 0.5 * b[..., -2:-1]]
    if axis == -1:  # speeds: a start or an end at rest, not in reverse
        ends = [np.where(e * near < 0, 0.0, e) for e, near in zip(ends, (b[..., :1], b[..., -1:]), strict=True)]
    knots = np.concatenate([ends[0], (b[..., 1:] + b[..., :-1]) / 2, ends[1]], axis=-1)
    return np.moveaxis(knots, -1, axis)


def _arc(poses: np.ndarray, distance: np.ndarray, curvature: np.ndarray) -> np.ndarray:
    """Poses (..., 3) after `distance` (...) [m] more at constant curvature."""
    turn = curvature * distance
    chord, direction = distance * np.sinc(turn / 2 / np.pi), poses[..., 2] + turn / 2
    x, y = poses[..., 0] + chord * np.cos(direction), poses[..., 1] + chord * np.sin(direction)
    return np.stack([x, y, poses[..., 2] + turn], axis=-1)

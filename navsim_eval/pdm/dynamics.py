"""What the ego would really drive when told to follow a trajectory: interpolation, tracking, motion.

The published evaluators (NAVSIM, after nuPlan's closed-loop simulation) do not score a plan itself but the states of a
kinematic bicycle that a linear-quadratic tracker steers along it, at 10 Hz over 4 s. The steps:

1. `interpolate_trajectory`: the planner's poses (2 Hz, ego frame) as global poses at 10 Hz;
2. `speed_profile`, `curvature_profile`: regularised least squares through those poses;
3. `_follow_speed`: the tracker's acceleration command and the bicycle's speed, step by step;
4. `_steering_gains`, `_follow_path`: the tracker's steering-rate command and the bicycle's path, step by step.

Everything is float64 and batched over any leading dimensions; the only loops run over time. Rows do not influence each
other. Poses are x [m], y [m], heading [rad]; states have the columns of `StateIndex`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from navsim_eval.geometry import Vehicle
from navsim_eval.pdm.types import SIMULATION_DT, SIMULATION_STEPS, StateIndex

DT = SIMULATION_DT
STEPS = SIMULATION_STEPS
ArrayLike = np.ndarray | Tensor

# Regularisers of the least-squares profiles.
ACCELERATION_PENALTY = 1e-4
INITIAL_CURVATURE_PENALTY = 1e-10
CURVATURE_RATE_PENALTY = 1e-2

# Tracker: one speed step over the whole lookahead, lateral error linearised over the same lookahead.
HORIZON = 10
SPEED_GAIN = 10.0 / 11.0  # q / (q + r) over a lookahead of 1 s, q = 10, r = 1
STOPPING_GAIN = 0.5
STOPPING_SPEED = 0.2
HEADING_WEIGHT = 10.0  # against 1 for the lateral error and 1 for the steering rate

# Actuators: first-order lags; steering is bounded.
ACCELERATION_LAG = 0.2
STEERING_LAG = 0.05
MAX_STEERING = np.pi / 3
STEERING_RESPONSE = DT / (DT + STEERING_LAG)


def wrap_angle(angle: Tensor) -> Tensor:
    """Angle(s) in (-pi, pi] through atan2."""
    return torch.atan2(torch.sin(angle), torch.cos(angle))


def principal_angle(angle: Tensor) -> Tensor:
    """Angle(s) in [-pi, pi); those that are there already stay as they are."""
    turns = torch.add(angle.new_full((), 0.5), angle, alpha=0.5 / np.pi).floor_()
    return torch.sub(angle, turns, alpha=2.0 * np.pi)


def shorter_turn(change: Tensor) -> Tensor:
    """Changes of heading in [-pi, pi], whole turns taken off."""
    return torch.sub(change, torch.round(change / (2.0 * np.pi)), alpha=2.0 * np.pi)


def unwrap_angle(angle: Tensor, dim: int = -1) -> Tensor:
    """Angles along `dim` without jumps of 2 pi: each step is reduced by 2 pi * round(step / 2 pi)."""
    step = torch.diff(angle, dim=dim)
    turns = torch.cumsum(torch.round(step / (2.0 * np.pi)), dim=dim)
    first = torch.zeros_like(angle.narrow(dim, 0, 1))
    return angle - 2.0 * np.pi * torch.cat([first, turns], dim=dim)


def interpolate_trajectory(
    initial_pose: ArrayLike, start_time_us: ArrayLike | int, poses: ArrayLike, interval: float = 0.5
) -> Tensor:
    """A planner's trajectory as global poses at the simulation's sample times.

    initial_pose:  (..., 3) global ego pose now;  start_time_us: (...) integer microseconds of *now*
    poses:         (..., T, 3) future poses relative to `initial_pose`, the first one `interval` seconds ahead
    Returns (..., 41, 3) global poses at 0.0, 0.1, … 4.0 s, heading in [-pi, pi).

    Leading dimensions broadcast. As in the reference, time stamps are truncated to whole microseconds after a round
    trip through seconds, which can make a sample 1 us early (up to 1e-5 m); a trajectory shorter than 4 s keeps its
    last pose.
    """
    initial_pose, poses = _float64(initial_pose), _float64(poses)
    start = torch.as_tensor(start_time_us, dtype=torch.int64, device=poses.device)
    c, s = torch.cos(initial_pose[..., None, 2]), torch.sin(initial_pose[..., None, 2])
    x = initial_pose[..., None, 0] + c * poses[..., 0] - s * poses[..., 1]
    y = initial_pose[..., None, 1] + s * poses[..., 0] + c * poses[..., 1]
    heading = wrap_angle(initial_pose[..., None, 2] + poses[..., 2])
    future = torch.stack([x, y, heading], dim=-1)
    now = initial_pose[..., None, :].expand(*future.shape[:-2], 1, 3)

    seconds = start[..., None].to(torch.float64) * 1e-6
    ahead = torch.arange(1, poses.shape[-2] + 1, dtype=torch.float64, device=poses.device) * interval
    knots = torch.cat([start[..., None], ((seconds + ahead) * 1e6).to(torch.int64)], dim=-1)
    return interpolate_poses(torch.cat([now, future], dim=-2), knots, sample_times_us(start))


def sample_times_us(start_time_us: Tensor | int) -> Tensor:
    """(..., 41) microseconds at which trajectories are sampled, truncated as the reference does."""
    start = torch.as_tensor(start_time_us, dtype=torch.int64)
    steps = torch.arange(STEPS + 1, dtype=torch.float64, device=start.device) * DT
    return ((steps + start[..., None].to(torch.float64) * 1e-6) * 1e6).to(torch.int64)


def interpolate_poses(poses: Tensor, times_us: Tensor, samples_us: Tensor) -> Tensor:
    """Linear interpolation of poses (..., K, 3) given at `times_us` (..., K), at `samples_us` (..., M) → (..., M, 3).

    Headings are unwrapped along the list first and returned in [-pi, pi). Samples outside the span take its ends.
    """
    samples = torch.minimum(torch.maximum(samples_us, times_us[..., :1]), times_us[..., -1:])
    shape = torch.broadcast_shapes(samples.shape[:-1], times_us.shape[:-1])
    times_us, samples = times_us.expand(*shape, -1).contiguous(), samples.expand(*shape, -1).contiguous()
    upper = torch.searchsorted(times_us, samples).clamp(1, times_us.shape[-1] - 1)
    lower_time = torch.gather(times_us, -1, upper - 1)
    span = (torch.gather(times_us, -1, upper) - lower_time).to(torch.float64)
    fraction = ((samples - lower_time).to(torch.float64) / span)[..., None]

    values = torch.cat([poses[..., :2], unwrap_angle(poses[..., 2])[..., None]], dim=-1)
    index = upper[..., None].expand(*values.shape[:-2], -1, 3)
    below, above = torch.gather(values, -2, index - 1), torch.gather(values, -2, index)
    result = below + (above - below) * fraction
    return torch.cat([result[..., :2], principal_angle(result[..., 2:])], dim=-1)


def simulate(initial_state: ArrayLike, poses: ArrayLike) -> Tensor:
    """Closed-loop simulation of the ego along a trajectory.

    initial_state: (..., 11) ego state now;  poses: (..., 41, 3) trajectory at 10 Hz (its first pose belongs to now).
    Leading dimensions broadcast. Returns states (..., 41, 11); the first one is `initial_state`.
    """
    poses = _float64(poses)
    initial_state = _float64(initial_state).to(poses.device)
    if poses.shape[-2:] != (STEPS + 1, 3):
        raise ValueError(f"poses: expected (..., {STEPS + 1}, 3), got {tuple(poses.shape)}")
    shape = torch.broadcast_shapes(initial_state.shape[:-1], poses.shape[:-2])
    # Rows last: each quantity of a step is then one contiguous vector.
    initial = initial_state.expand(*shape, StateIndex.SIZE).reshape(-1, StateIndex.SIZE).T  # (11, B)
    target = poses.expand(*shape, -1, -1).reshape(-1, STEPS + 1, 3).permute(2, 1, 0).contiguous()  # (3, 41, B)

    # Speed does not depend on steering: it is rolled out first, and all that it determines is computed for all steps.
    direction = torch.stack([torch.cos(target[2]), torch.sin(target[2])])
    planned_speed = speed_profile(target, direction)
    speed, acceleration, command, stopping = _follow_speed(initial, planned_speed)
    gains = _steering_gains(speed[:-1], command, curvature_profile(target, planned_speed), stopping)
    x, y, heading, steering, steering_rate, tangent = _follow_path(
        initial, torch.cat([target, direction]), speed[:-1] * DT, gains
    )

    yaw_rate = speed * tangent / Vehicle.WHEEL_BASE
    yaw_rate[0] = initial[StateIndex.YAW_RATE]
    columns = initial.expand(STEPS + 1, -1, -1).clone()  # (41, 11, B); state 0 is the initial one
    columns[1:] = 0.0  # no lateral motion in the vehicle's frame
    columns[1:, StateIndex.X], columns[1:, StateIndex.Y] = x[1:], y[1:]
    columns[1:, StateIndex.HEADING] = principal_angle(heading[1:])
    columns[1:, StateIndex.VX], columns[1:, StateIndex.AX] = speed[1:], acceleration[1:]
    columns[1:, StateIndex.STEERING], columns[1:, StateIndex.STEERING_RATE] = steering[1:], steering_rate
    columns[1:, StateIndex.YAW_RATE] = yaw_rate[1:]
    columns[1:, StateIndex.YAW_ACCELERATION] = torch.diff(yaw_rate, dim=0) / DT
    return columns.permute(2, 0, 1).reshape(*shape, STEPS + 1, StateIndex.SIZE)


def speed_profile(target: Tensor, direction: Tensor) -> Tensor:
    """Speeds (40, B) of pose sequences (3, 41, B) by regularised least squares; direction: (2, 41, B) cos, sin.

    The displacement of step i is modelled as dt * V_i along the heading, V_i = V_0 + dt * sum of the accelerations
    before i. The heading is a unit vector, so the normal matrix is the same for all rows and the solution is one
    constant operator on the displacements along the heading.
    """
    displacement = torch.diff(target[:2], dim=1)
    along = direction[0, :-1] * displacement[0] + direction[1, :-1] * displacement[1]
    return _speed_operator().to(along.device) @ along


@lru_cache(maxsize=1)
def _speed_operator() -> Tensor:
    integrate = np.concatenate([np.ones((STEPS, 1)), DT * np.tril(np.ones((STEPS, STEPS - 1)), -1)], axis=1)
    # Penalised: every acceleration but the last two by itself, the last two by their difference. (The reference means
    # differences throughout, but builds its difference matrix so that only the last row is one.)
    penalty = np.zeros((STEPS - 2, STEPS))
    penalty[np.arange(STEPS - 3), np.arange(1, STEPS - 2)] = 1.0
    penalty[-1, -2:] = -1.0, 1.0
    normal = DT**2 * integrate.T @ integrate + ACCELERATION_PENALTY * penalty.T @ penalty
    return torch.from_numpy(integrate @ np.linalg.solve(normal, DT * integrate.T))


def curvature_profile(target: Tensor, speed: Tensor) -> Tensor:
    """Curvatures (40, B) of pose sequences (3, 41, B) driven at `speed` (40, B), by regularised least squares.

    The heading change of step i is modelled as dt * V_i * K_i; penalised are the curvature rate (1e-2 per squared
    1/(m s)) and, barely, the first curvature. In K itself the normal matrix is tridiagonal with off-diagonals of
    -1 (times a constant), so elimination runs along time, in a form free of cancellation: pivots are 1 + s_i, s_i > 0.
    """
    turn = shorter_turn(torch.diff(target[2], dim=0))
    scale = CURVATURE_RATE_PENALTY / DT**2
    excess = (DT * speed) ** 2 / scale
    excess[0] += INITIAL_CURVATURE_PENALTY / scale
    right = DT * speed * turn / scale

    carry, load = [excess[0]], [right[0]]
    for i in range(1, STEPS):
        pivot = 1.0 + carry[-1]
        load.append(right[i] + load[-1] / pivot)
        carry.append(excess[i] + carry[-1] / pivot)
    curvature = [load[-1] / carry[-1]]
    for i in range(STEPS - 2, -1, -1):
        curvature.append((load[i] + curvature[-1]) / (1.0 + carry[i]))
    return torch.stack(curvature[::-1])


def _follow_speed(initial: Tensor, planned_speed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Longitudinal half of tracker and bicycle.

    initial: (11, B);  planned_speed: (40, B), looked at one second ahead
    Returns speed and acceleration (41, B), commanded acceleration (40, B), and where the tracker is stopping (40, B).
    """
    preview = torch.arange(HORIZON, STEPS + HORIZON, device=planned_speed.device).clamp(max=STEPS - 1)
    reference = planned_speed[preview]
    stopping_gain, speed_gain = (initial.new_full((), gain) for gain in (STOPPING_GAIN, SPEED_GAIN))  # in float64
    speed, acceleration = initial[StateIndex.VX], initial[StateIndex.AX]
    speeds, accelerations, commands, stops = [speed], [acceleration], [], []
    for wanted, may_stop in zip(reference, reference <= STOPPING_SPEED, strict=True):
        stopping = may_stop & (speed <= STOPPING_SPEED)
        command = (wanted - speed) * torch.where(stopping, stopping_gain, speed_gain)
        acceleration = torch.lerp(acceleration, command, DT / (DT + ACCELERATION_LAG))
        speed = torch.add(speed, acceleration, alpha=DT)
        speeds.append(speed)
        accelerations.append(acceleration)
        commands.append(command)
        stops.append(stopping)
    return torch.stack(speeds), torch.stack(accelerations), torch.stack(commands), torch.stack(stops)


# The tracker rolls lateral error e, yaw error psi and steering delta over the horizon with speeds v_j = v + j*dt*a:
#   e += v_j dt psi;  psi += v_j dt (delta / wheel base - K_j);  delta += dt u
# Summed up, everything is polynomial in p = v*dt and q = a*dt^2 (v_j dt = p + j q), with these constants:
_J = np.arange(HORIZON, dtype=np.float64)
_REST_P = (HORIZON - 1) - _J  # sum over k > j of 1
_REST_Q = _J.sum() - _J * (_J + 1) / 2.0  # sum over k > j of k
_PP, _PQ, _QQ = _REST_P, _REST_Q + _J * _REST_P, _J * _REST_Q  # (p + j q) * sum over k > j of (p + k q)
_SUM_J, _SUM_JJ = float(_J.sum()), float((_J**2).sum())


@lru_cache(maxsize=1)
def _moment_operator() -> Tensor:
    """(5, 40, 40): from curvatures to sums over the preview of each step, weighted by 1, j, and the three above."""
    operator = np.zeros((5, STEPS, STEPS))
    weights = np.stack([np.ones(HORIZON), _J, _PP, _PQ, _QQ])
    for step in range(STEPS):
        for j in range(HORIZON):
            operator[:, step, min(step + j, STEPS - 1)] += weights[:, j]
    return torch.from_numpy(operator)


class _SteeringGains(NamedTuple):
    """What the linear-quadratic tracker does with its errors at each step, (40, B) each.

    Over the horizon, with no steering rate, yaw error and lateral error become
        yaw_end = yaw + steering * yaw_by_steering - turn
        lateral_end = lateral + yaw * distance + steering * lateral_by_steering - bend
    and the steering rate, after the actuator's lag, is  lateral_end * on_lateral + yaw_end * on_yaw.
    """

    distance: Tensor
    yaw_by_steering: Tensor
    lateral_by_steering: Tensor
    turn: Tensor
    bend: Tensor
    on_lateral: Tensor
    on_yaw: Tensor


def _steering_gains(speed: Tensor, acceleration: Tensor, curvature: Tensor, stopping: Tensor) -> _SteeringGains:
    """From speed, commanded acceleration, path curvature and where the tracker is stopping (no steering), (40, B)."""
    p, q = speed * DT, acceleration * DT**2
    pp, pq, qq = p * p, p * q, q * q
    ones, linear, m_pp, m_pq, m_qq = torch.matmul(_moment_operator().to(curvature.device), curvature)
    distance = HORIZON * p + _SUM_J * q
    base = Vehicle.WHEEL_BASE
    lateral_by_rate = (DT / base) * (float(_J @ _PP) * pp + float(_J @ _PQ) * pq + float(_J @ _QQ) * qq)
    yaw_by_rate = (DT / base) * (_SUM_J * p + _SUM_JJ * q)
    # u = -(B'QB + 1)^-1 B'Q x_end, with weights 1, 10, 0 on lateral error, yaw error and steering.
    factor = torch.where(stopping, 0.0, -1.0 / (lateral_by_rate**2 + HEADING_WEIGHT * yaw_by_rate**2 + 1.0))
    return _SteeringGains(
        distance=distance,
        yaw_by_steering=distance / base,
        lateral_by_steering=(float(_PP.sum()) * pp + float(_PQ.sum()) * pq + float(_QQ.sum()) * qq) / base,
        turn=p * ones + q * linear,
        bend=pp * m_pp + pq * m_pq + qq * m_qq,
        on_lateral=lateral_by_rate * factor * STEERING_RESPONSE,
        on_yaw=HEADING_WEIGHT * yaw_by_rate * factor * STEERING_RESPONSE,
    )


def _follow_path(initial: Tensor, target: Tensor, distance: Tensor, gains: _SteeringGains) -> tuple[Tensor, ...]:
    """Lateral half of tracker and bicycle.

    initial: (11, B);  target: (5, 41, B) x, y, heading, its cos and sin;  distance: (40, B) driven in each step [m]
    Returns x, y, heading (not wrapped), steering (41, B), steering rate (40, B) and tan(steering) (41, B).
    """
    x, y, heading = initial[StateIndex.POSE]
    steering = initial[StateIndex.STEERING]
    track, rates, tangents = [(x, y, heading, steering)], [], [torch.tan(steering)]
    steps = zip(
        zip(*target, strict=True), zip(*gains, strict=True), distance, distance / Vehicle.WHEEL_BASE, strict=False
    )
    for (target_x, target_y, target_heading, cos, sin), gain, length, arc in steps:
        on_distance, yaw_by_steering, lateral_by_steering, turn, bend, on_lateral, on_yaw = gain
        lateral = torch.addcmul((y - target_y) * cos, x - target_x, sin, value=-1.0)
        yaw = principal_angle(heading - target_heading)
        lateral_end = torch.addcmul(torch.addcmul(lateral - bend, yaw, on_distance), steering, lateral_by_steering)
        yaw_end = principal_angle(torch.addcmul(yaw - turn, steering, yaw_by_steering))
        rate = torch.addcmul(lateral_end * on_lateral, yaw_end, on_yaw)

        x = torch.addcmul(x, length, torch.cos(heading))
        y = torch.addcmul(y, length, torch.sin(heading))
        heading = torch.addcmul(heading, arc, tangents[-1])
        steering = torch.add(steering, rate, alpha=DT).clamp(-MAX_STEERING, MAX_STEERING)
        track.append((x, y, heading, steering))
        tangents.append(torch.tan(steering))
        rates.append(rate)
    columns = (torch.stack(column) for column in zip(*track, strict=True))
    return *columns, torch.stack(rates), torch.stack(tangents)


def _float64(values: ArrayLike) -> Tensor:
    return torch.as_tensor(values).to(torch.float64)

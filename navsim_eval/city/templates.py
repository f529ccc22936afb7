"""Shapes of the things that annotations describe: cars, lorries, people, bicycles, cones …

Each is a template in a unit box (x, y from -½ to ½, z from 0 to 1, front at +x). A face's colour is a role (paint,
glass, tail lamp …) that is looked up per object (`objects`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from navsim_eval.city.meshes import BOX_QUADS, Part, box, circle, frustum, icosahedron, prism, profile, quads, sphere

ROLES = (
    "paint", "glass", "trim", "tire", "rim", "head_lamp", "tail_lamp", "plate", "cargo", "skin", "cloth", "trousers",
    "hair", "metal", "orange", "white", "sign", "red",
)  # fmt: skip
ROLE = {name: index for index, name in enumerate(ROLES)}


@dataclass(frozen=True)
class Template:
    """A shape in the unit box with a role per face.

    vertices: (V, 3) float32; faces: (F, 3) int32; role: (F,) int32 index into ROLES; group: (F,) int32
    """

    vertices: np.ndarray
    faces: np.ndarray
    role: np.ndarray
    group: np.ndarray


def _template(*parts: tuple[str, Part]) -> Template:
    """Put parts together and stretch them to fill the unit box."""
    vertices, faces, roles, groups = [], [], [], []
    v = g = 0
    for role, (points, triangles, group) in parts:
        vertices.append(points)
        faces.append(triangles + v)
        roles.append(np.full(len(triangles), ROLE[role]))
        groups.append(group + g)
        v += len(points)
        g += int(group.max()) + 1
    points = np.concatenate(vertices)
    low, high = points.min(0), points.max(0)
    return Template(
        ((points - low) / (high - low) - np.array([0.5, 0.5, 0.0])).astype(np.float32),
        np.concatenate(faces).astype(np.int32),
        np.concatenate(roles).astype(np.int32),
        np.concatenate(groups).astype(np.int32),
    )


def _wheels(x: Sequence[float], radius: tuple[float, float]) -> list[tuple[str, Part]]:
    """Pairs of wheels at `x`; radius: along x and z in unit-box lengths."""
    parts: list[tuple[str, Part]] = []
    for centre in x:
        for inner, outer in ((0.36, 0.5), (-0.36, -0.5)):
            for role, scale, y in (("tire", 1.0, 0.992 * outer), ("rim", 0.55, outer)):
                ring = circle(1.0, 10) * np.array([radius[0], radius[1]]) * scale + np.array([centre, radius[1]])
                parts.append((role, _disc(ring, y)))
            tread = circle(1.0, 10) * np.array(radius) + np.array([centre, radius[1]])
            parts.append(("tire", _tube(tread, inner, 0.992 * outer)))
    return parts


def _disc(ring: np.ndarray, y: float) -> Part:
    k = len(ring)
    vertices = np.c_[ring[:, 0], np.full(k, np.clip(y, -0.5, 0.5)), ring[:, 1]]
    fan = np.stack([np.zeros(k - 2, np.int64), np.arange(1, k - 1), np.arange(2, k)], axis=1)
    return vertices, fan if y < 0 else fan[:, ::-1], np.zeros(k - 2, np.int64)


def _tube(ring: np.ndarray, y0: float, y1: float) -> Part:
    k = len(ring)
    low, high = min(y0, y1), max(y0, y1)
    vertices = np.concatenate([np.c_[ring[:, 0], np.full(k, y, float), ring[:, 1]] for y in (low, high)])
    i = np.arange(k)
    return quads(vertices, np.stack([i, i + k, (i + 1) % k + k, (i + 1) % k], axis=1))


def _lamps(z0: float, z1: float, width: float = 0.13, front: float = 0.5, rear: float = -0.5) -> list[tuple[str, Part]]:
    parts: list[tuple[str, Part]] = []
    for side in (1.0, -1.0):
        y0, y1 = sorted((side * 0.47, side * (0.47 - width)))
        parts.append(("head_lamp", box((front - 0.012, y0, z0), (front, y1, z1))))
        parts.append(("tail_lamp", box((rear, y0, z0 + 0.04), (rear + 0.012, y1, z1 + 0.06))))
    return parts


def _car(cabin: tuple[float, float], roof: tuple[float, float], hood: float, deck: float) -> Template:
    """A passenger car. cabin, roof: where the windows start below and end above (x rear, x front); hood and deck: the
    height of the body before and behind the cabin."""
    belt = max(hood, deck)
    body = np.array(
        [[-0.494, 0.30], [-0.488, deck], [cabin[0], belt], [cabin[1], belt], [0.466, hood - 0.06],
         [0.494, hood - 0.16], [0.494, 0.16], [0.466, 0.11], [-0.466, 0.11], [-0.494, 0.16]]
    )  # fmt: skip
    house = frustum((cabin[0], -0.47, belt), (cabin[1], 0.47, 1.0), (roof[0], roof[1], -0.39, 0.39))
    shell, faces, group = house
    panes = []
    for quad, margin in ((0, 0.10), (1, 0.06), (2, 0.06), (3, 0.06)):
        corners = shell[BOX_QUADS[quad]]
        centre = corners.mean(0)
        outward = np.cross(corners[1] - corners[0], corners[2] - corners[0])
        pane = centre + (corners - centre) * (1.0 - 2 * margin) + 0.004 * outward / np.linalg.norm(outward)
        panes.append(("glass", quads(pane, np.array([[0, 1, 2, 3]]))))
    pillar = 0.5 * (cabin[0] + cabin[1])
    posts = [
        ("paint", frustum((pillar - 0.01, s - 0.008, belt), (pillar + 0.01, s + 0.008, 0.98),
                          (pillar - 0.01, pillar + 0.01, s * 0.845 - 0.008, s * 0.845 + 0.008)))
        for s in (0.472, -0.472)
    ]  # fmt: skip
    return _template(
        ("paint", profile(body, 0.488)),
        ("paint", (shell, faces, group)),
        *panes,
        *posts,
        ("trim", box((0.486, -0.45, 0.12), (0.498, 0.45, 0.25))),
        ("trim", box((-0.498, -0.46, 0.15), (-0.486, 0.46, 0.27))),
        ("trim", box((0.488, -0.28, hood - 0.30), (0.4975, 0.28, hood - 0.19))),
        ("plate", box((-0.4985, -0.14, 0.34), (-0.49, 0.14, 0.43))),
        ("plate", box((0.49, -0.14, 0.26), (0.4995, 0.14, 0.32))),
        *_lamps(hood - 0.31, hood - 0.18),
        *(("trim", box((cabin[1] - 0.06, s * 0.5 - (0.05 if s > 0 else 0.0), belt - 0.01),
                        (cabin[1] - 0.02, s * 0.5 + (0.05 if s < 0 else 0.0), belt + 0.09))) for s in (1.0, -1.0)),
        *_wheels((-0.30, 0.31), (0.073, 0.215)),
    )  # fmt: skip


def _van() -> Template:
    body = np.array(
        [[-0.494, 0.12], [-0.494, 0.94], [-0.465, 1.0], [0.24, 1.0], [0.40, 0.56], [0.494, 0.46], [0.494, 0.14],
         [0.46, 0.10]]
    )  # fmt: skip
    slope = np.array([[0.25, 0.97], [0.395, 0.575]])
    windshield = np.array(
        [[slope[1, 0], -0.42, slope[1, 1]], [slope[1, 0], 0.42, slope[1, 1]],
         [slope[0, 0], 0.40, slope[0, 1]], [slope[0, 0], -0.40, slope[0, 1]]]
    ) + np.array([0.006, 0.0, 0.003])  # fmt: skip
    side = np.array([[0.03, 0.58], [0.36, 0.58], [0.22, 0.93], [0.03, 0.93]])
    panes = [
        ("glass", quads(windshield, np.array([[0, 1, 2, 3]]))),
        ("glass", quads(np.c_[side[:, 0], np.full(4, -0.4905), side[:, 1]], np.array([[0, 1, 2, 3]]))),
        ("glass", quads(np.c_[side[:, 0], np.full(4, 0.4905), side[:, 1]], np.array([[3, 2, 1, 0]]))),
        ("glass", box((-0.498, -0.40, 0.58), (-0.49, -0.03, 0.90))),
        ("glass", box((-0.498, 0.03, 0.58), (-0.49, 0.40, 0.90))),
    ]
    return _template(
        ("paint", profile(body, 0.488)),
        *panes,
        ("trim", box((-0.5, -0.46, 0.11), (-0.49, 0.46, 0.20))),
        ("trim", box((0.49, -0.46, 0.12), (0.5, 0.46, 0.22))),
        ("plate", box((-0.499, -0.12, 0.26), (-0.49, 0.12, 0.33))),
        *_lamps(0.32, 0.42, width=0.09),
        *_wheels((-0.31, 0.31), (0.062, 0.15)),
    )


def _truck() -> Template:
    """A lorry: cab in front, box body behind."""
    glass = np.array([[0.497, -0.42, 0.50], [0.497, 0.42, 0.50], [0.497, 0.42, 0.74], [0.497, -0.42, 0.74]])
    return _template(
        ("paint", box((0.27, -0.465, 0.12), (0.494, 0.465, 0.80))),
        ("glass", quads(glass, np.array([[0, 1, 2, 3]]))),
        ("glass", box((0.37, -0.4715, 0.50), (0.47, 0.4715, 0.72))),
        ("cargo", box((-0.496, -0.5, 0.24), (0.25, 0.5, 1.0))),
        ("trim", box((-0.49, -0.30, 0.12), (0.27, 0.30, 0.24))),
        ("trim", box((0.49, -0.46, 0.12), (0.5, 0.46, 0.22))),
        ("trim", box((-0.4985, -0.008, 0.26), (-0.49, 0.008, 0.97))),
        *(("tail_lamp", box((-0.5, s - 0.08, 0.17), (-0.485, s + 0.08, 0.225))) for s in (0.36, -0.36)),
        *(("head_lamp", box((0.496, s - 0.08, 0.24), (0.5, s + 0.08, 0.31))) for s in (0.36, -0.36)),
        ("plate", box((-0.492, -0.10, 0.17), (-0.486, 0.10, 0.21))),
        *_wheels((-0.36, -0.22, 0.36), (0.052, 0.135)),
    )


def _bus() -> Template:
    side = [
        ("glass", box((x, -0.497, 0.48), (x + 0.115, 0.497, 0.84))) for x in np.linspace(-0.47, 0.35, 7)
    ]
    return _template(
        ("paint", box((-0.494, -0.492, 0.10), (0.494, 0.492, 1.0))),
        *side,
        ("glass", box((0.49, -0.45, 0.34), (0.4985, 0.45, 0.86))),
        ("glass", box((-0.4985, -0.38, 0.52), (-0.49, 0.38, 0.84))),
        ("trim", box((-0.4985, -0.48, 0.10), (-0.49, 0.48, 0.18))),
        *_lamps(0.20, 0.28, width=0.10),
        *_wheels((-0.27, 0.30), (0.042, 0.155)),
    )


def _pedestrian() -> Template:
    limbs = []
    for side, swing in ((1.0, 0.18), (-1.0, -0.18)):
        y = side * 0.16
        leg = frustum((swing - 0.14, y - 0.13, 0.0), (swing + 0.16, y + 0.13, 0.48), (-0.16, 0.16, y - 0.14, y + 0.14))
        limbs.append(("trousers", leg))
        limbs.append(("trim", box((swing - 0.14, y - 0.13, 0.0), (swing + 0.28, y + 0.13, 0.045))))
        a = side * 0.40
        shoulder = (-0.13, 0.13, a - 0.09, a + 0.09)
        limbs.append(("cloth", frustum((-swing - 0.12, a - 0.10, 0.42), (-swing + 0.12, a + 0.10, 0.80), shoulder)))
        limbs.append(("skin", box((-swing - 0.10, a - 0.08, 0.38), (-swing + 0.10, a + 0.08, 0.42))))
    head, faces, group = sphere()
    neck = ("skin", box((-0.09, -0.09, 0.80), (0.09, 0.09, 0.86)))
    skull = ("skin", (head * np.array([0.21, 0.19, 0.073]) + np.array([0.02, 0.0, 0.915]), faces, group))
    hair = ("hair", (head * np.array([0.205, 0.195, 0.058]) + np.array([-0.035, 0.0, 0.942]), faces, group))
    torso = ("cloth", frustum((-0.2, -0.26, 0.46), (0.2, 0.26, 0.83), (-0.2, 0.2, -0.36, 0.36)))
    return _template(torso, neck, skull, hair, *limbs)


def _bicycle() -> Template:
    parts: list[tuple[str, Part]] = []
    for centre in (-0.30, 0.30):
        ring = circle(1.0, 12) * np.array([0.19, 0.20]) + np.array([centre, 0.20])
        hub = circle(1.0, 12) * np.array([0.165, 0.175]) + np.array([centre, 0.20])
        for y in (0.045, -0.045):
            parts.append(("tire", _disc(ring, y)))
            parts.append(("metal", _disc(hub, y * 1.1)))
        parts.append(("tire", _tube(ring, -0.045, 0.045)))
    tubes = [((-0.30, 0.20), (-0.06, 0.24)), ((-0.06, 0.24), (0.24, 0.46)), ((-0.10, 0.46), (0.24, 0.48)),
             ((0.30, 0.20), (0.22, 0.56)), ((-0.06, 0.24), (-0.12, 0.52))]  # fmt: skip
    for (x0, z0), (x1, z1) in tubes:
        along = np.array([x1 - x0, z1 - z0])
        across = 0.016 * np.array([-along[1], along[0]]) / np.linalg.norm(along)
        ends = np.array([[x0, z0], [x1, z1]])
        outline = np.concatenate([ends + across, (ends - across)[::-1]])
        parts.append(("red", profile(outline, 0.04)))
    parts.append(("trim", box((0.16, -0.5, 0.555), (0.20, 0.5, 0.575))))
    parts.append(("trim", box((-0.20, -0.16, 0.515), (-0.05, 0.16, 0.545))))
    torso = frustum((-0.19, -0.30, 0.52), (0.0, 0.30, 0.84), (-0.02, 0.14, -0.36, 0.36))
    head, faces, group = icosahedron()
    parts += [
        ("cloth", torso),
        ("skin", (head * np.array([0.075, 0.19, 0.07]) + np.array([0.11, 0.0, 0.90]), faces, group)),
        ("white", (head * np.array([0.085, 0.22, 0.055]) + np.array([0.095, 0.0, 0.945]), faces, group)),
    ]
    for side in (1.0, -1.0):
        y = side * 0.2
        bent = 0.05 * side
        parts.append(("trousers", frustum((-0.08 + bent, y - 0.1, 0.14), (0.0 + bent, y + 0.1, 0.54),
                                          (-0.16, -0.02, y - 0.11, y + 0.11))))  # fmt: skip
        a = side * 0.38
        shoulder = (0.0, 0.10, a - 0.08, a + 0.08)
        parts.append(("cloth", frustum((0.13, a - 0.09, 0.57), (0.18, a + 0.09, 0.80), shoulder)))
    return _template(*parts)


def _cone() -> Template:
    ring = circle(1.0, 10)
    bands = [("orange", 0.30, 0.06, 0.40, 0.76), ("white", 0.233, 0.40, 0.58, 0.76), ("orange", 0.177, 0.58, 1.0, 0.2)]
    parts: list[tuple[str, Part]] = [("orange", box((-0.5, -0.5, 0.0), (0.5, 0.5, 0.06)))]
    parts += [(role, prism(ring * radius * 1.3, z0, z1, taper)) for role, radius, z0, z1, taper in bands]
    return _template(*parts)


def _barrier() -> Template:
    """A board barrier across its longer side (unit y or x alike): striped boards on feet."""
    parts: list[tuple[str, Part]] = []
    for z0, z1 in ((0.56, 1.0), (0.16, 0.46)):
        edges = np.linspace(-0.5, 0.5, 9)
        for i in range(8):
            parts.append(("orange" if i % 2 else "white", box((-0.34, edges[i], z0), (0.34, edges[i + 1], z1))))
    for y in (-0.42, 0.42):
        parts.append(("metal", box((-0.5, y - 0.05, 0.0), (0.5, y + 0.05, 0.12))))
        parts.append(("metal", box((-0.2, y - 0.03, 0.0), (0.2, y + 0.03, 0.9))))
    return _template(*parts)


def _sign() -> Template:
    """A construction sign: orange board on a post with feet."""
    board = np.array([[0.0, 0.42], [0.5, 0.71], [0.0, 1.0], [-0.5, 0.71]])

    def diamond(scale: float, x: float) -> Part:
        centre = np.array([0.0, 0.71])
        points = centre + (board - centre) * scale
        vertices = np.c_[np.full(4, x), points]
        order = np.array([[0, 1, 2, 3]]) if x > 0 else np.array([[3, 2, 1, 0]])
        return quads(vertices, order)

    parts: list[tuple[str, Part]] = [("metal", box((-0.12, -0.06, 0.0), (0.12, 0.06, 0.72)))]
    for x in (0.15, -0.15):
        parts.append(("sign", diamond(1.0, x)))
        parts.append(("trim", diamond(0.34, x * 1.1)))
    parts.append(("metal", box((-0.5, -0.30, 0.0), (0.5, -0.22, 0.05))))
    parts.append(("metal", box((-0.5, 0.22, 0.0), (0.5, 0.30, 0.05))))
    return _template(*parts)


def _crate() -> Template:
    """Anything else: a bin with a lid."""
    return _template(
        ("metal", frustum((-0.42, -0.42, 0.0), (0.42, 0.42, 0.86), (-0.48, 0.48, -0.48, 0.48))),
        ("trim", box((-0.5, -0.5, 0.86), (0.5, 0.5, 1.0))),
    )


@functools.lru_cache(maxsize=1)
def templates() -> dict[str, Template]:
    """All templates by name."""
    return {
        "sedan": _car((-0.34, 0.22), (-0.22, 0.06), 0.66, 0.68),
        "hatch": _car((-0.47, 0.20), (-0.38, 0.05), 0.66, 0.66),
        "suv": _car((-0.485, 0.20), (-0.43, 0.08), 0.64, 0.64),
        "van": _van(),
        "truck": _truck(),
        "bus": _bus(),
        "pedestrian": _pedestrian(),
        "bicycle": _bicycle(),
        "traffic_cone": _cone(),
        "barrier": _barrier(),
        "czone_sign": _sign(),
        "generic_object": _crate(),
    }

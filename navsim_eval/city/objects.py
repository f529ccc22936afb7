"""Annotated objects as meshes: templates stretched to fill the annotation's box exactly, coloured by track token."""

from __future__ import annotations

import zlib

import numpy as np

from navsim_eval.city.meshes import FLAT, Mesh, transform
from navsim_eval.city.templates import ROLE, ROLES, Template, templates

_PAINTS = np.array(
    [[236, 236, 234], [222, 223, 225], [176, 180, 184], [120, 124, 129], [70, 72, 76], [46, 47, 51], [150, 24, 26],
     [186, 40, 36], [32, 58, 112], [58, 98, 156], [92, 110, 100], [40, 74, 56], [170, 150, 118], [206, 160, 44]],
    np.float32,
)  # fmt: skip
_CLOTHES = np.array(
    [[190, 44, 44], [38, 62, 130], [222, 220, 210], [46, 46, 50], [76, 120, 70], [214, 170, 60], [120, 72, 140],
     [70, 140, 160], [180, 110, 80], [110, 112, 116]],
    np.float32,
)  # fmt: skip
_TROUSERS = np.array([[40, 44, 62], [70, 72, 78], [118, 100, 78], [30, 30, 32], [60, 80, 120]], np.float32)
_SKINS = np.array([[236, 196, 168], [206, 158, 124], [150, 104, 76], [98, 66, 48]], np.float32)
_HAIRS = np.array([[40, 30, 24], [96, 66, 40], [170, 136, 84], [20, 20, 22], [130, 126, 122]], np.float32)
_FIXED = {
    "glass": (58, 70, 82), "trim": (34, 35, 38), "tire": (26, 26, 28), "rim": (150, 153, 158),
    "head_lamp": (238, 240, 235), "tail_lamp": (150, 16, 18), "plate": (240, 240, 226), "metal": (128, 131, 136),
    "orange": (240, 96, 20), "white": (238, 238, 236), "sign": (246, 136, 20), "red": (170, 34, 38),
}  # fmt: skip
_BRAKE_LAMP = (255, 42, 30)


def object_hash(token: str, salt: int = 0) -> int:
    """A number that depends on a track token alone, the same in every process."""
    return zlib.crc32(f"{salt}:{token}".encode())


def object_template(name: str, length: float, width: float, height: float, token: str) -> Template:
    """The shape for an annotated class and size [m]."""
    known = templates()
    if name != "vehicle":
        return known.get(name, known["generic_object"])
    if length > 8.5:
        return known["bus" if object_hash(token, 3) % 5 < 2 else "truck"]
    if length > 5.8 or height > 2.3:
        return known["truck" if length > 6.8 and height > 2.4 else "van"]
    if height > 1.68:
        return known["suv"]
    return known["sedan" if object_hash(token, 3) % 5 < 3 else "hatch"]


def object_palette(token: str, braking: bool) -> tuple[np.ndarray, np.ndarray]:
    """Colour (roles, 3) float32 and glow (roles,) bool of an object's roles."""
    colors = np.zeros((len(ROLES), 3), np.float32)
    for role, color in _FIXED.items():
        colors[ROLE[role]] = color
    choice = object_hash(token)
    colors[ROLE["paint"]] = _PAINTS[choice % len(_PAINTS)]
    colors[ROLE["cargo"]] = (232, 232, 228) if choice % 3 else _PAINTS[(choice // 7) % len(_PAINTS)]
    colors[ROLE["cloth"]] = _CLOTHES[(choice // 11) % len(_CLOTHES)]
    colors[ROLE["trousers"]] = _TROUSERS[(choice // 13) % len(_TROUSERS)]
    colors[ROLE["skin"]] = _SKINS[(choice // 17) % len(_SKINS)]
    colors[ROLE["hair"]] = _HAIRS[(choice // 19) % len(_HAIRS)]
    glow = np.zeros(len(ROLES), bool)
    glow[ROLE["head_lamp"]] = True
    if braking:
        colors[ROLE["tail_lamp"]] = _BRAKE_LAMP
        glow[ROLE["tail_lamp"]] = True
    return colors, glow


def object_mesh(name: str, box_values: np.ndarray, token: str, braking: bool = False) -> Mesh:
    """The annotated object as a mesh in the frame of its box.

    box_values: (7,) centre x, y, z, length, width, height [m], heading [rad], as in `Annotations.boxes`
    """
    x, y, z, length, width, height, heading = (float(v) for v in box_values)
    if name == "barrier" and length > width:  # boards stand across the shorter side
        length, width, heading = width, length, heading + np.pi / 2.0
    shape = object_template(name, length, width, height, token)
    colors, glow = object_palette(token, braking)
    vertices = shape.vertices * np.array([length, width, height], np.float32)
    count = len(shape.faces)
    mesh = Mesh(
        vertices,
        shape.faces,
        colors[shape.role],
        glow[shape.role],
        np.tile(np.array([1.0, 0.0, 0.0, FLAT], np.float32), (count, 1)),
        shape.group,
    )
    return transform(mesh, np.array([x, y]), heading, z - height / 2.0)

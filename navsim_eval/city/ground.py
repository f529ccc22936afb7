"""The ground as a picture: asphalt, lane markings, crosswalks, stop lines, sidewalks and grass, painted from the map.

The plane is cut into square tiles at five resolutions, each painted when first needed and kept for a while. A tile
follows from the map and the seed alone, so the order in which tiles are asked for cannot change a pixel.

Coordinates: global (UTM) metres. Texel (row, column) of a tile covers [x0 + column·r, +r] × [y0 + row·r, +r].
"""

from __future__ import annotations

import functools
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import shapely

from navsim_eval.city.approaches import ROAD_LAYERS, Approaches
from navsim_eval.city.canvas import Canvas, Rings, polygon_rings
from navsim_eval.city.markings import BAR_M, Markings, rows_near
from navsim_eval.city.textures import noise
from navsim_eval.formats.maps import RoadMap

TILE = 384  # texels per side of a tile
WINDOW = 768  # texels per side of a window
TEXEL_M = 0.04  # of level 0; each level doubles it
LEVELS = 4
CURB_HEIGHT_M = 0.13
CURB_COLOR = np.array([158, 156, 150], np.uint8)

_GRASS, _WALKWAY, _CURB = (96, 113, 64), (166, 162, 154), (184, 181, 173)
_ASPHALT, _CARPARK = (86, 87, 90), (98, 98, 98)
_WHITE, _YELLOW = (226, 226, 220), (222, 178, 52)
_WORN = np.full((TILE, TILE), 235, np.uint8)
_LINE_M, _CENTER_LINE_M, _CENTER_GAP_M, _STOP_LINE_M = 0.15, 0.40, 0.14, 0.40
_CURB_STONE_M = 0.15
_SHADE = 0.38  # share of the light that static shadows take
_GRAIN = 1024  # texels per side of the noise that roughens the ground, at the resolution of level 0
_MAX_TILES = 120

ShadowSource = Callable[[float, float, float, float], Sequence[np.ndarray]]


@dataclass(frozen=True)
class Window:
    """A square piece of ground.

    pixels: (WINDOW, WINDOW, 4) uint8 R, G, B and 255 where the ground is a raised sidewalk
    origin: (2,) float64 global position of the corner of texel (0, 0);  texel: side of a texel [m]
    """

    pixels: np.ndarray
    origin: np.ndarray
    texel: float


class GroundPainter:
    """Paints and keeps ground tiles of one map.

    approaches: lane ends, where stop lines are
    shadows: called with a square (x0, y0, x1, y1), gives polygons (K, 2) of static shadows that may fall into it
    """

    def __init__(
        self, road_map: RoadMap, approaches: Approaches, seed: int = 0, shadows: ShadowSource | None = None
    ):
        self._map = road_map
        self._markings = Markings(road_map, approaches)
        self._seed = seed
        self._shadows = shadows
        self._tiles: OrderedDict[tuple[int, int, int], np.ndarray] = OrderedDict()
        self._rings: dict[str, dict[int, list[Rings]]] = defaultdict(dict)  # layer → row → its polygons

    def window(self, level: int, x: float, y: float) -> Window:
        """A fresh copy of the ground around (x, y), which is at most half a texel from the window's centre."""
        texel = TEXEL_M * 2**level
        column, row = round(x / texel) - WINDOW // 2, round(y / texel) - WINDOW // 2
        pixels = np.empty((WINDOW, WINDOW, 4), np.uint8)
        for iy, rows_out, rows_in in _pieces(row):
            for ix, columns_out, columns_in in _pieces(column):
                pixels[rows_out, columns_out] = self._tile(level, ix, iy)[rows_in, columns_in]
        return Window(pixels, np.array([column * texel, row * texel]), texel)

    def _tile(self, level: int, ix: int, iy: int) -> np.ndarray:
        key = (level, ix, iy)
        if key in self._tiles:
            self._tiles.move_to_end(key)
            return self._tiles[key]
        tile = self._paint(level, ix, iy)
        self._tiles[key] = tile
        if len(self._tiles) > _MAX_TILES:
            self._tiles.popitem(last=False)
        return tile

    def _paint(self, level: int, ix: int, iy: int) -> np.ndarray:
        """(TILE, TILE, 4) uint8 picture of one tile, in layers from the grass up."""
        side = TILE * TEXEL_M * 2**level
        canvas = Canvas(ix * side, iy * side, side, TILE)
        hard, grass = _grain(level, ix, iy, self._seed)
        colors = cv2.multiply(grass, _filled(_GRASS), scale=1.0 / 128.0)
        raised, curb, parking, road = self._surfaces(canvas)
        for mask, color in ((raised, _WALKWAY), (curb, _CURB), (parking, _CARPARK), (road, _ASPHALT)):
            if cv2.countNonZero(mask):
                _lay(colors, mask, cv2.multiply(hard, _filled(color), scale=1.0 / 128.0))
        white, yellow = self._paint_masks(canvas)
        for mask, color in ((white, _WHITE), (yellow, _YELLOW)):
            if cv2.countNonZero(mask):
                # Worn paint lets some of the ground through.
                _lay(colors, cv2.multiply(mask, _WORN, scale=1.0 / 255.0), _filled(color))
        if self._shadows is not None:
            self._cast_shadows(colors, canvas)
        return cv2.merge([*cv2.split(colors), raised])

    def _surfaces(self, canvas: Canvas) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Coverage (TILE, TILE) uint8 of raised sidewalk, its curb stones, car park and road. Roads cut sidewalks."""
        raised, curb, parking, road = (canvas.blank() for _ in range(4))
        walkways = self._polygons("walkways", canvas)
        canvas.fill(raised, walkways)
        if canvas.texel < _CURB_STONE_M:
            canvas.stroke(curb, [ring for rings in walkways for ring in rings], 2.0 * _CURB_STONE_M)
        canvas.fill(parking, self._polygons("carpark_areas", canvas))
        for layer in ROAD_LAYERS:
            canvas.fill(road, self._polygons(layer, canvas))
        raised = cv2.min(raised, 255 - cv2.max(road, parking))
        return raised, cv2.min(curb, raised), parking, road

    def _paint_masks(self, canvas: Canvas) -> tuple[np.ndarray, np.ndarray]:
        """Coverage (TILE, TILE) uint8 of white and of yellow paint."""
        white, yellow = canvas.blank(), canvas.blank()
        lines, centers = self._markings.lane_lines(canvas.bounds)
        canvas.stroke(white, lines, _LINE_M)
        if canvas.texel <= _CENTER_GAP_M:
            canvas.stroke(yellow, centers, _CENTER_LINE_M)
            canvas.stroke(yellow, centers, _CENTER_GAP_M, 0)
        else:
            canvas.stroke(yellow, centers, _CENTER_LINE_M - _CENTER_GAP_M)
        for polygon, bars in self._markings.crosswalks(canvas.bounds):
            self._zebra(white, canvas, polygon, bars)
        canvas.stroke(white, self._markings.stop_lines(canvas.bounds), _STOP_LINE_M)
        return white, yellow

    def _zebra(self, white: np.ndarray, canvas: Canvas, polygon: shapely.Geometry, bars: np.ndarray) -> None:
        inside, rings = canvas.blank(), polygon_rings(polygon)
        if BAR_M < 2.0 * canvas.texel:  # too fine to tell bars from gaps
            canvas.fill(inside, rings, 128)
        else:
            striped = canvas.blank()
            canvas.fill(inside, rings)
            canvas.fill_rings(striped, bars)
            inside = cv2.min(inside, striped)
        cv2.max(white, inside, dst=white)

    def _cast_shadows(self, colors: np.ndarray, canvas: Canvas) -> None:
        rings = self._shadows(*canvas.bounds)
        if rings:
            mask = canvas.blank()
            canvas.fill_rings(mask, rings)
            lit = 255 - cv2.multiply(mask, np.full_like(mask, 255), scale=_SHADE / 255.0)
            cv2.multiply(colors, cv2.cvtColor(lit, cv2.COLOR_GRAY2RGB), dst=colors, scale=1.0 / 255.0)

    def _polygons(self, layer_name: str, canvas: Canvas) -> list[Rings]:
        layer, known = self._map.layer(layer_name), self._rings[layer_name]
        rows = rows_near(layer, canvas.bounds)
        for row in rows:
            if row not in known:
                known[row] = polygon_rings(layer.geometries[row])
        return [rings for row in rows for rings in known[row]]


def _pieces(start: int) -> list[tuple[int, slice, slice]]:
    """How WINDOW texels from `start` on are put together of tiles: (tile, slice of the window, slice of the tile)."""
    pieces = []
    for tile in range(start // TILE, (start + WINDOW - 1) // TILE + 1):
        low, high = max(start, tile * TILE), min(start + WINDOW, (tile + 1) * TILE)
        pieces.append((tile, slice(low - start, high - start), slice(low - tile * TILE, high - tile * TILE)))
    return pieces


@functools.lru_cache(maxsize=2)
def _roughness(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Brightness factors (_GRAIN, _GRAIN) float32 of hard ground and of grass, tileable."""
    hard = 1.0 + 0.035 * noise(_GRAIN, 0.15, seed + 1) + 0.035 * noise(_GRAIN, 2.2, seed + 2)
    grass = 1.0 + 0.10 * noise(_GRAIN, 0.8, seed + 3) + 0.07 * noise(_GRAIN, 2.2, seed + 4)
    return hard, grass


@functools.lru_cache(maxsize=2 * LEVELS)
def _grain_fields(level: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Brightness factors · 128 uint8 of hard ground and of grass, tileable, in the texels of a level."""
    size = _GRAIN >> level
    small = (cv2.resize(field, (size, size), interpolation=cv2.INTER_AREA) for field in _roughness(seed))
    hard, grass = (np.clip(np.round(field * 128), 0, 255).astype(np.uint8) for field in small)
    return hard, grass


def _grain(level: int, ix: int, iy: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(TILE, TILE, 3) uint8 grain of hard ground and of grass on tile (ix, iy), 128 is neutral."""
    fields = _grain_fields(level, seed)
    rows = np.arange(iy * TILE, (iy + 1) * TILE) % len(fields[0])
    columns = np.arange(ix * TILE, (ix + 1) * TILE) % len(fields[0])
    hard, grass = (
        cv2.cvtColor(np.take(np.take(field, rows, axis=0), columns, axis=1), cv2.COLOR_GRAY2RGB) for field in fields
    )
    return hard, grass


@functools.lru_cache(maxsize=16)
def _filled(color: tuple[int, int, int]) -> np.ndarray:
    """(TILE, TILE, 3) uint8 of one colour; not to be written to."""
    return np.full((TILE, TILE, 3), color, np.uint8)


def _lay(colors: np.ndarray, mask: np.ndarray, layer: np.ndarray) -> None:
    """Blend `layer` over `colors` (TILE, TILE, 3) in place by its coverage `mask` (TILE, TILE), 0 to 255."""
    over = cv2.cvtColor(mask, cv2.COLOR_GRAY2RGB)
    under = cv2.multiply(colors, cv2.bitwise_not(over), scale=1.0 / 255.0)
    cv2.add(under, cv2.multiply(layer, over, scale=1.0 / 255.0), dst=colors)

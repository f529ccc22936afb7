"""Camera images and LiDAR sweeps: files opened only when somebody asks, and refused when they are not whole.

Images are JPEG, read as RGB. Sweeps are PCD files with a text header and packed binary rows; points lie in the ego
(rear-axle) frame at the time of the sweep, all LiDARs merged.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from navsim_eval.errors import DataError
from navsim_eval.files import atomic_write

POINT_FIELDS = ("x", "y", "z", "intensity", "ring", "lidar_info")
_STORED_DTYPE = np.dtype(
    [("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("intensity", "u1"), ("ring", "u1"), ("lidar_info", "u1")]
)
_JPEG_START, _JPEG_SCAN, _JPEG_END = b"\xff\xd8", b"\xff\xda", b"\xff\xd9"
_HEADER_LIMIT = 4096  # bytes; real headers are about 200
_REMEDY_MISSING = "download the sensor files of this split, or check data.root"
_REMEDY_DAMAGED = "download the file again"


def read_image(path: Path | str) -> np.ndarray:
    """(H, W, 3) uint8 RGB image. Raises DataError for an absent, truncated or undecodable file.

    A JPEG that ends early is an error here although decoders may return it half grey.
    """
    content = _read_bytes(path)
    if not content:
        raise DataError(path, "the image file is empty", remedy=_REMEDY_DAMAGED)
    if content.startswith(_JPEG_START) and content.rfind(_JPEG_END) < content.rfind(_JPEG_SCAN):
        raise DataError(path, "the image is truncated", remedy=_REMEDY_DAMAGED)
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    image = cv2.imdecode(np.frombuffer(content, np.uint8), flags)
    if image is None:
        raise DataError(path, "not an image that can be decoded", remedy=_REMEDY_DAMAGED)
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def write_image(path: Path | str, image: np.ndarray, quality: int = 90) -> Path:
    """Write a (H, W, 3) uint8 RGB image as JPEG, atomically. Returns the path."""
    options = [cv2.IMWRITE_JPEG_QUALITY, quality]
    encoded, content = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)
    if not encoded:
        raise ValueError(f"image of shape {image.shape} cannot be encoded")
    return atomic_write(path, content.tobytes())


def read_point_cloud(path: Path | str) -> np.ndarray:
    """(6, N) float32: x, y, z [m, ego frame], intensity, ring, LiDAR id.

    The row layout comes from the file's header. Bytes behind the last row are ignored (files are zero padded).
    Raises DataError for an absent or truncated file and for a header that is not understood.
    """
    content = _read_bytes(path)
    header, body = _split_header(content, path)
    dtype = _row_dtype(header, path)
    count = _integer(header, "POINTS", path)
    if len(content) - body < count * dtype.itemsize:
        present = (len(content) - body) // dtype.itemsize
        raise DataError(path, f"truncated: {present} of {count} points present", remedy=_REMEDY_DAMAGED)
    rows = np.frombuffer(content, dtype=dtype, count=count, offset=body)
    points = np.empty((len(POINT_FIELDS), count), dtype=np.float32)
    for index, field in enumerate(POINT_FIELDS):
        points[index] = rows[field]
    return points


def write_point_cloud(path: Path | str, points: np.ndarray) -> Path:
    """Write (6, N) points, rows as in `read_point_cloud`, in the layout of the published sweeps. Returns the path.

    x, y, z are stored as float32; intensity, ring and LiDAR id are rounded and clipped to one byte each.
    """
    points = np.asarray(points)
    if points.ndim != 2 or len(points) != len(POINT_FIELDS):
        raise ValueError(f"points of shape {points.shape} where (6, N) is expected")
    rows = np.empty(points.shape[1], dtype=_STORED_DTYPE)
    for field, values in zip(POINT_FIELDS, points, strict=True):
        rows[field] = values if field in "xyz" else np.clip(np.rint(values), 0, 255)
    header = "\n".join(
        (
            "# .PCD v0.7 - Point Cloud Data file format",
            "VERSION 0.7",
            f"FIELDS {' '.join(POINT_FIELDS)}",
            "SIZE 4 4 4 1 1 1",
            "TYPE F F F U U U",
            "COUNT 1 1 1 1 1 1",
            f"WIDTH {len(rows)}",
            "HEIGHT 1",
            "VIEWPOINT 0 0 0 1 0 0 0",
            f"POINTS {len(rows)}",
            "DATA binary\n",
        )
    )
    return atomic_write(path, header.encode("ascii") + rows.tobytes())


def _read_bytes(path: Path | str) -> bytes:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        raise DataError(path, "no such sensor file", remedy=_REMEDY_MISSING) from error
    except OSError as error:
        raise DataError(path, f"cannot be read ({error.strerror})", remedy=_REMEDY_DAMAGED) from error


def _split_header(content: bytes, path: Path | str) -> tuple[dict[str, list[str]], int]:
    """Header words by key, and the offset of the first row."""
    header: dict[str, list[str]] = {}
    position = 0
    while "DATA" not in header:
        end = content.find(b"\n", position, _HEADER_LIMIT)
        if end < 0:
            raise DataError(path, "no PCD header that ends in a DATA line", remedy=_REMEDY_DAMAGED)
        words = content[position:end].decode("ascii", errors="replace").split()
        position = end + 1
        if words and not words[0].startswith("#"):
            header[words[0].upper()] = words[1:]
    if header["DATA"] != ["binary"]:
        raise DataError(path, f"DATA {' '.join(header['DATA'])} is not supported", remedy="store it as DATA binary")
    return header, position


def _row_dtype(header: dict[str, list[str]], path: Path | str) -> np.dtype:
    columns = [header.get(key, []) for key in ("FIELDS", "SIZE", "TYPE")]
    counts = header.get("COUNT", ["1"] * len(columns[0]))
    if not columns[0] or len({len(column) for column in (*columns, counts)}) != 1:
        raise DataError(path, "FIELDS, SIZE, TYPE and COUNT differ in length", field="header", remedy=_REMEDY_DAMAGED)
    if any(count != "1" for count in counts):
        raise DataError(path, f"COUNT {' '.join(counts)} is not supported", field="header", remedy="use COUNT 1")
    kinds = {"I": "i", "U": "u", "F": "f"}
    try:
        names = ["lidar_info" if name == "lidar_id" else name for name in columns[0]]
        layout = zip(names, columns[1], columns[2], strict=True)
        dtype = np.dtype([(name, f"<{kinds[kind]}{size}") for name, size, kind in layout])
    except (KeyError, TypeError, ValueError) as error:
        problem = f"unknown field types {' '.join(columns[2])} of sizes {' '.join(columns[1])}"
        raise DataError(path, problem, field="header", remedy=_REMEDY_DAMAGED) from error
    missing = [field for field in POINT_FIELDS if field not in dtype.names]
    if missing:
        problem = f"field {missing[0]} is missing (present: {' '.join(columns[0])})"
        raise DataError(path, problem, field="header", remedy=_REMEDY_DAMAGED)
    return dtype


def _integer(header: dict[str, list[str]], key: str, path: Path | str) -> int:
    words = header.get(key, [])
    if len(words) != 1 or not words[0].isdigit():
        raise DataError(path, f"{key} is not a number", field="header", remedy=_REMEDY_DAMAGED)
    return int(words[0])

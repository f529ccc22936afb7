"""Camera images and LiDAR sweeps: files opened only when somebody asks, and refused when they are not whole.

Images are JPEG, read as RGB. Sweeps are PCD files with a text header and packed binary rows; points lie in the ego
(rear-axle) frame at the time of the sweep, all LiDARs merged.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from navsim_eval.errors import DataError
from navsim_eval.files import atomic_write

POINT_FIELDS = ("x", "y", "z", "intensity", "ring", "lidar_info")
_STORED_DTYPE = np.dtype(
    [("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("intensity", "u1"), ("ring", "u1"), ("lidar_info", "u1")]
)
_JPEG_START, _JPEG_SCAN, _JPEG_END = b"\xff\xd8", b"\xff\xda", b"\xff\xd9"
_IMAGE_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
_HEADER_LIMIT = 4096  # bytes; real headers are about 200
_REMEDY_MISSING = "download the sensor files of this split, or check data.root"
_REMEDY_DAMAGED = "download the file again"


def read_image(path: Path | str) -> np.ndarray:
    """(H, W, 3) uint8 RGB image. Raises DataError for an absent, truncated or undecodable file.

    A JPEG that ends early is an error here although decoders may return it half grey.
    """
    return decode_image(_read_bytes(path), path)


def decode_image(content: bytes, name: object, reduction: int = 1) -> np.ndarray:
    """The same for an encoded image in memory; `name` is what errors call it.

    reduction: 1, 2, 4 or 8. A JPEG is decoded at that fraction of its size, which skips most of the inverse cosine
    transforms; each pixel is then about the mean of a block (anti-aliased), and sizes are rounded up.
    """
    check_whole(content, name)
    try:
        image = Image.open(io.BytesIO(content))
        if reduction > 1:
            image.draft("RGB", (image.width // reduction, image.height // reduction))
        return np.array(image.convert("RGB"))
    except _IMAGE_ERRORS as error:
        raise DataError(name, f"not an image that can be decoded ({error})", remedy=_REMEDY_DAMAGED) from error


def encoded_size(content: bytes, name: object) -> tuple[int, int]:
    """Rows and columns of an encoded image, from its header alone. Raises DataError."""
    check_whole(content, name)
    try:
        return Image.open(io.BytesIO(content)).size[::-1]
    except _IMAGE_ERRORS as error:
        raise DataError(name, f"not an image that can be decoded ({error})", remedy=_REMEDY_DAMAGED) from error


def check_whole(content: bytes, name: object) -> None:
    """Raises DataError for no content at all, and for a JPEG that ends before its end marker."""
    if not content:
        raise DataError(name, "the image file is empty", remedy=_REMEDY_DAMAGED)
    if content.startswith(_JPEG_START):
        end = content.rfind(_JPEG_END)
        if end < 0 or content.find(_JPEG_SCAN, end) >= 0:  # a thumbnail has an end marker of its own
            raise DataError(name, "the image is truncated", remedy=_REMEDY_DAMAGED)


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
    return decode_point_cloud(_read_bytes(path), path)


def decode_point_cloud(content: bytes, name: object, fields: Sequence[str] = POINT_FIELDS) -> np.ndarray:
    """The same for a sweep in memory, (len(fields), N); `name` is what errors call it."""
    header, body = _split_header(content, name)
    dtype = _row_dtype(header, name)
    count = _integer(header, "POINTS", name)
    if len(content) - body < count * dtype.itemsize:
        present = (len(content) - body) // dtype.itemsize
        raise DataError(name, f"truncated: {present} of {count} points present", remedy=_REMEDY_DAMAGED)
    rows = np.frombuffer(content, dtype=dtype, count=count, offset=body)
    points = np.empty((len(fields), count), dtype=np.float32)
    for index, field in enumerate(fields):
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


def _split_header(content: bytes, path: object) -> tuple[dict[str, list[str]], int]:
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


def _row_dtype(header: dict[str, list[str]], path: object) -> np.dtype:
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


def _integer(header: dict[str, list[str]], key: str, path: object) -> int:
    words = header.get(key, [])
    if len(words) != 1 or not words[0].isdigit():
        raise DataError(path, f"{key} is not a number", field="header", remedy=_REMEDY_DAMAGED)
    return int(words[0])

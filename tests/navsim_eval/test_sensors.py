"""Sensor files: round trips, agreement with an independent decoder, and refusal of files that are not whole."""

from __future__ import annotations

import io
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from navsim_eval.errors import DataError
from navsim_eval.formats.sensors import (
    decode_image,
    decode_point_cloud,
    encoded_size,
    read_image,
    read_point_cloud,
    write_image,
    write_point_cloud,
)

HEADER = (
    "# .PCD v0.7\nVERSION 0.7\nFIELDS {fields}\nSIZE {sizes}\nTYPE {types}\nCOUNT {counts}\nWIDTH {n}\nHEIGHT 1\n"
    "VIEWPOINT 0.5 0 0 1 0 0 0\nPOINTS {n}\nDATA {data}\n"
)
FIELDS = "x y z intensity ring lidar_info"


def picture(height: int = 54, width: int = 96) -> np.ndarray:
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([rows * 4 % 256, columns * 2 % 256, (rows + columns) % 256], axis=-1).astype(np.uint8)


def pcd(rows: np.ndarray, sizes: str, types: str, fields: str = FIELDS, n: int | None = None, **other: str) -> bytes:
    values = {"counts": " ".join("1" for _ in fields.split()), "data": "binary", **other}
    n = len(rows) if n is None else n
    return HEADER.format(fields=fields, sizes=sizes, types=types, n=n, **values).encode() + rows.tobytes()


# --- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subsampling", ["4:2:0", "4:4:4"])
def test_pixels_equal_those_of_pillow(tmp_path: Path, subsampling: str) -> None:
    """The published features were made with Pillow."""
    Image.fromarray(picture()).save(tmp_path / "x.jpg", quality=85, subsampling=subsampling)
    image = read_image(tmp_path / "x.jpg")
    assert image.dtype == np.uint8 and image.shape == (54, 96, 3)
    np.testing.assert_array_equal(image, np.asarray(Image.open(tmp_path / "x.jpg")))


def test_orientation_tags_are_ignored(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    Image.fromarray(picture()).save(tmp_path / "x.jpg", exif=exif)
    assert read_image(tmp_path / "x.jpg").shape == (54, 96, 3)


def test_colours_survive_writing(tmp_path: Path) -> None:
    red = np.zeros((32, 48, 3), np.uint8)
    red[..., 0] = 255
    image = read_image(write_image(tmp_path / "a" / "x.jpg", red))
    assert image[..., 0].min() > 250 and image[..., 1:].max() < 5


def test_grey_files_have_three_channels(tmp_path: Path) -> None:
    Image.fromarray(picture()[..., 0]).save(tmp_path / "x.jpg")
    assert read_image(tmp_path / "x.jpg").shape == (54, 96, 3)


def test_padding_behind_the_image_is_no_damage(tmp_path: Path) -> None:
    path = write_image(tmp_path / "x.jpg", picture())
    whole = read_image(path)
    path.write_bytes(path.read_bytes() + bytes(64))
    np.testing.assert_array_equal(read_image(path), whole)


def test_damaged_images_are_refused(tmp_path: Path) -> None:
    stream = io.BytesIO()
    thumbnail = Image.new("RGB", (8, 8))
    thumbnail.save(stream, "jpeg")
    exif = b"\xff\xe1" + (len(stream.getvalue()) + 2).to_bytes(2, "big") + stream.getvalue()  # holds its own end marker
    whole = write_image(tmp_path / "x.jpg", picture(400, 600)).read_bytes()
    with_thumbnail = whole[:2] + exif + whole[2:]
    (tmp_path / "x.jpg").write_bytes(with_thumbnail)
    assert read_image(tmp_path / "x.jpg").shape == (400, 600, 3)
    half = whole[: len(whole) // 2]
    for content in (half, whole[:-2], with_thumbnail[:-100], half + bytes(5000)):
        (tmp_path / "x.jpg").write_bytes(content)
        with pytest.raises(DataError, match=r"x\.jpg: the image is truncated — download the file again"):
            read_image(tmp_path / "x.jpg")
    (tmp_path / "x.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"x\.jpg: the image file is empty"):
        read_image(tmp_path / "x.jpg")
    for content in (b"junk", b"\xff\xd8\xff\xd9"):
        (tmp_path / "x.jpg").write_bytes(content)
        with pytest.raises(DataError, match=r"x\.jpg: not an image that can be decoded"):
            read_image(tmp_path / "x.jpg")


@pytest.mark.parametrize(("reduction", "size"), [(1, (54, 96)), (2, (27, 48)), (4, (14, 24)), (8, (7, 12))])
def test_images_decode_at_a_fraction_of_their_size(reduction: int, size: tuple[int, int]) -> None:
    encoded = cv2.imencode(".jpg", picture()[..., ::-1])[1]
    assert encoded_size(encoded.tobytes(), "x") == (54, 96)
    image = decode_image(encoded.tobytes(), "x", reduction)
    flags = {1: cv2.IMREAD_COLOR, 2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4}
    assert image.shape == (*size, 3) and image.flags.writeable
    flag = flags.get(reduction, cv2.IMREAD_REDUCED_COLOR_8)
    np.testing.assert_array_equal(image, cv2.imdecode(encoded, flag)[..., ::-1])


def test_some_columns_of_a_sweep(tmp_path: Path) -> None:
    points = np.arange(12, dtype=np.float32).reshape(6, 2)
    content = write_point_cloud(tmp_path / "x.pcd", points).read_bytes()
    np.testing.assert_array_equal(decode_point_cloud(content, "x", ("z", "x")), points[[2, 0]])


def test_absent_sensor_files(tmp_path: Path) -> None:
    for read in (read_image, read_point_cloud):
        with pytest.raises(DataError, match=r"no such sensor file — download the sensor files of this split"):
            read(tmp_path / "none")
        with pytest.raises(DataError, match="cannot be read"):
            read(tmp_path)


# --- point clouds ----------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    hnp.arrays(np.float32, st.tuples(st.just(3), st.integers(0, 20)), elements=st.floats(-200, 200, width=32)),
    st.integers(0, 2**32 - 1),
)
def test_points_survive_writing(tmp_path_factory: pytest.TempPathFactory, xyz: np.ndarray, seed: int) -> None:
    rest = np.random.default_rng(seed).integers(0, 256, (3, xyz.shape[1]))
    points = np.vstack([xyz, rest]).astype(np.float32)
    path = write_point_cloud(tmp_path_factory.mktemp("pcd") / "x.pcd", points)
    back = read_point_cloud(path)
    assert back.dtype == np.float32 and back.shape == points.shape
    np.testing.assert_array_equal(back, points)


def test_small_fields_are_rounded_and_clipped(tmp_path: Path) -> None:
    points = np.array([[1.5], [2.5], [-3.5], [300.0], [-1.0], [3.6]])
    assert read_point_cloud(write_point_cloud(tmp_path / "x.pcd", points)).T.tolist() == [[1.5, 2.5, -3.5, 255, 0, 4]]
    with pytest.raises(ValueError, match=r"points of shape \(5, 1\) where \(6, N\) is expected"):
        write_point_cloud(tmp_path / "x.pcd", points[:5])


def test_row_layout_comes_from_the_header(tmp_path: Path) -> None:
    """Other sizes, other order, a further field, `lidar_id` for `lidar_info`, padding behind the rows."""
    dtype = [("ring", "<u2"), ("x", "<f8"), ("time", "<i4"), ("y", "<f4"), ("z", "<f4"), ("lidar_id", "<i1")]
    rows = np.zeros(3, [*dtype, ("intensity", "<f4")])
    for index, name in enumerate(rows.dtype.names):
        rows[name] = np.arange(3) + 10 * index
    fields = " ".join(rows.dtype.names)
    (tmp_path / "x.pcd").write_bytes(pcd(rows, "2 8 4 4 4 1 4", "U F I F F I F", fields) + bytes(100))
    points = read_point_cloud(tmp_path / "x.pcd")
    assert points[:, 1].tolist() == [11, 31, 41, 61, 1, 51]


ROWS = np.zeros(4, [("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("i", "u1"), ("r", "u1"), ("l", "u1")])
SIZES, TYPES = "4 4 4 1 1 1", "F F F U U U"


@pytest.mark.parametrize(
    "content, message",
    [
        (pcd(ROWS, SIZES, TYPES)[:-5], "truncated: 3 of 4 points present"),
        (pcd(ROWS, SIZES, TYPES)[:60], "no PCD header that ends in a DATA line"),
        (b"", "no PCD header that ends in a DATA line"),
        (b"\xff\xd8\xff" * 3000, "no PCD header that ends in a DATA line"),
        (pcd(ROWS, SIZES, TYPES, data="ascii"), "DATA ascii is not supported — store it as DATA binary"),
        (pcd(ROWS, SIZES, TYPES, data="binary_compressed"), "DATA binary_compressed is not supported"),
        (pcd(ROWS, SIZES, TYPES, counts="1 1 1 1 1 2"), r"\[header\]: COUNT 1 1 1 1 1 2 is not supported"),
        (pcd(ROWS, "4 4 4 1 1", TYPES), r"\[header\]: FIELDS, SIZE, TYPE and COUNT differ in length"),
        (pcd(ROWS, SIZES, "F F F U U Q"), r"\[header\]: unknown field types F F F U U Q of sizes 4 4 4 1 1 1"),
        (pcd(ROWS, "4 4 4 1 1 3", TYPES), r"\[header\]: unknown field types"),
        (pcd(ROWS, SIZES, TYPES, fields="x y z intensity ring time"), r"field lidar_info is missing \(present: x y z"),
        (pcd(ROWS, SIZES, TYPES, n=-4), r"\[header\]: POINTS is not a number"),
    ],
)
def test_damaged_sweeps_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.pcd").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.pcd.*" + message):
        read_point_cloud(tmp_path / "x.pcd")

"""Pickles are data: what logs hold loads under every protocol, and nothing in a file runs."""

from __future__ import annotations

import collections
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from navsim_eval.errors import DataError
from navsim_eval.formats import unpickle
from navsim_eval.formats.unpickle import load_pickle

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


def save(path: Path, content: Any, protocol: int = pickle.HIGHEST_PROTOCOL) -> Path:
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


def assert_same(left: Any, right: Any) -> None:
    assert type(left) is type(right)
    if isinstance(left, dict):
        assert list(left) == list(right)
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_same(a, b)
    elif isinstance(left, np.ndarray):
        assert left.dtype == right.dtype and left.shape == right.shape
        np.testing.assert_array_equal(left, right)
    else:
        assert left == right


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_everything_that_logs_hold(tmp_path: Path, protocol: int) -> None:
    content = [
        {
            "floats": np.arange(6.0).reshape(2, 3),
            "transposed": np.arange(6.0).reshape(2, 3).T,
            "strided": np.arange(10)[::2],
            "empty": np.zeros((0, 7)),
            "names": np.array(["vehicle", "czone_sign"]),
            "flags": np.array([True, False]),
            "scalars": [np.float64(1.5), np.int64(3), np.bool_(True)],
            "bytes": b"\x00\xff",
            "bytearray": bytearray(b"ab"),
            "none": None,
            "tuple": (1, "a", (2.5, True)),
            "ordered": collections.OrderedDict(a=1),
        }
    ]
    assert_same(load_pickle(save(tmp_path / "x.pkl", content, protocol)), content)


@settings(max_examples=40, deadline=None)
@given(
    array=hnp.arrays(
        st.sampled_from(["f8", "f4", "i8", "u1", "?", "U5"]), hnp.array_shapes(min_dims=0, max_dims=3, min_side=0)
    ),
    protocol=st.sampled_from(PROTOCOLS),
    order=st.sampled_from(["C", "F"]),
)
def test_any_array(tmp_path_factory: pytest.TempPathFactory, array: np.ndarray, protocol: int, order: str) -> None:
    path = save(tmp_path_factory.mktemp("pkl") / "x.pkl", [np.asarray(array, order=order)], protocol)
    np.testing.assert_array_equal(load_pickle(path)[0], array)


def test_old_and_new_numpy_spellings(tmp_path: Path) -> None:
    """numpy 1 says numpy.core, numpy 2 says numpy._core; either may meet either."""
    array = np.arange(4.0)
    for protocol in PROTOCOLS:
        written = pickle.dumps(array, protocol=protocol)
        if protocol < 4:  # names as text lines
            other = written.replace(b"numpy._core", b"numpy.core")
        else:  # names as counted strings
            other = written
            for name in (b"numpy._core.numeric", b"numpy._core.multiarray"):
                short = name.replace(b"._core", b".core")
                other = other.replace(b"\x8c" + bytes([len(name)]) + name, b"\x8c" + bytes([len(short)]) + short)
            if b"\x95" in other[:3]:  # frame length
                other = other[:3] + struct.pack("<Q", len(other) - 11) + other[11:]
        assert b"numpy.core" in other
        (tmp_path / "x.pkl").write_bytes(other)
        np.testing.assert_array_equal(load_pickle(tmp_path / "x.pkl"), array)


class Attack:
    def __init__(self, function: Any, *arguments: Any):
        self.call = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.call


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_no_call_is_made(tmp_path: Path, protocol: int) -> None:
    for function, arguments in (
        (os.system, (f"touch {tmp_path / 'owned'}",)),
        (eval, (f"open({str(tmp_path / 'owned')!r}, 'w')",)),
        (open, (str(tmp_path / "owned"), "w")),
    ):
        path = save(tmp_path / "x.pkl", [Attack(function, *arguments)], protocol)
        with pytest.raises(DataError, match=r"x\.pkl: asks for .*, which is not allowed in a data file"):
            load_pickle(path)
        assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "name",
    [
        "os\nsystem",
        "builtins\ngetattr",
        "builtins\nexec",
        "__builtin__\neval",
        "posix\nsystem",
        "subprocess\nPopen",
        "numpy\nload",
        "numpy\nfromfile",
        "numpy.core.multiarray\nfromfile",
        "numpy._core.numeric\n_frombuffer.__globals__",
        "numpy.testing._private.utils\nrunstring",
        "collections\nnamedtuple",
        "pickle\nloads",
        "importlib\nimport_module",
    ],
)
def test_names_outside_the_list_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.pkl").write_bytes(f"c{name}\n.".encode())
    with pytest.raises(DataError, match="is not allowed in a data file"):
        load_pickle(tmp_path / "x.pkl")


def test_a_file_cannot_alter_what_the_next_one_uses(tmp_path: Path) -> None:
    """BUILD sets attributes on whatever a name resolves to; the next file must get untouched callables."""
    for module, name in unpickle._allowed():
        (tmp_path / "x.pkl").write_bytes(f"c{module}\n{name}\n(N(S'__defaults__'\nI5\ndtb.".encode())
        try:
            load_pickle(tmp_path / "x.pkl")
        except DataError:
            pass
    content = [np.arange(3.0), b"\xff", bytearray(b"a"), np.float64(2.0), np.asfortranarray(np.eye(2))]
    for protocol in PROTOCOLS:
        assert_same(load_pickle(save(tmp_path / "y.pkl", content, protocol)), content)


def test_arrays_of_objects_are_refused(tmp_path: Path) -> None:
    objects = np.array([1, "a", None], dtype=object)
    structured = np.zeros(2, dtype=[("a", "f8"), ("b", object)])
    for content in (objects, [{"deep": (objects,)}], structured):
        with pytest.raises(DataError, match="holds a numpy array of Python objects"):
            load_pickle(save(tmp_path / "x.pkl", content))


def test_shared_and_cyclic_containers_are_walked_once(tmp_path: Path) -> None:
    nested: list = []
    for _ in range(200):  # 2^200 paths
        nested = [nested, nested]
    nested.append(nested)
    assert len(load_pickle(save(tmp_path / "x.pkl", nested))) == 3


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80\x05.", b"\x80\x63", b"version https://git-lfs\noid 0"])
def test_garbage(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pkl").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.pkl: not a readable pickle \(.*download it again"):
        load_pickle(tmp_path / "x.pkl")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_truncated_anywhere(tmp_path: Path, protocol: int) -> None:
    whole = pickle.dumps([{"a": np.arange(5.0), "b": np.array(["x"]), "c": (1, 2.0)}], protocol=protocol)
    for length in range(0, len(whole), 3):
        (tmp_path / "x.pkl").write_bytes(whole[:length])
        with pytest.raises(DataError):
            load_pickle(tmp_path / "x.pkl")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_bytes_are_an_error_or_data_but_never_another_exception(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    whole = bytearray(pickle.dumps([{"a": np.arange(5.0), "b": np.array(["x"]), "c": (1, 2.0), "d": b"z"}], protocol=2))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("pkl") / "x.pkl"
    path.write_bytes(whole)
    try:
        load_pickle(path)
    except DataError as error:
        assert str(path) in str(error)


def test_bombs_are_refused(tmp_path: Path) -> None:
    bombs = {
        "bytes of a size": b"cbuiltins\nbytes\n(I9999999999999\ntR.",
        "bytearray of a size": b"cbuiltins\nbytearray\n(I9999999999999\ntR.",
        "array of a shape": b"cnumpy\nndarray\n((L99999999999999L\ntS'f8'\ntR.",
        "text encoding": b"c_codecs\nencode\n(Vx\nVidna\ntR.",
        "memo index": b"\x80\x02]r\xff\xff\xff\xff.",
        "memo index as text": b"]p99999999999\n.",
        "length": b"\x80\x05\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
    }
    for content in bombs.values():
        (tmp_path / "x.pkl").write_bytes(content)
        with pytest.raises(DataError, match="not a readable pickle"):
            load_pickle(tmp_path / "x.pkl")


def test_absent_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such file — check data\.root"):
        load_pickle(tmp_path / "none.pkl")
    with pytest.raises(DataError, match=r"cannot be read \(Is a directory\)"):
        load_pickle(tmp_path)


def test_further_names_by_request(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pkl", [Path("a/b")])
    with pytest.raises(DataError, match=r"pathlib\.PosixPath"):
        load_pickle(path)
    extra = {("pathlib", "PosixPath"): str}
    assert load_pickle(save(tmp_path / "y.pkl", [Attack(type(Path()), "a")]), extra) == ["a"]

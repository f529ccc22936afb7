"""The packed store: what goes in comes out, whatever happens to the writer or to the files."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from navsim_eval.errors import DataError, UserError
from navsim_eval.shards import (
    ShardReader,
    ShardWriter,
    build_shards,
    pack,
    read_manifest,
    repair,
    unpack,
    verify,
)

MANIFEST = {"purpose": "test", "config": {"size": 3, "name": "a"}}
SHARD_BYTES = 4096


def sample(token: str) -> dict[str, np.ndarray]:
    """Content that depends on the token alone."""
    seed = int(token[1:])
    return {"image": np.full((10, 20), seed, np.uint8), "state": np.arange(5) * 0.5 + seed}


def sample_or_error(token: str) -> dict[str, np.ndarray]:
    if token in ("t003", "t007"):
        raise DataError(f"{token}.jpg", "is truncated", remedy="download it again")
    return sample(token)


def samples_or_error(keys: list[str]) -> list[dict[str, np.ndarray]]:
    return [sample_or_error(key) for key in keys]


def tokens(count: int) -> list[str]:
    return [f"t{i:03d}" for i in range(count)]


def fill(folder, count=40, expected=None):
    with ShardWriter(folder, MANIFEST, tokens(expected or count), SHARD_BYTES) as writer:
        for token in tokens(count):
            writer.write(token, sample(token))
    return folder


def assert_holds(reader: ShardReader, expected: list[str]) -> None:
    assert reader.keys == expected
    for token in expected:
        for name, array in sample(token).items():
            np.testing.assert_array_equal(reader[token][name], array)
            assert reader[token][name].dtype == array.dtype


# --- records ---------------------------------------------------------------------------------------------------------

DTYPES = st.one_of(
    hnp.integer_dtypes(endianness="="),
    hnp.floating_dtypes(endianness="="),
    st.sampled_from([np.dtype("U7"), np.dtype(bool)]),
)
ARRAYS = hnp.arrays(DTYPES, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5))


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text("abc_é", min_size=1), ARRAYS, max_size=4), st.booleans())
def test_a_record_gives_back_names_shapes_types_and_values(arrays, deflate):
    restored = unpack(pack(arrays, deflate=list(arrays) if deflate else ()))
    assert list(restored) == list(arrays)
    for name, array in arrays.items():
        assert restored[name].dtype == array.dtype and restored[name].shape == array.shape
        np.testing.assert_array_equal(restored[name], array)


def test_python_objects_are_refused():
    with pytest.raises(TypeError, match="'x'"):
        pack({"x": np.array([{}], object)})


def test_deflate_shrinks_what_is_empty():
    zeros = {"map": np.zeros((128, 256), np.uint8)}
    assert len(pack(zeros, deflate=["map"])) < len(pack(zeros)) / 50


# --- round trip ------------------------------------------------------------------------------------------------------


def test_round_trip_over_several_shards(tmp_path):
    fill(tmp_path)
    assert len(list(tmp_path.glob("*.data"))) > 2
    reader = ShardReader(tmp_path, expect=MANIFEST)
    assert_holds(reader, tokens(40))
    assert "t000" in reader and "zzz" not in reader and len(reader) == 40 and reader.missing == []


def test_arrays_are_read_only_views_aligned_for_any_type(tmp_path):
    array = ShardReader(fill(tmp_path))["t005"]["state"]
    assert not array.flags.writeable and array.flags.aligned and not array.flags.owndata


def test_keys_come_in_the_order_of_the_split_and_missing_ones_are_named(tmp_path):
    with ShardWriter(tmp_path, MANIFEST, ["t002", "t000", "t001"]) as writer:
        for token in ("t001", "t002"):
            writer.write(token, sample(token))
    reader = ShardReader(tmp_path)
    assert reader.keys == ["t002", "t001"] and reader.missing == ["t000"]


def test_a_reader_travels_to_other_processes(tmp_path):
    reader = ShardReader(fill(tmp_path))
    reader["t000"]
    assert_holds(pickle.loads(pickle.dumps(reader)), tokens(40))


def test_an_unknown_key_names_itself(tmp_path):
    with pytest.raises(KeyError, match="nowhere"):
        ShardReader(fill(tmp_path))["nowhere"]


# --- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opener", [ShardReader, lambda folder, manifest: ShardWriter(folder, manifest)])
def test_another_configuration_is_refused_with_both_sides(tmp_path, opener):
    fill(tmp_path)
    with pytest.raises(UserError, match=r"config\.size is 3 there, 4 here"):
        opener(tmp_path, {"purpose": "test", "config": {"size": 4, "name": "a"}})
    with pytest.raises(UserError, match="flavour is absent there, 1 here"):
        opener(tmp_path, {**MANIFEST, "flavour": 1})


def test_another_format_version_is_refused(tmp_path):
    fill(tmp_path)
    manifest = read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "format_version": 99}))
    with pytest.raises(DataError, match="99"):
        ShardReader(tmp_path)


def test_a_folder_that_is_no_store_says_how_to_make_one(tmp_path):
    with pytest.raises(DataError, match=r"manifest\.json.*cache\.py"):
        ShardReader(tmp_path / "nothing")


def test_a_store_of_other_scenes_is_not_mixed_with_new_ones(tmp_path):
    fill(tmp_path, 5)
    with pytest.raises(UserError, match=r"1 samples that the split does not have \(first: t004\)"):
        ShardWriter(tmp_path, MANIFEST, tokens(4))


def test_a_split_may_grow(tmp_path):
    fill(tmp_path, 5)
    with ShardWriter(tmp_path, MANIFEST, tokens(6)) as writer:
        writer.write("t005", sample("t005"))
    assert_holds(ShardReader(tmp_path), tokens(6))


def test_one_writer_at_a_time(tmp_path):
    with ShardWriter(tmp_path, MANIFEST):
        with pytest.raises(UserError, match="another process"):
            ShardWriter(tmp_path, MANIFEST)
    ShardWriter(tmp_path, MANIFEST).close()


def test_a_store_that_lacks_nothing_is_left_to_whoever_writes(tmp_path):
    fill(tmp_path, 5)
    seen: list[int] = []
    with ShardWriter(tmp_path, MANIFEST, tokens(5)):
        report = build_shards(tmp_path, MANIFEST, tokens(5), sample_or_error, progress=seen.append)
        assert (report.stored, report.added, seen) == (5, 0, [5])
        with pytest.raises(UserError, match="another configuration"):
            build_shards(tmp_path, {"purpose": "other"}, tokens(5), sample_or_error)
    flip_byte(tmp_path / "00000.data", -1)
    assert build_shards(tmp_path, MANIFEST, tokens(5), sample).added == 1  # the last record was torn
    assert_holds(ShardReader(tmp_path), tokens(5))


BUILD = """
import sys, time
from pathlib import Path
from navsim_eval.shards import build_shards
from tests.navsim_eval.test_shards import MANIFEST, sample, tokens

def slow_sample(token):
    Path(sys.argv[1]).touch()
    while not Path(sys.argv[2]).exists():
        time.sleep(0.01)
    return sample(token)

print(build_shards(sys.argv[3], MANIFEST, tokens(5), slow_sample, workers=1).added)
"""


def test_of_several_builds_one_works_and_the_others_find_it_done(tmp_path):
    begun, go, store = tmp_path / "begun", tmp_path / "go", tmp_path / "store"
    command = [sys.executable, "-c", BUILD, str(begun), str(go), str(store)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as first:
        while not begun.exists():
            assert first.poll() is None
            time.sleep(0.01)
        with subprocess.Popen(command, **pipes) as second:
            assert "waiting" in second.stderr.readline()
            go.touch()
            assert [first.communicate()[0], second.communicate()[0]] == ["5\n", "0\n"]
    assert_holds(ShardReader(store), tokens(5))


def test_a_key_is_written_once(tmp_path):
    with ShardWriter(tmp_path, MANIFEST) as writer:
        writer.write("a", sample("t001"))
        with pytest.raises(ValueError, match="already"):
            writer.write("a", sample("t001"))


# --- damage ----------------------------------------------------------------------------------------------------------


def flip_byte(path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0xFF
    path.write_bytes(data)


def entry(folder, shard: int, row: int):
    return json.loads((folder / f"{shard:05d}.index").read_text().splitlines()[row])


def test_a_flipped_byte_is_found_named_dropped_and_rebuilt(tmp_path):
    fill(tmp_path)
    key, offset, size, _ = entry(tmp_path, 1, 2)
    flip_byte(tmp_path / "00001.data", offset + size // 2)

    with pytest.raises(DataError, match=rf"{key} is damaged.*mode=repair"):
        ShardReader(tmp_path)[key]
    found = verify(tmp_path)
    assert not found.ok and found.damaged == [("00001.data", key, "checksum differs")] and found.missing == [key]

    repair(tmp_path)
    assert verify(tmp_path).ok and key not in ShardReader(tmp_path)
    report = build_shards(tmp_path, MANIFEST, tokens(40), sample, workers=1, shard_bytes=SHARD_BYTES)
    assert report.added == 1
    assert_holds(ShardReader(tmp_path), tokens(40))


def test_a_truncated_shard_is_refused_at_opening_and_repaired(tmp_path):
    fill(tmp_path)
    data = tmp_path / "00001.data"
    with open(data, "ab") as file:
        file.truncate(data.stat().st_size - 100)
    with pytest.raises(DataError, match=r"00001\.data: is truncated.*repair"):
        ShardReader(tmp_path)
    dropped = repair(tmp_path)
    assert [problem for _, _, problem in dropped.damaged] == ["truncated"]
    assert len(ShardReader(tmp_path)) == 39


def test_a_lost_data_file_costs_only_its_samples(tmp_path):
    fill(tmp_path)
    in_shard = len((tmp_path / "00000.index").read_text().splitlines())
    (tmp_path / "00000.data").unlink()
    repair(tmp_path)
    build_shards(tmp_path, MANIFEST, tokens(40), sample, workers=1, shard_bytes=SHARD_BYTES)
    assert_holds(ShardReader(tmp_path), tokens(40))
    assert in_shard > 1


def test_an_unreadable_index_line_is_named_and_repaired(tmp_path):
    fill(tmp_path)
    index = tmp_path / "00000.index"
    lines = index.read_text().splitlines()
    index.write_text("\n".join([lines[0], '["t001", 12', *lines[2:]]) + "\n")
    with pytest.raises(DataError, match=r"00000\.index.*repair"):
        ShardReader(tmp_path)
    assert ("00000.index", "?", "unreadable line") in repair(tmp_path).damaged
    assert ShardReader(tmp_path).missing == ["t001"]


def test_finished_shards_are_never_rewritten(tmp_path):
    fill(tmp_path, 40, expected=60)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("0000[0-2].*")}
    build_shards(tmp_path, MANIFEST, tokens(60), sample, workers=1, shard_bytes=SHARD_BYTES)
    assert before and before == {name: (tmp_path / name).stat().st_mtime_ns for name in before}


@pytest.mark.parametrize("cut", [1, 60, 500])
def test_what_a_dead_writer_left_half_done_is_cut_off(tmp_path, cut):
    """A record without its line, a torn line, a line whose record never reached the disk."""
    fill(tmp_path, 10)
    last = sorted(tmp_path.glob("*.data"))[-1]
    with open(last, "ab") as file:
        file.truncate(max(0, last.stat().st_size - cut))
    with open(last.with_suffix(".index"), "a") as file:
        file.write('["t010", 12')
    build_shards(tmp_path, MANIFEST, tokens(12), sample, workers=1, shard_bytes=SHARD_BYTES)
    assert verify(tmp_path).ok
    assert_holds(ShardReader(tmp_path), tokens(12))


# --- build -----------------------------------------------------------------------------------------------------------


def test_broken_samples_are_counted_listed_and_tried_again(tmp_path):
    report = build_shards(tmp_path, MANIFEST, tokens(10), sample_or_error, workers=1)
    assert (report.stored, report.expected, sorted(report.broken)) == (8, 10, ["t003", "t007"])
    assert str(report).startswith("partial: 8 of 10") and "t003.jpg: is truncated" in str(report)
    assert sorted(json.loads((tmp_path / "broken.json").read_text())) == ["t003", "t007"]
    assert ShardReader(tmp_path).missing == ["t003", "t007"]

    again = build_shards(tmp_path, MANIFEST, tokens(10), sample, workers=1)
    assert (again.added, again.broken) == (2, {}) and str(again).startswith("complete: 10")
    assert_holds(ShardReader(tmp_path), tokens(10))


def test_a_pool_builds_what_one_process_builds(tmp_path):
    settled = []
    build_shards(tmp_path / "pool", MANIFEST, tokens(30), sample_or_error, workers=2, progress=settled.append)
    build_shards(tmp_path / "one", MANIFEST, tokens(30), sample_or_error, workers=1)
    assert sum(settled) == 30
    assert (tmp_path / "pool/00000.data").read_bytes() == (tmp_path / "one/00000.data").read_bytes()


@pytest.mark.parametrize("workers", [1, 2])
def test_samples_made_together_are_stored_as_if_made_alone(tmp_path, workers):
    """Broken ones in the middle of a chunk cost nothing but themselves, and a second run tries only them."""
    folder, alone = tmp_path / "together", tmp_path / "alone"
    report = build_shards(folder, MANIFEST, tokens(30), samples_or_error, workers=workers, chunk_size=8, together=True)
    build_shards(alone, MANIFEST, tokens(30), sample_or_error, workers=1)
    assert (report.stored, sorted(report.broken)) == (28, ["t003", "t007"])
    assert (folder / "00000.data").read_bytes() == (alone / "00000.data").read_bytes()
    again = build_shards(folder, MANIFEST, tokens(30), samples_or_error, workers=workers, together=True)
    assert (again.added, sorted(again.broken)) == (0, ["t003", "t007"])


def test_no_scenes_and_no_sound_scene_are_errors(tmp_path):
    with pytest.raises(UserError, match="empty"):
        build_shards(tmp_path, MANIFEST, [], sample)
    with pytest.raises(UserError, match=r"none of 1 samples.*t003\.jpg"):
        build_shards(tmp_path, MANIFEST, ["t003"], sample_or_error, workers=1)


SLOW_BUILD = textwrap.dedent("""
    import sys, time
    from navsim_eval.shards import build_shards
    from tests.navsim_eval.test_shards import MANIFEST, SHARD_BYTES, sample, tokens
    def slow(token):
        time.sleep(0.005)
        return sample(token)
    build_shards(sys.argv[1], MANIFEST, tokens(200), slow, workers=1, shard_bytes=SHARD_BYTES)
""")


def test_killed_in_the_middle_and_resumed_equals_uninterrupted(tmp_path):
    folder = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", SLOW_BUILD, str(folder)], cwd=os.getcwd())
    deadline = time.monotonic() + 30
    while len(list(folder.glob("*.index"))) < 3 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < len(ShardReader(folder)) < 200, "the kill has to hit the middle of the run"

    report = build_shards(folder, MANIFEST, tokens(200), sample, workers=1, shard_bytes=SHARD_BYTES)
    build_shards(tmp_path / "whole", MANIFEST, tokens(200), sample, workers=1, shard_bytes=SHARD_BYTES)
    assert 0 < report.added < 200 and verify(folder).ok
    for path in sorted((tmp_path / "whole").glob("0*")):
        assert (folder / path.name).read_bytes() == path.read_bytes()

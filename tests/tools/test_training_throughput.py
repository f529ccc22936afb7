"""benchmarks/training_throughput.py: both caches hold the same, every part is timed, the packed cache is faster."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from diffusiondrive.training.throughput import PARTS
from diffusiondrive.variants import tiny
from navsim_eval.config import DataConfig
from navsim_eval.own_data import Recording, write_recordings

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataConfig:
    """16 scenes of the example for own data."""
    example = SimpleNamespace(**runpy.run_path(str(ROOT / "examples" / "own_data.py")))
    root = tmp_path_factory.mktemp("own")
    example.write_town(root / "maps")
    drives = [Recording(f"drive_{n}", example.cameras(), example.drive(n, 21), example.LOCATION) for n in range(2)]
    write_recordings(root, "train", drives)
    return DataConfig(root=str(root), maps=str(root / "maps"))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_both_pipelines_are_measured(data: DataConfig, tmp_path: Path, device: str) -> None:
    benchmark = SimpleNamespace(**runpy.run_path(str(ROOT / "benchmarks" / "training_throughput.py")))
    config = benchmark.ThroughputConfig(
        data=data,
        model=tiny(),
        samples=20,
        batch=4,
        repeats=1,
        steps=2,
        warm_up=1,
        device=device,
        output=str(tmp_path / "out.json"),
    )
    benchmark.main(config)
    result = json.loads((tmp_path / "out.json").read_text())
    assert (result["scenes"], result["samples"]) == (16, 20) and result["step"]["device"].startswith(device)
    loader = result["loader"]
    assert loader["pickles, as published"]["times the pickles"] == 1
    assert loader["packed, 8 bits"]["samples/s"] > 3 * loader["pickles, as published"]["samples/s"]
    rows = result["step"]["rows"]
    assert set(rows) == {"published equivalent", "ours, batch 4"}
    for row in rows.values():
        assert all(row[f"{part} ms"] > 0 for part in PARTS) and 0 < row["data wait %"] < 100
    assert result["step"]["trainer"]["samples/s"] > 0 and result["step"]["share_of_matrix_rate"] > 0

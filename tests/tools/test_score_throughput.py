"""benchmarks/score_throughput.py: from stored metric caches alone, on either device, with a profile."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from navsim_eval.metric_caches import DEFLATED, stored_caches
from navsim_eval.pdm.cache import FORMAT_VERSION, to_arrays
from navsim_eval.shards import build_shards
from tests.navsim_eval.test_scoring import busy_street

ROOT = Path(__file__).resolve().parents[2]
METRICS = ("pdms_v1", "epdms_v2")


def arrays(key: str) -> dict[str, np.ndarray]:
    metric, seed = key.split("-")
    return {**to_arrays(busy_street(int(seed), metric)), "source_bytes": np.zeros(2, np.int64)}


@pytest.fixture(scope="module")
def caches(tmp_path_factory) -> Path:
    """Stores of three scenes for each metric."""
    folder = tmp_path_factory.mktemp("caches")
    for metric in METRICS:
        manifest = {"content": "metric_cache", "cache_version": FORMAT_VERSION, "metric": metric, "split": "streets"}
        keys = [f"{metric}-{seed}" for seed in range(3)]
        build_shards(folder / metric, manifest, keys, arrays, deflate=DEFLATED, workers=1)
    return folder


def test_stored_caches_are_read_without_their_data(caches: Path) -> None:
    found = list(stored_caches(caches / "pdms_v1"))
    assert [cache.token for cache in found] == ["street0", "street1", "street2"]
    np.testing.assert_array_equal(found[1].observation.poses, busy_street(1).observation.poses)


# "cpu:0" is a CPU that takes the way of a GPU
@pytest.mark.parametrize("device", ["cpu", "cpu:0", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_throughput_is_measured_from_caches_alone(caches: Path, tmp_path: Path, device: str, capsys) -> None:
    benchmark = SimpleNamespace(**runpy.run_path(str(ROOT / "benchmarks" / "score_throughput.py")))
    machine = {"bytes_per_second": 1e9, "operations_per_second": 1e9}
    benchmark.main.__globals__["measure_machine"] = lambda device: machine  # that takes seconds
    output = tmp_path / "result.json"
    config = benchmark.ThroughputConfig(caches=str(caches), scenes=5, proposals=[1, 3], device=device, profile=True)
    benchmark.main(replace(config, repeats=1, processes=1, output=str(output)))
    result = json.loads(output.read_text())
    for metric in METRICS:
        entry = result["results"][metric]
        assert entry["scenes"] == (3 if device == "cpu" else 5) and entry["distinct_scenes"] == 3
        assert set(entry["pairs_per_second"]) == {"1", "3"} and entry["profile"]["aten::nonzero"] > 0
        if device != "cpu":
            agreement = entry["agreement"]
            assert agreement["pairs"] == 5 * 64 and agreement["differing_steps"] == 0
            assert agreement["largest_difference"] < 1e-9
    assert "aten::nonzero" in capsys.readouterr().out

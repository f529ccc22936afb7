"""Feature cache and planning dataset: the cache gives what raw data gives, or says why it does not."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from diffusiondrive.dataset import PlanningDataset, collate, to_model_input
from diffusiondrive.feature_cache import FeatureCache, FeatureCacheConfig, RawSamples, build_feature_cache
from diffusiondrive.features import FeatureConfig, build_features, to_float
from diffusiondrive.targets import TargetConfig, build_targets
from navsim_eval.errors import DataError, UserError
from navsim_eval.shards import read_manifest
from tests.worlds import LOCATION, World, write_world

SMALL = FeatureConfig.for_sizes((64, 256), (128, 128))
CONFIG = FeatureCacheConfig(features=SMALL)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return write_world(tmp_path_factory.mktemp("world"), {"train": 2})


def raw_samples(world: World, config: FeatureCacheConfig = CONFIG) -> RawSamples:
    return RawSamples.from_config(world.data, "train", config.features, config.targets, config.labels)


def build(world: World, folder, config: FeatureCacheConfig = CONFIG):
    return build_feature_cache(folder, raw_samples(world, config), "train", config, workers=1)


@pytest.fixture(scope="module")
def cache(world, tmp_path_factory) -> FeatureCache:
    folder = tmp_path_factory.mktemp("cache")
    build(world, folder)
    return FeatureCache(folder, SMALL, CONFIG.targets)


# --- content ---------------------------------------------------------------------------------------------------------


def test_the_cache_holds_what_the_builders_give(world, cache):
    samples = raw_samples(world)
    assert cache.tokens == samples.tokens and len(cache) == 8 and cache.missing == []
    for token in cache.tokens:
        scene = samples.scenes[token]
        stored = cache[token]
        for name, array in build_features(scene, SMALL).items():
            np.testing.assert_array_equal(to_float(stored.features, SMALL)[name], array)
        for name, array in build_targets(scene, samples.maps.get(LOCATION), CONFIG.targets).items():
            np.testing.assert_array_equal(stored.targets[name], array)
            assert stored.targets[name].dtype == array.dtype


def test_a_full_size_sample_takes_less_than_a_megabyte(world, tmp_path):
    build(world, tmp_path, FeatureCacheConfig())
    size = sum(path.stat().st_size for path in tmp_path.iterdir()) / 8
    assert 0.8e6 < size < 1e6


def test_jpeg_is_small_and_close(world, cache, tmp_path):
    build(world, tmp_path, replace(CONFIG, camera_codec="jpeg", jpeg_quality=95))
    small = FeatureCache(tmp_path, SMALL)
    assert (tmp_path / "00000.data").stat().st_size < 0.3 * (cache.reader.folder / "00000.data").stat().st_size
    for token in cache.tokens:
        exact, lossy = cache[token], small[token]
        difference = exact.features["camera_feature"].astype(int) - lossy.features["camera_feature"]
        assert np.abs(difference).mean() < 2
        np.testing.assert_array_equal(lossy.features["lidar_feature"], exact.features["lidar_feature"])
        np.testing.assert_array_equal(lossy.targets["bev_semantic_map"], exact.targets["bev_semantic_map"])


def test_a_cache_without_labels(world, tmp_path):
    build(world, tmp_path, replace(CONFIG, labels=False))
    cache = FeatureCache(tmp_path)
    assert not cache.labels and cache[cache.tokens[0]].targets == {}
    with pytest.raises(UserError, match="targets is None there"):
        FeatureCache(tmp_path, targets=TargetConfig())


def test_a_pool_builds_the_same_files(world, cache, tmp_path):
    build_feature_cache(tmp_path, raw_samples(world), "train", CONFIG, workers=2)
    assert (tmp_path / "00000.data").read_bytes() == (cache.reader.folder / "00000.data").read_bytes()


# --- configuration ---------------------------------------------------------------------------------------------------


def test_another_configuration_is_refused_when_reading_and_when_resuming(world, cache):
    other = replace(SMALL, camera_height=96)
    with pytest.raises(UserError, match=r"features\.camera_height is 64 there, 96 here"):
        FeatureCache(cache.reader.folder, other)
    with pytest.raises(UserError, match=r"targets\.bev_cell is 0\.25 there, 0\.5 here"):
        FeatureCache(cache.reader.folder, SMALL, TargetConfig(bev_cell=0.5))
    with pytest.raises(UserError, match=r"camera_codec is lossless there, jpeg here.*preprocessing"):
        build(world, cache.reader.folder, replace(CONFIG, camera_codec="jpeg"))


def test_changed_preprocessing_code_is_refused(cache, monkeypatch):
    monkeypatch.setattr("diffusiondrive.feature_cache.FEATURES_VERSION", 99)
    with pytest.raises(UserError, match=r"versions\.features is 1 there, 99 here"):
        FeatureCache(cache.reader.folder, SMALL)


def test_the_manifest_tells_the_whole_configuration(cache):
    manifest = read_manifest(cache.reader.folder)
    assert manifest["purpose"] == "features" and manifest["split"] == "train" and len(manifest["preprocessing"]) == 16
    assert manifest["features"]["camera_width"] == 256 and manifest["targets"]["max_agents"] == 30
    assert cache.features == SMALL


@pytest.mark.parametrize(
    ("values", "message"), [({"camera_codec": "webp"}, "webp"), ({"jpeg_quality": 0}, "jpeg_quality")]
)
def test_impossible_storage_is_refused(values, message):
    with pytest.raises(UserError, match=message):
        FeatureCacheConfig(**values)


def test_a_metric_cache_is_no_feature_cache(tmp_path):
    from navsim_eval.shards import ShardWriter

    ShardWriter(tmp_path, {"purpose": "metrics"}).close()
    with pytest.raises(UserError, match="purpose is metrics there, features here"):
        FeatureCache(tmp_path)


# --- broken data -----------------------------------------------------------------------------------------------------


def test_broken_sensor_files_cost_only_their_samples(tmp_path):
    world = write_world(tmp_path / "world", {"train": 1})
    samples = raw_samples(world)
    image = samples.scenes.sensor_root / samples.scenes[0].current.cameras["CAM_F0"].path
    sweep = samples.scenes.sensor_root / samples.scenes[2].current.lidar_path
    content = image.read_bytes()
    image.write_bytes(content[: len(content) // 2])
    sweep.unlink()

    report = build(world, tmp_path / "cache")
    assert (report.stored, report.expected) == (2, 4) and str(report).startswith("partial: 2 of 4")
    assert image.name in report.broken[samples.tokens[0]] and sweep.name in report.broken[samples.tokens[2]]
    cache = FeatureCache(tmp_path / "cache")
    assert cache.tokens == (samples.tokens[1], samples.tokens[3]) and len(cache.missing) == 2

    image.write_bytes(content)
    assert build(world, tmp_path / "cache").added == 1


def test_a_damaged_sample_is_named_when_read(world, tmp_path):
    build(world, tmp_path)
    data = bytearray((tmp_path / "00000.data").read_bytes())
    data[1000] ^= 1
    (tmp_path / "00000.data").write_bytes(data)
    cache = FeatureCache(tmp_path)
    with pytest.raises(DataError, match=f"{cache.tokens[0]} is damaged"):
        PlanningDataset(cache)[0]


# --- dataset ---------------------------------------------------------------------------------------------------------


def test_raw_and_cached_items_are_equal(world, cache):
    raw, cached = PlanningDataset.from_raw(world.data, "train", SMALL), PlanningDataset(cache)
    assert raw.tokens == cached.tokens and raw.features == cached.features == SMALL
    for a, b in zip(raw, cached, strict=True):
        assert a.token == b.token
        for part in ("features", "targets"):
            assert list(getattr(a, part)) == list(getattr(b, part))
            for name, tensor in getattr(a, part).items():
                assert torch.equal(tensor, getattr(b, part)[name])


def test_items_are_small_and_named(cache):
    sample = PlanningDataset(cache)[3]
    kinds = {name: (tuple(t.shape), t.dtype) for name, t in {**sample.features, **sample.targets}.items()}
    assert kinds == {
        "camera_feature": ((3, 64, 256), torch.uint8),
        "lidar_feature": ((1, 128, 128), torch.uint8),
        "status_feature": ((8,), torch.float32),
        "trajectory": ((8, 3), torch.float32),
        "agent_states": ((30, 5), torch.float32),
        "agent_labels": ((30,), torch.bool),
        "bev_semantic_map": ((128, 256), torch.uint8),
    }
    sample.features["camera_feature"].zero_()  # items are copies: writing to one must not reach the file
    assert PlanningDataset(cache)[3].features["camera_feature"].any()


def test_model_input_equals_the_published_features(world, cache):
    batch = collate([PlanningDataset(cache)[i] for i in range(4)])
    assert batch.token == list(cache.tokens[:4])
    scaled = to_model_input(batch.features, SMALL)
    for row, token in enumerate(batch.token):
        for name, array in build_features(raw_samples(world).scenes[token], SMALL).items():
            assert scaled[name].dtype == torch.float32
            np.testing.assert_array_equal(scaled[name][row].numpy(), array)
    again = to_model_input(scaled, SMALL)
    assert all(again[name] is scaled[name] for name in scaled), "float features pass through"


def test_every_level_is_scaled_exactly():
    levels = {
        "camera_feature": torch.arange(256, dtype=torch.uint8),
        "lidar_feature": torch.arange(6, dtype=torch.uint8),
        "status_feature": torch.zeros(8),
    }
    scaled = to_model_input(levels)
    np.testing.assert_array_equal(scaled["camera_feature"].numpy(), np.arange(256).astype(np.float32) / np.float32(255))
    np.testing.assert_array_equal(scaled["lidar_feature"].numpy(), (np.arange(6) / 5).astype(np.float32))


def test_loader_processes_read_the_same(cache):
    dataset = PlanningDataset(pickle.loads(pickle.dumps(cache)))
    loader = DataLoader(dataset, batch_size=3, collate_fn=collate, num_workers=2, multiprocessing_context="fork")
    batches = list(loader)
    assert [token for batch in batches for token in batch.token] == list(cache.tokens)
    expected = torch.stack([dataset[i].features["camera_feature"] for i in range(3)])
    assert torch.equal(batches[0].features["camera_feature"], expected)

"""What lies under checkpoints/ is what the manifest says, small enough for git, and loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffusiondrive import DiffusionDrive
from navsim_eval.files import sha256

FOLDER = Path(__file__).resolve().parents[2] / "checkpoints"
MANIFEST = json.loads((FOLDER / "manifest.json").read_text())


def test_every_folder_is_listed() -> None:
    assert {entry["name"] for entry in MANIFEST} == {path.parent.name for path in FOLDER.glob("*/config.json")}


@pytest.mark.parametrize("entry", MANIFEST, ids=lambda entry: entry["name"])
def test_checkpoint_is_the_listed_one_and_loads(entry: dict) -> None:
    weights = FOLDER / entry["name"] / "model.safetensors"
    assert sha256(weights) == entry["sha256"] and weights.stat().st_size < 10_000_000
    assert DiffusionDrive.from_pretrained(weights.parent).config.name
    assert {"source", "metric", "licence"} <= entry.keys()

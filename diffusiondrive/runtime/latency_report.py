"""Latencies as statistics and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.table import Table

from diffusiondrive.runtime.stages import STAGES

PERCENTILES = (50, 90, 99)


def summarise(sensors: Sequence[dict[str, float]], plans: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Statistics of every stage, of the model and of the whole."""
    before, model = columns(sensors), columns(plans)
    total = sum(before.values()) + model["model"]
    inner = {name: model[name] for name in STAGES if name in model}
    stages = before | (inner or {"model": model["model"]})
    result = {
        "fps": float(1e3 / np.percentile(total, 50)),
        "model_fps": float(1e3 / np.percentile(model["model"], 50)),
        "end_to_end_ms": statistics(total),
        "model_ms": statistics(model["model"]),
        "stages_ms": {name: statistics(values) for name, values in stages.items()},
    }
    return result | ({"device_ms": statistics(model["device"])} if "device" in model else {})


def compare(
    sensors: Sequence[dict[str, float]], plans: Sequence[dict[str, float]], fast: dict[str, Any]
) -> dict[str, Any]:
    """The reference's own summary, and how many times faster the runtime is (ratios of medians)."""
    slow = summarise(sensors, plans)
    ratios = {name: round(slow[name]["p50"] / fast[name]["p50"], 3) for name in ("model_ms", "end_to_end_ms")}
    return slow | {"speedup": ratios}


def statistics(values: np.ndarray) -> dict[str, float]:
    """Mean, percentiles and maximum, in the unit of the values."""
    numbers = {"mean": values.mean(), **{f"p{p}": np.percentile(values, p) for p in PERCENTILES}, "max": values.max()}
    return {name: round(float(value), 4) for name, value in numbers.items()}


def columns(rows: Sequence[dict[str, float]]) -> dict[str, np.ndarray]:
    """Rows of named numbers -> (N,) arrays by name."""
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def as_table(result: dict[str, Any]) -> Table:
    """The result as people read it: stages, then the sums, then the reference."""
    how = f"{result['backend']} · {result['precision']} · {result['device']} · {result['threads']} threads"
    table = Table("stage", *(f"{name} [ms]" for name in ("p50", "p90", "p99", "max")), title=result["planner"])
    alone = {f"  {name}, alone": ms for name, ms in result.get("stages_captured_alone_ms", {}).items()}
    rows = {**result["stages_ms"], **alone, "model": result["model_ms"], "end to end": result["end_to_end_ms"]}
    last = [list(rows)[-3]]
    if "reference" in result:
        last.append("end to end")
        rows |= {f"reference: {name}": result["reference"][f"{name}_ms"] for name in ("model", "end_to_end")}
    for name, numbers in rows.items():
        cells = (f"{numbers[p]:.2f}" for p in ("p50", "p90", "p99", "max"))
        table.add_row(name.replace("_", " "), *cells, end_section=name in last)
    caption = f"{how} · {result['iterations']} plans over {result['frames_in_rotation']} frames\n"
    caption += f"{result['fps']:.1f} plans/s end to end, {result['model_fps']:.1f} plans/s for the model alone"
    if "overlapped_fps" in result:
        caption += f", {result['overlapped_fps']:.1f} plans/s overlapped"
    if "reference" in result:
        ratios = result["reference"]["speedup"]
        caption += f"\nmodel {ratios['model_ms']:.2f} ×, end to end {ratios['end_to_end_ms']:.2f} × the reference path"
    table.caption = caption
    return table

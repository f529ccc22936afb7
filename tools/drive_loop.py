"""Replay recorded drives in soft real time: one plan at every tick, a flagged fall-back where there is no fresh one.

    python tools/drive_loop.py                                            # the city's test drives at 10 Hz
    python tools/drive_loop.py "faults=[all]" ticks=600                   # with everything that may go wrong
    python tools/drive_loop.py "faults=[stall,truncated_jpeg,empty_cloud,nan_odometry]" seed=3
    python tools/drive_loop.py data=navsim split=mini device=cuda backend=cudagraph rate=100

Logs hold 2 Hz frames: rate=10 presents one recorded frame every 100 ms. A tick without a fresh plan by its deadline
gets the previous plan, shifted into the present ego frame, or a stop where that one is too old. Every tick is in the
report (JSON): status, reasons, latency, jitter, age, injected fault. An error if any plan was stale or not finite.
"""

from __future__ import annotations

import sys

from rich.console import Console
from tqdm import tqdm

from diffusiondrive.runtime.replay import DriveLoopConfig, as_table, drive_loop
from navsim_eval.command_line import run_tool
from navsim_eval.errors import UserError


def main(config: DriveLoopConfig) -> None:
    with tqdm(unit="tick", delay=0.1) as bar:
        result = drive_loop(config, bar.update)
    Console().print(as_table(result))
    print(f"written: {config.output}")
    if result["not_finite_plans"] or result["stale_plans"]:
        raise UserError("a plan was stale or not finite; see the report")


if __name__ == "__main__":
    sys.exit(run_tool(main, DriveLoopConfig, "drive_loop", __doc__))

"""Make the synthetic city: road networks, traffic, logs, maps, camera images and LiDAR in NAVSIM's formats.

    python tools/make_city.py                                   # 600 + 60 + 120 scenes, front cameras, into data/city
    python tools/make_city.py city.scenes=40 city.sensors=none data.root=data/small
    python tools/make_city.py city.sensors=all city.width=1920  # 8 cameras at the size of the real data
    python tools/make_city.py city.scenes=5000 city.seed=7 data.root=data/large

Writes <data.root>/{navsim_logs,sensor_blobs}/{train,val,test} and <data.maps>; then use split=train, val or test in
every other tool. Train, val and test are different cities. Interrupted at any moment, the same command goes on where it
stopped; asking again with other sensors adds what is missing. Needs `pip install -e '.[city]'`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from navsim_eval.city.make import CityConfig, CityReport, make_city
from navsim_eval.command_line import run_tool
from navsim_eval.config import DataConfig


@dataclass
class MakeCityConfig:
    """data: where to write; workers: processes, 0 for one per core."""

    data: DataConfig = field(default_factory=DataConfig)
    city: CityConfig = field(default_factory=CityConfig)
    workers: int = 0


def main(config: MakeCityConfig) -> None:
    bars: dict[str, tqdm] = {}

    def show(stage: str, finished: int, total: int) -> None:
        if stage not in bars:
            bars[stage] = tqdm(total=total, desc=f"{stage:>9}", unit="log" if stage == "sensors" else "district")
        bars[stage].total = total
        bars[stage].update(finished)

    try:
        report = make_city(config.city, config.data.root, config.data.maps, config.workers, show)
    finally:
        for bar in bars.values():
            bar.close()
    Console().print(as_table(report))


def as_table(report: CityReport) -> Table:
    stages = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in report.seconds.items())
    table = Table(title=f"Synthetic city in {report.root} ({stages})")
    for column in ("split", "scenes", "logs", "frames rendered now"):
        table.add_column(column, justify="left" if column == "split" else "right")
    for split, scenes in report.scenes.items():
        table.add_row(split, str(scenes), str(report.logs[split]), str(report.rendered.get(split, 0)))
    return table


if __name__ == "__main__":
    sys.exit(run_tool(main, MakeCityConfig, "make_city", __doc__))

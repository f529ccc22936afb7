"""Cache a split: features and training targets, and what scoring needs of every scene (metric caches).

    python tools/cache.py split=train                                  # both kinds, one process per core
    python tools/cache.py split=navtrain kind=features workers=16      # real data, $OPENSCENE_DATA_ROOT
    python tools/cache.py split=train features=city_nano               # sizes of the small planner
    python tools/cache.py split=train camera_codec=jpeg                # about 0.1 MB a sample instead of 0.9
    python tools/cache.py split=test kind=metrics metric=[pdms_v1,epdms_v2]
    python tools/cache.py split=train mode=verify                      # or mode=repair

Written to <output_dir>/<split>/features and <output_dir>/<split>/<metric>. Interrupted at any moment, the same command
goes on where it stopped. Broken scenes are left out, counted and listed in the folder's broken.json; the next run
tries them again.
"""

import sys

from tqdm import tqdm

from diffusiondrive.caches import CacheConfig, build_cache, cache_folders, check_caches
from navsim_eval.command_line import run_tool
from navsim_eval.dataset import SceneDataset
from navsim_eval.errors import UserError


def main(config: CacheConfig) -> None:
    if config.mode == "build":
        build(config)
    else:
        check(config)


def build(config: CacheConfig) -> None:
    # Starting a pool takes longer than scanning the logs of a small split, so only an explicit `workers` gets one here.
    scenes = SceneDataset.from_config(config.data, config.split, workers=max(config.workers, 1), progress=True)
    print(scenes.coverage)
    for name, folder in cache_folders(config).items():
        with tqdm(total=len(scenes), desc=name, unit=" scenes") as bar:
            report = build_cache(name, folder, scenes, config, bar.update)
        print(f"{name}: {report}")


def check(config: CacheConfig) -> None:
    with tqdm(desc=config.mode, unit=" samples") as bar:
        results = check_caches(config, bar.update)
    for name, result in results.items():
        print(f"{name}: {result}")
    damaged = [name for name, result in results.items() if not result.ok]
    if damaged and config.mode == "verify":
        raise UserError(f"damaged: {', '.join(damaged)}; run the same command with mode=repair, then with mode=build")


if __name__ == "__main__":
    sys.exit(run_tool(main, CacheConfig, "cache", __doc__))

"""Everything once, on two CPU cores: synthetic city, caches, anchors, a short training, PDMS beside baselines, latency.

    make demo                                    # the same, after setting up the environment
    python tools/demo.py scenes=200 epochs=10    # smaller
    python tools/demo.py fresh=true              # from the start, whatever an earlier demo finished

Prints each command as a user would type it; an interrupted demo continues. Ends with a table of planners on a test city
that none of them has seen, and an HTML report with pictures under output_dir.
"""

from __future__ import annotations

import sys

from diffusiondrive.demo import DemoConfig, run_demo
from navsim_eval.command_line import run_tool


def main(config: DemoConfig) -> None:
    run_demo(config)


if __name__ == "__main__":
    sys.exit(run_tool(main, DemoConfig, "demo", __doc__))

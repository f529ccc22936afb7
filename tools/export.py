"""Export a planner as two ONNX graphs, encoder and denoiser, and check them against the planner in onnxruntime.

    python tools/export.py planner=checkpoints/city_nano output=outputs/export
    python tools/export.py planner=outputs/train/planner batch=8 auxiliary=true
    python tools/export.py planner=outputs/train/planner tensorrt=true    # engines for this machine's GPU as well

Noise, anchors and labels are inputs of the denoiser; defaults.npz holds the planner's own. Shapes are fixed and listed
in graphs.json. Needs the extra `export` (onnx, onnxscript, onnxruntime); see docs/real_time.md.
"""

import sys

from diffusiondrive.runtime.export_check import ExportConfig, export_and_check
from navsim_eval.command_line import run_tool

if __name__ == "__main__":
    sys.exit(run_tool(lambda config: export_and_check(config, print), ExportConfig, "export", __doc__))

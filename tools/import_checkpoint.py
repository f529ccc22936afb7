"""Convert official DiffusionDrive weights into a checkpoint of this project.

    python tools/import_checkpoint.py source=diffusiondrive_navsim_88p1_PDMS.ckpt out=checkpoints/diffusiondrive

Every entry of the source is accounted for: missing, unexpected or ill-shaped ones are listed, and nothing is written.
The result loads with DiffusionDrive.from_pretrained("checkpoints/diffusiondrive").
"""

import sys

from diffusiondrive.official import ImportConfig, import_checkpoint
from navsim_eval.command_line import run_tool

if __name__ == "__main__":
    sys.exit(run_tool(lambda config: print(import_checkpoint(config)), ImportConfig, "import_checkpoint", __doc__))

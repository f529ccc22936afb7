"""The rows of the paper's comparison (arXiv 2411.15139, table 2), and what it says about them."""

from __future__ import annotations

from diffusiondrive.experiments.matrix import Row

UNJUDGED = ("loss.judged=0.0",)  # no row learns from the metric but the last, which is ours and not the paper's
DIFFUSIONDRIVE = Row("diffusiondrive", "DiffusionDrive", "", UNJUDGED)
JUDGED = Row("diffusiondrive_judged", "DiffusionDrive, labels judged by PDMS", "", ("loss.judged=0.5",))
ROWS = (
    Row("transfuser", "TransFuser (regression)", "transfuser", UNJUDGED),
    Row("diffusion_policy", "diffusion policy (U-Net, pure noise)", "diffusion_policy", UNJUDGED),
    Row("truncated_unet", "truncated diffusion, U-Net", "truncated_unet", UNJUDGED),
    DIFFUSIONDRIVE,
    JUDGED,
)
# The paper's orderings in chosen PDMS: the first is better than the second.
CLAIMS = (
    ("diffusiondrive", "truncated_unet"),
    ("truncated_unet", "diffusion_policy"),
    ("diffusiondrive", "diffusion_policy"),
    ("diffusiondrive", "transfuser"),
)
VANILLA, OURS = "diffusion_policy", DIFFUSIONDRIVE.name

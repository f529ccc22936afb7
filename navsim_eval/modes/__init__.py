"""What a planner's candidates are worth: how much they differ, the best and the mean of them, and whether the planner's
own preference is to be believed.

    candidates ─┬─ diversity.py                     the paper's area score, and its follow-up's
                ├─ score (as plans are scored) ─┐
                └─ distance to the human plan ──┴─ judge.py ─ modes.csv, mode_scenes.csv, numbers for the summary
                   logits ────────────────────────── calibration.py
"""

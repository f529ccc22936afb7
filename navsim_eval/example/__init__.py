"""One hand-made scene and a few plans, scored under both metric generations: the numbers and the picture of
docs/metrics.md.

    python -m navsim_eval.example            # prints the tables, writes docs/images/metrics.png
"""

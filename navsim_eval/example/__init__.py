"""One hand-made scene and five plans under both metric generations: numbers and picture of docs/metrics.md.

    python -m navsim_eval.example            # prints the tables, writes docs/images/metrics.png
"""

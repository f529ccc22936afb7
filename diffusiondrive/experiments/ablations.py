"""What each part of the planner is worth: it is changed, and everything else stays.

Rows with `weights_of` plan otherwise with the same weights; the others are trained anew. Base and unjudged row are the
paper table's (`diffusiondrive.experiments.paper`), so that in one `workdir` each training takes place once.
"""

from __future__ import annotations

from dataclasses import replace

from diffusiondrive.experiments.matrix import Row
from diffusiondrive.experiments.paper import DIFFUSIONDRIVE, JUDGED

BASE = JUDGED.name


def _resampled(name: str, title: str, *sampling: str) -> Row:
    return Row(name, title, weights_of=BASE, sampling=sampling)


def _retrained(name: str, title: str, *overrides: str) -> Row:
    return Row(name, title, overrides=overrides)


ROWS = (
    replace(JUDGED, title="as configured: 2 passes, reference schedule, 2 layers, 20 modes"),
    _resampled("steps_1", "1 pass", "sampling.steps=1"),
    _resampled("steps_4", "4 passes", "sampling.steps=4"),
    _resampled("steps_10", "10 passes", "sampling.steps=10"),
    _resampled("consistent", "consistent schedule", "sampling.schedule=consistent"),
    _resampled("noise_zero", "no noise at the start", "sampling.noise=zero"),
    _resampled("noise_fixed", "one draw of noise for all scenes", "sampling.noise=fixed"),
    _resampled("modes_10_of_20", "every second anchor", "sampling.modes=10"),
    _resampled("modes_40_of_20", "two draws an anchor", "sampling.modes=40"),
    _retrained("layers_1", "1 cascade layer", "model.decoder.layers=1"),
    _retrained("layers_3", "3 cascade layers", "model.decoder.layers=3"),
    _retrained("modes_10", "10 modes", "model.modes=10", "anchors=''"),
    _retrained("modes_40", "40 modes", "model.modes=40", "anchors=''"),
    _retrained("source_target", "training diffuses the human plan", "model.schedule.noise_source=target"),
    _retrained("source_mixed", "training diffuses either", "model.schedule.noise_source=mixed"),
    _retrained("no_map", "no look-ups in the planning map", "model.decoder.see_map=false"),
    _retrained("no_agents", "no attention to agents", "model.decoder.see_agents=false"),
    _retrained("no_ego", "no attention to the ego query", "model.decoder.see_ego=false"),
    _retrained("base_points", "corrections relative to noisy points", "model.decoder.base=points"),
    replace(DIFFUSIONDRIVE, title="labels by distance alone"),
    _retrained("unshared", "regression for the nearest mode alone", "loss.sharing=0.0"),
    _retrained("published_loss", "published weights of the loss", "loss=published"),
)

"""How the traffic around the ego moves while a plan is scored: replayed from the log, or reacting to the ego (IDM).

`rails` says, once per scene, which vehicles can react and along which lane; `reactive_idm` drives them against one
simulated ego per world; `log_replay` needs nothing but the recording. Only EPDMS (`epdms_v2`) knows reactive traffic.
"""

from __future__ import annotations

from navsim_eval.errors import UserError

NON_REACTIVE, REACTIVE = "non_reactive", "reactive"
POLICIES = (NON_REACTIVE, REACTIVE)  # under NAVSIM's names


def check_traffic(traffic: str, metric: str) -> None:
    """Raise UserError for an unknown policy, or one that the metric was never defined with."""
    if traffic not in POLICIES:
        raise UserError(f"traffic='{traffic}' is unknown; choose from {', '.join(POLICIES)}")
    if traffic == REACTIVE and metric == "pdms_v1":
        raise UserError("traffic=reactive: pdms_v1 (NAVSIM v1.1) is defined on replayed traffic only; use epdms_v2")

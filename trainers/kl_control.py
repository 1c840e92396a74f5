"""The weight of a KL penalty, adapted during a run."""

from __future__ import annotations

import math
from typing import Any


class KLController:
    """kl_coef, adapted after each rollout of n completions whose mean KL is known (arXiv:1909.08593):

    kl_coef <- kl_coef (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon)            target None: it stays as it is
    """

    def __init__(self, coef: float, target: float | None, horizon: int) -> None:
        self.coef, self.target, self.horizon = coef, target, horizon

    def update(self, kl: float, count: int) -> None:
        if self.target is not None and not math.isnan(kl):  # NaN: nothing could be scored
            self.coef *= 1 + min(max(kl / self.target - 1, -0.2), 0.2) * count / self.horizon

    def state_dict(self) -> dict[str, Any]:
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.coef = state["coef"]

"""The losses as modules: an objective and how the head makes logits, fixed at construction.

    loss_function = FusedLinearDPOLoss(beta=0.1)
    loss, metrics = loss_function(hidden, lm_head.weight, targets, completion_mask=mask, ref_logprobs=ref)

Arguments, results and errors of a call are those of `linear_policy_loss` and `linear_preference_loss`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from fused_rlhf import objectives, preferences
from fused_rlhf.functional import linear_policy_loss, linear_preference_loss
from fused_rlhf.objectives import PolicyLoss
from fused_rlhf.op.execute import Mode
from fused_rlhf.op.head import Head
from fused_rlhf.preferences import PreferenceLoss


class FusedLinearLoss(nn.Module):
    """Base of the modules below.

    Args:
        objective: a `PolicyLoss` or a `PreferenceLoss`.
        logit_scale, softcap, temperature, ignore_index, backend, mode, round_logits: as in `linear_policy_loss`.
    """

    def __init__(
        self,
        objective: PolicyLoss | PreferenceLoss,
        *,
        temperature: float = 1.0,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        ignore_index: int = -100,
        backend: str = "auto",
        mode: Mode = "auto",
        round_logits: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(objective, (PolicyLoss, PreferenceLoss)):
            raise TypeError(f"objective must be a PolicyLoss or a PreferenceLoss, got {type(objective).__name__}")
        self.objective = objective
        self.options: dict[str, Any] = {
            "temperature": temperature,
            "logit_scale": logit_scale,
            "softcap": softcap,
            "ignore_index": ignore_index,
            "backend": backend,
            "mode": mode,
            "round_logits": round_logits,
        }

    def forward(
        self, hidden: Tensor, weight: Tensor | Head, targets: Tensor, **batch: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """-> loss and metrics. `batch`: the other arguments of the function, by name; they go before the module's."""
        function: Callable[..., Any] = (
            linear_policy_loss if isinstance(self.objective, PolicyLoss) else linear_preference_loss
        )
        return function(hidden, weight, targets, objective=self.objective, **(self.options | batch))

    def extra_repr(self) -> str:
        return f"{self.objective}"


_HEAD = ("temperature", "logit_scale", "softcap", "ignore_index", "backend", "mode", "round_logits")


class _Preset(FusedLinearLoss):
    preset: Callable[..., PolicyLoss | PreferenceLoss]

    def __init__(self, **options: Any) -> None:
        head = {name: options.pop(name) for name in _HEAD if name in options}
        super().__init__(type(self).preset(**options), **head)


def _module(name: str, preset: Callable[..., Any]) -> type[_Preset]:
    doc = f"`{name}(...)` as a module. Keywords: those of `{name}`, and those of `FusedLinearLoss`."
    signature = inspect.Signature([*_keywords(preset), *_keywords(FusedLinearLoss, _HEAD)])
    own = {"preset": staticmethod(preset), "__doc__": doc, "__signature__": signature}
    return type(f"FusedLinear{name}Loss", (_Preset,), own)


def _keywords(function: Callable[..., Any], some: Sequence[str] = ()) -> list[inspect.Parameter]:
    found = inspect.signature(function).parameters.values()
    chosen = [p for p in found if p.kind is not p.VAR_KEYWORD and (not some or p.name in some)]
    return [parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in chosen]


FusedLinearGRPOLoss = _module("GRPO", objectives.GRPO)
FusedLinearDAPOLoss = _module("DAPO", objectives.DAPO)
FusedLinearDrGRPOLoss = _module("DrGRPO", objectives.DrGRPO)
FusedLinearGSPOLoss = _module("GSPO", objectives.GSPO)
FusedLinearCISPOLoss = _module("CISPO", objectives.CISPO)
FusedLinearSAPOLoss = _module("SAPO", objectives.SAPO)
FusedLinearRLOOLoss = _module("RLOO", objectives.RLOO)
FusedLinearPPOLoss = _module("PPO", objectives.PPO)
FusedLinearDPOLoss = _module("DPO", preferences.DPO)
FusedLinearIPOLoss = _module("IPO", preferences.IPO)
FusedLinearKTOLoss = _module("KTO", preferences.KTO)
FusedLinearORPOLoss = _module("ORPO", preferences.ORPO)
FusedLinearSimPOLoss = _module("SimPO", preferences.SimPO)
FusedLinearCPOLoss = _module("CPO", preferences.CPO)

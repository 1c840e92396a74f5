"""Fused LM-head, log-softmax, KL and policy objectives: the `[tokens, vocabulary]` logits never exist."""

from pathlib import Path as _Path

# A wheel holds kernels/ and trainers/ inside this folder; a checkout holds them beside it.
_here = _Path(__file__).resolve().parent
if not (_here / "kernels").is_dir():
    __path__.append(str(_here.parent))

from fused_rlhf import lm_head, objectives  # noqa: E402
from fused_rlhf.functional import LogProbs, linear_logprobs, linear_policy_loss  # noqa: E402
from fused_rlhf.objectives import DAPO, GRPO, GSPO, DrGRPO, PolicyLoss  # noqa: E402

__version__ = "0.1.0"
__all__ = [
    "DAPO",
    "GRPO",
    "GSPO",
    "DrGRPO",
    "LogProbs",
    "PolicyLoss",
    "linear_logprobs",
    "linear_policy_loss",
    "lm_head",
    "objectives",
]

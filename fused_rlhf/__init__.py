"""Fused LM-head, log-softmax, KL and policy objectives: the `[tokens, vocabulary]` logits never exist."""

from pathlib import Path as _Path

# A wheel holds kernels/ and trainers/ in this folder, a checkout links to them from here. Where links cannot be made (an
# sdist, a zip as pip unpacks it, Windows) they are found beside this folder; a type checker then sees `Any` for them.
_here = _Path(__file__).resolve().parent
if not (_here / "kernels").is_dir():
    __path__.append(str(_here.parent))

from fused_rlhf import lm_head, objectives, preferences  # noqa: E402
from fused_rlhf.functional import (  # noqa: E402
    LogProbs,
    linear_kl,
    linear_logprobs,
    linear_policy_loss,
    linear_preference_loss,
)
from fused_rlhf.losses import (  # noqa: E402
    FusedLinearCISPOLoss,
    FusedLinearCPOLoss,
    FusedLinearDAPOLoss,
    FusedLinearDPOLoss,
    FusedLinearDrGRPOLoss,
    FusedLinearGRPOLoss,
    FusedLinearGSPOLoss,
    FusedLinearIPOLoss,
    FusedLinearKTOLoss,
    FusedLinearLoss,
    FusedLinearORPOLoss,
    FusedLinearPPOLoss,
    FusedLinearRLOOLoss,
    FusedLinearSAPOLoss,
    FusedLinearSimPOLoss,
)
from fused_rlhf.objectives import (  # noqa: E402
    BNPO,
    CISPO,
    DAPO,
    GMPO,
    GRPO,
    GSPO,
    LUSPO,
    PPO,
    REINFORCE,
    RLOO,
    SAPO,
    VESPO,
    ClipCov,
    DrGRPO,
    GSPOToken,
    KLCov,
    PolicyLoss,
    ReinforcePP,
)
from fused_rlhf.objectives.reductions import Metrics  # noqa: E402
from fused_rlhf.objectives.reductions import combine as combine_metrics  # noqa: E402
from fused_rlhf.op.head import Head, LoRA  # noqa: E402
from fused_rlhf.preferences import CPO, DPO, IPO, KTO, ORPO, PreferenceLoss, SimPO  # noqa: E402

__version__ = "0.1.0"
__all__ = [
    "BNPO",
    "CISPO",
    "CPO",
    "DAPO",
    "DPO",
    "GMPO",
    "GRPO",
    "GSPO",
    "IPO",
    "KTO",
    "LUSPO",
    "ORPO",
    "PPO",
    "REINFORCE",
    "RLOO",
    "SAPO",
    "VESPO",
    "ClipCov",
    "DrGRPO",
    "FusedLinearCISPOLoss",
    "FusedLinearCPOLoss",
    "FusedLinearDAPOLoss",
    "FusedLinearDPOLoss",
    "FusedLinearDrGRPOLoss",
    "FusedLinearGRPOLoss",
    "FusedLinearGSPOLoss",
    "FusedLinearIPOLoss",
    "FusedLinearKTOLoss",
    "FusedLinearLoss",
    "FusedLinearORPOLoss",
    "FusedLinearPPOLoss",
    "FusedLinearRLOOLoss",
    "FusedLinearSAPOLoss",
    "FusedLinearSimPOLoss",
    "GSPOToken",
    "Head",
    "KLCov",
    "LoRA",
    "LogProbs",
    "Metrics",
    "PolicyLoss",
    "PreferenceLoss",
    "ReinforcePP",
    "SimPO",
    "combine_metrics",
    "linear_kl",
    "linear_logprobs",
    "linear_policy_loss",
    "linear_preference_loss",
    "lm_head",
    "objectives",
    "preferences",
]

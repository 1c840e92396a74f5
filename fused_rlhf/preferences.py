"""Preference objectives: the table of losses to add to, and `PreferenceLoss`, which weights some of them."""

from fused_rlhf.objectives.metrics import preference_metrics
from fused_rlhf.objectives.preference import (
    CPO,
    DPO,
    F_DIVERGENCES,
    IPO,
    KTO,
    ORPO,
    PRESETS,
    BoundPreferenceLoss,
    PreferenceLoss,
    SimPO,
    preset,
)
from fused_rlhf.objectives.preference_losses import (
    PREFERENCES,
    Examples,
    Loss,
    Pairs,
    Side,
    log1mexp,
    preference,
    unpaired_preference,
)

__all__ = [
    "CPO",
    "DPO",
    "F_DIVERGENCES",
    "IPO",
    "KTO",
    "ORPO",
    "PREFERENCES",
    "PRESETS",
    "BoundPreferenceLoss",
    "Examples",
    "Loss",
    "Pairs",
    "PreferenceLoss",
    "Side",
    "SimPO",
    "log1mexp",
    "preference",
    "preference_metrics",
    "preset",
    "unpaired_preference",
]

"""The reference of a DPO run, a model or numbers; and what any model, policy or reference, makes of completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fused_rlhf.segments import Sequences
from fused_rlhf.trainers import model as models
from fused_rlhf.trainers import pair_rows
from fused_rlhf.trainers.config import require
from fused_rlhf.trainers.dpo_config import Config
from fused_rlhf.trainers.pairs import Pair, PairBatch
from fused_rlhf.trainers.rollout import logprobs_of

if TYPE_CHECKING:
    from fused_rlhf.trainers.dpo import DPOTrainer


def reference_model(
    config: Config, all_pairs: Sequence[Pair], loaded: models.Loaded, given: PreTrainedModel | None
) -> PreTrainedModel | None:
    """The model to keep as the reference, None where none must be: numbers are known, or the model itself can serve."""
    own = given is None and config.ref_model is None
    unknown = [pair.where for pair in all_pairs if pair.ref is None]
    if len(unknown) < len(all_pairs):
        require(
            not unknown, pair_rows.REFERENCE[0], None, f"a number in every row, or in none, but {unknown[:1]} has none"
        )
        given_twice, there = (config.ref_model, config.precompute_ref), f"where rows hold {pair_rows.REFERENCE}"
        require(own and not config.precompute_ref, "ref_model, precompute_ref", given_twice, f"none {there}")
        require(config.warmup_steps == 0, "warmup_steps", config.warmup_steps, f"0 {there}")
        return None
    if not config.loss().needs_reference:
        return None
    return None if own and config.precompute_ref else models.reference_for(config, loaded, given)


def sums(model: Any, config: Config, batch: PairBatch) -> Tensor:
    """(S,) log-probs of the completions, summed as the objective does it."""
    values, lengths = logprobs(model, config, batch), batch.completion_mask.sum(dim=1)
    S = len(lengths)
    sequences = Sequences.of(torch.arange(S, device=values.device).repeat_interleave(lengths), S)
    return config.loss().sums(values, sequences)


def logprobs(model: Any, config: Config, batch: PairBatch) -> Tensor:
    """(N,) those of the completions' tokens, one sequence after the other."""
    laid = batch.batch()
    return logprobs_of(laid.head_inputs(model), laid.targets, 1.0, config.backend).logprobs


class Precomputed:
    """The reference's log-probs of all pairs: a resumed run takes them from its checkpoint."""

    def __init__(self, trainer: DPOTrainer) -> None:
        self.trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        return {"sums": [pair.ref for pair in (*self.trainer.train, *self.trainer.test)]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for pair, ref in zip((*self.trainer.train, *self.trainer.test), state["sums"], strict=True):
            pair.ref = ref
        self.trainer.reference = None

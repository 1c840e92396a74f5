"""The losses of `liger_kernel.chunked_loss` under their own names, arguments and results, on our op.

    from fused_rlhf.integrations.liger import LigerFusedLinearDPOLoss     # in place of liger_kernel.chunked_loss

Names, argument orders, defaults and the structure of what comes back are those of Liger 0.8.5, which need not be installed.
`compiled` and `chunk_size` are taken for the sake of the signature and change nothing: nothing is compiled, and the tiling
does not depend on the batch. Attributes have the arguments' names, and may be changed between calls. All of the classes differ
from Liger's in this:

- Logits are fp32 whatever the inputs' dtype; Liger rounds them to it before the softmax. fp64 inputs stay fp64.
- Ignored tokens cost nothing, whatever their hidden states hold, and are part of no mean or sum of logits.
- Scratch memory does not grow with the length of a completion; Liger's losses over completions hold one's logits.
- A completion without tokens has a mean log-prob of 0, where Liger divides by its length and gives NaN.
- What is returned beside the loss has no graph. Liger's has one that gives no gradient.
- Arguments that Liger takes and drops are put to use or refused; each class says which.
- label_smoothing lies in [0, 0.5).

Errors are those of `linear_logprobs`, which calls lin_weight weight, _input hidden and target targets.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fused_rlhf import notices
from fused_rlhf.checks import shape
from fused_rlhf.door import Door
from fused_rlhf.functional import linear_kl, linear_logprobs, linear_policy_loss
from fused_rlhf.kernels.interface import Stats
from fused_rlhf.objectives import PRESETS, Count, PolicyLoss
from fused_rlhf.objectives.registry import keywords
from fused_rlhf.op.execute import loss_of, statistics
from fused_rlhf.op.head import Call, Head, check_head, check_reference
from fused_rlhf.op.rows import flat_sequences, tokens_of
from fused_rlhf.op.sequences import reference_logprobs
from fused_rlhf.preferences import PREFERENCES, PreferenceLoss, log1mexp
from fused_rlhf.segments import Sequences, precise

__all__ = [
    "LigerFusedLinearCPOLoss",
    "LigerFusedLinearDPOLoss",
    "LigerFusedLinearGRPOLoss",
    "LigerFusedLinearJSDLoss",
    "LigerFusedLinearKTOLoss",
    "LigerFusedLinearORPOLoss",
    "LigerFusedLinearSimPOLoss",
]

Outputs = tuple[Tensor, tuple[Tensor, ...]]


# --------------------------------------------------------------------------------------------------------- preferences


@dataclass(frozen=True)
class _Completions:
    """S completions of N real tokens, scored."""

    sequences: Sequences
    stats: Stats  # (N,) log-probs, with their graph, and mean logits
    ref_logprobs: Tensor | None  # (N,)

    @property
    def logprobs(self) -> Tensor:
        return self.stats.logprobs

    def reduce(self, logprobs: Tensor | None, average: bool) -> Tensor:
        """(S,) sums or means over each completion; zeros of None."""
        if logprobs is None:
            return self.logprobs.new_zeros(self.sequences.count)
        return self.sequences.mean(logprobs) if average else self.sequences.sum(logprobs)

    def mean_over(self, values: Tensor, keep: Tensor) -> Tensor:
        """Mean of (N,) values over the tokens of some completions, keep (S,) bool; 0 without tokens."""
        of_tokens = self.sequences.spread(keep)
        return torch.where(of_tokens, values, 0.0).sum() / of_tokens.sum().clamp(min=1)


def _score(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    ref_input: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
) -> _Completions:
    """(S, T, H) hidden states of (S, T) targets."""
    head = Head(weight, bias)
    door, call = Door(), Call(ignore_index=ignore_index)
    projection, temperature = check_head(hidden, head, target, call)
    _announce(hidden, head)
    if target.dim() != 2:
        raise ValueError(f"target must be (S, T), one row for each completion, got {shape(target)}")
    reference = check_reference(hidden, head, projection, None, ref_input, ref_weight, ref_bias)
    sequence_of, count = flat_sequences(door, target, None)
    tokens = tokens_of(door, target, None, call, projection, temperature, sequence_of, count)
    ref_logprobs = None if reference is None else reference_logprobs(reference, tokens, "auto")
    rows = tokens.rows(hidden, head, projection)
    stats = statistics(rows, projection, ("mean_logit",), "auto")
    return _Completions(tokens.sequences, stats, ref_logprobs)


def _announce(hidden: Tensor, head: Head) -> None:
    notices.runs("Liger's losses", hidden, head, "auto", "ignored tokens are skipped")


def _check_reference(use_ref_model: bool, ref_input: Tensor | None) -> None:
    if use_ref_model and ref_input is None:
        raise ValueError("ref_input must be given with use_ref_model=True, got None")
    if not use_ref_model and ref_input is not None:
        raise ValueError(f"ref_input must be None with use_ref_model=False, got {shape(ref_input)}")


def _loss(
    objective: PreferenceLoss,
    scored: _Completions,
    average: bool,
    labels: Tensor | None = None,
    kl: Tensor | None = None,
) -> Tensor:
    """Mean of the objective over pairs, or over single completions."""
    logprobs, sequences = scored.logprobs, scored.sequences
    if average:  # then a sum of them is a mean
        logprobs = logprobs / sequences.spread(sequences.divisors)
    bound = objective.bind(
        sequences=sequences,
        ref_logprobs=None,
        ref_sums=precise(scored.reduce(scored.ref_logprobs, average)) if objective.needs_reference else None,
        labels=labels,
        kl=kl,
        num_pairs=max(sequences.count // (2 if objective.paired else 1), 1),
        num_tokens=1,
        dtype=logprobs.dtype,
    )
    return loss_of(replace(scored.stats, logprobs=logprobs), bound, "auto")


class _Loss(nn.Module):
    """A loss whose attributes are its constructor's arguments, as Liger's are: changed, the next call is of what they say."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__()
        for name, value in arguments.items():
            if name not in ("self", "__class__"):
                setattr(self, name, value)
        _ = self.objective  # refuses what cannot be

    @property
    def objective(self) -> Any:
        """What the attributes mean."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{self.objective}"


class _PairedLoss(_Loss):
    """A preference loss of S / 2 chosen completions and as many rejected ones, with the NLL of the chosen added."""

    ignore_index: int
    beta: float
    compute_nll_loss: bool
    alpha: float = 1.0
    average_log_prob: bool = True

    def _run(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None,
        nll_target: Tensor | None = None,
        **ref: Tensor | None,
    ) -> Outputs:
        """-> loss, (logps of chosen, of rejected, mean logits of chosen, of rejected, NLL, rewards of both)."""
        scored = _score(_input, lin_weight, target, bias, self.ignore_index, **ref)
        count = scored.sequences.count
        if count % 2:
            raise ValueError(f"target must hold as many rejected as chosen completions, got {count} in all")
        objective = self.objective
        own_mean = PREFERENCES[objective.losses[0]].averaged  # the loss itself takes means of the sums it is given
        loss = _loss(objective, scored, self.average_log_prob and not own_mean)
        chosen = torch.arange(count, device=target.device) < count // 2
        nll = loss.new_zeros(())
        if self.compute_nll_loss and nll_target is None:
            nll = -scored.mean_over(scored.logprobs, chosen)
        elif self.compute_nll_loss and nll_target is not None:
            half = nll_target[: count // 2]
            found = linear_logprobs(_input[: count // 2], lin_weight, half, bias, ignore_index=self.ignore_index)
            nll = -found.logprobs.sum() / (half != self.ignore_index).sum().clamp(min=1)
        average = self.average_log_prob or own_mean
        with torch.no_grad():
            logps, ref_logps = (scored.reduce(lp, average) for lp in (scored.logprobs, scored.ref_logprobs))
            means = [scored.mean_over(scored.stats["mean_logit"], keep) for keep in (chosen, ~chosen)]
            rewards = self.beta * (logps - ref_logps)
        return loss + self.alpha * nll, (*logps.chunk(2), *means, nll.detach(), *rewards.chunk(2))


_DPO_LOSSES = (
    *("sigmoid", "hinge", "exo_pair", "nca_pair", "robust"),
    *("bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop"),
)


class LigerFusedLinearDPOLoss(_PairedLoss):
    """DPO and its variants: sigmoid, hinge, exo_pair, nca_pair, robust, bco_pair, sppo_hard, apo_zero, apo_down, discopop.

    Differs from Liger, beside what the module says: label_smoothing smooths "sigmoid" too (cDPO), as documented there, where
    Liger's value is that without it; label_smoothing and discopop_tau are refused for a loss_type without them; so is ref_input
    with use_ref_model=False; ref_weight=None means the policy's own head.
    """

    use_ref_model: bool
    loss_type: str
    label_smoothing: float
    discopop_tau: float

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
    ) -> None:
        super().__init__(locals())

    @property
    def objective(self) -> PreferenceLoss:
        if self.loss_type not in _DPO_LOSSES:
            raise ValueError(f"loss_type must be one of {list(_DPO_LOSSES)}, got {self.loss_type!r}")
        given = {"label_smoothing": (self.label_smoothing, 0.0), "discopop_tau": (self.discopop_tau, 0.05)}
        taken = keywords(PREFERENCES[self.loss_type].function)
        for name, (value, default) in given.items():
            if name not in taken and value != default:
                raise ValueError(
                    f"{name} must be {default} for loss_type={self.loss_type!r}, which has none; got {value}"
                )
        options = {name: value for name, (value, _) in given.items() if name in taken}
        return PreferenceLoss((self.loss_type,), beta=self.beta, options=options)

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
    ) -> Outputs:
        """A batch of P chosen completions followed by their P rejected ones, S = 2 P.

        Args:
            lin_weight: (V, H). _input: (S, T, H). target: (S, T) int64. bias: (V,) or None.
            ref_input, ref_weight, ref_bias: of the reference; they take no gradient.

        Returns:
            loss and (chosen_logps (P,), rejected_logps (P,), chosen_logits_mean, rejected_logits_mean, nll_loss,
            chosen_rewards (P,), rejected_rewards (P,)).
        """
        _check_reference(self.use_ref_model, ref_input)
        return self._run(
            lin_weight, _input, target, bias, ref_input=ref_input, ref_weight=ref_weight, ref_bias=ref_bias
        )


class LigerFusedLinearCPOLoss(_PairedLoss):
    """CPO (arXiv:2401.08417). Differs from Liger as the module says."""

    label_smoothing: float

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> None:
        super().__init__(locals())

    @property
    def objective(self) -> PreferenceLoss:
        return PreferenceLoss(("cpo",), beta=self.beta, options={"label_smoothing": self.label_smoothing})

    def forward(self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None) -> Outputs:
        """Arguments and results as those of `LigerFusedLinearDPOLoss`, without a reference."""
        return self._run(lin_weight, _input, target, bias)


class LigerFusedLinearSimPOLoss(_PairedLoss):
    """SimPO (arXiv:2405.14734); gamma is the margin itself, not its ratio to beta. Differs from Liger as the module says."""

    label_smoothing: float
    gamma: float

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        gamma: float = 0.5,
        chunk_size: int = 1,
    ) -> None:
        super().__init__(locals())

    @property
    def objective(self) -> PreferenceLoss:
        options = {"gamma": self.gamma, "label_smoothing": self.label_smoothing}
        return PreferenceLoss(("simpo",), beta=self.beta, options=options)

    def forward(self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None) -> Outputs:
        """Arguments and results as those of `LigerFusedLinearDPOLoss`, without a reference; logps are means."""
        return self._run(lin_weight, _input, target, bias)


class LigerFusedLinearORPOLoss(_PairedLoss):
    """ORPO (arXiv:2403.07691).

    Differs from Liger, beside what the module says: log(1 - p) is computed without cancellation, so that a completion that is
    nearly certain gives no NaN; nll_target is refused with compute_nll_loss=False, and otherwise costs one more pass over the
    chosen completions.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        chunk_size: int = 1,
    ) -> None:
        super().__init__(locals())

    @property
    def objective(self) -> PreferenceLoss:
        return PreferenceLoss(("orpo",), beta=self.beta)

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        nll_target: Tensor | None = None,
    ) -> Outputs:
        """As `LigerFusedLinearDPOLoss`, without a reference; logps are means.

        Args:
            nll_target: (S, T), the labels of the NLL where they are not `target`; those of the chosen completions are read.

        Returns:
            loss, and the seven of `LigerFusedLinearDPOLoss` followed by two means over pairs: of log sigmoid(log odds ratio),
            and of the log odds ratio.
        """
        if nll_target is not None and nll_target.shape != target.shape:
            raise ValueError(f"nll_target must have the shape of target {shape(target)}, got {shape(nll_target)}")
        if nll_target is not None and not self.compute_nll_loss:
            raise ValueError(f"nll_target must be None with compute_nll_loss=False, got {shape(nll_target)}")
        loss, found = self._run(lin_weight, _input, target, bias, nll_target)
        chosen, rejected = found[:2]
        log_odds = chosen - log1mexp(chosen) - rejected + log1mexp(rejected)
        return loss, (*found, nn.functional.logsigmoid(log_odds).mean(), log_odds.mean())


class LigerFusedLinearKTOLoss(_Loss):
    """KTO (arXiv:2402.01306).

    Differs from Liger, beside what the module says: kl may be one number or one for each completion, (S,), as documented there,
    where Liger's value with its default chunk_size compares every completion with every kl; ref_input is refused with
    use_ref_model=False; ref_weight=None means the policy's own head.
    """

    ignore_index: int
    beta: float
    use_ref_model: bool
    average_log_prob: bool

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compiled: bool = True,
        use_ref_model: bool = False,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> None:
        super().__init__(locals())

    @property
    def objective(self) -> PreferenceLoss:
        return PreferenceLoss(("kto",), beta=self.beta)

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        preference_labels: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        kl: Tensor | None = None,
    ) -> Outputs:
        """A batch of S completions. The hidden states come first here, unlike in the losses over pairs.

        Args:
            _input: (S, T, H). lin_weight: (V, H). target: (S, T) int64. bias: (V,) or None.
            preference_labels: (S,) bool or 0 / 1, whether a completion is desirable; must be given.
            ref_input, ref_weight, ref_bias: of the reference; they take no gradient.
            kl: 0-d, (1,) or (S,), without gradient; None is 0.

        Returns:
            loss and (chosen_logps_sum, rejected_logps_sum, chosen_logits_sum, rejected_logits_sum, chosen_rewards_sum,
            rejected_rewards_sum), 0-d.
        """
        _check_reference(self.use_ref_model, ref_input)
        scored = _score(_input, lin_weight, target, bias, self.ignore_index, ref_input, ref_weight, ref_bias)
        count = scored.sequences.count
        if preference_labels is None or preference_labels.shape != (count,):
            got = None if preference_labels is None else shape(preference_labels)
            raise ValueError(f"preference_labels must be ({count},), one for each completion, got {got}")
        if kl is not None and kl.shape not in ((), (1,), (count,)):
            raise ValueError(f"kl must be 0-d, (1,) or ({count},), one for each completion, got {shape(kl)}")
        chosen = preference_labels.bool()
        kl = None if kl is None else kl.detach().to(scored.logprobs.dtype)
        loss = _loss(self.objective, scored, self.average_log_prob, chosen, kl)
        with torch.no_grad():
            average = self.average_log_prob
            logps, ref_logps = (scored.reduce(lp, average) for lp in (scored.logprobs, scored.ref_logprobs))
            logits = scored.sequences.sum(scored.stats["mean_logit"]) * len(lin_weight)
            each = (logps, logits, self.beta * (logps - ref_logps))
            sums = [torch.where(keep, values, 0.0).sum() for values in each for keep in (chosen, ~chosen)]
        return loss, tuple(sums)


# ---------------------------------------------------------------------------------------------------------------- GRPO


class LigerFusedLinearGRPOLoss(_Loss):
    """GRPO, and by loss_type bnpo, dr_grpo, dapo, cispo, sapo, luspo, vespo.

    Differs from Liger, beside what the module says:

    - luspo sums each completion's own tokens and takes the mean over completions, at either level. Liger's token level lets
      masked positions into the loss.
    - dapo, cispo and vespo divide by num_items_in_batch / ranks, as Liger does; where that is not given, the ranks' tokens are
      counted in one collective a call, not in one for each chunk, which hangs where ranks hold unequal batches. TRL's own
      count is that times gradient_accumulation_steps / steps_per_generation: give num_items_in_batch times those.
    - delta is refused for cispo, sapo and vespo, which do not clip twice; so are beta without a reference, and
      use_bias_correction_kl without beta. A reference is not asked for, and not computed, when beta is 0.
    - vllm_is_ratio must be (B, T) for vespo, which sums its logarithms over each completion's own tokens.
    - advantages may be (B, T). A token whose vllm_is_ratio is 0 does not count as clipped.
    """

    beta: float
    use_ref_model: bool
    epsilon_low: float
    epsilon_high: float
    loss_type: str
    max_completion_length: int | None
    importance_sampling_level: str
    sapo_temperature_pos: float
    sapo_temperature_neg: float
    temperature: float
    delta: float | None
    use_bias_correction_kl: bool
    vespo_k_pos: float
    vespo_lambda_pos: float
    vespo_k_neg: float
    vespo_lambda_neg: float

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ) -> None:
        super().__init__(locals())

    @property
    def objective(self) -> PolicyLoss:
        beta, delta, loss_type, level = self.beta, self.delta, self.loss_type, self.importance_sampling_level
        clipped = {"epsilon_low": self.epsilon_low, "epsilon_high": self.epsilon_high, "delta": delta}
        options: dict[str, dict[str, float | None]] = {
            "grpo": clipped,
            "bnpo": clipped,
            "dr_grpo": clipped | {"max_completion_length": self.max_completion_length},
            "dapo": clipped,
            "luspo": clipped,
            "cispo": {"ratio_max": self.epsilon_high},
            "sapo": {"tau_pos": self.sapo_temperature_pos, "tau_neg": self.sapo_temperature_neg},
            "vespo": {
                "k_pos": self.vespo_k_pos,
                "lambda_pos": self.vespo_lambda_pos,
                "k_neg": self.vespo_k_neg,
                "lambda_neg": self.vespo_lambda_neg,
            },
        }
        if loss_type not in options:
            raise ValueError(f"loss_type must be one of {list(options)}, got {loss_type!r}")
        if level not in ("token", "sequence"):
            raise ValueError(f"importance_sampling_level must be 'token' or 'sequence', got {level!r}")
        own_ratio = "delta" not in options[loss_type]
        if own_ratio and level != "token":
            raise ValueError(f"importance_sampling_level must be 'token' for loss_type={loss_type!r}, got 'sequence'")
        if own_ratio and delta is not None:
            raise ValueError(f"delta must be None for loss_type={loss_type!r}, which does not clip twice; got {delta}")
        if loss_type == "dr_grpo" and self.max_completion_length is None:
            raise ValueError("max_completion_length must be given for loss_type='dr_grpo', got None")
        if beta != 0 and not self.use_ref_model:
            raise ValueError(f"use_ref_model must be True when beta is not 0, got False with beta={beta}")
        return PRESETS[loss_type](
            beta=beta, level=level, use_bias_correction_kl=self.use_bias_correction_kl, **options[loss_type]
        )

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: Count | None = None,
    ) -> Outputs:
        """A batch of B completions.

        Args:
            _input: (B, T, H). lin_weight: (V, H). selected_token_ids: (B, T) int64. bias: (V,) or None.
            attention_mask: (B, T) bool or 0 / 1; tokens outside it cost nothing.
            advantages: (B,) or (B, T).
            ref_per_token_logps: (B, T); or ref_input (B, T, H'), ref_weight (by default lin_weight) and ref_bias, from which
                they are computed. Where both are given the log-probs are taken, with a warning.
            old_per_token_logps: (B, T); None means on-policy.
            vllm_is_ratio: (B,), (B, 1) or (B, T), not negative: what the surrogate is multiplied by.
            num_items_in_batch: active tokens of all ranks, for dapo, cispo and vespo.

        Returns:
            loss and (kl, clip_ratio), or (clip_ratio,) when beta is 0: means over the active tokens, 0-d.
        """
        if ref_per_token_logps is not None and ref_input is not None:
            warnings.warn("ref_per_token_logps and ref_input are both given; ref_input is not used", stacklevel=2)
        if self.beta == 0 or ref_per_token_logps is not None:
            ref_input = ref_weight = ref_bias = None
        if advantages.dim() == 1:  # one for each token, so that metrics are means over tokens at either level
            advantages = advantages[:, None]
        if advantages.shape not in ((len(attention_mask), 1), attention_mask.shape):
            raise ValueError(
                f"advantages must be (B,) or (B, T) with (B, T)={shape(attention_mask)}, got {shape(advantages)}"
            )
        advantages = advantages.expand(attention_mask.shape)
        objective, sampling = self.objective, None
        if vllm_is_ratio is not None:
            ratio = self._ratio(vllm_is_ratio, attention_mask)
            if self.loss_type == "vespo":
                if old_per_token_logps is None:
                    with torch.no_grad():
                        old_per_token_logps = linear_logprobs(
                            _input,
                            lin_weight,
                            selected_token_ids.masked_fill(~attention_mask.bool(), -100),
                            bias,
                            self.temperature,
                        ).logprobs
                # Any bound makes the ratio count as it is given: exp(old - sampling) is never below 0.
                objective = replace(objective, importance_sampling="token_truncate", importance_sampling_min=0.0)
                sampling = old_per_token_logps - ratio.log()
            else:  # surrogates are linear in a factor of the advantage that is not negative
                advantages = advantages * ratio
        loss, metrics = linear_policy_loss(
            _input,
            lin_weight,
            selected_token_ids,
            advantages=advantages,
            objective=objective,
            completion_mask=attention_mask,
            old_logprobs=old_per_token_logps,
            ref_logprobs=None if self.beta == 0 else ref_per_token_logps,
            sampling_logprobs=sampling,
            ref_hidden=ref_input,
            ref_weight=ref_weight,
            ref_bias=ref_bias,
            num_tokens=self._num_tokens(attention_mask, num_items_in_batch),
            bias=bias,
            temperature=self.temperature,
        )
        _announce(_input, Head(lin_weight, bias))
        clip_ratio = {"cispo": "cispo_clip_ratio", "sapo": None, "vespo": None}.get(
            self.loss_type, "clip_ratio/region_mean"
        )
        clipped = torch.zeros_like(loss, requires_grad=False) if clip_ratio is None else metrics[clip_ratio]
        return loss, (clipped,) if self.beta == 0 else (metrics["kl"], clipped)

    def _ratio(self, ratio: Tensor, mask: Tensor) -> Tensor:
        """(B, T)"""
        B, T = mask.shape
        if ratio.shape not in ((B,), (B, 1), (B, T)) or (self.loss_type == "vespo" and ratio.shape != (B, T)):
            allowed = f"({B}, {T})" if self.loss_type == "vespo" else f"({B},), ({B}, 1) or ({B}, {T})"
            raise ValueError(f"vllm_is_ratio must be {allowed} for loss_type={self.loss_type!r}, got {shape(ratio)}")
        return (ratio[:, None] if ratio.dim() == 1 else ratio).expand(B, T)

    def _num_tokens(self, mask: Tensor, num_items_in_batch: Count | None) -> Count | None:
        """What dapo, cispo and vespo divide by: active tokens of all ranks, for each of them; None for the others."""
        if self.loss_type not in ("dapo", "cispo", "vespo"):
            return None
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        ranks = torch.distributed.get_world_size() if distributed else 1
        if num_items_in_batch is None:
            num_items_in_batch = mask.bool().sum()
            if distributed:
                torch.distributed.all_reduce(num_items_in_batch)
        share = num_items_in_batch / ranks
        return share.clamp(min=1) if isinstance(share, Tensor) else max(share, 1)


# -------------------------------------------------------------------------------------------------------- distillation


class LigerFusedLinearJSDLoss(_Loss):
    """Distillation: weight_hard_loss NLL of the labels + weight_soft_loss divergence from the teacher, means over the labels.

    beta = 0 is KL(teacher || student), beta = 1 is KL(student || teacher), and between them
    beta KL(teacher || m) + (1 - beta) KL(student || m) with m = beta teacher + (1 - beta) student. temperature is of the
    divergence alone.

    Differs from Liger, beside what the module says: the softmaxes are of fp32 logits, where those of rounded ones make
    divergences of a few 1e-3, negative ones too; a teacher whose vocabulary is padded beyond the student's is taken without the
    columns of its padding, where Liger gives the student a logit of 0 there, and with it probability; a frozen head costs no
    gradient.
    """

    weight_hard_loss: float
    weight_soft_loss: float
    beta: float
    ignore_index: int
    temperature: float
    return_soft_hard_loss: bool

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ) -> None:
        super().__init__(locals())

    @property
    def objective(self) -> str:
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta must lie in [0, 1], got {self.beta}")
        return f"{self.weight_hard_loss} NLL + {self.weight_soft_loss} divergence, beta={self.beta}"

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Rows of N tokens.

        Args:
            student_input: (N, H). student_weight: (V, H). student_bias: (V,) or None.
            teacher_input: (N, H'). teacher_weight: (V', H'), V' >= V. teacher_bias: (V',) or None. They take no gradient.
            true_labels: (N,) int64.

        Returns:
            loss; or loss, soft loss and hard loss with return_soft_hard_loss.
        """
        _ = self.objective  # refuses what cannot be
        live = true_labels != self.ignore_index
        count = live.sum().clamp(min=1)
        hard = soft = torch.zeros((), device=student_input.device)
        if self.weight_hard_loss != 0 or self.return_soft_hard_loss:
            found = linear_logprobs(
                student_input, student_weight, true_labels, student_bias, ignore_index=self.ignore_index
            )
            hard = -found.logprobs.sum() / count
        if self.weight_soft_loss != 0 or self.return_soft_hard_loss:
            V = len(student_weight)
            between = 0 < self.beta < 1
            divergences = linear_kl(
                student_input,
                student_weight,
                teacher_input,
                teacher_weight[:V],
                "jsd" if between else ("forward", "reverse")[int(self.beta)],
                mask=live,
                bias=student_bias,
                ref_bias=None if teacher_bias is None else teacher_bias[:V],
                temperature=self.temperature,
                beta=self.beta if between else 0.5,
            )
            soft = divergences.sum() / count
        _announce(student_input, Head(student_weight, student_bias))
        loss = self.weight_hard_loss * hard + self.weight_soft_loss * soft
        return (loss, soft.detach(), hard.detach()) if self.return_soft_hard_loss else loss

"""Preference objectives: losses of `preference_losses` over the summed log-probs of whole completions.

    loss = mean over pairs of  sum_k weight_k loss_k(pair),     lp = sum_t w_t logprob_t over the completion

w_t is 1, or ld_alpha beyond the length of the shorter completion of the pair (LD-DPO, arXiv:2409.06411). With the
log-ratio lr = lp - ref, u is lr itself or its image under another f-divergence (f-DPO, arXiv:2309.16240):

    reverse_kl u = lr          js_divergence    u = log 2 + logsigmoid(lr)
    forward_kl u = 1 - e^-lr   alpha_divergence u = (e^((a - 1) lr) - 1) / (a - 1)

and d = u_chosen - u_rejected. A preset is a constructor: `DPO()` is `PreferenceLoss(("sigmoid",))`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fused_rlhf.kernels.interface import BoundPreference, Stats, TokenGrads
from fused_rlhf.objectives import signatures
from fused_rlhf.objectives.preference_losses import PREFERENCES, Examples, Pairs, Side
from fused_rlhf.objectives.registry import (
    check_number,
    check_options,
    differentiated,
    formula,
    keywords,
    options_of,
    registered,
)
from fused_rlhf.objectives.surrogates import Count
from fused_rlhf.segments import Sequences, precise

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
PRESETS: dict[str, Callable[..., PreferenceLoss]] = {}


@dataclass(frozen=True)
class PreferenceLoss:
    """One preference objective, complete.

    Args:
        losses: names in `PREFERENCES`, all over pairs or all over single completions.
        weights: one for each of them.
        beta: > 0.
        f_divergence: a name in `F_DIVERGENCES`: how log-ratios become the scores of the losses that use d.
        f_alpha: a of the alpha divergence.
        ld_alpha: in [0, 1]: weight of the tokens beyond the shorter completion; None: 1.
        use_weighting: weight each pair by w_c w_r, w = exp(mean_t(logprob - log sum_v p^2)), without gradient
            (WPO, arXiv:2406.11827). The NLL of `sft` is that of all pairs of a call, for each of them.
        options: keywords of the losses: label_smoothing, gamma, ...

    Raises:
        ValueError: an unknown name, a number out of range, options that contradict each other.
        TypeError: an option that none of the losses takes.
    """

    losses: tuple[str, ...] = ("sigmoid",)
    weights: tuple[float, ...] = (1.0,)
    beta: float = 0.1
    f_divergence: str = "reverse_kl"
    f_alpha: float | None = None
    ld_alpha: float | None = None
    use_weighting: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.losses or isinstance(self.losses, str):
            raise ValueError(f"losses must be a tuple of names in {sorted(PREFERENCES)}, got {self.losses!r}")
        for name in self.losses:
            registered("losses", name, PREFERENCES)
        if len(self.weights) != len(self.losses):
            raise ValueError(f"weights must hold one number for each of {self.losses}, got {self.weights}")
        for weight in self.weights:
            check_number("weights", weight)
        if len({PREFERENCES[name].paired for name in self.losses}) > 1:
            raise ValueError(f"losses must be all over pairs or all over single completions, got {self.losses}")
        check_number("beta", self.beta, above=0)
        registered("f_divergence", self.f_divergence, dict.fromkeys(F_DIVERGENCES))
        if (self.f_alpha is not None) != (self.f_divergence == "alpha_divergence"):
            raise ValueError(
                f"f_alpha must be given with f_divergence='alpha_divergence' and with no other, got {self.f_alpha} "
                f"with {self.f_divergence!r}"
            )
        if self.f_alpha is not None:
            check_number("f_alpha", self.f_alpha)
        if self.ld_alpha is not None and not 0 <= self.ld_alpha <= 1:
            raise ValueError(f"ld_alpha must lie in [0, 1], got {self.ld_alpha}")
        if not self.paired:
            plain = ("f_divergence", "reverse_kl"), ("ld_alpha", None), ("use_weighting", False)
            for name, default in plain:
                if getattr(self, name) != default:
                    raise ValueError(f"{name} must be {default!r} for {self.losses}, which know no pairs")
        check_options(
            self.losses,
            self.options,
            set().union(*(keywords(PREFERENCES[name].function) for name in self.losses)),
        )
        for name, value in self.options.items():
            check_number(name, value)
        self._check_label_smoothing()

    def _check_label_smoothing(self) -> None:
        for name in self.losses:
            e = options_of(PREFERENCES[name].function, self.options).get("label_smoothing", 0.0)
            low = name == "exo_pair"
            if not (0 < e < 0.5 if low else 0 <= e < 0.5):
                raise ValueError(f"label_smoothing must lie in {'(' if low else '['}0, 0.5) for {name}, got {e}")

    @property
    def paired(self) -> bool:
        return PREFERENCES[self.losses[0]].paired

    @property
    def needs_reference(self) -> bool:
        return any(PREFERENCES[name].reference for name in self.losses)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Statistics of the op that the loss needs beside the log-probs."""
        return ("sum_sq",) if self.use_weighting else ()

    def bind(
        self,
        *,
        sequences: Sequences,
        ref_logprobs: Tensor | None,
        ref_sums: Tensor | None,
        labels: Tensor | None,
        kl: Tensor | None,
        num_pairs: Count | None,
        num_tokens: Count | None,
        dtype: torch.dtype,
    ) -> BoundPreferenceLoss:
        """The objective over N real tokens of S sequences with all but the log-probs known.

        ref_logprobs (N,) or ref_sums (S,), or neither; labels (S,) bool and kl 0-d for unpaired losses; num_pairs:
        of examples, where unpaired; num_tokens: of the chosen completions. The counts are global; None: of this call.
        """
        half = sequences.count // 2
        if num_pairs is None:
            num_pairs = max(half if self.paired else sequences.count, 1)
        if num_tokens is None:
            num_tokens = sequences.lengths[:half].sum().clamp(min=1)
        weights = None if self.ld_alpha is None else self._token_weights(sequences, dtype)
        if ref_logprobs is not None:
            ref_sums = self.sums(ref_logprobs, sequences)
        return BoundPreferenceLoss(
            losses=self.losses,
            weights=self.weights,
            beta=self.beta,
            options=dict(self.options),
            offsets=sequences.offsets,
            ref_sums=ref_sums,
            token_weights=weights,
            pair_weight=1.0 / num_pairs,
            plain=self.paired and self.f_divergence == "reverse_kl" and not self.use_weighting,
            objective=self,
            sequences=sequences,
            labels=labels,
            kl=kl,
            num_pairs=num_pairs,
            num_tokens=num_tokens,
        )

    def sums(self, logprobs: Tensor, sequences: Sequences) -> Tensor:
        """(S,) fp64 of the log-probs (N,) of sequences, with the weights of ld_alpha."""
        values = precise(logprobs)
        return sequences.sum(
            values if self.ld_alpha is None else values * self._token_weights(sequences, logprobs.dtype)
        )

    def _token_weights(self, sequences: Sequences, dtype: torch.dtype) -> Tensor:
        """(N,) 1 up to the length of the pair's shorter completion, ld_alpha beyond."""
        lengths = sequences.lengths
        shorter = torch.minimum(*lengths.chunk(2)).repeat(2)
        position = torch.arange(sequences.index.numel(), device=lengths.device) - sequences.spread(
            sequences.offsets[:-1]
        )
        tail = torch.full_like(position, float(self.ld_alpha or 0.0), dtype=dtype)
        return torch.where(position < sequences.spread(shorter), torch.ones_like(tail), tail)


@dataclass(kw_only=True)
class BoundPreferenceLoss(BoundPreference):
    """A `kernels.interface.BoundObjective`."""

    objective: PreferenceLoss
    sequences: Sequences
    labels: Tensor | None
    kl: Tensor | None
    num_pairs: Count
    num_tokens: Count
    tokenwise: bool = False
    needs_entropy: bool = False
    log_sum_sq: Tensor | None = None  # (N,), for WPO's weights

    @property
    def has_entropy_term(self) -> bool:
        return False

    @property
    def outputs(self) -> tuple[str, ...]:
        return self.objective.outputs

    @property
    def needs_full(self) -> bool:
        return self.ref_sums is not None

    def given(self, stats: Stats) -> BoundPreferenceLoss:
        return replace(self, log_sum_sq=stats["sum_sq"].log()) if self.objective.use_weighting else self

    def total(self, logprobs: Tensor) -> Tensor:
        """(S,) weighted sums of (N,) log-probs."""
        return self.sequences.sum(logprobs if self.token_weights is None else logprobs * self.token_weights)

    def sides(self, logprobs: Tensor, full: Tensor) -> tuple[Side, Side]:
        """Chosen and rejected, (P,) each; `full` is what is compared with a reference."""
        total = self.total(logprobs)
        plain = total if self.token_weights is None else self.sequences.sum(logprobs)
        if self.ref_sums is None:
            compared, ref = total, torch.zeros_like(total)
        else:
            compared, ref = self.total(full), self.ref_sums
        score = score_of(compared - ref, self.objective.f_divergence, self.objective.f_alpha)
        lengths = self.sequences.divisors.to(total.dtype)
        chosen, rejected = zip(*(values.chunk(2) for values in (total, compared, ref, score, plain, lengths)))
        return Side(*chosen), Side(*rejected)

    def contributions(self, logprobs: Tensor, entropy: Tensor | None, full: Tensor | None) -> Tensor:
        return (self.pair_weight * self.per_sequence(logprobs, full)).to(logprobs.dtype)

    def per_sequence(self, logprobs: Tensor, full: Tensor | None = None) -> Tensor:
        """(P,) losses of the pairs, or (S,) of the completions; summed and compared in fp64.

        full: (N,) log-probs of the whole vocabulary, where `logprobs` are those of kept sets.
        """
        logprobs = precise(logprobs)
        full = logprobs if full is None else precise(full)
        if not self.objective.paired:
            assert self.ref_sums is not None
            assert self.labels is not None
            kl = self.ref_sums.new_zeros(()) if self.kl is None else self.kl
            known: Any = Examples(self.sequences.sum(full) - self.ref_sums, self.labels, self.beta, kl)
        else:
            chosen, rejected = self.sides(logprobs, full)
            known = Pairs(chosen, rejected, self.beta, -chosen.plain * self.num_pairs / self.num_tokens)
        total = logprobs.new_zeros(())
        weighting = self._weighting(logprobs) if self.objective.use_weighting else None
        for name, weight in zip(self.losses, self.weights):
            function = PREFERENCES[name].function
            value = weight * function(known, **options_of(function, self.options))
            if weighting is not None:  # the NLL is one number of all pairs: each pair's weight meets the whole of it
                value = value * (weighting.mean() if name == "sft" else weighting)
            total = total + value
        return total

    @torch.no_grad()
    def _weighting(self, logprobs: Tensor) -> Tensor:
        assert self.log_sum_sq is not None
        chosen, rejected = self.sequences.mean(logprobs - self.log_sum_sq).exp().chunk(2)
        return chosen * rejected

    def __call__(self, rows: slice, logprobs: Tensor, entropy: Tensor | None) -> tuple[Tensor, TokenGrads]:
        """-> loss (P,), of the pairs (so that one without tokens counts too), and its derivatives (N,)."""

        def of_pairs(lp: Tensor, _: Tensor | None) -> Tensor:
            return self.contributions(lp, None, None)

        return differentiated(of_pairs, logprobs, None, by_entropy=False)


def score_of(log_ratio: Tensor, name: str, alpha: float | None) -> Tensor:
    """u of the module's docstring; the exponent of the alpha divergence is at most 80 (arXiv:2309.16240)."""
    if name == "forward_kl":
        return -torch.expm1(-log_ratio)
    if name == "js_divergence":
        return math.log(2) + logsigmoid(log_ratio)
    if name == "alpha_divergence" and alpha is not None and abs(alpha - 1) >= 1e-6:
        return torch.expm1(((alpha - 1) * log_ratio).clamp(max=80.0)) / (alpha - 1)
    return log_ratio  # reverse KL, and the limit of the alpha divergence at 1


def preset(name: str, *losses: str, source: str, **defaults: Any) -> Callable[..., PreferenceLoss]:
    """A constructor of `PreferenceLoss`; keywords are its fields or options of the losses.

    `sft_weight` adds the chosen completions' NLL, where the preset does not hold it already.
    """
    functions = [PREFERENCES[loss].function for loss in losses]
    terms = signatures.fields_of(PreferenceLoss, defaults)
    own = {term.name for term in terms}

    def construct(
        loss_type: str | Sequence[str] = losses, loss_weights: Sequence[float] | None = None, **given: Any
    ) -> PreferenceLoss:
        given = defaults | given
        names = (loss_type,) if isinstance(loss_type, str) else tuple(loss_type)
        weights = (1.0,) * len(names) if loss_weights is None else tuple(loss_weights)
        sft_weight = given.pop("sft_weight", 0.0)
        if sft_weight:
            names, weights = (*names, "sft"), (*weights, sft_weight)
        settings = {key: value for key, value in given.items() if key in own}
        options = {key: value for key, value in given.items() if key not in own}
        known = [keywords(PREFERENCES[loss].function) for loss in names if loss in PREFERENCES]
        check_options(names, options, own.union({"loss_type", "loss_weights", "sft_weight"}, *known))
        return PreferenceLoss(names, weights, **settings, options=options)

    options = signatures.options_of(functions, defaults)
    of = "pairs" if PREFERENCES[losses[0]].paired else "completions"
    words = [f"    {', '.join(option.name for option in options)}: of the formula above."] if options else []
    doc = f"""{name}: mean over {of} of {" + ".join(losses)}   ({source})

{chr(10).join(f"    {loss}: {formula(function)}" for loss, function in zip(losses, functions))}

Args:
    loss_type: another name in `PREFERENCES`, or several, with their options.
    loss_weights: one for each of them; default 1.
    sft_weight: of the NLL of the chosen completions, added to the loss (RPO, CPO, ORPO).
{chr(10).join([*words, signatures.arguments_of(PreferenceLoss)])}

Raises:
    TypeError: an option that none of the losses has. ValueError: as `PreferenceLoss`.
"""
    either = inspect.Parameter.POSITIONAL_OR_KEYWORD
    default = losses[0] if len(losses) == 1 else losses
    parameters = [
        inspect.Parameter("loss_type", either, default=default, annotation="str | Sequence[str]"),
        inspect.Parameter("loss_weights", either, default=None, annotation="Sequence[float] | None"),
        signatures.keyword("sft_weight", "float", defaults.get("sft_weight", 0.0)),
        *options,
        *terms,
        inspect.Parameter("options", inspect.Parameter.VAR_KEYWORD, annotation="float"),  # of another loss_type
    ]
    signatures.dress(construct, name, doc, parameters, PreferenceLoss, __name__)
    PRESETS[name.lower()] = construct
    return construct


DPO: signatures.Preferring = preset("DPO", "sigmoid", source="arXiv:2305.18290")
IPO: signatures.Preferring = preset("IPO", "ipo", source="arXiv:2310.12036")
KTO: signatures.Preferring = preset("KTO", "kto", source="arXiv:2402.01306")
CPO: signatures.Preferring = preset("CPO", "cpo", source="arXiv:2401.08417", sft_weight=1.0)
SimPO: signatures.Preferring = preset("SimPO", "simpo", source="arXiv:2405.14734", beta=2.0, gamma=1.0)
ORPO: signatures.Preferring = preset("ORPO", "orpo", source="arXiv:2403.07691", sft_weight=1.0)

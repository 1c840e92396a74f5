"""What the answer must not depend on: padding, packing, what masked positions hold, the order of rows, micro-batches.

For every objective of both registries, loss, metrics and gradients in fp64. Layouts of one list of tokens must agree to
the bit, since only the tokens themselves are ever computed; another order or another split sums in another order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_rlhf as fr
from fused_rlhf import objectives, preferences
from tests.helpers import dense, inputs, relative

H, V = 6, 23
LENGTHS = (5, 0, 3, 4, 1, 4)  # of the sequences; the last three are the rejected ones of the first three
S, N, P = len(LENGTHS), sum(LENGTHS), len(LENGTHS) // 2

# Option values that bite on 17 tokens, and those that must be given.
OPTIONS: dict[str, dict[str, Any]] = {
    "dr_grpo": {"max_completion_length": 9},
    "clip_cov": {"share": 0.3, "cov_low": 1e-3, "cov_high": 9.0},
    "kl_cov": {"share": 0.3},
    "exo_pair": {"label_smoothing": 0.1},
}
POLICY = {name: make(beta=0.1, **OPTIONS.get(name, {})) for name, make in objectives.PRESETS.items()}
POLICY |= {f"grpo with {kl}": fr.GRPO(beta=0.1, kl=kl) for kl in objectives.KL_ESTIMATORS}
POLICY |= {
    f"grpo {how}": fr.GRPO(importance_sampling=how, importance_sampling_max=1.1) for how in objectives.CORRECTIONS
}
POLICY |= {
    "entropy bonus": fr.DAPO(entropy_coef=0.05),
    "delta and dual clip": fr.PPO(delta=1.5, dual_clip=3.0),
    "corrected kl": fr.GSPO(beta=0.1, use_bias_correction_kl=True),
    "off-policy mask": fr.GRPO(off_policy_mask_threshold=0.01),
    "entropy quantile": fr.GRPO(top_entropy_quantile=0.45, entropy_coef=0.05),
    "vespo with a sampler": fr.VESPO(importance_sampling="token_truncate", importance_sampling_max=1.1),
}
PREFERENCE = {name: fr.PreferenceLoss((name,), options=OPTIONS.get(name, {})) for name in preferences.PREFERENCES} | {
    f"preset {name}": make() for name, make in preferences.PRESETS.items()
}
PREFERENCE |= {
    f"f-divergence {name}": fr.DPO(f_divergence=name, f_alpha=0.5 if name == "alpha_divergence" else None)
    for name in preferences.F_DIVERGENCES
}
PREFERENCE |= {
    "mpo": fr.DPO(("sigmoid", "bco_pair", "sft"), (0.8, 0.2, 1.0)),
    "ld_alpha": fr.DPO(ld_alpha=0.4, sft_weight=0.3),
    "wpo": fr.DPO(("ipo", "apo_down"), use_weighting=True),
    "alphapo": fr.SimPO(alpha=0.25, label_smoothing=0.1),
}

# These look at all tokens, or pairs, of the call by definition: covariances about the batch's means, a quantile of the
# batch's entropies, sorted log-ratios. A micro-batch of them is another batch.
OF_THE_CALL = {"clip_cov", "kl_cov", "entropy quantile", "aot", "aot_unpaired"}
# Its lot is drawn by position, so that the same input gives the same answer.
BY_POSITION = {"clip_cov"}


def test_the_cases_hold_both_registries():
    assert {o.surrogate for o in POLICY.values()} == set(objectives.SURROGATES)
    assert {o.token_weight for o in POLICY.values()} == set(objectives.TOKEN_WEIGHTS)
    assert {o.kl for o in POLICY.values()} == set(objectives.KL_ESTIMATORS)
    assert {o.level for o in POLICY.values()} == set(objectives.LEVELS)
    assert {name for o in PREFERENCE.values() for name in o.losses} == set(preferences.PREFERENCES)


@pytest.fixture(scope="module")
def tokens() -> SimpleNamespace:
    """The sequences' tokens side by side, (N, ...)."""
    data = inputs(N, H, V, seed=6)
    generator = torch.Generator().manual_seed(1)

    def near(values: Tensor, scale: float) -> Tensor:
        return values + scale * torch.randn(values.shape, generator=generator, dtype=torch.float64)

    logprobs = dense(**data)["logprobs"]
    old = near(logprobs, 0.3)
    ref_hidden = near(data["hidden"], 0.6)
    return SimpleNamespace(
        hidden=data["hidden"],
        targets=data["targets"],
        weight=data["weight"],
        old_logprobs=old,
        ref_hidden=ref_hidden,
        ref_logprobs=dense(ref_hidden, data["weight"], data["targets"])["logprobs"],
        sampling_logprobs=near(old, 0.2),
        advantages=torch.tensor([0.9, 0.3, -0.7, 1.2, -1.1, 0.4], dtype=torch.float64),
        labels=torch.tensor([1, 0, 0, 1, 1, 0]),
    )


# ------------------------------------------------------------------------------------------------------------ layouts


@dataclass
class Layout:
    """Where the tokens of some sequences lie: `place` (n,) flat positions in a batch of `shape`."""

    sequences: Sequence[int]
    shape: tuple[int, ...]
    place: Tensor
    cu_seqlens: Tensor | None
    by_ignore_index: bool = False  # masked by their targets rather than by a mask

    @property
    def chosen(self) -> Tensor:
        """(n,) of all N tokens, those of these sequences in their order."""
        starts = torch.tensor([0, *LENGTHS]).cumsum(0)
        return torch.cat([torch.arange(int(starts[s]), int(starts[s + 1])) for s in self.sequences])

    def spread(self, values: Tensor, hole: float) -> Tensor:
        """The tokens' values in the batch, `hole` everywhere else."""
        size = math.prod(self.shape)
        out = torch.full((size, *values.shape[1:]), hole, dtype=values.dtype)
        out[self.place] = values[self.chosen].detach()
        return out.view(*self.shape, *values.shape[1:])

    def masked(self, targets: Tensor) -> dict[str, Any]:
        """Targets outside the mask are no tokens at all."""
        if self.by_ignore_index:
            return {"targets": self.spread(targets, -100)}
        mask = self.spread(torch.ones_like(targets, dtype=torch.bool), False)
        return {"targets": self.spread(targets, 10**6), "completion_mask": mask}


def layout(kind: str, sequences: Sequence[int] = range(S)) -> Layout:
    lengths = [LENGTHS[s] for s in sequences]
    width = max(lengths) + 3
    if kind == "packed":
        ends = torch.tensor([0, *lengths]).cumsum(0)
        return Layout(sequences, (int(ends[-1]),), torch.arange(int(ends[-1])), ends)
    if kind == "left":
        inside = [torch.arange(width - n, width) for n in lengths]
    elif kind in ("right", "ignored"):
        inside = [torch.arange(n) for n in lengths]
    else:  # holes
        generator = torch.Generator().manual_seed(7)
        inside = [torch.randperm(width, generator=generator)[:n].sort().values for n in lengths]
    place = torch.cat([row * width + at for row, at in enumerate(inside)])
    if kind == "packed with holes":
        ends = torch.arange(len(lengths) + 1) * width
        return Layout(sequences, (len(lengths) * width,), place, ends)
    return Layout(sequences, (len(lengths), width), place, None, by_ignore_index=kind == "ignored")


LAYOUTS = ("right", "left", "ignored", "holes", "packed with holes")


@dataclass
class Outcome:
    loss: Tensor
    metrics: dict[str, Tensor]
    hidden: Tensor  # (n, H) gradients of the tokens
    weight: Tensor | None
    elsewhere: Tensor  # gradients of the positions that hold no token


def outcome(loss: Tensor, metrics: dict[str, Tensor], hidden: Tensor, weight: Tensor, where: Layout) -> Outcome:
    wanted = [leaf for leaf in (hidden, weight) if leaf.requires_grad]
    found = torch.autograd.grad(3.7 * loss, wanted)
    flat = found[0].reshape(-1, H)
    rest = torch.ones(len(flat), dtype=torch.bool)
    rest[where.place] = False
    return Outcome(loss.detach(), metrics, flat[where.place], found[1] if len(found) > 1 else None, flat[rest])


def policy(
    tokens: SimpleNamespace,
    objective: fr.PolicyLoss,
    where: Layout,
    mode: Any,
    frozen: bool = False,
    per_token: bool = False,
    **counts: Any,
) -> Outcome:
    hidden = where.spread(tokens.hidden, math.nan).requires_grad_()
    weight = tokens.weight.clone().requires_grad_(not frozen)
    per_sequence = tokens.advantages[list(where.sequences)]
    index = torch.arange(S).repeat_interleave(torch.tensor(LENGTHS))
    given: dict[str, Any] = {"old_logprobs": where.spread(tokens.old_logprobs, math.nan)}
    if objective.beta:
        given["ref_logprobs"] = where.spread(tokens.ref_logprobs, math.nan)
    if objective.importance_sampling or objective.off_policy_mask_threshold is not None:
        given["sampling_logprobs"] = where.spread(tokens.sampling_logprobs, math.nan)
    loss, metrics = fr.linear_policy_loss(
        hidden,
        weight,
        **where.masked(tokens.targets),
        **given,
        advantages=where.spread(tokens.advantages[index], math.nan) if per_token else per_sequence,
        objective=objective,
        cu_seqlens=where.cu_seqlens,
        outputs=("entropy",),
        mode=mode,
        **counts,
    )
    return outcome(loss, metrics, hidden, weight, where)


def preference(
    tokens: SimpleNamespace,
    objective: fr.PreferenceLoss,
    where: Layout,
    frozen: bool = False,
    in_the_call: bool = False,
    **counts: Any,
) -> Outcome:
    hidden = where.spread(tokens.hidden, math.nan).requires_grad_()
    weight = tokens.weight.clone().requires_grad_(not frozen)
    given: dict[str, Any] = {}
    if objective.needs_reference:
        name = "ref_hidden" if in_the_call else "ref_logprobs"
        given[name] = where.spread(getattr(tokens, name), math.nan)
    if not objective.paired:
        given["labels"] = tokens.labels[list(where.sequences)]
        if objective.losses == ("kto",):
            given["kl"] = torch.tensor(0.4)
    loss, metrics = fr.linear_preference_loss(
        hidden,
        weight,
        **where.masked(tokens.targets),
        **given,
        objective=objective,
        cu_seqlens=where.cu_seqlens,
        outputs=("entropy", "mean_logit", "is_top1"),
        mode="one_pass" if frozen else "two_phase",
        **counts,
    )
    return outcome(loss, metrics, hidden, weight, where)


def routes(objective: fr.PolicyLoss) -> list[tuple[str, bool]]:
    """Ways to compute it, and whether the head is frozen."""
    one_pass = [("one_pass", False)] if objective.tokenwise else []
    return [("two_phase", False), *one_pass, *([("one_pass", True)] if not objective.entropy_coef else [])]


def same_bits(found: Outcome, truth: Outcome, case: Any) -> None:
    assert torch.equal(found.loss, truth.loss), case
    assert found.metrics.keys() == truth.metrics.keys()
    for name, value in truth.metrics.items():
        assert torch.equal(found.metrics[name], value), (name, case)
    assert torch.equal(found.hidden, truth.hidden), case
    if found.weight is None or truth.weight is None:
        assert found.weight is truth.weight, case
    else:
        assert torch.equal(found.weight, truth.weight), case
    assert not found.elsewhere.any(), case  # NaN would count


@pytest.mark.parametrize("name", POLICY)
def test_policy_losses_see_only_the_tokens(name, tokens):
    """Padding on either side, holes, packing; everything outside the mask is NaN, and its targets are no tokens."""
    objective = POLICY[name]
    for mode, frozen in routes(objective):
        for per_token in (False, True):
            truth = policy(tokens, objective, layout("packed"), mode, frozen, per_token)
            assert truth.hidden.any()
            for kind in LAYOUTS:
                found = policy(tokens, objective, layout(kind), mode, frozen, per_token)
                same_bits(found, truth, (kind, mode, frozen, per_token))


@pytest.mark.parametrize("name", PREFERENCE)
def test_preference_losses_see_only_the_tokens(name, tokens):
    objective = PREFERENCE[name]
    for frozen in (False, True):
        for in_the_call in (False, True) if objective.needs_reference else (False,):
            truth = preference(tokens, objective, layout("packed"), frozen, in_the_call)
            assert truth.hidden.any()
            for kind in LAYOUTS:
                found = preference(tokens, objective, layout(kind), frozen, in_the_call)
                same_bits(found, truth, (kind, frozen, in_the_call))


# ------------------------------------------------------------------------------------------------------- order, split


def close(loss: Tensor, hidden: Tensor, weight: Tensor, truth: Outcome) -> float:
    """The largest relative error."""
    assert truth.weight is not None
    of_loss = (loss - truth.loss).abs().item() / max(truth.loss.abs().item(), 0.1)
    return max(of_loss, relative(hidden, truth.hidden), relative(weight, truth.weight))


def by_token(parts: Sequence[tuple[Outcome, Layout]]) -> Tensor:
    """(N, H) gradients of the tokens of all parts."""
    out = torch.zeros(N, H, dtype=torch.float64)
    for part, where in parts:
        out[where.chosen] = part.hidden
    return out


@pytest.mark.parametrize("name", POLICY)
def test_policy_losses_do_not_depend_on_the_order_of_rows(name, tokens):
    where = layout("right", (4, 1, 5, 0, 3, 2))
    for mode, frozen in routes(POLICY[name]):
        if frozen:
            continue
        truth = policy(tokens, POLICY[name], layout("packed"), mode)
        found = policy(tokens, POLICY[name], where, mode)
        assert found.weight is not None
        error = close(found.loss, by_token([(found, where)]), found.weight, truth)
        assert (error > 1e-6) if name in BY_POSITION else (error < 1e-12)
        for key, value in truth.metrics.items() if name not in BY_POSITION else ():
            assert found.metrics[key].item() == pytest.approx(value.item(), rel=1e-12, abs=1e-14), key


@pytest.mark.parametrize("name", PREFERENCE)
def test_preference_losses_do_not_depend_on_the_order_of_pairs(name, tokens):
    where = layout("right", (2, 0, 1, 5, 3, 4))
    truth = preference(tokens, PREFERENCE[name], layout("packed"))
    found = preference(tokens, PREFERENCE[name], where)
    assert found.weight is not None
    assert close(found.loss, by_token([(found, where)]), found.weight, truth) < 1e-12
    for key, value in truth.metrics.items():
        assert found.metrics[key].item() == pytest.approx(value.item(), rel=1e-12, abs=1e-14), key


def test_rows_of_unpaired_losses_have_no_order(tokens):
    where = layout("left", (4, 1, 5, 0, 3, 2))
    for name in ("kto", "apo_zero_unpaired"):
        truth = preference(tokens, PREFERENCE[name], layout("packed"))
        found = preference(tokens, PREFERENCE[name], where)
        assert found.weight is not None
        assert close(found.loss, by_token([(found, where)]), found.weight, truth) < 1e-12


SPLITS = (((0, 1, 2), (3, 4, 5)), ((5,), (0, 4, 2), (1,), (3,)))


@pytest.mark.parametrize("name", POLICY)
@pytest.mark.parametrize("counts", ["numbers", "tensors"])
def test_micro_batches_of_policy_losses_add_up(name, counts, tokens):
    """Given the global counts. One micro-batch has no tokens at all."""
    given: dict[str, Any] = {"num_sequences": S, "num_tokens": N}
    if counts == "tensors":
        given = {key: torch.tensor(float(value), dtype=torch.float64) for key, value in given.items()}
    for mode, frozen in routes(POLICY[name]):
        if frozen:
            continue
        truth = policy(tokens, POLICY[name], layout("packed"), mode)
        errors = []
        for split in SPLITS:
            where = [layout("right", rows) for rows in split]
            parts = [policy(tokens, POLICY[name], w, mode, **given) for w in where]
            errors.append(
                close(
                    sum((p.loss for p in parts), torch.zeros(())),
                    by_token(list(zip(parts, where))),
                    sum((p.weight for p in parts if p.weight is not None), torch.zeros(())),
                    truth,
                )
            )
        assert (max(errors) > 1e-6) if name in OF_THE_CALL else (max(errors) < 1e-12), mode


@pytest.mark.parametrize("name", PREFERENCE)
def test_micro_batches_of_preference_losses_add_up(name, tokens):
    """Pairs, or single completions of unpaired losses. One micro-batch of pairs has an empty chosen completion."""
    objective = PREFERENCE[name]
    counts: dict[str, Any] = {"num_pairs": P if objective.paired else S, "num_tokens": sum(LENGTHS[:P])}
    pairs = [((0, 3), (1, 2, 4, 5)), ((2, 5), (1, 4), (0, 3))]
    truth = preference(tokens, objective, layout("packed"))
    errors = []
    for split in pairs if objective.paired else SPLITS:
        where = [layout("right", rows) for rows in split]
        parts = [preference(tokens, objective, w, **counts) for w in where]
        errors.append(
            close(
                sum((p.loss for p in parts), torch.zeros(())),
                by_token(list(zip(parts, where))),
                sum((p.weight for p in parts if p.weight is not None), torch.zeros(())),
                truth,
            )
        )
    assert (max(errors) > 1e-6) if name in OF_THE_CALL else (max(errors) < 1e-12)


# -------------------------------------------------------------------------------------------------------- no tokens


def no_tokens(rows: int) -> dict[str, Any]:
    return {
        "hidden": torch.full((rows, 4, H), math.nan).requires_grad_(),
        "weight": torch.randn(V, H).requires_grad_(),
        "targets": torch.full((rows, 4), -100),
    }


def check_nothing(loss: Tensor, metrics: dict[str, Tensor], data: dict[str, Any]) -> None:
    assert loss.requires_grad
    for gradient in torch.autograd.grad(loss, [data["hidden"], data["weight"]]):
        assert not gradient.any()
    assert all(value.isfinite() for value in metrics.values())


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("name", POLICY)
def test_a_policy_loss_without_tokens_is_a_differentiable_zero(name, rows):
    objective = POLICY[name]
    nothing = torch.full((rows, 4), math.nan)
    for mode in ("two_phase", "one_pass") if objective.tokenwise else ("two_phase",):
        data = no_tokens(rows)
        given: dict[str, Any] = {"old_logprobs": nothing}
        given |= {"ref_logprobs": nothing} if objective.beta else {}
        given |= {"sampling_logprobs": nothing} if objective.importance_sampling else {}
        loss, metrics = fr.linear_policy_loss(
            **data, **given, advantages=torch.ones(rows), objective=objective, outputs=("entropy",), mode=mode
        )
        assert loss == 0
        check_nothing(loss, metrics, data)


@pytest.mark.parametrize("name", PREFERENCE)
def test_a_preference_loss_without_tokens_is_a_constant(name):
    """That of log-ratios of 0, as log 2 of the sigmoid's; without sequences it is 0."""
    objective = PREFERENCE[name]
    for rows in (4, 0):
        data = no_tokens(rows)
        given: dict[str, Any] = {} if objective.paired else {"labels": torch.ones(rows)}
        given |= {"ref_logprobs": torch.full((rows, 4), math.nan)} if objective.needs_reference else {}
        loss, metrics = fr.linear_preference_loss(**data, **given, objective=objective, outputs=("entropy",))
        assert loss.isfinite()
        if name in ("sigmoid", "sft"):
            assert loss.item() == pytest.approx(math.log(2) if name == "sigmoid" and rows else 0.0)
        if rows == 0:
            assert loss == 0
        check_nothing(loss, metrics, data)

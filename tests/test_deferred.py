"""Deferred logits against the logits themselves: values, gradients, dtypes, sharing, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fused_rlhf as fr
from fused_rlhf.deferred import distribution
from fused_rlhf.deferred.tensor import Deferred
from fused_rlhf.kernels.statistics import STATISTICS
from tests.deferred_spellings import DECISIONS, REFUSED, SPELLINGS

transformers = pytest.importorskip("transformers")
from tests.test_lm_head import batch, build, one_thread  # noqa: E402, F401  # the fixture is used by being here

B, T, H, V = 3, 7, 16, 101


class Pair:
    """Two heads on two sets of hidden states, all of which take gradients."""

    def __init__(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def leaf(*shape: int, scale: float) -> Tensor:
            values = scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
            return values.to(dtype).requires_grad_()

        self.hidden, self.ref_hidden = (leaf(B, T, H, scale=2.0) for _ in range(2))
        self.weight, self.ref_weight = (leaf(V, H, scale=0.4) for _ in range(2))
        self.bias = leaf(V, scale=1.0)
        self.y = torch.randint(V - 3, (B, T), generator=generator)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.hidden, self.weight, self.bias, self.ref_hidden, self.ref_weight

    def heads(self) -> tuple[torch.nn.Linear, torch.nn.Linear]:
        made = []
        for weight, bias in ((self.weight, self.bias), (self.ref_weight, None)):
            head = torch.nn.Linear(H, V, bias=bias is not None, dtype=weight.dtype)
            del head.weight
            head.weight = torch.nn.Parameter(weight)
            made.append(head)
        return made[0], made[1]

    def dense(self) -> tuple[Tensor, Tensor]:
        return F.linear(self.hidden, self.weight, self.bias), F.linear(self.ref_hidden, self.ref_weight)

    def deferred(self) -> tuple[Tensor, Tensor]:
        return (
            logits_of(self.hidden, self.weight, self.bias),
            logits_of(self.ref_hidden, self.ref_weight, None),
        )


def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As the head of a deferred model returns them."""
    from fused_rlhf.deferred.tensor import linked
    from fused_rlhf.deferred.value import logits_of as terms_of_logits

    flat = hidden.reshape(-1, hidden.shape[-1])
    source = distribution.Source.of(flat, fr.Head(weight, bias), None, detached=not torch.is_grad_enabled())
    terms = terms_of_logits(distribution.Distribution(source))

    def made(terms: Any) -> Deferred:
        return Deferred(terms, hidden.shape[:-1], len(weight), hidden.dtype, hidden.device)

    return linked(made, terms, F.linear(hidden[..., :0, :], weight, bias))


def gradients(value: Tensor, leaves: tuple[Tensor, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    upstream = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype) * 3.7
    found = torch.autograd.grad(value, leaves, upstream, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves)]


# Spellings whose gradient is that of a statistic.
BY_STATISTIC = {
    "collision_probability": "sum_sq",
    "collision_probability_by_pow": "sum_sq",
    "mean_logit": "mean_logit",
    "label_smoothing": "mean_logit",
    "label_smoothing_by_hand": "mean_logit",
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str) -> None:
    pair = Pair()
    statistic = BY_STATISTIC.get(name)
    if statistic and not STATISTICS[statistic].differentiable:
        with pytest.raises(NotImplementedError, match=f"the gradient of {statistic} is not computed yet"):
            SPELLINGS[name](*_arguments(pair, pair.deferred()))
        with torch.no_grad():
            values = [SPELLINGS[name](*_arguments(pair, made())) for made in (pair.deferred, pair.dense)]
        torch.testing.assert_close(*values, rtol=1e-10, atol=1e-11)
        return
    ours = SPELLINGS[name](*_arguments(pair, pair.deferred()))
    truth = SPELLINGS[name](*_arguments(pair, pair.dense()))
    assert not isinstance(ours, Deferred)
    assert (ours.dtype, ours.shape) == (truth.dtype, truth.shape)
    torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-11)
    for mine, theirs in zip(gradients(ours, pair.leaves), gradients(truth, pair.leaves)):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)


def _arguments(pair: Pair, logits: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return logits[0], pair.y, logits[1]


@pytest.mark.parametrize("name", DECISIONS)
def test_decisions(name: str) -> None:
    pair = Pair()
    assert torch.equal(DECISIONS[name](pair.deferred()[0], pair.y), DECISIONS[name](pair.dense()[0], pair.y))


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_need_them_all_is_refused_in_a_sentence(name: str) -> None:
    pair = Pair()
    with pytest.raises(NotImplementedError, match="not for deferred logits") as caught:
        REFUSED[name](pair.deferred()[0], pair.y)
    message = str(caught.value)
    assert "GB" in message
    assert "fused_rlhf.materialise(logits)" in message
    assert "\n" not in message

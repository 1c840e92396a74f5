"""Logits of a few tokens, and the largest, against dense ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fused_rlhf as fr
from fused_rlhf.op import entries
from tests.helpers import TRANSFORMS, dense_logits, inputs, leaf

N, H, V = 11, 8, 4129  # more columns than a tile


def case(
    bias: bool, logit_scale: float, softcap: float | None, per_token: bool
) -> tuple[dict[str, Any], fr.Head, Tensor]:
    of = inputs(N, H, V, bias=bias, per_token=per_token)
    of = {
        name: leaf(value) if name in ("hidden", "weight", "bias") and value is not None else value
        for name, value in of.items()
    }
    head = fr.Head(of["weight"], of["bias"], logit_scale, softcap)
    z = dense_logits(of["hidden"], of["weight"], of["bias"], of["temperature"], logit_scale, softcap)
    return of, head, z


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_entries_and_their_gradients(transform: Any) -> None:
    of, head, z = case(*transform)
    rows, ids = torch.tensor([0, 0, 2, 5, 5, 5, 10]), torch.tensor([3, 4128, 0, 77, 77, 4100, 9])
    found = entries.entry_logits(of["hidden"], head, of["temperature"], rows, ids)
    torch.testing.assert_close(found, z[rows, ids])
    upstream = torch.tensor([3.7, -1.0, 0.0, 2.0, 0.5, 1.0, -3.0], dtype=torch.float64)
    leaves = [t for t in (of["hidden"], of["weight"], of["bias"]) if t is not None]
    for _ in range(2):
        mine = torch.autograd.grad(found, leaves, upstream, retain_graph=True)
    for a, b in zip(mine, torch.autograd.grad(z[rows, ids], leaves, upstream)):
        torch.testing.assert_close(a, b)


def test_without_an_upstream_there_is_nothing_to_do() -> None:
    of, head, _ = case(False, 1.0, None, False)
    found = entries.entry_logits(of["hidden"], head, 1.0, torch.tensor([1]), torch.tensor([2]))
    assert torch.autograd.grad(found.sum() * 0, of["hidden"], allow_unused=True) == (None,)


def test_an_id_outside_of_the_vocabulary_is_refused() -> None:
    of, head, _ = case(False, 1.0, None, False)
    with pytest.raises(ValueError, match=r"ids must lie in \[0, 4129\) .* got 4129 at flat position 1"):
        entries.entry_logits(of["hidden"], head, 1.0, torch.tensor([0, 1]), torch.tensor([3, 4129]))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("k", [1, 5])
def test_largest(transform: Any, k: int) -> None:
    of, head, z = case(*transform)
    assert torch.equal(entries.largest(of["hidden"], head, of["temperature"], k), z.topk(k).indices)

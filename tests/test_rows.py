"""Flat rows of real tokens, and back."""

import torch

from fused_rlhf.kernels.interface import pick
from fused_rlhf.op.rows import scatter


def test_scatter_is_the_inverse_of_pick():
    values = torch.randn(5, 3)
    rows = torch.tensor([1, 4])
    back = scatter(pick(values, rows), rows, 5)
    assert torch.equal(back[rows], values[rows])
    assert (back[[0, 2, 3]] == 0).all()
    assert scatter(None, rows, 5) is None

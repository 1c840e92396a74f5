"""What holds of every function of the Triton backend, on any machine; its kernels are tried in the interpreter."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fused_rlhf.kernels import ops
from fused_rlhf.kernels.interface import RowPairs, Rows

LAUNCHING = {*ops.__all__} - {"filter_columns", "has_normaliser", "memory", "one_pass_pays"}


class EnteredError(Exception):
    """The guard was entered, before anything else was done."""


@pytest.mark.parametrize("name", sorted(LAUNCHING))
def test_kernels_are_launched_on_the_device_of_the_rows(monkeypatch, name):
    """Triton takes the current device: of rows on another one the kernels would run unordered, or be refused."""

    def device_of(tensor):
        raise EnteredError(tensor)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    hidden, vector = torch.ones(3, 4), torch.ones(3)
    arguments: tuple[Any, ...]
    if name == "loss":
        arguments, expected = (None, vector, None), vector
    elif name.startswith("divergence"):
        arguments, expected = (RowPairs(hidden, hidden.clone(), vector), None), hidden
    else:
        arguments, expected = (Rows(hidden, torch.zeros(3, dtype=torch.int64), vector), None), hidden
    with pytest.raises(EnteredError) as entered:
        getattr(ops, name)(*arguments)
    assert entered.value.args[0] is expected


@pytest.mark.parametrize("keep", ["", "0", "1", "111", "000", "0110", "1100", "0011", "101101", "0101010111"])
def test_rows_to_keep_move_to_the_front(keep):
    mask = torch.tensor([c == "1" for c in keep], dtype=torch.bool)
    scratch = torch.arange(len(keep) + 2.0)[:, None].repeat(1, 3)  # more rows than are in use
    order = ops._move_to_front(scratch, mask)
    assert sorted(order.tolist()) == mask.nonzero().squeeze(1).tolist()
    assert torch.equal(scratch[: len(order), 0], order.float())
    assert torch.equal(order[mask[: len(order)]], torch.arange(len(order))[mask[: len(order)]])  # the others stay

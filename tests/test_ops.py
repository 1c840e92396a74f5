"""What holds of every function of the Triton backend, on any machine; its kernels are tried in the interpreter."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fused_rlhf.kernels import ops
from fused_rlhf.kernels.interface import Entries, EntryGrads, RowPairs, Rows
from fused_rlhf.kernels.linear_logprobs import descriptors_fit
from tests.helpers import projection

SIZES = {"divergence_block", "filter_columns", "memory", "one_pass_block", "one_pass_pays", "truncation_block"}
LAUNCHING = {*ops.__all__} - SIZES - {"has_normaliser"}


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
    elif name == "scaled":
        arguments, expected = (hidden, vector), vector
    elif name.startswith("divergence"):
        arguments, expected = (RowPairs(hidden, hidden.clone(), vector), None), hidden
    elif name.startswith("gathered"):
        entries = Entries(hidden, vector, torch.arange(3), torch.arange(3))
        arguments, expected = (
            (EntryGrads(entries, vector, vector) if name == "gathered_hidden" else entries, None),
            hidden,
        )
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


def at_odds(*shape):
    """A view that starts in the middle of 16 bytes, as one into a flat buffer may."""
    count = torch.Size(shape).numel()
    return torch.randn(count + 1).bfloat16()[1:].view(shape)


def test_operands_at_odd_places_are_copied_to_where_descriptors_fit(monkeypatch):
    monkeypatch.setattr(ops, "arch", lambda device: "sm_90")
    hidden, weight = at_odds(6, 16), at_odds(300, 16)
    assert not descriptors_fit(hidden)
    head = projection(weight)
    rows = ops._tokens(Rows(hidden, torch.zeros(6, dtype=torch.int64), torch.ones(6)), head)
    assert descriptors_fit(rows.x)
    assert torch.equal(rows.x, hidden)
    assert not ops._whole(head)
    blocks = list(ops._blocks(head, 256))
    assert all(descriptors_fit(block.w) for block in blocks)
    assert torch.equal(torch.cat([block.w for block in blocks]), weight)
    # What no copy could mend is left where it is; so is what fits.
    for w in (at_odds(300, 15), torch.randn(300, 16).bfloat16()):
        assert ops._whole(projection(w))
        assert next(ops._blocks(projection(w), 300)).w.data_ptr() == w.data_ptr()

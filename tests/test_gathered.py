"""Logits of a few tokens of each row, and their gradients, against whole logits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fused_rlhf.backends import chunked, gathered, reference
from fused_rlhf.kernels.interface import Entries, EntryGrads, Needs, Projection, Rows, Stats, TokenGrads
from fused_rlhf.op.adapter import with_adapter
from tests.helpers import TRANSFORMS, inputs, projection, relative, worst

N, H, V, K = 9, 16, 70, 6


def entries_of(rows: Rows, ids: Tensor) -> Entries:
    row = torch.arange(rows.count)[:, None].expand_as(ids).reshape(-1)
    return Entries(rows.hidden, rows.temperature, row, ids.reshape(-1))


def case(dtype: torch.dtype, transform: tuple, rank: int = 0) -> tuple[Rows, Projection, Entries]:
    bias, logit_scale, softcap, per_token = transform
    data = inputs(N, H, V, dtype, bias=bias, per_token=per_token)
    head = projection(data["weight"], data["bias"], logit_scale=logit_scale, softcap=softcap)
    hidden = data["hidden"]
    if rank:
        g = torch.Generator().manual_seed(3)
        a, b = (torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype) for shape in ((rank, H), (V, rank)))
        head = replace(head, lora_b=b, lora_dtype=dtype)
        hidden = with_adapter(hidden, a, 0.5, head)
    temperature = data["temperature"]
    t = temperature.to(head.wide) if isinstance(temperature, Tensor) else torch.ones(N, dtype=head.wide)
    rows = Rows(hidden, data["targets"], t)
    ids = torch.randint(0, V, (N, K), generator=torch.Generator().manual_seed(1))
    ids[0] = 5  # repeated in a row, and in every other one
    ids[:, 1] = 5
    return rows, head, entries_of(rows, ids)


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_logits_and_gradients_are_those_of_whole_rows(dtype: torch.dtype, transform: tuple, rank: int) -> None:
    """Alone, and in one buffer with the gradients of a dense call."""
    rows, head, entries = case(dtype, transform, rank)
    z = chunked.gathered(entries, head)
    truth = reference.gathered(entries, head)
    scale = truth.abs().max().item()
    eps = torch.finfo(z.dtype).eps
    assert worst(z, truth) <= 8 * eps * max(scale, 1)

    upstream = torch.linspace(-1, 1, entries.count, dtype=z.dtype)
    grads, needs = EntryGrads(entries, z, upstream), Needs(True, True, head.bias is not None, rank > 0)
    for backend_rows in (rows, rows.pick(slice(0, 0))):
        stats = reference.statistics(backend_rows, head, ())
        dense = TokenGrads(torch.linspace(1, 2, backend_rows.count, dtype=z.dtype))
        found = chunked.gradients(backend_rows, head, stats, dense, needs, entries=grads)
        expected = reference.gradients(backend_rows, head, stats, dense, needs, entries=grads)
        for name, value, true in zip(found._fields, found, expected):
            assert (value is None) == (true is None), name
            if value is not None and value.numel():
                assert relative(value, true) <= 20 * max(eps, torch.finfo(value.dtype).eps), name
    d_hidden = chunked.gathered_hidden(grads, head)
    assert relative(d_hidden, reference.gathered_hidden(grads, head)) <= 20 * torch.finfo(dtype).eps


def test_few_are_fetched_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the size of the pieces, the bits are the same; a row may have more entries than a piece."""
    rows, head, entries = case(torch.float32, TRANSFORMS[5])
    results = []
    for size in (1, 4 * H * 4, 100 * H * 4):
        monkeypatch.setattr(gathered, "BYTES", size)
        z = chunked.gathered(entries, head)
        grads = EntryGrads(entries, z, torch.linspace(-1, 1, entries.count))
        none = rows.pick(slice(0, 0))
        stats = Stats(none.temperature, none.temperature)
        found = chunked.gradients(none, head, stats, TokenGrads(None), Needs(False, True, True), entries=grads)
        results.append((z, chunked.gathered_hidden(grads, head), found.weight, found.bias))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_an_entry_has_the_same_bits_in_any_company() -> None:
    _, head, entries = case(torch.float32, TRANSFORMS[0])
    z = chunked.gathered(entries, head)
    alone = replace(entries, rows=entries.rows[7:8], ids=entries.ids[7:8])
    assert torch.equal(chunked.gathered(alone, head), z[7:8])


def test_without_entries() -> None:
    rows, head, entries = case(torch.float32, TRANSFORMS[1])
    none = replace(entries, rows=entries.rows[:0], ids=entries.ids[:0])
    z = chunked.gathered(none, head)
    assert z.shape == (0,)
    grads = EntryGrads(none, z, z)
    assert not chunked.gathered_hidden(grads, head).any()
    stats = chunked.statistics(rows, head, ())
    g = TokenGrads(torch.ones(N))
    needs = Needs(True, True, True)
    with_none = chunked.gradients(rows, head, stats, g, needs, entries=grads)
    for a, b in zip(with_none, chunked.gradients(rows, head, stats, g, needs)):
        assert (a is None and b is None) or torch.equal(a, b)

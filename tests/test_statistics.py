"""One record per output: what follows from it, and that parts of a vocabulary merge to the whole."""

import itertools
import math
from typing import Any

import pytest
import torch

import fused_rlhf as fr
from fused_rlhf.kernels.statistics import OUTPUTS, STATISTICS, Partials, Tile, merge, parts_of, slots_of
from fused_rlhf.op import logprobs
from tests.helpers import dense, inputs, relative, worst


def test_what_follows_from_the_records():
    assert fr.LogProbs._fields == ("logprobs", *STATISTICS, "full_logprobs", "id_logprobs", "target_added")
    assert set(logprobs.RESULTS) == {"logprobs", "mass", "normaliser", "id_logits", *STATISTICS}
    returned = torch.ops.fused_rlhf.logprobs.default._schema.returns
    assert len(returned) == len(logprobs.RESULTS)
    differentiable = [name for name, record in STATISTICS.items() if record.differentiable]
    assert ("logprobs", "id_logits", *differentiable) == logprobs.DIFFERENTIABLE
    assert differentiable == ["entropy", "lse", "sum_sq", "mean_logit", "max_logit"]


def test_slots_are_dense_and_in_the_order_of_the_records():
    assert slots_of(()) == slots_of(("lse",)) == {}
    assert slots_of(("margin", "entropy")) == {"entropy": 2, "margin": 3}
    assert list(slots_of(OUTPUTS).values()) == list(range(2, 2 + len(parts_of(OUTPUTS))))


def partials_of(z, targets, columns):
    """A part of the vocabulary by itself, relative to its own maximum."""
    some = z[:, columns].clone()
    inside = (targets >= columns.start) & (targets < columns.stop)
    target = torch.where(inside, z.gather(1, targets[:, None])[:, 0], 0.0)
    maximum, column = some.max(1)
    tile = Tile(some, columns, maximum, column)
    records = parts_of(OUTPUTS)
    parts = {name: record.of_logits(tile) for name, record in records.items() if record.of_logits}
    reference = maximum.masked_fill(maximum == -torch.inf, 0.0)
    tile.exps, tile.work = (some - reference[:, None]).exp(), (some - reference[:, None]).clamp(min=-1e4)
    total = tile.exps.sum(1)
    parts |= {name: record.of_exps(tile) for name, record in records.items() if record.of_exps}
    return Partials(maximum, total, target, {name: parts[name] for name in records})


@pytest.mark.parametrize("edges", [(0, 61), (0, 1, 61), (0, 20, 21, 40, 61), (0, 60, 61)])
def test_parts_merge_to_the_whole(edges):
    """Ranges of any widths, as tiles, blocks or shards may have them, in the order of the vocabulary."""
    data = inputs(23, 8, 61)
    data["hidden"][3] *= 40.0  # one row is sure of a token
    true = dense(**data)
    z = data["hidden"] @ data["weight"].T
    ranges = [slice(a, b) for a, b in itertools.pairwise(edges)]
    whole = merge([partials_of(z, data["targets"], columns) for columns in ranges])
    logp, found = whole.finish(data["targets"], 61, OUTPUTS)
    assert worst(logp, true["logprobs"]) < 1e-12
    assert set(found) == set(OUTPUTS)
    for name, value in found.items():
        assert worst(value, true[name]) < 1e-12, name


def test_merging_is_the_same_to_the_bit_however_it_is_nested():
    """((a b) c) d, the order of a running merge, is what `merge` does."""
    data = inputs(11, 8, 64, torch.float32)
    z = data["hidden"] @ data["weight"].T
    parts = [partials_of(z, data["targets"], slice(a, a + 16)) for a in range(0, 64, 16)]
    reference = z.amax(1)
    running = parts[0].moved(reference)
    for part in parts[1:]:
        running = running.joined(part.moved(reference))
    one, two = (p.finish(data["targets"], 64, OUTPUTS) for p in (merge(parts), running))
    assert torch.equal(one[0], two[0])
    assert all(torch.equal(one[1][name], two[1][name]) for name in OUTPUTS)


def test_a_part_of_a_padded_vocabulary_counts_nothing():
    data = inputs(9, 4, 40)
    z = data["hidden"] @ data["weight"].T
    z[:, 20:] = -torch.inf
    targets = data["targets"] % 20
    padded = merge([partials_of(z, targets, slice(0, 20)), partials_of(z, targets, slice(20, 40))])
    plain = partials_of(z, targets, slice(0, 20))
    names = ("entropy", "lse", "sum_sq", "is_top1", "margin")
    one, two = (p.finish(targets, 40, names) for p in (padded, plain))
    assert torch.equal(one[0], two[0])
    assert all(torch.equal(one[1][name], two[1][name]) for name in names)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_margin(backend):
    """The largest logit less the second: of transformed logits, 0 at a tie, infinite where there is no second."""
    data = inputs(37, 8, 5003, torch.float32, bias=True, per_token=True)
    data["hidden"], data["targets"] = data["hidden"].requires_grad_(), data["targets"].clone()
    data["targets"][4] = -100
    found = fr.linear_logprobs(**data, softcap=3.0, logit_scale=0.5, outputs=("margin",), backend=backend).margin
    wide = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in data.items()}
    true = dense(**{**wide, "targets": data["targets"].clamp(min=0)}, softcap=3.0, logit_scale=0.5)["margin"]
    assert found.dtype == torch.float32
    assert found[4] == 0
    live = torch.arange(37) != 4
    assert worst(found[live], true[live]) < 1e-5
    assert not found.requires_grad

    weight = torch.zeros(9000, 2)
    weight[[17, 8000]] = 1.0  # in two tiles
    hidden, targets = torch.ones(1, 2), torch.tensor([17])
    assert fr.linear_logprobs(hidden, weight, targets, outputs=("margin",), backend=backend).margin == 0
    weight[8000] = 0.0
    weight[18] = 1.0  # in one
    assert fr.linear_logprobs(hidden, weight, targets, outputs=("margin",), backend=backend).margin == 0
    weight[18] = 0.0
    assert fr.linear_logprobs(hidden, weight, targets, outputs=("margin",), backend=backend).margin == 2
    only = fr.linear_logprobs(hidden, torch.ones(1, 2), torch.tensor([0]), outputs=("margin",), backend=backend)
    assert only.margin == math.inf


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_the_largest_logit(backend):
    """Its gradient goes to the first of the largest, in another tile than the second; its column may be the id to ignore, of
    a row that is not."""
    weight = torch.zeros(9000, 2)
    weight[[17, 8000]] = 1.0
    hidden, targets = torch.ones(3, 2, requires_grad=True), torch.tensor([3, 17, 5])
    weight.requires_grad_()
    found = fr.linear_logprobs(
        hidden, weight, targets, ignore_index=17, outputs=("max_logit", "argmax"), backend=backend
    )
    assert found.max_logit.tolist() == [2, 0, 2]
    assert found.argmax.tolist() == [17, 0, 17]
    assert found.argmax.dtype == torch.int64
    assert not found.argmax.requires_grad
    (found.max_logit * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert weight.grad[17].tolist() == [4, 4]
    assert weight.grad.count_nonzero() == 2
    assert hidden.grad.tolist() == [[1, 1], [0, 0], [3, 3]]


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_each_gradient_by_itself_and_twice(backend):
    """Of tokens in two dimensions, with a frozen operand, by autograd and once more with the graph kept."""
    data = inputs(37, 8, 103, bias=True)
    true: dict[str, Any] = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in data.items()}
    names = [name for name, record in STATISTICS.items() if record.differentiable]
    for frozen in ("weight", "hidden"):
        leaves = [name for name in ("hidden", "weight", "bias") if name != frozen]
        for some in (data, true):
            for name in ("hidden", "weight", "bias"):
                some[name] = some[name].detach().requires_grad_(name != frozen)
        found, exact = (
            fr.linear_logprobs(**data, softcap=3.0, outputs=names, backend=backend),
            dense(**true, softcap=3.0),
        )
        for name in names:
            upstream = torch.linspace(-1, 2, 37, dtype=torch.float64).masked_fill(torch.arange(37) == 7, 0)
            for _ in range(2):
                ours, theirs = (
                    torch.autograd.grad(value, [some[n] for n in leaves], upstream, retain_graph=True)
                    for value, some in ((getattr(found, name), data), (exact[name], true))
                )
                assert all(relative(a, b) < 1e-11 for a, b in zip(ours, theirs)), (name, frozen)


def test_margin_where_one_column_has_all_the_probability():
    weight, bias = torch.zeros(8, 2), torch.full((8,), -torch.inf)
    bias[3] = 0.0
    found = fr.linear_logprobs(torch.ones(1, 2), weight, torch.tensor([3]), bias=bias, outputs=("margin", "is_top1"))
    assert found.margin == math.inf
    assert found.is_top1

"""Parts merged equal the metrics of the whole, for every reduction, however the values are split."""

import math
from typing import Any

import pytest
import torch

from fused_rlhf.objectives import reductions
from fused_rlhf.objectives.reductions import Metrics, combine, least, mean, most, ratio, spread, total

VALUES = torch.randn(23, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 3
SPLITS = [[23], [1] * 23, [7, 0, 13, 3], [0, 23, 0], [22, 1]]


def of(values):
    """Every reduction of some values."""
    n, empty = len(values), torch.zeros(())
    center = values.mean() if n else empty
    return Metrics(
        {
            "count": total(torch.tensor(float(n))),
            "mean": mean(center, n),
            "share": ratio((values > -3).sum().double(), torch.tensor(n)),
            "per_square": ratio(values.sum(), values.square().sum()),
            "least": least(values.min() if n else empty, n),
            "most": most(values.max() if n else empty, n),
            "spread": spread(values.var(correction=0) if n else empty, center, n),
        }
    )


WHOLE = {
    "count": 23.0,
    "mean": VALUES.mean().item(),
    "share": (VALUES > -3).double().mean().item(),
    "per_square": (VALUES.sum() / VALUES.square().sum()).item(),
    "least": VALUES.min().item(),
    "most": VALUES.max().item(),
    "spread": VALUES.var(correction=0).item(),
}


def numbers(found):
    return {name: value.item() for name, value in found.items()}


@pytest.mark.parametrize("sizes", SPLITS)
def test_merged_parts_are_the_metrics_of_the_whole(sizes):
    parts = [of(some) for some in VALUES.split(sizes)]
    assert numbers(combine(parts)) == pytest.approx(WHOLE, rel=1e-13)
    assert dict(parts[-1]) == {name: metric.value for name, metric in parts[-1].parts.items()}


@pytest.mark.parametrize("sizes", SPLITS)
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_merge_as_parts_do(sizes, processes):
    """All processes at once: one call after the other up to each of its reductions, whose results the others wait for."""
    parts = [of(some) for some in VALUES.split(sizes)]
    own = [parts[rank::processes] or [of(VALUES[:0])] for rank in range(processes)]
    sides = list(reductions.OF_SIDE)
    sent: dict[str, list[Any]] = {side: [] for side in sides}
    for side in sides:
        for mine in own:

            def across(values, how, side=side):
                if how == side:
                    sent[side].append(values)
                return values

            combine(mine, across)

    calls = []

    def gathered(values, how):
        calls.append(how)
        return reductions.OF_SIDE[how](torch.stack(sent[how]), dim=0)

    for mine in own:
        assert numbers(combine(mine, gathered)) == pytest.approx(WHOLE, rel=1e-13)
    assert calls == sides * processes  # three reductions, however many metrics


def test_what_counts_nothing_may_be_anything():
    nothing = {name: metric._replace(value=torch.tensor(math.nan)) for name, metric in of(VALUES[:5]).parts.items()}
    nothing["spread"] = nothing["spread"]._replace(center=torch.tensor(math.nan))
    ignored = Metrics(nothing).weighted(0)
    assert numbers(combine([ignored, of(VALUES), ignored])) == pytest.approx(WHOLE, rel=1e-13)
    assert numbers(combine([ignored, ignored])) == dict.fromkeys(WHOLE, 0.0)
    assert combine([]) == {}


def test_a_nan_or_an_infinity_that_counts_is_seen():
    broken = Metrics({name: m._replace(value=torch.tensor(math.nan)) for name, m in of(VALUES[:2]).parts.items()})
    assert all(math.isnan(value) for value in numbers(combine([of(VALUES), broken])).values())
    infinite = Metrics({"least": least(torch.tensor(math.inf)), "most": most(torch.tensor(-math.inf))})
    assert numbers(combine([infinite])) == {"least": math.inf, "most": -math.inf}


def test_counting_twice_is_being_there_twice():
    parts = [of(VALUES[:9]), of(VALUES[9:])]
    twice = combine([parts[0].weighted(2), parts[1]])
    assert numbers(twice) == pytest.approx(numbers(combine([parts[0], *parts])), rel=1e-13)


def test_equal_values_have_no_spread_and_the_mean_is_theirs_to_the_bit():
    parts = [
        Metrics({"mean": mean(torch.tensor(0.7), n), "var": spread(torch.tensor(0.0), torch.tensor(0.7), n)})
        for n in (3, 5, 11)
    ]
    found = combine(parts)
    assert found["mean"].item() == torch.tensor(0.7).double().item()
    assert 0 <= found["var"].item() < 1e-15


def test_a_quotient_of_sums_over_nothing_is_zero_and_weighs_nothing():
    nothing, zero = torch.tensor(0.0), torch.tensor(0)
    for empty in (ratio(nothing, zero), ratio(nothing, 0)):
        assert empty.value.item() == 0
        found = combine([Metrics({"x": empty}), Metrics({"x": ratio(torch.tensor(3.0), 4)})])
        assert found["x"].item() == 0.75


def test_no_gradient_is_kept():
    value = torch.ones((), requires_grad=True)
    assert not combine([Metrics({"a": total(value * 2), "b": mean(value * 3, 2)})])["a"].requires_grad

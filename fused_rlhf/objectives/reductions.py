"""How a metric of one call becomes one of a whole batch: every metric carries its reduction and what it counts for.

    total                 sum v                      mean      sum w v / sum w        w: tokens, sequences, pairs ...
    least, most           min v, max v               spread    pooled variance: mean w (v + m^2) - (mean w m)^2

over the parts, micro-batches and processes, that have anything to count (w > 0); 0 where none has.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

How = Literal["total", "mean", "least", "most", "spread"]
Side = Literal["sum", "min", "max"]
Across = Callable[[Tensor, Side], Tensor]

SIDES: dict[How, Side] = {"total": "sum", "mean": "sum", "spread": "sum", "least": "min", "most": "max"}
OF_SIDE: dict[Side, Callable[..., Tensor]] = {"sum": torch.sum, "min": torch.amin, "max": torch.amax}


class Metric(NamedTuple):
    """A 0-d value, how it reduces and what it counts for."""

    value: Tensor
    how: How
    weight: Tensor | float = 1.0  # >= 0, 0-d
    center: Tensor | None = None  # spread: the mean that the variance is about


def total(value: Tensor) -> Metric:
    """Adds up over the parts."""
    return Metric(value, "total")


def mean(value: Tensor, weight: Tensor | float) -> Metric:
    """The mean over `weight` tokens, sequences or pairs."""
    return Metric(value, "mean", weight)


def ratio(numerator: Tensor, denominator: Tensor | float) -> Metric:
    """A quotient of sums, 0 where the denominator (>= 0) is 0."""
    if isinstance(denominator, Tensor):
        return Metric(numerator / denominator.masked_fill(denominator == 0, 1), "mean", denominator)
    return Metric(numerator / (denominator or 1), "mean", denominator)


def least(value: Tensor, weight: Tensor | float = 1.0) -> Metric:
    """The minimum of the parts whose weight is not 0."""
    return Metric(value, "least", weight)


def most(value: Tensor, weight: Tensor | float = 1.0) -> Metric:
    """The maximum of the parts whose weight is not 0."""
    return Metric(value, "most", weight)


def spread(variance: Tensor, center: Tensor, weight: Tensor | float) -> Metric:
    """The variance about `center`, the mean of the same `weight` values."""
    return Metric(variance, "spread", weight, center)


class Metrics(dict[str, Tensor]):
    """0-d values by name; `parts` says how each reduces. A copy or a union is a plain dict of the values."""

    def __init__(self, parts: Mapping[str, Metric]) -> None:
        super().__init__({name: metric.value for name, metric in parts.items()})
        self.parts = dict(parts)

    def weighted(self, factor: float) -> Metrics:
        """The same counting `factor` (>= 0) times as much, totals included; 0: not at all, whatever the values are."""

        def scaled(metric: Metric) -> Metric:
            if metric.how != "total":
                return metric._replace(weight=metric.weight * factor)
            return metric._replace(value=metric.value * factor if factor else torch.zeros_like(metric.value))

        return Metrics({name: scaled(metric) for name, metric in self.parts.items()})


def combine(parts: Iterable[Metrics], across: Across = lambda values, how: values) -> dict[str, Tensor]:
    """The metrics of all parts together, 0-d each; at most three reductions over processes.

    Args:
        parts: of this process's micro-batches; every process must have the same names.
        across: `across(values, how)`: a vector's elementwise sum, minimum or maximum over all processes.
    """
    by_name: dict[str, list[Metric]] = defaultdict(list)
    for part in parts:
        for name, metric in part.parts.items():
            by_name[name].append(metric)
    found: dict[str, Tensor] = {}
    for side, reduce in OF_SIDE.items():
        names = [name for name, metrics in by_name.items() if SIDES[metrics[0].how] == side]
        if names:
            rows = torch.stack([reduce(torch.stack([_row(m) for m in by_name[name]]), dim=0) for name in names])
            for name, row in zip(names, across(rows.flatten(), side).view_as(rows)):
                found[name] = _of_row(by_name[name][0].how, row)
    return {name: found[name] for name in by_name}


def _row(metric: Metric) -> Tensor:
    """(3,) to be added up: value, centre and weight; or (2,) to be compared: value, and whether there is one."""
    # fp64: a weighted sum over many tokens loses nothing that its parts had. MPS has none.
    dtype = torch.float32 if metric.value.device.type == "mps" else torch.float64
    value = metric.value.detach().to(dtype)
    given = metric.weight
    weight = given.detach().to(value) if isinstance(given, Tensor) else value.new_full((), given)
    # What counts nothing may be anything, a NaN too.
    nothing, zero = weight == 0, torch.zeros_like(value)
    if metric.how == "total":
        return torch.stack([value, zero, zero])
    if metric.how == "least":
        return torch.stack([value.masked_fill(nothing, torch.inf), nothing.to(dtype) - 1])
    if metric.how == "most":
        return torch.stack([value.masked_fill(nothing, -torch.inf), 1 - nothing.to(dtype)])
    center = zero if metric.center is None else metric.center.detach().to(dtype)
    terms = torch.stack([value + center.square(), center]).masked_fill(nothing, 0.0) * weight
    return torch.cat([terms, weight[None]])


def _of_row(how: How, row: Tensor) -> Tensor:
    if how == "total":
        return row[0]
    if how in ("least", "most"):
        return row[0].masked_fill(row[1] == 0, 0.0)
    values, centers, weight = row
    weight = weight.masked_fill(weight == 0, 1.0)
    if how == "mean":
        return values / weight
    return (values / weight - (centers / weight).square()).clamp(min=0)

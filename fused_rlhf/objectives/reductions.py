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
Across = Callable[[Tensor, Literal["sum", "min", "max"]], Tensor]


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
    return Metric(value, "least", weight)


def most(value: Tensor, weight: Tensor | float = 1.0) -> Metric:
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
        """The same counting `factor` times as much (0: not at all), totals included."""
        scaled = {
            name: m._replace(value=m.value * factor) if m.how == "total" else m._replace(weight=m.weight * factor)
            for name, m in self.parts.items()
        }
        return Metrics(scaled)


def combine(parts: Iterable[Metrics], across: Across = lambda values, how: values) -> dict[str, Tensor]:
    """The metrics of all parts together, 0-d each; at most three reductions over processes.

    Args:
        parts: of this process's micro-batches; every process must have the same names.
        across: `across(values, how)`: a vector's elementwise sum, minimum or maximum over all processes.
    """
    sums: dict[str, list[Tensor]] = defaultdict(list)
    extremes: dict[str, dict[str, list[Tensor]]] = {"min": defaultdict(list), "max": defaultdict(list)}
    how_of: dict[str, How] = {}
    for part in parts:
        for name, metric in part.parts.items():
            how_of[name] = metric.how
            value = metric.value.detach().float()
            weight = torch.as_tensor(metric.weight, dtype=torch.float32, device=value.device)
            if metric.how in ("least", "most"):
                side, nothing = ("min", torch.inf) if metric.how == "least" else ("max", -torch.inf)
                extremes[side][name].append(value.masked_fill(weight == 0, nothing))
            else:
                sums[name].append(_sums(metric, value, weight))
    found: dict[str, Tensor] = {}
    if sums:
        # fp64: a weighted sum over many tokens loses nothing that its parts had.
        table = torch.stack([torch.stack(column).sum(0) for column in sums.values()])
        for name, row in zip(sums, across(table.flatten(), "sum").view(len(sums), 3)):
            found[name] = _of_sums(how_of[name], row)
    for side, reduce in (("min", torch.amin), ("max", torch.amax)):
        columns = extremes[side]
        if columns:
            local = torch.stack([reduce(torch.stack(column), dim=0) for column in columns.values()])
            values = across(local, side)  # type: ignore[arg-type]
            found |= dict(zip(columns, values.masked_fill(values.isinf(), 0.0)))
    return {name: found[name] for name in how_of}


def _sums(metric: Metric, value: Tensor, weight: Tensor) -> Tensor:
    """(3,) of sums: the value's, the centre's and the weight's."""
    if value.device.type != "mps":
        value, weight = value.double(), weight.double()
    if metric.how == "total":
        return torch.stack([value, torch.zeros_like(value), torch.ones_like(value)])
    center = torch.zeros_like(value) if metric.center is None else metric.center.detach().to(value.dtype)
    # What counts nothing may be anything, a NaN too.
    terms = torch.stack([value + center.square(), center]).masked_fill(weight == 0, 0.0) * weight
    return torch.cat([terms, weight[None]])


def _of_sums(how: How, row: Tensor) -> Tensor:
    if how == "total":
        return row[0]
    values, centers, weight = row
    weight = weight.masked_fill(weight == 0, 1.0)
    return values / weight - (centers / weight).square()

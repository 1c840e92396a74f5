"""What the op can say of a row beside its log-probability: one record per output.

A row is seen in parts, each a range of the vocabulary: a tile, a block, a shard. Of a part with logits z, maximum m and
e = exp(z - m), S = sum e, a statistic keeps one number:

    entropy       T = sum e (z - m)               log S - T / S
    sum_sq        Q = sum e^2                     Q / S^2
    mean_logit    Z = sum z                       Z / V
    max_logit     m                               m
    argmax        the column of the first m       that column
    is_top1       that of argmax                  whether it is the target
    margin        the second largest z            m less that

`merge` puts two parts together: sums move to the common maximum and are then joined. Whoever merges does so in the order
of the vocabulary, so that the bits do not depend on who it is; the blocks of a streamed head alone have an order of their
own. The Triton kernels hold the same numbers in slots of the same order. Derivatives are in `interface.TokenGrads`. This file
needs torch alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

FAR = -1e4  # stands for -inf under an exp that underflows to 0 either way, so that 0 * z is 0


@dataclass
class Tile:
    """(n, v) logits on their way into the statistics."""

    z: Tensor
    columns: slice
    maximum: Tensor  # (n,)
    column: Tensor | None = None  # (n,) where the first maximum is, from the left of the tile; where a record asks
    # Once the exponentials are there, which may overwrite z:
    exps: Tensor | None = None  # exp(z - reference)
    work: Tensor | None = None  # (n, v) scratch; it holds z - reference, at least FAR, for the record that reads depth


@dataclass(frozen=True)
class Move:
    """From a part's own reference to the common one: e shrinks by `scale` = exp(shift), (n,) each."""

    scale: Tensor
    shift: Tensor
    total: Tensor  # the part's S before it moves


@dataclass(frozen=True)
class Whole:
    """What is known of a row in the end, (n,) each."""

    maximum: Tensor
    total: Tensor
    log_total: Tensor
    targets: Tensor
    vocabulary: int


def _stays(part: Tensor, move: Move) -> Tensor:
    return part


def _adds(first: Tensor, second: Tensor, maximum: Tensor, other_maximum: Tensor) -> Tensor:
    return first + second


@dataclass(frozen=True, kw_only=True)
class Statistic:
    """How one output is defined, summed up over parts and finished. Vectors are (n,)."""

    define: Callable[
        [Tensor, Tensor, Tensor, Tensor], Tensor
    ]  # (z (n, V), log p, lse, targets): for the reference backend
    of_logits: Callable[[Tile], Tensor] | None = None  # a part's number, from z
    of_exps: Callable[[Tile], Tensor] | None = None  # or from the exponentials
    move: Callable[[Tensor, Move], Tensor] = _stays
    join: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = _adds  # (first, second, maximum of each)
    finish: Callable[[Tensor, Whole], Tensor]
    number_of: str = ""  # the record whose number it reads, where it has none of its own
    start: float = 0.0  # of no columns at all
    reads_column: bool = False
    reads_depth: bool = False
    differentiable: bool = False
    of_columns: bool = False  # its numbers are columns of the vocabulary, int64
    dtype: torch.dtype | None = None  # of the result; None: that of the logits

    @property
    def has_part(self) -> bool:
        """Whether it needs a number of its own beside the maximum and S."""
        return self.of_logits is not None or self.of_exps is not None


def _entropy_of(z: Tensor, log_p: Tensor, lse: Tensor, targets: Tensor) -> Tensor:
    p = log_p.exp()
    # p log p is 0 where a logit is -inf, as for the columns of a padded vocabulary.
    return -torch.where(p == 0, 0.0, p * torch.where(p == 0, 0.0, log_p)).sum(-1)


def _weighted_depth(tile: Tile) -> Tensor:
    assert tile.work is not None
    assert tile.exps is not None
    return tile.work.mul_(tile.exps).sum(1)


def _squares(tile: Tile) -> Tensor:
    assert tile.exps is not None
    return torch.square(tile.exps, out=tile.work).sum(1)


def _first_column(tile: Tile) -> Tensor:
    assert tile.column is not None
    return tile.column + tile.columns.start


def _of_the_larger(first: Tensor, second: Tensor, maximum: Tensor, other_maximum: Tensor) -> Tensor:
    # Of equals the first in the vocabulary, which streamed blocks do not come in the order of.
    of_equals = torch.where(other_maximum == maximum, torch.minimum(first, second), first)
    return torch.where(other_maximum > maximum, second, of_equals)


def _margin_of(z: Tensor, log_p: Tensor, lse: Tensor, targets: Tensor) -> Tensor:
    if z.shape[-1] == 1:
        return torch.full_like(lse, torch.inf)
    largest = z.topk(2, dim=-1).values
    return largest[..., 0] - largest[..., 1]


def _second_largest(tile: Tile) -> Tensor:
    assert tile.column is not None
    at = tile.column[:, None]
    largest = tile.z.gather(1, at)
    second = tile.z.scatter_(1, at, -torch.inf).amax(1)
    tile.z.scatter_(1, at, largest)
    return second


def _second_of_both(first: Tensor, second: Tensor, maximum: Tensor, other_maximum: Tensor) -> Tensor:
    return torch.maximum(torch.maximum(first, second), torch.minimum(maximum, other_maximum))


# In the order in which results and slots are laid out.
STATISTICS: dict[str, Statistic] = {
    "entropy": Statistic(
        define=_entropy_of,
        of_exps=_weighted_depth,
        move=lambda part, move: move.scale * (part + move.total * move.shift),
        finish=lambda part, row: row.log_total - part / row.total,
        reads_depth=True,
        differentiable=True,
    ),
    "lse": Statistic(
        define=lambda z, log_p, lse, targets: lse,
        finish=lambda part, row: row.maximum + row.log_total,
        differentiable=True,
    ),
    "sum_sq": Statistic(
        define=lambda z, log_p, lse, targets: (2 * log_p).exp().sum(-1),
        of_exps=_squares,
        move=lambda part, move: move.scale.square() * part,
        finish=lambda part, row: part / row.total.square(),
        differentiable=True,
    ),
    "mean_logit": Statistic(
        define=lambda z, log_p, lse, targets: z.mean(-1),
        of_logits=lambda tile: tile.z.sum(1),
        finish=lambda part, row: part / row.vocabulary,
        differentiable=True,
    ),
    "max_logit": Statistic(
        define=lambda z, log_p, lse, targets: z.amax(-1),
        of_logits=lambda tile: tile.maximum,
        join=lambda first, second, maximum, other_maximum: torch.maximum(first, second),
        finish=lambda part, row: part,
        start=-torch.inf,
        differentiable=True,
    ),
    "argmax": Statistic(
        define=lambda z, log_p, lse, targets: z.argmax(-1),
        of_logits=_first_column,
        join=_of_the_larger,
        finish=lambda part, row: part,
        reads_column=True,
        of_columns=True,
        dtype=torch.int64,
    ),
    "is_top1": Statistic(
        define=lambda z, log_p, lse, targets: z.argmax(-1) == targets,
        finish=lambda part, row: part == row.targets,
        number_of="argmax",
        dtype=torch.bool,
    ),
    "margin": Statistic(
        define=_margin_of,
        of_logits=_second_largest,
        join=_second_of_both,
        finish=lambda part, row: row.maximum - part,
        start=-torch.inf,
        reads_column=True,
    ),
}
OUTPUTS = tuple(STATISTICS)
# One buffer is depth and scratch: what reads depth must come before all that writes scratch.
assert not any(record.reads_depth for record in [r for r in STATISTICS.values() if r.of_exps][1:])


def parts_of(outputs: Iterable[str]) -> dict[str, Statistic]:
    """The records, in their order, whose numbers these outputs need."""
    wanted = {STATISTICS[name].number_of or name for name in outputs}
    return {name: record for name, record in STATISTICS.items() if name in wanted and record.has_part}


def with_places(outputs: tuple[str, ...]) -> tuple[str, ...]:
    """And argmax, where the gradient of the largest logit is to go."""
    return (*outputs, "argmax") if "max_logit" in outputs and "argmax" not in outputs else outputs


def slots_of(outputs: Iterable[str]) -> dict[str, int]:
    """Where the kernels keep the number of each statistic, behind the maximum (0) and S (1)."""
    return {name: 2 + i for i, name in enumerate(parts_of(outputs))}


@dataclass
class Partials:
    """The numbers of some rows over the columns seen so far, (n,) each."""

    maximum: Tensor
    total: Tensor  # S
    target: Tensor  # the target's logit, 0 where its column was not seen
    parts: dict[str, Tensor]

    @staticmethod
    def none(like: Tensor, outputs: Sequence[str]) -> Partials:
        """Of no columns, in the dtype of `like` (n,)."""
        parts = {}
        for name, record in parts_of(outputs).items():
            dtype = torch.int64 if record.of_columns else like.dtype
            parts[name] = torch.full_like(like, record.start, dtype=dtype)
        return Partials(torch.full_like(like, -torch.inf), torch.zeros_like(like), torch.zeros_like(like), parts)

    def __getitem__(self, rows: slice) -> Partials:
        """Some of the rows: views."""
        parts = {name: part[rows] for name, part in self.parts.items()}
        return Partials(self.maximum[rows], self.total[rows], self.target[rows], parts)

    def __setitem__(self, rows: slice, other: Partials) -> None:
        self.maximum[rows], self.total[rows], self.target[rows] = other.maximum, other.total, other.target
        for name, part in other.parts.items():
            self.parts[name][rows] = part

    def moved(self, reference: Tensor) -> Partials:
        """The sums relative to `reference` (n,), which is finite and at least the maximum."""
        shift = self.maximum - reference
        move = Move(shift.exp(), shift.clamp(min=FAR), self.total)
        parts = {name: STATISTICS[name].move(part, move) for name, part in self.parts.items()}
        return replace(self, total=move.scale * self.total, parts=parts)

    def joined(self, other: Partials) -> Partials:
        """With the columns that come next; the sums of both are relative to one reference."""
        maxima = self.maximum, other.maximum
        parts = {name: STATISTICS[name].join(part, other.parts[name], *maxima) for name, part in self.parts.items()}
        return Partials(torch.maximum(*maxima), self.total + other.total, self.target + other.target, parts)

    def after(self, start: int) -> Partials:
        """The same where the first column is `start`."""
        parts = {name: part + start if STATISTICS[name].of_columns else part for name, part in self.parts.items()}
        return replace(self, parts=parts)

    def packed(self) -> Tensor:
        """(n, 3 + parts) in the dtype of the sums, which holds a vocabulary's columns exactly."""
        vectors = (self.maximum, self.total, self.target, *self.parts.values())
        return torch.stack([vector.to(self.total.dtype) for vector in vectors], 1)

    @staticmethod
    def unpacked(numbers: Tensor, outputs: Sequence[str]) -> Partials:
        """The inverse of `packed`; what follows is left."""
        maximum, total, target, *rest = numbers.unbind(1)
        parts = {}
        for (name, record), part in zip(parts_of(outputs).items(), rest):
            parts[name] = part.long() if record.of_columns else part
        return Partials(maximum, total, target, parts)

    @staticmethod
    def of(z: Tensor, targets: Tensor, outputs: Sequence[str]) -> Partials:
        """Of whole (n, v) logits at once, relative to their own maximum; a target may lie beyond the columns."""
        if z.shape[1] == 0:
            return Partials.none(z.new_empty(len(z)), outputs)
        maximum, column = z.max(1)
        tile = Tile(z, slice(0, z.shape[1]), maximum, column)
        records = parts_of(outputs)
        parts = {name: record.of_logits(tile) for name, record in records.items() if record.of_logits}
        depth = z - reference_of(maximum)[:, None]
        tile.exps, tile.work = depth.exp(), depth.clamp(min=FAR)
        total = tile.exps.sum(1)
        parts |= {name: record.of_exps(tile) for name, record in records.items() if record.of_exps}
        hit = (targets >= 0) & (targets < z.shape[1])
        target = z.gather(1, targets.clamp(0, z.shape[1] - 1)[:, None])[:, 0]
        return Partials(maximum, total, torch.where(hit, target, 0.0), {name: parts[name] for name in records})

    def finish(self, targets: Tensor, vocabulary: int, outputs: Iterable[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Log-probabilities, and the statistics asked for; lse always."""
        row = Whole(self.maximum, self.total, self.total.log(), targets, vocabulary)
        wanted = {"lse", *outputs}
        # lse has no part: its record reads the row alone.
        extra = {
            name: record.finish(self.parts.get(record.number_of or name, self.total), row)
            for name, record in STATISTICS.items()
            if name in wanted
        }
        return (self.target - self.maximum) - row.log_total, extra


def reference_of(maximum: Tensor) -> Tensor:
    """A maximum to subtract. A row may have seen nothing but -inf: its sums are 0 whatever the reference."""
    return maximum.masked_fill(maximum == -torch.inf, 0.0)


def merge(parts: Sequence[Partials]) -> Partials:
    """Of adjacent ranges of columns, in the order of the vocabulary, each relative to its own maximum."""
    reference = reference_of(reduce(torch.maximum, (part.maximum for part in parts)))
    return reduce(Partials.joined, (part.moved(reference) for part in parts))

"""Which rows of a step's rollout go into which of its updates, which of them a process has, and which share a forward.

    M mini-batches of C completions        completion m C + c stands in row m, column c of a table
    each pass over the rollout             puts every column into an order of its own; a mini-batch is a row
    a micro-batch                          some of a process's rows of a mini-batch, cheap to compute together

The orders are drawn from seed, step and pass. A process has whole columns, those of its prompts, so that it keeps its
completions and an update of several processes sees what one of a single process would.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from fused_rlhf.objectives.reductions import Metrics
from fused_rlhf.trainers.config import TrainConfig
from fused_rlhf.trainers.engine import Placed
from fused_rlhf.trainers.layout import Layout, tokens_in
from fused_rlhf.trainers.rollout_config import RolloutConfig

T = TypeVar("T")

Rows = Sequence[int]  # of a process's own completions
ANY: Rows = range(1)  # for a forward that is there for its calls alone


@dataclass(frozen=True)
class Turn:
    """What a process brings to one update."""

    rows: Rows  # all of them, which the means of the loss are over
    micro: Sequence[Rows]  # those that reach the model, by forwards: as many on each process, the last maybe empty
    live: bool = True  # some process has one


@dataclass(frozen=True)
class Sizes:
    """What sequences cost a model's body."""

    lengths: Sequence[int]  # tokens of each, the prompt's included
    prompts: Sequence[Hashable]  # what each begins with: equal ones may be shared
    prompt_lengths: Sequence[int]
    layout: Layout

    def tokens(self, rows: Rows) -> int:
        """That a forward of these reads."""
        lengths, sizes = ([x[i] for i in rows] for x in (self.lengths, self.prompt_lengths))
        return tokens_in(lengths, [self.prompts[i] for i in rows], sizes, self.layout)

    def ordered(self, rows: Rows) -> list[int]:
        """Those that are cheap together side by side: of equal length where rows are padded, else of one prompt."""
        if self.layout.name == "padded":
            return sorted(rows, key=lambda i: -self.lengths[i])
        first = {self.prompts[i]: place for place, i in reversed(list(enumerate(rows)))}
        return sorted(rows, key=lambda i: first[self.prompts[i]])


def chunks(rows: Sequence[T], size: int) -> list[Sequence[T]]:
    """`rows` in pieces of `size`, the last one maybe shorter."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def split(order: Rows, tokens: Callable[[Rows], int], config: TrainConfig, each: int = 1) -> list[Rows]:
    """Micro-batches of items in their order, `each` sequences an item: of `micro_batch_size` sequences, or as few as hold
    `micro_batch_tokens` tokens each, all about as many. `tokens(rows)`: those that a forward of these reads."""
    budget = config.micro_batch_tokens
    if not budget:
        return chunks(order, config.micro_batch_size // each)
    least = len(filled(order, tokens, budget))
    low, high = max((tokens([i]) for i in order), default=0), budget
    while low < high:  # the smallest budget that needs no more of them
        middle = (low + high) // 2
        if len(filled(order, tokens, middle)) <= least:
            high = middle
        else:
            low = middle + 1
    return filled(order, tokens, high)


def filled(order: Rows, tokens: Callable[[Rows], int], budget: int) -> list[Rows]:
    """A new micro-batch is begun where the next item would not fit; one alone may be larger."""
    found: list[list[int]] = []
    for i in order:
        if found and tokens([*found[-1], i]) <= budget:
            found[-1].append(i)
        else:
            found.append([i])
    return list(found)


def turns_of(
    engine: Placed, dealt: Sequence[Rows], live: Sequence[bool], sizes: Sizes, config: TrainConfig
) -> list[Turn]:
    """Each update's rows, and the live ones among them by micro-batches; the rest never reaches the model."""
    micro = []
    for rows in dealt:
        some = [i for i in rows if live[i]]
        by_count = sizes.layout.name == "padded" and not config.micro_batch_tokens
        micro.append(split(some if by_count else sizes.ordered(some), sizes.tokens, config))
    counts = torch.tensor([len(some) for some in micro], device=engine.device)
    return [
        Turn(rows, [*some, *[[]] * (count - len(some))], count > 0)
        for rows, some, count in zip(dealt, micro, engine.across(counts, "max").tolist(), strict=True)
    ]


def forwards(turns: Sequence[Turn]) -> list[Rows]:
    """The rows of each forward in some updates that there are; an empty one is there for its calls alone."""
    return [micro for turn in turns if turn.live for micro in turn.micro]


def counted(loss: Tensor, metrics: Metrics, live: bool) -> tuple[Tensor, Metrics]:
    """A micro-batch's share in a loss and its metrics: none of either where it is there for its calls alone."""
    return (loss, metrics) if live else (0.0 * loss, metrics.weighted(0))


def balanced(costs: Sequence[float], world: int) -> list[list[int]]:
    """Items dealt to processes so that the largest sum is small: the most expensive first, to who has least."""
    shares: list[list[int]] = [[] for _ in range(world)]
    sums = [0.0] * world
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        least = min(range(world), key=lambda rank: (sums[rank], len(shares[rank])))
        shares[least].append(i)
        sums[least] += costs[i]
    return [sorted(some) for some in shares]


def columns_of(engine: Placed, count: int, config: RolloutConfig) -> range:
    """The columns that a process has with the `count` completions of its own prompts."""
    C = count // config.num_minibatches
    return range(engine.rank * C, (engine.rank + 1) * C)


def deal(columns: Sequence[int], total: int, config: RolloutConfig, number: int, passes: int) -> list[Rows]:
    """The rows of each update of step `number`, pass after pass, where a process has these of `total` columns."""
    M, C = config.num_minibatches, len(columns)
    if M == 1:
        return [range(C)] * passes
    found: list[Rows] = []
    for turn in range(passes):
        generator = torch.Generator().manual_seed((config.seed * 1_000_003 + number) * 1_009 + turn)
        order = torch.rand(M, total, generator=generator).argsort(dim=0)
        found += (order[:, list(columns)] * C + torch.arange(C)).tolist()
    return found


def exchanged(engine: Placed, tokens: Sequence[int], each: int, config: RolloutConfig) -> tuple[list[int], list[int]]:
    """Rows of all processes, by number, and their columns, that this process takes so that all have about as many tokens.

    `tokens`: of each completion of its own; those of a prompt, `each` of them, stay together where that can be.
    """
    C, M = len(tokens) // config.num_minibatches, config.num_minibatches
    every = engine.gather(list(tokens))
    total = C * engine.world
    # Where completion (m, c) stands in `every`: by process, then row, then column.
    place = [[c // C * len(tokens) + m * C + c % C for c in range(total)] for m in range(M)]
    unit = each if total % each == 0 else 1
    blocks = [range(first, first + unit) for first in range(0, total, unit)]
    costs = [sum(every[place[m][c]] for m in range(M) for c in block) for block in blocks]
    columns = [c for block in balanced(costs, engine.world)[engine.rank] for c in blocks[block]]
    return [place[m][c] for m in range(M) for c in columns], columns


def own_prompts(engine: Placed, count: int, config: RolloutConfig) -> list[int]:
    """Which of the `count` prompts of a step this process takes: the same share of each row of the table."""
    if engine.world == 1:
        return list(range(count))
    return [i for row in chunks(range(count), count // config.num_minibatches) for i in engine.mine(row)]


def everyones(engine: Placed, count: int, config: RolloutConfig, rows: Sequence[T]) -> list[T]:
    """The rows of all processes, as many for each prompt that is one's own, in the order of the prompts."""
    own = own_prompts(engine, count, config)
    each = len(rows) // max(len(own), 1)
    tagged = engine.gather([(own[i // each], row) for i, row in enumerate(rows)])
    return [row for _, row in sorted(tagged, key=lambda pair: pair[0])]

"""Which rows of a step's rollout go into which of its updates, and which of them a process has.

    M mini-batches of C completions        completion m C + c stands in row m, column c of a table
    each pass over the rollout             puts every column into an order of its own; a mini-batch is a row

The orders are drawn from seed, step and pass. A process has whole columns, those of its prompts, so that it keeps its
completions and an update of several processes sees what one of a single process would.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch

from fused_rlhf.trainers.engine import Placed
from fused_rlhf.trainers.rollout_config import RolloutConfig

T = TypeVar("T")

Rows = Sequence[int]  # of a process's own completions


def chunks(rows: Sequence[T], size: int) -> list[Sequence[T]]:
    """`rows` in pieces of `size`, the last one maybe shorter."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def deal(engine: Placed, count: int, config: RolloutConfig, number: int, passes: int) -> list[Rows]:
    """The rows of each update of step `number`, pass after pass, where a process has `count` completions."""
    M = config.num_minibatches
    if M == 1:
        return [range(count)] * passes
    C = count // M
    found: list[Rows] = []
    for turn in range(passes):
        generator = torch.Generator().manual_seed((config.seed * 1_000_003 + number) * 1_009 + turn)
        order = torch.rand(M, C * engine.world, generator=generator).argsort(dim=0)
        mine = order[:, engine.rank * C : (engine.rank + 1) * C]
        found += (mine * C + torch.arange(C)).tolist()
    return found


def microbatches(some: Sequence[Rows], config: RolloutConfig) -> list[Rows]:
    """The rows of each forward in some updates."""
    return [micro for rows in some for micro in chunks(rows, config.micro_batch_size)]


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

"""Which rows go into which update, in one process and in several."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fused_rlhf.trainers import minibatches
from fused_rlhf.trainers.layout import Layout
from fused_rlhf.trainers.minibatches import Sizes, balanced, chunks, columns_of, everyones, forwards, own_prompts
from fused_rlhf.trainers.minibatches import deal as deal_columns
from fused_rlhf.trainers.rollout_config import RolloutConfig


def process(rank=0, world=1) -> Any:
    def mine(rows):
        share = len(rows) // world
        return rows[rank * share : (rank + 1) * share]

    return SimpleNamespace(rank=rank, world=world, mine=mine, gather=list, device="cpu", across=lambda x, how: x)


def deal(engine, count, config, number, passes):
    columns = columns_of(engine, count, config)
    return deal_columns(columns, len(columns) * engine.world, config, number, passes)


def config(**options):
    return RolloutConfig(**({"prompts_per_step": 12, "num_minibatches": 3, "micro_batch_size": 5} | options))


def test_chunks():
    assert chunks(range(2, 9), 3) == [range(2, 5), range(5, 8), range(8, 9)]
    assert chunks([], 3) == []


def test_each_pass_takes_every_row_once_and_deals_anew():
    found = deal(process(), 24, config(), number=1, passes=4)
    assert len(found) == 12
    passes = [found[i : i + 3] for i in range(0, 12, 3)]
    for some in passes:
        assert sorted(i for rows in some for i in rows) == list(range(24))
        assert {len(rows) for rows in some} == {8}
    assert len({tuple(map(tuple, map(sorted, some))) for some in passes}) == 4  # other company, not another order alone
    assert deal(process(), 24, config(), 1, 4) == found
    assert deal(process(), 24, config(), 2, 4) != found
    assert deal(process(), 24, config(seed=1), 1, 4) != found
    assert deal(process(), 24, config(num_minibatches=1), 1, 2) == [range(24)] * 2


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("generations", [1, 3])
def test_an_update_of_several_processes_takes_what_one_takes(world, generations):
    """Rows told by prompt and completion, wherever they lie."""
    settings = config()

    def told(engine):
        prompts = own_prompts(engine, 12, settings)
        rows = [(prompt, g) for prompt in prompts for g in range(generations)]
        return [[rows[i] for i in some] for some in deal(engine, len(rows), settings, 1, 2)]

    whole = told(process())
    parts = [told(process(rank, world)) for rank in range(world)]
    for number, rows in enumerate(whole):
        assert sorted(rows) == sorted(row for part in parts for row in part[number])
    assert sorted(p for part in range(world) for p in own_prompts(process(part, world), 12, settings)) == list(
        range(12)
    )


def test_everyones_order():
    assert everyones(process(), 3, config(), ["a", "b", "c", "d", "e", "f"]) == ["a", "b", "c", "d", "e", "f"]


# ------------------------------------------------------------------------------------------------------- micro-batches

# Two prompts of 4 tokens with completions of 1, 5, 2 and of 3, 3; one of 9 with 1.
SOME = Sizes([5, 7, 9, 6, 10, 7], ["a", "b", "a", "a", "c", "b"], [4, 4, 4, 4, 9, 4], Layout("shared"))


def test_what_sequences_cost():
    everything = range(6)
    assert replace(SOME, layout=Layout("padded")).tokens(everything) == 60
    assert replace(SOME, layout=Layout("packed")).tokens(everything) == 44
    assert SOME.tokens(everything) == 44 - 3 * 4
    assert SOME.tokens([0, 1]) == 12
    assert SOME.ordered(everything) == [0, 2, 3, 1, 5, 4]
    assert replace(SOME, layout=Layout("padded")).ordered(everything) == [4, 2, 1, 5, 3, 0]


@pytest.mark.parametrize("budget", [10, 12, 13, 20, 21, 32, 100])
@pytest.mark.parametrize("name", ["padded", "packed", "shared"])
def test_micro_batches_by_tokens(budget, name):
    """Each within the budget, every row once, no more of them than filling greedily needs, about as large as each other."""
    sizes = replace(SOME, layout=Layout(name))
    order = sizes.ordered(range(6))
    found = minibatches.split(order, sizes.tokens, config(micro_batch_size=256, micro_batch_tokens=budget))
    assert [i for rows in found for i in rows] == order
    costs = [sizes.tokens(rows) for rows in found]
    assert max(costs) <= budget
    assert len(found) == len(minibatches.filled(order, sizes.tokens, budget))
    least = [len(minibatches.filled(order, sizes.tokens, smaller)) for smaller in range(10, max(costs))]
    assert all(count > len(found) for count in least)  # a smaller largest one would need more of them


def test_one_beyond_the_budget_is_alone():
    assert minibatches.filled([0, 4, 1], SOME.tokens, 6) == [[0], [4], [1]]
    assert minibatches.filled([], SOME.tokens, 6) == []


def test_dead_rows_reach_no_forward_and_every_process_has_as_many():
    settings, live = config(num_minibatches=1, micro_batch_size=2), [True, False, True, True, False, False]
    padded = replace(SOME, layout=Layout())
    (turn,) = minibatches.turns_of(process(), [range(6)], live, padded, settings)
    assert (turn.rows, turn.micro, turn.live) == (range(6), [[0, 2], [3]], True)
    other = process()
    other.across = lambda x, how: x + 2  # another process has two more
    (turn,) = minibatches.turns_of(other, [range(6)], live, padded, settings)
    assert turn.micro == [[0, 2], [3], [], []]
    (none,) = minibatches.turns_of(process(), [range(6)], [False] * 6, padded, settings)
    assert not none.live
    assert forwards([turn, none]) == [[0, 2], [3], [], []]
    (alone,) = minibatches.turns_of(other, [range(6)], [False] * 6, padded, settings)
    assert (alone.micro, alone.live) == ([[], []], True)  # takes part in what the other calls


def test_a_balanced_deal():
    assert balanced([5, 4, 3, 3, 3], 2) == [[0, 3], [1, 2, 4]]
    assert balanced([1, 1], 2) == [[0], [1]]
    assert balanced([9, 0, 0, 0], 2) == [[0], [1, 2, 3]]


@pytest.mark.parametrize(("M", "G"), [(1, 3), (2, 3), (1, 1), (3, 2)])
def test_exchanged_rows_are_all_there_once_and_about_even(M, G):
    settings = config(num_minibatches=M, prompts_per_step=12)
    count = 12 * G // 2  # of each of two processes
    tokens = [torch.randint(1, 50, (count,), generator=torch.Generator().manual_seed(rank)).tolist() for rank in (0, 1)]
    every = [*tokens[0], *tokens[1]]
    found = []
    for rank in (0, 1):
        engine = process(rank, 2)
        engine.gather = lambda rows: every
        found.append(minibatches.exchanged(engine, tokens[rank], G, settings))
    assert sorted([*found[0][0], *found[1][0]]) == list(range(2 * count))
    assert sorted([*found[0][1], *found[1][1]]) == list(range(12 * G // M))
    sums = [sum(every[i] for i in rows) for rows, _ in found]
    assert abs(sums[0] - sums[1]) <= 50 * G * M
    for rows, columns in found:  # row m, column c of the table, wherever it was sampled
        C = count // M
        where = {(i // count, i % count // C, i % count % C) for i in rows}
        assert where == {(c // C, m, c % C) for m in range(M) for c in columns}
    for turn in range(2):  # what an update of one process takes
        whole = deal_columns(range(12 * G // M), 12 * G // M, settings, 1, 2)[turn]
        assert len(whole) == 12 * G // M
        parts = [(columns, deal_columns(columns, 12 * G // M, settings, 1, 2)[turn]) for _, columns in found]
        taken = [(i // len(columns), columns[i % len(columns)]) for columns, rows in parts for i in rows]
        assert sorted(taken) == sorted((i // (12 * G // M), i % (12 * G // M)) for i in whole)

"""Which rows go into which update, in one process and in several."""

from types import SimpleNamespace
from typing import Any

import pytest

from fused_rlhf.trainers.minibatches import chunks, columns_of, everyones, own_prompts
from fused_rlhf.trainers.minibatches import deal as deal_columns
from fused_rlhf.trainers.rollout_config import RolloutConfig


def process(rank=0, world=1) -> Any:
    def mine(rows):
        share = len(rows) // world
        return rows[rank * share : (rank + 1) * share]

    return SimpleNamespace(rank=rank, world=world, mine=mine, gather=list)


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

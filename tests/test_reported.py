"""Sets of many completions against nested lists of them."""

import torch

from fused_rlhf.trainers.reported import ReportedSets, TokenSets

SETS = [[[4, 2], [7]], [[1, 2, 3], [5], [9, 8]], [], [[6]]]
STARTS = [3, 1, 2, 4]  # the tokens of the prompts
LENGTH = 6


def token_sets(row):
    ids = [i for kept in row for i in kept]
    return TokenSets(torch.tensor(ids, dtype=torch.int32), torch.tensor([len(kept) for kept in row], dtype=torch.int64))


def reported(sets=SETS, starts=STARTS, length=LENGTH):
    return ReportedSets.of([token_sets(row) for row in sets], starts, length)


def mask_of(sets=SETS, starts=STARTS, length=LENGTH):
    mask = torch.zeros(len(sets), length - 1, dtype=torch.bool)
    for row, kept in enumerate(sets):
        mask[row, starts[row] - 1 : starts[row] - 1 + len(kept)] = True
    return mask


def listed(some, mask):
    """What the op is given, token by token."""
    ids, offsets = some.within(mask)
    assert offsets[-1] == len(ids)
    return [part.tolist() for part in ids.split(offsets.diff().tolist())]


def flat(rows):
    return [kept for row in rows for kept in SETS[row]]


def test_the_tokens_of_a_mask_keep_their_sets():
    some, mask = reported(), mask_of()
    assert some.ids.dtype == torch.int32
    assert listed(some, mask) == flat(range(4))
    mask[1] = False
    assert listed(some, mask) == flat([0, 2, 3])
    mask[0, 2] = False  # the first token of the first completion
    assert listed(some, mask) == [[7], [6]]
    assert listed(some, torch.zeros_like(mask)) == []


def test_some_rows_in_any_order_and_cut_to_the_longest():
    some, mask = reported(), mask_of()
    for rows in ([3, 0, 1], [2], [1, 1], range(1)):
        width = max(STARTS[row] + len(SETS[row]) for row in rows) - 1
        picked = some.pick(rows, width)
        assert picked.counts.shape == (len(rows), width)
        assert listed(picked, mask[rows, :width]) == flat(rows)


def test_rows_of_several_together():
    some, mask = reported(), mask_of()
    narrow = some.pick([1], 3).to("cpu")
    both = ReportedSets.joined([narrow, some])
    wide = torch.cat([torch.nn.functional.pad(mask[1:2, :3], (0, LENGTH - 4)), mask])
    assert listed(both, wide) == flat([1, 0, 1, 2, 3])


def test_the_first_tokens_of_a_completion():
    first = token_sets(SETS[1]).first(2)
    assert first.ids.tolist() == [1, 2, 3, 5]
    assert first.counts.tolist() == [3, 1]
    assert len(token_sets(SETS[1]).first(0).ids) == 0

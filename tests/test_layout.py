"""Sequences in rows: where each token lies."""

import torch

from fused_rlhf.trainers.attention import Group
from fused_rlhf.trainers.layout import Layout, lay, tokens_in

IDS = torch.tensor([[1, 2, 3, 4, 5], [7, 8, 0, 0, 0], [1, 2, 3, 6, 0], [1, 2, 9, 9, 0]])
LENGTHS, PROMPTS = [5, 2, 4, 4], [3, 1, 3, 2]


def test_packed_sequences_lie_end_to_end():
    row = lay(IDS, LENGTHS, None)
    assert row.input_ids.tolist() == [[1, 2, 3, 4, 5, 7, 8, 1, 2, 3, 6, 1, 2, 9, 9]]
    assert row.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3, 0, 1, 2, 3]]
    assert row.groups == [Group(5), Group(2), Group(4), Group(4)]
    assert row.places[2, :4].tolist() == [7, 8, 9, 10]


def test_a_prompt_that_several_begin_with_lies_there_once():
    row = lay(IDS, LENGTHS, PROMPTS)
    # The last one begins alike, but its prompt is another.
    assert row.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 9, 9]]
    assert row.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 0, 1, 2, 3]]
    assert row.groups == [Group(3, (2, 1)), Group(2), Group(4)]
    for i, length in enumerate(LENGTHS):
        where = row.places[i, :length]
        assert row.input_ids[0, where].tolist() == IDS[i, :length].tolist()
        assert row.position_ids[0, where].tolist() == list(range(length))


def test_how_many_tokens_a_layout_has():
    prompts = [tuple(ids[:size]) for ids, size in zip(IDS.tolist(), PROMPTS, strict=True)]
    counts = {Layout("padded"): 20, Layout("packed"): 15, Layout("shared"): 12}
    assert {layout: tokens_in(LENGTHS, prompts, PROMPTS, layout) for layout in counts} == counts


def test_what_a_layout_is_called():
    assert Layout().in_words() == "padded rows, whose prompts and padding skip the head"
    assert "without a mask" in Layout(masked=False).in_words()
    assert Layout("packed", why="shared: X: y").in_words().endswith("(shared: X: y)")

"""Pictures whose questions must be answered by looking."""

from collections import Counter

import numpy as np
import pytest

from fused_rlhf.trainers import data, pair_rows, shapes
from fused_rlhf.trainers.pictures import read


def shown(picture):
    """Colour and number of the squares, by looking."""
    pixels = np.asarray(picture).astype(int)
    coloured = pixels.max(-1) - pixels.min(-1) > 80
    cells = shapes.SIZE // shapes.CELLS
    count = sum(
        coloured[i : i + cells, j : j + cells].any()
        for i in range(0, shapes.SIZE, cells)
        for j in range(0, shapes.SIZE, cells)
    )
    mean = pixels[coloured].mean(0)
    colour = min(shapes.COLOURS, key=lambda name: np.abs(mean - np.array(shapes.COLOURS[name])).sum())
    return {"colour?": colour, "how many?": str(count)}


def test_answers_are_what_the_pictures_show():
    for sample in shapes.samples(100, seed=0):
        (picture,) = sample["images"]
        assert shown(picture)[sample["prompt"]] == sample["answer"]
    for pair in shapes.pairs(50, seed=1):
        (picture,) = pair["images"]
        assert shown(picture)[pair["prompt"]] == pair["chosen"] != pair["rejected"]
        assert pair["rejected"] in shapes.QUESTIONS[pair["prompt"]]


def test_nobody_is_right_without_looking():
    found = Counter((sample["prompt"], sample["answer"]) for sample in shapes.samples(4000, seed=0))
    for question, answers in shapes.QUESTIONS.items():
        total = sum(found[question, answer] for answer in answers)
        assert max(found[question, answer] for answer in answers) / total == pytest.approx(0.25, abs=0.03)


def test_the_splits_share_no_picture_and_are_the_same_for_a_seed():
    task = data.looking(seed=3, num_train=200, num_test=100)
    digests = [[read(sample["images"][0], "").digest for sample in split] for split in (task.train, task.test)]
    assert len({*digests[0], *digests[1]}) == 300
    again = data.looking(seed=3, num_train=200, num_test=100)
    assert [read(sample["images"][0], "").digest for sample in again.train] == digests[0]
    found = pair_rows.looking(seed=3, num_train=50, num_test=20)
    assert (len(found.train), len(found.test)) == (50, 20)

"""What an external sampler may give."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fused_rlhf.trainers.inputs import Encoded
from fused_rlhf.trainers.pictures import read
from fused_rlhf.trainers.sampler import Sampler, SamplerError, ask

PROMPTS = [Encoded([1, 2], text="a"), Encoded([3], text="b")]


def giving(found: Any) -> Sampler:
    return lambda prompts: found


def test_completions_and_their_logprobs_in_any_container():
    want: Any = [[4, 5], [6]], [[-0.5, -1.0], [0.0]]
    containers: list[Any] = [
        want,
        ([torch.tensor([4, 5]), torch.tensor([6])], [torch.tensor([-0.5, -1.0]), torch.tensor([0.0])]),
        [[np.array([4, 5]), (6,)], [np.array([-0.5, -1.0]), [0]]],
    ]
    for found in containers:
        assert ask(giving(found), PROMPTS, 10) == (*want, None)
    assert ask(lambda prompts: (prompts, None), PROMPTS, 10) == ([[1, 2], [3]], None, None)
    assert ask(lambda prompts: (prompts, None, None), PROMPTS, 10) == ([[1, 2], [3]], None, None)


def test_kept_sets_in_any_container():
    containers: list[Any] = [
        [[[4, 9], [5]], [[0, 7, 6]]],
        (((4, 9), (5,)), ((0, 7, 6),)),
        [[np.array([4, 9], dtype=np.uint16), torch.tensor([5])], [torch.tensor([0, 7, 6], dtype=torch.int32)]],
        [[[4, 9], [5]], np.array([[0, 7, 6]])],
    ]
    for kept in containers:
        found = ask(giving(([[4, 5], [6]], None, kept)), PROMPTS, 10)[2]
        assert found is not None
        assert [(sets.ids.tolist(), sets.counts.tolist()) for sets in found] == [([4, 9, 5], [2, 1]), ([0, 7, 6], [3])]
    nothing = ask(giving(([[], [6]], None, [[], [[6]]])), PROMPTS, 10)[2]
    assert nothing is not None
    assert (len(nothing[0].ids), len(nothing[0].counts)) == (0, 0)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (None, "returned a NoneType, expected completions and their log-probs, and maybe kept sets"),
        (([[4]], None), "returned 1 completions, expected 2, one for each prompt"),
        ((3, None), "returned int, expected 2 completions"),
        (([[4], ["a"]], None), r"completion 1: expected a list of ids, got \['a'\]"),
        (([[4], None], None), "completion 1: expected a list of ids, got None"),
        (([[4], [10]], None), "completion 1: expected ids below 10, got 10"),
        (([[4], [-1]], None), "completion 1: expected ids below 10, got -1"),
        (([[4], [5]], [[-1.0]]), "returned 1 lists of log-probs, expected 2"),
        (([[4], [5]], [[-1.0], None]), "completion 1: expected one log-prob for each of its 1 tokens, got None"),
        (([[4], [5]], [[-1.0], [None]]), r"completion 1: expected one log-prob for each of its 1 tokens, got \[None\]"),
        (([[4], [5, 6]], [[-1.0], [-1.0]]), "completion 1: 1 log-probs for its 2 tokens"),
        (([[4], [5]], [[-1.0], [float("nan")]]), "completion 1: expected log-probs of at most 0, got nan"),
        (([[4], [5]], [[-1.0], [-float("inf")]]), "completion 1: expected log-probs of at most 0, got -inf"),
        (([[4], [5]], [[-1.0], [0.7]]), r"completion 1: expected log-probs of at most 0, got 0\.7"),
        (([[4]],), "returned a tuple of 1, expected completions and their log-probs, and maybe kept sets"),
        (([[4], [5]], None, [[[4]]]), "returned 1 lists of kept sets, expected 2"),
        (([[4], [5]], None, 3), "returned int, expected 2 lists of kept sets"),
        (([[4], [5, 6]], None, [[[4]], [[5]]]), "completion 1: 1 kept sets for its 2 tokens"),
        (([[4], [5]], None, [[[4]], None]), "completion 1: expected one kept set for each of its 1 tokens, got None"),
        (([[4], [5]], None, [[[4]], [None]]), "completion 1, token 0: expected a list of the ids kept, got None"),
        (([[4], [5, 6]], None, [[[4]], [[5], 6]]), "completion 1, token 1: expected a list of the ids kept, got 6"),
        (([[4], [5]], None, [[[4]], [[5.0]]]), r"completion 1, token 0: expected a list of the ids kept, got \[5\.0\]"),
        (([[4], [5]], None, [[[4]], [["5"]]]), "completion 1, token 0: expected a list of the ids kept"),
        (([[4], [5]], None, [[[4]], [[True]]]), "completion 1, token 0: expected a list of the ids kept"),
        (([[4], [5]], None, [[[4]], [[[5], [5, 6]]]]), "completion 1, token 0: expected a list of the ids kept"),
        (
            ([[4], [5, 6]], None, [[[4]], [[5], []]]),
            "completion 1, token 1: expected its id among those kept, got none",
        ),
        (
            ([[4], [5, 6]], None, [[[4]], [[6, 5], [5, 7]]]),
            r"completion 1, token 1: expected its id 6 among those kept, got \[5, 7\]",
        ),
        (([[4], [5]], None, [[[4]], [[5, 10]]]), "completion 1, token 0: expected kept ids below 10, got 10"),
        (([[4], [5]], None, [[[4]], [[-1, 5]]]), "completion 1, token 0: expected kept ids below 10, got -1"),
        (
            ([[4], [5]], None, [[[4]], [[2**40, 5]]]),
            "completion 1, token 0: expected kept ids below 10, got 1099511627776",
        ),
    ],
)
def test_anything_else_is_refused_by_completion(found, words):
    with pytest.raises(SamplerError, match=words):
        ask(giving(found), PROMPTS, 10)


def test_what_it_raises_is_told():
    def broken(prompts):
        raise ConnectionError("no engine")

    with pytest.raises(SamplerError, match="the sampler raised ConnectionError: no engine"):
        ask(broken, PROMPTS, 10)


def test_images_and_texts_go_to_those_that_take_them():
    seen = []

    def looks(prompts, images):
        seen.append(images)
        return prompts, None

    def reads(prompts, **more):
        seen.append(more)
        return prompts, None, None

    picture = read(Image.new("RGB", (3, 2), "red"), "")
    prompts = [Encoded([1], text="<image>what?", pictures=(picture,)), PROMPTS[1]]
    ask(looks, prompts, 10)
    ask(reads, prompts, 10)
    for images in (seen[0], seen[1]["images"]):
        assert [[one.getpixel((0, 0)) for one in row] for row in images] == [[(255, 0, 0)], []]
    assert seen[1]["texts"] == ["<image>what?", "b"]

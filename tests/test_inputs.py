"""Texts and pictures as token ids and tensors, against what processors make of them by themselves."""

import pytest
import torch

from fused_rlhf.bench.picture_rows import picture
from fused_rlhf.trainers import inputs
from fused_rlhf.trainers import model as models
from fused_rlhf.trainers.conversation import encode
from fused_rlhf.trainers.inputs import ProcessorError
from fused_rlhf.trainers.pictures import read
from tests.vision_families import FAMILIES

SIX = ("qwen2.5-vl", "llava-onevision", "gemma3", "idefics3", "pixtral", "mllama")


@pytest.fixture(scope="module", params=SIX)
def family(request):
    return FAMILIES[request.param]()


def some_pictures(count):
    return [picture(60 * i, *size) for i, size in zip(range(count), ((40, 28), (28, 56), (64, 32)))]


def asking(found, text="what?"):
    parts = [{"type": "image", "image": one} for one in found] + [{"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_a_conversation_is_what_the_processor_makes_of_it(family, count):
    _, processor = family
    messages = asking(some_pictures(count))
    want = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    got = encode(processor.tokenizer, processor, {"prompt": messages})
    assert got.ids == want["input_ids"][0].tolist()
    assert set(got.extras) == (set(want) - {"input_ids", "attention_mask", "labels"} if count else set())
    for name, x in got.extras.items():
        assert torch.equal(x, want[name]), name
    counted = encode(processor.tokenizer, processor, {"prompt": messages}, load=False)
    assert counted.length == got.length == len(got.ids)
    assert counted.extras == {}


def test_places_are_found_by_trial(family):
    _, processor = family
    places = inputs.places(processor)
    for count in range(4):
        ids = inputs.bare(processor.tokenizer, inputs.probe(processor, count))
        assert places.count(ids) == count
    assert set(places.counts) <= places.shown
    assert processor.tokenizer.eos_token_id not in places.shown


def test_a_model_without_a_processor_refuses_pictures():
    with pytest.raises(ValueError, match=r"images: the model takes none, but there are 1 with the text '1\+1='"):
        inputs.encode(models.char_tokenizer(), None, "1+1=", [read(picture(0), "")])


def test_what_a_processor_does_not_take_is_told_in_its_words(family):
    _, processor = family
    with pytest.raises(ProcessorError, match="the processor takes no such text and pictures: "):
        inputs.processed(processor, "no place", ["no picture"])


def test_what_is_cut_from_the_end_takes_aligned_entries_along():
    row = inputs.Encoded([1, 2, 3, 4], {"types": torch.tensor([[0, 1, 1, 0]]), "pixels": torch.ones(3, 5)}, 1)
    got = row.without_last(2)
    assert got.ids == [1, 2]
    assert got.extras["types"].tolist() == [[0, 1]]
    assert got.extras["pixels"].shape == (3, 5)
    assert (row.prompt, row.mask, got.completion) == ([1, 2, 3], [False, False, False, True], 0)

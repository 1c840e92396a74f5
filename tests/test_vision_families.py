"""The models of vision_families.py read their pictures and write text of what they have seen."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from fused_rlhf.bench.picture_rows import picture
from tests.vision_families import FAMILIES

CHAT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]


def inputs(processor: Any, *pictures: Any) -> dict[str, Any]:
    prompt = processor.apply_chat_template(CHAT, add_generation_prompt=True)
    made = dict(processor(text=[prompt], images=[list(pictures)], return_tensors="pt"))
    made.pop("labels", None)
    return made


def test_twenty() -> None:
    assert len(FAMILIES) == 20


@pytest.mark.parametrize("name", FAMILIES)
def test_a_picture_changes_the_logits_of_the_text_after_it(name: str) -> None:
    model, processor = FAMILIES[name]()
    logits = []
    for shade in (10, 200):
        with torch.no_grad():
            logits.append(model(**inputs(processor, picture(shade, 24, 16))).logits)
    assert logits[0].isfinite().all()
    assert (logits[0] - logits[1])[0, -1].abs().max() > 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_small_and_its_tokens_are_set(name: str) -> None:
    model: Any
    model, processor = FAMILIES[name]()
    tokens, config = processor.tokenizer, model.config.get_text_config()
    assert 1 <= (inputs(processor, picture(10, 24, 16))["input_ids"] == model.config.image_token_id).sum() <= 64
    assert config.max_position_embeddings >= 512
    assert model.get_input_embeddings().num_embeddings >= len(tokens)
    ends = model.generation_config.eos_token_id
    assert tokens.eos_token_id == config.eos_token_id
    assert tokens.eos_token_id in (ends if isinstance(ends, list) else [ends])
    assert tokens.pad_token_id == config.pad_token_id == model.generation_config.pad_token_id is not None


@pytest.mark.parametrize("name", ["qwen2.5-vl", "llava-onevision", "internvl", "idefics3", "pixtral", "mllama"])
def test_a_processor_is_saved_whole(name: str, tmp_path: Path) -> None:
    _, processor = FAMILIES[name]()
    processor.save_pretrained(tmp_path)
    again = type(processor).from_pretrained(tmp_path)
    first, second = (inputs(kind, picture(10, 24, 16)) for kind in (processor, again))
    assert list(first) == list(second)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_models_of_a_family_are_the_same() -> None:
    first, second = (FAMILIES["gemma3"]()[0].state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)

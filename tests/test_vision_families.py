"""The models of vision_families.py read their pictures and write text of what they have seen."""

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from tests.vision_families import FAMILIES, picture

CHAT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]


def inputs(processor: Any, *pictures: Any) -> dict[str, Any]:
    prompt = processor.apply_chat_template(CHAT, add_generation_prompt=True)
    made = dict(processor(text=[prompt], images=list(pictures), return_tensors="pt"))
    made.pop("labels", None)
    return made


@pytest.mark.parametrize("name", FAMILIES)
def test_a_picture_changes_the_logits_of_the_text_after_it(name: str) -> None:
    model, processor = FAMILIES[name]()
    logits = []
    for shade in (10, 200):
        with torch.no_grad():
            logits.append(model(**inputs(processor, picture(shade, 24, 16))).logits)
    assert logits[0].isfinite().all()
    assert (logits[0] - logits[1])[0, -1].abs().max() > 1e-4

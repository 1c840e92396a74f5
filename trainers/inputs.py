"""Texts and images as what a model takes: token ids, and whatever else its processor makes of the images.

A text is encoded alone, so that rows can be put together, cut and sent around freely; `collate` puts what belongs to
them beside the padded ids: what is aligned with the tokens is padded like them, the rest (patches, image sizes) is
concatenated in the order of the rows.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin

Message = dict[str, Any]


@dataclass(frozen=True)
class Encoded:
    """One text, with its images."""

    ids: list[int]
    extras: dict[str, Tensor] = field(default_factory=dict)  # pixel_values (patches, D), image_grid_thw (images, 3) ...


def encode(
    tokenizer: PreTrainedTokenizerBase, processor: ProcessorMixin | None, text: str, images: Sequence[Any] = ()
) -> Encoded:
    """A text that is already in the model's own form, placeholders of its images included.

    Raises ValueError where there are images and no processor.
    """
    if not images:
        return Encoded(list(tokenizer(text)["input_ids"]))
    if processor is None:
        raise ValueError(f"images: the model takes none, but there are {len(images)} with the text {text[:60]!r}")
    made = dict(processor(text=[text], images=[load_image(image) for image in images], return_tensors="pt"))
    ids = made.pop("input_ids")[0].tolist()
    made.pop("attention_mask", None)
    return Encoded(ids, {name: value for name, value in made.items() if isinstance(value, Tensor)})


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    processor: ProcessorMixin | None,
    sample: Mapping[str, Any],
    chat_template: bool = False,
) -> Encoded:
    """The `prompt` of a sample, a text or a list of messages, with its `images` (or `image`)."""
    prompt, images = sample["prompt"], images_of(sample)
    if isinstance(prompt, str) and not chat_template:
        return encode(tokenizer, processor, prompt, images)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return encode(tokenizer, processor, render(processor or tokenizer, with_images(messages, len(images))), images)


def render(renderer: Any, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
    """Messages as one text by the chat template of a tokenizer or processor, up to where the assistant's answer begins.

    Raises ValueError where there is no chat template.
    """
    if not renderer.chat_template:
        raise ValueError("chat_template: expected a tokenizer that has one; this one has none")
    text = str(
        renderer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=add_generation_prompt)
    )
    tokenizer = renderer.tokenizer if isinstance(renderer, ProcessorMixin) else renderer
    return text.removeprefix(tokenizer.bos_token or "")  # tokenising the text adds it anyhow


def with_images(messages: Sequence[Message], count: int) -> list[Message]:
    """Messages whose parts say where their `count` images are: before the first user's text where none says so."""
    parts = [part for m in messages if not isinstance(m["content"], str) for part in m["content"]]
    if count == 0 or any(part["type"] == "image" for part in parts):
        return list(messages)
    first = next((i for i, message in enumerate(messages) if message["role"] == "user"), 0)
    content = messages[first]["content"]
    texts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
    with_parts = {**messages[first], "content": [{"type": "image"}] * count + texts}
    return [with_parts if i == first else message for i, message in enumerate(messages)]


def images_of(sample: Mapping[str, Any]) -> list[Any]:
    images = sample.get("images", sample.get("image"))
    if images is None:
        return []
    return list(images) if isinstance(images, (list, tuple)) else [images]


def load_image(image: Any) -> Any:
    """A PIL image of one, of a path, or of a data set's `{"bytes": ...}` or `{"path": ...}`.

    Raises ValueError for anything else.
    """
    from PIL import Image  # only those who have images need it

    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if isinstance(image, Mapping):
        image = io.BytesIO(image["bytes"]) if image.get("bytes") else image.get("path")
    if not isinstance(image, (str, Path, io.BytesIO)):
        raise ValueError(f"images: expected an image, a path or its bytes, got a {type(image).__name__}")
    return Image.open(image).convert("RGB")


def collate(extras: Sequence[dict[str, Tensor]], length: int, left: bool = False) -> dict[str, Any]:
    """What belongs to rows of ids padded to `length`, on the right or on the left."""
    made: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for row in extras for name in row):
        if name.endswith("token_type_ids"):  # (1, P) each, aligned with the tokens; 0 is text
            rows = torch.zeros(len(extras), length, dtype=torch.int64)
            for i, row in enumerate(extras):
                if name in row:
                    P = row[name].shape[1]
                    rows[i, slice(length - P, length) if left else slice(0, P)] = row[name][0]
            made[name] = rows
        else:
            made[name] = torch.cat([row[name] for row in extras if name in row])
    return made

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
    """A prompt, maybe with what follows it, and its images."""

    ids: list[int]
    extras: dict[str, Tensor] = field(default_factory=dict)  # pixel_values (patches, D), image_grid_thw (images, 3) ...
    completion: int = 0  # tokens at the end that are the completion's

    @property
    def mask(self) -> list[bool]:
        """True at the completion's tokens."""
        return [i >= len(self.ids) - self.completion for i in range(len(self.ids))]

    @property
    def prompt(self) -> list[int]:
        return self.ids[: len(self.ids) - self.completion]

    def without_last(self, count: int) -> Encoded:
        """The same without its last `count` tokens."""
        length = len(self.ids) - count
        extras = {k: x[:, :length] if k.endswith("token_type_ids") else x for k, x in self.extras.items()}
        return Encoded(self.ids[:length], extras, max(self.completion - count, 0))


def bare(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a text and of nothing else."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode(
    tokenizer: PreTrainedTokenizerBase,
    processor: ProcessorMixin | None,
    text: str,
    images: Sequence[Any] = (),
    chat: bool = False,
) -> Encoded:
    """A text that is already in the model's own form, placeholders of its images included.

    It begins as the tokenizer begins texts, once, and is left open at its end, where the tokenizer might add EOS. What a
    chat template made (`chat`) has all its tokens already.

    Raises ValueError where there are images and no processor.
    """
    ids = bare(tokenizer, text)
    before, after = ([], 0) if chat else _added(tokenizer, text, ids)
    if ids[: len(before)] == before:
        before = []
    if not images:
        return Encoded(before + ids)
    if processor is None:
        raise ValueError(f"images: the model takes none, but there are {len(images)} with the text {text[:60]!r}")
    loaded = [load_image(image) for image in images]
    made = dict(processor(text=[text], images=loaded, return_tensors="pt", add_special_tokens=bool(before)))
    found = made.pop("input_ids")[0].tolist()
    made.pop("attention_mask", None)
    tensors = {name: value for name, value in made.items() if isinstance(value, Tensor)}
    return Encoded(found, tensors).without_last(after if before else 0)


def _added(tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int]) -> tuple[list[int], int]:
    """The ids that the tokenizer puts before a text by itself, and how many it puts behind it."""
    whole = list(tokenizer(text)["input_ids"])
    count = len(whole) - len(ids)
    at = next((i for i in range(count + 1) if whole[i : i + len(ids)] == ids), 0)
    return whole[:at], max(count - at, 0)


def with_images(messages: Sequence[Message], count: int) -> list[Message]:
    """Messages whose parts say where their `count` images are: before the first user's text where none says so."""
    parts = [part for m in messages if isinstance(m.get("content"), list) for part in m["content"]]
    if count == 0 or any(part["type"] == "image" for part in parts):
        return list(messages)
    first = next((i for i, message in enumerate(messages) if message["role"] == "user"), 0)
    content = messages[first].get("content", "")
    texts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
    with_parts = {**messages[first], "content": [{"type": "image"}] * count + texts}
    return [with_parts if i == first else message for i, message in enumerate(messages)]


def images_of(sample: Mapping[str, Any]) -> list[Any]:
    """Of the column images, or image where that holds none."""
    for value in (sample.get("images"), sample.get("image")):
        images = list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]
        if images:
            return images
    return []


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

"""Texts and pictures as what a model takes: token ids, and whatever else its processor makes of the pictures.

A text is encoded alone, so that rows can be put together, cut and sent around freely; `collation` puts what belongs to
their pictures beside the padded ids.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from fused_rlhf.trainers.pictures import Picture, blank

LABELS = "labels"  # of transformers' own loss, which some processors make


class ProcessorError(ValueError):
    """A processor does not take a text with these pictures."""


@dataclass(frozen=True)
class Encoded:
    """A prompt, maybe with what follows it, and its pictures."""

    ids: list[int]
    extras: dict[str, Tensor] = field(default_factory=dict)  # pixel_values, image_grid_thw ..., of the prompt
    completion: int = 0  # tokens at the end that are the completion's
    unloaded: int = 0  # tokens that `ids` has too few of while pictures are not loaded
    text: str = ""  # of the prompt, with a place for each picture
    pictures: tuple[Picture, ...] = ()

    @property
    def mask(self) -> list[bool]:
        """True at the completion's tokens."""
        return [i >= len(self.ids) - self.completion for i in range(len(self.ids))]

    @property
    def prompt(self) -> list[int]:
        return self.ids[: len(self.ids) - self.completion]

    @property
    def length(self) -> int:
        """Tokens, those of all pictures included."""
        return len(self.ids) + self.unloaded

    def without_last(self, count: int) -> Encoded:
        """The same without its last `count` tokens."""
        length = len(self.ids) - count
        extras = {
            name: x.narrow(1, 0, length) if x.dim() > 1 and x.shape[1] == len(self.ids) else x
            for name, x in self.extras.items()
        }
        return replace(self, ids=self.ids[:length], extras=extras, completion=max(self.completion - count, 0))


def common_start(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many items two sequences have in common from their beginnings on."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def bare(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a text and of nothing else."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode(
    tokenizer: PreTrainedTokenizerBase,
    processor: ProcessorMixin | None,
    text: str,
    pictures: Sequence[Picture] = (),
    *,
    chat: bool = False,
    load: bool = True,
) -> Encoded:
    """A text that is already in the model's own form, with a place for each picture.

    It begins as the tokenizer begins texts, once, and is left open at its end, where the tokenizer might add EOS. What a
    tokenizer's chat template made has all its tokens already; what a processor's made begins like a text, as with
    `processor.apply_chat_template`.

    Args:
        load: false leaves each picture the one token that stands for it, and counts the others.

    Raises ValueError where there are pictures and no processor, ProcessorError where it takes no such text and pictures.
    """
    ids = bare(tokenizer, text)
    before, after = ([], 0) if chat and processor is None else _added(tokenizer, text, ids)
    if ids[: len(before)] == before:
        before = []
    if not pictures:
        return Encoded(before + ids, text=text)
    if processor is None:
        raise ValueError(f"images: the model takes none, but there are {len(pictures)} with the text {text[:60]!r}")
    shown: dict[str, Any] = {"text": text, "pictures": tuple(pictures)}
    if not load:
        return Encoded(
            before + ids, unloaded=_beyond(processor, bool(before), tuple(p.size for p in pictures)), **shown
        )
    found, extras = processed(processor, text, [picture.load() for picture in pictures], bool(before))
    return Encoded(found, extras, **shown).without_last(after if before else 0)


def processed(
    processor: Any, text: str, images: Sequence[Any], special: bool = False
) -> tuple[list[int], dict[str, Tensor]]:
    """Ids, and what else a processor makes of a text with images. Raises ProcessorError in its words."""
    try:
        made = dict(processor(text=[text], images=[list(images)], return_tensors="pt", add_special_tokens=special))
    except Exception as error:  # each processor has errors of its own
        raise ProcessorError(f"the processor takes no such text and pictures: {error}") from error
    extras = {name: x for name, x in made.items() if isinstance(x, Tensor)}
    ids = extras.pop("input_ids")[0].tolist()
    for name in ("attention_mask", LABELS):
        extras.pop(name, None)
    return ids, extras


def _added(tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int]) -> tuple[list[int], int]:
    """The ids that the tokenizer puts before a text by itself, and how many it puts behind it."""
    whole = list(tokenizer(text)["input_ids"])
    count = len(whole) - len(ids)
    at = next((i for i in range(count + 1) if whole[i : i + len(ids)] == ids), 0)
    return whole[:at], max(count - at, 0)


# ------------------------------------------------------------------------------------------------------------- places


@dataclass(frozen=True)
class Places:
    """How a processor's texts say where pictures are; found by trying texts with and without them."""

    text: str  # what stands for one picture
    counts: dict[int, int]  # special tokens in it, and how often each occurs
    shown: frozenset[int]  # special tokens that a processor makes of pictures, these included

    def count(self, ids: Sequence[int]) -> int | None:
        """How many pictures some ids have a place for; None where the places are not whole."""
        found = {ids.count(token) / times for token, times in self.counts.items()}
        count = found.pop() if len(found) == 1 else None
        return int(count) if count is not None and count == int(count) else None


PROBE = "probe"
SIZE = (40, 28)


def probe(processor: Any, count: int, text: str = PROBE) -> str:
    """A text with places for so many pictures, in the form of the processor's chat template where it has one."""
    if not processor.chat_template:
        return f"{getattr(processor, 'image_token', '') or ''}" * count + text
    parts = [{"type": "image"}] * count + [{"type": "text", "text": text}]
    made = processor.apply_chat_template(
        [{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True
    )
    return str(made)


@functools.lru_cache(maxsize=8)
def places(processor: Any) -> Places:
    """Raises ValueError where no text with a picture can be made."""
    tokenizer = processor.tokenizer
    try:
        none, one, two = (probe(processor, count) for count in range(3))
    except Exception as error:  # a template may raise anything
        raise ValueError(f"images: the chat template takes no pictures: {error}") from error
    start = common_start(none, one)
    end = min(common_start(none[::-1], one[::-1]), len(none) - start)
    before, some, more = (bare(tokenizer, text) for text in (none, one, two))
    added = set(tokenizer.all_special_ids) | {int(token) for token in tokenizer.added_tokens_decoder}
    once = {token: some.count(token) for token in dict.fromkeys(some) if token in added and token not in before}
    counts = {token: count for token, count in once.items() if more.count(token) == 2 * count}
    if not counts:
        raise ValueError(f"images: the chat template makes no place for a picture: {one!r}")
    ids, _ = processed(processor, one, [blank(SIZE)])
    ordinary = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id, *before}
    shown = frozenset(token for token in [*counts, *ids] if token in added and token not in ordinary)
    return Places(one[start : len(one) - end], counts, shown)


@functools.lru_cache(maxsize=4096)
def _beyond(processor: Any, special: bool, sizes: tuple[tuple[int, int], ...]) -> int:
    """Tokens that pictures of these sizes have beyond those of their places."""
    text = probe(processor, len(sizes))
    ids, _ = processed(processor, text, [blank(size) for size in sizes], special)
    tokenizer = processor.tokenizer
    return len(ids) - len(tokenizer(text, add_special_tokens=special)["input_ids"])

"""Rows with pictures in one batch: what their processor made of each, put together as the model wants it.

    extras of a row     as its processor makes them of that row alone: pixel_values, image_sizes, token_type_ids ...
    of a batch          end to end along the first dimension; others that differ are padded with 0; one as long as the row's
                        ids is padded like these, and goes on over the completion

What no shape tells is found by trial, on a few small rows, when a run begins: which entries the completion's tokens get (those
that give the logits of the model's own `generate`), and which rows may share a batch (those whose logits stay as they are).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    SuppressTokensLogitsProcessor,
)

from fused_rlhf.trainers import inputs
from fused_rlhf.trainers.adapters import base_of
from fused_rlhf.trainers.config import require
from fused_rlhf.trainers.engine import Engine
from fused_rlhf.trainers.forwards import Extras, Rows
from fused_rlhf.trainers.generation import eos_ids, only, placeholders
from fused_rlhf.trainers.inputs import Encoded, processed
from fused_rlhf.trainers.model import Loaded

if TYPE_CHECKING:
    from PIL.Image import Image

Fill = Literal["zero", "one", "last"]  # a completion's entries: 0, 1, those of the prompt's last token
Share = Literal["all", "alike", "none"]  # rows that a batch may hold: any, those of equal shapes, one

FILLS: tuple[Fill, ...] = ("zero", "last", "one")
SHARES: tuple[Share, ...] = ("all", "alike", "none")
NEW = 3  # tokens that a trial generates
SIZES = ((40, 28), (28, 56), (64, 32), (36, 44))


@dataclass
class Collator:
    """How one model and its processor put rows together; `learned` finds it."""

    aligned: frozenset[str] = frozenset()  # extras with an entry for each token, along dimension 1
    by_row: frozenset[str] = frozenset()  # extras whose first dimension counts rows
    fills: dict[str, Fill] = field(default_factory=dict)  # of the aligned ones
    typed: bool = False  # aligned ones belong to rows without pictures too
    share: Share = "all"
    spare: Encoded | None = None  # a small row with a picture
    always: bool = False  # a forward has a picture, if need be the spare's: processes must run the same modules

    def groups(self, extras: Sequence[Extras]) -> list[list[int]]:
        """The rows that may share a batch, by number."""
        if self.share == "all":
            return [list(range(len(extras)))]
        found: dict[Any, list[int]] = {}
        for i, some in enumerate(extras):
            shapes = tuple(sorted((name, self._shape(name, x)) for name, x in some.items()))
            found.setdefault(i if self.share == "none" else shapes, []).append(i)
        return list(found.values())

    def _shape(self, name: str, x: Tensor) -> tuple[int, ...]:
        return (*x.shape[:1], *x.shape[2:]) if name in self.aligned else tuple(x.shape)

    def collate(self, extras: Sequence[Extras], prompts: Sequence[int], length: int, left: bool = False) -> Extras:
        """The extras of rows whose ids are padded to `length`, on the right or on the left, `prompts` ids each that the
        extras speak of; all that follows is the completion."""
        names = dict.fromkeys(name for row in extras for name in row)
        if not names and self.typed and self.spare is not None:
            names = dict.fromkeys(name for name in self.spare.extras if name in self.aligned)
        made = {}
        for name in names:
            some = [row.get(name) for row in extras]
            if name in self.aligned:
                some = [self._along(name, x, prompt, length, left) for x, prompt in zip(some, prompts, strict=True)]
            made[name] = joined(some, name in self.by_row)
        return made

    def _along(self, name: str, x: Tensor | None, prompt: int, length: int, left: bool) -> Tensor:
        """(1, length, ...): a row's entries at its tokens, of text where there is no picture."""
        if x is None:
            assert self.spare is not None
            model = self.spare.extras[name]
            x = model.new_zeros(1, prompt, *model.shape[2:])
        room = length - x.shape[1]
        before, after = (room, 0) if left else (0, room)
        fill, last = self.fills.get(name, "zero"), x[:, -1:]
        more = last if fill == "last" else torch.full_like(last, float(fill == "one"))
        blank_entries = torch.zeros_like(last)
        return torch.cat([blank_entries.repeat_interleave(before, 1), x, more.repeat_interleave(after, 1)], dim=1)


def joined(rows: Sequence[Tensor | None], by_row: bool) -> Tensor:
    """End to end; zeros beside what is shorter in another dimension, and where a row of its own is missing."""
    there = [x for x in rows if x is not None]
    sizes = [max(x.shape[d] for x in there) for d in range(1, there[0].dim())]
    padded = []
    for x in rows:
        if x is None:
            if by_row:
                padded.append(there[0].new_zeros(1, *sizes))
            continue
        larger = x.new_zeros(len(x), *sizes)
        corner = (slice(None), *map(slice, x.shape[1:]))
        larger[corner] = x
        padded.append(larger)
    return torch.cat(padded)


# -------------------------------------------------------------------------------------------------------------- trials


def learned(model: Any, tokenizer: PreTrainedTokenizerBase, processor: ProcessorMixin, pictures: bool) -> Collator:
    """The collator of a model, by a few forwards of it; `pictures`: whether there will be any.

    Raises ValueError where the model's forward gives other logits than its `generate`.
    """
    trial = _Trial(model, tokenizer)
    found = trial.collator
    none = Encoded(inputs.encode(tokenizer, processor, inputs.probe(processor, 0, "none")).ids)
    try:
        rows = [_row(processor, *some) for some in (("a", 0), ("a b c d e", 0), ("two", 1, 2), ("other", 3))]
    except ValueError:
        if pictures:
            raise
        trial.require(trial.difference(none), "without pictures")
        return found
    one, longer, two, other = rows
    found.spare = one
    found.aligned = frozenset(
        name for name, x in one.extras.items() if _is_aligned(x, one, longer.extras[name], longer)
    )
    found.by_row = frozenset(name for name, x in one.extras.items() if len(x) == len(two.extras[name]) == 1)
    trial.fill(one)
    found.typed = trial.needs_types(none)
    text = Encoded(inputs.encode(tokenizer, processor, inputs.probe(processor, 0, "no picture")).ids)
    batches = [two, one, none, other, text], [none, text], [one, two]
    if not any(all(trial.shared(share, rows) for rows in batches) for share in SHARES):
        raise ValueError(f"model: {type(base_of(model)).__name__} gives other logits for the same row in two calls")
    return found


def _row(processor: Any, text: str, *pictures: int) -> Encoded:
    images = [_noise(SIZES[i], i) for i in pictures]
    made = inputs.probe(processor, len(images), text)
    bos = processor.tokenizer.bos_token
    return Encoded(*processed(processor, made, images, special=not (bos and made.startswith(bos))))


def _noise(size: tuple[int, int], seed: int) -> Image:
    """A picture no part of which is like another."""
    from PIL import Image as images

    width, height = size
    return images.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def _is_aligned(x: Tensor, row: Encoded, y: Tensor, other: Encoded) -> bool:
    return x.dim() > 1 and (x.shape[1], y.shape[1]) == (len(row.ids), len(other.ids))


class _Trial:
    """Compares a model's logits over whole rows, alone and together, with those of its `generate`."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.pad, self.collator = model, int(tokenizer.pad_token_id), Collator()
        self.never = [*placeholders(model), *eos_ids(model, tokenizer)]
        half = model.dtype != torch.float32 or torch.is_autocast_enabled(model.device.type)
        self.tolerance = 5e-2 if half else 1e-4  # of the largest logit
        self.rounding = self.tolerance / 10  # at least; more where more is found

    def require(self, difference: float, what: str) -> None:
        if not difference <= self.tolerance:
            raise ValueError(
                f"model: {type(base_of(self.model)).__name__} {what} gives other logits over a whole row than when it "
                f"generates (by {difference:.2g} of the largest): what it samples could not be told the probability of"
            )

    def fill(self, row: Encoded) -> None:
        """Find the completions' entries. Raises ValueError where none are right."""
        names, found = sorted(self.collator.aligned), {}
        for some in itertools.product(FILLS, repeat=len(names)):
            self.collator.fills = dict(zip(names, some, strict=True))
            found[some] = self.difference(row)
        best = min(found, key=lambda some: found[some])
        self.collator.fills = dict(zip(names, best, strict=True))
        self.require(found[best], "with pictures")
        self.rounding = max(self.rounding, found[best])

    def needs_types(self, row: Encoded) -> bool:
        """Whether a row without pictures has aligned entries too. Raises ValueError where it is wrong with both."""
        found = [self.difference(row)]
        if self.collator.aligned:
            self.collator.typed = True
            found.append(self.difference(row))
        self.require(min(found), "without pictures")
        self.rounding = max(self.rounding, min(found))
        return found[-1] < found[0] / 10

    def shared(self, share: Share, rows: Sequence[Encoded]) -> bool:
        """Whether rows that share batches so have the logits that each has alone."""
        self.collator.share = share
        tokens, want = map(torch.cat, zip(*(self.generated([row]) for row in rows), strict=True))
        worst = [self.relative(self.over_rows(rows, tokens), want)]
        for group in self.collator.groups([row.extras for row in rows]):
            own, got = self.generated([rows[i] for i in group])
            same = (own == tokens[group]).cumprod(1).bool().roll(1, 1)  # logits follow from the tokens before them
            same[:, 0] = True
            worst.append(self.relative(got[same], want[group][same]))
        return max(worst) <= 10 * self.rounding

    def difference(self, row: Encoded) -> float:
        """Of the logits over the whole row from those of `generate`, relative to the largest."""
        tokens, want = self.generated([row])
        try:
            return self.relative(self.over_rows([row], tokens), want)
        except Exception:  # what a model raises where its entries are not those that it knows
            return float("inf")

    @staticmethod
    def relative(got: Tensor, want: Tensor) -> float:
        return ((got - want).abs().max() / want.abs().max()).item()

    @torch.no_grad()
    def generated(self, rows: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
        """(B, NEW) tokens, greedily, and (B, NEW, V) the logits before them; the rows in one batch."""
        device, P = self.model.device, max(len(row.ids) for row in rows)
        room = [P - len(row.ids) for row in rows]
        ids = torch.tensor([[self.pad] * r + row.ids for r, row in zip(room, rows)], device=device)
        mask = torch.tensor([[0] * r + [1] * len(row.ids) for r, row in zip(room, rows)], device=device)
        extras = self.collator.collate([row.extras for row in rows], [len(row.ids) for row in rows], P, left=True)
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=NEW,
            pad_token_id=self.pad,
            output_logits=True,
            return_dict_in_generate=True,
        )
        with only(self.model, config):
            out = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                logits_processor=LogitsProcessorList([SuppressTokensLogitsProcessor(self.never)]),
                **{name: x.to(device) for name, x in extras.items()},
            )
        return out.sequences[:, P:], torch.stack(out.logits, dim=1).float()

    @torch.no_grad()
    def over_rows(self, rows: Sequence[Encoded], tokens: Tensor) -> Tensor:
        """(B, NEW, V) the logits before the tokens, from forwards of whole rows."""
        lengths = [len(row.ids) for row in rows]
        whole = [torch.tensor(row.ids, device=tokens.device) for row in rows]
        ids = pad_sequence([torch.cat(both) for both in zip(whole, tokens, strict=True)], True, self.pad)
        mask = torch.arange(ids.shape[1], device=ids.device) < torch.tensor(lengths, device=ids.device)[:, None] + NEW

        def call(input_ids: Tensor, attention_mask: Tensor, **extras: Tensor) -> Tensor:
            return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **extras).logits

        logits = Rows(ids, mask.long(), [row.extras for row in rows], lengths, self.collator).through(call)
        return torch.stack([of[n - 1 : n - 1 + NEW] for of, n in zip(logits, lengths, strict=True)]).float()


def ready(engine: Engine, loaded: Loaded, pictures: bool) -> Loaded:
    """A placed model's `Loaded` with its collator, where it reads pictures.

    An update without a picture takes what reads them along, as it must where another process has one.

    Raises ValueError as `learned`, and where processes cannot share a batch as the model needs it.
    """
    if loaded.processor is None:
        return loaded
    with engine.whole():
        found = learned(loaded.model, loaded.tokenizer, loaded.processor, pictures)
    found.always, engine.zero_gradients = pictures and engine.world > 1, pictures
    name = type(base_of(loaded.model)).__name__
    fits = found.share == "all" or not (engine.sharded and found.always)
    require(fits, "fsdp", True, f"false for {name} with pictures: its rows with and without cannot share a forward")
    return replace(loaded, collator=found)

"""Pairs of completions as token ids, and the batches that a step takes.

    Pair        the ids of a `pair_rows.Preference`
    PairBatch   P pairs: the P chosen sequences, then the P rejected ones in the same order

`conversation.encode` says how texts and messages become tokens. A text ends with EOS, a conversation as its chat template ends
it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from fused_rlhf.trainers import conversation, inputs
from fused_rlhf.trainers.collation import Collator
from fused_rlhf.trainers.conversation import Text
from fused_rlhf.trainers.data import Sample
from fused_rlhf.trainers.forwards import Batch, Rows
from fused_rlhf.trainers.inputs import Encoded, common_start
from fused_rlhf.trainers.layout import PADDED, Layout
from fused_rlhf.trainers.pair_rows import Preference
from fused_rlhf.trainers.pictures import Picture

if TYPE_CHECKING:
    from fused_rlhf.trainers.dpo_config import Truncate


@dataclass
class Pair:
    """Token ids of a prompt and of its two completions."""

    where: str
    text: str  # the prompt, as it is tokenised
    prompt: list[int]  # a token for each of `images` while they wait to be loaded: see `Encoder.with_images`
    chosen: list[int]
    rejected: list[int]
    images: tuple[Picture, ...] = ()
    unloaded: int = 0  # tokens that they will have beyond these
    extras: dict[str, Tensor] = field(default_factory=dict)  # what the processor makes of them
    ref: tuple[float, float] | None = None
    row: dict[str, Any] = field(default_factory=dict)  # where there are images, the prompt's row ...
    cut: int = 0  # ... of which this many last tokens are not among what both conversations begin with

    @property
    def length(self) -> int:
        """Tokens of the longer of its two sequences."""
        return len(self.prompt) + self.unloaded + max(len(self.chosen), len(self.rejected))


@dataclass(frozen=True)
class Encoder:
    """From `Preference` to `Pair`, for one model."""

    tokenizer: PreTrainedTokenizerBase
    processor: ProcessorMixin | None
    context: int | None  # the model's longest sequence
    chat_template: bool = False  # texts are a user's message and an assistant's
    max_length: int | None = None  # longest prompt with completion; None: longer than `context` is an error
    truncate: Truncate = "prompt_start"

    def pairs(self, preferences: Sequence[Preference]) -> list[Pair]:
        """All of them but those that are too long where truncate is "drop"; pictures are counted, and wait for `with_images`.

        Raises ValueError naming row and field: no chat template, images that the model does not take, a prompt or
        completion that does not fit, completions equal once tokenised or cut.
        """
        made = [self._pair(preference) for preference in preferences]
        return [pair for pair in made if self._fit(pair)]

    def with_images(self, pair: Pair) -> Pair:
        """The pair with its pictures loaded. Raises PictureError where one can no longer be read."""
        if not pair.images:
            return pair
        made = self._encode(pair.row, None, pair.where, load=True).without_last(pair.cut)
        return dataclasses.replace(pair, prompt=list(made.ids), extras=made.extras, unloaded=0)

    def _pair(self, preference: Preference) -> Pair:
        p = preference
        if p.prompt is None:
            if self.chat_template:
                raise ValueError(f"{p.where}: prompt: expected one with chat_template, got a row without")
            return self._shared(p)
        sides = (("chosen", p.chosen), ("rejected", p.rejected))
        chosen, rejected = (self._encode(p.row, completion, p.where, field=name) for name, completion in sides)
        # Some templates end a prompt as not every answer begins.
        count = min(len(chosen.prompt), len(rejected.prompt))
        prompt, first, second = chosen.ids[:count], chosen.ids[count:], rejected.ids[count:]
        text = p.prompt if isinstance(p.prompt, str) and not self.chat_template else str(self.tokenizer.decode(prompt))
        if not p.images:
            return Pair(p.where, text, prompt, first, second, ref=p.ref)
        cut, more = len(self._encode(p.row, None, p.where).ids) - count, chosen.unloaded
        return Pair(p.where, text, prompt, first, second, p.images, more, ref=p.ref, row=p.row, cut=cut)

    def _encode(
        self, row: Sample, completion: Text | None, where: str, field: str = "completion", load: bool = False
    ) -> Encoded:
        return conversation.encode(
            self.tokenizer,
            self.processor,
            row,
            completion,
            chat_template=self.chat_template,
            load=load,
            field=field,
            where=where,
        )

    def _shared(self, p: Preference) -> Pair:
        """Two texts that begin alike: the prompt is the tokens they share."""
        end = [self.tokenizer.eos_token_id]
        both = (inputs.encode(self.tokenizer, None, str(text)).ids for text in (p.chosen, p.rejected))
        chosen, rejected = (ids if ids[-1:] == end else ids + end for ids in both)
        shared = common_start(chosen, rejected)
        if shared == 0:
            raise ValueError(f"{p.where}: prompt: expected one, or a beginning that chosen and rejected share")
        text = str(self.tokenizer.decode(chosen[:shared]))
        return Pair(p.where, text, chosen[:shared], chosen[shared:], rejected[shared:], ref=p.ref)

    def _fit(self, pair: Pair) -> bool:
        """Cut a pair to its longest length, in place; -> whether it is kept. A prompt with pictures is never cut."""
        limit, completion = self.max_length or self.context, max(len(pair.chosen), len(pair.rejected))
        asked = len(pair.prompt) + pair.unloaded
        if limit and asked + completion > limit:
            if self.max_length is None:
                raise ValueError(
                    f"{pair.where}: prompt of {asked} tokens, chosen of {len(pair.chosen)}, rejected of "
                    f"{len(pair.rejected)}: beyond the model's context of {limit}; max_length cuts or drops such rows"
                )
            if self.truncate == "drop":
                return False
            if self.truncate == "prompt_start" and pair.images:
                raise ValueError(
                    f"{pair.where}: images: with them it has {asked + completion} tokens; expected at most "
                    f"max_length={limit}: truncate='drop' leaves the row out, 'completion_end' cuts its completions"
                )
            if self.truncate == "prompt_start":
                pair.prompt = self._end_of(pair.prompt, max(limit - completion, 1))
            room = limit - len(pair.prompt) - pair.unloaded
            if room < 1:
                raise ValueError(
                    f"{pair.where}: prompt of {asked} tokens: expected fewer than max_length={limit}; "
                    "truncate='prompt_start' keeps its end, 'drop' leaves the row out"
                )
            pair.chosen, pair.rejected = pair.chosen[:room], pair.rejected[:room]
        if pair.chosen == pair.rejected:
            cut = f", cut to max_length={limit}" if completion > len(pair.chosen) else ""
            raise ValueError(f"{pair.where}: chosen and rejected are equal as tokens{cut}: {pair.chosen[:8]} ...")
        for name, ids in (
            ("prompt", pair.prompt),
            ("chosen", pair.chosen),
            ("rejected", pair.rejected),
        ):
            if not ids:
                raise ValueError(f"{pair.where}: {name}: expected at least one token")
        return True

    def _end_of(self, prompt: list[int], count: int) -> list[int]:
        """The last `count` ids; BOS stays, as models are used to it."""
        first = prompt[:1] if count > 1 and prompt[0] == self.tokenizer.bos_token_id else []
        return first + prompt[len(prompt) - count + len(first) :]


# ------------------------------------------------------------------------------------------------------------- batches


@dataclass(frozen=True)
class PairBatch:
    """P pairs as S = 2 P sequences, padded on the right to T."""

    input_ids: Tensor  # (S, T) int64
    completion_mask: Tensor  # (S, T) bool
    attention_mask: Tensor  # (S, T) bool
    extras: list[dict[str, Tensor]]  # what each prompt's pictures become, on the CPU
    prompts: list[int]  # tokens of each
    ref_logprobs: Tensor | None  # (S,) summed, fp64
    num_tokens: int  # with the prompts, without padding
    collator: Collator | None = None  # of a model that reads pictures
    layout: Layout = PADDED  # of the forward

    @property
    def num_pairs(self) -> int:
        return len(self.prompts) // 2

    def to(self, device: torch.device) -> PairBatch:
        moved: dict[str, Any] = {k: x.to(device) for k, x in vars(self).items() if isinstance(x, Tensor)}
        return dataclasses.replace(self, **moved)

    def batch(self) -> Batch:
        """For a forward."""
        rows = Rows(self.input_ids, self.attention_mask, self.extras, self.prompts, self.collator)
        return Batch(rows, self.completion_mask, self.layout)


@dataclass(frozen=True)
class Totals:
    """Counts over the pairs of all micro-batches and processes, by which losses are divided."""

    pairs: int
    chosen: int  # tokens of completions
    rejected: int

    @staticmethod
    def of(some: Sequence[Pair]) -> Totals:
        return Totals(len(some), sum(len(pair.chosen) for pair in some), sum(len(pair.rejected) for pair in some))


def collate(
    pairs: Sequence[Pair], pad_token_id: int, collator: Collator | None = None, layout: Layout = PADDED
) -> PairBatch:
    """The chosen sequences, then the rejected ones, each after its prompt."""
    completions = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    prompts = [pair.prompt for pair in pairs] * 2
    rows = [torch.tensor(prompt + ids) for prompt, ids in zip(prompts, completions, strict=True)]
    masks = [torch.arange(len(row)) >= len(prompt) for row, prompt in zip(rows, prompts, strict=True)]
    sizes = torch.tensor([len(row) for row in rows])
    pad = torch.nn.utils.rnn.pad_sequence
    input_ids, completion_mask = pad(rows, True, pad_token_id), pad(masks, True, False)
    known = [pair.ref for pair in pairs if pair.ref is not None]
    return PairBatch(
        input_ids=input_ids,
        completion_mask=completion_mask,
        attention_mask=torch.arange(input_ids.shape[1]) < sizes[:, None],
        extras=[pair.extras for pair in pairs] * 2,
        prompts=[len(prompt) for prompt in prompts],
        ref_logprobs=torch.tensor(known, dtype=torch.float64).T.flatten() if len(known) == len(pairs) else None,
        num_tokens=int(sizes.sum()),
        collator=collator,
        layout=layout,
    )

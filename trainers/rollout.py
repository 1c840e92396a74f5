"""Completions of prompts, as right-padded rows that the losses can use.

`generate` pads prompts on the left; afterwards the padding is moved to the right end, so that position ids, and with
them the log-probabilities, are what they would be without padding, for every model and without passing them on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from fused_rlhf.trainers.data import Task
from fused_rlhf.trainers.model import max_positions


@dataclass(frozen=True)
class Completions:
    """B prompts with their completions, T the longest of the two together."""

    input_ids: Tensor  # (B, T) int64, real tokens first
    attention_mask: Tensor  # (B, T) bool, True at prompt and completion
    completion_mask: Tensor  # (B, T) bool, True at the completion's tokens, the EOS that ends it included
    truncated: Tensor  # (B,) bool: max_new_tokens came before an EOS
    texts: list[str]  # completions without special tokens

    def __getitem__(self, rows: slice) -> Completions:
        """Some of the rows, cut to the longest of them."""
        length = int(self.attention_mask[rows].sum(dim=1).max())
        return Completions(
            self.input_ids[rows, :length],
            self.attention_mask[rows, :length],
            self.completion_mask[rows, :length],
            self.truncated[rows],
            self.texts[rows],
        )

    def without_truncated(self) -> Completions:
        """The same rows, with an empty completion mask where a completion did not end."""
        return replace(self, completion_mask=self.completion_mask & ~self.truncated.unsqueeze(1))


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a completion: the tokenizer's EOS and those of the model's generation configuration."""
    ids = model.generation_config.eos_token_id
    ids = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    return sorted({tokenizer.eos_token_id, *ids})


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    batch_size: int | None = None,
) -> list[Completions]:
    """One completion for each prompt, `batch_size` prompts at a time (default: all at once); one `Completions` a batch.

    Sampled from the model's whole distribution at `temperature` (no top-k, top-p or penalties, whatever the model's own
    generation configuration says, so that the log-probabilities of the op are those of the sampler); greedy at 0.
    """
    ends = eos_ids(model, tokenizer)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    config = GenerationConfig(
        **(sampling if temperature > 0 else {"do_sample": False}),
        max_new_tokens=max_new_tokens,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    batches = []
    for rows in slices(slice(0, len(prompts)), batch_size or len(prompts)):
        inputs = tokenizer(list(prompts[rows]), return_tensors="pt", padding=True, padding_side="left").to(model.device)
        with torch.no_grad(), _generation_config(model, config):
            output = model.generate(  # type: ignore[operator]
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], generation_config=config
            )
        batches.append(pack(output, inputs["attention_mask"].bool(), ends, tokenizer))
    return batches


def pack(output: Tensor, prompt_mask: Tensor, ends: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Completions:
    """(B, P + C) left-padded prompts followed by completions, and the prompts' (B, P) mask -> right-padded rows."""
    completion = output[:, prompt_mask.shape[1] :]
    is_end = torch.isin(completion, torch.tensor(ends, device=output.device))
    live = is_end.cumsum(dim=1) - is_end.long() == 0  # no EOS before this token
    completion_mask = torch.cat([torch.zeros_like(prompt_mask), live], dim=1)
    attention_mask = torch.cat([prompt_mask, live], dim=1)
    order = attention_mask.logical_not().long().argsort(dim=1, stable=True)  # real tokens first, in their order
    length = int(attention_mask.sum(dim=1).max())
    input_ids, attention_mask, completion_mask = (
        x.gather(1, order)[:, :length] for x in (output, attention_mask, completion_mask)
    )
    return Completions(
        input_ids=input_ids.masked_fill(~attention_mask, tokenizer.pad_token_id),
        attention_mask=attention_mask,
        completion_mask=completion_mask,
        truncated=~is_end.any(dim=1),
        texts=tokenizer.batch_decode(
            [row[keep].tolist() for row, keep in zip(completion, live, strict=True)], skip_special_tokens=True
        ),
    )


@contextmanager
def _generation_config(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Hide the model's own generation configuration, from which `generate` takes whatever `config` leaves unset."""
    own, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = own


def slices(rows: slice, size: int) -> list[slice]:
    """`rows` cut into pieces of `size`, the last one maybe shorter."""
    return [slice(start, min(start + size, rows.stop)) for start in range(rows.start, rows.stop, size)]


def check_lengths(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, max_new_tokens: int) -> None:
    """Raises ValueError where a prompt and `max_new_tokens` exceed the model's context, or a prompt has no tokens."""
    limit = max_positions(model)
    for name, samples in (("train", task.train), ("test", task.test)):
        for index, ids in enumerate(tokenizer([sample["prompt"] for sample in samples])["input_ids"]):
            if not ids:
                raise ValueError(f"{name} sample {index}: the prompt {samples[index]['prompt']!r} has no tokens")
            if limit is not None and len(ids) + max_new_tokens > limit:
                raise ValueError(
                    f"{name} sample {index}: its prompt of {len(ids)} tokens and max_new_tokens={max_new_tokens} "
                    f"exceed the model's context of {limit}; prompt {samples[index]['prompt'][:60]!r}"
                )

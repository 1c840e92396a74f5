"""What a model generates with: the tokens that end it, those it may not choose, and nothing of its own configuration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from fused_rlhf.trainers.adapters import base_of

TOGETHER = 4e9  # bytes; on any machine the same, so that the same run has the same products


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop: Sequence[int] = ()) -> list[int]:
    """Every token that ends a completion: the tokenizer's EOS, those of the model's generation configuration, and `stop`."""
    ids = model.generation_config.eos_token_id
    ids = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    return sorted({tokenizer.eos_token_id, *ids, *stop})


def placeholders(model: PreTrainedModel) -> list[int]:
    """Tokens that stand for an image, a video or a sound, of which a completion has none."""
    own = model.config.to_dict()
    kinds = [f"{kind}_token_{suffix}" for kind in ("image", "video", "audio") for suffix in ("id", "index")]
    return sorted({own[kind] for kind in kinds if own.get(kind) is not None})


@contextmanager
def only(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Hide the model's own generation configuration, from which `generate` takes whatever `config` leaves unset."""
    holders = {id(m): m for m in (model, base_of(model))}.values()  # peft hands its own on to the model inside
    own = [holder.generation_config for holder in holders]
    for holder in holders:
        holder.generation_config = config
    try:
        yield
    finally:
        for holder, configuration in zip(holders, own, strict=True):
            holder.generation_config = configuration


def rows_together(model: PreTrainedModel, length: int) -> int:
    """Sequences of `length` tokens that are sampled together: as many as TOGETHER holds, one at least."""
    return max(int(TOGETHER // row_bytes(model, length)), 1)


def row_bytes(model: PreTrainedModel, length: int) -> int:
    """What sampling one sequence of `length` tokens takes: keys and values of all layers, and two fp32 rows of logits."""
    text: Any = model.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    cache = 2 * text.num_hidden_layers * heads * width * length * model.dtype.itemsize
    return cache + 2 * 4 * text.vocab_size

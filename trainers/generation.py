"""What a model generates with: the tokens that end it, those it may not choose, and nothing of its own configuration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from fused_rlhf.trainers.adapters import base_of


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

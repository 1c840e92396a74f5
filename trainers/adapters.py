"""LoRA adapters on a model: which layers get them, the model inside and without them, and the folders that hold some."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from fused_rlhf.trainers.config import TrainConfig, require

FILE = "adapter_config.json"


def held_in(folder: Path) -> bool:
    return (folder / FILE).is_file() and not (folder / "config.json").is_file()


def with_adapters(config: TrainConfig, model: PreTrainedModel) -> Any:
    """The model with LoRA adapters; only they are trained. Raises ValueError for layers that it has not."""
    from peft import LoraConfig, get_peft_model  # slow to import
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = any(isinstance(module, BaseTunerLayer) for module in model.modules())
    require(not adapted, "lora_r", config.lora_r, f"0 for a {type(model).__name__} that has adapters already")
    outside = beside_language(model) if config.lora_language_only else []
    settings = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_scaling * config.lora_r,  # type: ignore[arg-type]
        lora_dropout=config.lora_dropout,
        target_modules=targets(config.lora_target_modules),
        exclude_modules=outside or None,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, settings)
    except ValueError as error:
        raise ValueError(f"lora_target_modules: {error}") from error


def targets(names: Sequence[str]) -> list[str] | str:
    """What peft takes: names of layers, or a pattern of whole names. Raises ValueError for a pattern among several, or one
    that is none."""
    if not names:
        return "all-linear"
    patterns = [name for name in names if re.fullmatch(r"[\w.-]+", name) is None]
    require(not patterns or len(names) == 1, "lora_target_modules", names, "names, or one pattern alone")
    if not patterns:
        return list(names)
    try:
        re.compile(patterns[0])
    except re.error as error:
        raise ValueError(f"lora_target_modules: {patterns[0]!r} is no pattern: {error}") from error
    return patterns[0]


def beside_language(model: Any) -> list[str]:
    """Names of the layers outside of an image-text model's language model and its head; none of other models."""
    decoder = model.get_decoder()
    if decoder is None or decoder is model or not has_vision(model.config):
        return []
    inside = {
        id(module) for part in (decoder, model.get_output_embeddings()) if part is not None for module in part.modules()
    }
    leaves = ((name, module) for name, module in model.named_modules() if not any(module.children()))
    return [name for name, module in leaves if id(module) not in inside]


def has_vision(config: Any) -> bool:
    return "vision_config" in config.to_dict()


def in_words(model: Any) -> str:
    """How many layers have adapters, and where, in words."""
    from peft.tuners.lora import LoraLayer

    base, named = base_of(model), base_of(model).named_modules()
    outside = beside_language(base)  # the parts of adapted layers among them
    adapted = [name for name, module in named if isinstance(module, LoraLayer)]
    where = [any(part.startswith(f"{name}.") for part in outside) for name in adapted]
    beside = f", {where.count(True)} of what reads pictures" if has_vision(base.config) else ""
    return f"LoRA adapters on {where.count(False)} layers of the language model{beside}"


def base_of(model: Any) -> Any:
    """The transformers model inside a PeftModel; any other model itself."""
    return model.get_base_model() if hasattr(type(model), "get_base_model") else model


def without_adapters(model: Any) -> contextlib.AbstractContextManager[None]:
    """The reference of a LoRA run: the same model, its adapters off."""
    return model.disable_adapter()

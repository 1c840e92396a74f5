"""What `accelerate launch` asks of a run: FSDP2 is taken as `--fsdp`, and what a run would not do is refused.

The launcher says it in the environment, where accelerate finds it by itself. Its own sharding knows accelerators only, so
that ours stands in for it everywhere.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fused_rlhf.trainers.config import TrainConfig, require

FSDP = "ACCELERATE_USE_FSDP"
LOADING = "FSDP_CPU_RAM_EFFICIENT_LOADING"
NO = ("", "0", "f", "false", "n", "no", "none", "off")
ALL = ("full_shard", "1")

# Variable -> the values that ask for nothing more than a run does, and what to do instead of the others.
ASKED = {
    "ACCELERATE_USE_DEEPSPEED": (NO, "no: fsdp shards weights, gradients and optimiser"),
    "ACCELERATE_USE_MEGATRON_LM": (NO, "no: fsdp shards weights, gradients and optimiser"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (NO, "no: every process has data of its own"),
    "ACCELERATE_DYNAMO_BACKEND": (NO, "no: models are not compiled"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
        ("", "1"),
        "1: micro_batch_size says what goes through the model at once",
    ),
}
ASKED_OF_FSDP = {
    "FSDP_VERSION": (("", "2"), "2"),
    "FSDP_SHARDING_STRATEGY": (("", *ALL), "FULL_SHARD"),
    "FSDP_RESHARD_AFTER_FORWARD": (("", "true", "yes", "y", "t", "on", *ALL), "true"),
    "FSDP_OFFLOAD_PARAMS": (NO, "false: weights stay on their device"),
    "FSDP_ACTIVATION_CHECKPOINTING": (NO, "false: gradient_checkpointing does it"),
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": (NO, "false: activations stay on their device"),
    "FSDP_IGNORED_MODULES": (NO, "none: every weight is sharded"),
}


def shards() -> bool:
    """Whether the launcher was told to shard."""
    return os.environ.get(FSDP, "").lower() not in NO


def check(config: TrainConfig) -> None:
    """Raises ValueError for what the launcher was told and this run would not do."""
    chosen = config.mixed_precision
    precision = {"ACCELERATE_MIXED_PRECISION": (("", "no", chosen), f"no, or as the run's mixed_precision, {chosen!r}")}
    for variable, (allowed, words) in (ASKED | precision | (ASKED_OF_FSDP if shards() else {})).items():
        value = os.environ.get(variable, "")
        option = f"--{variable.removeprefix('ACCELERATE_').lower()}"
        require(value.lower() in allowed, f"accelerate launch, {option}", value, words)
    if shards():
        dataclasses.replace(config, fsdp=True)  # which refuses what does not go with it
    group = "RANK" in os.environ or torch.distributed.is_initialized()
    words = "false in one process (torchrun and accelerate launch start several)"
    require(group or not (config.fsdp or shards()), "fsdp", True, words)


@contextmanager
def without_plugin() -> Iterator[None]:
    """An Accelerator made in here leaves the sharding to us.

    transformers is told for good to load the weights on every process: for the plugin, it leaves those of all but the
    first empty.
    """
    asked = os.environ.pop(FSDP, None)
    try:
        yield
    finally:
        if asked is not None:
            os.environ[FSDP] = asked
            os.environ[LOADING] = "false"

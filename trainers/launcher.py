"""What `accelerate launch` asks of a run: what a run would not do is refused.

accelerate's launcher says it in the environment, where accelerate takes it from without a word of ours.
"""

from __future__ import annotations

import os

from fused_rlhf.trainers.config import require

NO = ("", "0", "f", "false", "n", "no", "none", "off")

# Variable -> the values it may have, and what to do instead of any other.
ASKED = {"ACCELERATE_USE_DEEPSPEED": (NO, "no: fsdp shards weights, gradients and optimiser")}


def check() -> None:
    """Raises ValueError for what the launcher was told and a run would not do."""
    for variable, (allowed, words) in ASKED.items():
        value = os.environ.get(variable, allowed[0])
        require(value.lower() in allowed, f"accelerate launch, {option(variable)}", value, words)


def option(variable: str) -> str:
    """What sets the variable: --use_deepspeed of ACCELERATE_USE_DEEPSPEED."""
    return f"--{variable.removeprefix('ACCELERATE_').lower()}"

"""What a run would do and need, before it does: `--dry-run`.

    weights       P bytes each
    gradients     trained P
    optimiser     two moments of each trained weight
    head          rows of logits that the op keeps at a time, and the gradient of hidden        ours
                  logits, their softmax and its gradient, [N, V] fp32 each                      dense

P parameters, N tokens of one micro-batch, V vocabulary. The layers' activations depend on the architecture and are left
out; with gradient checkpointing they are about one hidden state per layer and token.
"""

from __future__ import annotations

from typing import Any

import fused_rlhf as fr
from fused_rlhf.trainers.engine import Engine
from fused_rlhf.trainers.model import Loaded


def describe(
    engine: Engine,
    loaded: Loaded,
    *,
    reference: bool,
    sequences: int,
    length: int,
    updates_per_step: int,
    data: str,
) -> str:
    """The plan as text: `sequences` of at most `length` tokens in a step, over all processes."""
    config, world = engine.config, engine.world
    text = loaded.model.config.get_text_config()
    V, H, layers = text.vocab_size, text.hidden_size, text.num_hidden_layers
    micro = min(config.micro_batch_size, max(sequences // world, 1))
    N = micro * length
    sizes = memory(engine, N, V, H, reference)
    checkpointed = layers * N * H * (2 if config.mixed_precision != "no" else 4)
    activations = f"about {size(checkpointed)}" if config.gradient_checkpointing else "not known beforehand"
    lines = [
        f"data            {data}",
        f"model           {loaded.model.num_parameters():,} parameters, V={V}, H={H}, {layers} layers",
        f"processes       {world} on {engine.device.type}, {'sharded (FSDP2)' if engine.sharded else 'replicated'}",
        f"steps           {config.steps}, {updates_per_step} updates each; {config.steps * updates_per_step} in all",
        f"a step          {sequences} sequences of at most {length} tokens: {sequences * length:,} tokens",
        f"a micro-batch   {micro} sequences of one process: {N:,} tokens",
        "memory of one process",
        *(f"  {name:<14}{size(value)}" for name, value in sizes.items()),
        f"  {'together':<14}{size(sum(sizes.values()))}, and the layers' activations ({activations})",
        f"  dense logits would take {size(3 * 4 * N * V)} in place of the head's {size(sizes['head'])}",
    ]
    return "\n".join(lines)


def memory(engine: Engine, tokens: int, vocabulary: int, hidden: int, reference: bool) -> dict[str, int]:
    """Bytes that one process holds at the peak of an update, by what for."""
    shards = engine.world if engine.sharded else 1
    parameters = list(engine.module.parameters())
    weights = sum(p.numel() * p.element_size() for p in parameters)
    trained = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
    logits = 4 * tokens * vocabulary
    backend: Any = fr.backends.resolve(engine.config.backend, next(iter(parameters)))
    kept = 3 * logits if engine.config.backend == "reference" else min(logits, backend.ONE_PASS_BYTES)
    return {
        "weights": weights // shards * (2 if reference else 1),
        "gradients": trained // shards,
        "optimiser": 2 * trained // shards,
        "head": kept + 4 * tokens * hidden,
    }


def size(count: float) -> str:
    """Bytes in the largest unit that leaves at least one."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"

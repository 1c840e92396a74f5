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

from dataclasses import dataclass

import torch

from fused_rlhf import backends
from fused_rlhf.kernels.interface import Work
from fused_rlhf.trainers.engine import Engine
from fused_rlhf.trainers.model import Loaded


@dataclass(frozen=True)
class Workload:
    """What a run takes in."""

    unit: str  # what its steps take of the training set, in the plural
    per_step: int  # over all processes, as all that follow
    train: int
    test: int
    note: str  # where they come from
    sequences: int  # in a step
    length: int  # tokens of the longest
    updates: int  # in a step
    fingerprint: str = ""  # of the samples, to tell whether a resumed run has the same

    @property
    def samples(self) -> str:
        return f"{self.train} training and {self.test} test {self.unit}"

    def of_step(self, number: int) -> str:
        """What step `number`, from 1 on, takes."""
        first, beyond = (number - 1) * self.per_step, number * self.per_step
        return f"{self.unit} {first} to {beyond - 1} of the shuffled training set"


def describe(engine: Engine, loaded: Loaded, workload: Workload, reference: bool) -> str:
    """The plan as text."""
    config, world = engine.config, engine.world
    text = loaded.model.config.get_text_config()
    V, H, layers = text.vocab_size, text.hidden_size, text.num_hidden_layers
    sequences, length, updates = workload.sequences, workload.length, workload.updates
    micro = min(config.micro_batch_size, max(sequences // world, 1))
    N = micro * length
    sizes = memory(engine, N, V, H, reference)
    checkpointed = layers * N * H * (2 if config.mixed_precision != "no" else 4)
    activations = f"about {size(checkpointed)}" if config.gradient_checkpointing else "not known beforehand"
    lines = [
        f"data            {workload.samples}; {workload.note}",
        f"model           {loaded.model.num_parameters():,} parameters, V={V}, H={H}, {layers} layers",
        f"processes       {world} on {engine.device.type}, {'sharded (FSDP2)' if engine.sharded else 'replicated'}",
        f"steps           {config.steps}, {updates} updates each; {config.steps * updates} in all",
        f"a step          {sequences} sequences of at most {length} tokens: {sequences * length:,} tokens",
        f"a micro-batch   {micro} sequences of one process: {N:,} tokens",
        "memory of one process",
        *(f"  {name:<14}{size(value)}" for name, value in sizes.items()),
        f"  {'together':<14}{size(sum(sizes.values()))}, and the layers' activations ({activations})",
        f"  dense logits would take {size(3 * 4 * N * V)} in place of the head's {size(sizes['head'])}",
    ]
    return "\n".join(lines)


def memory(engine: Engine, tokens: int, vocabulary: int, hidden: int, reference: bool) -> dict[str, int]:
    """Bytes that one process holds at the peak of an update, by what for.

    head: what the op's backend says of one pass over a micro-batch, the gradient of hidden included; that of the head's
    weight is among the others.
    """
    shards = engine.world if engine.sharded else 1
    parameters = list(engine.module.parameters())
    weights = sum(p.numel() * p.element_size() for p in parameters)
    trained = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
    some = parameters[0]
    dtype = torch.bfloat16 if engine.config.mixed_precision == "bf16" else some.dtype
    work = Work("one_pass", tokens, hidden, vocabulary, dtype)
    head = backends.resolve(engine.config.backend, some).memory(work) - vocabulary * hidden * dtype.itemsize
    return {
        "weights": weights // shards * (2 if reference else 1),
        "gradients": trained // shards,
        "optimiser": 2 * trained // shards,
        "head": int(head),
    }


def parameters(engine: Engine, loaded: Loaded) -> str:
    """How many there are: of the model, and of what is trained besides."""
    own = set(loaded.model.parameters())
    more = sum(p.numel() for p in engine.module.parameters() if p not in own)
    return f"{loaded.model.num_parameters():,} parameters" + (f" and {more:,} of the values" if more else "")


def size(count: float) -> str:
    """Bytes in the largest unit that leaves at least one."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"

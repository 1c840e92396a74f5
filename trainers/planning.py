"""What a run would do and need, before it does: `--dry-run`.

    weights       P bytes each, and a reference's
    gradients     trained P; in several processes DDP's buckets, too
    optimiser     two moments of each trained weight
    gathered      FSDP2: what is whole while it is used: the rest's group, two blocks, a tied head and its gradient
    activations   of one micro-batch, by a trial without numbers (`activations.trial`)
    head          rows of logits that the op keeps at a time, and the gradient of hidden        ours
                  FSDP2: two blocks of its weight and two of their gradients, too
                  logits, their softmax and its gradient, [N, V] fp32 each                      dense
    sampling      keys and values of the sequences sampled together, and two fp32 rows of V each

    peak = weights + optimiser + max(sampling, gradients, gathered + loss, gathered + backward)
    loss       kept activations, head and the gradients until then
    backward   activations, the gradient of hidden, and the gradients until then

P parameters, N tokens of one micro-batch, V vocabulary. Gradients until then are those of earlier micro-batches; in an update
of one, that of the head at the loss, and each weight's as the backward makes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from fused_rlhf import backends, lm_head
from fused_rlhf.kernels.interface import Needs, Work
from fused_rlhf.op import streamed
from fused_rlhf.trainers.activations import trial
from fused_rlhf.trainers.adapters import base_of
from fused_rlhf.trainers.attention import Group
from fused_rlhf.trainers.config import TrainConfig
from fused_rlhf.trainers.engine import Engine, transformers_models
from fused_rlhf.trainers.generation import row_bytes, rows_together
from fused_rlhf.trainers.layout import PADDED, Layout
from fused_rlhf.trainers.model import Loaded
from fused_rlhf.trainers.rollout_config import RolloutConfig


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
    sharing: int = 1  # sequences that may begin with one prompt, one after the other
    prompt: int = 0  # of `length`, tokens of that

    def groups(self, count: int, layout: Layout) -> list[Group]:
        """So many sequences as the body reads them, each the longest."""
        if layout.name != "shared" or self.sharing == 1:
            return [Group(self.length)] * count
        whole, rest = divmod(count, self.sharing)
        sizes = [self.sharing] * whole + [rest] * (rest > 0)
        return [Group(self.prompt, (self.length - self.prompt,) * size) for size in sizes]

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
    micro = micro_batch(config, workload, world)
    N, groups = micro * length, workload.groups(micro, loaded.layout)
    read = sum(group.length for group in groups)
    once = "" if read == N else f", of which {read:,} go through the body where prompts are shared"
    need, why = memory(engine, loaded, workload, reference), ""
    try:
        need = with_activations(need, engine, groups, loaded.layout)
    except Exception as error:  # of any model's own code
        why = f"; at least, for its layers could not be tried: {str(error).splitlines()[0]}"
    if loaded.processor is not None:
        why += "; at least, for what reads pictures is left out"
    lines = [
        f"data            {workload.samples}; {workload.note}",
        f"model           {loaded.model.num_parameters():,} parameters, V={V}, H={H}, {layers} layers",
        f"processes       {world} on {engine.device.type}, {'sharded (FSDP2)' if engine.sharded else 'replicated'}",
        f"steps           {config.steps}, {updates} updates each; {config.steps * updates} in all",
        f"a step          {sequences} sequences of at most {length} tokens: {sequences * length:,} tokens",
        f"a micro-batch   {micro} sequences of one process, {loaded.layout.name}: {N:,} tokens at most{once}",
        "memory of one process",
        *(f"  {name:<14}{size(value)}" for name, value in need.parts().items()),
        f"  {'at its peak':<14}{size(need.peak)}{why}",
        f"  dense logits would take {size(3 * 4 * N * V)} in place of the head's {size(need.head)}",
    ]
    return "\n".join(lines)


@dataclass(frozen=True)
class Memory:
    """Bytes of one process, by what for."""

    weights: int
    gradients: int
    optimiser: int
    head: int  # the gradient of hidden included, that of the weight not
    gathered: int = 0
    activations: int = 0
    sampling: int = 0
    # Parts of these at a time:
    kept: int = 0  # of the activations, at the loss
    early: int = 0  # of the gradients, at the loss
    late: int = 0  # of the gradients, with most of activations
    hidden: int = 0  # of the head, in the backward

    @property
    def peak(self) -> int:
        loss, backward = self.kept + self.head + self.early, self.activations + self.hidden + self.late
        return self.weights + self.optimiser + max(self.sampling, self.gradients, self.gathered + max(loss, backward))

    def parts(self) -> dict[str, int]:
        """Those there are."""
        names = ("weights", "gradients", "optimiser", "gathered", "activations", "head", "sampling")
        return {name: getattr(self, name) for name in names if getattr(self, name)}


def memory(engine: Engine, loaded: Loaded, workload: Workload, reference: bool) -> Memory:
    """All but the activations."""
    config, world = engine.config, engine.world
    shards, text = (world if engine.sharded else 1), loaded.model.config.get_text_config()
    every = list(engine.module.parameters())
    weights, trained = bytes_of(every), bytes_of(p for p in every if p.requires_grad)
    dtype = torch.bfloat16 if config.mixed_precision == "bf16" else every[0].dtype
    micro = micro_batch(config, workload, world)
    tokens, V, H = micro * workload.length, text.vocab_size, text.hidden_size
    embeddings = base_of(loaded.model).get_output_embeddings()
    table, shards_of_head = embeddings.weight, lm_head.shards_of(embeddings)
    needs = Needs(True, table.requires_grad, False)
    work = Work("one_pass", tokens, H, V, dtype, needs)
    of_weight = V * H * dtype.itemsize if table.requires_grad else 0
    backend = backends.resolve(config.backend, every[0])
    if shards_of_head is None:
        head = backend.memory(work) - of_weight
    else:
        head = streamed.memory(backend, work, shards_of_head.stream(table))
    if dtype != table.dtype and not engine.sharded:
        head += V * H * dtype.itemsize  # autocast's copy of the weight
    copies = 2 if world > 1 and not engine.sharded else 1
    gradients = trained * copies // shards
    alone = workload.sequences // max(world * workload.updates, 1) <= micro
    first = bytes_of([table]) // shards if table.requires_grad else 0
    return Memory(
        weights=weights // shards * (2 if reference else 1),
        gradients=gradients,
        optimiser=2 * trained // shards,
        head=int(head),
        gathered=gathered(engine, embeddings, dtype) if engine.sharded else 0,
        sampling=sampled(engine, loaded, workload),
        early=first if alone else gradients,
        late=first if alone else gradients,
        hidden=tokens * H * dtype.itemsize,
    )


def bytes_of(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def micro_batch(config: TrainConfig, workload: Workload, world: int) -> int:
    """Sequences of one forward and backward of one process."""
    most = config.micro_batch_tokens // max(workload.length, 1) or config.micro_batch_size
    return min(most, max(workload.sequences // (world * workload.updates), 1))


def gathered(engine: Engine, embeddings: nn.Module, dtype: torch.dtype) -> int:
    """What FSDP2 makes whole: for all of an update the rest's group, in turns the others, two at a time. A head in a group of
    its own is streamed; a tied one is part of the rest, and its gradient there twice until it is scattered."""
    groups = [m for m in engine.wrapped.modules() if isinstance(m, FSDPModule)]
    inner = {p for group in groups if group is not engine.wrapped for p in group.parameters()}
    rest = [p for p in engine.wrapped.parameters() if p not in inner]
    turns = [group for group in groups if group not in (engine.wrapped, embeddings)]
    others = sorted(sum(p.numel() for p in group.parameters()) for group in turns)
    tied = 0 if embeddings in groups else 2 * sum(p.numel() for p in embeddings.parameters())
    return (sum(p.numel() for p in rest) + sum(others[-2:]) + tied) * dtype.itemsize


def with_activations(need: Memory, engine: Engine, groups: Sequence[Group], layout: Layout = PADDED) -> Memory:
    """With those of all the models that an update goes through. Raises as `activations.trial`."""
    every = transformers_models(engine.module)
    found = [trial(model, engine.config, engine.device, groups, layout) for model in every]
    peak, both = sum(it.peak for it in found), sum(it.with_gradients for it in found)
    shards = engine.world if engine.sharded else 1
    late = min(need.late + (both - peak) // shards, need.gradients)
    return replace(need, activations=peak, kept=sum(it.kept for it in found), late=late)


def sampled(engine: Engine, loaded: Loaded, workload: Workload) -> int:
    """Of the completions that are sampled together; none where a run samples none."""
    config = engine.config
    if not isinstance(config, RolloutConfig):
        return 0
    model, own = loaded.model, -(-workload.sequences // engine.world)
    rows = min(own, config.rollout_batch_size or rows_together(model, workload.length))
    return rows * row_bytes(model, workload.length)


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

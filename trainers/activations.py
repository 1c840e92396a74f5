"""What the forward and backward of one micro-batch hold beside weights and their gradients, found by a trial.

The model is built again of tensors that have sizes and no numbers, and every tensor it makes is counted from its first
result to its last use: attention, norms, checkpointing, autocast and adapters are in it as they are.
"""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from fused_rlhf.trainers import adapters
from fused_rlhf.trainers import model as models
from fused_rlhf.trainers.attention import Group, table_of
from fused_rlhf.trainers.config import TrainConfig
from fused_rlhf.trainers.layout import PADDED, Layout
from fused_rlhf.trainers.tiled_mlp import tile, tiled

MOST_TILES = 16  # of an MLP in a trial, which takes its time for each; more would be smaller than these


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch on the device."""

    kept: int  # from the forward for the backward
    peak: int  # at once, at any time of the two
    with_gradients: int  # the same with the weights' gradients, each from when it is made


class Live(TorchDispatchMode):
    """Counts the bytes of the storages of a device that were made since, while they live."""

    def __init__(self, device: str | None = None) -> None:
        super().__init__()
        self.device = device
        self.bytes = 0
        self.peak = 0
        self.aside = 0  # of the bytes, those that `peak_apart` leaves out
        self.peak_apart = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and self.device in (None, t.device.type):
                storage = t.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in before and key not in self.seen:
                    self.seen.add(key)
                    self.bytes += size
                    self.peak = max(self.peak, self.bytes)
                    self.peak_apart = max(self.peak_apart, self.bytes - self.aside)
                    weakref.finalize(storage, self._gone, key, size)
        return result

    def set_aside(self, parameter: Tensor) -> None:
        """Its gradient."""
        if parameter.grad is not None:
            self.aside += parameter.grad.untyped_storage().nbytes()

    def _gone(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.bytes -= size


class _Reached(Exception):
    """The head, before which the trial ends."""


def trial(
    model: PreTrainedModel, config: TrainConfig, device: torch.device, groups: Sequence[Group], layout: Layout = PADDED
) -> Activations:
    """A forward and backward of `model`, up to its head, over groups of sequences in their layout, as `config` trains it on
    `device`. In padded rows a group is one sequence.

    Raises whatever the model raises where what it does depends on numbers, as the routing of some experts.
    """
    rows, length = len(groups), max(group.length for group in groups)
    packed = layout.name != "padded"
    tokens = sum(group.length for group in groups) if packed else rows * length
    with torch.device("meta"):
        made = _alike(model, config, tokens)
    table = table_of(groups)
    table.__dict__["made_of_it"] = {"groups": groups}  # its numbers could not be read below
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(device):
        made.to_empty(device=device)
        ids = torch.zeros((1, tokens) if packed else (rows, length), dtype=torch.int64)
        # A row alone has no padding, for which transformers makes no (T, T) mask.
        padding = torch.ones(rows, length, dtype=torch.bool) if layout.masked and rows > 1 else None
        told: dict[str, Any] = {"attention_mask": padding}
        if packed:
            told = {"attention_mask": table if layout.table else None, "position_ids": torch.zeros_like(ids)}
        width = model.config.get_text_config().hidden_size
        upstream = torch.empty(*ids.shape, width)  # counted with the head
        with Live(device.type) as live:
            for parameter in made.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(live.set_aside)
            hidden = _hidden(made, ids, told, config)
            kept = live.bytes
            torch.autograd.backward(hidden, upstream.to(hidden.dtype))
        return Activations(kept, live.peak_apart, live.peak)


def _alike(model: PreTrainedModel, config: TrainConfig, count: int) -> Any:
    """The same architecture, as `config` has it trained on `count` tokens."""
    config = dataclasses.replace(config, liger_layers=False, tiled_mlp=0)  # Triton and the search for MLPs want numbers
    before = torch.get_default_dtype()
    torch.set_default_dtype(model.dtype)
    try:
        made: Any = type(model)(copy.deepcopy(model.config))
    finally:
        torch.set_default_dtype(before)
    models.prepare_body(config, made)
    for name, tokens in tiled(model):
        tile(made.get_submodule(name), max(tokens, count // MOST_TILES))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    whole = adapters.with_adapters(config, made) if config.lora_r and made.get_output_embeddings() is not None else made
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(name in trained)
    return whole.train()


def _hidden(model: Any, ids: Tensor, told: dict[str, Any], config: TrainConfig) -> Tensor:
    """The head's input; of a body without one, its last hidden state."""
    found: list[Tensor] = []

    def stop(head: nn.Module, args: tuple[Any, ...]) -> None:
        found.append(args[0])
        raise _Reached

    base = adapters.base_of(model)
    head = base.get_output_embeddings()
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.mixed_precision)
    with torch.autocast(ids.device.type, dtype=half, enabled=half is not None):
        if head is None:
            return model(input_ids=ids, use_cache=False, **told).last_hidden_state
        handle = head.register_forward_pre_hook(stop)
        try:
            model(input_ids=ids, use_cache=False, **told)
        except _Reached:
            return found.pop()
        finally:
            handle.remove()
    raise ValueError(f"{type(base).__name__} does not call its head")

"""What we use of torch that torch does not promise to keep, in one place; tests/test_private.py says when it changes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn


def keeps_graph() -> bool:
    """Inside a backward: whether it was called with `retain_graph`, so that another may follow.

    There is no public way to ask. Were it to answer True always, one-pass losses would hold two copies of their
    gradients; were it to answer False wrongly, a second backward would raise.
    """
    return torch._C._autograd._get_current_graph_task_keep_graph()


def has_native_bf16() -> bool:
    """Whether this CPU multiplies bf16 natively (AVX512-BF16 or AMX), so that bf16 products are faster than fp32 ones."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def process_group(name: str) -> Any:
    """The group of this name: a custom op takes strings, and no group."""
    from torch.distributed import distributed_c10d  # not in every build

    return distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]  # a NewType of str


def is_compiled(module: nn.Module) -> bool:
    """Whether a call of the module runs compiled: by `module.compile()`, or as what `torch.compile(module)` returns.

    Hooks on a module inside a compiled graph would be traced into it or left out.
    """
    return module._compiled_call_impl is not None or hasattr(module, "_orig_mod")


def compiled_graphs() -> int:
    """Graphs that torch.compile has made in this process: a benchmark reports those that a new length cost."""
    from torch._dynamo.utils import counters  # seconds of import, which only who compiles has paid already

    return int(counters["stats"]["unique_graphs"])


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether it stands for a tensor while something traces through us (`torch.export`, `make_fx`): it has no numbers."""
    return isinstance(tensor, torch._subclasses.FakeTensor)


def all_gather(into: Tensor, own: Tensor, group: Any) -> Any:
    """The rows of all ranks, one rank's after the other's, into one tensor; -> what to wait for. torch 2.13 renames it."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return gather(into, own, group=group, async_op=True)


def reduce_scatter(into: Tensor, everyone: Tensor, group: Any) -> Any:
    """The sum over ranks of this rank's part; otherwise as `all_gather`."""
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return scatter(into, everyone, group=group, async_op=True)


class FSDPGroup(NamedTuple):
    """How FSDP2 treats the parameters of one group; None: as they are."""

    param_dtype: torch.dtype | None
    reduce_dtype: torch.dtype | None
    divisor: float | None  # of gradients; None: the number of ranks
    casts_inputs: bool
    device: torch.device  # that it computes on
    ranks: str | None  # the name of the process group it shards over; None: it does not


def fsdp_group(module: Any) -> FSDPGroup | None:
    """Of a module for which `fully_shard` was called; None where it shares a group with others, or has several. There is no
    public way to ask. Were it to answer wrongly, gradients of a streamed head would have another factor or dtype than others.
    """
    state = module._get_fsdp_state()
    if len(state._modules) != 1 or len(getattr(state, "_fsdp_param_groups", [None])) != 1:
        return None
    policy, group = state._mp_policy, state._fsdp_param_group
    ranks = getattr(group.mesh_info, "shard_process_group", None)
    return FSDPGroup(
        policy.param_dtype, policy.reduce_dtype, group.gradient_divide_factor, policy.cast_forward_inputs, state._device,
        None if ranks is None else ranks.group_name,
    )  # fmt: skip


def fsdp_asleep(module: Any) -> AbstractContextManager[None]:
    """Calls of the module do not make its parameters whole: FSDP2's hooks on it, which nothing public turns off, do nothing."""
    return _silenced(module, of_fsdp=True)


def fsdp_alone(module: Any) -> AbstractContextManager[None]:
    """The opposite: of the hooks on the module FSDP2's alone do anything. Others, such as ColwiseParallel's, take logits."""
    return _silenced(module, of_fsdp=False)


@contextmanager
def _silenced(module: Any, of_fsdp: bool) -> Iterator[None]:
    state, held = module._get_fsdp_state(), []
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in hooks.items():
            method = inspect.unwrap(hook, stop=lambda f: hasattr(f, "__self__"))  # a group's hooks wrap its state's
            if (getattr(method, "__self__", None) is state) is of_fsdp:
                held.append((hooks, key, hook))
    for hooks, key, _ in held:
        hooks[key] = _nothing  # in its place: the order of the hooks stays
    try:
        yield
    finally:
        for hooks, key, hook in held:
            hooks[key] = hook


def _nothing(*_: Any, **__: Any) -> None:
    return None


def saved_tensor_hooks() -> object:
    """The hooks in force on tensors that a graph saves (a checkpoint's, an offload's), equal while they are the same."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)

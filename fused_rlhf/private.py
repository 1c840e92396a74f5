"""What we use of torch that torch does not promise to keep, in one place; tests/test_private.py says when it changes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


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

"""The dtype torch would give a result: it is asked once for each case, of a tensor of two numbers."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from fused_rlhf.deferred.tensor import Deferred

_known: dict[tuple[Hashable, ...], torch.dtype] = {}


def torch_dtype(
    name: str, d: Deferred, function: Callable[[Tensor], Tensor], given: torch.dtype | None = None
) -> torch.dtype:
    """Of `function`, which `name` and `given` tell from others, of logits of the dtype of `d`, under the autocast in force."""
    kind = d.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    case = (name, d.dtype, kind, autocast, given)
    if case not in _known:
        with torch.no_grad():
            _known[case] = function(torch.zeros(1, 2, dtype=d.dtype, device=d.device)).dtype
    return _known[case]

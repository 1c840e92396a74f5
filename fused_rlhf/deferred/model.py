"""Models whose logits are deferred: two hooks on their head.

The first keeps the head's input and leaves it no rows to multiply, the second puts a deferred tensor in the place of its
output. What the model itself does to its logits (a scale, a softcap, a loss of its labels) is done to that tensor, as all
that a caller does. Everything around the model (PEFT, DDP, FSDP2, accelerate) runs as ever.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fused_rlhf import lm_head, private
from fused_rlhf.checks import dtensor
from fused_rlhf.deferred import elementwise, results, rows  # noqa: F401  # they fill the table
from fused_rlhf.deferred.distribution import Distribution, Source
from fused_rlhf.deferred.graphs import outside_of_graphs
from fused_rlhf.deferred.paused import is_paused, paused
from fused_rlhf.deferred.tensor import Deferred, linked
from fused_rlhf.deferred.value import Terms, logits_of
from fused_rlhf.op.head import Head

_KEY = "_fused_rlhf_deferral"  # where a model keeps its own, so that a copy of it has one, too


@contextlib.contextmanager
def deferred_logits(model: nn.Module) -> Iterator[None]:
    """Within the block the model's forward returns its usual output with deferred logits, in every thread.

    Args, errors: as `defer`. A model that is deferred already stays so afterwards.
    """
    was_deferred = _KEY in vars(lm_head.unwrap(model).base)
    defer(model)
    try:
        yield
    finally:
        if not was_deferred:
            undefer(model)


def defer(model: nn.Module) -> None:
    """From now on the model's forward returns its usual output with deferred logits, until `undefer`; `generate` does not.

    The tensor in `.logits` has the shape, dtype and device of the model's own, and no memory. Rows of it are taken, reshaped
    and joined, it is scaled, shifted and cast as any tensor; log-probs, entropies, losses and what else is in the docs are
    computed when asked for, from hidden states and head, in fp32 (fp64 for fp64), and rounded once to the dtype that torch
    would give. Whatever would need the whole tensor raises NotImplementedError. `labels=` give the model's own loss.

    Args:
        model: a transformers causal LM, bare or wrapped (PEFT, DDP, FSDP2, accelerate). Add adapters to it before. Once
            deferred nothing is done again.

    Raises:
        TypeError: no transformers model.
        ValueError: it has no linear head, or one that `Head` cannot say. In a forward: a head that is sharded.
    """
    found = lm_head.unwrap(model)
    base = found.base
    if _KEY in vars(base):
        return
    embeddings = base.get_output_embeddings()
    if embeddings is None:
        raise ValueError(f"{type(base).__name__} has no output embeddings: not a causal LM with a linear head")
    lm_head.linear_of(embeddings)
    if found.compiled(embeddings):
        raise ValueError("model must not be compiled together with its head, got one that is; compile its body alone")
    handles = (
        embeddings.register_forward_pre_hook(_before),
        embeddings.register_forward_hook(_after, prepend=True, always_call=True),
        embeddings.register_forward_hook(_link),
    )
    vars(base)[_KEY] = _Deferral(handles, vars(base).get("generate"))
    if hasattr(base, "generate"):
        bound: Any = functools.partial(
            _generate, base
        )  # which a copy of the model binds to itself, and which is pickled
        bound.__wrapped__ = type(base).generate  # some read its signature
        base.generate = bound


def undefer(model: nn.Module) -> None:
    """Ends `defer`; logits that are deferred by then stay usable. Does nothing to a model that is not."""
    base = lm_head.unwrap(model).base
    deferral: _Deferral | None = vars(base).pop(_KEY, None)
    if deferral is None:
        return
    for handle in deferral.handles:
        handle.remove()
    vars(base).pop("generate", None)
    if deferral.generate is not None:
        base.generate = deferral.generate


class _Deferral(NamedTuple):
    """What `undefer` takes back."""

    handles: tuple[RemovableHandle, ...]  # of the hooks on the head
    generate: Any  # the model's own, where it had one beside its class's


def _generate(self: Any, *args: Any, **kwargs: Any) -> Any:
    own = vars(self)[_KEY].generate
    with paused():
        return type(self).generate(self, *args, **kwargs) if own is None else own(*args, **kwargs)


# What the first hook leaves for the second, in the same thread: the head's input by the head's id.
_local = threading.local()


def _inputs() -> dict[int, Tensor]:
    found: dict[int, Tensor] = vars(_local).setdefault("inputs", {})
    return found


@outside_of_graphs
def _before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    if is_paused():
        return None
    if not args or not isinstance(args[0], Tensor) or args[0].dim() < 2:
        raise ValueError(
            f"the head of a deferred model must be called with hidden states (..., H), got {len(args)} arguments"
        )
    if what := next(filter(None, map(dtensor, module.parameters())), ""):  # FSDP2 has gathered what it shards by now
        raise ValueError(f"unsupported head: its weight is {what}")
    _inputs()[id(module)] = args[0]
    return (args[0][..., :0, :], *args[1:])


@outside_of_graphs
def _after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor | None:
    hidden = _inputs().pop(id(module), None)
    if hidden is None or output is None:  # paused, or the head has raised
        return None
    operands = lm_head.operands_of(module)
    alone = False
    if lm_head.is_fsdp2(module):
        operands = operands.copied()  # whole only now
        alone = private.fsdp_group(module) is not None
    # FSDP2 would gather the head's group again, for nothing, were the output in the graph by the time its own hook sees it.
    # What shares the group must be whole in the backward; and where nothing before the head takes a gradient, that hook is
    # the one that reduces the head's.
    return logits_of_head(hidden, operands.head(), output, None if alone and hidden.requires_grad else output)


def logits_of_head(hidden: Tensor, head: Head, output: Tensor, behind: Tensor | None) -> Deferred:
    """Of hidden states (..., H), with the dtype and device of a head's output; `behind`: what is in the graph behind it."""
    kind = hidden.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    source = Source.of(hidden.reshape(-1, hidden.shape[-1]), head, autocast, detached=not torch.is_grad_enabled())
    made = functools.partial(_deferred, shape=hidden.shape[:-1], vocabulary=len(head.weight), like=output)
    terms = logits_of(Distribution(source))
    return made(terms) if behind is None else linked(made, terms, behind)


@outside_of_graphs
def _link(module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor | None:
    """After FSDP2's own hook."""
    if not isinstance(output, Deferred) or not lm_head.is_fsdp2(module) or output.requires_grad:
        return None
    (term,) = output.terms
    assert term.of is not None
    made = functools.partial(_deferred, shape=output.row_shape, vocabulary=output.shape[-1], like=output)
    return linked(made, output.terms, term.of.source.hidden)


def _deferred(terms: Terms, *, shape: torch.Size, vocabulary: int, like: Tensor) -> Deferred:
    return Deferred(terms, shape, vocabulary, like.dtype, like.device)

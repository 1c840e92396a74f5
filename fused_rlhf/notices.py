"""What runs, in words, once a process: a script of another framework's looks the same with us and without.

The line goes to the logger "fused_rlhf" at level INFO; to stderr where logging has not been set up to show it. Quiet:
`logging.getLogger("fused_rlhf").setLevel("WARNING")`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fused_rlhf import backends
from fused_rlhf.op.head import Head

log = logging.getLogger("fused_rlhf")

_said: set[str] = set()
_muted = 0


def runs(what: str, hidden: Tensor, head: Head, backend: str, more: str) -> None:
    """Says, the first time for `what`, that it comes from here: on which backend, and over which head."""
    if what in _said or _muted or torch.compiler.is_compiling():
        return
    _said.add(what)
    say(f"fused_rlhf computes {what}: {where(hidden, backend)}; {in_words(head)}; {more}")


def say(text: str) -> None:
    """In one process of several."""
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank():
        return
    shown = log.isEnabledFor(logging.INFO) and log.hasHandlers()
    if shown or log.level != logging.NOTSET:
        log.info(text)
    else:
        print(text, file=sys.stderr)


@contextmanager
def muted() -> Iterator[None]:
    """For calls that are not the user's."""
    global _muted
    _muted += 1
    try:
        yield
    finally:
        _muted -= 1


def where(hidden: Tensor, backend: str) -> str:
    return f"backend {backends.choose(backend, hidden)} on {hidden.device.type}, {dtype_of(hidden)}"


def in_words(head: Head) -> str:
    """head (101, 96) float32 with bias, softcap 30"""
    transform, parts = head.transform, [] if head.bias is None else ["bias"]
    if transform.logit_scale != 1:
        parts.append(f"logit_scale {transform.logit_scale:g}")
    if transform.curve:
        parts.append(f"{transform.curve} {transform.parameter:g}")
    if head.lora is not None:
        parts.append(f"LoRA of rank {head.lora[0].shape[0]}")
    streamed = "" if head.stream is None else f", streamed from {head.stream.world} shards"
    of = f"head {(head.vocabulary, head.weight.shape[1])} {dtype_of(head.dtype)}{streamed}"
    return f"{of} with {', '.join(parts)}" if parts else f"{of}, its logits as they are"


def dtype_of(of: Tensor | torch.dtype) -> str:
    return str(of.dtype if isinstance(of, Tensor) else of).removeprefix("torch.")

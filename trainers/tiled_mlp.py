"""MLPs in tiles of tokens: a body's intermediates, (tokens, intermediate_size) each, never exist whole.

An MLP acts on each token alone, so that a few may go through it at a time. Each tile is computed again in the backward; what
is kept of it is its input, a part of what the MLP was given.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fused_rlhf.trainers import private
from fused_rlhf.trainers.config import require

TOKENS = 6  # of a trial


def tile_mlps(model: Any, tokens: int) -> None:
    """Let the MLP of every block of a model's decoder take at most so many tokens at a time.

    Raises ValueError where a block has none: no child, or several, that makes of each token, whatever stands beside it, one of
    the same width by two matrices at least; experts are none, for which tokens go together.
    """
    body = model.get_decoder() or model
    names = private.blocks_of(model)
    blocks = [(name, m) for name, m in body.named_modules() if type(m).__name__ in names]
    kind, width = type(model).__name__, model.config.get_text_config().hidden_size
    require(bool(blocks), "tiled_mlp", tokens, f"0 for {kind}, whose blocks are not known")
    found = []
    for name, block in blocks:
        mlps = list(mlps_of(block, width))
        words = f"0 for {kind}, whose block {name} has {len(mlps)} MLPs of its own, not one"
        require(len(mlps) == 1, "tiled_mlp", tokens, words)
        found += mlps
    for mlp in found:
        tile(mlp, tokens)


def tile(mlp: nn.Module, tokens: int) -> None:
    # A bound method in a partial: a copy of the model has its own.
    mlp.forward = partial(in_tiles, mlp.forward, tokens)


def in_tiles(forward: Any, tokens: int, x: Tensor) -> Tensor:
    """(..., H) -> (..., H)."""
    parts = x.reshape(1, -1, x.shape[-1]).split(tokens, dim=1)
    made = [checkpoint(forward, part, use_reentrant=False) for part in parts]
    return torch.cat(made, dim=1).view_as(x)


def tiled(model: nn.Module) -> Iterator[tuple[str, int]]:
    """The modules that take tiles, and of how many tokens."""
    for name, module in model.named_modules():
        forward = vars(module).get("forward")
        if isinstance(forward, partial) and forward.func is in_tiles:
            yield name, forward.args[1]


def mlps_of(block: nn.Module, width: int) -> Iterator[nn.Module]:
    """The children of a block that are an MLP, as a trial has it."""
    for child in block.children():
        weights = [p for p in child.parameters() if p.dim() > 1]
        experts = any(p.dim() > 2 for p in weights) or any(isinstance(m, nn.ModuleList) for m in child.modules())
        if len(weights) > 1 and not experts and _is_tokenwise(child, width, weights[0]):
            yield child


@torch.no_grad()
def _is_tokenwise(module: nn.Module, width: int, like: Tensor) -> bool:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, TOKENS, width, generator=generator).to(like)
    try:
        whole, halves = module(x), [module(part) for part in x.split(TOKENS // 2, dim=1)]
    except (TypeError, ValueError, RuntimeError, AttributeError):  # it wants more than a tensor, or another shape
        return False
    tensors = [whole, *halves]
    if not all(isinstance(made, Tensor) for made in tensors) or whole.shape != x.shape:
        return False
    apart = (torch.cat(halves, dim=1) - whole).abs().max()
    return bool(apart <= 16 * torch.finfo(like.dtype).eps * whole.abs().max())

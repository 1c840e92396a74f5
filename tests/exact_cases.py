"""The correction of log-sum-exps on the sums of tensor cores, emulated: `test_exact.py` runs this in Triton's interpreter.

The logits of 200 rows are what a tensor core makes of them; all are corrected by the kernel's steps in torch, some by
`finish_kernel` itself, which must agree. Truth is fp64 on the same bf16 operands. Logits reach +-25, V is divided by no tile.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fused_rlhf.kernels.interface import Projection, Stats
from fused_rlhf.kernels.linear_logprobs import Partials, RowBlock, launch_finish
from fused_rlhf.kernels.tiles import TILES, Tile
from tests.tensor_core import AMPERE, HOPPER, TensorCore

CONTRACT = 5e-5  # nats
ROWS, V = 200, 4099
LIKELY = 8  # tokens of a row whose logits are chosen, before as many as UNLIKELY
UNLIKELY = 4
CORES = {"sm_90": HOPPER, "sm_100": HOPPER, "sm_80": AMPERE, "sm_89": AMPERE}
Inputs = tuple[Tensor, Tensor, Tensor]  # x (ROWS, H), w (V, H), tokens (ROWS, LIKELY + UNLIKELY)


def planted(H: int, g: torch.Generator, tokens: Tensor | None = None, logits: Tensor | None = None) -> Inputs:
    """Rows of which one token, several or many are likely, and four are at -25."""
    w = torch.randn(V, H, generator=g) * H**-0.5
    u = torch.rand(ROWS, LIKELY, generator=g)
    kind = torch.arange(ROWS)[:, None] % 3
    likely = torch.where(kind == 0, 6 + 8 * u, torch.where(kind == 1, 22 + 3 * u, 8 + 4 * u))
    likely[:, :1] = torch.where(kind == 0, torch.tensor(25.0), likely[:, :1])
    if logits is not None:
        likely[:, : logits.shape[1]] = logits
    if tokens is None:
        tokens = torch.rand(ROWS, V, generator=g).topk(LIKELY + UNLIKELY).indices
    x = torch.zeros(ROWS, H)
    for k, value in enumerate(torch.cat([likely, torch.full((ROWS, UNLIKELY), -25.0)], 1).T):
        row = w[tokens[:, k]]
        x += value[:, None] * row / row.square().sum(1, keepdim=True)
    return x, w, tokens


def with_outliers(inputs: Inputs, channels: slice, g: torch.Generator) -> Inputs:
    """A few channels that add +20 to every logit and as many in the last quarter that take it away again."""
    x, w, tokens = inputs
    for some, sign in ((channels, 1.0), (slice(-8, -4), -1.0)):
        x[:, some] = sign * 50.0
        w[:, some] = 0.1 + 0.01 * torch.randn(V, 4, generator=g)
    return x, w, tokens


def near_ties(H: int, g: torch.Generator) -> Inputs:
    """The two highest logits within one tile, 1e-7 to 1e-2 apart."""
    tokens = torch.rand(ROWS, V, generator=g).topk(LIKELY + UNLIKELY).indices
    tokens[:, 1] = tokens[:, 0] ^ 1  # the neighbour, in the same tile whatever its width
    tokens[:, 1].clamp_(max=V - 1)
    gap = 10 ** (-7 + 5 * torch.rand(ROWS, generator=g))
    high = 24.9 * torch.ones(ROWS)
    return planted(H, g, tokens, torch.stack([high, high - gap], 1))


def spread(H: int, g: torch.Generator, size: float) -> Inputs:
    x = torch.randn(ROWS, H, generator=g) * (size * H**-0.5)
    w = torch.randn(V, H, generator=g)
    tokens = (x @ w.T).topk(LIKELY + UNLIKELY).indices
    return x, w, tokens


def inputs_of(kind: str, H: int) -> Inputs:
    g = torch.Generator().manual_seed(H)
    if kind.startswith("outliers"):
        middle = H // 2
        where = {"first": slice(0, 4), "middle": slice(middle, middle + 4), "last": slice(H - 4, H)}
        return with_outliers(planted(H, g), where[kind.split()[1]], g)
    if kind == "log-normal channels":
        x, w, tokens = planted(H, g)
        size = torch.exp(1.5 * torch.randn(H, generator=g))
        return x * size, w / size, tokens
    if kind == "near ties":
        return near_ties(H, g)
    return planted(H, g) if kind == "planted" else spread(H, g, 4.0)


KINDS = (
    "planted",
    "outliers first",
    "outliers middle",
    "outliers last",
    "log-normal channels",
    "near ties",
    "flat",
)


def partials_of(z: Tensor, tile: Tile) -> Partials:
    """What `stats_kernel` leaves of logits (n, V): scores, z log2 e."""
    tiles = -(-V // tile.block_v)
    padded = torch.nn.functional.pad(z, (0, tiles * tile.block_v - V), value=-torch.inf).view(len(z), tiles, -1)
    padded = padded * math.log2(math.e)
    m, column = padded.max(2)
    total = (padded - m[:, :, None]).exp2().sum(2)
    columns = column + tile.block_v * torch.arange(tiles)
    return Partials(torch.stack([m, total, columns.float()]), (), tile.exact)


def finished(x: Tensor, w: Tensor, targets: Tensor, partials: Partials) -> Stats:
    rows = RowBlock(
        x.float(), targets.contiguous(), torch.ones(len(targets))
    )  # the interpreter knows no bf16; the numbers are bf16's
    return launch_finish(rows, Projection(w.float()), partials)[0]


def corrected(x: Tensor, w: Tensor, targets: Tensor, partials: Partials) -> tuple[Tensor, Tensor]:
    """The log-prob and lse of `finish_kernel`, (n,), step by step."""
    m, total, columns = partials.values
    top = m.amax(1)
    log_s = (torch.exp2(m - top[:, None]) * total).sum(1).log()
    highest, tile = m.sort(dim=1, descending=True, stable=True)
    highest, tile = highest[:, : partials.exact], tile[:, : partials.exact]
    tokens = torch.cat([columns.gather(1, tile).long(), targets[:, None]], 1)
    scores = torch.einsum("nh,nkh->nk", x.float(), w[tokens].float()) * math.log2(math.e)
    off, weight = scores[:, :-1] - highest, torch.exp2(highest - top[:, None])
    base = off[:, 0]
    lift = (weight * (off - base[:, None])).sum(1) / weight.sum(1)
    logprob = (scores[:, -1] - top - base - lift) * math.log(2) - log_s
    return logprob, (top + base + lift) * math.log(2) + log_s


@pytest.mark.parametrize("H", [896, 2048, 4096, 8192])
@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_are_within_the_contract(kind: str, H: int) -> None:
    x, w, tokens = (t.bfloat16() if t.is_floating_point() else t for t in inputs_of(kind, H))
    g = torch.Generator().manual_seed(1)
    chosen = torch.randint(LIKELY + UNLIKELY, (ROWS, 1), generator=g)
    anywhere = torch.randint(V, (ROWS,), generator=g)
    targets = torch.where(torch.arange(ROWS) % 4 == 3, anywhere, tokens.gather(1, chosen)[:, 0])
    logits = x.double() @ w.double().T
    true, true_lse = torch.log_softmax(logits, 1), torch.logsumexp(logits, 1)
    asked = true.gather(1, targets[:, None])[:, 0]
    emulated = {core: core.products(x, w) for core in set(CORES.values())}
    some = torch.arange(0, ROWS, 70)
    for arch, core in CORES.items():
        z = emulated[core]
        partials = partials_of(z, TILES["stats", arch, "half"])
        logprobs, lse = corrected(x, w, targets, partials)
        error = max(worst(logprobs, asked), worst(lse, true_lse))
        bare = worst(torch.log_softmax(z.double(), 1), true)
        print(f"{arch} H={H} {kind}: {error:.1e}, without correction {bare:.1e}, |z| {logits.abs().max():.1f}")
        assert error <= CONTRACT, f"{arch}: {error:.1e}"
        if kind != "flat" and H >= 4096:
            assert bare > CONTRACT  # else this case proves nothing

        few = replace(partials, values=partials.values[:, some].contiguous())
        stats = finished(x[some], w, targets[some], few)
        assert worst(stats.logprobs, logprobs[some].double()) <= 1e-5
        assert worst(stats.lse, lse[some].double()) <= 1e-5
        assert (stats.logprobs <= 0).all()


def worst(found: Tensor, true: Tensor) -> float:
    return (found.double() - true).abs().max().item()


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    x, w, tokens = (t.bfloat16() if t.is_floating_point() else t for t in inputs_of("planted", 896))
    z, tile = HOPPER.products(x[:10], w), TILES["stats", "sm_90", "half"]
    whole = finished(x[:10], w, tokens[:10, 0], partials_of(z, tile))
    some = torch.arange(9, -1, -3)
    alone = finished(x[some], w, tokens[some, 0], partials_of(z[some], tile))
    for name in ("logprobs", "lse", "normaliser"):
        assert torch.equal(getattr(whole, name)[some], getattr(alone, name))

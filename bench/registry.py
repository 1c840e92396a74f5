"""What is measured: cases, ops and providers, each declared in one place.

A case is a shape and what the batch looks like. An op says what is computed from it and how many matrix products of
2 N V H operations that takes at least. A provider computes per-token log-probs or the whole loss from the same tensors;
ours, dense torch and other libraries are all providers. Nothing here knows about clocks or processes (see run.py).

Inputs. The logits of a trained model are peaked on most tokens and flat on some; random hidden states give neither, and
flatter whatever skips small probabilities. Here W has rows of norm about 1 and each hidden state is a combination of
candidate rows of W, so that the candidates' logits are (to within the overlap of random rows) the numbers below:

    60 % peaked      one candidate at 25, seven in [6, 14]
    25 % uncertain   eight candidates in [22, 25]: where rounded logits hurt most
    15 % flat        eight candidates in [8, 12]: the other tokens together hold most of the mass

and, in every row, four more tokens at -25. Targets are drawn from the candidates' softmax. Rows beyond `BASE_ROWS`
repeat the first ones, so that one fp64 reference serves every N. The resulting entropy is recorded beside the figures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BASE_ROWS = 2048
EPSILON = 0.2


# ------------------------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """One problem: N tokens in sequences of T, hidden size H, vocabulary V."""

    op: str = "grpo"
    N: int = 2048
    H: int = 896
    V: int = 151936
    T: int = 256
    dtype: str = "fp32"
    beta: float = 0.04  # weight of the KL to the reference; 0 leaves the reference out
    zero_rows: float = 0.0  # share of the tokens, scattered, whose advantage is exactly zero
    frozen_head: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise ValueError(f"op must be one of {sorted(OPS)}, got {self.op!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {sorted(DTYPES)}, got {self.dtype!r}")
        if min(self.N, self.H, self.V, self.T) < 1 or self.N % self.T:
            raise ValueError(f"N, H, V, T must be positive and T divide N, got {self.N}, {self.H}, {self.V}, {self.T}")

    @property
    def products(self) -> int:
        """Matrix products of 2 N V H operations that the op cannot do without."""
        return 1 if not OPS[self.op].backward else 2 if self.frozen_head else 3

    @property
    def flops(self) -> int:
        return self.products * 2 * self.N * self.V * self.H

    @property
    def label(self) -> str:
        extra = [f"beta={self.beta:g}"] if self.op == "grpo" else []
        extra += [f"{self.zero_rows:.0%} zero advantage"] if self.zero_rows else []
        extra += ["frozen head"] if self.frozen_head else []
        return ", ".join([f"{self.op} N={self.N} H={self.H} V={self.V} {self.dtype}", *extra])


# ------------------------------------------------------------------------------------------------------------ inputs


class Reference(NamedTuple):
    """fp64 results of the base rows, from the very operands the providers get."""

    logprobs: Tensor  # (base,)
    lse: Tensor  # (base,)
    entropy: Tensor  # (base,)


@dataclass
class Inputs:
    """What every provider gets; the vectors are fp32, (N,)."""

    case: Case
    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    targets: Tensor  # (N,)
    advantages: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor | None  # None when beta is 0
    upstream: Tensor  # of the log-probs, for the op without an objective

    def sequences(self, rows: Tensor) -> Tensor:
        """(N, ...) -> (B, T, ...)"""
        return rows.view(-1, self.case.T, *rows.shape[1:])

    def first(self, count: int) -> Inputs:
        """The same head with the first few rows as one sequence: a cheap warm-up."""
        count = min(count, self.case.N)
        rows = [self.targets, self.advantages, self.old_logprobs, self.ref_logprobs, self.upstream]
        short = Case(**{**vars(self.case), "N": count, "T": count})
        hidden = self.hidden.detach()[:count].clone().requires_grad_()
        return Inputs(short, hidden, self.weight, *(None if r is None else r[:count] for r in rows))  # type: ignore[arg-type]


def head_and_rows(case: Case, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """(V, H) weight, (base, H) hidden, (base,) targets; the recipe is in the module docstring."""
    rng = torch.Generator(device).manual_seed(case.seed)
    randn = partial(torch.randn, generator=rng, device=device)
    rand = partial(torch.rand, generator=rng, device=device)
    base = min(case.N, BASE_ROWS)
    weight = randn(case.V, case.H).mul_(case.H**-0.5)

    kind = rand(base, 1)
    peaked, uncertain = kind < 0.60, (kind >= 0.60) & (kind < 0.85)
    u = rand(base, 8)
    logits = torch.where(peaked, 6 + 8 * u, torch.where(uncertain, 22 + 3 * u, 8 + 4 * u))
    logits[:, :1] = torch.where(peaked, 25.0, logits[:, :1])
    wanted = torch.cat([logits, torch.full((base, 4), -25.0, device=device)], 1)
    tokens = torch.randint(case.V, wanted.shape, generator=rng, device=device)
    hidden = torch.zeros(base, case.H, device=device)
    for k in range(wanted.shape[1]):  # one candidate at a time: (base, 12, H) would be large
        row = weight[tokens[:, k]]
        hidden += wanted[:, k : k + 1] * row / row.square().sum(1, keepdim=True)
    gumbel = -(-rand(base, 8).clamp_min(1e-9).log()).log()
    targets = tokens.gather(1, (logits + gumbel).argmax(1, keepdim=True)).squeeze(1)
    dtype = DTYPES[case.dtype]
    return weight.to(dtype), hidden.to(dtype), targets


def fp64_reference(case: Case, device: str) -> Reference:
    """Log-softmax in fp64, 8192 columns of W at a time."""
    weight, hidden, targets = head_and_rows(case, device)
    x = hidden.double()
    peak = torch.full((len(x),), -torch.inf, dtype=torch.float64, device=device)
    total, moment, target = torch.zeros_like(peak), torch.zeros_like(peak), torch.zeros_like(peak)
    for start in range(0, case.V, 8192):
        z = x @ weight[start : start + 8192].double().T
        here = (targets >= start) & (targets < start + z.shape[1])
        column = (targets - start).clamp(0, z.shape[1] - 1)
        target = torch.where(here, z.gather(1, column[:, None]).squeeze(1), target)
        higher = torch.maximum(peak, z.amax(1))
        p = (z - higher[:, None]).exp_()
        shrink = (peak - higher).exp()
        total = total * shrink + p.sum(1)
        moment = moment * shrink + p.mul_(z).sum(1)
        peak = higher
    lse = peak + total.log()
    return Reference(target - lse, lse, lse - moment / total)


def build(case: Case, device: str, reference: Reference) -> Inputs:
    """The tensors of a case; old and reference log-probs are the exact ones plus noise."""
    weight, base, targets = head_and_rows(case, device)
    rng = torch.Generator(device).manual_seed(case.seed + 1)
    noise = partial(torch.randn, generator=rng, device=device)
    exact = tile(reference.logprobs, case.N).float()
    advantages = noise(case.N // case.T).repeat_interleave(case.T)
    silent = torch.randperm(case.N, generator=rng, device=device)[: round(case.zero_rows * case.N)]
    advantages[silent] = 0.0
    return Inputs(
        case,
        hidden=tile(base, case.N).requires_grad_(),
        weight=weight.requires_grad_(not case.frozen_head),
        targets=tile(targets, case.N),
        advantages=advantages,
        old_logprobs=exact + 0.1 * noise(case.N),  # off-policy: some of the tokens are clipped
        ref_logprobs=exact + 0.1 * noise(case.N) if case.beta else None,
        upstream=noise(case.N) / case.N,
    )


def tile(rows: Tensor, count: int) -> Tensor:
    """(base, ...) -> (count, ...), repeating; a copy."""
    index = torch.arange(count, device=rows.device) % len(rows)
    return rows[index]


# --------------------------------------------------------------------------------------------------------------- ops


@dataclass(frozen=True)
class Op:
    """`loss` maps (N,) log-probs to the scalar that is differentiated; None: log-probs alone, no gradient."""

    name: str
    loss: Callable[[Tensor, Inputs], Tensor] | None

    @property
    def backward(self) -> bool:
        return self.loss is not None


def weighted_sum(logprobs: Tensor, inputs: Inputs) -> Tensor:
    return (logprobs * inputs.upstream.to(logprobs.dtype)).sum()


def grpo(logprobs: Tensor, inputs: Inputs) -> Tensor:
    """Clipped surrogate + beta k3, mean over each sequence and over sequences, which have one length here."""
    advantages = inputs.advantages.to(logprobs.dtype)
    ratio = (logprobs - inputs.old_logprobs).exp()
    loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - EPSILON, 1 + EPSILON) * advantages)
    if inputs.ref_logprobs is not None:
        difference = inputs.ref_logprobs - logprobs
        loss = loss + inputs.case.beta * (difference.exp() - difference - 1)
    return loss.mean()


OPS = {
    op.name: op
    for op in (
        Op("logprobs_fwd", None),
        Op("logprobs_fwd_bwd", weighted_sum),
        Op("grpo", grpo),
    )
}


# --------------------------------------------------------------------------------------------------------- providers


class Output(NamedTuple):
    """Of one forward. `backward` defaults to `loss.backward`."""

    loss: Tensor | None = None
    logprobs: Tensor | None = None
    backward: Callable[[], object] | None = None


Step = Callable[[], "Tensor | Output"]


class Tolerance(NamedTuple):
    """What a provider promises against fp64; beyond it the row is marked wrong."""

    logprob: float  # max abs, nats
    gradient: float  # |error| / |truth|, Frobenius


# Ours: the numerics contract, and a gradient of a few roundings to its dtype.
CONTRACT = {"fp32": Tolerance(5e-5, 1e-4), "bf16": Tolerance(5e-5, 1e-2)}
# fp32 logits in another library: torch's own log-softmax over 152k columns is off by 1e-4 in fp32.
FP32_LOGITS = {"fp32": Tolerance(5e-4, 1e-3), "bf16": Tolerance(5e-4, 1e-2)}
# bf16 resolves 0.125 at a logit of 25; a log-prob that far off also carries some tokens across the clip.
ROUNDED = {"fp32": FP32_LOGITS["fp32"], "bf16": Tolerance(0.5, 0.5)}


@dataclass(frozen=True)
class Provider:
    """`setup(inputs)` imports what it needs and returns the forward: (N,) log-probs, or an `Output` with the loss."""

    name: str
    setup: Callable[[Inputs], Step]
    packages: tuple[str, ...] = ("torch",)
    ops: tuple[str, ...] = tuple(OPS)
    tolerance: dict[str, Tolerance] = field(default_factory=lambda: CONTRACT)
    roof: bool = False  # bare matrix products: a yardstick, nothing to check

    def step(self, inputs: Inputs) -> Callable[[], Output]:
        if inputs.case.op not in self.ops:
            raise ValueError(f"{self.name} has no {inputs.case.op}; it has {', '.join(self.ops)}")
        compute, loss = self.setup(inputs), OPS[inputs.case.op].loss

        def run() -> Output:
            result = compute()
            if isinstance(result, Output):
                return result
            return Output(None if loss is None else loss(result, inputs), result)

        return run


PROVIDERS: dict[str, Provider] = {}


def provider(name: str, **fields: object) -> Callable[[Callable[[Inputs], Step]], Callable[[Inputs], Step]]:
    def register(setup: Callable[[Inputs], Step]) -> Callable[[Inputs], Step]:
        PROVIDERS[name] = Provider(name, setup, **fields)  # type: ignore[arg-type]
        return setup

    return register


@provider("dense", tolerance=ROUNDED)
def dense(inputs: Inputs) -> Step:
    """The best plain torch has in the operands' dtype."""

    def run() -> Tensor:
        logits = (inputs.hidden @ inputs.weight.T).float()
        return -F.cross_entropy(logits, inputs.targets, reduction="none")

    return run


@provider("dense-fp32", tolerance=FP32_LOGITS)
def dense_fp32(inputs: Inputs) -> Step:
    """Dense torch with fp32 logits: the operands are converted first."""

    def run() -> Tensor:
        logits = inputs.hidden.float() @ inputs.weight.float().T
        return -F.cross_entropy(logits, inputs.targets, reduction="none")

    return run


@provider("trl", packages=("trl", "torch"), tolerance=ROUNDED)
def trl(inputs: Inputs) -> Step:
    """TRL's chunked log-probs as its trainers call them (tiles 32768 columns wide), entropy off."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    def run() -> Tensor:
        options = (1.0, 32768, None, 1.0, ())  # temperature, chunk_size, softcap, logit_scale, outputs
        return ChunkedLogProbFunction.apply(inputs.hidden, inputs.weight, None, inputs.targets, *options)[0]

    return run


@provider("liger", packages=("liger_kernel", "torch"), ops=("grpo",), tolerance=ROUNDED)
def liger(inputs: Inputs) -> Step:
    """Liger's chunked GRPO loss without torch.compile; its advantages are per sequence."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    case = inputs.case
    if case.zero_rows:
        raise ValueError("liger takes one advantage per sequence; zero_rows scatters tokens")
    module = LigerFusedLinearGRPOLoss(
        beta=case.beta,
        compiled=False,
        use_ref_model=case.beta != 0,
        epsilon_low=EPSILON,
        epsilon_high=EPSILON,
        loss_type="grpo",
    )
    ref = None if inputs.ref_logprobs is None else inputs.sequences(inputs.ref_logprobs)
    mask = torch.ones_like(inputs.sequences(inputs.targets))

    def run() -> Output:
        loss, _ = module(
            inputs.sequences(inputs.hidden),
            inputs.weight,
            inputs.sequences(inputs.targets),
            mask,
            inputs.sequences(inputs.advantages)[:, 0],
            ref_per_token_logps=ref,
            old_per_token_logps=inputs.sequences(inputs.old_logprobs),
        )
        return Output(loss)

    return run


@provider("gemm", roof=True)
def gemm(inputs: Inputs) -> Step:
    """The bare products, whole, into buffers made beforehand: X W^T, then dZ W and dZ^T X. No softmax, nothing else."""
    x, w = inputs.hidden.detach(), inputs.weight.detach()
    z, dx = x.new_empty(len(x), len(w)), torch.empty_like(x)
    dw = None if inputs.case.frozen_head else torch.empty_like(w)

    def backward() -> None:
        torch.mm(z, w, out=dx)
        if dw is not None:
            torch.mm(z.T, x, out=dw)

    def run() -> Output:
        torch.mm(x, w.T, out=z)
        return Output(backward=backward)

    return run


@provider("gemm-blocked", roof=True)
def gemm_blocked(inputs: Inputs) -> Step:
    """The same products, 512 rows at a time: on a CPU faster than whole ones, and possible at any N."""
    x, w = inputs.hidden.detach().split(512), inputs.weight.detach()
    z, dx = x[0].new_empty(len(x[0]), len(w)), torch.empty_like(x[0])
    dw = None if inputs.case.frozen_head else torch.zeros_like(w)

    def backward() -> None:
        for block in x:
            torch.mm(z[: len(block)], w, out=dx[: len(block)])
            if dw is not None:
                dw.addmm_(z[: len(block)].T, block)

    def run() -> Output:
        for block in x:
            torch.mm(block, w.T, out=z[: len(block)])
        return Output(backward=backward)

    return run


def ours(inputs: Inputs, *, backend: str, mode: str, rounded: bool) -> Step:
    import fused_rlhf as fr

    if inputs.case.op != "grpo":
        logprobs = partial(fr.linear_logprobs, backend=backend, round_logits=rounded)
        return lambda: logprobs(inputs.hidden, inputs.weight, inputs.targets).logprobs
    objective = fr.GRPO(beta=inputs.case.beta, epsilon_low=EPSILON, epsilon_high=EPSILON)
    ref = None if inputs.ref_logprobs is None else inputs.sequences(inputs.ref_logprobs)

    def run() -> Output:
        loss, _ = fr.linear_policy_loss(
            inputs.sequences(inputs.hidden),
            inputs.weight,
            inputs.sequences(inputs.targets),
            advantages=inputs.sequences(inputs.advantages),
            old_logprobs=inputs.sequences(inputs.old_logprobs),
            ref_logprobs=ref,
            objective=objective,
            backend=backend,
            mode=mode,  # type: ignore[arg-type]
            round_logits=rounded,
        )
        return Output(loss)

    return run


# ours[-BACKEND][-MODE][-rounded]; without a backend it is "auto", without a mode likewise.
for _backend in ("auto", "triton", "chunked", "reference"):
    for _mode in ("auto", "one_pass", "two_phase"):
        for _rounded in (False, True):
            _parts = ["ours", *(p for p in (_backend, _mode) if p != "auto"), *(["rounded"] if _rounded else [])]
            provider(
                "-".join(_parts),
                packages=("fused-rlhf", "torch", "triton"),
                ops=tuple(OPS) if _mode == "auto" else ("grpo",),
                tolerance=ROUNDED if _rounded else CONTRACT,
            )(partial(ours, backend=_backend, mode=_mode, rounded=_rounded))


# ---------------------------------------------------------------------------------------------------------- accuracy


def errors(inputs: Inputs, reference: Reference, output: Output, samples: int = 64) -> dict[str, float]:
    """Of one run against fp64: every log-prob, the loss, `samples` rows of dX and 2 x `samples` rows of dW.

    With g = dloss/dlogprob:  dX[n] = g_n (W[y_n] - sum_v p_nv W[v])   and   dW[v] = sum_n g_n (1[v = y_n] - p_nv) X[n],
    p from the fp64 logsumexp. Gradients are read from `.grad` of the inputs.
    """
    case, device = inputs.case, inputs.hidden.device
    found: dict[str, float] = {}
    logprobs = tile(reference.logprobs, case.N).requires_grad_()
    if output.logprobs is not None:
        found["logprob_max_abs"] = (output.logprobs.detach().double() - logprobs.detach()).abs().max().item()
    objective = OPS[case.op].loss
    if objective is None:
        return found
    loss = objective(logprobs, inputs)
    (g,) = torch.autograd.grad(loss, logprobs)
    if output.loss is not None:
        found["loss_abs"] = (output.loss.detach().double() - loss.detach()).abs().item()

    lse, w, x = tile(reference.lse, case.N), inputs.weight.detach(), inputs.hidden.detach()
    rows = torch.linspace(0, case.N - 1, min(samples, case.N), device=device).long()
    truth = w[inputs.targets[rows]].double()
    for start in range(0, case.V, 8192):
        part = w[start : start + 8192].double()
        truth -= (x[rows].double() @ part.T - lse[rows, None]).exp() @ part
    found |= _distance("dhidden", inputs.hidden.grad, rows, truth * g[rows, None])

    if inputs.weight.requires_grad:
        spread = torch.linspace(0, case.V - 1, samples, device=device).long()
        columns = torch.cat([inputs.targets[rows], spread]).unique()
        truth = torch.zeros(len(columns), case.H, dtype=torch.float64, device=device)
        for start in range(0, case.N, 2048):
            block = slice(start, start + 2048)
            xs = x[block].double()
            p = (xs @ w[columns].double().T - lse[block, None]).exp()
            hit = (inputs.targets[block, None] == columns).double()
            truth += (g[block, None] * (hit - p)).T @ xs
        found |= _distance("dweight", inputs.weight.grad, columns, truth)
    return found


def _distance(name: str, grad: Tensor | None, rows: Tensor, truth: Tensor) -> dict[str, float]:
    if grad is None:
        raise RuntimeError(f"no gradient arrived for {name}")
    difference = grad[rows].double() - truth
    return {
        f"{name}_rel": (difference.norm() / truth.norm().clamp_min(1e-300)).item(),
        f"{name}_max_abs": difference.abs().max().item(),
    }


def within(found: dict[str, float], tolerance: Tolerance) -> bool:
    """Whether every measured error keeps the promise; NaN never does. The loss is a mean of at most O(1) per nat."""
    limits = {
        "logprob_max_abs": tolerance.logprob,
        "loss_abs": tolerance.logprob,
        "dhidden_rel": tolerance.gradient,
        "dweight_rel": tolerance.gradient,
    }
    return all(found[key] <= limit for key, limit in limits.items() if key in found)

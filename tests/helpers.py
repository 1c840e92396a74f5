"""Inputs and dense truth shared by the tests of the op."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_rlhf.kernels.interface import Projection, Stats
from fused_rlhf.kernels.statistics import OUTPUTS
from fused_rlhf.kernels.transforms import Curve, Transform

ALL_OUTPUTS = ("entropy", "lse", "sum_sq", "mean_logit", "max_logit", "argmax", "is_top1", "margin")

# (bias, logit_scale, softcap, temperature per token): each transform alone, and together.
TRANSFORMS = [
    (False, 1.0, None, False),
    (True, 1.0, None, False),
    (False, 0.25, None, False),
    (False, 1.0, 5.0, False),
    (False, 1.0, None, True),
    (True, 0.7, 5.0, True),
]


def inputs(
    n: int,
    h: int,
    v: int,
    dtype: torch.dtype = torch.float64,
    bias: bool = False,
    per_token: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """hidden, weight, targets, bias and temperature; logits of a few units, as in a trained model."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "hidden": (2 * randn(n, h)).to(dtype),
        "weight": (randn(v, h) / h**0.5).to(dtype),
        "targets": torch.randint(v, (n,), generator=generator),
        "bias": randn(v).to(dtype) if bias else None,
        "temperature": torch.rand(n, generator=generator, dtype=torch.float64) + 0.5 if per_token else 1.0,
    }


def plausible_logits(n: int, v: int, dtype: torch.dtype, h: int = 64) -> dict[str, Any]:
    """Logits up to about +-25 with eight plausible tokens a row: where rounded logits are at their worst."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(v, h, generator=generator, dtype=torch.float64)
    weight /= weight.norm(dim=1, keepdim=True)
    # The mean direction of eight tokens makes those eight likely, the first at 25.
    likely = torch.randint(v, (n, 8), generator=generator)
    direction = weight[likely].mean(1)
    hidden = 25.0 * direction / (direction @ weight.T).amax(1, keepdim=True)
    choice = torch.randint(8, (n, 1), generator=generator)
    return {"hidden": hidden.to(dtype), "weight": weight.to(dtype), "targets": likely.gather(1, choice).squeeze(1)}


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def dense_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: Any, logit_scale: float, softcap: float | None
) -> Tensor:
    z = hidden @ weight.T
    if bias is not None:
        z = z + bias
    z = z * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / (temperature[..., None] if isinstance(temperature, Tensor) else temperature)


def dense(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    temperature: Any = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> dict[str, Tensor]:
    """Every output by torch's own log_softmax, differentiable by autograd."""
    z = dense_logits(hidden, weight, bias, temperature, logit_scale, softcap)
    log_p = torch.log_softmax(z, -1)
    p = log_p.exp()
    return {
        "logprobs": log_p.gather(-1, targets[..., None]).squeeze(-1),
        "entropy": -(p * log_p).sum(-1),
        "lse": torch.logsumexp(z, -1),
        "sum_sq": p.square().sum(-1),
        "mean_logit": z.mean(-1),
        "max_logit": z.max(-1).values,  # whose gradient is that of the first of the largest; amax shares it out
        "argmax": z.argmax(-1),
        "is_top1": z.argmax(-1) == targets,
        "margin": z.topk(2, -1).values.diff(dim=-1).neg().squeeze(-1),
    }


def projection(
    weight: Tensor, bias: Tensor | None = None, logit_scale: float = 1.0, softcap: float | None = None, **options: Any
) -> Projection:
    """A head as backends take it, computing in the weight's dtype unless `options` say otherwise."""
    transform = Transform(logit_scale) if softcap is None else Transform(logit_scale, "softcap", softcap)
    return Projection(weight, bias, transform, **{"compute_dtype": weight.dtype, **options})


def listed(stats: Stats) -> list[Tensor]:
    """Log-probs and statistics, in the order of the records."""
    return [stats.logprobs, *(stats[name] for name in OUTPUTS if name == "lse" or name in stats.extra)]


def _hardcap(u: Tensor, cap: float, temperature: Tensor, out: Tensor | None) -> Tensor:
    return torch.div(torch.clamp(u, -cap, cap, out=out), temperature, out=out)


def _hardcap_slope(z: Tensor, cap: float, temperature: Tensor) -> Tensor:
    return ((z * temperature).abs() < cap * (1 - 1e-6)).to(z.dtype)


# A second curve, as someone may register one: logits cut at +-cap.
HARDCAP = Curve(_hardcap, _hardcap_slope, of_saturation=abs)


def worst(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).abs().max().item()


def relative(found: Tensor, truth: Tensor) -> float:
    """||found - truth|| / ||truth||"""
    return ((found.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-300)).item()


def placed(data: dict[str, Any], device: str) -> dict[str, Any]:
    """The tensors among these, on a device."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in data.items()}


def passes_in_the_interpreter(*arguments: str) -> None:
    """Has pytest run these files by Triton's interpreter, which must be chosen before triton is imported: in a process of
    its own, from the root of the checkout."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parent.parent
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert " passed" in run.stdout

"""From the products of a head to its logits.

    u = logit_scale (h W^T + b)          z = curve(u) / temperature          without a curve z = u / temperature

A curve is spelt once in torch, here, and once in Triton, in `primitives.CURVES`; backends, divergence and the probe of a
model's head use those. With parameter c:

    softcap    c tanh(u / c)             slope 1 - tanh(u / c)^2

This file needs torch alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Curve:
    """A function of the scaled products, elementwise, with one parameter."""

    # (u (n, v), parameter, temperature (n, 1), out) -> curve(u) / temperature; into `out` where it is given, which may be u.
    apply: Callable[[Tensor, float, Tensor, Tensor | None], Tensor]
    # (z (n, v), parameter, temperature (n, 1)) -> d curve / du, from the logits.
    slope: Callable[[Tensor, float, Tensor], Tensor]
    # The parameter, from the size of the curve's values far from 0; None: a model's curve cannot be told from them.
    of_saturation: Callable[[float], float] | None = None


def _softcap(u: Tensor, cap: float, temperature: Tensor, out: Tensor | None) -> Tensor:
    return torch.mul(torch.tanh(torch.div(u, cap, out=out), out=out), cap / temperature, out=out)


def _softcap_slope(z: Tensor, cap: float, temperature: Tensor) -> Tensor:
    return 1 - (z * (temperature / cap)).square_()


CURVES: dict[str, Curve] = {"softcap": Curve(_softcap, _softcap_slope, of_saturation=abs)}


@dataclass(frozen=True)
class Transform:
    """What a head does to its products h W^T + b."""

    logit_scale: float = 1.0
    curve: str = ""  # a name in CURVES; "": none
    parameter: float = 0.0  # of the curve

    def apply(self, u: Tensor, temperature: Tensor, out: Tensor | None = None) -> Tensor:
        """Logits (n, v) of scaled products; temperature (n,)."""
        if not self.curve:
            return torch.div(u, temperature[:, None], out=out)
        return CURVES[self.curve].apply(u, self.parameter, temperature[:, None], out)

    def slope(self, z: Tensor, temperature: Tensor) -> Tensor | None:
        """(n, v) d curve / du at these logits; None where there is no curve."""
        if not self.curve:
            return None
        return CURVES[self.curve].slope(z, self.parameter, temperature[:, None])

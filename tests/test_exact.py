"""The sums of tensor cores, emulated, and what is left of their error in a log-prob."""

from __future__ import annotations

import math
import os
from fractions import Fraction

import pytest
import torch

pytest.importorskip("triton")

from tests.helpers import passes_in_the_interpreter
from tests.tensor_core import AMPERE, HOPPER, TensorCore, compiler


@pytest.fixture(autouse=True)
def needs_a_compiler() -> None:
    if compiler() is None and not os.environ.get("CI"):
        pytest.skip("no C compiler; where CI is set this fails")
    assert compiler() is not None, "no C compiler"


def sum_of(core: TensorCore, x: list[float], w: list[float]) -> Fraction:
    """The same model once more, in exact numbers."""

    def exponent(value: float) -> int:
        return math.frexp(value)[1] - 1 if value else -126

    def cut(value: Fraction, bits: int, top: int) -> Fraction:
        return Fraction(math.trunc(value * Fraction(2) ** (bits - top))) / Fraction(2) ** (bits - top)

    total = Fraction(0)
    for k in range(0, len(x), core.step):
        pairs = [pair for pair in zip(x[k : k + core.step], w[k : k + core.step]) if pair[1]]
        top = max([exponent(float(total)), *(exponent(a) + exponent(b) for a, b in pairs)])
        step = cut(total, core.fraction, top)
        for a, b in pairs:
            step += cut(Fraction(a) * Fraction(b), core.fraction, top)
        total = cut(step, 23, exponent(float(step)))  # to fp32, cut as well
    return total


@pytest.mark.parametrize("core", [HOPPER, AMPERE])
def test_the_emulator_is_its_model_to_the_bit(core: TensorCore) -> None:
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 64, generator=g) * torch.exp2(torch.randint(-6, 6, (n, 64), generator=g)) for n in (9, 70))
    x[0, ::3], w[5, ::2] = 0.0, 0.0
    x, w = x.bfloat16(), w.bfloat16()
    found = core.products(x, w)
    for i in range(len(x)):
        for j in range(0, len(w), 7):
            assert Fraction(found[i, j].item()) == sum_of(core, x[i].tolist(), w[j].tolist())
    assert not torch.equal(found, x.float() @ w.float().T)  # fp32 sums are others


@pytest.mark.slow
def test_log_probs_of_emulated_sums_in_the_interpreter() -> None:
    passes_in_the_interpreter("tests/exact_cases.py")

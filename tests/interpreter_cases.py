"""The Triton backend against fp64, in Triton's interpreter: `test_linear_logprobs.py` sets TRITON_INTERPRET=1.

Scratch comes poisoned with NaN. Every comparison is `error <= 2 x (torch's own error in the same dtype) + 1e-5`, the
errors relative to the largest true value; fp16 operands add fp16's own step, since dlogits are rounded to it. bf16
products are wrong in the interpreter, so fp32 and fp16 stand for all dtypes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

import fused_rlhf as fr
from fused_rlhf.backends import reference
from fused_rlhf.kernels import objectives as twins
from fused_rlhf.kernels import ops, primitives, tiles, transforms
from fused_rlhf.kernels.interface import (
    Grads,
    Needs,
    Projection,
    Rows,
    Stats,
    TokenGrads,
    kept_blocks,
    rows_of_blocks,
)
from fused_rlhf.kernels.statistics import OUTPUTS
from fused_rlhf.kernels.transforms import Transform
from fused_rlhf.objectives import (
    CISPO,
    DAPO,
    GSPO,
    KL_ESTIMATORS,
    LEVELS,
    PPO,
    REINFORCE,
    SAPO,
    SURROGATES,
    BoundPolicyLoss,
    PolicyLoss,
)
from fused_rlhf.objectives.registry import keywords
from fused_rlhf.preferences import PREFERENCES, BoundPreferenceLoss, PreferenceLoss
from fused_rlhf.segments import Sequences
from tests.helpers import HARDCAP, listed, projection
from tests.waits import waits_of

ALL = Needs(True, True, True)
NO_BIAS = Needs(True, True, False)


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


Arguments = tuple[Rows, Projection]


def inputs(
    N: int, H: int, V: int, *, dtype: torch.dtype = torch.float32, bias: bool = False, size: float = 1.0, **options: Any
) -> Arguments:
    g = torch.Generator().manual_seed(N * V + H)
    hidden = torch.randn(N, H, generator=g).to(dtype)
    weight = (torch.randn(V, H, generator=g) * size * 3 / H**0.5).to(dtype)
    head = projection(weight, torch.randn(V, generator=g) if bias else None, **options)
    return Rows(hidden, torch.randint(0, V, (N,), generator=g), 0.5 + torch.rand(N, generator=g)), head


def truth(rows: Rows, head: Projection) -> Arguments:
    """The same operands in fp64."""
    rounded = head.weight.to(head.compute_dtype).double()
    bias = None if head.bias is None else head.bias.double()
    wide = replace(head, weight=rounded, bias=bias, compute_dtype=torch.float64)
    return Rows(rows.hidden.to(head.compute_dtype).double(), rows.targets, rows.temperature.double()), wide


def doubled(values: TokenGrads) -> TokenGrads:
    return TokenGrads(*(v if v is None else v.double() for v in values))


def assert_close(found: Tensor | None, torchs: Tensor | None, true: Tensor | None, slack: float = 1e-5) -> None:
    if true is None:
        assert found is None
        return
    assert found is not None
    assert torchs is not None
    if not true.dtype.is_floating_point:
        assert torch.equal(found, true)
        return
    assert torch.equal(found.isnan(), true.isnan())
    size = true.nan_to_num(0, 0, 0).abs().max().clamp(min=1e-30)
    finite = true.isfinite()
    assert torch.equal(found[~finite & ~true.isnan()].double(), true[~finite & ~true.isnan()])

    def error(value: Tensor) -> float:
        return float((value.double() - true)[finite].abs().max() / size) if finite.any() else 0.0

    assert error(found) <= 2 * error(torchs) + slack, f"{error(found):.1e}, torch {error(torchs):.1e}"


def slack_of(head: Projection) -> float:
    return 1e-5 + (torch.finfo(torch.float16).eps if head.compute_dtype == torch.float16 else 0.0)


def check(arguments: Arguments, outputs: tuple[str, ...], needs: Needs = ALL, step: float = 0.0) -> Stats:
    """Forward and backward of all that `outputs` offers, against fp64; `step`: what an unfortunate rounding may cost."""
    stats = ops.statistics(*arguments, outputs)
    own, true = reference.statistics(*arguments, outputs), reference.statistics(*truth(*arguments), outputs)
    for triple in zip(listed(stats), listed(own), listed(true)):
        assert_close(*triple, 1e-5 + step)
    g = torch.Generator().manual_seed(1)
    vectors = [torch.randn(arguments[0].count, generator=g) for _ in TokenGrads._fields]
    asked = ("logprobs", *outputs)
    upstream = TokenGrads(*(vector if name in asked else None for name, vector in zip(TokenGrads._fields, vectors)))
    needs = needs._replace(bias=needs.bias and arguments[1].bias is not None)
    grads = ops.gradients(*arguments, stats, upstream, needs)
    own_grads = reference.gradients(*arguments, own, upstream, needs)
    true_grads = reference.gradients(*truth(*arguments), true, doubled(upstream), needs)
    for found, torchs, right in zip(grads, own_grads, true_grads):
        assert_close(found, torchs, right, slack_of(arguments[1]) + step)
    again = ops.gradients(*arguments, stats, upstream, needs)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(grads, again))
    return stats


@pytest.mark.parametrize("shape", [(1, 16, 33), (5, 24, 70), (37, 40, 103), (3, 8, 300)])
@pytest.mark.parametrize("outputs", [(), ("entropy",), ("sum_sq", "mean_logit"), ("lse", "is_top1"), OUTPUTS])
def test_outputs_on_ragged_shapes(shape: tuple[int, int, int], outputs: tuple[str, ...]) -> None:
    check(inputs(*shape), outputs)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", [{}, {"logit_scale": 0.3}, {"softcap": 2.5}, {"logit_scale": 1.7, "softcap": 30.0}])
def test_transforms(bias: bool, options: dict[str, Any]) -> None:
    check(inputs(19, 24, 75, bias=bias, **options), OUTPUTS)


@pytest.mark.parametrize("name", ["sum_sq", "mean_logit"])
@pytest.mark.parametrize("options", [{}, {"bias": True, "logit_scale": 0.6, "softcap": 2.5}])
def test_a_gradient_by_itself(name: str, options: dict[str, Any]) -> None:
    arguments = inputs(37, 24, 103, **options)
    stats = ops.statistics(*arguments, (name,))
    own, true = reference.statistics(*arguments, (name,)), reference.statistics(*truth(*arguments), (name,))
    upstream = TokenGrads(None)._replace(**{name: torch.linspace(-2, 1, 37)})
    needs = ALL._replace(bias=arguments[1].bias is not None)
    grads = ops.gradients(*arguments, stats, upstream, needs)
    own_grads = reference.gradients(*arguments, own, upstream, needs)
    for found, torchs, right in zip(
        grads, own_grads, reference.gradients(*truth(*arguments), true, doubled(upstream), needs)
    ):
        assert_close(found, torchs, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_all_outputs_in_one_backward(dtype: torch.dtype) -> None:
    """Of the public function, an adapter and further ids included, with a row that is left out and one that is sure."""
    (rows, head), g = inputs(19, 24, 75, dtype=dtype, bias=True), torch.Generator().manual_seed(3)
    rows.hidden[4] *= 20
    a, b = (torch.randn(*size, generator=g).to(dtype) * 0.3 for size in ((3, 24), (75, 3)))
    targets = rows.targets.index_fill(0, torch.tensor([2]), -100)
    names = ("entropy", "lse", "sum_sq", "mean_logit", "max_logit")
    upstream = {name: torch.randn(19, generator=g) for name in ("logprobs", *names)}
    ids = torch.randint(0, 75, (19, 2), generator=g)

    def run(backend: str, wide: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(wide).requires_grad_() for t in (rows.hidden, head.weight, head.bias, a, b)]
        x, w, bias, lora_a, lora_b = leaves
        found = fr.linear_logprobs(
            x, w, targets, bias, rows.temperature, softcap=4.0, outputs=names, backend=backend, ids=ids,
            lora=(lora_a, lora_b, 0.5),
        )  # fmt: skip
        loss = sum((getattr(found, name) * u).sum() for name, u in upstream.items()) + found.id_logprobs.sum()
        return [*(getattr(found, name).detach() for name in upstream), *torch.autograd.grad(loss, leaves)]

    ours, torchs, true = run("triton", dtype), run("reference", dtype), run("reference", torch.float64)
    for found, own, right in zip(ours, torchs, true):
        assert_close(found, own, right, slack_of(head))


@pytest.mark.parametrize("needs", [Needs(True, False, False), Needs(False, True, False), Needs(False, False, True)])
def test_frozen_operands(needs: Needs) -> None:
    check(inputs(19, 24, 75, bias=True), ("entropy",), needs)


def test_half_precision_operands() -> None:
    check(inputs(21, 32, 70, dtype=torch.float16), OUTPUTS)


@pytest.mark.parametrize("upstream", [1e-6, 1e4])
def test_fp16_gradients_of_any_size(upstream: float) -> None:
    arguments = inputs(21, 32, 70, dtype=torch.float16)
    stats = ops.statistics(*arguments, ())
    grads = ops.gradients(*arguments, stats, TokenGrads(torch.full((21,), upstream)), Needs(False, True, False))
    unit = reference.gradients(
        *truth(*arguments), stats.map(Tensor.double), TokenGrads(torch.ones(21).double()), Needs(False, True, False)
    )
    assert grads.weight is not None
    assert unit.weight is not None
    expected = (unit.weight * upstream).clamp(-65504, 65504)
    # fp16 itself has 11 bits above 6e-5 and steps of 6e-8 below.
    assert (grads.weight.double() - expected).abs().max() <= 2e-3 * expected.abs().max() + 6e-8


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.float32, torch.float16)])
def test_operands_of_two_dtypes_are_cast_by_blocks(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    rows, head = inputs(21, 32, 300)
    head = replace(head, weight=head.weight.to(dtypes[1]), compute_dtype=torch.float16)
    check((replace(rows, hidden=rows.hidden.to(dtypes[0])), head), ("entropy",))


@pytest.fixture(params=["descriptors", "raw", "slices"])
def other_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = tiles.TILES["stats", "interpreter", "ieee"]
    other = {
        "descriptors": replace(usual, tma=True),
        "raw": replace(usual, raw_columns=64),
        "slices": replace(usual, slices=4, group=1, programs_per_sm=0),
    }[request.param]
    monkeypatch.setattr(tiles, "TILES", dict.fromkeys(tiles.TILES, other))


@pytest.mark.usefixtures("other_tiles")
def test_other_routes_through_the_kernels() -> None:
    check(inputs(37, 40, 150, bias=True, softcap=5.0), OUTPUTS)
    check_one_pass(inputs(37, 40, 150))


def test_rows_in_several_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "ROWS", 16)
    check(inputs(37, 24, 300, bias=True), OUTPUTS)


@pytest.mark.parametrize("shift", [-120.0, 6e4, -6e4])
def test_logits_far_from_zero(shift: float) -> None:
    rows, head = inputs(9, 24, 75, bias=True)
    assert head.bias is not None
    arguments = (replace(rows, temperature=torch.ones(9)), replace(head, bias=head.bias + shift))
    # The kernels' unit is ln 2, in which fp32 may be coarser than torch's: half the distance of two neighbours.
    score = abs(shift) * math.log2(math.e)
    check(arguments, ("entropy", "sum_sq"), step=math.ulp(score) * 2**29 / 2 * math.log(2))


def test_padded_vocabulary() -> None:
    """Columns with a bias of -inf have no probability, and no gradient."""
    rows, head = inputs(9, 24, 100, bias=True)
    assert head.bias is not None
    head.bias[50:] = float("-inf")
    rows = replace(rows, targets=rows.targets % 50)
    arguments = (rows, head)
    upstream = TokenGrads(torch.ones(9), torch.ones(9))
    stats = check_forward(arguments, ("entropy", "lse"))
    grads = ops.gradients(*arguments, stats, upstream, Needs(True, True, False))
    narrow = (rows, replace(head, weight=head.weight[:50], bias=head.bias[:50]))
    expected = reference.gradients(*narrow, stats, upstream, Needs(True, True, False))
    assert grads.weight is not None
    assert grads.weight[50:].eq(0).all()
    torch.testing.assert_close(grads.weight[:50], expected.weight)
    torch.testing.assert_close(grads.hidden, expected.hidden)


def check_forward(arguments: Arguments, outputs: tuple[str, ...]) -> Stats:
    stats = ops.statistics(*arguments, outputs)
    own, true = reference.statistics(*arguments, outputs), reference.statistics(*truth(*arguments), outputs)
    for triple in zip(listed(stats), listed(own), listed(true)):
        assert_close(*triple)
    return stats


def test_nan_stays_in_its_row() -> None:
    rows, head = inputs(9, 24, 75)
    clean = ops.statistics(rows, head, ("entropy", "margin"))
    rows.hidden[4, 3] = float("nan")
    stats = ops.statistics(rows, head, ("entropy", "margin"))
    others = torch.arange(9) != 4
    assert stats.logprobs[4].isnan()
    assert stats["margin"][4].isnan()
    assert torch.equal(stats["margin"][others], clean["margin"][others])
    assert torch.equal(stats.logprobs[others], clean.logprobs[others])
    assert stats.entropy is not None
    assert clean.entropy is not None
    assert torch.equal(stats.entropy[others], clean.entropy[others])


def test_first_of_equal_logits_is_top1() -> None:
    hidden, weight = torch.ones(2, 16), torch.zeros(70, 16)
    weight[[40, 69]] = 1.0
    rows = Rows(hidden, torch.tensor([40, 69]), torch.ones(2))
    stats = ops.statistics(rows, projection(weight), ("is_top1", "margin"))
    assert stats["is_top1"].tolist() == [True, False]
    assert stats["margin"].tolist() == [0.0, 0.0]  # the two largest are equal, in two tiles
    weight[69] = 0.0
    weight[41] = 1.0  # and in one
    assert ops.statistics(rows, projection(weight), ("margin",))["margin"].tolist() == [0.0, 0.0]


def test_statistics_have_the_same_bits_in_any_company() -> None:
    rows, head = inputs(37, 40, 103)
    alone = ops.statistics(rows, head, ())
    together = ops.statistics(rows, head, OUTPUTS)
    # From a tile's first row on: numpy's own products depend on the place of a row in the tile, a GPU's do not.
    some = ops.statistics(rows.pick(slice(16, 21)), head, ("entropy",))
    assert torch.equal(alone.logprobs, together.logprobs)
    assert torch.equal(alone.logprobs[16:21], some.logprobs)
    stats, _, _ = ops.one_pass(rows, head, (), objective(37, alone.logprobs), Needs(True, True, False))
    assert torch.equal(stats.logprobs, alone.logprobs)


def objective(
    N: int,
    logprobs: Tensor,
    beta: float = 0.0,
    entropy_coef: float = 0.0,
    kl: str = "k3",
    preset: Callable[..., PolicyLoss] = DAPO,
) -> BoundPolicyLoss:
    g = torch.Generator().manual_seed(2)
    advantages = torch.randn(N, generator=g)
    advantages[1::3] = 0.0
    return preset(beta=beta, entropy_coef=entropy_coef, kl=kl).bind(
        advantages=advantages,
        sequences=Sequences.of(torch.arange(N) // 4, -(-N // 4)),
        old_logprobs=logprobs.float() + 0.3 * torch.randn(N, generator=g),
        ref_logprobs=logprobs.float() + 0.5 * torch.randn(N, generator=g),
        num_sequences=-(-N // 4),
        num_tokens=N,
    )


def widened(bound: Any) -> Any:
    """The same objective in fp64."""
    vectors = {f.name: v for f in fields(bound) if isinstance(v := getattr(bound, f.name), Tensor)}
    return replace(bound, **{name: v.double() for name, v in vectors.items() if v.dtype == torch.float32})


def check_one_pass(
    arguments: Arguments,
    needs: Needs = NO_BIAS,
    slack: float = 0.0,
    **options: Any,
) -> tuple[Stats, Tensor, Grads]:
    logprobs = reference.statistics(*arguments, ()).logprobs
    bound = objective(arguments[0].count, logprobs, **options)
    found = ops.one_pass(*arguments, ("entropy",), bound, needs)
    own = reference.one_pass(*arguments, ("entropy",), bound, needs)
    true = reference.one_pass(*truth(*arguments), ("entropy",), widened(bound), needs)
    all_of = [(*listed(stats), loss, *grads) for stats, loss, grads in (found, own, true)]
    for ours, torchs, exact in zip(*all_of):
        assert_close(ours, torchs, exact, slack_of(arguments[1]) + slack)
    return found


@pytest.mark.parametrize("options", [{}, {"beta": 0.1}, {"beta": 0.1, "kl": "k1"}, {"beta": 0.1, "kl": "k2"}])
@pytest.mark.parametrize("transform", [{}, {"softcap": 3.0, "logit_scale": 0.7}])
def test_one_pass(options: dict[str, Any], transform: dict[str, Any]) -> None:
    check_one_pass(inputs(23, 24, 103, **transform), **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(5, 5000), (7,), (0, 3)])
def test_a_gradient_is_scaled_in_fp32(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    gradient = torch.randn(shape).to(dtype)
    rtol = 2**-7 if dtype == torch.bfloat16 else 0.0  # the interpreter cuts where a GPU rounds
    for factor in (1.0, 1 / 3, -2.5, math.nan):
        found = ops.scaled(gradient.clone(), torch.tensor(factor))
        torch.testing.assert_close(found, (gradient.float() * factor).to(dtype), rtol=rtol, atol=0, equal_nan=True)


@pytest.mark.parametrize("needs", [Needs(True, False, False), Needs(False, True, False), Needs(False, False, False)])
def test_one_pass_with_frozen_operands(needs: Needs) -> None:
    grads = check_one_pass(inputs(9, 24, 75), needs)[2]
    assert [g is not None for g in grads] == list(needs)


@pytest.mark.parametrize("case", [{"bias": True}, {"dtype": torch.float16}, {}])
def test_one_pass_of_what_takes_two(case: dict[str, Any]) -> None:
    bias = case.get("bias", False)
    check_one_pass(inputs(9, 24, 75, **case), Needs(True, True, bias), entropy_coef=0.0 if case else 0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_one_pass_over_several_blocks_of_rows(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a half-precision head dW is kept as two halves, and still summed at fp32 precision."""
    rows, head = inputs(37, 24, 300)
    arguments = (rows, replace(head, weight=head.weight.to(dtype)))
    whole = check_one_pass(arguments)[2]
    monkeypatch.setattr(ops, "one_pass_rows", lambda *_: 8)
    parts = check_one_pass(arguments)[2]
    assert whole.weight is not None
    assert parts.weight is not None
    step = torch.finfo(dtype).eps if dtype == torch.float16 else 1e-5
    assert (whole.weight.double() - parts.weight.double()).abs().max() <= step * whole.weight.abs().max().double()


@pytest.mark.parametrize("size", [30.0, 300.0])
def test_one_pass_where_the_target_lies_far_below(size: float) -> None:
    """Logits hundreds above the target's: E then has several references in a row, which are made one."""
    arguments = inputs(23, 24, 103, size=size)
    largest = reference.logits(arguments[0], arguments[1]).abs().max()
    # A logit's own rounding moves p by eps |z|, relative.
    check_one_pass(arguments, slack=4 * torch.finfo(torch.float32).eps * float(largest))


def test_one_pass_with_an_impossible_target() -> None:
    """A target of probability zero: an infinite loss and finite gradients in the other rows, as in torch."""
    rows, head = inputs(9, 24, 75)
    targets, bias = rows.targets, torch.zeros(75)
    bias[targets[4]] = float("-inf")
    targets[targets == targets[4]] = (targets[4] + 1) % 75
    targets[4] = int(bias.argmin())
    stats = ops.statistics(rows, replace(head, bias=bias), ())
    bound = replace(objective(9, stats.logprobs.clamp(min=-20)), surrogate="ppo_clip")
    found = ops.one_pass(rows, replace(head, bias=bias), (), bound, Needs(True, True, False))
    assert found[0].logprobs[4] == float("-inf")
    assert found[2].weight is not None
    assert found[2].weight.isfinite().all()


@pytest.mark.parametrize("dead", ["all", "most", "few"])
def test_flat_rows_leave_before_the_products(dead: str) -> None:
    """A row with zero slope may hold anything: NaN in its hidden state does not reach the other gradients."""
    arguments = inputs(23, 24, 103)
    logprobs = reference.statistics(*arguments, ()).logprobs
    bound = objective(23, logprobs)
    flat = {"all": torch.ones(23), "most": torch.arange(23) % 6 > 0, "few": torch.arange(23) % 6 == 2}[dead].bool()
    bound = replace(bound, advantages=torch.where(flat, 0.0, 1.0), old_logprobs=logprobs.float())
    _, _, grads = ops.one_pass(*arguments, (), bound, Needs(True, True, False))
    kept = arguments[0].pick((~flat).nonzero().squeeze(1))
    assert grads.hidden is not None
    assert grads.weight is not None
    assert grads.hidden[flat].eq(0).all()
    if flat.all():
        assert grads.weight.eq(0).all()
        return
    vectors = ("advantages", "old_logprobs", "ref_logprobs", "token_weights")
    fewer = replace(bound, **{name: getattr(bound, name)[~flat] for name in vectors})
    _, _, own = reference.one_pass(kept, arguments[1], (), fewer, Needs(True, True, False))
    _, _, true = reference.one_pass(*truth(kept, arguments[1]), (), fewer, Needs(True, True, False))
    assert_close(grads.hidden[~flat], own.hidden, true.hidden)
    assert_close(grads.weight, own.weight, true.weight)


def test_an_objective_without_a_twin_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = inputs(23, 24, 103)
    with_twin = check_one_pass(arguments, beta=0.1)
    monkeypatch.setattr(ops, "has_twin", lambda _: False)
    without = check_one_pass(arguments, beta=0.1)
    torch.testing.assert_close(with_twin[1], without[1], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(with_twin[2].weight, without[2].weight, rtol=1e-4, atol=1e-7)


@triton.jit
def surrogate_kernel(
    logprob_ptr, log_ratio_ptr, advantage_ptr, out_ptr, a, b, c, d, N, TWIN: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    offs = tl.arange(0, BLOCK)
    mask = offs < N
    logprob = tl.load(logprob_ptr + offs, mask=mask, other=0.0)
    log_ratio = tl.load(log_ratio_ptr + offs, mask=mask, other=0.0)
    found = TWIN(logprob, log_ratio, tl.load(advantage_ptr + offs, mask=mask, other=0.0), a, b, c, d)
    for i in tl.static_range(3):
        tl.store(out_ptr + i * N + offs, found[i] + tl.zeros_like(logprob), mask=mask)


@triton.jit
def kl_kernel(logprob_ptr, ref_ptr, out_ptr, N, TWIN: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    mask = offs < N
    kl, slope = TWIN(tl.load(logprob_ptr + offs, mask=mask, other=0.0), tl.load(ref_ptr + offs, mask=mask, other=0.0))
    tl.store(out_ptr + offs, kl, mask=mask)
    tl.store(out_ptr + N + offs, slope + tl.zeros_like(kl), mask=mask)


def surrogate_twin(
    name: str, options: dict[str, Any], logprob: Tensor, log_ratio: Tensor, advantage: Tensor
) -> tuple[Tensor, ...]:
    """The twin's loss and its derivatives by the log-prob and by the log-ratio."""
    twin, N = twins.SURROGATES[name], len(logprob)
    out = torch.empty(3, N)
    surrogate_kernel[(1,)](
        logprob, log_ratio, advantage, out, *twins.options_of(twin, options), N, TWIN=twin.function,
        BLOCK=triton.next_power_of_2(N),
    )  # fmt: skip
    return out.unbind()


def surrogate_torch(
    name: str, options: dict[str, Any], logprob: Tensor, log_ratio: Tensor, advantage: Tensor
) -> tuple[Tensor, ...]:
    lp, lr = logprob.clone().requires_grad_(), log_ratio.clone().requires_grad_()
    # At a fixed lp the first term is a constant; at a fixed lr the last one is.
    loss = SURROGATES[name](lp, lp - lr, advantage, **options)
    slopes = torch.autograd.grad(loss.sum(), (lp, lr), allow_unused=True)
    return loss.detach(), *(torch.zeros_like(logprob) if s is None else s for s in slopes)


SURROGATE_CASES: list[tuple[str, dict[str, Any]]] = [
    ("ppo_clip", {"epsilon_low": 0.2, "epsilon_high": 0.28}),
    ("ppo_clip", {"epsilon_low": 0.2, "epsilon_high": 0.28, "delta": 2.0}),
    ("ppo_clip", {"epsilon_low": 0.2, "epsilon_high": 0.28, "dual_clip": 3.0}),
    ("ppo_clip", {"epsilon_low": 0.2, "epsilon_high": 0.28, "dual_clip": 3.0, "delta": 4.0}),
    ("cispo", {"ratio_max": 5.0}),
    ("cispo", {"ratio_max": 1.3, "ratio_min": 0.7}),
    ("sapo", {"tau_pos": 1.0, "tau_neg": 1.05}),
    ("sapo", {"tau_pos": 3.0, "tau_neg": 0.5}),
    ("reinforce", {}),
]


def points() -> tuple[Tensor, Tensor, Tensor]:
    """Log-ratios on both sides of every bound, far out and exactly zero; advantages of both signs and zero."""
    ratio = torch.cat((torch.linspace(-2.5, 2.5, 40), torch.linspace(-1e-4, 1e-4, 20), torch.zeros(1)))
    advantage = torch.cat((torch.linspace(-1, 1, 61).roll(7), torch.linspace(1, -1, 61), torch.zeros(61)))
    return torch.linspace(-6, 0, 183), ratio.repeat(3), advantage


def test_every_twin_is_a_case() -> None:
    assert {name for name, _ in SURROGATE_CASES} == set(twins.SURROGATES) <= set(SURROGATES)
    for name, twin in twins.SURROGATES.items():
        assert set(twin.options) == keywords(SURROGATES[name])
    for name, twin in twins.PREFERENCES.items():
        assert set(twin.options) == keywords(PREFERENCES[name].function)


@pytest.mark.parametrize(("name", "options"), SURROGATE_CASES)
def test_surrogate_twins(name: str, options: dict[str, Any]) -> None:
    arguments = points()
    found, own = surrogate_twin(name, options, *arguments), surrogate_torch(name, options, *arguments)
    for triple in zip(found, own, surrogate_torch(name, options, *(t.double() for t in arguments))):
        assert_close(*triple, 1e-6)


@pytest.mark.parametrize("delta", [None, 1.0, 1.5])
@pytest.mark.parametrize("dual_clip", [None, 1.0, 1.5])
@pytest.mark.parametrize(("epsilon_low", "epsilon_high"), [(0.2, 0.2), (0.0, 0.2), (0.2, 0.0), (0.0, 0.0)])
def test_gradients_at_ties(
    delta: float | None, dual_clip: float | None, epsilon_low: float, epsilon_high: float
) -> None:
    """At a ratio of exactly 1 and on a bound, or on several, the gradient is the one autograd takes."""
    options = {"epsilon_low": epsilon_low, "epsilon_high": epsilon_high, "delta": delta, "dual_clip": dual_clip}
    arguments = (torch.full((3,), -1.0), torch.zeros(3), torch.tensor([-1.0, 0.0, 1.0]))
    for found, own in zip(
        surrogate_twin("ppo_clip", options, *arguments), surrogate_torch("ppo_clip", options, *arguments)
    ):
        assert torch.equal(found, own)


@pytest.mark.parametrize(("name", "options"), SURROGATE_CASES)
def test_surrogate_twins_of_nan_and_infinite_ratios(name: str, options: dict[str, Any]) -> None:
    nan, inf = float("nan"), float("inf")
    logprob, old, advantage = torch.cartesian_prod(
        torch.tensor([-1.0, -inf, nan]), torch.tensor([-1.1, 199.0, -201.0, nan]), torch.tensor([-1.0, 0.0, 1.0, nan])
    ).T.contiguous()
    loss, *slopes = surrogate_twin(name, options, logprob, logprob - old, advantage)
    leaf = logprob.clone().requires_grad_()
    true = SURROGATES[name](leaf, old, advantage, **options)
    torch.testing.assert_close(loss, true.detach(), equal_nan=True)
    torch.testing.assert_close(sum(slopes), torch.autograd.grad(true.sum(), leaf)[0], equal_nan=True)


@pytest.mark.parametrize("name", list(twins.KL_ESTIMATORS))
def test_kl_twins(name: str) -> None:
    logprob, log_ratio, _ = points()
    N = len(logprob)

    def by_torch(lp: Tensor, ref: Tensor) -> tuple[Tensor, Tensor]:
        leaf = lp.clone().requires_grad_()
        kl = KL_ESTIMATORS[name](leaf, ref)
        return kl.detach(), torch.autograd.grad(kl.sum(), leaf)[0]

    ref = logprob - log_ratio
    out = torch.empty(2, N)
    kl_kernel[(1,)](logprob, ref, out, N, TWIN=twins.KL_ESTIMATORS[name], BLOCK=triton.next_power_of_2(N))
    for triple in zip(out, by_torch(logprob, ref), by_torch(logprob.double(), ref.double())):
        assert_close(*triple, 1e-6)


def test_fp64_is_refused_with_a_way_out() -> None:
    rows, head = inputs(3, 16, 40)
    wide = replace(rows, hidden=rows.hidden.double())
    with pytest.raises(RuntimeError, match=r'float64; use backend="reference"'):
        ops.statistics(wide, replace(head, compute_dtype=torch.float64), ())


def sequences_of(lengths: list[int]) -> Sequences:
    return Sequences.of(torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)), len(lengths))


def policy_of(objective: PolicyLoss, old: bool = True) -> tuple[BoundPolicyLoss, Tensor]:
    """Over sequences of many blocks, of one token and of none; and the log-probs."""
    g = torch.Generator().manual_seed(0)
    sequences = sequences_of([3, 0, 2500, 1, 1024, 40, 0])
    N = len(sequences.index)
    logprobs = -3 * torch.rand(N, generator=g)
    bound = objective.bind(
        advantages=torch.randn(N, generator=g),
        sequences=sequences,
        old_logprobs=logprobs + 0.05 * torch.randn(N, generator=g) if old else None,
        ref_logprobs=logprobs + 0.3 * torch.randn(N, generator=g),
        num_sequences=sequences.count,
        num_tokens=N,
    )
    return bound, logprobs


def check_evaluation(bound: BoundPolicyLoss | BoundPreferenceLoss, logprobs: Tensor) -> None:
    rows = slice(0, len(logprobs))
    assert twins.has_twin(bound)
    loss, grads = ops.loss(bound, logprobs, None)
    own_loss, own_grads = bound(rows, logprobs, None)
    true_loss, true_grads = widened(bound)(rows, logprobs.double(), None)
    assert_close(loss, own_loss, true_loss, 1e-6)
    assert_close(grads.logprobs, own_grads.logprobs, true_grads.logprobs, 1e-6)
    again, grads_again = ops.loss(bound, logprobs, None)
    assert torch.equal(loss, again)
    assert torch.equal(grads.logprobs, grads_again.logprobs)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("name", "options"), SURROGATE_CASES)
def test_policy_twins_at_every_level(name: str, options: dict[str, Any], level: str) -> None:
    check_evaluation(*policy_of(PolicyLoss(name, kl="k3", beta=0.1, level=level, options=options)))


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize(("kl", "beta"), [("k1", 0.1), ("k2", 0.1), ("k3", 0.1), ("k3+", 0.1), ("k3", 0.0)])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("delta", [None, 1.0005])
def test_policy_twins_with_every_kl(kl: str, beta: float, level: str, old: bool, delta: float | None) -> None:
    objective = GSPO(beta=beta, kl=kl, level=level, epsilon_low=0.001, epsilon_high=0.002, delta=delta)
    check_evaluation(*policy_of(objective, old))


def test_a_nan_stays_in_its_sequence() -> None:
    bound, logprobs = policy_of(GSPO())
    logprobs[2] = float("nan")
    loss, grads = ops.loss(bound, logprobs, None)
    assert loss[:3].isnan().all()
    assert loss[3:].isfinite().all()
    assert grads.logprobs[:3].isnan().all()
    assert grads.logprobs[3:].isfinite().all()


def preference_of(
    objective: PreferenceLoss, lengths: list[int], ref: bool = True, num_pairs: int | Tensor = 7
) -> tuple[BoundPreferenceLoss, Tensor]:
    g = torch.Generator().manual_seed(0)
    sequences = sequences_of(lengths)
    N = len(sequences.index)
    logprobs = -2 * torch.rand(N, generator=g)
    bound = objective.bind(
        sequences=sequences,
        ref_logprobs=logprobs + 0.2 * torch.randn(N, generator=g) if ref else None,
        ref_sums=None,
        labels=None,
        kl=None,
        num_pairs=num_pairs,
        num_tokens=N,
        dtype=torch.float32,
    )
    return bound, logprobs


# Pairs of many blocks; of one token; one side, the other side, and both without a token.
COMPLETIONS = [2100, 5, 1, 0, 40, 0, 70, 1500, 1, 3, 0, 0]
PREFERENCE_CASES: list[dict[str, Any]] = [
    {"losses": ("sigmoid",)},
    {"losses": ("sigmoid",), "options": {"label_smoothing": 0.1}},
    {"losses": ("hinge",)},
    {"losses": ("ipo",)},
    {"losses": ("sigmoid", "ipo", "hinge"), "weights": (0.8, -0.2, 1.5), "options": {"label_smoothing": 0.3}},
]


@pytest.mark.parametrize("ref", [True, False])
@pytest.mark.parametrize("ld_alpha", [None, 0.25])
@pytest.mark.parametrize("case", PREFERENCE_CASES)
def test_preference_twins(case: dict[str, Any], ld_alpha: float | None, ref: bool) -> None:
    check_evaluation(*preference_of(PreferenceLoss(beta=0.3, ld_alpha=ld_alpha, **case), COMPLETIONS, ref))


def test_preference_twins_take_a_count_on_the_device() -> None:
    objective = PreferenceLoss()
    by_tensor, logprobs = preference_of(objective, COMPLETIONS, num_pairs=torch.tensor(7.0))
    check_evaluation(by_tensor, logprobs)
    by_number, _ = preference_of(objective, COMPLETIONS)
    assert torch.equal(ops.loss(by_tensor, logprobs, None)[0], ops.loss(by_number, logprobs, None)[0])


@pytest.mark.parametrize("name", list(twins.PREFERENCES))
def test_preference_twins_at_extreme_margins(name: str) -> None:
    """Margins from -4000 to 4000; and at beta d = 1 exactly, where the hinge bends."""
    bound, _ = preference_of(PreferenceLoss((name,), beta=0.5), [1] * 22)
    margins = torch.tensor([-4000.0, -200.0, -30.0, -9.0, -1e-3, 0.0, 2.0, 9.0, 30.0, 200.0, 4000.0])
    bound = replace(bound, ref_sums=torch.cat([-margins, torch.zeros(11)]))
    check_evaluation(bound, torch.zeros(22))
    loss, grads = ops.loss(bound, torch.zeros(22), None)
    true_loss, true_grads = widened(bound)(slice(0, 22), torch.zeros(22).double(), None)
    # Every one to its own size, so that a small loss keeps its digits; fp32 ends at 1e-38.
    torch.testing.assert_close(loss.double(), true_loss, rtol=2e-6, atol=1e-37)
    torch.testing.assert_close(grads.logprobs.double(), true_grads.logprobs, rtol=2e-6, atol=1e-37)


@pytest.mark.parametrize("name", list(twins.PREFERENCES))
def test_a_nan_stays_in_its_pair(name: str) -> None:
    bound, logprobs = preference_of(PreferenceLoss((name,)), [3, 2, 4, 1])
    logprobs[6] = float("nan")
    loss, grads = ops.loss(bound, logprobs, None)
    assert loss.isnan().tolist() == [True, False]
    others = torch.tensor([False] * 3 + [True] * 2 + [False] * 4 + [True])
    assert grads.logprobs[others].isfinite().all()
    own, true = bound(slice(0, 10), logprobs, None)[1], widened(bound)(slice(0, 10), logprobs.double(), None)[1]
    assert_close(grads.logprobs, own.logprobs, true.logprobs)


def test_what_has_a_twin() -> None:
    def policy(surrogate: str = "ppo_clip", **options: Any) -> bool:
        return twins.has_twin(policy_of(PolicyLoss(surrogate, **options))[0])

    def pairs(*losses: str, **options: Any) -> bool:
        weights = (1.0,) * len(losses)
        return twins.has_twin(preference_of(PreferenceLoss(losses, weights, **options), [3, 2])[0])

    assert policy()
    assert policy(off_policy_mask_threshold=0.5) is False
    assert policy(top_entropy_quantile=0.5) is False
    assert policy(entropy_coef=0.1) is False
    assert policy(beta=0.1)
    assert policy(beta=0.1, use_bias_correction_kl=True) is False
    assert not any(policy(name) for name in SURROGATES if name not in twins.SURROGATES)
    assert pairs("sigmoid", "hinge")
    assert pairs("sigmoid", "sft") is False
    assert pairs("sigmoid", f_divergence="forward_kl") is False
    assert pairs("sigmoid", use_weighting=True) is False


TOKENWISE: list[tuple[Callable[..., PolicyLoss], dict[str, Any]]] = [
    (PPO, {"dual_clip": 1.2}),
    (CISPO, {}),
    (SAPO, {"beta": 0.1}),
    (REINFORCE, {"beta": 0.1, "kl": "k3+"}),
]


@pytest.mark.parametrize(("preset", "options"), TOKENWISE)
def test_one_pass_of_every_twin(preset: Callable[..., PolicyLoss], options: dict[str, Any]) -> None:
    arguments = inputs(23, 24, 103)
    fields_of = {key: options[key] for key in ("beta", "kl") if key in options}
    own = {key: value for key, value in options.items() if key not in fields_of}
    stats, loss, _ = check_one_pass(arguments, preset=partial(preset, **own), **fields_of)
    bound = objective(23, reference.statistics(*arguments, ()).logprobs, preset=partial(preset, **own), **fields_of)
    assert torch.equal(loss, ops.loss(bound, stats.logprobs, None)[0])


def test_one_pass_of_a_tokenwise_objective_without_a_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "one_pass_rows", lambda *_: 8)
    check_one_pass(inputs(23, 24, 103), preset=partial(DAPO, use_bias_correction_kl=True), beta=0.1)


def test_one_pass_of_whole_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """What needs all rows at once is never cut into blocks of rows."""
    monkeypatch.setattr(ops, "one_pass_rows", lambda *_: 8)
    check_one_pass(inputs(23, 24, 103), preset=GSPO, beta=0.1)
    arguments = inputs(23, 24, 103)
    bound, _ = preference_of(PreferenceLoss(), [8, 3, 7, 5])
    _, loss, grads = ops.one_pass(*arguments, (), bound, NO_BIAS)
    _, own_loss, own = reference.one_pass(*arguments, (), bound, NO_BIAS)
    _, true_loss, true = reference.one_pass(*truth(*arguments), (), widened(bound), NO_BIAS)
    for triple in zip((loss.sum(), *grads), (own_loss.sum(), *own), (true_loss.sum(), *true)):
        assert_close(*triple)


@pytest.mark.parametrize("block", [8, 64])
def test_unit_gradients_under_a_frozen_head(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """reinforce with an advantage of -1: the loss is the sum of the log-probs, dX that of each of them; no dW is made."""
    monkeypatch.setattr(ops, "one_pass_rows", lambda *_: block)
    monkeypatch.delattr(ops, "_SplitSink")
    arguments = inputs(23, 24, 103, softcap=3.0)
    bound = REINFORCE().bind(
        advantages=torch.full((23,), -1.0),
        sequences=sequences_of([23]),
        old_logprobs=None,
        ref_logprobs=None,
        num_sequences=1,
        num_tokens=1,
    )
    only_hidden = Needs(True, False, False)
    stats, loss, grads = ops.one_pass(*arguments, (), bound, only_hidden)
    assert grads.weight is None
    assert torch.equal(loss, stats.logprobs)
    one = TokenGrads(torch.ones(23))
    own, true = reference.statistics(*arguments, ()), reference.statistics(*truth(*arguments), ())
    assert_close(
        grads.hidden,
        reference.gradients(*arguments, own, one, only_hidden).hidden,
        reference.gradients(*truth(*arguments), true, doubled(one), only_hidden).hidden,
    )


def test_operands_with_strides_of_their_own() -> None:
    """Transposed, every second, one for all: the public function hands the kernels what they can address."""
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(24, 10, generator=g).T,
        torch.randn(24, 70, generator=g).T,
        torch.randn(140, generator=g)[::2],
    )
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        leaves = [torch.empty_strided(t.shape, t.stride(), dtype=dtype).copy_(t) for t in (hidden, weight, bias)]
        x, w, b = (t.requires_grad_() for t in leaves)
        out = fr.linear_logprobs(
            x,
            w,
            torch.tensor([3]).expand(10),
            bias=b,
            temperature=torch.tensor([0.7]).expand(10),
            outputs=("entropy",),
            backend=backend,
        )
        upstream = (torch.ones(1, dtype=dtype).expand(10), torch.arange(20.0)[::2].to(dtype))
        results.append(
            (out.logprobs, out.entropy, *torch.autograd.grad((out.logprobs, out.entropy), (x, w, b), upstream))
        )
    for triple in zip(*results):
        assert_close(*(t.detach() for t in triple))


PUBLIC = [
    fr.GRPO(beta=0.1),
    fr.PPO(dual_clip=1.5),
    fr.CISPO(),
    fr.GSPO(),
    fr.RLOO(),
    fr.VESPO(),
    fr.DPO(ld_alpha=0.5),
    fr.DPO(("sigmoid", "sft")),
    fr.IPO(),
    fr.SimPO(),
]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("objective", PUBLIC, ids=[f"{i}" for i in range(len(PUBLIC))])
def test_public_functions(objective: PolicyLoss | PreferenceLoss, frozen: bool) -> None:
    """With and without a twin: the loss, every metric and the gradients are those of the reference backend, also where
    what is known beforehand is a view with strides of its own."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(4, 6, 24, generator=g), 0.6 * torch.randn(75, 24, generator=g)
    targets = torch.randint(0, 75, (4, 6), generator=g)
    mask = torch.rand(4, 6, generator=g) < 0.7
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        x, w = (t.to(dtype, copy=True) for t in (hidden, weight))
        x.requires_grad_(), w.requires_grad_(not frozen)
        if isinstance(objective, PolicyLoss):
            loss, metrics = fr.linear_policy_loss(
                x.flatten(0, 1),
                w,
                targets.flatten(),
                cu_seqlens=torch.tensor([0, 6, 9, 18, 24]),
                advantages=torch.tensor([1.0, -1.0, 0.5, 0.0]),
                old_logprobs=torch.tensor([-5.0]).expand(24),
                ref_logprobs=torch.tensor([-4.5]).expand(24) if objective.beta else None,
                objective=objective,
                backend=backend,
            )
        else:
            loss, metrics = fr.linear_preference_loss(
                x,
                w,
                targets,
                completion_mask=mask,
                ref_logprobs=torch.tensor([-20.0]).expand(4) if objective.needs_reference else None,
                objective=objective,
                backend=backend,
            )
        (2.5 * loss).backward()
        results.append((loss.detach(), *metrics.values(), x.grad, w.grad))
    for triple in zip(*results):
        assert_close(*triple)


@pytest.mark.parametrize(("grad_filter", "entropy"), [(1e-2, False), (0.5, False), (0.5, True)])
def test_filtered_gradients_stay_within_the_bound(
    monkeypatch: pytest.MonkeyPatch, grad_filter: float, entropy: bool
) -> None:
    """OP9: the bound of `linear_logprobs`, and rows that really are left out of vocabulary blocks."""
    monkeypatch.setattr(ops, "_columns", lambda device: 64)
    monkeypatch.setattr(ops, "ROWS", 16)
    g = torch.Generator().manual_seed(0)
    N, H, V = 19, 16, 250
    hidden, weight = 15 * torch.randn(N, H, generator=g), torch.randn(V, H, generator=g) / H**0.5
    targets = (hidden @ weight.T).argmax(1)
    targets[::5] = 7
    upstream = torch.randn(N, generator=g)
    by_entropy = torch.where(torch.arange(N) % 2 == 0, 0.3, 0.0) if entropy else None
    grads = TokenGrads(upstream, by_entropy, 0.5 * upstream)
    work = []
    original = ops.launch_dlogits
    monkeypatch.setattr(
        ops,
        "launch_dlogits",
        lambda tile, some, block, *rest: (
            work.append(len(some.targets) * len(block.w)),
            original(tile, some, block, *rest),
        )[1],
    )
    results = []
    for f in (0.0, grad_filter):
        work.clear()
        call = Rows(hidden, targets, torch.ones(N)), projection(weight, torch.zeros(V), grad_filter=f)
        stats = ops.statistics(*call, ("entropy",))
        filtered = None
        if stats.mass is not None:
            keep = kept_blocks(stats.mass, f, targets, 64, None if by_entropy is None else by_entropy != 0)
            filtered = rows_of_blocks(keep, keep.sum(0).tolist())
        gradients = ops.gradients(*call, stats, grads, ALL, filtered)
        results.append((sum(work), gradients, stats))
    (all_work, exact, _), (some_work, found, stats) = results
    assert torch.allclose(stats.mass.sum(1), torch.ones(N), atol=1e-5)
    assert all_work == N * V
    assert some_work < 0.8 * all_work
    allowed = (0.5 * upstream - upstream).abs() * grad_filter
    if by_entropy is not None:
        allowed = torch.where(by_entropy != 0, 0.0, allowed)
    assert ((found.hidden - exact.hidden).norm(dim=1) <= allowed * weight.norm(dim=1).max() + 1e-5).all()
    assert (found.weight - exact.weight).norm() <= (allowed * hidden.norm(dim=1)).sum() + 1e-4
    assert (found.bias - exact.bias).abs().sum() <= allowed.sum() + 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("train_weight", [False, True])
@pytest.mark.parametrize("mode", ["logprobs", "one_pass"])
def test_a_low_rank_head(dtype: torch.dtype, train_weight: bool, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients of W + s B A, in several blocks of rows, against fp64 on the same operands."""
    monkeypatch.setattr(ops, "ROWS", 16)
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    hidden, weight, a, b = randn(37, 40), randn(103, 40) / 6, randn(4, 40) / 6, randn(103, 4)
    targets = torch.randint(103, (37,), generator=generator)
    upstream = torch.randn(37, generator=generator)
    leaves = [t.requires_grad_() for t in (hidden, a, b)] + ([weight.requires_grad_()] if train_weight else [])

    def gradients(backend: str, wide: torch.dtype) -> list[Tensor]:
        x, w, first, second = (t.to(wide) for t in (hidden, weight, a, b))
        head: dict[str, Any] = {"lora": (first, second, 0.7), "softcap": 5.0, "backend": backend}
        if mode == "one_pass" and dtype == torch.float32:
            head |= {"advantages": upstream.to(wide), "objective": REINFORCE(), "mode": "one_pass"}
            loss = fr.linear_policy_loss(x, w, targets, **head)[0]
        else:
            found = fr.linear_logprobs(x, w, targets, **head).logprobs
            loss = (found * upstream).sum()
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    truth = gradients("reference", torch.float64)
    for found, exact, torchs in zip(gradients("triton", dtype), truth, gradients("reference", dtype)):
        error = (found.double() - exact.double()).norm()
        step = torch.finfo(dtype).eps if dtype == torch.float16 else 1e-6  # dlogits are rounded to the operands' dtype
        allowed = 2 * (torchs.double() - exact.double()).norm() + step * exact.double().norm()
        assert error <= allowed, (error, allowed)


@triton.jit
def hardcap(product, gain, cap):
    return tl.clamp(product * gain, -cap, cap)


@triton.jit
def hardcap_slope(score, unit, cap):
    return tl.where(tl.abs(score) < cap * (1 - 1e-6) * unit, 1.0, 0.0)


@pytest.mark.parametrize("bias", [False, True])
def test_a_registered_curve(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A curve that the package does not know: one record in torch, one here, and no kernel is touched."""
    monkeypatch.setitem(transforms.CURVES, "hardcap", HARDCAP)
    rows, head = inputs(19, 24, 75, bias=bias)
    head = replace(head, transform=Transform(0.7, "hardcap", 1.1))
    with pytest.raises(NotImplementedError, match=r"'hardcap' has no twin in kernels/primitives.py"):
        ops.statistics(rows, head, ())
    monkeypatch.setitem(primitives.CURVES, "hardcap", primitives.Curve(hardcap, hardcap_slope))
    z = reference.logits(rows, head) * rows.temperature[:, None]
    assert 0.1 < (z.abs() >= 1.1 * (1 - 1e-6)).float().mean() < 0.9  # both sides of the cap
    check((rows, head), OUTPUTS)
    check_one_pass((rows, head), beta=0.1)
    public = [
        fr.linear_logprobs(
            rows.hidden,
            fr.Head(head.weight, head.bias, 0.7, curve=("hardcap", 1.1)),
            rows.targets,
            temperature=rows.temperature,
            backend=backend,
        ).logprobs
        for backend in ("triton", "chunked")
    ]
    torch.testing.assert_close(*public, rtol=1e-5, atol=1e-5)


def test_an_fp32_adapter_on_a_half_precision_head_is_not_rounded() -> None:
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(19, 40, generator=g).half(), (torch.randn(103, 40, generator=g) / 6).half()
    a, b = torch.randn(4, 40, generator=g) / 6, 2 * torch.randn(103, 4, generator=g)
    targets = torch.randint(103, (19,), generator=g)
    found = fr.linear_logprobs(hidden, weight, targets, lora=(a, b, 0.7), backend="triton").logprobs
    z = hidden.double() @ weight.double().T + 0.7 * (hidden.double() @ a.double().T) @ b.double().T
    true = torch.log_softmax(z, -1).gather(1, targets[:, None])[:, 0]
    assert (found.double() - true).abs().max() <= 5e-5


WAITS: dict[str, dict[str, Any]] = {
    "one pass": {"objective": DAPO(beta=0.1)},
    "one pass of what takes two": {"objective": PPO(entropy_coef=0.1)},
    "two phases": {"objective": GSPO()},
    "a frozen head": {"objective": GSPO(), "trained": False},
    "log-probs": {},
    "log-probs under a filter": {"grad_filter": 0.01},
    "an adapter": {"lora": True},
}


@pytest.mark.parametrize("case", WAITS)
@pytest.mark.parametrize("blocks", [1, 3])
def test_a_call_waits_twice_and_once_more_for_each_further_block(
    case: str, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the door, and for what is live backwards; one pass asks that of each block of rows, after its loss."""
    monkeypatch.setattr(ops, "ROWS", 16)
    monkeypatch.setattr(ops, "_columns", lambda device: 64)
    monkeypatch.setattr(ops, "one_pass_rows", lambda N, *sizes: -(-N // blocks))
    options = dict(WAITS[case])
    rows, head = inputs(48, 16, 150)
    hidden, weight = rows.hidden.requires_grad_(), head.weight.requires_grad_(options.pop("trained", True))
    targets = torch.where(torch.arange(48) % 5 == 0, -100, rows.targets)
    if options.pop("lora", False):
        options["lora"] = (torch.randn(2, 16).requires_grad_(), torch.randn(150, 2).requires_grad_(), 0.5)

    offsets = torch.tensor([0, 10, 10, 30, 48])

    def call() -> Tensor:
        given: dict[str, Any] = {**options, "temperature": rows.temperature, "backend": "triton"}
        if "objective" not in options:
            return fr.linear_logprobs(hidden, weight, targets, **given).logprobs[::2].sum()
        advantages = torch.where(torch.arange(48) % 3 == 0, 0.0, 1.0)
        more: dict[str, Any] = {
            "advantages": advantages,
            "old_logprobs": torch.full((48,), -4.0),
            "ref_logprobs": torch.zeros(48),
        }
        return fr.linear_policy_loss(hidden, weight, targets, cu_seqlens=offsets, **more, **given)[0]

    once_a_block = case in ("one pass", "a frozen head")
    reads = waits_of(call)[1].reads
    assert len(reads) == 2 + (blocks - 1 if once_a_block else 0), reads

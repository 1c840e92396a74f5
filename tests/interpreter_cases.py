"""The Triton backend against fp64, in Triton's interpreter: `test_linear_logprobs.py` sets TRITON_INTERPRET=1.

Scratch comes poisoned with NaN. Every comparison is `error <= 2 x (torch's own error in the same dtype) + 1e-5`, the
errors relative to the largest true value; fp16 operands add fp16's own step, since dlogits are rounded to it. bf16
products are wrong in the interpreter, so fp32 and fp16 stand for all dtypes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_rlhf import reference
from fused_rlhf.kernels import objectives as twins
from fused_rlhf.kernels import ops, tiles
from fused_rlhf.kernels.interface import OUTPUTS, Grads, Head, Needs, Stats, TokenGrads
from fused_rlhf.objectives import DAPO, GSPO, KL_ESTIMATORS, SURROGATES, BoundPolicyLoss

ALL = Needs(True, True, True)
NO_BIAS = Needs(True, True, False)


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


def inputs(
    N: int, H: int, V: int, *, dtype: torch.dtype = torch.float32, bias: bool = False, size: float = 1.0, **options: Any
) -> tuple[Tensor, Head, Tensor, Tensor]:
    g = torch.Generator().manual_seed(N * V + H)
    hidden = torch.randn(N, H, generator=g).to(dtype)
    weight = (torch.randn(V, H, generator=g) * size * 3 / H**0.5).to(dtype)
    head = Head(weight, torch.randn(V, generator=g) if bias else None, compute_dtype=dtype, **options)
    return hidden, head, torch.randint(0, V, (N,), generator=g), 0.5 + torch.rand(N, generator=g)


def truth(hidden: Tensor, head: Head, targets: Tensor, temperature: Tensor) -> tuple[Tensor, Head, Tensor, Tensor]:
    """The same operands in fp64."""
    rounded = head.weight.to(head.compute_dtype).double()
    bias = None if head.bias is None else head.bias.double()
    wide = replace(head, weight=rounded, bias=bias, compute_dtype=torch.float64)
    return hidden.to(head.compute_dtype).double(), wide, targets, temperature.double()


def doubled(values: Any) -> Any:
    return type(values)(*(v if v is None else v.double() for v in values))


def assert_close(found: Tensor | None, torchs: Tensor | None, true: Tensor | None, slack: float = 1e-5) -> None:
    if true is None:
        assert found is None
        return
    assert found is not None
    assert torchs is not None
    if true.dtype == torch.bool:
        assert torch.equal(found, true)
        return
    assert torch.equal(found.isnan(), true.isnan())
    size = true.nan_to_num(0, 0, 0).abs().max().clamp(min=1e-30)
    finite = true.isfinite()
    assert torch.equal(found[~finite & ~true.isnan()].double(), true[~finite & ~true.isnan()])

    def error(value: Tensor) -> float:
        return float((value.double() - true)[finite].abs().max() / size) if finite.any() else 0.0

    assert error(found) <= 2 * error(torchs) + slack, f"{error(found):.1e}, torch {error(torchs):.1e}"


def slack_of(head: Head) -> float:
    return 1e-5 + (torch.finfo(torch.float16).eps if head.compute_dtype == torch.float16 else 0.0)


def check(arguments: tuple[Tensor, Head, Tensor, Tensor], outputs: tuple[str, ...], needs: Needs = ALL) -> Stats:
    """Forward and backward of all that `outputs` offers, against fp64."""
    stats = ops.forward(*arguments, outputs)
    own, true = reference.forward(*arguments, outputs), reference.forward(*truth(*arguments), outputs)
    for triple in zip(stats, own, true):
        assert_close(*triple)
    g = torch.Generator().manual_seed(1)
    vectors = [torch.randn(len(arguments[2]), generator=g) for _ in range(3)]
    upstream = TokenGrads(
        vectors[0], vectors[1] if "entropy" in outputs else None, vectors[2] if "lse" in outputs else None
    )
    needs = needs._replace(bias=needs.bias and arguments[1].bias is not None)
    grads = ops.backward(*arguments, stats, upstream, needs)
    own_grads = reference.backward(*arguments, own, upstream, needs)
    true_grads = reference.backward(*truth(*arguments), true, doubled(upstream), needs)
    for found, torchs, right in zip(grads, own_grads, true_grads):
        assert_close(found, torchs, right, slack_of(arguments[1]))
    again = ops.backward(*arguments, stats, upstream, needs)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(grads, again))
    return stats


@pytest.mark.parametrize("shape", [(1, 16, 33), (5, 24, 70), (37, 40, 103), (3, 8, 300)])
@pytest.mark.parametrize("outputs", [(), ("entropy",), ("sum_sq", "mean_logit"), ("lse", "is_top1"), OUTPUTS])
def test_outputs_on_ragged_shapes(shape: tuple[int, int, int], outputs: tuple[str, ...]) -> None:
    check(inputs(*shape), outputs)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", [{}, {"logit_scale": 0.3}, {"softcap": 2.5}, {"logit_scale": 1.7, "softcap": 30.0}])
def test_transforms(bias: bool, options: dict[str, float]) -> None:
    check(inputs(19, 24, 75, bias=bias, **options), OUTPUTS)


@pytest.mark.parametrize("needs", [Needs(True, False, False), Needs(False, True, False), Needs(False, False, True)])
def test_frozen_operands(needs: Needs) -> None:
    check(inputs(19, 24, 75, bias=True), ("entropy",), needs)


def test_half_precision_operands() -> None:
    check(inputs(21, 32, 70, dtype=torch.float16), OUTPUTS)


@pytest.mark.parametrize("upstream", [1e-6, 1e4])
def test_fp16_gradients_of_any_size(upstream: float) -> None:
    arguments = inputs(21, 32, 70, dtype=torch.float16)
    stats = ops.forward(*arguments, ())
    grads = ops.backward(*arguments, stats, TokenGrads(torch.full((21,), upstream)), Needs(False, True, False))
    unit = reference.backward(
        *truth(*arguments), doubled(stats), TokenGrads(torch.ones(21).double()), Needs(False, True, False)
    )
    assert grads.weight is not None
    assert unit.weight is not None
    expected = (unit.weight * upstream).clamp(-65504, 65504)
    # fp16 itself has 11 bits above 6e-5 and steps of 6e-8 below.
    assert (grads.weight.double() - expected).abs().max() <= 2e-3 * expected.abs().max() + 6e-8


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.float32, torch.float16)])
def test_operands_of_two_dtypes_are_cast_by_blocks(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    hidden, head, targets, temperature = inputs(21, 32, 300)
    head = replace(head, weight=head.weight.to(dtypes[1]), compute_dtype=torch.float16)
    check((hidden.to(dtypes[0]), head, targets, temperature), ("entropy",))


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
    hidden, head, targets, _ = inputs(9, 24, 75, bias=True)
    assert head.bias is not None
    arguments = (hidden, replace(head, bias=head.bias + shift), targets, torch.ones(9))
    check(arguments, ("entropy", "sum_sq"))


def test_padded_vocabulary() -> None:
    """Columns with a bias of -inf have no probability, and no gradient."""
    hidden, head, targets, temperature = inputs(9, 24, 100, bias=True)
    assert head.bias is not None
    head.bias[50:] = float("-inf")
    arguments = (hidden, head, targets % 50, temperature)
    upstream = TokenGrads(torch.ones(9), torch.ones(9))
    stats = check_forward(arguments, ("entropy", "lse"))
    grads = ops.backward(*arguments, stats, upstream, Needs(True, True, False))
    narrow = (hidden, replace(head, weight=head.weight[:50], bias=head.bias[:50]), targets % 50, temperature)
    expected = reference.backward(*narrow, stats, upstream, Needs(True, True, False))
    assert grads.weight is not None
    assert grads.weight[50:].eq(0).all()
    torch.testing.assert_close(grads.weight[:50], expected.weight)
    torch.testing.assert_close(grads.hidden, expected.hidden)


def check_forward(arguments: tuple[Tensor, Head, Tensor, Tensor], outputs: tuple[str, ...]) -> Stats:
    stats = ops.forward(*arguments, outputs)
    own, true = reference.forward(*arguments, outputs), reference.forward(*truth(*arguments), outputs)
    for triple in zip(stats, own, true):
        assert_close(*triple)
    return stats


def test_nan_stays_in_its_row() -> None:
    hidden, head, targets, temperature = inputs(9, 24, 75)
    clean = ops.forward(hidden, head, targets, temperature, ("entropy",))
    hidden[4, 3] = float("nan")
    stats = ops.forward(hidden, head, targets, temperature, ("entropy",))
    others = torch.arange(9) != 4
    assert stats.logprobs[4].isnan()
    assert torch.equal(stats.logprobs[others], clean.logprobs[others])
    assert stats.entropy is not None
    assert clean.entropy is not None
    assert torch.equal(stats.entropy[others], clean.entropy[others])


def test_first_of_equal_logits_is_top1() -> None:
    hidden, weight = torch.ones(2, 16), torch.zeros(70, 16)
    weight[[40, 69]] = 1.0
    stats = ops.forward(hidden, Head(weight), torch.tensor([40, 69]), torch.ones(2), ("is_top1",))
    assert stats.is_top1 is not None
    assert stats.is_top1.tolist() == [True, False]


def test_statistics_have_the_same_bits_in_any_company() -> None:
    hidden, head, targets, temperature = inputs(37, 40, 103)
    alone = ops.forward(hidden, head, targets, temperature, ())
    together = ops.forward(hidden, head, targets, temperature, OUTPUTS)
    # From a tile's first row on: numpy's own products depend on the place of a row in the tile, a GPU's do not.
    some = ops.forward(hidden[16:21], head, targets[16:21], temperature[16:21], ("entropy",))
    assert torch.equal(alone.logprobs, together.logprobs)
    assert torch.equal(alone.logprobs[16:21], some.logprobs)
    stats, _, _ = ops.one_pass(
        hidden, head, targets, temperature, (), objective(37, alone.logprobs), Needs(True, True, False)
    )
    assert torch.equal(stats.logprobs, alone.logprobs)


def objective(
    N: int, logprobs: Tensor, beta: float = 0.0, entropy_coef: float = 0.0, kl: str = "k3"
) -> BoundPolicyLoss:
    g = torch.Generator().manual_seed(2)
    advantages = torch.randn(N, generator=g)
    advantages[1::3] = 0.0
    return DAPO(beta=beta, entropy_coef=entropy_coef, kl=kl).bind(
        advantages=advantages,
        lengths=torch.full((N,), 4.0),
        old_logprobs=logprobs.float() + 0.3 * torch.randn(N, generator=g),
        ref_logprobs=logprobs.float() + 0.5 * torch.randn(N, generator=g),
        num_sequences=3,
        num_tokens=N,
    )


def check_one_pass(
    arguments: tuple[Tensor, Head, Tensor, Tensor],
    needs: Needs = NO_BIAS,
    slack: float = 0.0,
    **options: Any,
) -> tuple[Stats, Tensor, Grads]:
    logprobs = reference.forward(*arguments, ()).logprobs
    bound = objective(len(arguments[2]), logprobs, **options)
    names = ("old_logprobs", "ref_logprobs", "advantages", "token_weights")
    wide = replace(bound, **{name: getattr(bound, name).double() for name in names})
    found = ops.one_pass(*arguments, ("entropy",), bound, needs)
    own = reference.one_pass(*arguments, ("entropy",), bound, needs)
    true = reference.one_pass(*truth(*arguments), ("entropy",), wide, needs)
    for triple in zip((*found[0], found[1], *found[2]), (*own[0], own[1], *own[2]), (*true[0], true[1], *true[2])):
        assert_close(*triple, slack_of(arguments[1]) + slack)
    return found


@pytest.mark.parametrize("options", [{}, {"beta": 0.1}, {"beta": 0.1, "kl": "k1"}, {"beta": 0.1, "kl": "k2"}])
@pytest.mark.parametrize("transform", [{}, {"softcap": 3.0, "logit_scale": 0.7}])
def test_one_pass(options: dict[str, Any], transform: dict[str, float]) -> None:
    check_one_pass(inputs(23, 24, 103, **transform), **options)


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
    hidden, head, targets, temperature = inputs(37, 24, 300)
    arguments = (hidden, replace(head, weight=head.weight.to(dtype)), targets, temperature)
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
    largest = reference._logits(arguments[0], arguments[1].weight, None, *arguments[1::2]).abs().max()
    # A logit's own rounding moves p by eps |z|, relative.
    check_one_pass(arguments, slack=4 * torch.finfo(torch.float32).eps * float(largest))


def test_one_pass_with_an_impossible_target() -> None:
    """A target of probability zero: an infinite loss and finite gradients in the other rows, as in torch."""
    hidden, head, targets, temperature = inputs(9, 24, 75)
    bias = torch.zeros(75)
    bias[targets[4]] = float("-inf")
    targets[targets == targets[4]] = (targets[4] + 1) % 75
    targets[4] = int(bias.argmin())
    stats = ops.forward(hidden, replace(head, bias=bias), targets, temperature, ())
    bound = replace(objective(9, stats.logprobs.clamp(min=-20)), surrogate="ppo_clip")
    found = ops.one_pass(hidden, replace(head, bias=bias), targets, temperature, (), bound, Needs(True, True, False))
    assert found[0].logprobs[4] == float("-inf")
    assert found[2].weight is not None
    assert found[2].weight.isfinite().all()


@pytest.mark.parametrize("dead", ["all", "most", "few"])
def test_flat_rows_leave_before_the_products(dead: str) -> None:
    """A row with zero slope may hold anything: NaN in its hidden state does not reach the other gradients."""
    arguments = inputs(23, 24, 103)
    logprobs = reference.forward(*arguments, ()).logprobs
    bound = objective(23, logprobs)
    flat = {"all": torch.ones(23), "most": torch.arange(23) % 6 > 0, "few": torch.arange(23) % 6 == 2}[dead].bool()
    bound = replace(bound, advantages=torch.where(flat, 0.0, 1.0), old_logprobs=logprobs.float())
    _, _, grads = ops.one_pass(*arguments, (), bound, Needs(True, True, False))
    kept = [t[~flat] for t in (arguments[0], arguments[2], arguments[3])]
    assert grads.hidden is not None
    assert grads.weight is not None
    assert grads.hidden[flat].eq(0).all()
    if flat.all():
        assert grads.weight.eq(0).all()
        return
    vectors = ("advantages", "old_logprobs", "ref_logprobs", "token_weights")
    fewer = replace(bound, **{name: getattr(bound, name)[~flat] for name in vectors})
    _, _, expected = reference.one_pass(kept[0], arguments[1], kept[1], kept[2], (), fewer, Needs(True, True, False))
    torch.testing.assert_close(grads.hidden[~flat], expected.hidden, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(grads.weight, expected.weight, rtol=1e-4, atol=1e-7)


def test_an_objective_without_a_twin_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = inputs(23, 24, 103)
    with_twin = check_one_pass(arguments, beta=0.1)
    monkeypatch.setattr(ops, "has_twin", lambda _: False)
    without = check_one_pass(arguments, beta=0.1)
    torch.testing.assert_close(with_twin[1], without[1], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(with_twin[2].weight, without[2].weight, rtol=1e-4, atol=1e-7)


@triton.jit
def surrogate_kernel(logprob_ptr, old_ptr, advantage_ptr, out_ptr, a, b, c, N, TWIN: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    mask = offs < N
    logprob = tl.load(logprob_ptr + offs, mask=mask, other=0.0)
    old = tl.load(old_ptr + offs, mask=mask, other=0.0)
    loss, slope = TWIN(logprob, old, tl.load(advantage_ptr + offs, mask=mask, other=0.0), a, b, c)
    tl.store(out_ptr + offs, loss, mask=mask)
    tl.store(out_ptr + N + offs, slope, mask=mask)


@triton.jit
def kl_kernel(logprob_ptr, ref_ptr, out_ptr, N, TWIN: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    mask = offs < N
    kl, slope = TWIN(tl.load(logprob_ptr + offs, mask=mask, other=0.0), tl.load(ref_ptr + offs, mask=mask, other=0.0))
    tl.store(out_ptr + offs, kl, mask=mask)
    tl.store(out_ptr + N + offs, slope + tl.zeros_like(kl), mask=mask)


def points() -> Iterator[Tensor]:
    """Log-ratios on both sides of every bound, far out and exactly zero; advantages of both signs and zero."""
    logprob = torch.linspace(-6, 0, 61)
    ratio = torch.cat((torch.linspace(-2.5, 2.5, 40), torch.linspace(-1e-4, 1e-4, 20), torch.zeros(1)))
    yield from (logprob, logprob - ratio, torch.linspace(-1, 1, 61).roll(7))


@pytest.mark.parametrize("name", list(twins.SURROGATES))
@pytest.mark.parametrize("delta", [None, 2.0])
def test_surrogate_twins(name: str, delta: float | None) -> None:
    logprob, old, advantage = points()
    bound = replace(
        objective(61, old), surrogate=name, options={"epsilon_low": 0.2, "epsilon_high": 0.28, "delta": delta}
    )
    out = torch.empty(2, 61)
    surrogate_kernel[(1,)](
        logprob, old, advantage, out, *twins.options_of(bound), 61, TWIN=twins.SURROGATES[name].function, BLOCK=64
    )
    leaf = logprob.double().requires_grad_()
    loss = SURROGATES[name](leaf, old.double(), advantage.double(), **bound.options)
    loss.sum().backward()
    torch.testing.assert_close(out[0].double(), loss.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out[1].double(), leaf.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", list(twins.KL_ESTIMATORS))
def test_kl_twins(name: str) -> None:
    logprob, ref, _ = points()
    out = torch.empty(2, 61)
    kl_kernel[(1,)](logprob, ref, out, 61, TWIN=twins.KL_ESTIMATORS[name], BLOCK=64)
    leaf = logprob.double().requires_grad_()
    kl = KL_ESTIMATORS[name](leaf, ref.double())
    kl.sum().backward()
    torch.testing.assert_close(out[0].double(), kl.detach(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(out[1].double(), leaf.grad, rtol=1e-5, atol=1e-7)


def test_fp64_is_refused_with_a_way_out() -> None:
    hidden, head, targets, temperature = inputs(3, 16, 40)
    with pytest.raises(RuntimeError, match=r'float64; use backend="reference"'):
        ops.forward(hidden.double(), replace(head, compute_dtype=torch.float64), targets, temperature, ())


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize(("kl", "beta"), [("k1", 0.1), ("k2", 0.1), ("k3", 0.1), ("k3", 0.0)])
@pytest.mark.parametrize("delta", [None, 1.0005])
def test_sequence_level_twin(kl: str, beta: float, old: bool, delta: float | None) -> None:
    """Sequences of many blocks, of one token and of none, against the torch objective in fp64."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.tensor([3, 0, 2500, 1, 1024, 40])
    N = int(lengths.sum())
    logprobs = -3 * torch.rand(N, generator=g)
    bound = GSPO(beta=beta, kl=kl, epsilon_low=0.001, epsilon_high=0.002, delta=delta).bind(
        advantages=torch.randn(N, generator=g),
        lengths=lengths.repeat_interleave(lengths).float(),
        offsets=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        old_logprobs=logprobs + 0.05 * torch.randn(N, generator=g) if old else None,
        ref_logprobs=logprobs + 0.3 * torch.randn(N, generator=g),
        num_sequences=6,
        num_tokens=N,
    )
    names = ("old_logprobs", "ref_logprobs", "advantages", "token_weights")
    wide = replace(bound, **{n: v.double() for n in names if (v := getattr(bound, n)) is not None})
    loss, grads = ops.evaluate(bound, logprobs, None)
    own_loss, own_grads = bound(slice(0, N), logprobs, None)
    true_loss, true_grads = wide(slice(0, N), logprobs.double(), None)
    assert_close(loss, own_loss, true_loss, 1e-8)
    assert_close(grads.logprobs, own_grads.logprobs, true_grads.logprobs, 1e-8)


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
    rows = []
    original = ops.launch_dlogits
    monkeypatch.setattr(
        ops,
        "launch_dlogits",
        lambda tile, some, *rest: (rows.append(len(some.targets)), original(tile, some, *rest))[1],
    )
    results = []
    for f in (0.0, grad_filter):
        rows.clear()
        head = Head(weight, bias=torch.zeros(V), grad_filter=f)
        stats = ops.forward(hidden, head, targets, torch.ones(N), ("entropy",))
        gradients = ops.backward(hidden, head, targets, torch.ones(N), stats, grads, ALL)
        results.append((sum(rows), gradients, stats))
    (all_rows, exact, _), (some_rows, found, stats) = results
    assert torch.allclose(stats.mass.sum(1), torch.ones(N), atol=1e-5)
    assert all_rows == N * 4
    assert some_rows < 0.8 * all_rows
    allowed = (0.5 * upstream - upstream).abs() * grad_filter
    if by_entropy is not None:
        allowed = torch.where(by_entropy != 0, 0.0, allowed)
    assert ((found.hidden - exact.hidden).norm(dim=1) <= allowed * weight.norm(dim=1).max() + 1e-5).all()
    assert (found.weight - exact.weight).norm() <= (allowed * hidden.norm(dim=1)).sum() + 1e-4
    assert (found.bias - exact.bias).abs().sum() <= allowed.sum() + 1e-4

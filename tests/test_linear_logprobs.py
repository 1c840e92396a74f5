"""The Triton backend: in Triton's interpreter on any machine, and on a GPU where there is one."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import fused_rlhf as fr
from fused_rlhf.backends import chunked, reference
from fused_rlhf.kernels import linear_logprobs, ops, tiles
from fused_rlhf.kernels.interface import Grads, Needs, Projection, Rows, TokenGrads, Work
from fused_rlhf.kernels.objectives import has_twin
from fused_rlhf.kernels.statistics import OUTPUTS
from fused_rlhf.objectives import CISPO, DAPO, GSPO, REINFORCE, SAPO, BoundPolicyLoss, PolicyLoss
from fused_rlhf.preferences import BoundPreferenceLoss, PreferenceLoss
from fused_rlhf.segments import Sequences
from tests.helpers import inputs as drawn
from tests.helpers import listed, passes_in_the_interpreter, placed, projection

Arguments = tuple[Rows, Projection]


@pytest.mark.slow
def test_against_fp64_in_the_interpreter() -> None:
    passes_in_the_interpreter("tests/interpreter_cases.py")


# What follows needs a GPU. Truth is fp64 on the same operands; "torch" is dense torch with fp32 logits, whose gradient
# of the logits is rounded to the operands' dtype before its two products.


def inputs(
    N: int,
    H: int,
    V: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    bias: bool = False,
    peak: float = 10.0,
    temperature: bool = True,
    **options: Any,
) -> Arguments:
    """`peak`: about the largest logit."""
    g = torch.Generator("cuda").manual_seed(N + V)
    hidden = torch.randn(N, H, generator=g, device="cuda").to(dtype)
    weight = (torch.randn(V, H, generator=g, device="cuda") * peak / 4 / H**0.5).to(dtype)
    b = torch.randn(V, generator=g, device="cuda") if bias else None
    targets = torch.randint(0, V, (N,), generator=g, device="cuda")
    t = 0.7 + 0.6 * torch.rand(N, generator=g, device="cuda") if temperature else torch.ones(N, device="cuda")
    return Rows(hidden, targets, t), projection(weight, b, **options)


def wide(rows: Rows, head: Projection) -> Arguments:
    bias = None if head.bias is None else head.bias.double()
    weight = head.weight.to(head.compute_dtype).double()
    operands = replace(head, weight=weight, bias=bias, compute_dtype=torch.float64)
    return Rows(rows.hidden.to(head.compute_dtype).double(), rows.targets, rows.temperature.double()), operands


def torch_gradients(arguments: Arguments, upstream: TokenGrads) -> Grads:
    rows, head = arguments
    x, w = rows.hidden.to(head.compute_dtype), head.weight.to(head.compute_dtype)
    products = (x.float() @ w.float().T).requires_grad_()
    bias = None if head.bias is None else head.bias.detach().float().requires_grad_()
    u = (products if bias is None else products + bias) * head.transform.logit_scale
    cap, temperature = head.transform.parameter, rows.temperature[:, None]
    z = (cap * torch.tanh(u / cap) if head.transform.curve else u) / temperature
    log_p = torch.log_softmax(z, -1)
    stats = log_p.gather(1, rows.targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1), torch.logsumexp(z, -1)
    pairs = [(v, g) for v, g in zip(stats, upstream) if g is not None]
    leaves = [products] if bias is None else [products, bias]
    found = torch.autograd.grad([v for v, _ in pairs], leaves, [g for _, g in pairs])  # type: ignore[arg-type]
    dz = found[0].to(head.compute_dtype)
    return Grads(
        (dz @ w).to(rows.hidden.dtype), (dz.T @ x).to(head.weight.dtype), found[1] if bias is not None else None
    )


def error(found: Tensor | None, true: Tensor | None) -> float:
    assert found is not None
    assert true is not None
    return float((found.double() - true).norm() / true.norm())


def objective(N: int, logprobs: Tensor, zero_share: float = 0.3) -> BoundPolicyLoss:
    g = torch.Generator("cuda").manual_seed(2)
    advantages = torch.randn(N, generator=g, device="cuda")
    advantages[1:][torch.rand(N - 1, generator=g, device="cuda") < zero_share] = 0.0
    old = logprobs + 0.05 * torch.randn(N, generator=g, device="cuda")
    return DAPO().bind(
        advantages=advantages, sequences=Sequences.of(torch.arange(N, device="cuda") // 16, -(-N // 16)),
        old_logprobs=old, ref_logprobs=None, num_sequences=-(-N // 16), num_tokens=N,
    )  # fmt: skip


CASES: dict[str, tuple[tuple, dict[str, Any]]] = {
    "plain": ((300, 512, 5003), {}),
    "one row": ((1, 512, 5003), {}),
    "no descriptors": ((129, 100, 777), {}),
    "transforms": ((300, 512, 5003), {"bias": True, "softcap": 8.0, "logit_scale": 0.5}),
    "fp16": ((300, 512, 5003, torch.float16), {}),
    "fp32": ((300, 512, 5003, torch.float32), {}),
    "wide": ((513, 1024, 32001), {"peak": 25.0}),
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_against_fp64(case: str) -> None:
    arguments = inputs(*CASES[case][0], **CASES[case][1])
    N = arguments[0].count
    stats, own = ops.statistics(*arguments, OUTPUTS), reference.statistics(*arguments, OUTPUTS)
    true = reference.statistics(*wide(*arguments), OUTPUTS)
    for value, dense, exact in zip(listed(stats), listed(own), listed(true)):
        if exact.dtype == torch.bool:
            assert torch.equal(value, exact)
        else:
            assert (value - exact).abs().max() <= 2 * (dense - exact).abs().max() + 5e-5
    g = torch.Generator("cuda").manual_seed(1)
    upstream = TokenGrads(*(torch.randn(N, generator=g, device="cuda") for _ in range(3)))
    needs = Needs(True, True, arguments[1].bias is not None)
    grads, again = (ops.gradients(*arguments, stats, upstream, needs) for _ in range(2))
    torchs = torch_gradients(arguments, upstream)
    right = reference.gradients(
        *wide(*arguments), true, TokenGrads(*(None if u is None else u.double() for u in upstream)), needs
    )
    for value, same, dense, exact in zip(grads, again, torchs, right):
        if exact is not None:
            assert error(value, exact) <= 2 * error(dense, exact) + 1e-6
            assert torch.equal(value, same)  # type: ignore[arg-type]

    bound = objective(N, stats.logprobs)
    found, loss, grads = ops.one_pass(*arguments, (), bound, Needs(True, True, False))
    assert torch.equal(found.logprobs, stats.logprobs)
    names = ("advantages", "token_weights", "old_logprobs")
    exact_objective = replace(bound, **{name: getattr(bound, name).double() for name in names})
    _, right_loss, right = reference.one_pass(*wide(*arguments), (), exact_objective, Needs(True, True, False))
    assert (loss - right_loss).abs().max() <= 1e-4 * right_loss.abs().max() + 1e-7
    torchs = torch_gradients(arguments, bound(slice(0, N), stats.logprobs, None)[1])
    assert error(grads.hidden, right.hidden) <= 2 * error(torchs.hidden, right.hidden) + 1e-5
    assert error(grads.weight, right.weight) <= 2 * error(torchs.weight, right.weight) + 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("H", [1024, 4096])
def test_logprobs_of_bf16_operands_keep_fp32_precision(H: int) -> None:
    """The contract: 5e-5 against fp64 with logits around +-25."""
    arguments = inputs(512, H, 8192, peak=25.0, temperature=False)
    true = reference.statistics(*wide(*arguments), ("entropy",))
    assert 20 < true.lse.max() < 35
    stats = ops.statistics(*arguments, ("entropy",))
    assert (stats.logprobs - true.logprobs).abs().max() <= 5e-5
    assert (stats.entropy - true.entropy).abs().max() <= 5e-5  # type: ignore[operator]


@pytest.mark.gpu
def test_fp32_head_with_bf16_products() -> None:
    rows, head = inputs(300, 512, 20000)
    master = replace(head, weight=head.weight.float() + 1e-4 * torch.randn(20000, 512, device="cuda"))
    arguments = (replace(rows, hidden=rows.hidden.float()), master)
    stats = ops.statistics(*arguments, ())
    rounded = (rows, replace(head, weight=master.weight.bfloat16()))
    # Of operands of another width a sum has its parts in another order.
    assert (stats.logprobs - ops.statistics(*rounded, ()).logprobs).abs().max() <= 1e-5
    grads = ops.gradients(*arguments, stats, TokenGrads(torch.ones(300, device="cuda")), Needs(True, True, False))
    true = reference.gradients(
        *wide(*rounded), stats, TokenGrads(torch.ones(300, device="cuda").double()), Needs(True, True, False)
    )
    assert grads.weight is not None
    assert grads.weight.dtype == torch.float32
    assert error(grads.weight, true.weight) <= 3e-3  # dlogits in bf16
    assert error(grads.hidden, true.hidden) <= 3e-3


@pytest.mark.gpu
def test_a_tokens_logprob_does_not_depend_on_its_batch() -> None:
    rows, head = inputs(9000, 512, 32000)
    whole = ops.statistics(rows, head, ("entropy",)).logprobs
    for at in (slice(0, 1), slice(100, 137), slice(8190, 8999)):
        assert torch.equal(ops.statistics(rows.pick(at), head, ()).logprobs, whole[at])


@pytest.mark.gpu
def test_a_new_number_of_tokens_compiles_nothing() -> None:
    def run(N: int) -> None:
        arguments = inputs(N, 512, 5008)
        stats = ops.statistics(*arguments, ())
        ops.gradients(*arguments, stats, TokenGrads(stats.lse), Needs(True, True, False))
        ops.one_pass(*arguments, (), objective(N, stats.logprobs, 0.0), Needs(True, True, False))

    def compiled() -> int:
        kernels = [getattr(linear_logprobs, name) for name in dir(linear_logprobs) if name.endswith("_kernel")]
        return sum(len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels)

    run(256)
    before = compiled()
    assert before > 0
    for N in (1, 2, 17, 100, 333, 1024):
        run(N)
    assert compiled() == before


@pytest.mark.gpu
def test_scratch_is_written_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = inputs(300, 512, 5003)
    clean = ops.statistics(*arguments, OUTPUTS)
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)
    stats = ops.statistics(*arguments, OUTPUTS)
    assert all(map(torch.equal, listed(stats), listed(clean)))
    grads = ops.gradients(*arguments, stats, TokenGrads(stats.lse, stats.lse), Needs(True, True, False))
    _, _, one = ops.one_pass(*arguments, (), objective(300, stats.logprobs), Needs(True, True, False))
    for gradient in (*grads, *one):
        assert gradient is None or gradient.isfinite().all()


@pytest.mark.gpu
def test_nan_stays_in_its_row_on_the_device() -> None:
    rows, head = inputs(300, 512, 5003)
    clean = ops.statistics(rows, head, ()).logprobs
    rows.hidden[7, 3] = float("nan")
    found = ops.statistics(rows, head, ()).logprobs
    others = torch.arange(300, device="cuda") != 7
    assert found[7].isnan()
    assert torch.equal(found[others], clean[others])


def peak_memory(run: Any) -> int:
    run()  # compiles, and lets cuBLAS take its workspace
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.gpu
@pytest.mark.parametrize("N", [4096, 20000])
def test_memory_is_the_formula(N: int) -> None:
    H, V = 512, 64000
    arguments = inputs(N, H, V)
    stats = ops.statistics(*arguments, ())
    needs = Needs(True, True, False)
    slack, device = 64 * N + (8 << 20), torch.device("cuda")

    def formula(route: Any) -> float:
        work = Work(route, N, H, V, torch.bfloat16, needs)
        found = replace(work, multiprocessors=tiles.multiprocessors(device), device_bytes=tiles.device_bytes(device))
        return ops.memory(found) + slack

    assert peak_memory(lambda: ops.statistics(*arguments, ())) <= formula("forward")
    upstream = TokenGrads(stats.lse)
    assert peak_memory(lambda: ops.gradients(*arguments, stats, upstream, needs)) <= formula("two_phase")
    bound = objective(N, stats.logprobs)
    assert peak_memory(lambda: ops.one_pass(*arguments, (), bound, needs)) <= formula("one_pass") + 256 * 2 * V


@pytest.mark.gpu
def test_more_than_two_billion_logits() -> None:
    """N x V passes 2^31: rows at the end agree with the same rows alone."""
    N, H, V = 8704, 64, 256000
    rows, head = inputs(N, H, V)
    rows.targets[-1] = V - 1
    tail = slice(N - 40, N)
    stats = ops.statistics(rows, head, ())
    alone = ops.statistics(rows.pick(tail), head, ())
    assert torch.equal(stats.logprobs[tail], alone.logprobs)
    bound = objective(N, stats.logprobs, 0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "one_pass_rows", lambda *_: N)  # one block of rows, so that E itself passes 2^31 elements
        _, _, grads = ops.one_pass(rows, head, (), bound, Needs(True, False, False))
    vectors = ("advantages", "token_weights", "old_logprobs")
    few = replace(bound, **{name: getattr(bound, name)[tail] for name in vectors})
    _, _, expected = ops.one_pass(rows.pick(tail), head, (), few, Needs(True, False, False))
    assert error(grads.hidden[tail], expected.hidden.double()) <= 1e-2  # type: ignore[index, union-attr]


@pytest.mark.gpu
def test_products_from_cublas_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = inputs(300, 512, 5003)
    fused = ops.statistics(*arguments, OUTPUTS)
    upstream = TokenGrads(fused.lse)
    fused_grads = ops.gradients(*arguments, fused, upstream, Needs(True, True, False))
    monkeypatch.setattr(ops, "tune", lambda *_: tiles.RAW)
    raw = ops.statistics(*arguments, OUTPUTS)
    assert (raw.logprobs - fused.logprobs).abs().max() <= 5e-5
    grads = ops.gradients(*arguments, raw, upstream, Needs(True, True, False))
    assert error(grads.weight, fused_grads.weight.double()) <= 1e-2  # type: ignore[union-attr]


@pytest.mark.gpu
def test_autotuning_picks_a_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_RLHF_AUTOTUNE", "1")
    monkeypatch.setattr(tiles, "_tuned", {})
    arguments = inputs(300, 512, 5003)
    tuned = ops.statistics(*arguments, ())
    assert len(tiles._tuned) == 1
    chosen = next(iter(tiles._tuned.values()))
    assert chosen in tiles.candidates("stats", arguments[0].hidden.device, torch.bfloat16, True)
    monkeypatch.setenv("FUSED_RLHF_AUTOTUNE", "0")
    assert (tuned.logprobs - ops.statistics(*arguments, ()).logprobs).abs().max() <= 5e-5


# What follows runs on a CPU, too, by the backend that is there.

DEVICES = [("cpu", chunked), pytest.param("cuda", ops, marks=pytest.mark.gpu)]
POLICIES: dict[str, PolicyLoss] = {
    "grpo": fr.GRPO(beta=0.1),
    "dapo, dual clip": DAPO(dual_clip=3.0, delta=4.0),
    "gspo": GSPO(beta=0.1, kl="k3+", epsilon_low=0.001, epsilon_high=0.002),
    "cispo": CISPO(ratio_max=1.3, beta=0.05, kl="k1"),
    "sapo": SAPO(beta=0.1, kl="k2"),
    "reinforce": REINFORCE(),
}
PAIRS: dict[str, PreferenceLoss] = {
    "dpo": PreferenceLoss(options={"label_smoothing": 0.1}),
    "hinge, long pairs": PreferenceLoss(("hinge",), ld_alpha=0.5),
    "ipo": PreferenceLoss(("ipo",)),
    "mpo": PreferenceLoss(("sigmoid", "ipo", "hinge"), (0.8, -0.2, 1.5)),
}


def tokens(lengths: list[int], device: str) -> tuple[Sequences, Tensor, Tensor]:
    """Sequences of these lengths; log-probs of their tokens, and those moved by up to 0.3."""
    g = torch.Generator().manual_seed(0)
    index = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    logprobs = -3 * torch.rand(len(index), generator=g)
    others = logprobs + 0.1 * torch.randn(len(index), generator=g)
    return Sequences.of(index.to(device), len(lengths)), logprobs.to(device), others.to(device)


def check_loss(backend: Any, bound: BoundPolicyLoss | BoundPreferenceLoss, logprobs: Tensor) -> None:
    """Values and slopes against fp64, the yardstick being torch in fp32; and their bits."""
    vectors = {f.name: v for f in fields(bound) if isinstance(v := getattr(bound, f.name), Tensor)}
    doubled: dict[str, Any] = {name: v.double() for name, v in vectors.items() if v.dtype == torch.float32}
    wide = replace(bound, **doubled)
    at = slice(0, len(logprobs))
    results = [backend.loss(bound, logprobs, None), bound(at, logprobs, None), wide(at, logprobs.double(), None)]
    assert has_twin(bound)
    for found, torchs, exact in zip(*((loss, grads.logprobs) for loss, grads in results)):
        own = (torchs.double() - exact).abs().max()
        assert (found.double() - exact).abs().max() <= 2 * own + 1e-6 * exact.abs().max()
    loss, grads = backend.loss(bound, logprobs, None)
    assert torch.equal(loss, results[0][0])
    assert torch.equal(grads.logprobs, results[0][1].logprobs)


@pytest.mark.parametrize(("device", "backend"), DEVICES)
@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("name", POLICIES)
def test_policy_losses_against_fp64(device: str, backend: Any, name: str, old: bool) -> None:
    """Sequences of many blocks, of one token and of none."""
    sequences, logprobs, others = tokens([3, 0, 2500, 1, 1024, 40, 0], device)
    bound = POLICIES[name].bind(
        advantages=torch.linspace(-1, 1, len(logprobs), device=device).roll(7),
        sequences=sequences,
        old_logprobs=others if old else None,
        ref_logprobs=others.roll(1),
        num_sequences=sequences.count,
        num_tokens=len(logprobs),
    )
    check_loss(backend, bound, logprobs)


@pytest.mark.parametrize(("device", "backend"), DEVICES)
@pytest.mark.parametrize("name", PAIRS)
def test_pair_losses_against_fp64(device: str, backend: Any, name: str) -> None:
    """Pairs of many blocks; of one token; with one side, the other side or both empty."""
    sequences, logprobs, others = tokens([2100, 5, 1, 0, 40, 0, 70, 1500, 1, 3, 0, 0], device)
    bound = PAIRS[name].bind(
        sequences=sequences,
        ref_logprobs=others,
        ref_sums=None,
        labels=None,
        kl=None,
        num_pairs=6,
        num_tokens=len(logprobs),
        dtype=torch.float32,
    )
    check_loss(backend, bound, logprobs)


@pytest.mark.parametrize(("device", "backend"), DEVICES)
@pytest.mark.parametrize("grad_filter", [1e-4, 0.3])
def test_filtered_gradients_stay_within_the_bound_on_the_device(device: str, backend: Any, grad_filter: float) -> None:
    """The bound that `linear_logprobs` states, over several blocks of the vocabulary on any GPU; something is left out."""
    data = placed(drawn(64, 32, 40000, torch.float32, seed=3), device)
    data["hidden"] *= 6.0
    data["targets"] = (data["hidden"] @ data["weight"].T).argmax(1)
    upstream = torch.linspace(-1, 1, 64, device=device)
    results = []
    for share in (0.0, grad_filter):
        x, w = (data[name].clone().requires_grad_() for name in ("hidden", "weight"))
        found = fr.linear_logprobs(x, w, data["targets"], outputs=("lse",), grad_filter=share)
        assert found.lse is not None
        (found.logprobs * upstream + 0.5 * found.lse * upstream).sum().backward()
        results.append((found.logprobs.detach(), x.grad, w.grad))
    (exact_lp, exact_x, exact_w), (lp, x, w) = results
    assert torch.equal(lp, exact_lp)  # the forward is exact whatever the filter
    allowed = 0.5 * upstream.abs() * grad_filter
    assert ((x - exact_x).norm(dim=1) <= allowed * data["weight"].norm(dim=1).max() + 1e-5).all()
    assert (w - exact_w).norm() <= (allowed * data["hidden"].norm(dim=1)).sum() + 1e-4
    assert not torch.equal(w, exact_w)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_gradient_is_scaled_in_fp32_on_the_device(dtype: torch.dtype) -> None:
    """Of a third, rounded to bf16 first, every entry would be 0.1 % off."""
    gradient = torch.randn(3001, 515, device="cuda").to(dtype)
    for factor in (1.0, 1 / 3):
        found = ops.scaled(gradient.clone(), torch.tensor(factor, device="cuda"))
        assert torch.equal(found, (gradient.float() * factor).to(dtype))

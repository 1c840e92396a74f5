from typing import Any

import pytest
import torch

import fused_rlhf as fr
from fused_rlhf.backends import chunked, tiling
from fused_rlhf.kernels.interface import Needs, Rows, TokenGrads
from fused_rlhf.kernels.statistics import STATISTICS
from fused_rlhf.segments import Sequences
from tests.helpers import ALL_OUTPUTS, TRANSFORMS, dense, inputs, plausible_logits, projection, relative, worst
from tests.memory import peak_tensor_bytes

BACKENDS = ["reference", "chunked"]


@pytest.fixture(params=[None, (8, 16)], ids=["one-tile", "many-tiles"])
def _tiling(request, monkeypatch):
    """The real tile sizes hold a test's whole input; tiny ones make every loop and merge run."""
    if request.param:
        rows, columns = request.param
        monkeypatch.setattr(tiling, "ROWS", rows)
        monkeypatch.setattr(tiling, "TILE", columns)
        monkeypatch.setattr(tiling, "row_block", lambda vocabulary, itemsize: rows)


def leaves(data):
    return {
        k: v.clone().requires_grad_() for k, v in data.items() if k in ("hidden", "weight", "bias") and v is not None
    }


@pytest.mark.usefixtures("_tiling")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("bias", "scale", "softcap", "per_token"), TRANSFORMS)
def test_outputs_and_gradients_equal_dense_fp64(backend, bias, scale, softcap, per_token):
    data = inputs(37, 11, 103, bias=bias, per_token=per_token)
    ours, theirs = leaves(data), leaves(data)
    transform = {"logit_scale": scale, "softcap": softcap}
    found = fr.linear_logprobs(**{**data, **ours}, **transform, outputs=ALL_OUTPUTS, backend=backend)
    truth = dense(**{**data, **theirs}, **transform)
    for name, expected in truth.items():
        assert worst(getattr(found, name), expected) < 1e-12, name
    names = ("logprobs", *(name for name, record in STATISTICS.items() if record.differentiable))
    upstream = torch.randn(len(names), 37, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    sum((getattr(found, n) * u).sum() for n, u in zip(names, upstream)).backward()
    sum((truth[n] * u).sum() for n, u in zip(names, upstream)).backward()
    for name in ours:
        assert relative(ours[name].grad, theirs[name].grad) < 1e-12, name


@pytest.mark.usefixtures("_tiling")
@pytest.mark.parametrize("round_logits", [False, True])
@pytest.mark.parametrize("native", [False, True])
def test_bf16_logprobs_and_gradients_at_logits_of_25(monkeypatch, native, round_logits):
    """Contract 1 and 2: |d logprob| <= 5e-5, gradients within twice dense torch's own error with fp32 logits."""
    monkeypatch.setattr(tiling, "native_bf16", lambda device: native)
    data = plausible_logits(96, 1003, torch.bfloat16)
    wide = {k: v.double() if v.is_floating_point() else v for k, v in data.items()}
    truth_leaves = leaves(wide)
    truth = dense(**{**wide, **truth_leaves})
    peak = (wide["hidden"] @ wide["weight"].T).abs().max()
    assert 24 < peak < 30  # the input is the hard one it claims to be
    assert truth["entropy"].median() > 0.5
    upstream = torch.randn(96, generator=torch.Generator().manual_seed(2))
    (truth["logprobs"] * upstream).sum().backward()

    plain = leaves(data)
    log_p = torch.log_softmax(plain["hidden"].float() @ plain["weight"].float().T, -1)
    (log_p.gather(1, data["targets"][:, None]).squeeze(1) * upstream).sum().backward()

    ours = leaves(data)
    found = fr.linear_logprobs(**{**data, **ours}, backend="chunked", round_logits=round_logits)
    assert found.logprobs.dtype == torch.float32
    (found.logprobs * upstream).sum().backward()
    error = worst(found.logprobs, truth["logprobs"])
    if native and round_logits:
        assert error > 1e-3  # rounding was allowed, and is seen: the contract's check can fail
        return
    assert error <= 5e-5
    for name in ours:
        exact = truth_leaves[name].grad
        rounding = relative(exact.to(torch.bfloat16), exact)
        assert relative(ours[name].grad, exact) <= 2 * max(relative(plain[name].grad, exact), rounding)


@pytest.mark.usefixtures("_tiling")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("level", [-120.0, 6e4, -6e4])
def test_extreme_logits_are_finite_and_right(backend, level):
    data = inputs(9, 4, 53)
    data["hidden"][:, 0], data["weight"][:, 0] = 1.0, level
    found = fr.linear_logprobs(**data, outputs=ALL_OUTPUTS, backend=backend)
    truth = dense(**data)
    assert all(torch.isfinite(getattr(found, name)).all() for name in ("logprobs", *ALL_OUTPUTS[:-1]))
    assert worst(found.logprobs, truth["logprobs"]) < 1e-9
    assert (found.logprobs <= 0).all()
    single: dict[str, Any] = {
        k: v.float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in data.items()
    }
    error = worst(fr.linear_logprobs(**single, backend=backend).logprobs, dense(**single)["logprobs"])
    assert error <= 2 * abs(level) * 2**-23 + 1e-5  # one rounding of a logit of that size


@pytest.mark.usefixtures("_tiling")
@pytest.mark.parametrize("backend", BACKENDS)
def test_columns_of_a_padded_vocabulary_hold_no_mass(backend):
    data = inputs(13, 6, 40)
    bias = torch.zeros(40, dtype=torch.float64)
    bias[33:] = -torch.inf
    data["targets"] %= 33
    data["bias"] = bias
    kept = {**data, "weight": data["weight"][:33], "bias": bias[:33]}
    ours, theirs = leaves(data), leaves(kept)
    names = ("logprobs", "entropy", "lse", "sum_sq", "max_logit")
    found = fr.linear_logprobs(**{**data, **ours}, outputs=names[1:], backend=backend)
    truth = dense(**{**kept, **theirs})
    for name in names:
        assert worst(getattr(found, name), truth[name]) < 1e-12
    (found.logprobs + found.entropy + found.sum_sq + found.max_logit).sum().backward()
    (truth["logprobs"] + truth["entropy"] + truth["sum_sq"] + truth["max_logit"]).sum().backward()
    assert relative(ours["hidden"].grad, theirs["hidden"].grad) < 1e-12
    assert relative(ours["weight"].grad[:33], theirs["weight"].grad) < 1e-12
    assert (ours["weight"].grad[33:] == 0).all()


@pytest.mark.usefixtures("_tiling")
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_a_row_stays_in_that_row(backend):
    data = inputs(11, 5, 64)
    clean = fr.linear_logprobs(**data, outputs=("entropy",), backend=backend)
    data["hidden"][4] = torch.nan
    found = fr.linear_logprobs(**data, outputs=("entropy",), backend=backend)
    others = torch.arange(11) != 4
    assert found.logprobs[4].isnan()
    assert found.entropy[4].isnan()
    assert torch.equal(found.logprobs[others], clean.logprobs[others])


@pytest.mark.usefixtures("_tiling")
def test_top1_takes_the_first_of_equal_logits():
    hidden = torch.ones(2, 3)
    weight = torch.ones(70, 3)
    found = fr.linear_logprobs(hidden, weight, torch.tensor([0, 1]), outputs=("is_top1",), backend="chunked")
    assert found.is_top1.tolist() == [True, False]


def test_forward_and_backward_repeat_to_the_bit():
    data = inputs(700, 24, 5000, torch.float32)

    def run():
        ours = leaves(data)
        found = fr.linear_logprobs(**{**data, **ours}, outputs=("entropy",), backend="chunked")
        (found.logprobs.sum() + found.entropy.sum()).backward()
        return found.logprobs, ours["hidden"].grad, ours["weight"].grad

    for a, b in zip(run(), run()):
        assert torch.equal(a, b)


def test_one_pass_sees_the_bits_of_the_forward():
    """Contract 3: old log-probs from the forward alone give a ratio of exactly 1 in the one-pass loss."""
    data = inputs(700, 24, 5000, torch.float32)
    old = fr.linear_logprobs(**data, backend="chunked").logprobs
    hidden = data["hidden"].requires_grad_()
    _, metrics = fr.linear_policy_loss(
        hidden, data["weight"], data["targets"], advantages=torch.ones(700), old_logprobs=old, objective=fr.GRPO()
    )
    assert metrics["ratio_mean"] == 1.0


@pytest.mark.parametrize("function", ["statistics", "gradients", "one_pass"])
def test_scratch_does_not_grow_with_tokens(function):
    """OP7: beyond inputs and gradients, memory is constant in N but for O(N) vectors."""

    def scratch(n):
        data = inputs(n, 16, 6000, torch.float32)
        ones, needs, head = torch.ones(n), Needs(True, True, False), projection(data["weight"])
        rows = Rows(data["hidden"], data["targets"], ones)
        bound = fr.GRPO().bind(
            advantages=ones,
            sequences=Sequences.of(torch.zeros(n, dtype=torch.int64), 1),
            old_logprobs=None,
            ref_logprobs=None,
            num_sequences=1,
            num_tokens=n,
        )
        stats = chunked.statistics(rows, head, ())
        run = {
            "statistics": lambda: chunked.statistics(rows, head, ALL_OUTPUTS),
            "gradients": lambda: chunked.gradients(rows, head, stats, TokenGrads(ones), needs),
            "one_pass": lambda: chunked.one_pass(rows, head, (), bound, needs),
        }[function]
        return peak_tensor_bytes(run)

    small, large = scratch(1024), scratch(8192)
    assert small > 0
    assert large - small < (8192 - 1024) * (16 * 4 * 2 + 40 * 8)  # x and dX block by block, and per-row vectors
    assert large < 3 * 4 * tiling.ROWS * (tiling.TILE + 6000) + 8192 * 500


def peaked(n=64, h=16, v=500):
    """Logits like a trained model's: most rows sure of a few tokens, some flat."""
    data = inputs(n, h, v, seed=3)
    z = data["hidden"] @ data["weight"].T
    data["hidden"] *= torch.where(torch.arange(n) % 4 == 0, 1.0, 6.0)[:, None]
    data["targets"] = torch.where(torch.arange(n) % 3 == 0, data["targets"], z.argmax(1))
    return data


@pytest.mark.usefixtures("_tiling")
@pytest.mark.parametrize("grad_filter", [1e-6, 1e-2, 0.3])
def test_filtered_gradients_stay_within_the_stated_bound(grad_filter):
    data, scale = peaked(), 0.9
    upstream = torch.randn(3, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grads = []
    for f in (0.0, grad_filter):
        ours = leaves(data)
        found = fr.linear_logprobs(
            **{**data, **ours}, logit_scale=scale, outputs=("lse", "sum_sq"), grad_filter=f, backend="chunked"
        )
        (found.logprobs * upstream[0] + found.lse * upstream[1] + found.sum_sq * upstream[2]).sum().backward()
        grads.append((found.logprobs.detach(), ours["hidden"].grad, ours["weight"].grad))
    (exact_lp, exact_x, exact_w), (lp, x, w) = grads
    assert torch.equal(lp, exact_lp)  # the forward is exact whatever the filter
    per_row = ((upstream[1] - upstream[0]).abs() + 2 * upstream[2].abs()) * grad_filter * scale
    assert ((x - exact_x).norm(dim=1) <= per_row * data["weight"].norm(dim=1).max() + 1e-13).all()
    assert (w - exact_w).norm() <= (per_row * data["hidden"].norm(dim=1)).sum() + 1e-13


def test_the_filter_skips_what_holds_no_mass_and_keeps_targets(monkeypatch):
    monkeypatch.setattr(tiling, "TILE", 16)
    monkeypatch.setattr(tiling, "ROWS", 8)
    monkeypatch.setattr(tiling, "row_block", lambda vocabulary, itemsize: 8)
    done = []
    original = chunked._BackwardBlock.add
    monkeypatch.setattr(
        chunked._BackwardBlock, "add", lambda self, z, *rest: (done.append(z.numel()), original(self, z, *rest))[1]
    )
    data = peaked()
    work = {}
    for f in (0.0, 1e-3, 0.999):
        done.clear()
        ours = leaves(data)
        fr.linear_logprobs(**{**data, **ours}, grad_filter=f, backend="chunked").logprobs.sum().backward()
        work[f] = sum(done)
    assert work[0.0] == 64 * 500
    assert work[1e-3] < 0.8 * work[0.0]
    # All but each row's target tile may go.
    assert 64 * 4 <= work[0.999] <= 64 * 2 * 16


@pytest.mark.parametrize("name", ["entropy", "mean_logit"])
def test_rows_whose_gradient_is_everywhere_are_not_filtered(monkeypatch, name):
    monkeypatch.setattr(tiling, "TILE", 16)
    data = peaked()
    mixed = torch.where(torch.arange(64) % 2 == 0, 0.3, 0.0)
    grads = []
    for f in (0.0, 0.5):
        ours = leaves(data)
        found = fr.linear_logprobs(**{**data, **ours}, outputs=(name,), grad_filter=f, backend="chunked")
        (found.logprobs.sum() + (getattr(found, name) * mixed).sum()).backward()
        grads.append(ours["hidden"].grad)
    assert relative(grads[1][::2], grads[0][::2]) < 1e-13
    assert relative(grads[1][1::2], grads[0][1::2]) > 1e-3

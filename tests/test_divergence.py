"""`linear_kl` on every backend. Triton's is tried in its interpreter, which test_linear_kl.py starts: see there."""

import math
import os
from typing import Any

import pytest
import torch

import fused_rlhf as fr
from fused_rlhf.backends import chunked, tiling
from fused_rlhf.kernels import interface
from tests.helpers import dense_logits, placed, plausible_logits, relative, worst
from tests.memory import peak_tensor_bytes

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ["triton"] if INTERPRETED else ["reference", "chunked"]
STREAMED = ["triton"] if INTERPRETED else ["chunked"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
KINDS = [("forward", 0.5), ("reverse", 0.5), ("jsd", 0.5), ("jsd", 0.1), ("jsd", 0.95)]
# bias of both, transform of the policy, transform of the reference, temperature per row
TRANSFORMS = [
    (False, {}, {}, False),
    (True, {}, {}, False),
    (False, {"logit_scale": 0.25}, {"ref_logit_scale": 0.5}, False),
    (False, {"softcap": 5.0}, {}, False),
    (False, {}, {"ref_softcap": 4.0}, True),
    (True, {"softcap": 5.0, "logit_scale": 0.7}, {"ref_softcap": 3.0, "ref_logit_scale": 1.2}, True),
]


@pytest.fixture(params=[None, (8, 16)], ids=["one-tile", "many-tiles"])
def _tiling(request, monkeypatch):
    """The real tile sizes hold a test's whole input; tiny ones make every loop and merge run."""
    if not request.param:
        return
    rows, columns = request.param
    monkeypatch.setattr(tiling, "TILE", columns)
    monkeypatch.setattr(tiling, "row_block", lambda vocabulary, itemsize: rows)
    if INTERPRETED:
        from fused_rlhf.kernels import linear_kl, ops

        monkeypatch.setattr(linear_kl, "ROW_STEP", 2 * columns)
        monkeypatch.setattr(linear_kl, "TILE", (rows, 2 * columns))
        monkeypatch.setattr(ops, "ROWS", 2 * rows)
        monkeypatch.setattr(ops, "divergence_rows", lambda *_: rows)
        monkeypatch.setattr(ops, "divergence_columns", lambda *_: 3 * columns)


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """What the kernels do not write is a NaN."""
    if INTERPRETED:
        empty = torch.empty

        def poisoned(*args, **kwargs):
            tensor = empty(*args, **kwargs)
            return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

        monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(autouse=True)
def _rounding(monkeypatch):
    """Triton's interpreter cuts fp32 off where it makes bf16 of it; a GPU rounds."""
    if INTERPRETED:
        from triton import language as tl
        from triton.runtime import interpreter

        convert = interpreter._convert_float

        def rounded(data, source, target, mode):
            if (source, target) != (tl.float32, tl.bfloat16):
                return convert(data, source, target, mode)
            return torch.tensor(data).bfloat16().view(torch.uint16).numpy()

        monkeypatch.setattr(interpreter, "_convert_float", rounded)


def widest(backend):
    """The widest dtype that a backend computes in."""
    return torch.float32 if backend == "triton" else torch.float64


def slack(backend):
    """What an error may be beside torch's own, which is 0 where torch is the truth."""
    return 2e-6 if backend == "triton" else 1e-12


def wide(data):
    return {k: v.double() if torch.is_tensor(v) else v for k, v in data.items()}


def trl_divergence():
    """Its function, which a machine without TRL does without."""
    return pytest.importorskip("trl.kernels.chunked_divergence").ChunkedDivergenceFunction.apply


def inputs(n, v, bias=False, per_row=False, dtype=torch.float64, seed=0):
    """Two heads of different hidden sizes over one vocabulary."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "hidden": (2 * randn(n, 11)).to(dtype),
        "weight": (randn(v, 11) / 11**0.5).to(dtype),
        "ref_hidden": (2 * randn(n, 7)).to(dtype),
        "ref_weight": (randn(v, 7) / 7**0.5).to(dtype),
        "bias": randn(v).to(dtype) if bias else None,
        "ref_bias": randn(v).to(dtype) if bias else None,
        "temperature": (torch.rand(n, generator=generator).double() + 0.5).to(dtype) if per_row else 1.0,
    }


def leaves(data):
    named = {k: data[k] for k in ("hidden", "weight", "bias") if data.get(k) is not None}
    return {k: v.clone().requires_grad_() for k, v in named.items()}


def log_probs(hidden, weight, bias, temperature, logit_scale=1.0, softcap=None):
    return torch.log_softmax(dense_logits(hidden, weight, bias, temperature, logit_scale, softcap), -1)


def truth(data, kind="forward", beta=0.5, logit_scale=1.0, softcap=None, ref_logit_scale=1.0, ref_softcap=None):
    """By torch's own KL divergence of two log_softmaxes."""
    bias, ref_bias, t = data.get("bias"), data.get("ref_bias"), data.get("temperature", 1.0)
    log_p = log_probs(data["hidden"], data["weight"], bias, t, logit_scale, softcap)
    log_q = log_probs(data["ref_hidden"], data["ref_weight"], ref_bias, t, ref_logit_scale, ref_softcap)

    def kl(log_a, log_b):
        return torch.nn.functional.kl_div(log_b, log_a, reduction="none", log_target=True).sum(-1)

    if kind == "forward":
        return kl(log_q, log_p)
    if kind == "reverse":
        return kl(log_p, log_q)
    log_m = torch.log(beta * log_q.exp() + (1 - beta) * log_p.exp())
    return beta * kl(log_q, log_m) + (1 - beta) * kl(log_p, log_m)


def gradients(function, data, upstream):
    """Value, and the gradients of its sum weighted by upstream."""
    ours = leaves(data)
    value = function({**data, **ours})
    (value * upstream.to(value.dtype)).sum().backward()
    return value.detach(), {k: v.grad for k, v in ours.items()}


@pytest.mark.usefixtures("_tiling")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("bias", "policy", "ref", "per_row"), TRANSFORMS)
@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_values_and_gradients_equal_dense_fp64(backend, bias, policy, ref, per_row, kind, beta):
    n = 21 if backend == "triton" else 37  # its interpreter is slow
    data = inputs(n, 103, bias, per_row, widest(backend))
    upstream = torch.randn(n, generator=torch.Generator().manual_seed(1)).double()
    upstream[5] = 0.0
    options = {"kind": kind, "beta": beta, **policy, **ref}
    found, grads = gradients(lambda d: fr.linear_kl(**d, **options, backend=backend), data, upstream)
    expected, exact = gradients(lambda d: truth(d, **options), wide(data), upstream)
    plain, own = gradients(lambda d: truth(d, **options), data, upstream)
    assert worst(found, expected) < 2 * worst(plain, expected) + slack(backend) / 10 * expected.abs().max()
    assert grads.keys() == exact.keys()
    for name in grads:
        assert relative(grads[name], exact[name]) < 2 * relative(own[name], exact[name]) + slack(backend), name


@pytest.mark.usefixtures("_tiling")
@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_gradcheck(kind, beta):
    data = inputs(5, 37, bias=True, per_row=True)
    free = leaves(data)

    def function(*tensors):
        return fr.linear_kl(**{**data, **dict(zip(free, tensors))}, kind=kind, beta=beta, softcap=6.0)

    assert torch.autograd.gradcheck(function, tuple(free.values()))


@pytest.mark.parametrize("backend", STREAMED)
@pytest.mark.parametrize(("kind", "beta"), [("forward", 0.0), ("reverse", 1.0), ("jsd", 0.3)])
def test_kinds_are_the_betas_of_trl(backend, kind, beta):
    data = inputs(9, 53, bias=True, dtype=torch.float32)
    order = ("hidden", "weight", "bias", "ref_hidden", "ref_weight", "ref_bias")
    theirs, _ = trl_divergence()(*(data[k] for k in order), beta, 0.8, 0.9, 6.0, 1.1, 5.0)
    del data["temperature"]
    options: dict[str, Any] = {"logit_scale": 0.9, "softcap": 6.0, "ref_logit_scale": 1.1, "ref_softcap": 5.0}
    options |= {"temperature": 0.8, "beta": beta if kind == "jsd" else 0.5, "backend": backend}
    ours = fr.linear_kl(**data, kind=kind, **options)
    assert worst(ours, theirs) < 1e-5


@pytest.mark.parametrize("backend", STREAMED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("distance", [1e-3, 1e-2, 0.3])
@pytest.mark.parametrize(("kind", "beta"), [("forward", 0.0), ("reverse", 1.0), ("jsd", 0.5)])
def test_errors_at_logits_of_25_are_torchs_own_and_values_never_negative(backend, dtype, distance, kind, beta):
    """Against fp64 on the same operands; a policy near its reference is where terms cancel."""
    exactly = plausible_logits(96, 1003, torch.float64)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(exactly["hidden"].shape, generator=generator, dtype=torch.float64)
    data = {
        "hidden": exactly["hidden"].to(dtype),
        "weight": exactly["weight"].to(dtype),
        "ref_hidden": (exactly["hidden"] * (1 + distance * noise)).to(dtype),
        "ref_weight": exactly["weight"].to(dtype),
    }
    upstream = torch.randn(96, generator=generator)

    def trl(d):
        return trl_divergence()(d["hidden"], d["weight"], None, d["ref_hidden"], d["ref_weight"], None, beta)[0]

    exact, exact_grads = gradients(lambda d: truth(d, kind), wide(data), upstream)
    plain, plain_grads = gradients(lambda d: truth(d, kind), {k: v.float() for k, v in data.items()}, upstream)
    theirs, their_grads = gradients(trl, data, upstream)
    ours, our_grads = gradients(lambda d: fr.linear_kl(**d, kind=kind, backend=backend), data, upstream)
    assert ours.dtype == torch.float32
    assert (exact > 0).all()
    assert (ours >= 0).all()
    assert relative(ours, exact) <= 1.5 * min(relative(plain, exact), relative(theirs, exact))
    if distance == 1e-3:  # an error of the log-sum-exp enters squared: ten times closer than either
        assert 10 * relative(ours, exact) < relative(plain, exact)
        assert (theirs < 0).any() or kind == "jsd"
    for name, grad in our_grads.items():
        rounding = relative(exact_grads[name].to(dtype), exact_grads[name])
        allowed = 2 * max(relative(plain_grads[name], exact_grads[name]), rounding)
        assert relative(grad, exact_grads[name]) <= allowed
        assert relative(grad, exact_grads[name]) <= 1.2 * relative(their_grads[name], exact_grads[name])


@pytest.mark.usefixtures("_tiling")
@pytest.mark.parametrize("backend", STREAMED)
@pytest.mark.parametrize("kind", interface.KINDS)
def test_a_policy_that_is_its_reference_has_no_divergence_and_no_gradient(backend, kind):
    data = plausible_logits(37, 211, torch.float32)
    hidden, weight = (data[k].requires_grad_() for k in ("hidden", "weight"))
    value = fr.linear_kl(hidden, weight, hidden, weight, kind, backend=backend)
    value.sum().backward()
    assert (value == 0).all()
    assert (hidden.grad == 0).all()
    assert (weight.grad == 0).all()


@pytest.mark.usefixtures("_tiling")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_columns_of_a_padded_vocabulary_change_nothing(backend, kind, beta):
    data = inputs(9, 40, bias=True, dtype=widest(backend))
    padded = {
        **data,
        **{k: torch.cat([data[k], torch.randn(13, data[k].shape[1]).to(data[k])]) for k in ("weight", "ref_weight")},
        **{k: torch.cat([data[k], torch.full((13,), -math.inf).to(data[k])]) for k in ("bias", "ref_bias")},
    }
    upstream = torch.linspace(-1, 1, 9)
    value, grads = gradients(lambda d: fr.linear_kl(**d, kind=kind, beta=beta, backend=backend), data, upstream)
    found, found_grads = gradients(lambda d: fr.linear_kl(**d, kind=kind, beta=beta, backend=backend), padded, upstream)
    assert worst(found, value) < slack(backend)
    assert relative(found_grads["hidden"], grads["hidden"]) < slack(backend)
    for name in ("weight", "bias"):
        assert relative(found_grads[name][:40], grads[name]) < slack(backend)
        assert (found_grads[name][40:] == 0).all()


@pytest.mark.usefixtures("_tiling")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("missing", ["bias", "ref_bias"])
def test_tokens_that_one_side_rules_out(backend, missing):
    """0 log 0 is 0: infinite where the first distribution has mass that the second has not, else what is left."""
    data = inputs(9, 40, bias=True, dtype=widest(backend))
    data[missing][7:9] = -math.inf
    infinite = {"bias": "forward", "ref_bias": "reverse"}[missing]
    true = wide(data)
    log_p = log_probs(true["hidden"], true["weight"], true["bias"], 1.0)
    log_q = log_probs(true["ref_hidden"], true["ref_weight"], true["ref_bias"], 1.0)
    log_a, log_b = (log_p, log_q) if missing == "bias" else (log_q, log_p)
    some = torch.ones(40, dtype=torch.bool).index_fill(0, torch.tensor([7, 8]), False)
    expected = (log_a.exp() * (log_a - log_b))[:, some].sum(-1)
    for kind in interface.KINDS:
        value, grads = gradients(lambda d, k=kind: fr.linear_kl(**d, kind=k, backend=backend), data, torch.ones(9))
        if kind == infinite:
            assert (value == math.inf).all()
            continue
        assert all(g.isfinite().all() for g in grads.values())
        if kind == "jsd":
            m = (log_p.exp() + log_q.exp()) / 2
            parts = (torch.special.xlogy(log.exp(), log.exp() / m).sum(-1) / 2 for log in (log_p, log_q))
            expected = sum(parts)
        assert worst(value, expected) < slack(backend)


@pytest.mark.usefixtures("_tiling")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("level", [-120.0, 6e4, -6e4])
@pytest.mark.parametrize("kind", interface.KINDS)
def test_extreme_logits_are_finite_and_right(backend, level, kind):
    data = inputs(9, 53, dtype=widest(backend))
    for hidden, weight in (("hidden", "weight"), ("ref_hidden", "ref_weight")):
        data[hidden][:, 0], data[weight][:, 0] = 1.0, level
    found, expected = fr.linear_kl(**data, kind=kind, backend=backend), truth(wide(data), kind)
    assert torch.isfinite(found).all()
    assert worst(found, expected) < 2 * worst(truth(data, kind), expected) + 1e-9


@pytest.mark.parametrize("backend", STREAMED)
@pytest.mark.parametrize("kind", interface.KINDS)
def test_distributions_without_a_token_in_common(backend, kind):
    """Each sure of a token of its own, by 200: p underflows where q is 1."""
    eye = 200 * torch.eye(6)[:, :2]
    value = fr.linear_kl(torch.tensor([[1.0, 0.0]]), eye, torch.tensor([[0.0, 1.0]]), eye, kind, backend=backend)
    assert worst(value, torch.tensor([math.log(2) if kind == "jsd" else 200.0])) < 1e-4


@pytest.mark.usefixtures("_tiling")
@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_rows_never_matter(backend):
    data = inputs(12, 40, per_row=True, dtype=widest(backend))
    mask = torch.tensor([1, 1, 1, 0, 1, 0, 1, 1, 1, 1, 0, 0])
    shaped = {k: data[k].view(3, 4, *data[k].shape[1:]).clone() for k in ("hidden", "ref_hidden", "temperature")}
    keep = mask.view(3, 4).bool()
    shaped["hidden"][~keep] = torch.nan
    shaped["ref_hidden"][~keep] = torch.nan
    shaped["temperature"][~keep] = 0.0
    upstream = torch.linspace(-1, 1, 12).double()
    whole = {**data, **{k: data[k][mask.bool()] for k in shaped}}
    expected, exact = gradients(lambda d: fr.linear_kl(**d, backend=backend), whole, upstream[mask.bool()])
    found, grads = gradients(
        lambda d: fr.linear_kl(**d, mask=mask.view(3, 4), backend=backend), {**data, **shaped}, upstream.view(3, 4)
    )
    assert found.shape == (3, 4)
    assert (found[~keep] == 0).all()
    assert worst(found[keep], expected) < slack(backend)
    assert (grads["hidden"][~keep] == 0).all()
    assert worst(grads["hidden"][keep], exact["hidden"]) < slack(backend)
    assert worst(grads["weight"], exact["weight"]) < slack(backend)


@pytest.mark.usefixtures("_tiling")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("side", ["hidden", "ref_hidden"])
def test_nan_in_a_row_stays_in_that_row(backend, side):
    data = inputs(11, 64, dtype=widest(backend))
    clean = fr.linear_kl(**data, kind="jsd", backend=backend)
    data[side][4] = torch.nan
    found = fr.linear_kl(**data, kind="jsd", backend=backend)
    others = torch.arange(11) != 4
    assert found[4].isnan()
    assert torch.equal(found[others], clean[others])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("nothing", ["no rows", "all masked"])
def test_no_rows_give_a_differentiable_zero(backend, nothing):
    data = inputs(0 if nothing == "no rows" else 3, 20, bias=True, dtype=widest(backend))
    mask = None if nothing == "no rows" else torch.zeros(3)
    value, grads = gradients(lambda d: fr.linear_kl(**d, mask=mask, backend=backend), data, torch.tensor(1.0))
    assert value.shape == data["hidden"].shape[:1]
    assert all((g == 0).all() for g in grads.values())


def test_rows_without_upstream_are_left_out_of_the_backward(monkeypatch):
    data = inputs(20, 50)
    seen = []
    original = chunked.divergence_gradients
    monkeypatch.setattr(
        chunked, "divergence_gradients", lambda rows, *rest: (seen.append(len(rows.hidden)), original(rows, *rest))[1]
    )
    upstream = torch.where(torch.arange(20) % 4 == 0, 1.5, 0.0)
    _, grads = gradients(lambda d: fr.linear_kl(**d), data, upstream)
    _, exact = gradients(truth, data, upstream)
    assert seen == [5]
    assert relative(grads["hidden"], exact["hidden"]) < 1e-12
    assert relative(grads["weight"], exact["weight"]) < 1e-12


@pytest.mark.parametrize("free", ["hidden", "weight", "bias"])
def test_what_is_frozen_costs_no_product(monkeypatch, free):
    products = []
    original = tiling.add_product_
    monkeypatch.setattr(
        tiling, "add_product_", lambda total, *rest, **k: (products.append(total.shape), original(total, *rest, **k))
    )
    data = inputs(6, 40, bias=True)
    data[free].requires_grad_()
    fr.linear_kl(**data).sum().backward()
    assert products == {"hidden": [(6, 11)], "weight": [(40, 11)], "bias": []}[free]
    assert all(data[k].grad is None for k in ("hidden", "weight", "bias") if k != free)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_reference_takes_no_gradient(backend):
    data = inputs(6, 40, bias=True, dtype=widest(backend))
    for tensor in data.values():
        if isinstance(tensor, torch.Tensor):
            tensor.requires_grad_()
    fr.linear_kl(**data, backend=backend).sum().backward()
    assert data["hidden"].grad is not None
    assert all(data[k].grad is None for k in ("ref_hidden", "ref_weight", "ref_bias"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_twice_adds_up_and_twice_differentiable_it_is_not(backend):
    data: dict[str, Any] = {**inputs(7, 30, dtype=widest(backend)), "backend": backend}
    data["hidden"].requires_grad_()
    value = fr.linear_kl(**data).sum()
    (3.7 * value).backward(retain_graph=True)
    value.backward()
    (once,) = torch.autograd.grad(fr.linear_kl(**data).sum(), data["hidden"])
    assert relative(data["hidden"].grad, 4.7 * once) < slack(backend)
    (once,) = torch.autograd.grad(fr.linear_kl(**data).square().sum(), data["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        once.sum().backward()


@pytest.mark.parametrize("backend", STREAMED)
def test_forward_and_backward_repeat_to_the_bit(backend):
    n, v = (20, 5000) if backend == "triton" else (700, 5000)
    data = inputs(n, v, dtype=torch.float32)
    one, two = (
        gradients(lambda d: fr.linear_kl(**d, kind="jsd", backend=backend), data, torch.ones(n)) for _ in range(2)
    )
    assert torch.equal(one[0], two[0])
    assert all(torch.equal(one[1][k], two[1][k]) for k in one[1])


@pytest.mark.parametrize("axis", ["rows", "vocabulary"])
@pytest.mark.parametrize("kind", interface.KINDS)
def test_scratch_grows_with_neither_rows_nor_vocabulary(monkeypatch, axis, kind):
    """Beyond vectors of N or V, dX (with its fp32 accumulator) and dW."""
    monkeypatch.setattr(tiling, "TILE", 512)
    monkeypatch.setattr(tiling, "ONE_PASS_BYTES", 4 << 20)

    def peaks(n, v):
        data = inputs(n, v, bias=True, dtype=torch.float32)
        data = {k: t.requires_grad_() if k in ("hidden", "weight", "bias") else t for k, t in data.items()}
        value = []
        forward = peak_tensor_bytes(lambda: value.append(fr.linear_kl(**data, kind=kind)))
        return forward, peak_tensor_bytes(lambda: value[0].sum().backward())

    small = peaks(512, 1500)
    large = peaks(4096, 1500) if axis == "rows" else peaks(512, 12000)
    more = (4096 - 512) * 4 if axis == "rows" else (12000 - 1500) * 4
    of_rows_and_gradients = {"rows": (12 * more, 45 * more), "vocabulary": (1 << 20, 15 * more)}[axis]
    logits = 4 * (4096 * 1500 if axis == "rows" else 512 * 12000)
    for before, after, growth in zip(small, large, of_rows_and_gradients):
        assert after - before < growth
        assert after < logits / 2


@pytest.mark.parametrize("backend", STREAMED)
def test_autocast_computes_in_its_dtype_and_mixed_dtypes_promote(backend):
    data: dict[str, Any] = {**inputs(9, 60, dtype=torch.float32), "backend": backend}
    half: dict[str, Any] = {k: v.bfloat16() if isinstance(v, torch.Tensor) else v for k, v in data.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, grads = gradients(lambda d: fr.linear_kl(**d), data, torch.ones(9))
    expected = fr.linear_kl(**half)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    assert grads["weight"].dtype == torch.float32
    mixed: dict[str, Any] = {**data, "ref_hidden": half["ref_hidden"], "ref_weight": half["ref_weight"]}
    promoted: dict[str, Any] = {k: v.float() if torch.is_tensor(v) else v for k, v in mixed.items()}
    assert worst(fr.linear_kl(**mixed), fr.linear_kl(**promoted)) == 0


def test_one_operand_of_fp64_makes_everything_fp64():
    half: dict[str, Any] = {k: v.bfloat16() if torch.is_tensor(v) else v for k, v in inputs(9, 60).items()}
    double = {**half, "hidden": half["hidden"].double()}
    assert fr.linear_kl(**double).dtype == torch.float64
    double = {**half, "ref_hidden": half["ref_hidden"].double()}
    assert worst(fr.linear_kl(**double), truth(wide(half))) < 1e-13


@pytest.mark.parametrize("backend", STREAMED)
@pytest.mark.parametrize("kind", interface.KINDS)
@pytest.mark.parametrize("size", [1e-3, 1e3])
def test_fp16_gradients_survive_upstreams_of_any_size(backend, kind, size):
    """The loss scale of fp16 training reaches the tiles in fp32."""
    data = {k: v.half() if torch.is_tensor(v) else v for k, v in inputs(9, 60).items()}
    upstream = torch.full((9,), size)
    _, grads = gradients(lambda d: fr.linear_kl(**d, kind=kind, backend=backend), data, upstream)
    _, exact = gradients(lambda d: truth(d, kind), wide(data), upstream)
    for name in grads:
        assert relative(grads[name], exact[name]) < 2e-3


@pytest.mark.usefixtures("_tiling")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("train_weight", [False, True])
@pytest.mark.parametrize("kind", interface.KINDS)
def test_low_rank_heads(backend, dtype, train_weight, kind):
    """W + s B A on both sides, against fp64 on the same operands; torch's own error is that of the dense reference."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    hidden, ref_hidden, weight, a, b = randn(19, 40), randn(19, 40), randn(103, 40) / 6, randn(4, 40) / 6, randn(103, 4)
    ref_weight, ref_a, ref_b = randn(103, 40) / 6, randn(3, 40) / 6, randn(103, 3)
    upstream = torch.randn(19, generator=generator)
    leaves = [t.requires_grad_() for t in (hidden, a, b)] + ([weight.requires_grad_()] if train_weight else [])

    def found(backend, as_dtype):
        x, w, first, second, y, v, third, fourth = (
            t.to(as_dtype) for t in (hidden, weight, a, b, ref_hidden, ref_weight, ref_a, ref_b)
        )
        head, ref = fr.Head(w, softcap=5.0, lora=(first, second, 0.7)), fr.Head(v, lora=(third, fourth, 0.5))
        value = fr.linear_kl(x, head, y, ref, kind, backend=backend)
        return [value.detach(), *torch.autograd.grad((value * upstream).sum(), leaves)]

    step = torch.finfo(dtype).eps if dtype == torch.float16 else 1e-6  # dz is rounded to the operands' dtype
    exact, torchs = found("reference", torch.float64), found("reference", dtype)
    for ours, theirs, true in zip(found(backend, dtype), torchs, exact):
        error, own = (ours.double() - true.double()).norm(), (theirs.double() - true.double()).norm()
        assert error <= 2 * own + step * true.double().norm()


def test_inside_torch_compile():
    data = inputs(6, 30, dtype=torch.float32)
    mask = torch.tensor([1, 1, 0, 1, 0, 1])
    upstream = torch.ones(6)
    torch._dynamo.reset()
    function = torch.compile(lambda d: fr.linear_kl(**d, kind="jsd", mask=mask) * 2, backend="eager")
    found, grads = gradients(function, data, upstream)
    expected, exact = gradients(lambda d: fr.linear_kl(**d, kind="jsd", mask=mask) * 2, data, upstream)
    assert worst(found, expected) < 1e-6
    assert all(worst(grads[k], exact[k]) < 1e-6 for k in grads)


BAD = [
    ({"kind": "kl"}, ValueError, r"kind must be one of \['forward', 'reverse', 'jsd'\], got 'kl'"),
    ({"kind": "jsd", "beta": 1.0}, ValueError, r"beta must lie in \(0, 1\), got 1.0; .*kind='reverse'"),
    ({"kind": "jsd", "beta": "half"}, TypeError, "beta must be a number, got str"),
    ({"beta": 0.1}, ValueError, "beta must be left at 0.5 for kind='forward', which has none; got 0.1"),
    ({"hidden": torch.randn(11)}, ValueError, r"hidden must be \(N, H\)"),
    ({"hidden": [1.0]}, TypeError, "hidden must be a tensor, got list"),
    ({"weight": torch.randn(20, 3)}, ValueError, r"weight must be \(V, H\) with H=11"),
    ({"ref_weight": None}, TypeError, "ref_weight must be a tensor, got NoneType"),
    ({"ref_weight": torch.randn(21, 7).double()}, ValueError, r"ref_weight must be \(V, H\) with V=20 .*\(21, 7\)"),
    ({"ref_hidden": torch.randn(5, 7).double()}, ValueError, r"ref_hidden must be \(6, 7\), got \(5, 7\)"),
    ({"ref_hidden": torch.ones(6, 7, dtype=torch.int64)}, TypeError, "ref_hidden must be one of .*int64"),
    ({"ref_weight": torch.randn(20, 7, device="meta")}, ValueError, "ref_weight must be on the device of hidden"),
    ({"ref_bias": torch.zeros(3)}, ValueError, r"ref_bias must be \(V,\) = \(20,\), got \(3,\)"),
    ({"mask": torch.ones(5)}, ValueError, r"mask must have the shape of the rows \(6,\), got \(5,\)"),
    ({"temperature": 0.0}, ValueError, "temperature must be finite and positive, got 0.0"),
    ({"temperature": torch.ones(5)}, ValueError, r"temperature must have the shape of the rows \(6,\), got \(5,\)"),
    ({"temperature": torch.zeros(6)}, ValueError, "temperature must be positive and finite"),
    ({"softcap": -1.0}, ValueError, "softcap must be finite and positive"),
    ({"ref_softcap": 0}, ValueError, "ref_softcap must be finite and positive, got 0"),
    ({"ref_logit_scale": math.inf}, ValueError, "ref_logit_scale must be finite, got inf"),
    ({"backend": "cuda"}, ValueError, "backend must be one of"),
    ({"backend": "triton"}, RuntimeError, r'needs tensors on a GPU, got hidden on cpu; use backend="chunked"'),
]


@pytest.mark.parametrize(
    ("change", "error", "message"), BAD, ids=lambda v: next(iter(v)) if isinstance(v, dict) else ""
)
def test_bad_input_is_refused_by_name(change, error, message, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(error, match=message):
        fr.linear_kl(**{**inputs(6, 20), **change})


def test_the_environment_decides_auto(monkeypatch):
    data = inputs(6, 20)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("FUSED_RLHF_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="needs tensors on a GPU"):
        fr.linear_kl(**data)
    assert fr.linear_kl(**data, backend="chunked").shape == (6,)
    monkeypatch.setenv("FUSED_RLHF_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="FUSED_RLHF_BACKEND must be one of"):
        fr.linear_kl(**data)
    monkeypatch.setenv("FUSED_RLHF_BACKEND", "reference")
    monkeypatch.setattr(chunked, "divergence", None)
    assert fr.linear_kl(**data).shape == (6,)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_on_the_device(device, dtype, kind, beta):
    """The backend that "auto" takes there, against fp64 on the same operands; the yardstick is dense torch with fp32 logits."""
    data = placed(inputs(37, 1003, bias=True, per_row=True, dtype=dtype), device)
    upstream = torch.linspace(-1, 2, 37, device=device)
    upstream[5] = 0.0
    options: dict[str, Any] = {"kind": kind, "beta": beta, "softcap": 5.0, "ref_logit_scale": 0.7}
    found, grads = gradients(lambda d: fr.linear_kl(**d, **options), data, upstream)
    again, same = gradients(lambda d: fr.linear_kl(**d, **options), data, upstream)
    wide, wider = (
        {k: v.to(t) if torch.is_tensor(v) else v for k, v in data.items()} for t in (torch.float32, torch.float64)
    )
    torchs, dense = gradients(lambda d: truth(d, **options), wide, upstream)
    expected, exact = gradients(lambda d: truth(d, **options), wider, upstream)
    assert worst(found, expected) <= 2 * worst(torchs, expected) + 5e-5
    assert torch.equal(found, again)
    for name in grads:
        step = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 1e-5
        assert relative(grads[name], exact[name]) <= 2 * relative(dense[name], exact[name]) + step, name
        assert torch.equal(grads[name], same[name])


@pytest.mark.parametrize("device", DEVICES)
def test_rows_outside_the_mask_cost_nothing_on_the_device(device):
    data = placed(inputs(9, 60, dtype=torch.bfloat16), device)
    mask = torch.arange(9, device=device) % 3 != 0
    data["hidden"][~mask] = data["ref_hidden"][~mask] = torch.nan
    found, grads = gradients(lambda d: fr.linear_kl(**d, mask=mask), data, torch.ones(9, device=device))
    assert (found[~mask] == 0).all()
    assert (grads["hidden"][~mask] == 0).all()
    assert all(g.isfinite().all() for g in (found, *grads.values()))

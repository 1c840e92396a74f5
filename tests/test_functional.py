import math

import pytest
import torch

import fused_rlhf as fr
from tests.helpers import inputs, placed, relative, worst

N, H, V, B, T = 6, 4, 20, 2, 3


def good():
    return {"hidden": torch.randn(N, H), "weight": torch.randn(V, H), "targets": torch.randint(V, (N,))}


BAD_LOGPROBS = [
    ({"hidden": torch.randn(H)}, ValueError, r"hidden must be \(N, H\)"),
    ({"hidden": [1.0]}, TypeError, "hidden must be a tensor, got list"),
    ({"hidden": torch.ones(N, H, dtype=torch.int64)}, TypeError, "hidden must be one of .*int64"),
    ({"weight": torch.randn(V, H + 1)}, ValueError, r"weight must be \(V, H\) with H=4.*\(20, 5\)"),
    ({"weight": torch.randn(0, H)}, ValueError, "weight must be"),
    ({"weight": torch.randn(V, H, device="meta")}, ValueError, "weight must be on the device of hidden, cpu, got meta"),
    ({"targets": torch.zeros(N)}, TypeError, "targets must be int64, got torch.float32"),
    ({"targets": torch.zeros(N, dtype=torch.int32)}, TypeError, "targets must be int64"),
    ({"targets": torch.zeros(N - 1, dtype=torch.int64)}, ValueError, r"targets must have shape \(6,\).*\(5,\)"),
    ({"targets": torch.full((N,), V)}, ValueError, r"targets must lie in \[0, 20\).*got 20 at flat position 0"),
    ({"targets": torch.full((N,), -1)}, ValueError, "ignore_index=-100, got -1"),
    ({"bias": torch.zeros(V + 1)}, ValueError, r"bias must be \(V,\) with V=20"),
    ({"temperature": 0.0}, ValueError, "temperature must be finite and positive, got 0.0"),
    ({"temperature": -1}, ValueError, "temperature must be finite and positive, got -1"),
    ({"temperature": "hot"}, TypeError, "temperature must be a number, got str"),
    (
        {"temperature": torch.zeros(N)},
        ValueError,
        "temperature must be positive and finite for every scored token, got 0",
    ),
    ({"temperature": torch.ones(N + 1)}, ValueError, "temperature must have the shape of targets"),
    ({"temperature": torch.ones(N, requires_grad=True)}, ValueError, "temperature must not require a gradient"),
    ({"logit_scale": math.inf}, ValueError, "logit_scale must be finite, got inf"),
    ({"softcap": 0.0}, ValueError, "softcap must be finite and positive"),
    ({"softcap": math.nan}, ValueError, "softcap must be finite and positive, got nan"),
    ({"ignore_index": 1.5}, TypeError, "ignore_index must be an int"),
    ({"outputs": ("entropies",)}, ValueError, r"outputs must be among \['entropy', 'lse', .*got 'entropies'"),
    ({"outputs": "entropy"}, TypeError, "outputs must be a sequence of names"),
    ({"grad_filter": 1.0}, ValueError, r"grad_filter must lie in \[0, 1\), got 1.0"),
    ({"grad_filter": -0.1}, ValueError, "grad_filter must lie in .*got -0.1"),
    ({"grad_filter": math.nan}, ValueError, "grad_filter must be finite, got nan"),
    ({"process_group": object()}, TypeError, "process_group must be a torch.distributed.ProcessGroup, got object"),
    (
        {"backend": "cuda"},
        ValueError,
        r"backend must be one of \['auto', 'triton', 'chunked', 'reference'\], got 'cuda'",
    ),
    ({"backend": "triton"}, RuntimeError, 'needs tensors on a GPU, got hidden on cpu; use backend="chunked"'),
]


@pytest.mark.parametrize(
    ("change", "error", "message"), BAD_LOGPROBS, ids=lambda v: next(iter(v)) if isinstance(v, dict) else ""
)
def test_bad_input_is_refused_by_name(monkeypatch, change, error, message):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(error, match=message):
        fr.linear_logprobs(**{**good(), **change})


def policy():
    return {**good(), "advantages": torch.ones(N), "objective": fr.GRPO()}


BAD_POLICY = [
    ({"objective": "grpo"}, TypeError, "objective must be a PolicyLoss"),
    (
        {"objective": fr.GRPO(beta=0.1)},
        ValueError,
        "ref_logprobs or ref_hidden must be given when beta is not 0, got neither",
    ),
    (
        {"advantages": torch.ones(N + 1)},
        ValueError,
        r"advantages must have shape \(1,\) or that of targets \(6,\), got \(7,\)",
    ),
    ({"old_logprobs": torch.ones(N + 1)}, ValueError, "old_logprobs must have the shape of targets"),
    ({"completion_mask": torch.ones(2)}, ValueError, "completion_mask must have the shape of targets"),
    ({"mode": "fast"}, ValueError, "mode must be 'auto', 'one_pass' or 'two_phase', got 'fast'"),
    ({"outputs": ("lse",)}, ValueError, r"outputs must be among \['entropy'\], got 'lse'"),
    ({"cu_seqlens": torch.tensor([0, 4])}, ValueError, r"cu_seqlens must rise from 0 to N=6, got \[0, 4\]"),
    ({"cu_seqlens": torch.tensor([0, 4, 2, 6])}, ValueError, "cu_seqlens must rise"),
    ({"cu_seqlens": torch.tensor([0.0, 6.0])}, ValueError, "cu_seqlens must be .* integers"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_POLICY)
def test_bad_policy_input_is_refused_by_name(change, error, message):
    with pytest.raises(error, match=message):
        fr.linear_policy_loss(**{**policy(), **change})


def test_fp16_one_pass_is_refused_and_auto_avoids_it():
    data = policy()
    data["hidden"] = data["hidden"].half().requires_grad_()
    with pytest.raises(ValueError, match=r"one_pass.* must not be used with fp16"):
        fr.linear_policy_loss(**data, mode="one_pass")
    loss, _ = fr.linear_policy_loss(**data)
    assert loss.grad_fn.name() != "_OnePassLossBackward"


def test_shapes_and_dtypes_of_the_result():
    x, w, y = torch.randn(B, T, H).bfloat16(), torch.randn(V, H).bfloat16(), torch.randint(V, (B, T))
    found = fr.linear_logprobs(x, w, y, outputs=("is_top1", "entropy"))
    assert found.logprobs.shape == found.entropy.shape == found.is_top1.shape == (B, T)
    assert found.logprobs.dtype == found.entropy.dtype == torch.float32
    assert found.is_top1.dtype == torch.bool
    assert found.lse is None
    assert found.sum_sq is None


def ragged():
    """Two sequences of 5 and 2 real tokens, padded to 5; NaN where nothing may look."""
    data = inputs(10, H, V, per_token=True)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 2:] = False
    shaped = {k: data[k].view(2, 5, *data[k].shape[1:]) for k in ("hidden", "targets", "temperature")}
    shaped["hidden"][~mask] = torch.nan
    rest = {
        "old_logprobs": torch.full((2, 5), -2.5, dtype=torch.float64),
        "completion_mask": mask,
        "weight": data["weight"],
    }
    return {**shaped, **rest, "advantages": torch.tensor([1.0, -0.5], dtype=torch.float64)}


@pytest.mark.parametrize(
    "preset", [fr.GRPO(), fr.DAPO(), fr.DrGRPO(max_completion_length=7)], ids=["grpo", "dapo", "dr_grpo"]
)
@pytest.mark.parametrize("mode", ["one_pass", "two_phase"])
def test_padded_flat_and_packed_batches_agree(preset, mode):
    data = ragged()
    mask = data["completion_mask"]
    packed = {k: data[k][mask] for k in ("hidden", "targets", "temperature", "old_logprobs")}
    packed |= {"weight": data["weight"], "advantages": data["advantages"], "cu_seqlens": torch.tensor([0, 5, 7])}
    results = []
    for batch in (data, packed):
        hidden, weight = batch["hidden"].clone().requires_grad_(), batch["weight"].clone().requires_grad_()
        loss, metrics = fr.linear_policy_loss(
            **{**batch, "hidden": hidden, "weight": weight}, objective=preset, mode=mode, outputs=("entropy",)
        )
        loss.backward()
        grad = hidden.grad[mask] if hidden.dim() == 3 else hidden.grad
        results.append((loss, grad, weight.grad, *metrics.values()))
    for a, b in zip(*results):
        assert worst(a, b) < 1e-14
    assert not results[0][1].isnan().any()


@pytest.mark.parametrize(
    "preset", [fr.GRPO(), fr.DAPO(), fr.DrGRPO(max_completion_length=7)], ids=["grpo", "dapo", "dr_grpo"]
)
def test_micro_batches_sum_to_the_whole(preset):
    """With global counts given, the split into micro-batches does not show."""
    data = ragged()
    tokens = int(data["completion_mask"].sum())

    def gradient(parts):
        weight = data["weight"].clone().requires_grad_()
        for part in parts:
            batch = {k: v[part] for k, v in data.items() if k != "weight"}
            loss, _ = fr.linear_policy_loss(
                **batch, weight=weight, objective=preset, num_sequences=2, num_tokens=tokens
            )
            loss.backward()
        return weight.grad

    assert relative(gradient([slice(0, 1), slice(1, 2)]), gradient([slice(0, 2)])) < 1e-14
    assert relative(gradient([[1, 0]]), gradient([slice(0, 2)])) < 1e-14


def test_a_fully_masked_sequence_counts_as_zero():
    data = ragged()
    data["completion_mask"][1] = False
    loss, _ = fr.linear_policy_loss(**data, objective=fr.GRPO())
    alone = {k: v[:1] for k, v in data.items() if k != "weight"}
    only, _ = fr.linear_policy_loss(**alone, weight=data["weight"], objective=fr.GRPO())
    assert torch.isfinite(loss)
    assert worst(loss, only / 2) < 1e-14


def test_an_environment_variable_decides_auto_alone(monkeypatch):
    monkeypatch.setenv("FUSED_RLHF_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="FUSED_RLHF_BACKEND must be one of"):
        fr.linear_logprobs(**good())
    assert fr.linear_logprobs(**good(), backend="chunked").logprobs.shape == (N,)


def everything_on(device):
    """Log-probs, a policy, a preference and a KL with their gradients, of tensors that all lie on `device`."""
    data = placed(inputs(24, 64, 301, torch.float32), device)
    hidden, weight = (data[name].bfloat16().requires_grad_() for name in ("hidden", "weight"))
    targets, ones = data["targets"], torch.ones(24, device=device)
    halves = {"hidden": hidden.view(4, 6, 64), "weight": weight, "targets": targets.view(4, 6)}
    values = [
        fr.linear_logprobs(hidden, weight, targets, outputs=("entropy",)).entropy.sum(),
        *(
            fr.linear_policy_loss(hidden, weight, targets, advantages=ones, objective=fr.GRPO(), mode=mode)[0]
            for mode in ("one_pass", "two_phase")
        ),
        fr.linear_preference_loss(**halves, objective=fr.DPO(), ref_logprobs=-30 * torch.ones(4, device=device))[0],
        fr.linear_kl(hidden, weight, hidden.detach() * 0.9, weight.detach()).sum(),
    ]
    results = []
    for value in values:
        results += [value.detach(), *torch.autograd.grad(value, (hidden, weight), retain_graph=True)]
    assert {result.device for result in results} == {hidden.device}
    return [result.cpu() for result in results]


def test_everything_is_repeatable_to_the_bit():
    results, again = everything_on("cpu"), everything_on("cpu")
    assert all(result.isfinite().all() for result in results)
    assert all(map(torch.equal, results, again))


@pytest.mark.gpu
def test_a_head_on_a_device_that_is_not_the_current_one():
    """As `device_map="auto"` leaves it: kernels must start on the tensors' device, whichever is current."""
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two CUDA devices, and torch finds {torch.cuda.device_count()}")
    with torch.cuda.device(0):
        elsewhere = everything_on("cuda:1")
        assert torch.cuda.current_device() == 0
        here = everything_on("cuda:0")
    if torch.cuda.get_device_name(0) == torch.cuda.get_device_name(1):
        assert all(map(torch.equal, elsewhere, here))
    assert all(result.isfinite().all() for result in elsewhere)

"""A curve is one record in torch (and one in Triton, tried in interpreter_cases.py): all that uses curves then has it."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fused_rlhf as fr
from fused_rlhf import lm_head
from fused_rlhf.kernels.transforms import CURVES, Transform
from tests.helpers import HARDCAP, inputs, relative, worst

BACKENDS = ["chunked", "reference"]


@pytest.fixture
def _hardcap(monkeypatch):
    monkeypatch.setitem(CURVES, "hardcap", HARDCAP)


def capped(data, cap=0.8):
    """Dense fp64 logits, which autograd differentiates."""
    z = 0.7 * (data["hidden"] @ data["weight"].T + data["bias"])
    return z.clamp(-cap, cap) / data["temperature"][:, None]


def leaves(data):
    return {**data, **{k: data[k].clone().requires_grad_() for k in ("hidden", "weight", "bias")}}


def head_of(data, **options):
    return fr.Head(data["weight"], data["bias"], 0.7, **options)


def assert_equal_gradients(ours, dense):
    for name in ("hidden", "weight", "bias"):
        assert relative(ours[name].grad, dense[name].grad) < 1e-12, name


@pytest.mark.usefixtures("_hardcap")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_registered_curve_has_values_and_gradients(backend):
    ours, dense = (leaves(inputs(23, 8, 61, bias=True, per_token=True)) for _ in range(2))
    upstream = torch.randn(3, 23, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = fr.linear_logprobs(
        ours["hidden"],
        head_of(ours, curve=("hardcap", 0.8)),
        ours["targets"],
        temperature=ours["temperature"],
        outputs=("entropy", "lse", "margin"),
        backend=backend,
    )
    log_p = torch.log_softmax(capped(dense), -1)
    true = (
        log_p.gather(1, dense["targets"][:, None])[:, 0],
        -(log_p.exp() * log_p).sum(-1),
        torch.logsumexp(capped(dense), -1),
    )
    for value, right in zip((found.logprobs, found.entropy, found.lse), true):
        assert worst(value, right) < 1e-12
    largest = capped(dense).topk(2, -1).values
    assert worst(found.margin, largest[:, 0] - largest[:, 1]) < 1e-12
    sum((v * g).sum() for v, g in zip((found.logprobs, found.entropy, found.lse), upstream)).backward()
    sum((v * g).sum() for v, g in zip(true, upstream)).backward()
    assert_equal_gradients(ours, dense)


@pytest.mark.usefixtures("_hardcap")
@pytest.mark.parametrize("mode", ["one_pass", "two_phase"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_registered_curve_in_a_loss(backend, mode):
    ours, dense = (leaves(inputs(23, 8, 61, bias=True, per_token=True)) for _ in range(2))
    advantages = torch.linspace(-1, 1, 23, dtype=torch.float64)
    loss, _ = fr.linear_policy_loss(
        ours["hidden"],
        head_of(ours, curve=("hardcap", 0.8)),
        ours["targets"],
        advantages=advantages,
        objective=fr.REINFORCE(),
        temperature=ours["temperature"],
        backend=backend,
        mode=mode,
    )
    log_p = torch.log_softmax(capped(dense), -1).gather(1, dense["targets"][:, None])[:, 0]
    true = -(advantages * log_p).mean()
    assert worst(loss, true) < 1e-12
    loss.backward()
    true.backward()
    assert_equal_gradients(ours, dense)


@pytest.mark.usefixtures("_hardcap")
@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_registered_curve_in_a_divergence(backend, kind):
    ours, dense = (leaves(inputs(11, 8, 61, bias=True, per_token=True)) for _ in range(2))
    other = inputs(11, 8, 61, seed=3)
    ref = fr.Head(other["weight"])
    value = fr.linear_kl(
        ours["hidden"],
        head_of(ours, curve=("hardcap", 0.8)),
        other["hidden"],
        ref,
        kind,
        temperature=ours["temperature"],
        backend=backend,
    )
    log_p = torch.log_softmax(capped(dense), -1)
    log_q = torch.log_softmax(other["hidden"] @ other["weight"].T / dense["temperature"][:, None], -1)
    p, q = log_p.exp(), log_q.exp()
    log_m = ((p + q) / 2).log()
    true = {
        "forward": lambda: (q * (log_q - log_p)).sum(-1),
        "reverse": lambda: (p * (log_p - log_q)).sum(-1),
        "jsd": lambda: ((p * (log_p - log_m)).sum(-1) + (q * (log_q - log_m)).sum(-1)) / 2,
    }[kind]()
    assert worst(value, true) < 1e-12
    (2.5 * value).sum().backward()
    (2.5 * true).sum().backward()
    assert_equal_gradients(ours, dense)


class Clamping(nn.Module):
    """A model whose logits are clamped: all that `lm_head.probe` sees of one."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 100, bias=False)

    def forward(self, x):
        return SimpleNamespace(logits=(0.5 * self.head(x)).clamp(-3.0, 3.0))


def test_the_probe_of_a_model_knows_a_registered_curve(monkeypatch):
    model, x = Clamping(), torch.randn(1, 3, 4)
    with pytest.raises(ValueError, match="unsupported head"):
        lm_head.probe(model, model.head, lambda: model(x))
    monkeypatch.setitem(CURVES, "hardcap", HARDCAP)
    probed = lm_head.probe(model, model.head, lambda: model(x))
    assert probed.transform == Transform(0.5, "hardcap", 3.0)
    head = probed.head
    assert head.weight is model.head.weight
    assert (head.logit_scale, head.softcap, head.curve) == (0.5, None, ("hardcap", 3.0))
    targets = torch.tensor([5, 1, 99])
    true = torch.log_softmax(model(x).logits[0], -1).gather(1, targets[:, None])[:, 0]
    assert worst(fr.linear_logprobs(x[0], head, targets).logprobs, true) < 1e-5


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"curve": ("nonsense", 1.0)}, ValueError, r"curve must be one of \['softcap'\], got 'nonsense'"),
        ({"curve": ("softcap", float("nan"))}, ValueError, "the parameter of the curve 'softcap' must be finite"),
        ({"curve": ("softcap", 1.0), "softcap": 2.0}, ValueError, "curve must be None where there is a softcap"),
    ],
)
def test_a_curve_that_is_none_is_refused(options, error, message):
    data = inputs(3, 4, 9)
    with pytest.raises(error, match=message):
        fr.linear_logprobs(data["hidden"], fr.Head(data["weight"], **options), data["targets"])


def test_softcap_is_short_for_its_curve():
    data = inputs(7, 4, 30)
    heads = fr.Head(data["weight"], softcap=2.0), fr.Head(data["weight"], curve=("softcap", 2.0))
    one, two = (fr.linear_logprobs(data["hidden"], head, data["targets"]).logprobs for head in heads)
    assert torch.equal(one, two)

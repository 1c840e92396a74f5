import pytest
import torch

from fused_rlhf.bench import objectives
from fused_rlhf.bench.cases import Case
from fused_rlhf.bench.inputs import build, fp64_reference
from fused_rlhf.bench.provider import validate
from fused_rlhf.bench.registry import PROVIDERS

CASES = [(op, name) for op in ("grpo", "dpo") for name in objectives.names(op)]


def test_every_preset_of_the_registries_is_there():
    assert {"grpo", "cispo", "gspo", "ppo", "rloo"} <= set(objectives.names("grpo"))
    assert {"dpo", "simpo", "orpo", "ipo", "aot"} <= set(objectives.names("dpo"))
    assert not {"kto", "apo_zero_unpaired"} & set(objectives.names("dpo"))
    assert objectives.names("kl") == []


@pytest.mark.parametrize(("op", "name"), CASES)
def test_ours_and_dense_torch_agree_on_every_objective(op, name):
    case = Case(op=op, objective=name, N=32, T=8, H=16, V=120, density=0.75)
    inputs = build(case, "cpu", fp64_reference(case, "cpu"))
    found = {}
    for provider in ("dense", "ours-chunked"):
        inputs.hidden.grad = inputs.weight.grad = None
        output = PROVIDERS[provider].step(inputs)()
        output.loss.backward()
        found[provider] = [output.loss.detach(), inputs.hidden.grad, inputs.weight.grad]
    for dense, ours in zip(*found.values()):
        scale = dense.abs().max().clamp(min=1e-6).item()
        torch.testing.assert_close(ours, dense, rtol=1e-3, atol=1e-3 * scale)
    assert name in case.label


def test_an_objective_of_another_op_is_refused():
    with pytest.raises(ValueError, match=r"objective must be one of \['aot', .*\] with dpo, got 'cispo'"):
        validate(Case(op="dpo", objective="cispo", N=32, T=8))
    with pytest.raises(ValueError, match=r"objective must be one of \[\] with kl, got 'grpo'"):
        validate(Case(op="kl", objective="grpo"))
    assert not PROVIDERS["liger"].where(Case(objective="cispo", N=32, T=8))
    assert not PROVIDERS["ours-one_pass"].where(Case(objective="gspo", N=32, T=8))

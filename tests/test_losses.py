import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fused_rlhf as fr
from fused_rlhf import losses
from tests.helpers import inputs

MODULES = {
    name: getattr(fr, name) for name in fr.__all__ if name.startswith("FusedLinear") and name != "FusedLinearLoss"
}


def batch():
    data = inputs(12, 5, 40, bias=True)
    return {
        "hidden": data["hidden"].view(4, 3, 5),
        "weight": data["weight"],
        "targets": data["targets"].view(4, 3),
        "bias": data["bias"],
        "completion_mask": torch.arange(3).expand(4, 3) < torch.tensor([[3], [2], [1], [3]]),
    }


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_is_its_function_with_the_options_of_its_construction(name):
    preset = getattr(fr, name.removeprefix("FusedLinear").removesuffix("Loss"))
    options = {"max_completion_length": 3} if name == "FusedLinearDrGRPOLoss" else {}
    module = MODULES[name](**options, softcap=4.0, temperature=0.7)
    objective = preset(**options)
    assert module.objective == objective
    data, extra = batch(), dict[str, Any]()
    function: Callable[..., Any]
    if isinstance(objective, fr.PolicyLoss):
        advantages, old = torch.tensor([1.0, -1.0, 0.5, 2.0]), torch.full((4, 3), -3.0)
        function = fr.linear_policy_loss
        extra |= {"advantages": advantages, "old_logprobs": old}
    else:
        function = fr.linear_preference_loss
        if objective.needs_reference:
            extra["ref_logprobs"] = torch.full((4, 3), -3.0)
        if not objective.paired:
            extra["labels"] = torch.tensor([True, False, True, False])
    found, metrics = module(**data, **extra)
    expected, same = function(**data, **extra, objective=objective, softcap=4.0, temperature=0.7)
    assert torch.equal(found, expected)
    assert metrics.keys() == same.keys()
    hotter, _ = module(**data, **extra, temperature=0.9)  # the call's own options go before the module's
    expected, _ = function(**data, **extra, objective=objective, softcap=4.0, temperature=0.9)
    assert torch.equal(hotter, expected)


def test_modules_can_be_pickled_and_tell_what_they_compute():
    module = fr.FusedLinearGRPOLoss(beta=0.1)
    again = pickle.loads(pickle.dumps(module))
    assert again.objective == module.objective
    assert "beta=0.1" in repr(module)


def test_an_objective_of_another_kind_or_an_unknown_option_is_refused():
    with pytest.raises(TypeError, match="objective must be a PolicyLoss or a PreferenceLoss, got str"):
        losses.FusedLinearLoss("grpo")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="gamma is no option"):
        fr.FusedLinearGRPOLoss(gamma=1.0)

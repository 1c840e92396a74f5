import inspect
import typing

import pytest

import fused_rlhf as fr
from fused_rlhf import losses, objectives, preferences
from fused_rlhf.objectives import policy, preference, signatures

POLICIES = {make.__name__: make for make in objectives.PRESETS.values()}
PREFERENCES = {make.__name__: make for make in preferences.PRESETS.values()}


def names(function):
    return {name for name, p in inspect.signature(function).parameters.items() if p.kind is not p.VAR_KEYWORD}


@pytest.mark.parametrize("name", POLICIES)
def test_what_the_type_checker_reads_is_what_a_policy_preset_takes(name):
    protocol = getattr(signatures, policy.__annotations__[name].removeprefix("signatures."))
    assert names(protocol.__call__) - {"self"} | set(signatures.Terms.__annotations__) == names(POLICIES[name])


def test_what_the_type_checker_reads_is_what_a_preference_preset_takes():
    known = set().union(*(signatures.keywords(loss.function) for loss in preferences.PREFERENCES.values()))
    for name, make in PREFERENCES.items():
        assert preference.__annotations__[name] == "signatures.Preferring"
        assert names(signatures.Preferring.__call__) - {"self"} == names(make) | known
    fields = typing.get_type_hints(objectives.PolicyLoss)
    assert {key: fields[key] for key in signatures.Terms.__annotations__} == typing.get_type_hints(signatures.Terms)


@pytest.mark.parametrize("name", [*POLICIES, *PREFERENCES])
def test_a_presets_signature_tells_the_truth(name):
    """Its defaults, given by name, change nothing."""
    make = (POLICIES | PREFERENCES)[name]
    defaults = {
        key: p.default
        for key, p in inspect.signature(make).parameters.items()
        if p.default is not inspect.Parameter.empty
    }
    given = {key: value for key, value in defaults.items() if value is not None}
    made = make()
    assert make(**given).options | made.options == make(**given).options
    plain = {field: getattr(made, field) for field in defaults if field in type(made).__dataclass_fields__}
    assert plain == {field: defaults[field] for field in plain}


def test_a_presets_docstring_has_formula_source_and_options():
    text = inspect.getdoc(fr.DAPO)
    for part in (
        "DAPO: the surrogate ppo_clip at token level, weighted by token_mean   (arXiv:2503.14476)",
        "    ppo_clip: -min(min(r, delta) A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A)",
        "    token_mean: Mean over all active tokens of the global batch",
        "    epsilon: short for equal epsilon_low and epsilon_high.",
        "    epsilon_low, epsilon_high, delta, dual_clip: of the formulas above.",
        "    beta: weight of the KL to the reference, >= 0.",
    ):
        assert part in text
    assert "epsilon: short" not in inspect.getdoc(fr.REINFORCE)
    assert "    token_weight: a name" not in text
    text = inspect.getdoc(fr.SimPO)
    assert "SimPO: mean over pairs of simpo   (arXiv:2405.14734)\n\n    simpo: -log sigmoid(" in text
    assert "    gamma, alpha, label_smoothing: of the formula above.\n    beta: > 0." in text
    assert "mean over completions of kto" in inspect.getdoc(fr.KTO)


def test_epsilon_is_short_for_both_bounds():
    assert fr.GRPO(epsilon=0.1) == fr.GRPO(epsilon_low=0.1, epsilon_high=0.1)
    assert fr.DAPO(epsilon=0.1).options == {"epsilon_low": 0.1, "epsilon_high": 0.1}
    assert fr.GSPO(epsilon=None) == fr.GSPO()
    with pytest.raises(
        ValueError, match=r"epsilon must be None beside epsilon_high, for it means both bounds; got 0.1"
    ):
        fr.GRPO(epsilon=0.1, epsilon_high=0.2)
    with pytest.raises(ValueError, match="epsilon must be finite and > 0, got 0"):
        fr.GRPO(epsilon=0)
    with pytest.raises(TypeError, match="epsilon is no option of cispo"):
        fr.CISPO(epsilon=0.1)  # type: ignore[call-arg]


def test_the_nearest_name_is_suggested():
    with pytest.raises(TypeError, match=r"epsilom is no option of .* \(did you mean 'epsilon'\?\)"):
        fr.GRPO(epsilom=0.1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"delt is no option of .* \(did you mean 'delta'\?\)"):
        objectives.PolicyLoss(options={"delt": 3.0})
    with pytest.raises(TypeError, match=r"label_smoothin is no option of .* \(did you mean 'label_smoothing'\?\)"):
        preferences.PreferenceLoss(options={"label_smoothin": 0.1})
    with pytest.raises(ValueError, match=r"losses must be one of .*, got 'sigmoidal' \(did you mean 'sigmoid'\?\)"):
        fr.DPO("sigmoidal")


def test_an_objective_added_in_one_place_has_a_signature_and_a_docstring(monkeypatch):
    monkeypatch.setitem(objectives.SURROGATES, "ramp", None)  # so that both tables are put back
    monkeypatch.setitem(objectives.PRESETS, "ramp", None)

    @objectives.surrogate
    def ramp(logprob, old, advantage, *, width: float = 1.0):
        """-A max(0, r - width)   (of this test)"""
        return -advantage * ((logprob - old).exp() - width).clamp(min=0)

    make = objectives.preset("Ramp", "ramp", "token_mean", width=0.5)
    assert inspect.signature(make).parameters["width"].default == 0.5
    assert "    ramp: -A max(0, r - width)\n" in make.__doc__
    with pytest.raises(TypeError, match=r"widht is no option of ramp with token_mean: .* \(did you mean 'width'\?\)"):
        make(widht=1.0)


def test_the_modules_say_what_they_take():
    parameters = inspect.signature(losses.FusedLinearDAPOLoss).parameters
    assert parameters["epsilon_high"].default == 0.28
    assert parameters["temperature"].default == 1.0
    assert losses.FusedLinearDAPOLoss(epsilon=0.1, temperature=0.5).objective == fr.DAPO(epsilon=0.1)

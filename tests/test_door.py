"""One wait for the device at the door of every public function, and one in its backward; nothing is let in for it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_rlhf as fr
from fused_rlhf.backends import tiling
from fused_rlhf.door import Door
from fused_rlhf.kernels.interface import KINDS, Kind
from fused_rlhf.objectives.value import value_loss
from fused_rlhf.op import logprobs
from tests.helpers import ALL_OUTPUTS, inputs, leaf
from tests.waits import counting, waits_of

H, V = 6, 23


# ------------------------------------------------------------------------------------------------------------ the class


def test_the_first_check_that_fails_is_raised_with_its_first_position():
    door, ages = Door(), torch.tensor([[3, -1], [-2, 200]])
    door.refuse(ages > 300, lambda at: ValueError(f"too old at {at}"))
    door.refuse(ages < 0, lambda at: ValueError(f"unborn at {at}"))
    door.refuse(ages > 100, lambda at: ValueError(f"old at {at}"))
    with pytest.raises(ValueError, match="unborn at 1"):
        door.read()


@pytest.mark.parametrize("entries", [[], [True], [False, False], [True, False, True], [True, True]])
def test_rows_are_those_of_the_mask(entries):
    mask = torch.tensor(entries, dtype=torch.bool)
    index = Door().rows(mask)
    if all(entries):
        assert index is None
    else:
        assert index.tolist() == mask.nonzero().squeeze(1).tolist()
        assert index.dtype == torch.int64


def test_counts_of_several_masks_are_read_at_once():
    door, values = Door(), torch.tensor([0.0, 1.0, 1.0])
    door.zero_or_one("mask", values)
    with counting() as waits:
        assert door.read(values.bool(), values == 0) == [2, 1]
    assert waits.reads == ["tolist"]


def test_nothing_to_ask_is_no_wait():
    door = Door()
    door.zero_or_one("mask", None)
    door.zero_or_one("mask", torch.ones(3, dtype=torch.bool))
    with counting() as waits:
        assert door.read() == []
        assert door.rows(None) is None
    assert waits.reads == []
    assert waits.launches == []


def test_the_count_counts_what_waits():
    """Each of these would make the host wait, had the tensors been a GPU's."""
    x = torch.tensor([1.0, 0.0, 2.0])
    for waiting in (
        lambda: x[0].item(),
        lambda: bool(x.any()),
        lambda: x.tolist(),
        lambda: x.nonzero(),
        lambda: x[x > 0],
        lambda: x.index_put((x > 0,), x[:2]),
        lambda: x.unique(),
        lambda: x.repeat_interleave(torch.ones(3, dtype=torch.int64)),
        lambda: torch.tensor([1.0]),
    ):
        with counting() as waits:
            waiting()
        assert waits.reads, waiting


# ------------------------------------------------------------------------------------------------- the public functions


def batch(B: int = 4, T: int = 5) -> dict[str, Any]:
    data = inputs(B * T, H, V)
    return {
        "hidden": leaf(data["hidden"].view(B, T, H)),
        "weight": leaf(data["weight"]),
        "targets": data["targets"].view(B, T),
    }


def packed(given: dict[str, Any]) -> dict[str, Any]:
    """The same sequences side by side."""
    B, T = given["targets"].shape
    offsets = torch.arange(B + 1, dtype=torch.int32) * T
    return given | {
        "hidden": leaf(given["hidden"].detach().flatten(0, 1)),
        "targets": given["targets"].flatten(),
        "cu_seqlens": offsets,
    }


def ones_and_zeros(given: dict[str, Any], dtype: torch.dtype) -> Tensor:
    return (torch.arange(given["targets"].numel()) % 3 != 0).view(given["targets"].shape).to(dtype)


def lora() -> tuple[Tensor, Tensor, float]:
    g = torch.Generator().manual_seed(3)
    a, b = (leaf(torch.randn(shape, generator=g, dtype=torch.float64)) for shape in ((2, H), (V, 2)))
    return a, b, 0.5


def per_token(given: dict[str, Any], value: float = -3.0) -> Tensor:
    return torch.full(given["targets"].shape, value, dtype=torch.float64)


# What a call may have beside its batch.
OPTIONS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "plain": lambda given: {},
    "ignored targets": lambda given: {
        "targets": given["targets"].masked_fill(~ones_and_zeros(given, torch.bool), -100)
    },
    "a temperature per token": lambda given: {"temperature": per_token(given, 0.7)},
    "an adapter": lambda given: {"lora": lora()},
    "bias, scale and softcap": lambda given: {
        "bias": leaf(torch.linspace(-1, 1, V).double()),
        "logit_scale": 0.5,
        "softcap": 4.0,
    },
}
OF_LOSSES = OPTIONS | {
    "packed": packed,
    "packed with a mask": lambda given: (
        packed(given) | {"completion_mask": ones_and_zeros(given, torch.int64).flatten()}
    ),
    "a mask of bool": lambda given: {"completion_mask": ones_and_zeros(given, torch.bool)},
    "a mask of 0 and 1": lambda given: {"completion_mask": ones_and_zeros(given, torch.float32)},
    "entropy": lambda given: {"outputs": ("entropy",)},
    "ref_hidden": lambda given: {"ref_hidden": given["hidden"].detach() + 0.1},
    "ref_hidden under a head of its own": lambda given: {
        "ref_hidden": given["hidden"].detach() + 0.1,
        "ref_weight": fr.Head(given["weight"].detach(), lora=lora()),
    },
    "a frozen head": lambda given: {"weight": given["weight"].detach()},
    "in two phases": lambda given: {"mode": "two_phase"},
}


def policy(
    objective: fr.PolicyLoss, option: str, backend: str = "chunked", B: int = 4, T: int = 5
) -> Callable[[], Tensor]:
    given = batch(B, T)
    given |= OF_LOSSES[option](given)
    given["advantages"] = torch.linspace(-1, 1, B).double()
    if objective.beta != 0 and "ref_hidden" not in given:
        given["ref_logprobs"] = per_token(given)
    if objective.surrogate != "reinforce":
        given["old_logprobs"] = per_token(given, -3.1)
    if objective.importance_sampling is not None:
        given["sampling_logprobs"] = per_token(given, -3.2)
    return lambda: fr.linear_policy_loss(**given, objective=objective, backend=backend)[0]


def preference(objective: fr.PreferenceLoss, option: str, B: int = 4, T: int = 5) -> Callable[[], Tensor]:
    given = batch(B, T)
    given |= OF_LOSSES[option](given)
    if objective.needs_reference and "ref_hidden" not in given:
        given["ref_logprobs"] = per_token(given)
    elif not objective.needs_reference:
        given = {name: value for name, value in given.items() if not name.startswith("ref_")}
    if not objective.paired:
        given["labels"] = torch.arange(B) % 2
    if "kto" in objective.losses:
        given["kl"] = torch.tensor(0.1, dtype=torch.float64)
    return lambda: fr.linear_preference_loss(**given, objective=objective, backend="chunked")[0]


def scored(option: str, **more: Any) -> Callable[[], Tensor]:
    given = batch()
    given |= OPTIONS[option](given)

    def call() -> Tensor:
        found = fr.linear_logprobs(**given, **more)
        values = [value for value in found if value is not None and value.is_floating_point()]
        return torch.stack(values).sum()

    return call


def compared(kind: Kind, backend: str = "chunked", **more: Any) -> Callable[[], Tensor]:
    given = batch()
    hidden, weight = given["hidden"], given["weight"]
    return lambda: fr.linear_kl(
        hidden, weight, hidden.detach() + 0.1, weight.detach(), kind, backend=backend, **more
    ).sum()


IN_THE_PASS = tuple(name for name in ALL_OUTPUTS if name != "max_logit")

POLICIES = {
    name: make(**({"max_completion_length": 5} if name == "dr_grpo" else {}))
    for name, make in fr.objectives.PRESETS.items()
} | {
    "kl": fr.GRPO(beta=0.1),
    "corrected kl": fr.GRPO(beta=0.1, use_bias_correction_kl=True),
    "entropy bonus": fr.PPO(entropy_coef=0.1),
    "entropy quantile": fr.GRPO(top_entropy_quantile=0.5),
    "importance sampling": fr.GRPO(importance_sampling="sequence_mask", importance_sampling_max=2.0),
    "off-policy mask": fr.GRPO(off_policy_mask_threshold=0.1),
}
PREFERENCES = {name: (fr.DPO if loss.paired else fr.KTO)(name) for name, loss in fr.preferences.PREFERENCES.items()} | {
    "wpo": fr.DPO(use_weighting=True),
    "ld_alpha": fr.DPO(ld_alpha=0.4),
    "orpo": fr.ORPO(),
}


def values(num_tokens: int | None) -> Callable[[], Tensor]:
    v, mask = leaf(torch.randn(4, 5)), torch.ones(4, 5)
    return lambda: value_loss(v, v.detach() + 0.3, v.detach(), mask, num_tokens=num_tokens)


CALLS: dict[str, Callable[[], Callable[[], Tensor]]] = {
    **{f"policy: {name}": partial(policy, objective, "a mask of bool") for name, objective in POLICIES.items()},
    **{f"policy: {option}": partial(policy, fr.GRPO(beta=0.1), option) for option in OF_LOSSES},
    **{f"preference: {name}": partial(preference, loss, "a mask of bool") for name, loss in PREFERENCES.items()},
    **{f"preference: {option}": partial(preference, fr.DPO(), option) for option in OF_LOSSES},
    **{f"log-probs: {option}": partial(scored, option, backend="chunked") for option in OPTIONS},
    "log-probs: all outputs": partial(scored, "ignored targets", outputs=IN_THE_PASS, backend="chunked"),
    "log-probs: a filter": partial(scored, "ignored targets", grad_filter=0.01, backend="chunked"),
    "log-probs: an entropy under a filter": partial(
        scored, "plain", grad_filter=0.01, outputs=("entropy",), backend="chunked"
    ),
    **{f"divergence: {kind}": partial(compared, kind) for kind in KINDS},
    "divergence: a mask": partial(compared, "jsd", mask=torch.arange(20).view(4, 5) % 2),
    "divergence: a temperature per row": partial(compared, "reverse", temperature=torch.full((4, 5), 0.7).double()),
    "divergence: reference": partial(compared, "jsd", backend="reference"),
    "values: a mask of 0 and 1": partial(values, None),
    "values: a count": partial(values, 20),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_waits_once_at_the_door_and_once_for_what_is_live_backwards(name):
    forward, waits = waits_of(CALLS[name]())
    assert forward <= 2
    assert len(waits.reads) <= 2, waits.reads


def test_the_largest_logit_waits_for_the_tokens_that_it_is_of():
    """Its gradient is one row of the head a token, summed by token."""
    forward, waits = waits_of(scored("ignored targets", outputs=("max_logit",), backend="chunked"))
    assert forward <= 2
    assert len(waits.reads) <= 6, waits.reads


@pytest.mark.parametrize("rows", [40, 1100])
@pytest.mark.parametrize(
    ("option", "blockwise"), [("plain", True), ("in two phases", False), ("a frozen head", True), ("packed", True)]
)
def test_one_pass_waits_once_for_each_block_of_rows(monkeypatch, rows, option, blockwise):
    """What is live after the loss is known block by block; at the door all at once."""
    monkeypatch.setattr(tiling, "row_block", lambda vocabulary, itemsize: 512)
    blocks = -(-rows // 512) if blockwise else 1
    assert len(waits_of(policy(fr.GRPO(), option, B=4, T=rows // 4))[1].reads) == 2 + (blocks - 1)
    if option != "plain":
        blocks = -(-rows // 512) if option == "a frozen head" else 1
        assert len(waits_of(preference(fr.DPO(), option, B=4, T=rows // 4))[1].reads) == 2 + (blocks - 1)


@pytest.mark.parametrize("call", [lambda **o: scored("plain", **o), lambda **o: policy(fr.GRPO(), "plain", **o)])
def test_a_float_temperature_is_checked_on_the_host(call):
    """Without a gradient there is the door alone."""
    with torch.no_grad():
        assert waits_of(call(backend="chunked"))[0] == 1


def test_what_is_live_is_told_to_the_op():
    """Rows that a loss has chosen are not looked for once more."""
    data = batch()
    given: dict[str, Any] = {"advantages": torch.ones(4).double(), "objective": fr.GSPO(), "backend": "chunked"}
    asked = []
    original = logprobs.Door
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logprobs, "Door", lambda: (asked.append(1), original())[1])
        fr.linear_policy_loss(**data, **given)[0].backward()
        assert asked == []
        fr.linear_logprobs(**data)
        assert asked == [1]


def test_launches_do_not_grow_with_the_rows_of_a_block():
    few, many = (len(waits_of(policy(fr.GRPO(beta=0.1), "packed with a mask", T=T))[1].launches) for T in (5, 100))
    assert few == many


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["one_pass", "two_phase"])
def test_a_gpu_is_waited_for_twice(mode):
    """As torch itself counts it."""
    given = {name: value.detach().cuda() for name, value in batch().items()}
    given |= {name: leaf(given[name].float()) for name in ("hidden", "weight")}
    given |= {"advantages": torch.linspace(-1, 1, 4).cuda(), "temperature": torch.ones(4, 5).cuda()}

    def step() -> None:
        fr.linear_policy_loss(**given, objective=fr.GRPO(), mode=mode)[0].backward()

    step()  # compiles
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum("synchronizing" in str(one.message) for one in said) <= 2


# ------------------------------------------------------------------------------------------------- nothing gets in by it


@pytest.mark.parametrize(("wrong", "word"), [(0.0, "0"), (-1.0, "-1"), (float("nan"), "nan"), (float("inf"), "inf")])
def test_a_wrong_temperature_is_named_with_its_position_where_it_is_scored(wrong, word):
    given = batch()
    temperature = per_token(given, 1.0)
    temperature[1, 2] = wrong
    mask = torch.ones(4, 5)
    calls = [
        lambda t, m: fr.linear_logprobs(**{**given, "targets": torch.where(m.bool(), given["targets"], -100)}, temperature=t),
        lambda t, m: fr.linear_policy_loss(
            **given, advantages=torch.ones(4).double(), objective=fr.GRPO(), temperature=t, completion_mask=m
        ),
        lambda t, m: fr.linear_preference_loss(**given, objective=fr.ORPO(), temperature=t, completion_mask=m),
        lambda t, m: fr.linear_kl(
            given["hidden"], given["weight"], given["hidden"], given["weight"], temperature=t, mask=m
        ),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(
            ValueError, match=f"temperature must be positive and finite .* got {word} at flat position 7"
        ):
            call(temperature, mask)
        without = mask.clone()
        without[1, 2] = 0
        call(temperature, without)


@pytest.mark.parametrize("wrong", [-1, V, 2**40, -(2**40)])
def test_a_wrong_target_is_named_with_its_position_where_it_is_scored(wrong):
    given, mask = batch(), torch.ones(4, 5)
    given["targets"][2, 0] = wrong
    more: dict[str, Any] = {"advantages": torch.ones(4).double(), "objective": fr.GRPO()}
    for call in (
        lambda: fr.linear_logprobs(**given),
        lambda: fr.linear_policy_loss(**given, **more, completion_mask=mask),
        lambda: fr.linear_preference_loss(**given, objective=fr.ORPO(), completion_mask=mask),
    ):
        with pytest.raises(ValueError, match=rf"targets must lie in \[0, {V}\) .*got {wrong} at flat position 10"):
            call()
    mask[2, 0] = 0
    fr.linear_policy_loss(**given, **more, completion_mask=mask)


@pytest.mark.parametrize("edges", [[1, 20], [0, 19], [0, 12, 8, 20], [0, 30, 20], [-1, 20], [0], [0, 2**40, 20]])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_offsets_that_do_not_rise_from_0_to_n_are_refused(edges, dtype):
    given = packed(batch())
    if max(edges) > 2**31 and dtype == torch.int32:
        pytest.skip("no int32")
    given["cu_seqlens"] = torch.tensor(edges, dtype=dtype)
    advantages = torch.ones(len(edges) - 1).double() if len(edges) != 21 else None
    with pytest.raises(ValueError, match=rf"cu_seqlens must rise from 0 to N=20, got \[{edges[0]}"):
        fr.linear_policy_loss(**given, advantages=advantages, objective=fr.GRPO())


@pytest.mark.parametrize("temperature", [1e-50, 1e50])
def test_a_temperature_that_the_dtype_of_the_logits_cannot_hold_is_refused(temperature):
    data = inputs(4, H, V, torch.float32)
    with pytest.raises(ValueError, match=r"temperature must lie in .*as torch\.float32 does, got 1e"):
        fr.linear_logprobs(**{**data, "temperature": temperature})


# ------------------------------------------------------------------------------------------------------- what is captured


@pytest.mark.parametrize("name", ["logprobs", "logprobs_backward"])
def test_the_ops_are_kept_out_of_cuda_graphs(name):
    """They wait for the device; with the tag `torch.compile(mode="reduce-overhead")` captures what is around them."""
    assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.fused_rlhf, name).default.tags

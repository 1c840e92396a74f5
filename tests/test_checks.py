"""What every public function refuses of a tensor, and what it does in the modes that torch can be in."""

from collections.abc import Callable

import pytest
import torch
from torch.autograd import forward_ad
from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh

import fused_rlhf as fr
from fused_rlhf.integrations.liger import LigerFusedLinearDPOLoss, LigerFusedLinearGRPOLoss
from fused_rlhf.objectives.value import value_loss
from tests.helpers import inputs, relative, worst

B, T, H, V = 4, 5, 6, 23
POLICIES = [
    make(**({"max_completion_length": T} if n == "dr_grpo" else {})) for n, make in fr.objectives.PRESETS.items()
]
PAIRS = [fr.DPO(name) for name, loss in fr.preferences.PREFERENCES.items() if loss.paired]
SINGLE = [fr.KTO(name) for name, loss in fr.preferences.PREFERENCES.items() if not loss.paired]


def batch(dtype=torch.float64):
    data = inputs(B * T, H, V, dtype)
    return data["hidden"].view(B, T, H), data["weight"], data["targets"].view(B, T)


def policy(objective=None, **options):
    hidden, weight, targets = batch()
    given = {"hidden": hidden, "weight": weight, "targets": targets, "advantages": torch.linspace(-1, 1, B).double()}
    return fr.linear_policy_loss(**{**given, "objective": objective or fr.GRPO(), **options})


def preference(objective=None, **options):
    hidden, weight, targets = batch()
    objective = objective or fr.DPO()
    given = {"hidden": hidden, "weight": weight, "targets": targets, "objective": objective}
    if objective.needs_reference:
        given["ref_logprobs"] = torch.full((B, T), -3.0).double()
    if not objective.paired:
        given["labels"] = torch.tensor([1, 0, 1, 0])
    return fr.linear_preference_loss(**{**given, **options})


# ------------------------------------------------------------------------------------------------------ inference mode


@pytest.mark.parametrize("objective", [*POLICIES, fr.PPO(entropy_coef=0.1), fr.GRPO(top_entropy_quantile=0.5)], ids=str)
def test_policies_under_inference_mode(objective):
    with torch.no_grad():
        expected, metrics = policy(objective, outputs=("entropy",))
    for mode in ("auto", "two_phase"):
        with torch.inference_mode():
            found, theirs = policy(objective, outputs=("entropy",), mode=mode)
        assert torch.equal(found, expected)
        assert all(torch.equal(theirs[name], value) for name, value in metrics.items())


@pytest.mark.parametrize("objective", [*PAIRS, *SINGLE, fr.DPO(use_weighting=True), fr.ORPO()], ids=str)
def test_preferences_under_inference_mode(objective):
    with torch.no_grad():
        expected, metrics = preference(objective)
    with torch.inference_mode():
        found, theirs = preference(objective)
    assert torch.equal(found, expected)
    assert all(torch.equal(theirs[name], value) for name, value in metrics.items())


def test_drop_ins_and_divergences_under_inference_mode():
    hidden, weight, targets = batch()
    mask, advantages = torch.ones(B, T), torch.linspace(-1, 1, B).double()
    calls = [
        lambda: LigerFusedLinearGRPOLoss(beta=0.0)(hidden, weight, targets, mask, advantages)[0],
        lambda: LigerFusedLinearDPOLoss()(weight, hidden, targets, ref_input=hidden + 1, ref_weight=weight)[0],
        lambda: fr.linear_kl(hidden, weight, hidden + 1, weight, "jsd"),
        lambda: fr.linear_kl(hidden, weight, hidden + 1, weight, backend="reference"),
    ]
    for call in calls:
        with torch.no_grad():
            expected = call()
        with torch.inference_mode():
            assert torch.equal(call(), expected)


# --------------------------------------------------------------------------------- derivatives that are not there raise


def frozen(**options):
    hidden, weight, targets = batch()
    hidden.requires_grad_()
    return hidden, preference(hidden=hidden, weight=weight, targets=targets, **options)[0]


def trained(mode):
    hidden, weight, targets = batch()
    hidden.requires_grad_(), weight.requires_grad_()
    return hidden, policy(hidden=hidden, weight=weight, targets=targets, mode=mode)[0]


@pytest.mark.parametrize(
    "make",
    [lambda: trained("one_pass"), lambda: trained("auto"), lambda: trained("two_phase"), frozen],
    ids=["one_pass", "auto", "two_phase", "frozen"],
)
def test_second_derivatives_raise(make):
    """Also where the penalty is one term of several, and would silently count for nothing."""
    hidden, loss = make()
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|no autograd formula"):
        (loss + 0.1 * gradient.square().sum() + hidden.sum()).backward()


def test_second_derivatives_of_a_divergence_and_of_an_adapter_raise():
    hidden, weight, _ = batch()
    hidden.requires_grad_()
    a, b = torch.randn(2, H).double(), torch.randn(V, 2).double()
    for value in (
        fr.linear_kl(hidden, weight, hidden.detach() + 1, weight).sum(),
        fr.linear_logprobs(hidden, weight, batch()[2], lora=(a, b, 1.0)).logprobs.sum(),
    ):
        (gradient,) = torch.autograd.grad(value, hidden, create_graph=True)
        with pytest.raises(RuntimeError, match=r"once_differentiable|no autograd formula"):
            (gradient.square().sum() + hidden.sum()).backward()


@pytest.mark.parametrize("name", ["hidden", "weight", "bias"])
def test_forward_mode_derivatives_raise(name):
    data = inputs(7, H, V, bias=True)

    def function(value):
        return fr.linear_logprobs(**{**data, name: value}).logprobs

    tangent = torch.ones_like(data[name])
    with pytest.raises(NotImplementedError, match=f"{name} must not carry a tangent.*use backward"):
        torch.func.jvp(function, (data[name],), (tangent,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="must not carry a tangent"):
        function(forward_ad.make_dual(data[name], tangent))


# --------------------------------------------------------------------------------------- what a packed vector is, counts


def test_a_vector_of_one_entry_a_sequence_is_that_where_tokens_are_as_many():
    """Two tokens in two sequences, one of them empty: as in the padded batch of the same."""
    hidden, _, targets = batch()
    hidden, targets = hidden[0, :2], targets[0, :2]
    advantages, offsets = torch.tensor([5.0, 1.0]).double(), torch.tensor([0, 0, 2])
    packed, _ = policy(hidden=hidden, targets=targets, advantages=advantages, cu_seqlens=offsets)
    padded, _ = policy(
        hidden=torch.stack([hidden, hidden]),
        targets=torch.stack([torch.full_like(targets, -100), targets]),
        advantages=advantages,
    )
    assert worst(packed, torch.tensor(-0.5)) < 1e-12
    assert torch.equal(packed, padded)


def test_summed_references_are_sums_where_tokens_are_as_many():
    hidden, _, targets = batch()
    hidden, targets = hidden[0, :2], targets[0, :2]
    sums = torch.tensor([-1.0, -4.0]).double()
    packed, _ = preference(hidden=hidden, targets=targets, ref_logprobs=sums, cu_seqlens=torch.tensor([0, 0, 2]))
    padded, _ = preference(
        hidden=torch.stack([hidden, hidden]),
        targets=torch.stack([torch.full_like(targets, -100), targets]),
        ref_logprobs=sums,
    )
    assert torch.equal(packed, padded)


@pytest.mark.parametrize("zero", [0, 0.0, torch.tensor(0), torch.tensor(0.0)])
def test_counts_of_nothing_are_a_differentiable_zero(zero):
    """A micro-batch whose tokens are all masked, in a batch whose count is 0 as well."""
    nothing = torch.zeros(B, T)
    for call in (
        lambda h: policy(
            fr.PPO(entropy_coef=0.1), hidden=h, completion_mask=nothing, num_tokens=zero, num_sequences=zero
        ),
        lambda h: policy(fr.GRPO(), hidden=h, completion_mask=nothing, num_tokens=zero),
        lambda h: preference(fr.DPO(("sigmoid", "sft")), hidden=h, completion_mask=nothing, num_tokens=zero),
    ):
        hidden = batch()[0].requires_grad_()
        loss, _ = call(hidden)
        loss.backward()
        assert loss.isfinite()
        assert (hidden.grad == 0).all()


@pytest.mark.parametrize("value", [0, -5, float("nan"), float("inf"), torch.tensor(0), torch.tensor(-5)])
@pytest.mark.parametrize("name", ["num_tokens", "num_sequences", "num_pairs"])
def test_counts_that_are_none_are_refused_beside_live_tokens(name, value):
    call = preference if name == "num_pairs" else policy
    with pytest.raises(ValueError, match=f"{name} must be positive"):
        call(**{name: value})


# --------------------------------------------------------------------------------------------------- tensors of all sorts


class Tagged(torch.Tensor):
    """A subclass that computes like its base: harmless."""


class Opaque(torch.Tensor):
    """A subclass with arithmetic of its own, as quantised and distributed tensors are."""

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):  # type: ignore[override]
        raise AssertionError("work began")


@pytest.mark.parametrize("name", ["hidden", "weight", "advantages", "old_logprobs", "completion_mask", "ref_hidden"])
def test_foreign_tensors_are_refused_at_the_door(name):
    hidden, weight, _ = batch()
    plain = {"hidden": hidden, "weight": weight, "advantages": torch.ones(B).double(), "ref_hidden": hidden}
    value = plain.get(name, torch.ones(B, T).double())
    with pytest.raises(TypeError, match=rf"{name} must be a plain tensor, got a Opaque; .*dequantize\(\)"):
        policy(**{name: value.as_subclass(Opaque)})
    loss, _ = policy(**{name: value.as_subclass(Tagged)})
    assert worst(loss, policy(**{name: value})[0]) == 0


def test_a_dtensor_is_refused_by_its_name(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        (hidden, weight, targets), mesh = batch(), init_device_mesh("cpu", (1,))
        ones, rank = torch.ones(B, T).double(), torch.ones(2, H).double()
        parts = {"hidden": hidden, "weight": weight, "bias": weight[:, 0], "ref_hidden": hidden, "ref_weight": weight}
        for name, value in parts.items():
            split = {"hidden": hidden, "weight": weight, name: DTensor.from_local(value, mesh, [Shard(0)])}
            if name.startswith("ref_"):
                split = {"ref_hidden": hidden, "ref_weight": weight, **split}
            of_all: list[tuple[Callable[..., object], dict[str, object]]] = [
                (policy, {}),
                (preference, {"ref_logprobs": None if "ref_hidden" in split else ones}),
                (fr.linear_kl, {} if "ref_hidden" in split else {"ref_hidden": hidden, "ref_weight": weight}),
            ]
            if "ref_hidden" not in split:
                of_all.append((fr.linear_logprobs, {"targets": targets}))
            for function, more in of_all:
                message = (
                    rf"{name} must be a plain tensor, got a DTensor, Shard\(dim=0\) over 1 processes.*lm_head.forward"
                )
                with pytest.raises(TypeError, match=message):
                    function(**more, **split)
        lora = (DTensor.from_local(rank, mesh, [Replicate()]), torch.ones(V, 2).double(), 1.0)
        with pytest.raises(
            TypeError, match=r"lora A must be a plain tensor, got a DTensor, Replicate.*full_tensor\(\)"
        ):
            fr.linear_logprobs(hidden, weight, targets, lora=lora)
        with pytest.raises(TypeError, match="advantages must be a plain tensor, got a DTensor"):
            policy(advantages=DTensor.from_local(ones[:, 0], mesh, [Replicate()]))
    finally:
        torch.distributed.destroy_process_group()


LISTS = (
    "advantages",
    "completion_mask",
    "old_logprobs",
    "ref_logprobs",
    "sampling_logprobs",
    "cu_seqlens",
    "ref_hidden",
)


@pytest.mark.parametrize("name", LISTS)
def test_a_list_is_no_tensor(name):
    with pytest.raises(TypeError, match=f"{name} must be a tensor, got list"):
        policy(**{name: [1.0]})


@pytest.mark.parametrize("name", LISTS)
def test_a_tensor_on_another_device_is_named(name):
    hidden, _, targets = batch()
    given = {name: torch.ones(B, T, device="meta")}
    if name == "cu_seqlens":
        given |= {"hidden": hidden.flatten(0, 1), "targets": targets.flatten(), "advantages": torch.ones(1).double()}
    with pytest.raises(ValueError, match=f"{name} must be on the device of hidden, cpu, got meta"):
        policy(**given)


def test_tensors_without_numbers_are_refused():
    with pytest.raises(ValueError, match="hidden must hold numbers, got a tensor on the meta device"):
        policy(hidden=torch.ones(B, T, H, device="meta"))
    with pytest.raises(ValueError, match="hidden must have a last dimension H of at least 1"):
        policy(hidden=torch.ones(B, T, 0), weight=torch.ones(V, 0))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float32, torch.int16])
def test_offsets_are_of_two_dtypes(dtype):
    hidden, _, targets = batch()
    flat = {"hidden": hidden.flatten(0, 1), "targets": targets.flatten(), "advantages": torch.ones(1).double()}
    with pytest.raises(ValueError, match=r"cu_seqlens must be .*int32 or int64, got"):
        policy(**flat, cu_seqlens=torch.tensor([0, 1]).to(dtype))


@pytest.mark.parametrize("wrong", [0.5, float("nan"), -1.0, 2.0])
def test_masks_and_labels_hold_zeros_and_ones(wrong):
    mask = torch.ones(B, T)
    mask[1, 2] = wrong
    labels = torch.tensor([1.0, 0.0, wrong, 1.0])
    for call, name in (
        (lambda: policy(completion_mask=mask), "completion_mask"),
        (lambda: preference(completion_mask=mask), "completion_mask"),
        (lambda: preference(fr.KTO(), labels=labels), "labels"),
        (lambda: fr.linear_kl(*batch()[:2], *batch()[:2], mask=mask), "mask"),
        (lambda: value_loss(mask, mask, mask, mask), "mask"),
    ):
        with pytest.raises(ValueError, match=rf"{name} must be bool or hold 0 and 1 alone, got {wrong:g}"):
            call()


@pytest.mark.parametrize(
    ("kl", "error", "message"),
    [
        (0.5, TypeError, "kl must be a tensor, got float"),
        (torch.tensor(-0.1), ValueError, "kl must be at least 0, got -0.1"),
        (torch.tensor(float("nan")), ValueError, "kl must be at least 0, got nan"),
    ],
)
def test_ktos_kl(kl, error, message):
    with pytest.raises(error, match=message):
        preference(fr.KTO(), kl=kl)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fr.GRPO(epsilon_high="0.2"), "epsilon_high must be a number, got str '0.2'"),  # type: ignore[arg-type]
        (lambda: fr.GRPO(beta="0.2"), "beta must be a number, got str"),  # type: ignore[arg-type]
        (lambda: fr.DPO(beta=None), "beta must be a number, got NoneType"),
        (lambda: fr.GRPO(bta=0.1), r"bta is no option of ppo_clip .*mean 'beta'\?"),  # type: ignore[call-arg]
        (lambda: fr.DPO(label_smothing=0.1), r"label_smothing is .* mean 'label_smoothing'\?"),  # type: ignore[call-arg]
    ],
)
def test_options_are_numbers_and_known(make, message):
    with pytest.raises(TypeError, match=message):
        make()


# ---------------------------------------------------------------------------------------------- a common offset of logits


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("offset", [0.0, 120.0, 1000.0])
def test_a_common_offset_costs_no_digits(backend, offset):
    """Entropy and gradients of fp32 logits: the offset rounds each logit, and nothing else."""
    data = inputs(15, H, 301, torch.float32)
    bias = torch.full((301,), offset)
    hidden = data["hidden"].requires_grad_()
    found = fr.linear_logprobs(**{**data, "bias": bias}, outputs=("entropy", "sum_sq"), backend=backend)
    (gradient,) = torch.autograd.grad(found.entropy.sum() + found.logprobs.sum(), hidden)
    z = (data["hidden"].detach() @ data["weight"].T + bias).double().requires_grad_()  # as they are once rounded
    log_p = torch.log_softmax(z, -1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    true = log_p.gather(1, data["targets"][:, None])[:, 0]
    assert worst(found.entropy, entropy) < 1e-5
    assert worst(found.logprobs, true) < 1e-5
    (dz,) = torch.autograd.grad(entropy.sum() + true.sum(), z)
    assert relative(gradient, dz @ data["weight"].double()) < 1e-4 if offset else 1e-5

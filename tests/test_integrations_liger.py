"""Ours beside liger_kernel's own classes where those are right, beside TRL's code or the formula where they are not."""

import inspect
import subprocess
import sys
from functools import partial

import pytest
import torch
from liger_kernel import chunked_loss as liger
from torch.nn.functional import logsigmoid

import fused_rlhf as fr
from fused_rlhf.integrations import liger as ours
from tests import trl_oracle
from tests.helpers import dense, plausible_logits, relative, worst
from tests.memory import peak_tensor_bytes

P, T, H, V = 3, 5, 7, 29
NAMES = ["CPO", "DPO", "GRPO", "JSD", "KTO", "ORPO", "SimPO"]


def classes(name):
    return [getattr(module, f"LigerFusedLinear{name}Loss") for module in (ours, liger)]


def batch(s=2 * P, t=T, h=H, v=V, dtype=torch.float32, seed=0, ignored=True):
    """Hidden states of a policy and a reference, two heads, targets of which some are ignored."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    target = torch.randint(v, (s, t), generator=generator)
    if ignored:
        target = target.masked_fill(torch.rand(s, t, generator=generator) < 0.3, -100)
        target[:, -1] = 0  # no completion without a token
    return {
        "hidden": 1.5 * randn(s, t, h),
        "weight": randn(v, h) / h**0.5,
        "bias": randn(v) / 2,
        "target": target,
        "ref_hidden": 1.5 * randn(s, t, h),
        "ref_weight": randn(v, h) / h**0.5,
        "ref_bias": randn(v) / 2,
    }


def leaves(data, bias=True):
    return {k: data[k].clone().requires_grad_() for k in ("hidden", "weight", "bias")[: 2 + bias]}


def run(function, data, bias=True, upstream=3.7):
    """Loss, what comes with it, and the gradients of hidden states, weight and bias."""
    free = leaves(data, bias)
    loss, *rest = function({**data, "bias": None, **free})
    (upstream * loss).backward()
    return loss.detach(), rest, [t.grad for t in free.values()]


def compare(mine, theirs, tolerance=2e-5, skip=()):
    """Of two runs: the loss, everything returned beside it but the positions in `skip`, and the gradients."""
    assert worst(mine[0], theirs[0]) < tolerance * max(1.0, theirs[0].abs().item())
    (found,), (expected,) = mine[1], theirs[1]
    assert len(found) == len(expected)
    for i, (a, b) in enumerate(zip(found, expected)):
        assert a.shape == b.shape
        assert not a.requires_grad
        if i not in skip:
            assert worst(a, b) < tolerance * max(1.0, b.abs().max().item()), i
    for a, b in zip(mine[2], theirs[2]):
        assert relative(a, b) < tolerance


# --------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("name", NAMES)
def test_names_orders_and_defaults_are_ligers(name):
    mine, theirs = classes(name)
    for method in ("__init__", "forward"):
        a, b = (list(inspect.signature(getattr(c, method)).parameters.values()) for c in (mine, theirs))
        assert [(p.name, p.default) for p in a] == [(p.name, p.default) for p in b]


def test_everything_but_cosine_similarity_is_there():
    theirs = {name for name in vars(liger) if name.startswith("LigerFusedLinear")}
    assert theirs - set(ours.__all__) == {"LigerFusedLinearCosineSimilarityLoss"}


def test_liger_need_not_be_installed():
    code = """
import sys
sys.modules["liger_kernel"] = None
from fused_rlhf.integrations.liger import LigerFusedLinearDPOLoss
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize("name", NAMES)
def test_compiled_and_chunk_size_change_nothing(name):
    cls, _ = classes(name)
    options = {"beta": 0.0} if name == "GRPO" else {}
    one, two = cls(**options), cls(**options, compiled=False, chunk_size=7)
    assert str(one) == str(two)
    without = ("compiled", "chunk_size")
    assert {k: v for k, v in vars(one).items() if not k.startswith("_") and k not in without} == {
        k: v for k, v in vars(two).items() if not k.startswith("_") and k not in without
    }


CHANGES = [
    ("DPO", "beta", 0.7),
    ("DPO", "loss_type", "hinge"),
    ("DPO", "label_smoothing", 0.2),
    ("DPO", "average_log_prob", True),
    ("CPO", "beta", 0.7),
    ("CPO", "label_smoothing", 0.2),
    ("CPO", "alpha", 0.3),
    ("SimPO", "gamma", 1.5),
    ("SimPO", "beta", 0.7),
    ("ORPO", "beta", 0.7),
    ("ORPO", "compute_nll_loss", False),
    ("KTO", "beta", 0.7),
    ("GRPO", "epsilon_low", 0.01),
    ("GRPO", "epsilon_high", 0.01),
    ("GRPO", "loss_type", "dr_grpo"),
    ("GRPO", "beta", 0.5),
    ("GRPO", "temperature", 0.5),
    ("GRPO", "delta", 1.01),
    ("JSD", "beta", 0.9),
    ("JSD", "weight_hard_loss", 0.1),
    ("JSD", "temperature", 2.0),
]


@pytest.mark.parametrize(("name", "attribute", "value"), CHANGES)
def test_a_changed_attribute_is_what_the_constructor_would_have_made_of_it(name, attribute, value):
    """Loss, gradient and everything returned, as if it had been given from the start."""
    cls, _ = classes(name)
    more = {"max_completion_length": 9} if name == "GRPO" else {"use_ref_model": True} if name == "KTO" else {}
    changed, made = cls(**more), cls(**more, **{attribute: value})
    assert hasattr(changed, attribute)
    before = run_of(name, cls(**more))
    setattr(changed, attribute, value)
    found, expected = run_of(name, changed), run_of(name, made)
    assert all(map(torch.equal, found, expected))
    assert not torch.equal(found[0], before[0])


@pytest.mark.parametrize(
    ("name", "attribute", "value"),
    [
        ("DPO", "loss_type", "nonsense"),
        ("GRPO", "loss_type", "nonsense"),
        ("GRPO", "epsilon_low", 2.0),
        ("JSD", "beta", 3.0),
    ],
)
def test_an_attribute_that_cannot_be_is_refused_at_the_next_call(name, attribute, value):
    cls, _ = classes(name)
    loss = cls()
    setattr(loss, attribute, value)
    with pytest.raises(ValueError, match=attribute):
        run_of(name, loss)


def run_of(name, loss):
    """Loss, gradients of hidden and weight, and what else a call returns."""
    g = torch.Generator().manual_seed(0)
    hidden, ref = (torch.randn(4, 6, 8, generator=g, dtype=torch.float64) for _ in range(2))
    weight, ref_weight = (torch.randn(31, 8, generator=g, dtype=torch.float64) for _ in range(2))
    target = torch.randint(31, (4, 6), generator=g)
    hidden.requires_grad_(), weight.requires_grad_()
    references = {"ref_input": ref, "ref_weight": ref_weight}
    if name == "GRPO":
        old = (
            fr.linear_logprobs(hidden, weight, target).logprobs.detach() + 0.1 * torch.randn(4, 6, generator=g).double()
        )
        advantages = torch.tensor([1.0, -1.0, 0.5, -0.5]).double()
        mask = torch.ones(4, 6)
        found = loss(hidden, weight, target, mask, advantages, old_per_token_logps=old, **references)
    elif name == "JSD":
        flat = target.flatten()
        found = loss(hidden.flatten(0, 1), weight, ref.flatten(0, 1), ref_weight, flat), ()
    elif name == "KTO":
        found = loss(hidden, weight, target, preference_labels=torch.tensor([1, 0, 1, 0]), **references)
    elif name == "DPO":
        found = loss(weight, hidden, target, **references)
    else:
        found = loss(weight, hidden, target)
    grads = torch.autograd.grad(found[0], (hidden, weight))
    return [found[0].detach(), *grads, *found[1]]


# --------------------------------------------------------------------------------------------------------- preferences


def paired(module, name, reference, *args, **options):
    """A loss over pairs, called by position: lin_weight, _input, target, bias, ref_input, ref_weight, ref_bias."""
    loss = getattr(module, f"LigerFusedLinear{name}Loss")(*args, **options, compiled=False)

    def call(d):
        ref = (d["ref_hidden"], d["ref_weight"], d["ref_bias"]) if reference else ()
        return loss(d["weight"], d["hidden"], d["target"], d["bias"], *ref)

    return call


def mean_logits(data):
    """Over the real tokens of the chosen, of the rejected."""
    z = data["hidden"] @ data["weight"].T + data["bias"]
    live = data["target"] != -100
    half = len(z) // 2
    return [z[part][live[part]].mean() for part in (slice(half), slice(half, None))]


DPO = [
    ("sigmoid", {}),
    ("sigmoid", {"beta": 0.4, "compute_nll_loss": True, "alpha": 0.7}),
    ("hinge", {}),
    ("exo_pair", {"label_smoothing": 1e-3}),
    ("nca_pair", {"beta": 0.3}),
    ("robust", {"label_smoothing": 0.1}),
    ("bco_pair", {}),
    ("sppo_hard", {"beta": 0.5}),
    ("apo_zero", {}),
    ("apo_down", {}),
    ("discopop", {"discopop_tau": 0.2}),
]


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize(("loss_type", "options"), DPO)
def test_dpo(loss_type, options, average):
    data = batch(seed=len(loss_type))
    settings = {"loss_type": loss_type, "average_log_prob": average, **options}
    mine, theirs = (run(paired(m, "DPO", True, **settings), data) for m in (ours, liger))
    compare(mine, theirs, skip=(2, 3))  # mean logits: Liger's are over ignored tokens too
    for found, expected in zip(mine[1][0][2:4], mean_logits(data)):
        assert worst(found, expected) < 1e-5


@pytest.mark.parametrize("shape", [(2, 1, 3, 5), (8, 13, 16, 131)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("reference", [False, True])
def test_dpo_of_other_shapes_with_and_without_bias_and_reference(shape, bias, reference):
    s, t, h, v = shape
    data = batch(s, t, h, v, ignored=False)
    settings = {"use_ref_model": reference, "ignore_index": -1}
    mine, theirs = (run(paired(m, "DPO", reference, **settings), data, bias) for m in (ours, liger))
    compare(mine, theirs)


PAIRS = [
    ("CPO", {}),
    ("CPO", {"beta": 0.5, "alpha": 0.3, "label_smoothing": 0.1, "average_log_prob": True}),
    ("CPO", {"compute_nll_loss": False}),
    ("SimPO", {}),
    ("SimPO", {"beta": 2.0, "gamma": 1.1, "alpha": 0.0, "label_smoothing": 0.2}),
    ("SimPO", {"compute_nll_loss": False}),
    ("ORPO", {}),
    ("ORPO", {"beta": 0.4}),
    ("ORPO", {"compute_nll_loss": False}),
]


@pytest.mark.parametrize(("name", "options"), PAIRS)
@pytest.mark.parametrize("bias", [False, True])
def test_losses_without_a_reference(name, options, bias):
    data = batch(seed=3)
    mine, theirs = (run(paired(m, name, False, **options), data, bias) for m in (ours, liger))
    compare(mine, theirs, skip=(2, 3))


def test_orpo_with_labels_of_its_nll():
    data = batch(seed=4)
    nll_target = torch.randint(V, data["target"].shape).masked_fill(torch.rand(data["target"].shape) < 0.2, -100)

    def call(module, d):
        loss = module.LigerFusedLinearORPOLoss(compiled=False)
        return loss(d["weight"], d["hidden"], d["target"], d["bias"], nll_target)

    mine, theirs = (run(partial(call, m), data) for m in (ours, liger))
    compare(mine, theirs, skip=(2, 3))


def kto(module, kl, d, **options):
    loss = module.LigerFusedLinearKTOLoss(compiled=False, **options)
    labels = torch.arange(len(d["target"])) % 3 != 0
    ref = (d["ref_hidden"], d["ref_weight"], d["ref_bias"]) if options.get("use_ref_model") else (None, None, None)
    return loss(d["hidden"], d["weight"], d["target"], d["bias"], labels, *ref, kl)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("kl", [None, torch.tensor(0.3)])
@pytest.mark.parametrize("bias", [False, True])
def test_kto(average, reference, kl, bias):
    data = batch(seed=5)
    options = {"average_log_prob": average, "use_ref_model": reference, "beta": 0.3}
    mine, theirs = (run(partial(kto, m, kl, **options), data, bias) for m in (ours, liger))
    compare(mine, theirs, skip=(2, 3))
    z = data["hidden"] @ data["weight"].T + (data["bias"] if bias else 0)
    of_tokens = z.sum(-1).where(data["target"] != -100, 0.0).sum(1)
    chosen = torch.arange(2 * P) % 3 != 0
    for found, keep in zip(mine[1][0][2:4], (chosen, ~chosen)):
        assert worst(found, of_tokens[keep].sum()) < 1e-3


def test_ktos_kl_of_each_completion_where_liger_compares_all_with_all():
    data = batch(seed=6)
    kl = torch.rand(2 * P, generator=torch.Generator().manual_seed(1))
    mine = run(partial(kto, ours, kl, beta=0.4), data)
    together = run(partial(kto, liger, kl, beta=0.4, chunk_size=2 * P), data)
    by_default = run(partial(kto, liger, kl, beta=0.4), data)
    compare(mine, together, skip=(2, 3))
    assert by_default[0] > 2 * together[0]


def completion_log_ratios(data):
    """(S,) sums over the real tokens of log p - log ref, and how many there are."""
    live = data["target"] != -100
    logp, ref = (
        dense(data[f"{k}hidden"], data[f"{k}weight"], data["target"].clamp(min=0), data[f"{k}bias"])["logprobs"]
        for k in ("", "ref_")
    )
    return (logp - ref).where(live, 0.0).sum(1), live.sum(1)


def test_label_smoothing_reaches_dpos_sigmoid():
    """cDPO, as Liger describes its argument; its "sigmoid" takes it and drops it."""
    data = batch(seed=7, dtype=torch.float64)
    call = partial(paired, name="DPO", reference=True, beta=0.3)
    c, r = completion_log_ratios(data)[0].chunk(2)
    x = 0.3 * (c - r)
    found, _ = call(ours, label_smoothing=0.2)(data)
    assert worst(found, (-0.8 * logsigmoid(x) - 0.2 * logsigmoid(-x)).mean()) < 1e-12
    single = {k: v.float() if v.is_floating_point() else v for k, v in data.items()}
    plain, smoothed = (call(liger, label_smoothing=e)(single)[0] for e in (0.0, 0.2))
    assert plain == smoothed


@pytest.mark.parametrize("name", ["DPO", "CPO", "SimPO", "ORPO", "KTO"])
def test_a_completion_without_tokens_is_finite_where_ligers_mean_is_nan(name):
    data = batch(seed=8)
    data["target"][1] = -100
    data["hidden"][1] = torch.nan  # nobody looks
    if name == "KTO":
        function = partial(kto, ours, None, average_log_prob=True)
        theirs, _ = kto(liger, None, batch(seed=8) | {"target": data["target"]}, average_log_prob=True)
    else:
        options = {"average_log_prob": True} if name in ("DPO", "CPO") else {}
        function = paired(ours, name, name == "DPO", **options)
        theirs, _ = paired(liger, name, name == "DPO", **options)(batch(seed=8) | {"target": data["target"]})
    loss, (found,), grads = run(function, data)
    assert theirs.isnan()
    assert loss.isfinite()
    assert all(v.isfinite().all() for v in (*found, *grads))
    assert (grads[0][1] == 0).all()


def test_dpo_value_with_a_completion_without_tokens():
    """The pair counts, with a mean log-prob of 0 for what has no tokens."""
    data = batch(seed=8, dtype=torch.float64)
    data["target"][1] = -100
    total, length = completion_log_ratios(data)
    c, r = (total / length.clamp(min=1)).chunk(2)
    found, _ = paired(ours, "DPO", True, average_log_prob=True)(data)
    assert worst(found, -logsigmoid(0.1 * (c - r)).mean()) < 1e-12


@pytest.mark.parametrize("name", ["DPO", "SimPO", "KTO"])
def test_masked_hidden_states_never_matter(name):
    data = batch(seed=9)
    poisoned = {**data, "hidden": data["hidden"].clone(), "ref_hidden": data["ref_hidden"].clone()}
    for k in ("hidden", "ref_hidden"):
        poisoned[k][data["target"] == -100] = torch.nan
    function = paired(ours, name, name == "DPO") if name != "KTO" else partial(kto, ours, None, use_ref_model=True)
    compare(run(function, poisoned), run(function, data), tolerance=1e-7)


def test_orpo_of_a_nearly_certain_completion_has_a_gradient():
    """Its probability rounds to 1, and Liger takes the logarithm of 1 - 1."""
    data = {
        "hidden": torch.ones(2, 1, 1),
        "weight": torch.tensor([[40.0], [0.0], [0.0]]),
        "target": torch.tensor([[0], [1]]),
    }
    mine, theirs = (run(paired(m, "ORPO", False), data, bias=False) for m in (ours, liger))
    assert all(v.isfinite().all() for v in (mine[0], *mine[1][0], *mine[2]))
    assert theirs[2][0].isnan().any()


def test_a_frozen_head_gets_no_gradient():
    data = batch()
    data["hidden"].requires_grad_()
    loss, _ = paired(ours, "DPO", True)(data)
    loss.backward()
    free = run(paired(ours, "DPO", True), batch(), upstream=1.0)
    assert data["weight"].grad is None
    assert relative(data["hidden"].grad, free[2][0]) < 1e-6


def test_scratch_does_not_grow_with_the_completion():
    """Liger holds the logits of a pair, and their log-softmax; ours a tile, and what every token has one of."""

    def peak(module, t):
        data = batch(2, t, 4, 3000, ignored=False)
        return peak_tensor_bytes(lambda: run(paired(module, "DPO", True), data))

    short, long = (peak(ours, t) for t in (500, 2000))
    assert long - short < 2 * (2000 - 500) * 4 * 100
    assert long < peak(liger, 2000) / 4


def test_bf16_logps_are_those_of_the_operands():
    """At logits of +-25, against fp64; Liger rounds the logits to bf16 before its softmax."""
    found = plausible_logits(64, 1003, torch.bfloat16)
    data = {
        "hidden": found["hidden"].view(4, 16, -1),
        "weight": found["weight"],
        "target": found["targets"].view(4, 16),
        "bias": None,
    }
    truth = dense(data["hidden"].double(), data["weight"].double(), data["target"])["logprobs"].mean(1)
    errors = []
    for module in (ours, liger):
        _, (chosen, rejected, *_) = paired(module, "SimPO", False)(data)
        errors.append(worst(torch.cat([chosen, rejected]), truth))
    assert errors[0] <= 5e-5
    assert errors[1] > 1e-3


# ---------------------------------------------------------------------------------------------------------------- GRPO


def grpo_batch(seed=0, b=4, t=T, h=H, v=V, dtype=torch.float32):
    data = batch(b, t, h, v, dtype, seed, ignored=False)
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    logp = dense(data["hidden"], data["weight"], data["target"], data["bias"])["logprobs"]
    mask = torch.rand(b, t, generator=generator) < 0.7
    mask[:, 0] = True
    return data | {
        "mask": mask.long(),
        "advantages": randn(b),
        "old": logp + 0.5 * randn(b, t),
        "ref": logp + 0.3 * randn(b, t),
    }


def grpo(module, *, old=True, ref="logps", ratio=None, num_items=None, **options):
    """Called by position, as in Liger."""
    loss = module.LigerFusedLinearGRPOLoss(compiled=False, **options)

    def call(d):
        hidden = (d["ref_hidden"], d["ref_weight"], d["ref_bias"]) if ref == "hidden" else (None, None, None)
        return loss(
            d["hidden"],
            d["weight"],
            d["target"],
            d["mask"],
            d["advantages"],
            d["bias"],
            d["ref"] if ref == "logps" else None,
            d["old"] if old else None,
            *hidden,
            ratio,
            num_items,
        )

    return call


GRPO = [
    ("grpo", {}),
    ("grpo", {"importance_sampling_level": "sequence"}),
    ("grpo", {"importance_sampling_level": "sequence", "beta": 0.0, "epsilon_high": 0.28}),
    ("grpo", {"delta": 1.5, "temperature": 0.8}),
    ("bnpo", {}),
    ("bnpo", {"use_bias_correction_kl": True, "epsilon_low": 0.1}),
    ("dr_grpo", {"max_completion_length": 9}),
    ("dapo", {}),
    ("dapo", {"importance_sampling_level": "sequence", "use_bias_correction_kl": True}),
    ("cispo", {"epsilon_high": 1.1, "beta": 0.1}),
    ("sapo", {}),
    ("sapo", {"sapo_temperature_pos": 0.9, "sapo_temperature_neg": 1.4, "beta": 0.0}),
    ("luspo", {"importance_sampling_level": "sequence", "beta": 0.0}),
    ("vespo", {}),
    ("vespo", {"vespo_k_pos": 1.5, "vespo_lambda_neg": 1.1, "beta": 0.0}),
]


@pytest.mark.parametrize(("loss_type", "options"), GRPO)
@pytest.mark.parametrize("old", [True, False])
def test_grpo(loss_type, options, old):
    data = grpo_batch(seed=len(options))
    settings = {"loss_type": loss_type, "old": old, **options}
    mine, theirs = (run(grpo(m, **settings), data) for m in (ours, liger))
    compare(mine, theirs)
    if old and loss_type not in ("sapo", "vespo"):
        assert 0 < mine[1][0][-1] < 1  # something is clipped


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "vespo"])
@pytest.mark.parametrize("bias", [False, True])
def test_grpo_with_a_reference_computed_in_the_call(loss_type, bias):
    data = grpo_batch(seed=2, b=3, t=9, h=11, v=53)
    mine, theirs = (run(grpo(m, loss_type=loss_type, ref="hidden"), data, bias) for m in (ours, liger))
    compare(mine, theirs)


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo"])
@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, T)])
@pytest.mark.parametrize("old", [True, False])
def test_grpo_with_the_samplers_ratio(loss_type, shape, old):
    data = grpo_batch(seed=3)
    ratio = 0.5 + torch.rand(shape, generator=torch.Generator().manual_seed(4))
    settings = {"loss_type": loss_type, "ratio": ratio, "max_completion_length": 7, "epsilon_high": 1.2, "old": old}
    if loss_type == "vespo":
        if shape != (4, T):
            with pytest.raises(ValueError, match=r"vllm_is_ratio must be \(4, 5\) for loss_type='vespo'"):
                grpo(ours, **settings)(data)
            return
        ratio.masked_fill_(data["mask"] == 0, 1.0)  # Liger sums the logarithms of masked positions as well
    mine, theirs = (run(grpo(m, **settings), data) for m in (ours, liger))
    compare(mine, theirs)


def test_a_ratio_of_zero_drops_a_token():
    data = grpo_batch(seed=3)
    ratio = torch.ones(4, T)
    ratio[0, 0] = 0.0
    for loss_type in ("grpo", "cispo", "vespo"):
        mine, theirs = (run(grpo(m, loss_type=loss_type, ratio=ratio), data) for m in (ours, liger))
        compare(mine, theirs, skip=(1,))  # of the clipped, Liger counts it


def test_dapo_divides_by_what_it_is_told():
    data = grpo_batch(seed=5)
    for num_items in (57, torch.tensor(57)):
        mine, theirs = (run(grpo(m, num_items=num_items), data) for m in (ours, liger))
        compare(mine, theirs)
    without = run(grpo(ours), data)
    told = run(grpo(ours, num_items=57, beta=0.04), data)
    assert worst(told[0] * 57, without[0] * data["mask"].sum()) < 1e-5


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_luspo_is_trls_where_liger_lets_masked_positions_in(level, beta):
    data = grpo_batch(seed=6, dtype=torch.float64)
    data["bias"] = None
    settings = {"loss_type": "luspo", "importance_sampling_level": level, "beta": beta, "use_bias_correction_kl": False}
    policy = trl_oracle.Head(data["hidden"].clone().requires_grad_(), data["weight"], data["target"])
    expected, _ = trl_oracle.policy_loss(
        policy, data["mask"], data["advantages"], old=data["old"], ref=data["ref"] if beta else None, **settings
    )
    expected.backward()
    loss, _, grads = run(grpo(ours, epsilon_high=0.2, **settings), {**data, "bias": None}, bias=False, upstream=1.0)
    assert worst(loss, expected) < 1e-12
    assert relative(grads[0], policy.hidden.grad) < 1e-12

    single = {k: v.float() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in data.items()}
    moved = {**single, "hidden": single["hidden"].clone()}
    moved["hidden"][data["mask"] == 0] += 1.0
    theirs, shifted = (grpo(liger, **settings)(d)[0] for d in (single, moved))
    leaks = level == "token" or beta != 0
    assert (abs(theirs - expected) > 1e-3) == leaks
    assert (abs(theirs - shifted) > 1e-3) == leaks
    assert grpo(ours, **settings)(single)[0] == grpo(ours, **settings)(moved)[0]


def test_masked_hidden_states_and_ids_never_matter_to_grpo():
    data = grpo_batch(seed=7)
    outside = data["mask"] == 0
    poisoned = {k: v.clone() for k, v in data.items()}
    poisoned["target"][outside] = V + 5
    for k in ("hidden", "old", "ref"):
        poisoned[k][outside] = torch.nan
    for loss_type in ("grpo", "vespo"):
        compare(run(grpo(ours, loss_type=loss_type), poisoned), run(grpo(ours, loss_type=loss_type), data), 1e-7)


def test_ranks_count_their_tokens_in_one_collective(monkeypatch):
    """Liger's default does so once for each chunk, so that ranks with unequal batches wait for each other for ever."""
    calls = []

    def all_reduce(tensor, *args, **kwargs):
        calls.append(tensor.clone())
        tensor.mul_(3)  # the other rank holds twice as many

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *a: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    data = grpo_batch(seed=8)
    mine = run(grpo(ours), data)
    assert len(calls) == 1
    theirs = run(grpo(liger), data)
    assert len(calls) == 1 + 4
    compare(mine, theirs)
    calls.clear()
    compare(run(grpo(ours, num_items=50), data), run(grpo(liger, num_items=50), data))
    run(grpo(ours, loss_type="grpo"), data)
    assert not calls


def test_both_references_warn_and_the_log_probs_count():
    data = grpo_batch(seed=9)
    args = [data[k] for k in ("hidden", "weight", "target", "mask", "advantages", "bias", "ref", "old")]
    loss = ours.LigerFusedLinearGRPOLoss()
    with pytest.warns(UserWarning, match="ref_input is not used"):
        found, _ = loss(*args, data["ref_hidden"], data["ref_weight"])
    assert found == loss(*args)[0]


def test_bf16_grpo_is_the_loss_of_the_operands():
    found = plausible_logits(64, 1003, torch.bfloat16)
    shaped = {
        "hidden": found["hidden"].view(4, 16, -1),
        "weight": found["weight"],
        "target": found["targets"].view(4, 16),
    }
    exact = dense(shaped["hidden"].double(), shaped["weight"].double(), shaped["target"])["logprobs"]
    data = {
        **shaped,
        "bias": None,
        "mask": torch.ones(4, 16),
        "advantages": torch.ones(4),
        "old": exact.float(),
        "ref": exact.float(),
    }
    kl = {module: grpo(module, loss_type="grpo")(data)[1][0].item() for module in (ours, liger)}
    assert 0 <= kl[ours] < 1e-9  # the policy is its reference
    assert kl[liger] > 1e-4


# ----------------------------------------------------------------------------------------------------------------- JSD


def jsd_batch(n=11, v=V, teacher_v=V, dtype=torch.float32, seed=0, ignored=True):
    data = batch(1, n, H, v, dtype, seed, ignored)
    generator = torch.Generator().manual_seed(seed + 1)
    weight = torch.randn(teacher_v, 5, generator=generator, dtype=torch.float64).to(dtype)
    return {
        **{k: data[k] for k in ("weight", "bias")},
        "hidden": data["hidden"][0],
        "target": data["target"][0],
        "teacher": torch.randn(n, 5, generator=generator, dtype=torch.float64).to(dtype),
        "teacher_weight": weight,
        "teacher_bias": torch.randn(teacher_v, generator=generator, dtype=torch.float64).to(dtype),
    }


def jsd(module, **options):
    loss = module.LigerFusedLinearJSDLoss(compiled=False, **options)

    def call(d):
        biases = (d["bias"], d["teacher_bias"])
        found = loss(d["hidden"], d["weight"], d["teacher"], d["teacher_weight"], d["target"], *biases)
        return (found[0], found[1:]) if options.get("return_soft_hard_loss") else (found, ())

    return call


JSD = [
    {},
    {"beta": 0.0},
    {"beta": 1.0},
    {"beta": 0.1, "temperature": 2.0},
    {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0, "beta": 0.9},
    {"weight_hard_loss": 0.3, "weight_soft_loss": 2.0},
    {"weight_soft_loss": 0.0},
]


@pytest.mark.parametrize("options", JSD)
@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_jsd(options, parts, bias):
    data = jsd_batch()
    settings = {**options, "return_soft_hard_loss": parts}
    compare(*(run(jsd(m, **settings), data, bias) for m in (ours, liger)))


def test_jsd_without_a_label_is_a_differentiable_zero():
    data = jsd_batch()
    data["target"][:] = -100
    data["hidden"][:] = torch.nan
    loss, _, grads = run(jsd(ours), data)
    assert loss == 0
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_jsd_of_bf16_heads_is_theirs_and_never_negative(beta):
    """A student near its teacher, whose rounded logits hide what there is between them."""
    wide = plausible_logits(64, 1003, torch.float64)
    noise = torch.randn(wide["hidden"].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    data = {
        "hidden": wide["hidden"].bfloat16(),
        "weight": wide["weight"].bfloat16(),
        "bias": None,
        "teacher": (wide["hidden"] * (1 + 1e-3 * noise)).bfloat16(),
        "teacher_weight": wide["weight"].bfloat16(),
        "teacher_bias": None,
        "target": wide["targets"],
    }
    log_p, log_q = (
        torch.log_softmax(data[h].double() @ data[w].double().T, -1)
        for h, w in (("hidden", "weight"), ("teacher", "teacher_weight"))
    )
    m = beta * log_q.exp() + (1 - beta) * log_p.exp()

    def kl(log_a, log_b):
        return (log_a.exp() * (log_a - log_b)).sum(-1)

    exact = {0.0: kl(log_q, log_p), 1.0: kl(log_p, log_q)}.get(
        beta, beta * kl(log_q, m.log()) + (1 - beta) * kl(log_p, m.log())
    )
    options = {"beta": beta, "weight_hard_loss": 0.0, "weight_soft_loss": 1.0}
    mine, theirs = (jsd(module, **options)(data)[0].double() for module in (ours, liger))
    assert abs(mine / exact.mean() - 1) < 1e-3
    assert mine > 0
    assert abs(theirs / exact.mean() - 1) > 1


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_columns_that_pad_the_teacher_change_nothing(beta):
    """Where Liger gives the student a logit of 0 in each, so that the more padding, the less probability for its tokens."""
    data = jsd_batch(teacher_v=V + 40)
    data["teacher_bias"][V:] = -30.0
    exact = {k: data[k][:V] if k in ("teacher_weight", "teacher_bias") else data[k] for k in data}
    mine, without = (run(jsd(ours, beta=beta), d) for d in (data, exact))
    compare(mine, without, tolerance=1e-7)
    compare(without, run(jsd(liger, beta=beta), exact))
    theirs, _ = jsd(liger, beta=beta)(data)
    assert abs(theirs - without[0]) > 1e-2


# -------------------------------------------------------------------------------------------------------------- errors


BAD_OPTIONS = [
    ("DPO", {"loss_type": "ipo"}, r"loss_type must be one of \['sigmoid', .*got 'ipo'"),
    ("DPO", {"loss_type": "exo_pair"}, r"label_smoothing must lie in \(0, 0.5\) for exo_pair, got 0.0"),
    ("DPO", {"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing must be 0.0 for loss_type='hinge'"),
    ("DPO", {"discopop_tau": 0.1}, "discopop_tau must be 0.05 for loss_type='sigmoid', which has none; got 0.1"),
    ("DPO", {"beta": 0.0}, "beta must be finite and > 0, got 0.0"),
    ("CPO", {"label_smoothing": 0.5}, "label_smoothing must lie in"),
    ("GRPO", {"loss_type": "ppo"}, r"loss_type must be one of \['grpo', .*got 'ppo'"),
    (
        "GRPO",
        {"importance_sampling_level": "word"},
        "importance_sampling_level must be 'token' or 'sequence', got 'word'",
    ),
    ("GRPO", {"use_ref_model": False}, "use_ref_model must be True when beta is not 0, got False with beta=0.04"),
    ("GRPO", {"loss_type": "dr_grpo"}, "max_completion_length must be given for loss_type='dr_grpo', got None"),
    ("GRPO", {"beta": 0.0, "use_bias_correction_kl": True}, "use_bias_correction_kl must be False when beta is 0"),
    ("GRPO", {"loss_type": "sapo", "sapo_temperature_neg": 0.0}, "tau_neg must be finite and > 0"),
    ("JSD", {"beta": 1.5}, r"beta must lie in \[0, 1\], got 1.5"),
    *(
        (
            "GRPO",
            {"loss_type": name, "delta": 2.0},
            f"delta must be None for loss_type='{name}', which does not clip twice",
        )
        for name in ("cispo", "sapo", "vespo")
    ),
    *(
        (
            "GRPO",
            {"loss_type": name, "importance_sampling_level": "sequence"},
            f"must be 'token' for loss_type='{name}'",
        )
        for name in ("cispo", "sapo", "vespo")
    ),
]


@pytest.mark.parametrize(("name", "options", "message"), BAD_OPTIONS)
def test_options_that_cannot_be_or_would_do_nothing_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        classes(name)[0](**options)


def test_unknown_options_are_refused():
    for name in NAMES:
        with pytest.raises(TypeError, match="softcap"):
            classes(name)[0](softcap=30.0)


def test_liger_ignores_delta_and_a_missing_reference():
    """What the two refusals above are for."""
    data = grpo_batch(seed=1)
    cispo = [grpo(liger, loss_type="cispo", delta=delta)(data)[0] for delta in (None, 0.5)]
    assert cispo[0] == cispo[1]
    _, (kl, _) = grpo(liger, ref=None, use_ref_model=False, beta=0.5)(data)
    assert kl == 0


def test_bad_input_is_refused_by_name():
    d, g = batch(), grpo_batch()
    with pytest.raises(ValueError, match="ref_input must be given with use_ref_model=True"):
        paired(ours, "DPO", False)(d)
    with pytest.raises(ValueError, match="ref_input must be None with use_ref_model=False"):
        paired(ours, "DPO", True, use_ref_model=False)(d)
    with pytest.raises(ValueError, match="as many rejected as chosen completions, got 5"):
        paired(ours, "CPO", False)({**d, "hidden": d["hidden"][:5], "target": d["target"][:5]})
    with pytest.raises(ValueError, match=r"target must be \(S, T\)"):
        paired(ours, "CPO", False)({**d, "hidden": d["hidden"][0], "target": d["target"][0]})
    with pytest.raises(ValueError, match=r"nll_target must have the shape of target \(6, 5\), got \(6,\)"):
        ours.LigerFusedLinearORPOLoss()(d["weight"], d["hidden"], d["target"], None, torch.zeros(6))
    with pytest.raises(ValueError, match="nll_target must be None with compute_nll_loss=False"):
        ours.LigerFusedLinearORPOLoss(compute_nll_loss=False)(d["weight"], d["hidden"], d["target"], None, d["target"])
    for labels, got in ((None, "None"), (torch.ones(5), r"\(5,\)")):
        with pytest.raises(ValueError, match=rf"preference_labels must be \(6,\), one for each completion, got {got}"):
            ours.LigerFusedLinearKTOLoss()(d["hidden"], d["weight"], d["target"], None, labels)
    with pytest.raises(ValueError, match=r"kl must be 0-d, \(1,\) or \(6,\), one for each completion, got \(2,\)"):
        kto(ours, torch.ones(2), d)
    with pytest.raises(ValueError, match="ref_logprobs or ref_hidden must be given when beta is not 0"):
        grpo(ours, ref=None)(g)
    with pytest.raises(ValueError, match=r"advantages must be \(B,\) or \(B, T\) .*got \(3,"):
        grpo(ours)({**g, "advantages": torch.ones(3)})
    with pytest.raises(ValueError, match=r"vllm_is_ratio must be \(4,\), \(4, 1\) or \(4, 5\) .*got \(3,\)"):
        grpo(ours, ratio=torch.ones(3))(g)
    with pytest.raises(ValueError, match=r"ref_weight must be \(V, H\) with V=29"):
        jsd(ours)(jsd_batch(teacher_v=V - 1))


def test_what_trainers_build_on_is_reachable():
    """The objective of each is one of the package's own."""
    assert ours.LigerFusedLinearDPOLoss(beta=0.3).objective == fr.DPO(beta=0.3, label_smoothing=0.0)
    assert ours.LigerFusedLinearGRPOLoss(loss_type="grpo", beta=0.1).objective == fr.GRPO(
        beta=0.1, epsilon_low=0.2, epsilon_high=0.2, delta=None
    )

"""Log-probs over a sampler's kept sets, and of several ids a row: the public functions against dense logits."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_rlhf as fr
from fused_rlhf.backends import truncation
from fused_rlhf.objectives.surrogates import KL_ESTIMATORS
from tests.helpers import TRANSFORMS, dense_logits, inputs, leaf, relative, worst
from tests.test_truncation import warped

N, H, V = 12, 16, 120
RULES: list[dict[str, Any]] = [
    {"top_k": 9},
    {"top_p": 0.8},
    {"min_p": 0.02},
    {"top_k": 40, "top_p": 0.7, "min_p": 0.01},
]
WANTED = ("entropy", "lse", "sum_sq", "full_logprobs")


def operands(transform: tuple, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Any]:
    bias, logit_scale, softcap, per_token = transform
    data = inputs(N, H, V, dtype, bias=bias, per_token=per_token, seed=seed)
    for name in ("hidden", "weight", "bias"):
        if data[name] is not None:
            data[name] = leaf(data[name])
    return data | {"logit_scale": logit_scale, "softcap": softcap}


def logits_of(data: dict[str, Any]) -> Tensor:
    wide = {name: data[name].double() if isinstance(data[name], Tensor) else data[name] for name in _OPERANDS}
    return dense_logits(**wide)


_OPERANDS = ("hidden", "weight", "bias", "temperature", "logit_scale", "softcap")


def dense_within(z: Tensor, keep: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """The same statistics of masked logits; `keep` (N, V) bool with the targets in it."""
    masked = z.masked_fill(~keep, -torch.inf)
    log_p = masked.log_softmax(-1)
    finite = torch.where(keep, log_p, 0.0)
    p = torch.where(keep, log_p.exp(), 0.0)
    at = targets[:, None]
    return {
        "logprobs": log_p.gather(1, at)[:, 0],
        "entropy": -(p * finite).sum(1),
        "lse": masked.logsumexp(1),
        "sum_sq": p.square().sum(1),
        "full_logprobs": z.log_softmax(-1).gather(1, at)[:, 0],
    }


def csr(keep: Tensor, shuffle: int | None = None) -> tuple[Tensor, Tensor]:
    """As an engine reports it; shuffled, and with tokens twice, where asked."""
    sets = [row.nonzero()[:, 0] for row in keep]
    if shuffle is not None:
        g = torch.Generator().manual_seed(shuffle)
        sets = [
            s[torch.randint(len(s), (3,), generator=g)].repeat(2) if len(s) == 0 else torch.cat([s, s[:2]])
            for s in sets
        ]
        sets = [s[torch.randperm(len(s), generator=g)] for s in sets]
    lengths = torch.tensor([0, *(len(s) for s in sets)])
    return torch.cat(sets), lengths.cumsum(0)


def with_targets(keep: Tensor, targets: Tensor) -> Tensor:
    return keep | (torch.arange(keep.shape[1]) == targets[:, None])


def gradients(total: Tensor, data: dict[str, Any]) -> list[Tensor]:
    leaves = [data[name] for name in ("hidden", "weight", "bias") if data[name] is not None]
    return list(torch.autograd.grad(total, leaves, retain_graph=True))


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("how", ["given", "transformers", "vllm"])
def test_every_statistic_and_gradient(
    monkeypatch: pytest.MonkeyPatch, backend: str, transform: tuple, how: Any
) -> None:
    """Of kept and of whole distributions in one call, for sets that are named and sets that are too large for that."""
    for named in (512, 6):
        monkeypatch.setattr(truncation, "NARROW", named)
        for rules in RULES:
            data = operands(transform)
            z, targets = logits_of(data), data["targets"]
            keep = warped(z.detach(), rules, how if how != "given" else "transformers")
            keep = with_targets(keep, targets)
            told: dict[str, Any] = (
                {"kept": csr(keep, shuffle=1)} if how == "given" else {"truncation": fr.Truncation(**rules, order=how)}
            )
            found = fr.linear_logprobs(**data, **told, outputs=WANTED, backend=backend)
            truth = dense_within(z, keep, targets)
            for name in ("logprobs", *WANTED):
                assert worst(getattr(found, name), truth[name]) <= 1e-12, (name, rules)
            u = {n: torch.linspace(-1, 1, N, dtype=z.dtype).roll(i) for i, n in enumerate(truth)}
            u["full_logprobs"][3:] = 0
            ours = gradients(torch.stack([(u[n] * getattr(found, n)).sum() for n in u]).sum(), data)
            theirs = gradients(torch.stack([(u[n] * truth[n]).sum() for n in u]).sum(), data)
            assert all(relative(a, b) <= 1e-11 for a, b in zip(ours, theirs)), rules
            alone = gradients((u["logprobs"] * found.logprobs).sum(), data)
            expected = gradients((u["logprobs"] * truth["logprobs"]).sum(), data)
            assert all(relative(a, b) <= 1e-11 for a, b in zip(alone, expected)), rules
            if how == "given":  # sets of any size are named
                break


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrower_dtypes_and_an_adapter(dtype: torch.dtype) -> None:
    """Errors within twice those of dense logits in fp32 of the same operands."""
    data = operands((True, 0.7, None, True), dtype)
    g = torch.Generator().manual_seed(5)
    a, b = (leaf(torch.randn(*s, generator=g).to(dtype) / 4) for s in ((3, H), (V, 3)))
    leaves = [data["hidden"], data["weight"], data["bias"], a, b]

    def dense(cast: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        h, w, bias, a_, b_ = (t.to(cast) for t in leaves)
        z = (h @ w.T + 0.5 * (h @ a_.T) @ b_.T + bias) * data["logit_scale"] / data["temperature"][:, None].to(cast)
        lp = dense_within(z, keep, data["targets"])["logprobs"]
        return lp, list(torch.autograd.grad((u.to(cast) * lp).sum(), leaves))

    u = torch.linspace(-1, 1, N)
    with torch.no_grad():
        h, w, bias, a_, b_ = (t.double() for t in leaves)
        z = (h @ w.T + 0.5 * (h @ a_.T) @ b_.T + bias) * data["logit_scale"] / data["temperature"][:, None].double()
    keep = with_targets(warped(z, {"top_k": 9}, "transformers"), data["targets"])
    found = fr.linear_logprobs(**data, lora=(a, b, 0.5), kept=csr(keep))
    ours = torch.autograd.grad((u * found.logprobs).sum(), leaves)
    (truth, grads), (theirs, their_grads) = dense(torch.float64), dense(torch.float32)
    assert found.logprobs.dtype == torch.float32
    assert worst(found.logprobs, truth) <= 2 * worst(theirs, truth) + 1e-6
    for value, other, true in zip(ours, their_grads, grads):
        assert relative(value, true) <= 2 * relative(other, true) + torch.finfo(dtype).eps


def test_padded_batches_and_rows_that_are_left_out() -> None:
    """What is told of an ignored row may be anything, also nothing."""
    data = operands(TRANSFORMS[0])
    z, targets = logits_of(data), data["targets"].clone()
    keep = with_targets(warped(z.detach(), {"top_k": 9}, "transformers"), targets)
    truth = dense_within(z, keep, targets)["logprobs"]
    out = torch.tensor([1, 4, 11])
    targets[out] = -100
    sets = [row.nonzero()[:, 0] for row in keep]
    sets[1], sets[4], sets[11] = torch.tensor([-7, 10**6]), torch.tensor([], dtype=torch.int64), torch.tensor([3])
    kept = torch.cat(sets).int(), torch.tensor([0, *(len(s) for s in sets)]).cumsum(0)
    data["hidden"].data[out] = torch.nan
    shaped = data | {"hidden": data["hidden"].view(3, 4, H), "targets": targets.view(3, 4)}
    top_p = torch.full((3, 4), 0.9, dtype=torch.float64)
    top_p.view(-1)[out] = -1.0
    for told in ({"kept": kept}, {"truncation": fr.Truncation(top_k=9, top_p=top_p)}):
        found = fr.linear_logprobs(**shaped, **told, outputs=("entropy",))
        assert found.logprobs.shape == (3, 4)
        assert not found.logprobs.view(-1)[out].any()
        live = torch.ones(N, dtype=torch.bool).index_fill(0, out, False)
        if "kept" in told:
            assert worst(found.logprobs.view(-1)[live], truth[live]) <= 1e-12
        grad = torch.autograd.grad(found.logprobs.sum(), data["hidden"])[0]
        assert not grad[out].any()
        assert grad[live].any(1).all()
    for empty in (
        {"kept": (torch.zeros(0, dtype=torch.int64), torch.tensor([0]))},
        {"truncation": fr.Truncation(top_k=3)},
    ):
        none = fr.linear_logprobs(data["hidden"][:0], data["weight"], targets[:0], **empty, outputs=WANTED)
        assert none.logprobs.shape == (0,)


def test_a_certain_token_has_log_prob_zero_and_no_gradient() -> None:
    data = operands(TRANSFORMS[0])
    keep = with_targets(torch.zeros(N, V, dtype=torch.bool), data["targets"])
    found = fr.linear_logprobs(**data, kept=csr(keep), outputs=("entropy",))
    assert not found.logprobs.any()
    assert not found.entropy.any()
    assert not any(g.any() for g in gradients((found.logprobs + found.entropy).sum(), data))


def test_targets_beyond_the_border_are_added_and_told() -> None:
    data = operands(TRANSFORMS[0])
    z = logits_of(data)
    data["targets"] = z.argmin(1)
    data["targets"][0] = z[0].argmax()
    found = fr.linear_logprobs(**data, truncation=fr.Truncation(top_k=1))
    assert found.target_added.tolist() == [False, *[True] * (N - 1)]
    largest = z.amax(1)
    pair = torch.stack([largest, z.gather(1, data["targets"][:, None])[:, 0]])
    truth = pair[1] - pair.logsumexp(0)
    truth[0] = 0
    assert worst(found.logprobs, truth) <= 1e-12


def test_nothing_cut_is_the_plain_op() -> None:
    data = operands(TRANSFORMS[5], torch.float32)
    plain = fr.linear_logprobs(**data, outputs=("entropy",))
    nothing: list[dict[str, Any]] = [{}, {"top_k": 0, "top_p": 1.0, "min_p": 0.0}]
    for rules in nothing:
        found = fr.linear_logprobs(**data, truncation=fr.Truncation(**rules), outputs=("entropy", "full_logprobs"))
        assert torch.equal(found.logprobs, plain.logprobs)
        assert torch.equal(found.full_logprobs, plain.logprobs)
        assert torch.equal(found.entropy, plain.entropy)
        assert found.target_added is None


def test_the_same_bits_again_and_given_as_found() -> None:
    """Forward and backward; and a set that is given has the bits of one that was found."""
    data = operands(TRANSFORMS[0], torch.float32)
    keep = with_targets(warped(logits_of(data).detach(), {"top_p": 0.8}, "transformers"), data["targets"])
    tells: list[dict[str, Any]] = [
        {"kept": csr(keep, 2)},
        {"kept": csr(keep)},
        *[{"truncation": fr.Truncation(top_p=0.8)}] * 2,
    ]
    results = []
    for told in tells:
        found = fr.linear_logprobs(**data, **told)
        results.append([found.logprobs.detach(), *gradients(found.logprobs.sum(), data)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


# ----------------------------------------------------------------------------------------------------------------- ids


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_several_ids_a_row(backend: str, transform: tuple) -> None:
    data = operands(transform)
    z = logits_of(data)
    data["targets"][2] = -100
    ids = torch.randint(0, V, (N, 5), generator=torch.Generator().manual_seed(1))
    ids[1, 0], ids[3], ids[5, :2] = -100, -100, 9
    ids[2] = 10**7  # of a row that is left out
    found = fr.linear_logprobs(**data, ids=ids, backend=backend)
    counts = (ids != -100) & (torch.arange(N) != 2)[:, None]
    log_p = z.log_softmax(-1)
    truth = torch.where(counts, log_p.gather(1, ids.clamp(0, V - 1)), 0.0)
    assert worst(found.id_logprobs, truth) <= 1e-12
    assert not found.id_logprobs[~counts].any()
    u, g = torch.linspace(-1, 1, 5 * N, dtype=z.dtype).view(N, 5), torch.linspace(1, 2, N, dtype=z.dtype)
    live = torch.where(data["targets"] >= 0, log_p.gather(1, data["targets"].clamp(min=0)[:, None])[:, 0], 0.0)
    ours = gradients((u * found.id_logprobs).sum() + (g * found.logprobs).sum(), data)
    theirs = gradients((u * truth).sum() + (g * live).sum(), data)
    assert all(relative(a, b) <= 1e-11 for a, b in zip(ours, theirs))
    only = gradients((u * found.id_logprobs).sum(), data)
    assert all(relative(a, b) <= 1e-11 for a, b in zip(only, gradients((u * truth).sum(), data)))


def test_ids_of_padded_batches_beside_a_filter() -> None:
    """With grad_filter the given ids are exact, and the whole is within the filter's bound."""
    data = operands(TRANSFORMS[0], torch.float32)
    ids = torch.randint(0, V, (N, 3), generator=torch.Generator().manual_seed(1))
    shaped = data | {"hidden": data["hidden"].view(2, 6, H), "targets": data["targets"].view(2, 6)}
    flat = fr.linear_logprobs(**data, ids=ids)
    found = fr.linear_logprobs(**shaped, ids=ids.view(2, 6, 3), grad_filter=1e-4)
    assert torch.equal(found.id_logprobs.view(N, 3), flat.id_logprobs)
    exact, near = (gradients(f.id_logprobs.sum(), data)[1] for f in (flat, found))
    bound = 3 * 1e-4 * data["hidden"].norm(dim=1).sum()
    assert (exact - near).norm() <= bound
    none = fr.linear_logprobs(**data, ids=ids[:, :0])
    assert none.id_logprobs.shape == (N, 0)


def test_ids_stay_one_node_under_a_compiler() -> None:
    data = operands(TRANSFORMS[0], torch.float32)
    ids = torch.arange(2 * N).view(N, 2)

    def f(hidden: Tensor, weight: Tensor) -> Tensor:
        return fr.linear_logprobs(hidden, weight, data["targets"], ids=ids).id_logprobs.sum()

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(data["hidden"], data["weight"]), f(data["hidden"], data["weight"]))


# -------------------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("how", ["given", "computed"])
@pytest.mark.parametrize("bias_corrected", [False, True])
def test_a_policy_loss_has_the_ratio_of_kept_sets_and_the_kl_of_whole_ones(
    monkeypatch: pytest.MonkeyPatch, beta: float, how: str, bias_corrected: bool
) -> None:
    if bias_corrected and not beta:
        pytest.skip("there is no KL to correct")
    monkeypatch.setattr(truncation, "NARROW", 7)
    data = operands(TRANSFORMS[5])
    z, targets = logits_of(data), data["targets"]
    keep = with_targets(warped(z.detach(), {"top_p": 0.8}, "transformers"), targets)
    truth = dense_within(z, keep, targets)
    noise = torch.randn(2, N, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    old = (truth["logprobs"] + 0.1 * noise[0]).detach()
    ref = (truth["full_logprobs"] + 0.1 * noise[1]).detach()
    advantages = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)
    told: dict[str, Any] = {"kept": csr(keep)} if how == "given" else {"truncation": fr.Truncation(top_p=0.8)}
    objective = fr.GRPO(beta=beta, entropy_coef=0.01, use_bias_correction_kl=bias_corrected)
    batch = {
        name: value.view(3, 4) for name, value in (("old_logprobs", old), ("ref_logprobs", ref), ("targets", targets))
    }
    if isinstance(data["temperature"], Tensor):
        data["temperature"] = data["temperature"].view(3, 4)
    shaped = data | {"hidden": data["hidden"].view(3, 4, H)} | batch
    if not beta:
        del shaped["ref_logprobs"]
    loss, metrics = fr.linear_policy_loss(
        **shaped, **told, advantages=advantages, objective=objective, outputs=("entropy", "full_logprobs")
    )
    ratio = (truth["logprobs"] - old).exp()
    a = advantages.repeat_interleave(4)
    per_token = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
    if beta:
        kl = KL_ESTIMATORS["k3"](truth["full_logprobs"], ref)
        per_token = per_token + beta * kl * (ratio if bias_corrected else 1.0)
        assert abs(metrics["kl"] - (kl * (ratio if bias_corrected else 1.0)).mean()) <= 1e-12
    total = per_token.mean() - 0.01 * truth["entropy"].mean()
    assert abs(loss - total) <= 1e-12
    assert all(relative(x, y) <= 1e-10 for x, y in zip(gradients(loss, data), gradients(total, data)))
    untruncated = (truth["full_logprobs"] - old).exp()
    assert abs(metrics["ratio_mean"] - ratio.mean()) <= 1e-12
    assert abs(metrics["untruncated/ratio_mean"] - untruncated.mean()) <= 1e-12
    assert abs(metrics["untruncated/ratio_difference"] - (ratio - untruncated).mean()) <= 1e-12
    assert ("targets_added" in metrics) == (how == "computed")


def test_the_ratio_is_one_on_policy() -> None:
    data = operands(TRANSFORMS[0], torch.float32)
    cut = fr.Truncation(top_k=30, top_p=0.9, min_p=0.001)
    old = fr.linear_logprobs(**data, truncation=cut).logprobs.detach()
    _, metrics = fr.linear_policy_loss(
        **data, truncation=cut, advantages=torch.ones(N), old_logprobs=old, objective=fr.GRPO()
    )
    assert metrics["ratio_mean"] == 1
    assert metrics["approx_kl"] == 0


def test_a_reference_in_the_same_call_is_of_whole_distributions() -> None:
    data = operands(TRANSFORMS[0])
    ref_hidden = data["hidden"].detach() + 0.01
    keep = with_targets(warped(logits_of(data).detach(), {"top_k": 5}, "transformers"), data["targets"])
    ref = fr.linear_logprobs(**data | {"hidden": ref_hidden}).logprobs.detach()
    common: dict[str, Any] = {
        "advantages": torch.ones(N, dtype=torch.float64),
        "objective": fr.GRPO(beta=0.1),
        "kept": csr(keep),
    }
    loss, _ = fr.linear_policy_loss(**data, **common, ref_hidden=ref_hidden)
    other, _ = fr.linear_policy_loss(**data, **common, ref_logprobs=ref)
    assert abs(loss - other) <= 1e-12


@pytest.mark.parametrize(
    ("objective", "compared"),
    [(fr.DPO(), True), (fr.SimPO(), False), (fr.DPO(sft_weight=0.5), True), (fr.ORPO(), False)],
)
def test_a_preference_compares_whole_distributions_with_the_reference(objective, compared) -> None:
    data = operands(TRANSFORMS[0])
    z, targets = logits_of(data), data["targets"]
    keep = with_targets(warped(z.detach(), {"top_k": 9}, "transformers"), targets)
    truth = dense_within(z, keep, targets)
    ref = (truth["full_logprobs"] + 0.1).detach() if compared else None
    cu = torch.tensor([0, 2, 5, 9, 12])
    loss, metrics = fr.linear_preference_loss(
        **data, objective=objective, cu_seqlens=cu, kept=csr(keep), ref_logprobs=ref, outputs=("entropy",)
    )
    parts = [slice(a, b) for a, b in pairwise(cu)]
    kept_sums = torch.stack([truth["logprobs"][p].sum() for p in parts])
    full_sums = torch.stack([truth["full_logprobs"][p].sum() for p in parts])
    lengths = cu.diff().double()
    if compared:
        ratios = full_sums - torch.stack([ref[p].sum() for p in parts])
        total = -torch.nn.functional.logsigmoid(0.1 * (ratios[:2] - ratios[2:])).mean()
        if "sft" in objective.losses:
            total = total - 0.5 * kept_sums[:2].sum() / lengths[:2].sum()
        assert abs(metrics["rewards/chosen"] - 0.1 * ratios[:2].mean()) <= 1e-12
        assert all(relative(x, y) <= 1e-10 for x, y in zip(gradients(loss, data), gradients(total, data)))
        assert abs(loss - total) <= 1e-12
    else:
        masked = data | {"bias": None, "hidden": torch.cat([data["hidden"], torch.zeros(N, 0, dtype=torch.float64)], 1)}
        assert masked["hidden"].shape == (N, H)
        means = kept_sums / lengths
        if "simpo" in objective.losses:
            total = -torch.nn.functional.logsigmoid(2.0 * (means[:2] - means[2:]) - 1.0).mean()
        else:
            log_odds = means[:2] - means[2:] - ((-means[:2].expm1()).log() - (-means[2:].expm1()).log())
            total = -0.1 * torch.nn.functional.logsigmoid(log_odds).mean() - kept_sums[:2].sum() / lengths[:2].sum()
        assert abs(loss - total) <= 1e-10
        assert all(relative(x, y) <= 1e-10 for x, y in zip(gradients(loss, data), gradients(total, data)))


def test_modules_take_them_too() -> None:
    data = operands(TRANSFORMS[0])
    cut = fr.Truncation(top_k=5)
    batch: dict[str, Any] = {"advantages": torch.ones(N, dtype=torch.float64), "truncation": cut}
    loss, _ = fr.FusedLinearGRPOLoss()(data["hidden"], data["weight"], data["targets"], **batch)
    expected, _ = fr.linear_policy_loss(data["hidden"], data["weight"], data["targets"], objective=fr.GRPO(), **batch)
    assert torch.equal(loss, expected)


# ----------------------------------------------------------------------------------------------------------- refusals


def _kept(**changes: Any) -> dict[str, Any]:
    ids, offsets = torch.arange(N), torch.arange(N + 1)
    return {"kept": (changes.get("ids", ids), changes.get("offsets", offsets))}


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (
            _kept(ids=torch.arange(N).roll(1)),
            "kept must hold the target of every row, got none of 0 at flat position 0",
        ),
        (
            _kept(offsets=torch.tensor([0, 0, *range(2, N + 1)])),
            "kept must hold a token of every row, got none at flat position 0",
        ),
        (
            _kept(ids=torch.arange(N).index_fill(0, torch.tensor(4), V)),
            f"kept ids must lie in .0, {V}., got {V} for flat position 4",
        ),
        (
            _kept(ids=torch.arange(N).index_fill(0, torch.tensor(4), -1)),
            "kept ids must lie in .*, got -1 for flat position 4",
        ),
        (_kept(ids=torch.arange(N + 3)), r"kept offsets must rise from 0 to len\(ids\) = 15"),
        (_kept(offsets=torch.arange(N + 1) + 1), r"kept offsets must rise from 0 to len\(ids\) = 12"),
        (_kept(offsets=torch.arange(N)), "kept offsets must hold 13 numbers, one more than there are targets, got 12"),
        (_kept(ids=torch.arange(N).double()), "kept ids must be 1-d, int32 or int64"),
        (_kept(ids=torch.arange(N)[:, None]), "kept ids must be 1-d"),
        ({"kept": torch.arange(N)}, r"kept must be \(ids, offsets\), got Tensor"),
        ({"truncation": 0.9}, "truncation must be a Truncation, got float"),
        ({"truncation": fr.Truncation(top_p=torch.ones(3))}, "truncation.top_p must have the shape of targets"),
        (
            {"truncation": fr.Truncation(top_p=torch.linspace(0, 1, N))},
            "truncation.top_p must be above 0 and at most 1, got 0 at flat position 0",
        ),
        (
            {"truncation": fr.Truncation(top_k=torch.arange(N) - 3)},
            "truncation.top_k must be at least 0, got -3 at flat position 0",
        ),
        ({"truncation": fr.Truncation(top_k=3), **_kept()}, "truncation must be None beside kept"),
        ({"truncation": fr.Truncation(top_k=3), "grad_filter": 0.1}, "grad_filter must be 0 with truncation"),
        ({"grad_filter": 0.1, **_kept()}, "grad_filter must be 0 with kept"),
        ({"ids": torch.zeros(N, 2, dtype=torch.int64), **_kept()}, "ids must be None with kept"),
        ({"outputs": ("mean_logit",), **_kept()}, "outputs must be among .*full_logprobs.*, got 'mean_logit'"),
        ({"outputs": ("full_logprobs",)}, "outputs must be among .*got 'full_logprobs'"),
        ({"ids": torch.zeros(N, dtype=torch.int64)}, r"ids must be \(12, K\), beside targets \(12,\), got \(12,\)"),
        ({"ids": torch.zeros(N, 2)}, "ids must be int64, got torch.float32"),
        (
            {"ids": torch.full((N, 2), V)},
            f"ids must lie in .0, {V}. or equal ignore_index=-100, got {V} at flat position 0, number 0",
        ),
    ],
)
def test_bad_input_is_refused_by_name(told: dict[str, Any], words: str) -> None:
    data = operands(TRANSFORMS[0])
    data["targets"] = torch.arange(N)
    with pytest.raises((ValueError, TypeError), match=words):
        fr.linear_logprobs(**data, **told)


def test_one_pass_is_refused_and_metrics_of_the_whole_vocabulary() -> None:
    data = operands(TRANSFORMS[0])
    cut = fr.Truncation(top_k=3)
    with pytest.raises(ValueError, match="mode='one_pass' must not be used with kept or truncation"):
        fr.linear_policy_loss(
            **data, truncation=cut, mode="one_pass", objective=fr.GRPO(), advantages=torch.ones(N, dtype=torch.float64)
        )
    cu = torch.tensor([0, 6, 12])
    with pytest.raises(ValueError, match="outputs must be among"):
        fr.linear_preference_loss(**data, truncation=cut, objective=fr.SimPO(), cu_seqlens=cu, outputs=("mean_logit",))


def test_second_derivatives_are_refused() -> None:
    data = operands(TRANSFORMS[0])
    found = fr.linear_logprobs(**data, truncation=fr.Truncation(top_k=3))
    (grad,) = torch.autograd.grad(found.logprobs.sum(), data["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        grad.sum().backward()

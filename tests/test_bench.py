"""What the suite measures: cases, inputs, every provider on every op, and errors against fp64."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fused_rlhf.bench.accuracy import errors
from fused_rlhf.bench.cases import MODELS, Case
from fused_rlhf.bench.document import summarise
from fused_rlhf.bench.inputs import (
    BASE_ROWS,
    Reference,
    _nucleus,
    base_rows,
    build,
    completion_mask,
    fp64_reference,
    given_ids,
    order,
)
from fused_rlhf.bench.measure import measure
from fused_rlhf.bench.ops import OPS, TOP_P, Values
from fused_rlhf.bench.plan import Plan, Row
from fused_rlhf.bench.provider import Output, Provider, Tolerance
from fused_rlhf.bench.registry import PROVIDERS
from tests.memory import peak_tensor_bytes

ROOT = Path(__file__).resolve().parent.parent
TINY = Case(N=48, H=64, V=1003, T=12)
NEEDS = {"trl": "trl", "liger": "liger_kernel", "liger-scaled": "liger_kernel"}
# What can run on a CPU with what is installed; "auto" means chunked there, which ignores "rounded".
ELSEWHERE = ("triton", "chunked", "reference-", "-rounded", "cce", "verl", "flce", "quack", "-compiled", "-graphs")
HERE = [n for n in PROVIDERS if not any(part in n for part in ELSEWHERE)]
HERE = [n for n in HERE if n not in NEEDS or importlib.util.find_spec(NEEDS[n])] + ["ours-one_pass-rounded"]


def measured(case: Case, providers: list[str], **options) -> dict:
    """One in-process measurement, as the document a run would give."""
    found = measure(case, providers, "cpu", fp64_reference(case, "cpu"), rounds=1, warmup=0, **options)
    plan = Plan("test", {"case": case}, [Row("case", p) for p in providers])
    return summarise(plan, {row: found[row.provider] for row in plan.rows})


def row_of(result: dict, provider: str) -> dict:
    return next(r for r in result["rows"] if r["provider"] == provider)


@pytest.mark.parametrize("change", [{}, {"density": 0.5}, {"frozen_head": True}], ids=["plain", "padded", "frozen"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("op", OPS)
def test_every_provider_agrees_with_fp64(op, dtype, change):
    case = replace(TINY, op=op, dtype=dtype, **change)
    names = [n for n in HERE if PROVIDERS[n].takes(case)]
    result = measured(case, names)
    assert {r["provider"] for r in result["rows"]} == set(names)
    assert "ours" in names
    for r in result["rows"]:
        assert r["error"] is None, (r["provider"], r["error"])
        # The KL of two distributions this close is lost where both their logits were rounded to bf16; that is reported.
        assert r["wrong"] == ((op, dtype, r["provider"]) == ("kl", "bf16", "dense")), (r["provider"], r["errors"])
        assert r["both_s"]["median"] == pytest.approx(r["forward_s"]["median"] + r["backward_s"]["median"])
        assert r["scratch_bytes"] <= r["peak_extra_bytes"]
        if not PROVIDERS[r["provider"]].roof:
            wanted = {"dhidden_rel", "loss_per_nat"} if OPS[op].backward else {"logprob_max_abs"}
            assert wanted <= set(r["errors"])
            assert ("dweight_rel" in r["errors"]) == (OPS[op].backward and not case.frozen_head)


def test_peers_are_imported_on_use():
    """Nor is torch, until what is asked is known to be right."""
    script = "import sys, fused_rlhf.bench.command; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "trl", "liger_kernel", "transformers", "matplotlib"} & set(loaded.stdout.split())


@pytest.mark.parametrize(
    ("change", "providers"),
    [
        ({"masters": True, "dtype": "bf16"}, ["dense", "ours-one_pass", "ours-two_phase"]),
        ({"outliers": 2, "H": 512}, ["dense", "trl", "ours"]),
        ({"dtype": "tf32"}, ["gemm", "dense", "trl", "ours"]),
        ({"frozen_head": True}, ["dense-lora", "ours-lora"]),
        ({"op": "logprobs_fwd_bwd"}, ["ours-compiled", "ours-graphs"]),
        ({"wall": True}, ["dense", "ours"]),
    ],
    ids=str,
)
def test_what_a_gpu_is_asked_agrees_with_fp64(change, providers):
    case = replace(TINY, **change)
    for r in measured(case, [name for name in providers if name not in NEEDS or name in HERE])["rows"]:
        assert r["error"] is None, (r["provider"], r["error"])
        assert not r["wrong"], (r["provider"], r["errors"])
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_master_is_in_fp32_and_so_is_its_gradient():
    case = replace(TINY, masters=True, dtype="bf16")
    inputs = build(case, "cpu", fp64_reference(case, "cpu"))
    assert (inputs.weight.dtype, inputs.hidden.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(inputs.weight.bfloat16().float(), inputs.weight)
    assert case.gradient_bytes - replace(case, masters=False).gradient_bytes == 2 * case.V * case.H


def test_outlier_channels_are_large_and_the_logits_are_not():
    case = replace(TINY, H=512, outliers=4)
    inputs = build(case, "cpu", fp64_reference(case, "cpu"))
    hidden = inputs.hidden.detach()
    assert (hidden[:, :4] == 50).all()
    assert (hidden[:, -4:] == -50).all()
    assert hidden[:, 4:-4].abs().max() < 20
    partial = hidden[:, :4] @ inputs.weight.detach()[:, :4].T
    assert partial.min() > 10
    assert (hidden @ inputs.weight.detach().T).amax(1).median() < 30


def test_zero_gradients():
    for op in (TINY.op, "logprobs_fwd_bwd", "kl", "kept", "top_p", "ids"):
        case = replace(TINY, zero_rows=0.5, beta=0.0, op=op)
        inputs = build(case, "cpu", fp64_reference(case, "cpu"))
        zeros = ((inputs.advantages if case.op == "grpo" else inputs.upstream) == 0).sum()
        assert 24 <= zeros <= 24 + (op == "top_p")  # one row more, whose nucleus rounding decides
        names = [n for n in HERE if PROVIDERS[n].takes(case)]
        assert "liger" not in names  # one advantage per sequence
        for r in measured(case, names)["rows"]:
            assert r["error"] is None
            assert not r["wrong"], (r["provider"], r["errors"])


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return 1.01 * g


def _dense_logprobs(inputs):
    return -F.cross_entropy(inputs.hidden @ inputs.weight.T, inputs.targets, reduction="none")


@pytest.mark.parametrize(
    ("setup", "telling"),
    [
        (lambda inputs: lambda: _dense_logprobs(inputs) + 0.01, "logprob_max_abs"),
        (lambda inputs: lambda: _WrongGradient.apply(_dense_logprobs(inputs)), "dhidden_rel"),
        (lambda inputs: lambda: _dense_logprobs(inputs) * math.nan, "logprob_max_abs"),
        (lambda inputs: lambda: Output(_dense_logprobs(inputs).sum()), "loss_per_nat"),
    ],
    ids=["logprobs off by 0.01", "gradients off by 1 %", "NaN", "another loss"],
)
def test_a_wrong_provider_is_reported_as_wrong(monkeypatch, setup, telling):
    monkeypatch.setitem(PROVIDERS, "off", Provider("off", setup))
    result = measured(replace(TINY, op="logprobs_fwd_bwd"), ["ours", "off"])
    off = row_of(result, "off")
    assert off["wrong"]
    limit = off["tolerance"]["gradient" if telling.startswith("d") else "logprob"]
    assert not off["errors"][telling] <= limit
    assert not row_of(result, "ours")["wrong"]


def test_a_failing_provider_leaves_the_others(monkeypatch):
    def missing(inputs):
        raise ModuleNotFoundError("No module named 'peer'")

    def greedy(inputs):
        raise RuntimeError("[enforce fail] you tried to allocate 9957801984 bytes. Error code 12")

    monkeypatch.setitem(PROVIDERS, "missing", Provider("missing", missing, packages=("no-such-package",)))
    monkeypatch.setitem(PROVIDERS, "greedy", Provider("greedy", greedy))
    result = measured(TINY, ["missing", "greedy", "ours-one_pass"])
    assert row_of(result, "missing")["error"] == "ModuleNotFoundError: No module named 'peer'"
    assert row_of(result, "greedy")["error"] == "out of memory: 9.96 GB more were refused"
    assert row_of(result, "ours-one_pass")["error"] is None
    assert result["versions"]["no-such-package"] is None


def test_a_provider_refuses_a_case_that_it_does_not_have():
    case = replace(TINY, op="dpo")
    assert PROVIDERS["ours-one_pass"].takes(replace(case, frozen_head=True))
    result = measured(case, ["ours-one_pass"])
    assert result["rows"][0]["error"].startswith("ValueError: ours-one_pass does not have this case: dpo N=48")


@pytest.mark.parametrize("op", ["grpo", "ppo", "dpo", "kl"])
def test_reference_and_errors_against_dense_fp64(op):
    """Autograd through dense fp64 logits is the truth that the formulas of `accuracy` must give."""
    case = replace(TINY, op=op, N=96, V=9001, density=0.5)  # two blocks of columns
    weight, hidden, ref_hidden, targets, _ = base_rows(case, "cpu")
    reference = fp64_reference(case, "cpu")
    logp = (hidden.double() @ weight.double().T).log_softmax(1)
    logq = (ref_hidden.double() @ weight.double().T).log_softmax(1)
    close: dict[str, Any] = {"rtol": 0, "atol": 1e-11}
    torch.testing.assert_close(reference.logprobs, logp.gather(1, targets[:, None])[:, 0], **close)
    torch.testing.assert_close(reference.ref_logprobs, logq.gather(1, targets[:, None])[:, 0], **close)
    torch.testing.assert_close(reference.entropy, -(logp.exp() * logp).sum(1), **close)
    torch.testing.assert_close(reference.kl, (logp.exp() * (logp - logq)).sum(1), **close)

    inputs = build(case, "cpu", reference)
    inputs.hidden = inputs.hidden.detach().double().requires_grad_()
    inputs.weight = inputs.weight.detach().double().requires_grad_()
    logp = (inputs.hidden @ inputs.weight.T).log_softmax(1)
    values = logp.gather(1, inputs.targets[:, None])[:, 0]
    if op == "kl":
        values = (logp.exp() * (logp - logq)).sum(1)
    found = Values(values, -(logp.exp() * logp).sum(1) if op == "ppo" else None)
    loss = OPS[op].loss(found, inputs)
    loss.backward()
    result = errors(inputs, reference, loss, found)
    assert {"loss_abs", "loss_per_nat", "dhidden_rel", "dweight_rel"} < set(result)
    assert ("entropy_max_abs" in result) == (op == "ppo")
    assert max(result.values()) < 1e-10
    inputs.weight.grad *= 1.1
    assert errors(inputs, reference, loss, None)["dweight_rel"] > 1e-3
    inputs.hidden.grad[~inputs.mask] += 1.0
    assert errors(inputs, reference, loss, None)["dhidden_rel"] > 1e-3


@pytest.mark.parametrize("op", ["kept", "top_p", "ids"])
def test_values_of_sampled_tokens_against_dense_fp64(op):
    """Sets by their definitions, one row after the other; autograd through dense fp64 logits is the truth of the gradients."""
    case = replace(TINY, op=op, N=96, H=512, V=9001, density=0.5)  # two blocks of columns
    reference = fp64_reference(case, "cpu")
    inputs = build(case, "cpu", reference)
    inputs.hidden = inputs.hidden.detach().double().requires_grad_()
    inputs.weight = inputs.weight.detach().double().requires_grad_()
    logp = (inputs.hidden @ inputs.weight.T).log_softmax(1)
    values, sizes = [], []
    for row, target in enumerate(inputs.targets.tolist()):
        known = logp[row].detach()
        if op == "ids":
            values.append(logp[row, target] + logp[row, inputs.ids[row]].mean())
            continue
        kept = set(inputs.ids[row].tolist()) if op == "kept" else {target}
        if op == "top_p":
            mass = 0.0
            for token in known.argsort(descending=True).tolist():
                kept.add(token)
                mass += known[token].exp().item()
                if mass >= TOP_P:
                    break
        sizes.append(len(kept))
        values.append(logp[row, target] - logp[row, sorted(kept)].logsumexp(0))
    found = Values(torch.stack(values))
    torch.testing.assert_close(reference.sampled, found.values.detach(), rtol=0, atol=1e-11)
    loss = OPS[op].loss(found, inputs)
    loss.backward()
    result = errors(inputs, reference, loss, found)
    assert result.pop("unsettled") == 1 - reference.settled.double().mean()
    assert max(result.values()) < 1e-10
    if op == "kept":
        assert set(sizes) == {20}
    if op == "top_p":
        assert min(sizes) == 1
        assert max(sizes) > 400
    inputs.weight.grad *= 1.1
    assert errors(inputs, reference, loss, None)["dweight_rel"] > 1e-3
    inputs.hidden.grad[~inputs.mask] += 1.0
    assert errors(inputs, reference, loss, None)["dhidden_rel"] > 1e-3


def test_nuclei_of_flat_rows_agree_with_fp64():
    """Sets of thousands of tokens, which are told by their border."""
    case = replace(TINY, op="top_p", N=96, H=512, V=40000)
    base, floor = base_rows(case, "cpu"), fp64_reference(case, "cpu").floor
    assert ((base.hidden.double() @ base.weight.double().T) >= floor[:, None]).sum(1).max() > 2000
    for row in measured(case, ["dense", "ours"])["rows"]:
        assert row["error"] is None
        assert not row["wrong"], (row["provider"], row["errors"])


def test_given_tokens_are_the_target_likely_ones_and_others():
    case = replace(TINY, op="kept", V=23)
    base = base_rows(case, "cpu")
    ids = given_ids(case, base)
    assert torch.equal(ids[:, 0], base.targets)
    assert all(
        len(set(row)) == 20 and set(likely) <= set(row) for row, likely in zip(ids.tolist(), base.candidates.tolist())
    )
    assert torch.equal(given_ids(case, base), ids)
    case = replace(TINY, op="ids")
    base = base_rows(case, "cpu")
    ids = given_ids(case, base)
    assert ids.shape == (48, 64)
    assert (ids[:, :32, None] == base.candidates[:, None]).any(2).all()
    assert not (ids[:, 32:, None] == base.candidates[:, None]).any(2).any(1).all()
    assert given_ids(replace(TINY, op="top_p"), base) is None


def test_a_nucleus_that_rounding_decides_is_not_compared():
    """Rows of 4 tokens: the third is kept where the first two hold less than 0.9."""
    masses = torch.tensor(
        [[0.6, 0.3 - 1e-6, 0.06, 0.04], [0.6, 0.29, 0.07, 0.04], [0.6, 0.3 + 1e-5, 0.06, 0.04]]
    ).double()
    masses /= masses.sum(1, keepdim=True)
    z = masses.log()
    whole = torch.zeros(3).double()
    found = _nucleus(z, whole, z[:, 0])
    assert found.settled.tolist() == [False, True, False]
    torch.testing.assert_close(
        found.lse.exp(), torch.stack([masses[0, :3].sum(), masses[1, :3].sum(), masses[2, :2].sum()])
    )
    assert ((z >= found.floor[:, None]).sum(1) == torch.tensor([3, 3, 2])).all()
    with_target = _nucleus(z, whole, z[:, 3])
    torch.testing.assert_close(with_target.lse.exp(), found.lse.exp() + masses[:, 3])
    case = replace(TINY, op="top_p")
    reference = fp64_reference(case, "cpu")._replace(settled=torch.arange(48) != 5)
    inputs = build(case, "cpu", reference)
    assert (inputs.upstream == 0).nonzero().tolist() == [[5]]
    values = reference.sampled.clone()
    values[5] += 1.0
    inputs.hidden.grad, inputs.weight.grad = torch.zeros_like(inputs.hidden), torch.zeros_like(inputs.weight)
    result = errors(inputs, reference, None, Values(values))
    assert result["unsettled"] == pytest.approx(1 / 48)
    assert result["logprob_max_abs"] == 0.0


def test_inputs_are_peaked_and_flat_and_repeat():
    case = Case(N=2 * BASE_ROWS, H=256, V=8000, zero_rows=0.8, beta=0.0)
    reference = fp64_reference(case, "cpu")
    assert len(reference.logprobs) == BASE_ROWS
    low, high = torch.quantile(reference.entropy, torch.tensor([0.3, 0.95], dtype=torch.float64)).tolist()
    assert low < 0.1
    assert high > 1.5
    inputs = build(case, "cpu", reference)
    index = order(case, "cpu")
    assert torch.equal(index[:BASE_ROWS], torch.arange(BASE_ROWS))
    assert torch.equal(inputs.hidden, inputs.hidden[:BASE_ROWS][index])
    assert not torch.equal(index[BASE_ROWS:], torch.arange(BASE_ROWS))  # else the halves of a pair would be alike
    assert (inputs.advantages == 0).sum() == round(0.8 * case.N)
    assert inputs.ref_logprobs is None
    logits = inputs.hidden[:BASE_ROWS].detach() @ inputs.weight.detach().T
    assert 22 < logits.amax(1).median() < 28
    assert logits.amin() < -22
    ratio = (reference.logprobs[index] - inputs.old_logprobs).exp()
    clipped = ((ratio - 1).abs() > 0.2).double().mean()
    assert 0.01 < clipped < 0.1
    again = build(case, "cpu", reference)
    assert torch.equal(again.hidden, inputs.hidden)
    assert torch.equal(again.advantages, inputs.advantages)


@pytest.mark.parametrize("density", [1.0, 0.9, 0.5, 0.1])
def test_the_mask_has_the_density(density):
    case = replace(TINY, N=6400, T=100, density=density)
    mask = completion_mask(case, "cpu").view(-1, 100)
    lengths = mask.sum(1)
    assert lengths.sum() == pytest.approx(case.rows[0], rel=0.02)
    assert torch.equal(mask, torch.arange(100) < lengths[:, None])
    if density < 1:
        assert len(lengths.unique()) > 5


def test_shorter_inputs_are_the_first_tokens():
    case = replace(TINY, op="dpo", density=0.5)
    given = build(replace(TINY, op="ids"), "cpu", fp64_reference(replace(TINY, op="ids"), "cpu"))
    assert torch.equal(given.shorter(5).ids, given.ids.view(4, 12, 64)[:, :5].flatten(0, 1))
    inputs = build(case, "cpu", fp64_reference(case, "cpu"))
    short = inputs.shorter(5)
    assert short.ids is None
    assert (short.case.N, short.case.T) == (20, 5)
    assert torch.equal(short.sequences(short.targets), inputs.sequences(inputs.targets)[:, :5])
    assert torch.equal(short.sequences(short.hidden), inputs.sequences(inputs.hidden)[:, :5])
    assert short.hidden.is_leaf
    assert short.ref_logprobs.shape == short.mask.shape == (20,)


def test_operations_and_bytes():
    case = Case(N=100, H=8, V=1000, T=50)
    assert case.flops == 3 * 2 * 100 * 8 * 1000
    assert replace(case, frozen_head=True).flops == 2 * 2 * 100 * 8 * 1000
    assert replace(case, op="logprobs_fwd").flops == 2 * 100 * 8 * 1000
    assert replace(case, op="kl").flops == 4 * 2 * 100 * 8 * 1000
    assert replace(case, density=0.5).flops == case.flops / 2
    assert replace(case, beta=0.0, zero_rows=0.5).flops == (1 + 2 * 0.5) * 2 * 100 * 8 * 1000
    operands = (100 + 1000) * 8 * 4
    assert case.gradient_bytes == operands
    assert case.least_bytes == 2 * operands + 100 * (8 + 4 * 5)
    assert replace(case, frozen_head=True, dtype="bf16").gradient_bytes == 100 * 8 * 2
    for op in ("top_p", "ids"):  # what is told of more tokens needs no more products
        assert replace(case, op=op).flops == case.flops
    kept = replace(case, op="kept", V=3000)
    assert kept.flops == 3 * 2 * 100 * 8 * 20
    assert kept.least_bytes == (100 + 100 * 20) * 8 * 4 + (100 + 3000) * 8 * 4 + 100 * (8 + 20 * 8 + 2 * 4)
    assert not PROVIDERS["gemm"].takes(kept)


def test_models_are_heads():
    assert MODELS["qwen3-8b"] == (4096, 151936)
    assert all(512 < H < 10000 and 100_000 < V < 300_000 for H, V in MODELS.values())


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"dtype": "int8"}, "dtype"),
        ({"T": 7}, "must divide N"),
        ({"V": 0}, "V must be at least 1"),
        ({"density": 0.0}, "density"),
        ({"zero_rows": 1.0}, "zero_rows"),
        ({"lengths": 13}, "lengths"),
        ({"masters": True}, "masters must be left out unless dtype is bf16, got dtype fp32"),
        ({"outliers": 33}, r"outliers must be in \[0, H / 2 = 32\], got 33"),
    ],
)
def test_bad_cases_are_refused(change, word):
    with pytest.raises(ValueError, match=word):
        replace(TINY, **change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"op": "orpo"}, "op must be one of .*, got 'orpo'"),
        ({"op": "dpo", "T": 16}, "even number of sequences, got N / T = 3"),
        ({"zero_rows": 0.5}, "zero_rows must be 0 .*, got 0.5 with grpo"),
        ({"op": "ppo", "zero_rows": 0.5}, "zero_rows must be 0 .*, got 0.5 with ppo"),
        ({"op": "sft", "zero_rows": 0.5}, "zero_rows must be 0 .*, got 0.5 with sft"),
        ({"objective": "simpo"}, "objective must be one of .* with grpo, got 'simpo'"),
        ({"op": "kept", "V": 19}, "V must be at least 20 with kept, .*, got 19"),
    ],
)
def test_a_case_that_no_provider_can_have_is_refused_where_one_meets_it(change, words):
    case = replace(TINY, **change)
    with pytest.raises(ValueError, match=words):
        PROVIDERS["dense"].takes(case)
    with pytest.raises(ValueError, match=words):
        PROVIDERS["dense"].step(replace(build(TINY, "cpu", fp64_reference(TINY, "cpu")), case=case))
    with pytest.raises(ValueError, match=words):
        Plan("test", {"case": case}, [Row("case", "dense")])


def test_a_tolerance_allows_what_was_promised():
    tolerance = Tolerance(logprob=5e-5, gradient=1e-4)
    assert tolerance.allows({})
    assert tolerance.allows({"logprob_max_abs": 1e-5, "dhidden_max_abs": 9.0, "loss_abs": 9.0})
    for name in ("logprob_max_abs", "kl_max_abs", "entropy_max_abs", "loss_per_nat", "dweight_rel"):
        assert not tolerance.allows({name: 1e-3})
        assert not tolerance.allows({name: math.nan})


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("op", OPS)
def test_dense_memory_is_its_formula(op, dtype):
    case = Case(op=op, dtype=dtype, N=128, H=32, V=20000, T=32)
    inputs = build(case, "cpu", fp64_reference(case, "cpu"))
    step = PROVIDERS["dense"].step(inputs)

    def run():
        with torch.set_grad_enabled(OPS[op].backward):
            output = step()
        if OPS[op].backward:
            output.loss.backward()

    # Where every op is watched, the backward of a gather adds to zeros out of place.
    watched = peak_tensor_bytes(run) - (4.0 * case.N * case.V if op == "kept" else 0.0)
    assert watched == pytest.approx(PROVIDERS["dense"].memory(case, "cpu"), rel=0.05)


def test_memory_of_ours_with_sampled_tokens_is_its_formula():
    """Of what runs in plain sight; the products of `ids` are inside an op of ours."""
    for case in (Case(op="kept", N=1024, H=256, V=8000), Case(op="top_p", N=256, H=256, V=20000)):
        forward = PROVIDERS["ours"].step(build(case, "cpu", fp64_reference(case, "cpu")))

        def run(forward=forward):
            forward().loss.backward()

        assert 0.6 < peak_tensor_bytes(run) / PROVIDERS["ours"].memory(case, "cpu") < 1.15


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_formulas_of_memory(device):
    """Ours does not grow with N beyond what N x H takes; the formulas work for every case of every op."""
    for name, provider in PROVIDERS.items():
        for op in OPS:
            case = replace(TINY, op=op, V=151936, H=896, N=16384, T=8192)
            if provider.memory is None or not provider.takes(case):
                continue
            bytes_ = provider.memory(case, device)
            longer = provider.memory(replace(case, N=65536), device)
            if name.startswith("ours-reference") or bytes_ is None:  # dense
                continue
            assert bytes_ >= (0 if provider.roof else case.gradient_bytes)
            if name.startswith("ours"):
                assert longer - bytes_ <= 65536 * (4 * 896 * 4 + 64), (name, op)


def test_reference_is_picklable_by_field(tmp_path):
    reference = fp64_reference(TINY, "cpu")
    torch.save(reference._asdict(), tmp_path / "r.pt")
    assert all(torch.equal(a, b) for a, b in zip(reference, Reference(**torch.load(tmp_path / "r.pt"))))

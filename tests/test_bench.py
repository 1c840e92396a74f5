"""The suite measures what it says, and says so when a provider is wrong, slow to end, or missing."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from bench import gpu, report
from bench.__main__ import main
from bench.registry import (
    BASE_ROWS,
    OPS,
    PROVIDERS,
    Case,
    Output,
    Provider,
    Reference,
    build,
    errors,
    fp64_reference,
    head_and_rows,
    tile,
    within,
)
from bench.run import PeakMemory, Plan, Row, bf16_products, measure, run, summarise
from bench.suites import SUITES, Figure, Target

TINY = Case(N=48, H=64, V=1003, T=16)
NEEDS = {"trl": "trl", "liger": "liger_kernel"}
# What can run on a CPU with what is installed; "auto" means chunked there, which ignores "rounded".
HERE = [n for n in PROVIDERS if not any(part in n for part in ("triton", "chunked", "reference-", "-rounded"))]
HERE = [n for n in HERE if n not in NEEDS or importlib.util.find_spec(NEEDS[n])] + ["ours-one_pass-rounded"]


def measured(case: Case, providers: list[str], **options) -> dict:
    """One in-process measurement, as the document a run would give."""
    found = measure(case, providers, "cpu", fp64_reference(case, "cpu"), rounds=1, warmup=0, **options)
    plan = Plan("test", {"case": case}, [Row("case", p) for p in providers])
    return summarise(plan, {row: found[row.provider] for row in plan.rows})


def row_of(result: dict, provider: str) -> dict:
    return next(r for r in result["rows"] if r["provider"] == provider)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("op", OPS)
def test_every_provider_agrees_with_fp64(op, dtype):
    names = [n for n in HERE if op in PROVIDERS[n].ops]
    result = measured(replace(TINY, op=op, dtype=dtype), names)
    assert {r["provider"] for r in result["rows"]} == set(names)
    for r in result["rows"]:
        assert r["error"] is None, (r["provider"], r["error"])
        assert not r["wrong"], (r["provider"], r["errors"])
        assert r["both_s"]["median"] == pytest.approx(r["forward_s"]["median"] + r["backward_s"]["median"])
        assert r["gflops"] == pytest.approx(
            (3 if OPS[op].backward else 1) * 2 * 48 * 64 * 1003 / r["both_s"]["median"] / 1e9
        )
        assert r["us_per_token"] > 0
        assert r["scratch_bytes"] <= r["peak_extra_bytes"]
        if not PROVIDERS[r["provider"]].roof:
            wanted = {"dhidden_rel", "dweight_rel", "loss_abs"} if OPS[op].backward else {"logprob_max_abs"}
            assert wanted <= set(r["errors"])
    json.dumps(result)
    assert {"suite", "command", "commit", "date", "device", "versions", "rows", "targets"} <= set(result)
    assert {"cpu", "threads", "cpu_capability"} <= set(result["device"])
    assert result["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("change", [{"zero_rows": 0.5, "beta": 0.0}, {"frozen_head": True}])
def test_every_provider_on_special_batches(change):
    names = [n for n in HERE if "grpo" in PROVIDERS[n].ops and (n != "liger" or "zero_rows" not in change)]
    for r in measured(replace(TINY, **change), names)["rows"]:
        assert r["error"] is None, (r["provider"], r["error"])
        assert not r["wrong"], (r["provider"], r["errors"])
        assert ("dweight_rel" in r["errors"]) == (not PROVIDERS[r["provider"]].roof and "frozen_head" not in change)


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
    ],
    ids=["logprobs off by 0.01", "gradients off by 1 %", "NaN"],
)
def test_a_wrong_provider_is_reported_as_wrong(monkeypatch, setup, telling):
    monkeypatch.setitem(PROVIDERS, "off", Provider("off", setup))
    result = measured(replace(TINY, op="logprobs_fwd_bwd"), ["ours", "off"])
    assert row_of(result, "off")["wrong"]
    limit = row_of(result, "off")["tolerance"][telling.split("_")[0].replace("dhidden", "gradient")]
    assert not row_of(result, "off")["errors"][telling] <= limit
    assert not row_of(result, "ours")["wrong"]
    assert "WRONG" in report.render(result)
    # A wrong result reaches no target, however fast.
    target = Target("fast", 1e9, Figure("case", "off"))
    assert target.judge(result) == {
        "what": "fast",
        "limit": 1e9,
        "value": row_of(result, "off")["both_s"]["median"],
        "holds": False,
        "why": "off on case disagrees with fp64",
    }


def test_a_failing_provider_leaves_the_others(monkeypatch):
    def missing(inputs):
        raise ModuleNotFoundError("No module named 'peer'")

    monkeypatch.setitem(PROVIDERS, "missing", Provider("missing", missing, packages=("no-such-package",)))
    result = measured(TINY, ["missing", "ours-one_pass"])
    assert row_of(result, "missing")["error"] == "ModuleNotFoundError: No module named 'peer'"
    assert row_of(result, "ours-one_pass")["error"] is None
    assert result["versions"]["no-such-package"] is None
    judged = Target("x", 1.0, Figure("case", "ours-one_pass"), Figure("case", "missing")).judge(result)
    assert judged["holds"] is None
    assert "No module named 'peer'" in judged["why"]


def test_reference_and_errors_against_dense_fp64():
    case = replace(TINY, N=96, V=9001)  # two blocks of columns
    weight, hidden, targets = head_and_rows(case, "cpu")
    logp = (hidden.double() @ weight.double().T).log_softmax(1)
    reference = fp64_reference(case, "cpu")
    torch.testing.assert_close(reference.logprobs, logp.gather(1, targets[:, None])[:, 0], rtol=0, atol=1e-11)
    torch.testing.assert_close(reference.entropy, -(logp.exp() * logp).sum(1), rtol=0, atol=1e-11)

    inputs = build(case, "cpu", reference)
    inputs.hidden = inputs.hidden.detach().double().requires_grad_()
    inputs.weight = inputs.weight.detach().double().requires_grad_()
    logprobs = (inputs.hidden @ inputs.weight.T).log_softmax(1).gather(1, inputs.targets[:, None])[:, 0]
    loss = OPS["grpo"].loss(logprobs, inputs)
    loss.backward()
    found = errors(inputs, reference, Output(loss, logprobs))
    assert set(found) == {
        "logprob_max_abs",
        "loss_abs",
        *(f"d{what}_{how}" for what in ("hidden", "weight") for how in ("rel", "max_abs")),
    }
    assert max(found.values()) < 1e-10
    inputs.weight.grad[inputs.targets[0]] *= 1.1
    assert errors(inputs, reference, Output(loss))["dweight_rel"] > 1e-3


def test_inputs_are_peaked_and_flat_and_repeat():
    case = Case(N=2 * BASE_ROWS, H=256, V=8000, zero_rows=0.8, beta=0.0)
    reference = fp64_reference(case, "cpu")
    assert len(reference.logprobs) == BASE_ROWS
    low, high = torch.quantile(reference.entropy, torch.tensor([0.3, 0.95], dtype=torch.float64)).tolist()
    assert low < 0.1
    assert high > 1.5
    inputs = build(case, "cpu", reference)
    assert torch.equal(inputs.hidden[:BASE_ROWS], inputs.hidden[BASE_ROWS:])
    assert (inputs.advantages == 0).sum() == round(0.8 * case.N)
    assert inputs.ref_logprobs is None
    logits = inputs.hidden[:BASE_ROWS].detach() @ inputs.weight.detach().T
    assert 22 < logits.amax(1).median() < 28
    assert logits.amin() < -22
    ratio = (tile(reference.logprobs, case.N) - inputs.old_logprobs).exp()
    clipped = ((ratio - 1).abs() > 0.2).double().mean()
    assert 0.01 < clipped < 0.1
    again = build(case, "cpu", reference)
    assert torch.equal(again.hidden, inputs.hidden)
    assert torch.equal(again.advantages, inputs.advantages)


def test_within():
    tolerance = PROVIDERS["ours"].tolerance["fp32"]
    assert within({}, tolerance)
    assert within({"logprob_max_abs": 1e-5, "dhidden_max_abs": 9.0}, tolerance)
    assert not within({"logprob_max_abs": 1e-3}, tolerance)
    assert not within({"dweight_rel": math.nan}, tolerance)


@pytest.mark.parametrize(
    ("change", "word"),
    [({"op": "dpo"}, "op"), ({"dtype": "int8"}, "dtype"), ({"T": 7}, "T divide N"), ({"V": 0}, "positive")],
)
def test_bad_cases_are_refused(change, word):
    with pytest.raises(ValueError, match=word):
        replace(TINY, **change)


def _result(**rows) -> dict:
    base = {"case": "c", "error": None, "wrong": False, "errors": {}}
    return {"rows": [{**base, "provider": name, **fields} for name, fields in rows.items()]}


@pytest.mark.parametrize(
    ("target", "value", "holds"),
    [
        (Target("", 2.0, Figure("c", "a")), 2.0, True),
        (Target("", 1.9, Figure("c", "a")), 2.0, False),
        (Target("", 0.5, Figure("c", "a"), Figure("c", "b")), 0.5, True),
        (Target("", 0.49, Figure("c", "a"), Figure("c", "b")), 0.5, False),
        (Target("", 1.0, Figure("c", "b", "bytes"), Figure("c", "a", "bytes"), unit=10.0), 0.9, True),
        (Target("", 1.0, Figure("c", "a", "logprob_max_abs")), 1e-6, True),
        (Target("", 1.0, Figure("c", "nobody")), None, None),
        (Target("", 1.0, Figure("c", "a"), Figure("other", "b")), None, None),
        (Target("", 1.0, Figure("c", "b", "logprob_max_abs")), None, None),
        (Target("", 1.0, Figure("c", "failed")), None, None),
    ],
)
def test_targets(target, value, holds):
    result = _result(
        a={"both_s": {"median": 2.0, "p20": 0.0}, "bytes": 1.0, "errors": {"logprob_max_abs": 1e-6}},
        b={"both_s": {"median": 4.0}, "bytes": 10.0},
        failed={"error": "out of memory"},
    )
    judged = target.judge(result)
    assert judged["holds"] is holds
    assert judged["value"] == (None if value is None else pytest.approx(value))
    assert bool(judged["why"]) == (holds is None)


@pytest.mark.parametrize("name", SUITES)
def test_suites_measure_what_their_targets_read(name):
    suite = SUITES[name]()
    known = {(row.case, row.provider) for row in suite.rows}
    if not bf16_products():
        known.add(("bf16", "dense"))  # left out on purpose, and its target reported as not measured
    for row in suite.rows:
        assert suite.cases[row.case].op in PROVIDERS[row.provider].ops
    for target in suite.targets:
        assert target.reads <= known, target
    assert set(suite.cases) == {row.case for row in suite.rows}


def test_ratios_are_of_the_same_run():
    def samples(forward, backward, memory):
        times = {"forward_s": forward, "backward_s": backward, "both_s": forward + backward}
        return {"samples": [{**times, "peak_extra_bytes": memory, "scratch_bytes": memory // 2}]}

    cases = {"a": TINY, "longer": replace(TINY, N=96), "fwd": replace(TINY, op="logprobs_fwd")}
    plan = Plan(
        "test",
        cases,
        [Row("a", "gemm"), Row("a", "dense"), Row("a", "ours"), Row("longer", "ours"), Row("fwd", "ours")],
    )
    figures = [samples(1.0, 2.0, 10), samples(2.0, 4.0, 100), samples(1.0, 3.0, 25), samples(6.0, 6.0, 30)]
    figures.append(samples(2.0, 0.0, 5))
    gemm, _, ours, longer, forward = summarise(plan, dict(zip(plan.rows, figures)))["rows"]
    assert gemm["recompute_s"]["median"] == 4.0
    assert ours["time_to_dense"] == pytest.approx(4 / 6)
    assert ours["memory_to_dense"] == pytest.approx(0.25)
    assert ours["gemm_share"] == pytest.approx(3 / 4)
    assert longer["gemm_share"] == pytest.approx(6 / 12)
    assert longer["time_to_dense"] is None
    assert forward["gemm_share"] == pytest.approx(1 / 2)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_sees_what_was_freed_again():
    with PeakMemory("cpu") as memory:
        torch.ones(64 << 20, dtype=torch.uint8)
    assert memory.extra is not None
    assert 60e6 < memory.extra < 90e6


@pytest.mark.slow
def test_a_run_in_fresh_processes(tmp_path):
    out = tmp_path / "folder" / "result.json"
    plan = Plan(
        "test",
        {"case": TINY},
        [Row("case", "dense", 1), Row("case", "ours-triton-one_pass", 1)],
        out=out,
        targets=[Target("a minute", 60.0, Figure("case", "dense"))],
    )
    result = run(plan)
    assert json.loads(out.read_text()) == result
    dense, triton = result["rows"]
    assert dense["rounds"] == 1
    assert dense["errors"]
    assert dense["entropy_nats"]["p90"] > dense["entropy_nats"]["p10"]
    assert "needs tensors on a GPU" in triton["error"]  # an explicit backend never falls back
    assert result["targets"][0]["holds"] is True


def test_a_disturbed_sample_is_taken_again(monkeypatch):
    def samples(seconds, share):
        times = {"forward_s": seconds, "backward_s": 0.0, "both_s": seconds}
        return [{**times, "cpu_share": share, "peak_extra_bytes": 1, "scratch_bytes": 1}]

    waiting = [samples(9.0, 0.4), samples(5.0, 0.9), samples(0.1, 0.4)]
    monkeypatch.setattr("bench.run._spawn", lambda *arguments: {"dense": {"samples": waiting.pop(0)}})
    (row,) = run(Plan("test", {"case": TINY}, [Row("case", "dense", 2)]))["rows"]
    assert [s["both_s"] for s in row["samples"]] == [5.0, 0.1]
    assert row["samples"][0]["taken_twice"]
    assert not waiting


def test_a_run_past_its_limit_reports_it():
    result = run(Plan("test", {"case": TINY}, [Row("case", "dense")], limit_s=0.0))
    assert result["rows"][0]["error"] == "stopped after 1 s"


@pytest.mark.parametrize(("row", "word"), [(Row("case", "nobody"), "provider"), (Row("nowhere", "dense"), "case")])
def test_unknown_rows_are_refused(row, word):
    with pytest.raises(ValueError, match=f"{word} must be one of"):
        run(Plan("test", {"case": TINY}, [row]))


def test_command_line(capsys):
    assert main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(word in listed for word in [*SUITES, *OPS, *PROVIDERS])
    with pytest.raises(SystemExit, match="no such row"):
        main(["--quick", "--only", "nothing"])


def test_gpu_stages_fit_the_time_and_the_suite(tmp_path, capsys):
    planned = gpu.stages(tmp_path, "cuda", "gpu", tmp_path, None)
    assert sum(stage.limit_s for stage in planned) < gpu.LIMIT_S == 9 * 60
    named = {word for stage in planned for word in stage.command}
    assert set(SUITES["gpu"]().cases) <= named
    assert gpu.main([str(tmp_path), "--dry-run"]) == 0
    assert "pytest -m gpu" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        gpu.main([str(tmp_path), "--wheels", str(tmp_path), "--dry-run"])


@pytest.mark.slow
def test_gpu_stages_survive_each_other(tmp_path):
    python = sys.executable
    real = next(s for s in gpu.stages(tmp_path, "cpu", "gpu-tiny", None, "abc") if s.name == "forward")
    planned = [
        gpu.Stage("fails", [python, "-c", "raise SystemExit(3)"], 5),
        gpu.Stage("hangs", [python, "-c", "import time; time.sleep(600)"], 0, result=tmp_path / "never.json"),
        gpu.Stage("absent", ["/no/such/program"], 1),
        real,
    ]
    # What earlier stages leave over belongs to the later ones, so the hanging one must have nothing left to take.
    planned[0] = replace(planned[0], limit_s=0)
    out = tmp_path / "out"
    result = gpu.carry_out(planned, out, tmp_path, SUITES["gpu-tiny"]().targets)
    assert [s["ended"].split(":")[0] for s in result["stages"]] == [
        "exit status 3",
        "stopped after 1 s",
        "did not start",
        "ok",
    ]
    assert {r["case"] for r in result["rows"]} == {"forward"}
    assert row_of(result, "ours")["error"] is None
    assert result["commit"] == "abc"
    judged = {t["what"]: t["holds"] for t in result["targets"]}
    assert judged["forward only / one bare GEMM"] is not None
    assert judged["one-pass / TRL"] is None
    assert json.loads((out / "summary.json").read_text()) == result
    assert "hangs" in (out / "summary.txt").read_text()
    assert sorted(p.name for p in out.iterdir()) == ["bench.log", "summary.json", "summary.txt"]


def test_reference_is_picklable_by_field(tmp_path):
    reference = fp64_reference(TINY, "cpu")
    torch.save(reference._asdict(), tmp_path / "r.pt")
    assert all(torch.equal(a, b) for a, b in zip(reference, Reference(**torch.load(tmp_path / "r.pt"))))


def test_a_provider_that_breaks_the_device_is_left_out_of_the_next_try(monkeypatch):
    """One process per case: when a provider makes the GPU unusable, the others run again without it."""
    monkeypatch.setattr("bench.run._usable", lambda device: False)

    def broken(inputs):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setitem(PROVIDERS, "broken", Provider("broken", broken))
    tries = []

    def here(plan, scratch, case, providers, rounds, check, until):
        tries.append(list(providers))
        found = measure(case, providers, "cpu", fp64_reference(case, "cpu"), rounds, warmup=0)
        return {
            name: found[name] if found[name]["samples"] else {"error": "stopped", **found[name]} for name in providers
        }

    monkeypatch.setattr("bench.run._spawn", here)
    rows = [Row("case", "ours"), Row("case", "broken"), Row("case", "dense")]
    result = run(Plan("test", {"case": TINY}, rows, together=True))
    assert tries == [["ours", "broken", "dense"], ["ours", "dense"]]
    assert row_of(result, "broken")["error"] == "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert row_of(result, "ours")["error"] is row_of(result, "dense")["error"] is None

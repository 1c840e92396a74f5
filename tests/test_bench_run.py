"""Running: processes, memory limits, suites, targets, the command line and the stages of a GPU machine."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_rlhf.bench import checkout, document, gpu, probe
from fused_rlhf.bench import run as running
from fused_rlhf.bench.cases import Case
from fused_rlhf.bench.command import main
from fused_rlhf.bench.document import bf16_products, summarise
from fused_rlhf.bench.inputs import build, fp64_reference
from fused_rlhf.bench.measure import (
    Clock,
    Compilations,
    PeakMemory,
    Subject,
    host_waits,
    measure,
    take_turns,
    waits_warned_of,
)
from fused_rlhf.bench.ops import OPS
from fused_rlhf.bench.plan import Plan, Row
from fused_rlhf.bench.provider import Provider
from fused_rlhf.bench.registry import PROVIDERS
from fused_rlhf.bench.run import Meter, run
from fused_rlhf.bench.suites import SUITES
from fused_rlhf.bench.targets import Figure, Target

TINY = Case(N=48, H=64, V=1003, T=12)


def row_of(result: dict, provider: str) -> dict:
    return next(r for r in result["rows"] if r["provider"] == provider)


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


@pytest.mark.parametrize(("field", "compared"), [("both_s", False), ("us_per_token", False), ("scratch_bytes", True)])
def test_times_of_two_runs_are_not_compared(field, compared):
    result = _result(a={field: 2.0, "run": "first"}, b={field: 4.0, "run": "second"})
    judged = Target("", 1.0, Figure("c", "a", field), Figure("c", "b", field)).judge(result)
    assert judged["value"] == (0.5 if compared else None)
    assert judged["holds"] is (True if compared else None)
    assert judged["why"] == ("" if compared else "c and c are of two runs, whose times do not compare")
    result["rows"][1]["run"] = "first"
    assert Target("", 1.0, Figure("c", "a", field), Figure("c", "b", field)).judge(result)["value"] == 0.5


def test_a_wrong_result_reaches_no_target():
    result = _result(off={"both_s": {"median": 1.0}, "wrong": True})
    judged = Target("fast", 1e9, Figure("c", "off")).judge(result)
    assert judged["holds"] is False
    assert judged["why"] == "off on c disagrees with fp64"


@pytest.mark.parametrize("name", SUITES)
def test_suites_measure_what_their_targets_read(name):
    suite = SUITES[name]()
    known = {(row.case, row.provider) for row in suite.rows}
    assert len(known) == len(suite.rows)
    if not bf16_products():
        known.add(("bf16", "dense"))  # left out on purpose, and its target reported as not measured
    for row in suite.rows:
        assert PROVIDERS[row.provider].takes(suite.cases[row.case]), row
    for target in suite.targets:
        assert target.reads <= known, target
    assert set(suite.cases) == {row.case for row in suite.rows}


@pytest.mark.parametrize("name", ["quick", "matrix"])
def test_suites_of_everything_have_every_op_and_peer(name):
    suite = SUITES[name]()
    assert {case.op for case in suite.cases.values()} == set(OPS)
    assert {"dense", "torch-lce", "trl", "liger", "ours"} <= {row.provider for row in suite.rows}


def test_the_sampling_suite_at_toy_sizes():
    """Every row is right, and every target is of figures that there are."""
    suite = SUITES["sampling"]()
    assert all((case.N, case.H, case.V, case.dtype) == (2048, 896, 151936, "fp32") for case in suite.cases.values())
    assert {row.rounds for row in suite.rows if row.provider == "ours"} == {3}
    assert suite.groups == (tuple(suite.cases),)  # times compare
    cases = {name: replace(case, N=48, T=12, H=64, V=1003) for name, case in suite.cases.items()}
    plan = Plan("sampling", cases, suite.rows, together=True, groups=suite.groups, targets=suite.targets)
    subjects = {
        name: Subject(
            case, {row.provider: 1 for row in plan.rows if row.case == name}, "cpu", fp64_reference(case, "cpu")
        )
        for name, case in cases.items()
    }
    take_turns(list(subjects.values()))
    result = summarise(plan, {row: subjects[row.case].found[row.provider] for row in plan.rows})
    for row in result["rows"]:
        assert row["error"] is None, row
        assert not row["wrong"], (row["case"], row["provider"], row["errors"])
    assert [target["limit"] for target in result["targets"]] == [0.05, 1.35, 1.10, 64e6]
    assert None not in [target["value"] for target in result["targets"]]


def test_references_are_shared_but_for_what_is_sampled():
    names = {op: running._reference(replace(TINY, op=op)) for op in OPS}
    assert len(set(names.values())) == 4
    assert names["kl"] == names["grpo"]


def test_ratios_are_of_the_same_run():
    def samples(forward, backward, memory):
        times = {"forward_s": forward, "backward_s": backward, "both_s": forward + backward}
        return {"samples": [{**times, "peak_extra_bytes": memory, "scratch_bytes": memory // 2}]}

    cases = {
        "a": TINY,
        "longer": replace(TINY, N=96),
        "fwd": replace(TINY, op="logprobs_fwd"),
        "half": replace(TINY, density=0.5),
        "kl": replace(TINY, op="kl"),
        "kept": replace(TINY, op="kept"),
    }
    figures = {
        Row("a", "gemm"): samples(1.0, 2.0, 10),
        Row("a", "dense"): samples(2.0, 4.0, 100),
        Row("a", "ours"): samples(1.0, 3.0, 25),
        Row("longer", "ours"): samples(6.0, 6.0, 30),
        Row("fwd", "ours"): samples(2.0, 0.0, 5),
        Row("half", "ours"): samples(1.0, 2.0, 5),
        Row("kl", "ours"): samples(4.0, 4.0, 5),
        Row("kept", "ours"): samples(1.0, 1.0, 5),
    }
    rows = summarise(Plan("test", cases, list(figures)), figures)["rows"]
    gemm, _, ours, longer, forward, half, kl, kept = rows
    assert gemm["recompute_s"]["median"] == 4.0
    assert ours["time_to_dense"] == pytest.approx(4 / 6)
    assert ours["memory_to_dense"] == pytest.approx(0.25)
    assert ours["gemm_share"] == pytest.approx(3 / 4)
    assert longer["gemm_share"] == pytest.approx(6 / 12)
    assert longer["time_to_dense"] is None
    assert forward["gemm_share"] == pytest.approx(1 / 2)
    assert half["gemm_share"] == pytest.approx(1.5 / 3)
    assert kl["gemm_share"] == pytest.approx(4 / 8)  # a product per head, then two
    assert kept["gemm_share"] is None
    for row, found in figures.items():
        found["run"] = "first" if row.provider == "ours" else "second"
    apart = row_of(summarise(Plan("test", cases, list(figures)), figures), "ours")
    assert apart["time_to_dense"] is apart["memory_to_dense"] is apart["gemm_share"] is None
    assert ours["predicted_bytes"] > 0
    assert ours["gflops"] == pytest.approx(TINY.flops / 4 / 1e9)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_sees_what_was_freed_again():
    with PeakMemory("cpu") as memory:
        torch.ones(64 << 20, dtype=torch.uint8)
    assert memory.extra is not None
    assert 60e6 < memory.extra < 90e6


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits memory")
def test_a_run_in_fresh_processes(tmp_path, monkeypatch):
    out = tmp_path / "folder" / "result.json"
    plan = Plan(
        "test",
        {"case": TINY, "large": replace(TINY, N=4096, T=4096, V=100003)},
        [Row("case", "dense", 1), Row("case", "ours-triton-one_pass", 1), Row("large", "dense", 1)],
        out=out,
        memory=2e9,
        predict=False,  # the large case is let try, and is refused memory
        targets=[Target("a minute", 60.0, Figure("case", "dense"))],
    )
    result = run(plan)
    assert json.loads(out.read_text()) == result
    dense, triton, large = result["rows"]
    assert dense["rounds"] == 1
    assert dense["errors"]
    assert dense["entropy_nats"]["p90"] > dense["entropy_nats"]["p10"]
    assert "needs tensors on a GPU" in triton["error"]  # an explicit backend never falls back
    assert large["error"].startswith("out of memory: 1.64 GB more")
    assert result["targets"][0]["holds"] is True
    assert {"suite", "command", "commit", "date", "device", "versions", "rows", "targets"} <= set(result)
    assert {"cpu", "threads", "cpu_capability"} <= set(result["device"])
    assert result["versions"]["torch"] == torch.__version__


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_would_not_fit_is_not_started(monkeypatch, capsys):
    monkeypatch.setattr("fused_rlhf.bench.run._call", lambda *arguments: pytest.fail("started a process"))
    huge = replace(TINY, op="dpo", N=65536, T=32768, V=151936)
    (row,) = run(Plan("test", {"case": huge}, [Row("case", "liger")], memory=20e9))["rows"]
    assert row["error"].startswith("not started: needs")
    assert row["predicted_bytes"] > 100e9
    assert "not started" in capsys.readouterr().err


def test_a_disturbed_sample_is_taken_again(monkeypatch):
    def samples(seconds, share):
        times = {"forward_s": seconds, "backward_s": 0.0, "both_s": seconds}
        return [{**times, "cpu_share": share, "peak_extra_bytes": 1, "scratch_bytes": 1}]

    waiting = [samples(9.0, 0.4), samples(5.0, 0.9), samples(0.1, 0.4)]
    monkeypatch.setattr("fused_rlhf.bench.run._spawn", lambda *_: {"case": {"dense": {"samples": waiting.pop(0)}}})
    (row,) = run(Plan("test", {"case": TINY}, [Row("case", "dense", 2)]))["rows"]
    assert [s["both_s"] for s in row["samples"]] == [5.0, 0.1]
    assert row["samples"][0]["taken_twice"]
    assert not waiting


def test_a_run_past_its_limit_says_what_would_reach_the_rest(capsys):
    result = run(Plan("test", {"a case": TINY}, [Row("a case", "dense")], limit_s=0.0))
    assert result["rows"][0]["error"] == "not reached in 0 of 0 s: --limit 10 or --only 'a case/dense'"
    plan = Plan("test", {"case": TINY}, [Row("case", "dense")], limit_s=110.0)
    assert running._not_reached(plan, Meter(), "case/dense").endswith("of 110 s: --limit 300 or --only case/dense")
    assert "1/1 a case dense: not reached in 0 of 0 s" in capsys.readouterr().err


CHILD = """
import json, pathlib, sys, time
def write(importing, samples):
    new = pathlib.Path(sys.argv[1] + ".new")
    new.write_text(json.dumps({"importing": importing, "found": {"case": {"dense": {"samples": samples}}}}))
    new.replace(sys.argv[1])
time.sleep(0.3)
write(True, [])
time.sleep(0.3)
write(False, [1])
time.sleep(600)
"""


@pytest.mark.parametrize("count_imports", [False, True])
def test_the_clock_stands_while_a_process_imports(tmp_path, monkeypatch, count_imports):
    """The process is stopped when its time is up, however long it imported, and what it had is seen."""
    monkeypatch.setattr(running, "command_of", lambda spec: [sys.executable, "-c", CHILD, spec["out"]])
    plan = Plan("test", {"case": TINY}, [Row("case", "dense")])
    meter, seen = Meter(count_imports), list[dict[str, Any]]()
    failed = running._call(plan, {"out": str(tmp_path / "answer.json")}, meter, 0.2, seen.append)
    assert failed == running.OUT_OF_TIME
    assert meter.used >= 0.2
    assert bool(seen and seen[-1] == {"case": {"dense": {"samples": [1]}}}) != count_imports


def test_an_import_that_does_not_end_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "command_of", lambda spec: [sys.executable, "-c", "import time; time.sleep(600)"])
    monkeypatch.setattr(running, "IMPORT_S", 0.1)
    plan = Plan("test", {"case": TINY}, [Row("case", "dense")])
    failed = running._call(plan, {"out": str(tmp_path / "answer.json")}, Meter(), math.inf)
    assert failed == "stopped: its imports took more than 0.1 s"


def test_a_row_is_told_when_it_ends(capsys):
    rows = [Row("case", "dense", 2), Row("case", "ours", 2)]
    progress = running.Progress(Plan("test", {"case": TINY}, rows, together=True))
    sample = {"both_s": 0.5, "peak_extra_bytes": None}
    progress.watch(rows, {"case": {"dense": {"samples": [sample]}}})
    assert capsys.readouterr().err == ""
    for _ in range(2):
        progress.watch(rows, {"case": {"dense": {"samples": [sample] * 2}, "ours": {"samples": [], "error": "no"}}})
    assert [line.partition("] ")[2] for line in capsys.readouterr().err.splitlines()] == [
        "1/2 case dense: 0.5 s",
        "2/2 case ours: no",
    ]


@pytest.mark.parametrize(("in_turn", "order"), [(True, "aabb"), (False, "abab")])
def test_rows_go_in_turn_or_round_by_round(monkeypatch, in_turn, order):
    seen = []

    def provider(name):
        def setup(inputs):
            dense = PROVIDERS["dense"].setup(inputs)
            return lambda: (seen.append(name), dense())[1]

        return Provider(name, setup)

    for name in "ab":
        monkeypatch.setitem(PROVIDERS, name, provider(name))
    measure(TINY, "ab", "cpu", fp64_reference(TINY, "cpu"), rounds=2, warmup=0, in_turn=in_turn)
    assert "".join(seen) == order


def test_cases_of_a_group_take_turns_in_one_process(monkeypatch):
    """Round by round over all their rows; a case with fewer rounds ends earlier."""
    seen = []

    def setup(inputs):
        dense = PROVIDERS["dense"].setup(inputs)
        return lambda: (seen.append(inputs.case.T), dense())[1]

    monkeypatch.setitem(PROVIDERS, "spy", Provider("spy", setup))
    cases = {"a": TINY, "b": replace(TINY, T=24), "c": replace(TINY, T=48)}
    rows = [Row("a", "spy", 2), Row("b", "spy", 3), Row("c", "spy", 1)]
    plan = Plan("test", cases, rows, together=True, groups=[("a", "b")])
    assert plan.processes == [rows[:2], rows[2:]]
    reference = fp64_reference(TINY, "cpu")
    subjects = [Subject(cases[r.case], {"spy": r.rounds}, "cpu", reference, warmup=0) for r in rows[:2]]
    take_turns(subjects)
    assert seen == [12, 24, 12, 24, 24]

    def here(plan, scratch, meter, task, until, watch):
        return {row.case: measure(plan.cases[row.case], ["dense"], "cpu", reference, 1, warmup=0) for row in task.rows}

    monkeypatch.setattr("fused_rlhf.bench.run._spawn", here)
    result = run(replace(plan, rows=[Row(r.case, "dense") for r in rows]))
    a, b, c = (r["run"] for r in result["rows"])
    assert a == b != c


@pytest.mark.slow
def test_a_group_in_a_process_of_its_own():
    """Over references that they share, and do not."""
    cases = {"a": TINY, "b": replace(TINY, beta=0.0, zero_rows=0.5), "c": replace(TINY, H=32, wall=True)}
    rows = [Row(name, provider, 2) for name in cases for provider in ("gemm", "ours")]
    result = run(Plan("test", cases, rows, together=True, groups=[tuple(cases)]))
    assert [r["error"] for r in result["rows"]] == [None] * 6
    assert [r["rounds"] for r in result["rows"]] == [2] * 6
    assert len({r["run"] for r in result["rows"]}) == 1
    assert not any(r["wrong"] for r in result["rows"])


def test_waits_of_the_host_are_counted(monkeypatch):
    def setup(inputs):
        dense = PROVIDERS["dense"].setup(inputs)

        def run():
            for said in ("called a synchronizing CUDA operation (Triggered internally at ...)", "something else"):
                warnings.warn(said, stacklevel=1)
                warnings.warn(said, stacklevel=1)
            return dense()

        return run

    monkeypatch.setitem(PROVIDERS, "waiting", Provider("waiting", setup))
    inputs = build(TINY, "cpu", fp64_reference(TINY, "cpu"))
    assert host_waits("waiting", inputs) == 2
    assert host_waits("dense", inputs) == 0


def test_torch_warns_of_waits_inside_alone(monkeypatch):
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with waits_warned_of("cuda"):
        assert modes == ["warn"]
    assert modes == ["warn", "default"]


def test_a_clock_by_the_wall_waits_for_the_gpu_at_the_end_alone(monkeypatch):
    waited, clock = list[int](), Clock("cuda", wall=True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(len(clock.marks)))
    clock.mark()
    clock.mark()
    clock.last()
    assert waited == [2]
    assert len(clock.spans()) == 2
    assert all(span >= 0 for span in clock.spans())
    assert Clock("cuda").events
    assert not Clock("cpu").events


def test_rounds_before_the_limit_stand(monkeypatch):
    """The second round meets the end of the time: what the first measured is the row's result."""
    rounds: list[bool] = []

    def once(plan, scratch, meter, task, until):
        rounds.append(task.check)
        (row,) = task.rows
        case = plan.cases[row.case]
        if len(rounds) == 1:
            return {row.case: measure(case, [row.provider], "cpu", fp64_reference(case, "cpu"), 1, warmup=0)}
        meter.used = until
        return {row.case: {"dense": {"samples": [], "error": "not reached"}}}

    monkeypatch.setattr("fused_rlhf.bench.run._spawn", once)
    result = run(Plan("test", {"case": TINY}, [Row("case", "dense", rounds=2)], limit_s=2.0))
    (row,) = result["rows"]
    assert len(rounds) == 2
    assert (row["error"], row["rounds"]) == (None, 1)
    assert row["both_s"]["median"] > 0


@pytest.mark.parametrize(("row", "word"), [(Row("case", "nobody"), "provider"), (Row("nowhere", "dense"), "case")])
def test_unknown_rows_are_refused(row, word):
    with pytest.raises(ValueError, match=f"{word} must be one of"):
        run(Plan("test", {"case": TINY}, [row]))


def test_a_provider_that_breaks_the_device_is_left_out_of_the_next_try(monkeypatch):
    """One process per case: when a provider makes the GPU unusable, the others run again without it."""
    monkeypatch.setattr("fused_rlhf.bench.measure._usable", lambda device: False)

    def broken(inputs):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setitem(PROVIDERS, "broken", Provider("broken", broken))
    tries = []

    def here(plan, scratch, meter, task, until, watch):
        tries.append([row.provider for row in task.rows])
        case = plan.cases["case"]
        found = measure(case, tries[-1], "cpu", fp64_reference(case, "cpu"), 1, warmup=0)
        return {
            "case": {
                name: part if (part := found[name])["samples"] else {"error": "stopped", **part} for name in tries[-1]
            }
        }

    monkeypatch.setattr("fused_rlhf.bench.run._spawn", here)
    rows = [Row("case", "ours"), Row("case", "broken"), Row("case", "dense")]
    result = run(Plan("test", {"case": TINY}, rows, together=True))
    assert tries == [["ours", "broken", "dense"], ["ours", "dense"]]
    assert row_of(result, "broken")["error"] == "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert row_of(result, "ours")["error"] is row_of(result, "dense")["error"] is None
    assert row_of(result, "ours")["run"] == row_of(result, "dense")["run"] != row_of(result, "broken")["run"]


def test_a_case_of_fewer_rows_than_warm_up_a_provider():
    case = replace(TINY, N=8, T=8)
    assert len(measure(case, ["dense"], "cpu", fp64_reference(case, "cpu"), rounds=1)["dense"]["samples"]) == 1


def test_new_lengths_are_met_before_the_rounds():
    case = replace(TINY, lengths=3)
    found = measure(case, ["dense", "ours"], "cpu", fp64_reference(case, "cpu"), rounds=2, warmup=0)
    for name in ("dense", "ours"):
        assert len(found[name]["samples"]) == 2
        met = found[name]["lengths"]
        assert (met["count"], met["triton"], met["dynamo"]) == (3, 0, 0)
        assert len(met["both_s"]) == 3


def test_compilations_are_counted():
    def doubled(x):
        return x * 2

    with Compilations() as before:
        doubled(torch.ones(3))
    assert before.dynamo == 0
    with Compilations() as compiled:
        torch.compile(doubled, backend="eager")(torch.ones(3))
    assert compiled.dynamo == 1


def test_command_line(capsys):
    assert main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(word in listed for word in [*SUITES, *OPS, *PROVIDERS, "qwen3-8b"])


def test_one_case_from_the_command_line(monkeypatch, capsys):
    seen = {}

    def fake(plan):
        seen["plan"] = plan
        return {**_result(), "suite": "custom", "device": {"gpu": "x"}, "versions": {}, "notes": []} | {
            "commit": "c",
            "date": "d",
            "command": plan.command,
        }

    monkeypatch.setattr("fused_rlhf.bench.command.run", fake)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    arguments = "--model qwen3-8b --op dpo --N 512 --providers ours trl --dtype bf16 --frozen_head --memory 3"
    assert main(arguments.split()) == 0
    plan = seen["plan"]
    assert plan.cases["case"] == Case(op="dpo", N=512, H=4096, V=151936, dtype="bf16", frozen_head=True)
    assert [row.provider for row in plan.rows] == ["ours", "trl"]
    assert plan.memory == 3e9
    assert main(["--long"]) == 0
    assert seen["plan"].name == "long"
    assert not seen["plan"].predict
    assert main(["--long", "--device", "cuda"]) == 0
    assert seen["plan"].cases["T=64k"].H == 4096


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--providers dense --op orpo", "expected one of dpo, grpo, ids, kept, kl"),
        ("--providers dense --op grop", "got 'grop' (did you mean 'grpo'?)"),
        ("--providers dense --op dpo --T 2048", "dpo needs an even number of sequences"),
        ("--providers dense --zero_rows 0.5", "zero_rows must be 0"),
        ("--providers dense --op dpo --objective cispo", "objective must be one of"),
        ("--providers dense --objective cisop", "got 'cisop' (did you mean 'cispo'?)"),
        ("--providers dense --T 7", "must divide N, got N=2048 and T=7"),
        ("--providers dense --N 0", "N must be at least 1, got 0"),
        ("--providers dense --N many", "--N: expected a whole number, got 'many'"),
        ("--providers dense --beta nan", "--beta: expected a number, got 'nan'"),
        ("--providers dense --beta -1", "beta must be finite and at least 0, got -1.0"),
        ("--providers dense --density 0", "density must be in (0, 1], got 0.0"),
        ("--providers dense --dtype fp16", "dtype must be one of ['bf16', 'fp32', 'tf32'], got 'fp16'"),
        ("--providers dense --model qwen", "expected one of deepseek-v3"),
        ("--providers dense --model qwen3-8b --H 8", "--model qwen3-8b says H and V"),
        ("--providers lige", "got 'lige' (did you mean 'liger'?)"),
        ("--providers liger --op ppo", "liger does not have the case ppo N=2048"),
        ("--providers dense --quick", "--quick: not allowed with argument --providers"),
        ("--op dpo", "--op is of a case of your own, which needs --providers"),
        ("--quik", "no argument '--quik' (did you mean '--quick'?)"),
        ("quick", "no argument 'quick' (did you mean '--quick'?)"),
        ("--suite quik", "got 'quik' (did you mean 'quick'?)"),
        ("--suite quick --long", "not allowed with argument --suite"),
        ("--only dens", "quick has no row 'dens' (did you mean 'dense'?)"),
        ("--only grpo nothing", "quick has no row 'nothing'; expected"),
        ("--device gpu", "; expected one of cpu, cuda"),
        ("--rounds 0", "--rounds: expected a whole number above 0, got '0'"),
        ("--limit soon", "--limit: expected a number above 0, got 'soon'"),
        ("--memory -1", "--memory: expected a number above 0, got '-1'"),
        ("--out {folder}", "--out: expected a file to write, got the folder"),
        ("--out {file}/r.json", "which is a file"),
        ("--plots {file}", "which is a file"),
        ("--compare {folder}/no.json {file}", "No such file"),
        ("--compare {file} {file}", "is no result of the bench: expected JSON"),
        ("--compare {other} {other}", "is no result of the bench: expected rows"),
        ("--compare {empty} {empty}", "no row in common"),
        ("--compare {folder} {folder}", "Is a directory"),
    ],
)
def test_bad_input_is_one_line_and_status_2(monkeypatch, tmp_path, capsys, arguments, words):
    monkeypatch.setattr("fused_rlhf.bench.command.run", lambda plan: pytest.fail("started"))
    conditions = {"commit": "c", "date": "d", "rows": []}
    for name, text in {"file": "text", "other": '{"sides": []}', "empty": json.dumps(conditions)}.items():
        (tmp_path / name).write_text(text)
    paths = {name: tmp_path / name for name in ("file", "other", "empty")}
    assert main(arguments.format(folder=tmp_path, **paths).split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("python -m bench: error: ")
    assert words in error
    assert len(error.splitlines()) == 1


def test_what_a_package_lacks_is_said(monkeypatch, tmp_path, capsys):
    """Installed, the suite has no results to read; and a repository around it is not its own."""
    monkeypatch.setattr(checkout, "__file__", str(tmp_path / "fused_rlhf" / "bench" / "checkout.py"))
    assert document.commit() is None
    assert main(["--readme"]) == 2
    assert "--readme needs a checkout of the repository" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu.main([str(tmp_path), "--dry-run"])
    assert "need a checkout" in capsys.readouterr().err


def test_a_missing_package_is_said_in_a_line(monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "trl.kernels.chunked_logprob", None)
    monkeypatch.setitem(sys.modules, "quack", None)
    case = replace(TINY, op="logprobs_fwd_bwd")
    found = measure(case, ["trl", "quack"], "cpu", fp64_reference(case, "cpu"), rounds=1)
    assert found["trl"]["error"] == "needs trl, which is not installed: pip install 'fused-rlhf[peers]'"
    assert found["quack"]["error"] == "needs quack, which is not installed: pip install quack-kernels"
    assert capfd.readouterr().err == ""


def where(tmp_path, **options) -> gpu.Where:
    return gpu.Where(tmp_path, **{"device": "cpu", "tiny": True, **options})


def test_gpu_stages_fit_the_time_and_the_suite(tmp_path, capsys):
    (tmp_path / "peer.whl").touch()
    planned = gpu.stages(where(tmp_path, wheels=tmp_path))
    in_time = gpu.shared(planned, gpu.LIMIT_S)
    assert sum(stage.limit_s for stage in in_time) == pytest.approx(gpu.LIMIT_S) == 9 * 60
    left_out = {stage.name for stage in planned} - {stage.name for stage in in_time}
    assert left_out == {"precision", "memcheck", "racecheck"}
    assert [stage.name for stage in planned[:3]] == ["install", "main", "tests"]
    measured = [case for stage in planned for case in stage.cases]
    suite = SUITES["gpu"]()
    assert len(measured) == len(set(measured))
    assert set(measured) == set(suite.cases)
    groups = {case: group for group in suite.groups for case in group}
    for stage in planned:
        assert {case for name in stage.cases for case in groups[name]} == set(stage.cases)  # a stage is a run
    assert gpu.main([str(tmp_path), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "pytest -m gpu" in shown
    assert "tests/test_linear_logprobs.py" in shown
    with pytest.raises(SystemExit):
        gpu.main([str(tmp_path), "--wheels", str(tmp_path / "none"), "--dry-run"])


def test_targets_of_a_gpu_are_of_one_run():
    """Each ratio of times is of cases that share a process; and what a run must reach stands there."""
    suite = SUITES["gpu"]()
    groups = {case: group for group in suite.groups for case in group}
    for target in suite.targets:
        if target.figure.timed and target.base is not None:
            assert groups[target.figure.case] == groups[target.base.case], target.what
    limits = {target.what: target.limit for target in suite.targets}
    assert limits["forward only / one bare product"] == 1.06
    assert limits["one-pass / three bare products"] == 1.05
    assert limits["exact KL / its four bare products"] == 1.35
    main = suite.cases["main"]
    assert (main.N, main.H, main.V, main.dtype) == (8192, 4096, 151936, "bf16")
    assert (suite.cases["n128k"].N, suite.cases["n256"].N, suite.cases["h896-16k"].H) == (131072, 256, 896)


def test_a_wheel_that_does_not_fit_leaves_the_others(tmp_path):
    for name in ("absent-1.0-cp27-none-win32.whl", "empty-1.0-py3-none-any.whl"):
        (tmp_path / name).write_bytes(b"")
    assert gpu.run_stage(gpu.install(tmp_path, tmp_path), tmp_path, tmp_path, 600.0) == gpu.Ended("ok")
    said = (tmp_path / "bench.log").read_text()
    assert said.count("does not install here: ") == 3  # the command, and both


def test_gpu_stages_can_be_run_one_by_one(tmp_path, capsys):
    at = where(tmp_path)
    chosen = gpu.chosen(gpu.stages(at), ["tests", "forward", "zero", "tf32"], at)
    assert [(stage.name, stage.cases) for stage in chosen] == [
        ("main", ("forward", "zero")),
        ("tests", ()),
        ("precision", ("tf32",)),
    ]
    assert chosen[0].command[chosen[0].command.index("--only") + 1 :][:3] == ["forward", "zero", "--out"]
    assert sum(stage.limit_s for stage in gpu.shared(chosen, 300.0)) == pytest.approx(300)
    few = gpu.shared(chosen, 130.0)  # the tests no longer fit, what is shorter does
    assert [stage.name for stage in few] == ["main", "precision"]
    assert sum(stage.limit_s for stage in few) == pytest.approx(130)
    assert gpu.main([str(tmp_path), "--only", "main", "small", "--limit", "50", "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("main: left out, it needs 90 s of the 50 s")
    with pytest.raises(SystemExit):
        gpu.main([str(tmp_path), "--only", "small", "--limit", "10"])
    assert "--limit must be at least 40 (s), got 10" in capsys.readouterr().err
    assert gpu.main([str(tmp_path), "--only", "small", "--limit", "50", "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("small (at least 50 s): ")
    with pytest.raises(SystemExit):
        gpu.main([str(tmp_path), "--only", "smal"])
    assert "no stage or case smal; there are main (main, forward, zero, frozen, kl), tests," in capsys.readouterr().err


def test_files_with_gpu_tests_are_found_by_reading_them(tmp_path):
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "test_a.py").write_text("import nothing_like_it, pytest\n\n@pytest.mark.gpu\ndef test(): ...\n")
    (folder / "test_b.py").write_text("import pytest\nD = [pytest.param('cuda', marks=pytest.mark.gpu)]\n")
    (folder / "test_c.py").write_text("import pytest\nTEXT = 'pytest.mark.gpu'\nx = pytest.mark.slow\n")
    (folder / "cases.py").write_text("import pytest\nx = pytest.mark.gpu\n")
    assert gpu.gpu_tests(tmp_path) == ["tests/test_a.py", "tests/test_b.py"]


def collected(options, without=()):
    """Test files with GPU tests as pytest finds them, on a machine that lacks some packages; and what it said."""
    root = Path(__file__).resolve().parent.parent
    options = ["-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider", *options]
    script = f"import sys; sys.modules.update(dict.fromkeys({list(without)})); import pytest; pytest.main({options})"
    env = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    run = subprocess.run([sys.executable, "-c", script], cwd=root, env=env, capture_output=True, text=True)
    said = run.stdout + run.stderr
    return {line.partition("::")[0] for line in said.splitlines() if "::" in line}, said


@pytest.mark.slow
def test_all_tests_that_need_a_gpu_are_in_those_files():
    found, said = collected([])
    assert found == set(gpu.gpu_tests(checkout.needed("this test"))), said


def test_those_files_need_nothing_that_a_bare_machine_lacks():
    files = gpu.gpu_tests(checkout.needed("this test"))
    lacked = (
        "trl",
        "datasets",
        "tyro",
        "peft",
        "accelerate",
        "liger_kernel",
        "matplotlib",
        "hypothesis",
        "transformers",
    )
    found, said = collected(files, lacked)
    assert found == set(files), said
    assert "error" not in said


@pytest.mark.slow
def test_what_a_machine_lacks_is_told_from_what_fails(tmp_path, monkeypatch):
    """A test file whose import fails, a test that fails, one that is skipped; then each kind alone."""
    files = {
        "good": "def test(): pass",
        "absent": "import no_such_package.part",
        "skipped": "import pytest; pytest.importorskip('no_such_thing')",
        "bad": "def test(): assert 0",
        "ours": "from fused_rlhf import no_such_module_of_ours; import fused_rlhf.no_such_module",
    }
    for name, text in files.items():
        (tmp_path / f"test_{name}.py").write_text(text + "\n")

    def ended(*names):
        junit = tmp_path / "tests.xml"
        command = [*gpu.PYTHON, "pytest", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
        paths = [str(tmp_path / f"test_{name}.py") for name in names]
        stage = gpu.Stage("tests", [*command, f"--junitxml={junit}", *paths], 1.0, junit=junit)
        return gpu.run_stage(stage, tmp_path, tmp_path, 600.0)

    assert ended("good", "absent", "skipped") == gpu.Ended("ok", ["no_such_package", "no_such_thing"], {"passed": 1})
    assert ended("absent") == gpu.Ended("missing: no_such_package", ["no_such_package"])
    assert ended("good", "bad", "absent").how == "1 tests failed"
    assert ended("ours").how == "1 tests failed"  # what is ours must not be missing


@pytest.mark.parametrize(
    ("code", "said", "how"),
    [
        (0, "No module named 'trl'", "ok"),
        (1, "Traceback ...\nModuleNotFoundError: No module named 'datasets.load'", "missing: datasets"),
        (1, "/usr/bin/python3: No module named pytest", "missing: pytest"),
        (1, "No module named 'trl'\nRuntimeError: something else", "exit status 1"),
        (1, "ModuleNotFoundError: No module named 'fused_rlhf.bench.gone'", "exit status 1"),
        (-9, "", "exit status -9"),
    ],
)
def test_a_stage_without_a_package_is_missing_it(code, said, how):
    found = gpu.verdict(gpu.Stage("s", [], 1.0), code, said)
    assert found.how == how
    assert found.missing == ([how.removeprefix("missing: ")] if how.startswith("missing") else [])
    assert found.good == (how == "ok" or how.startswith("missing"))


@pytest.mark.parametrize(
    ("rows", "code", "how", "missing"),
    [
        ({"trl": "needs trl, which is not installed: pip install ..."}, 0, "ok", ["trl"]),
        ({"ours": "ModuleNotFoundError: No module named 'triton'", "trl": None}, 1, "missing: triton", ["triton"]),
        (
            {"ours": "needs triton, which is not installed", "trl": "needs trl, which is not installed"},
            1,
            "missing: triton",
            ["triton", "trl"],
        ),
        ({"ours": "RuntimeError: wrong", "trl": "needs trl, which is not installed"}, 1, "exit status 1", ["trl"]),
    ],
)
def test_rows_without_a_package_are_no_failure(tmp_path, rows, code, how, missing):
    result = _result(**{name: {"error": error} for name, error in rows.items()})
    (tmp_path / "r.json").write_text(json.dumps(result))
    found = gpu.verdict(gpu.Stage("s", [], 1.0, result=tmp_path / "r.json"), code, "")
    assert (found.how, found.missing) == (how, missing)


def test_what_is_missing_fails_where_that_is_asked():
    absent = [
        {"ended": "ok", "missing": ["trl"]},
        {"ended": "missing: compute-sanitizer", "missing": ["compute-sanitizer"]},
    ]
    assert not gpu.failed(absent, strict=False)
    assert gpu.failed(absent, strict=True)
    assert not gpu.failed([{"ended": "ok", "missing": []}], strict=True)
    assert gpu.failed([{"ended": "exit status 1", "missing": []}], strict=False)


def test_a_sanitizer_that_is_not_there_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.shutil, "which", lambda *_, **__: None)
    found = gpu.run_stage(gpu.sanitizer("racecheck", "cpu"), tmp_path, tmp_path, 60.0)
    assert found == gpu.Ended("missing: compute-sanitizer", ["compute-sanitizer"])


def test_the_probe_runs_every_op_of_ours(monkeypatch, capsys):
    monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")  # as it does: to be undone
    assert probe.main(["--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert all(f"{op} N=132" in said for op in OPS)
    assert all(f": {name}: ok" in said for name in probe.OURS)

    def broken(inputs):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(PROVIDERS, "ours", replace(PROVIDERS["ours"], setup=broken))
    assert probe.main(["--device", "cpu"]) == 1
    assert "ours: RuntimeError: no such kernel" in capsys.readouterr().out


@pytest.mark.slow
def test_gpu_stages_survive_each_other(tmp_path, monkeypatch):
    python = sys.executable
    at = where(tmp_path, commit="abc")
    (real,) = gpu.chosen(gpu.stages(at), ["forward"], at)
    planned = [
        gpu.Stage("fails", [python, "-c", "raise SystemExit(3)"], 0),
        gpu.Stage("hangs", [python, "-c", "import time; time.sleep(600)"], 0, result=tmp_path / "never.json"),
        gpu.Stage("absent", ["/no/such/program"], 1),
        real,
    ]
    # What earlier stages leave over belongs to the later ones, so the hanging one must have nothing left to take.
    allowed, run_stage = {}, gpu.run_stage

    def patient(stage, out, scratch, timeout_s):  # the others may take their time on a busy machine
        allowed[stage.name] = timeout_s
        return run_stage(stage, out, scratch, timeout_s if stage.name == "hangs" else 3600.0)

    monkeypatch.setattr(gpu, "run_stage", patient)
    out = tmp_path / "out"
    result = gpu.carry_out(planned, out, tmp_path, SUITES["gpu-tiny"]().targets)
    assert [s["ended"] for s in result["stages"]] == ["exit status 3", "stopped after 1 s", "missing: program", "ok"]
    assert allowed["fails"] == allowed["hangs"] == 1.0
    assert 1.0 <= allowed["main"] <= 1.0 + real.limit_s
    assert {r["case"] for r in result["rows"]} == {"forward"}
    assert row_of(result, "ours")["error"] is None
    assert result["commit"] == "abc"
    judged = {t["what"]: t["holds"] for t in result["targets"]}
    assert judged["forward only / one bare product"] is not None
    assert judged["one-pass / TRL"] is None
    assert json.loads((out / "summary.json").read_text()) == result
    assert "hangs" in (out / "summary.txt").read_text()
    assert sorted(p.name for p in out.iterdir()) == ["bench.log", "summary.json", "summary.txt"]


ELSEWHERE = ("cce", "verl", "quack", "liger-flce")  # providers that need a GPU


@pytest.mark.parametrize("group", gpu.BENCHES)
def test_every_row_of_a_gpu_stage_is_right_at_toy_sizes(group):
    pytest.importorskip("trl")
    pytest.importorskip("liger_kernel")
    suite = SUITES["gpu-tiny"]()
    subjects = {}
    for name in gpu.BENCHES[group][1]:
        case = suite.cases[name]
        rounds = {row.provider: 1 for row in suite.rows if row.case == name and not row.provider.startswith(ELSEWHERE)}
        assert {"ours", "ours-one_pass", "ours-lora"} & set(rounds)
        subjects[name] = Subject(case, rounds, "cpu", fp64_reference(case, "cpu"), warmup=0)
    take_turns(list(subjects.values()))
    for name, subject in subjects.items():
        for provider, part in subject.found.items():
            assert "error" not in part, (name, provider, part["error"])
            allowed = PROVIDERS[provider].tolerance[subject.case.dtype].allows(part.get("errors", {}))
            assert allowed or not provider.startswith("ours"), (name, provider, part["errors"])


@pytest.mark.slow
def test_a_trial_run_of_gpu_stages_without_a_gpu(tmp_path, monkeypatch):
    """`make gpu` at toy sizes, a stage of each kind; every test of a GPU is skipped with its reason."""
    monkeypatch.setattr(gpu.shutil, "which", lambda *_, **__: None)
    only = ["tests", "forward", "zero", "n256", "racecheck", "step"]
    assert gpu.main([str(tmp_path), "--device", "cpu", "--tiny", "--limit", "7200", "--only", *only]) == 0
    result = json.loads((tmp_path / "summary.json").read_text())
    assert {stage["stage"]: stage["ended"] for stage in result["stages"]} == {
        "main": "ok",
        "tests": "ok",
        "small": "ok",
        "racecheck": "missing: compute-sanitizer",
        "step": "ok",
    }
    assert set(result["stages"][1]["tests"]) == {"skipped"}
    good = [row for row in result["rows"] if not row["provider"].startswith(ELSEWHERE)]
    assert {row["case"] for row in good} == {"forward", "zero", "n256"}
    assert [row["error"] for row in good] == [None] * len(good)
    runs = {case: {row["run"] for row in good if row["case"] == case} for case in ("forward", "zero", "n256")}
    assert runs["forward"] == runs["zero"] != runs["n256"]
    assert len(runs["forward"]) == len(runs["n256"]) == 1
    judged = {target["what"]: target["holds"] for target in result["targets"]}
    assert set(judged) > {"forward only / one bare product", "forward only / TRL", "N=256 by the clock: ours / dense"}
    assert None not in judged.values()
    assert result["step"]["suite"] == "step"
    assert "times compare within one alone: forward, zero | n256" in (tmp_path / "summary.txt").read_text()

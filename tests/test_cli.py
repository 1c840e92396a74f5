import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fused_rlhf
from fused_rlhf.trainers import cli
from fused_rlhf.trainers import model as models
from tests import forks


def test_the_commands_are_listed(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in cli.COMMANDS)
    assert cli.main(["grp"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "fused-rlhf: error: there is no command 'grp' (did you mean 'grpo'?); commands are grpo, dpo"
    )
    assert len(error.splitlines()) == 1
    assert cli.main([]) == 0


def test_bench_is_the_suite(capsys):
    assert cli.main(["bench", "--list"]) == 0
    assert "suite     quick: " in capsys.readouterr().out
    assert cli.main(["bench", "--quik"]) == 2
    error = (
        "fused-rlhf bench: error: there is no argument '--quik' (did you mean '--quick'?); see fused-rlhf bench --help"
    )
    assert capsys.readouterr().err == error + "\n"


def test_a_dry_run_says_what_would_be_and_writes_nothing(tmp_path, capsys):
    flags = ["--hidden-size", "32", "--num-layers", "1", "--max-operand", "30", "--output", str(tmp_path / "run")]
    assert cli.main(["grpo", *flags, "--dry-run", "--beta", "0.1", "--num-minibatches", "4", "--steps", "3"]) == 0
    out = capsys.readouterr().out
    for text in (
        "957 training and 500 test prompts",
        "16,640 parameters",
        "3, 4 updates each; 12 in all",
        "dense logits",
    ):
        assert text in out, text
    assert "a step          256 sequences of at most 518 tokens" in out
    assert not (tmp_path / "run").exists()
    assert cli.main(["grpo", *flags, "--dry-run", "--max-new-tokens", "1100"]) == 2  # all checks are made


def test_bad_input_is_one_line_and_status_2(tmp_path, capsys):
    for flags, message in (
        (["--task", "gsm8k", "--data", str(tmp_path / "gone")], "gone/train.jsonl"),
        (["--model", str(tmp_path / "gone")], "gone"),
        (["--config", str(tmp_path / "gone.yaml")], "gone.yaml"),
        (["--config"], "--config: expected the path"),
        (["--rewards", "nowhere:f"], "cannot load 'nowhere:f'"),
        (["--backend", "cuda"], "--backend: expected one of ['auto', 'triton', 'chunked', 'reference'], got 'cuda'"),
        (["--backend", "triton"], 'backend="triton" needs'),
        (["--report-to", "notebook"], "--report-to: expected one of"),
        (["--liger-layers"], "--liger-layers: expected false without a GPU"),
        (["--max-new-tokens", "1100"], "exceed the model's context of 1024"),
    ):
        output = tmp_path / "run"
        assert cli.main(["grpo", "--output", str(output), *flags]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1
        assert not output.exists()


def test_the_version_and_the_other_way_to_run(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"fused-rlhf {fused_rlhf.__version__}\n"
    done = subprocess.run(
        [sys.executable, "-m", "fused_rlhf", "grpo", "--stepz"],
        cwd=Path(__file__).resolve().parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == "fused-rlhf: error: there is no flag '--stepz' (did you mean '--steps'?)\n"


@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [("grpo", "transformers", "train"), ("dpo", "tyro", "train"), ("merge", "peft", "train"), ("ppo", "yaml", "train")],
)
def test_a_missing_extra_is_named(monkeypatch, capsys, tmp_path, command, package, extra):
    real = importlib.util.find_spec
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None if name == package else real(name))
    words = [str(tmp_path), "--output", str(tmp_path / "out")] if command == "merge" else ["--help"]
    assert cli.main([command, *words]) == 2
    told = f"fused-rlhf {command} needs {package}: pip install 'fused-rlhf[{extra}]'"
    assert capsys.readouterr().err == f"fused-rlhf: error: {told}\n"


@pytest.mark.parametrize(
    ("package", "flags", "extra"),
    [
        ("datasets", ["--task", "prompts", "--data", "rows.parquet", "--hidden-size", "32"], "train"),
        (
            "liger_kernel.transformers.monkey_patch",
            ["--hidden-size", "32", "--num-layers", "1", "--liger-layers"],
            "liger",
        ),
    ],
)
def test_what_is_needed_later_is_named_too(monkeypatch, capsys, tmp_path, package, flags, extra):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    assert cli.main(["grpo", "--output", "run", *flags]) == 2
    told = f"fused-rlhf grpo needs {package.split('.')[0]}: pip install 'fused-rlhf[{extra}]'"
    assert capsys.readouterr().err == f"fused-rlhf: error: {told}\n"


def test_a_module_that_no_extra_brings_is_a_fault(monkeypatch):
    monkeypatch.setitem(sys.modules, "fused_rlhf.trainers.info", None)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["info"])


def test_whole_gsm8k_questions_with_a_model_folder(tmp_path, capsys):
    rows = [{"question": f"Ann has {i} pens and buys 2.", "answer": f"She has #### {i + 2}"} for i in range(6)]
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, tokenizer = models.build(hidden_size=32, num_layers=1)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    sizes = ["--steps", "2", "--prompts-per-step", "2", "--num-generations", "2", "--max-new-tokens", "4"]
    sizes += ["--beta", "0.01", "--num-iterations", "2"]
    places = ["--data", str(tmp_path), "--model", str(tmp_path / "model"), "--output", str(tmp_path / "run")]
    assert cli.main(["grpo", "--task", "gsm8k", *places, *sizes]) == 0
    assert "after GRPO: accuracy" in capsys.readouterr().out
    assert (tmp_path / "run" / "model" / "config.json").is_file()


def test_a_run_that_has_to_stop_is_one_line_and_status_1(tmp_path, capsys, monkeypatch):
    (tmp_path / "own_reward.py").write_text(
        "calls = []\n"
        "def later(completions, **_):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 3:\n"
        "        raise KeyError('gone')\n"
        "    return [0.0] * len(completions)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    flags = ["--hidden-size", "32", "--num-layers", "1", "--max-operand", "30", "--prompts-per-step", "2"]
    flags += ["--num-generations", "2", "--max-new-tokens", "2", "--steps", "3", "--rewards", "own_reward:later"]
    assert cli.main(["grpo", *flags, "--output", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(
        "fused-rlhf: error: step 2 (prompts 2 to 3 of the shuffled training set): reward 'later' raised"
    )
    assert "step-00000001" in error
    assert cli.main(["grpo", *flags, "--output", str(tmp_path / "run"), "--resume"]) == 0


NEW_OBJECTIVE = '''
from fused_rlhf import objectives


@objectives.surrogate
def triangle(logprob, old, advantage, *, width: float = 1.0):
    """-A max(0, 1 - |r - 1| / width)"""
    return -advantage * (1 - ((logprob - old).exp() - 1).abs() / width).clamp(min=0)


objectives.preset("Triangle", "triangle", "token_mean", width=0.5)

import sys

from fused_rlhf.trainers.cli import main

sys.exit(main())
'''


@pytest.mark.slow
def test_a_new_objective_is_one_function_from_the_command_line_to_the_metrics(tmp_path):
    """Registered before the command line is read, it is among the choices, takes its options, and trains."""
    script = tmp_path / "mine.py"
    script.write_text(NEW_OBJECTIVE)
    flags: dict[str, Any] = {
        "--hidden-size": 16,
        "--num-layers": 1,
        "--max-operand": 30,
        "--steps": 2,
        "--prompts-per-step": 16,
        "--rewards": "length=1",  # which an untrained model meets now and then
    }
    flags |= {"--num-generations": 4, "--max-new-tokens": 2, "--num-iterations": 2, "--learning-rate": 0.01}
    flags |= {"--eval-samples": 4, "--output": tmp_path / "run", "--threads": 1}
    command = [str(script), "grpo", *(str(part) for flag in flags.items() for part in flag)]
    chosen = [*command, "--objective", "triangle", "--objective-options", "width", "0.25"]
    done, refused = tmp_path / "done.log", tmp_path / "refused.log"
    assert forks.start(chosen, tmp_path, {}, done).wait() == 0, done.read_text()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum("live/ratio_mean" in row for row in rows) == 2
    assert forks.start([*command, "--overwrite", "--objective", "square"], tmp_path, {}, refused).wait() == 2
    assert "triangle" in refused.read_text()

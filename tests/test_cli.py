import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from fused_rlhf.trainers import cli, demo
from fused_rlhf.trainers import model as models
from fused_rlhf.trainers.config import to_yaml
from fused_rlhf.trainers.grpo_config import Config
from tests import forks

TRAINERS = [name for name in cli.COMMANDS if name not in ("demo", "bench")]


@pytest.mark.parametrize("command", [*TRAINERS, "demo"])
def test_every_field_is_a_flag_with_its_docstring(capsys, command):
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for field in dataclasses.fields(cli.command(command).default):
        assert "--" + field.name.replace("_", "-") in text, field.name
    assert "The reference is the model with its adapters off." in text
    assert "--config FILE.yaml" in text
    assert "--dry-run builds and checks everything" in text


def test_the_commands_are_listed(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in cli.COMMANDS)
    assert cli.main(["grp"]) == 2
    assert "there is no command 'grp'" in capsys.readouterr().err
    assert cli.main([]) == 0


def test_bench_goes_on_to_the_suite_of_a_checkout(monkeypatch, capsys, tmp_path):
    calls = []
    monkeypatch.setattr(
        cli.subprocess,
        "run",
        lambda args, cwd: calls.append((args[1:], cwd)) or dataclasses.make_dataclass("R", ["returncode"])(3),
    )
    assert cli.main(["bench", "--quick"]) == 3
    assert calls == [(["-m", "bench", "--quick"], Path(cli.__file__).resolve().parent.parent)]
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "trainers" / "cli.py"))
    assert cli.main(["bench"]) == 2
    assert "needs a checkout" in capsys.readouterr().err


def test_flags_override_the_file_and_the_file_the_defaults(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("learning_rate: 1e-4\nsteps: 7\nrewards: [exact_match, numeric_answer]\nmask_truncated: true\n")
    config = cli.parse("grpo", ["--steps", "9", "--config", str(path)])
    assert config == Config(learning_rate=1e-4, steps=9, rewards=("exact_match", "numeric_answer"), mask_truncated=True)
    assert type(config) is Config
    assert cli.parse("demo", [f"--config={path}"]) == dataclasses.replace(
        demo.DEFAULTS, learning_rate=1e-4, steps=7, rewards=("exact_match", "numeric_answer"), mask_truncated=True
    )


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        demo.DEFAULTS,
        Config(reward_weights=(0.5,), rewards=("exact_match",)),
        Config(objective="cispo", objective_options={"ratio_max": 3.0}, delta=None, report_to=("tensorboard",)),
    ],
)
def test_a_saved_configuration_comes_back_as_it_was(tmp_path, config):
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    command = "demo" if isinstance(config, demo.Demo) else "grpo"
    assert cli.parse(command, ["--config", str(tmp_path / "config.yaml")]) == config


def test_options_of_the_objective_are_a_flag():
    config = cli.parse("grpo", ["--objective", "sapo", "--objective-options", "tau_pos", "2", "tau_neg", "2.5"])
    assert config.loss().options == {"tau_pos": 2.0, "tau_neg": 2.5}


@pytest.mark.parametrize("name", cli.RECIPES)
def test_recipes_are_valid(name):
    """Each fits the command in its name, or GRPO."""
    command = next((command for command in TRAINERS if command in name), "grpo")
    assert isinstance(cli.parse(command, ["--config", name]), type(cli.command(command).default))


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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepps: 3", r"unknown keys \['stepps'\]; allowed are \['model'"),
        ("steps: many", r"run\.yaml: steps: expected int, got 'many'"),
        ("task: chess", r"run\.yaml: task: expected .*gsm8k-steps.*, got 'chess'"),
        ("num_generations: 1", "num_generations: expected at least 2"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, capsys, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        cli.parse("grpo", ["--config", str(path)])
    assert cli.main(["grpo", "--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fused-rlhf: error: ")
    assert "Traceback" not in error


def test_bad_input_is_one_line_and_status_2(tmp_path, capsys):
    for flags, message in (
        (["--task", "gsm8k", "--data", str(tmp_path / "gone")], "gone/train.jsonl"),
        (["--model", str(tmp_path / "gone")], "gone"),
        (["--config", str(tmp_path / "gone.yaml")], "gone.yaml"),
        (["--config"], "--config: expected the path"),
        (["--rewards", "nowhere:f"], "cannot load 'nowhere:f'"),
        (["--backend", "cuda"], "backend"),
        (["--report-to", "notebook"], "report_to: expected one of"),
        (["--liger-layers"], "liger_layers: expected false without a GPU"),
        (["--max-new-tokens", "1100"], "exceed the model's context of 1024"),
    ):
        output = tmp_path / "run"
        assert cli.main(["grpo", "--output", str(output), *flags]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1
        assert not output.exists()
    with pytest.raises(SystemExit) as end:
        cli.main(["grpo", "--num-generations", "1"])
    assert end.value.code == 2
    assert "num_generations: expected at least 2" in capsys.readouterr().err


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
        "--prompts-per-step": 4,
    }
    flags |= {"--num-generations": 4, "--max-new-tokens": 2, "--num-iterations": 2, "--learning-rate": 0.01}
    flags |= {"--eval-samples": 4, "--output": tmp_path / "run", "--threads": 1}
    command = [str(script), "grpo", *(str(part) for flag in flags.items() for part in flag)]
    chosen = [*command, "--objective", "triangle", "--objective-options", "width", "0.25"]
    done, refused = tmp_path / "done.log", tmp_path / "refused.log"
    assert forks.start(chosen, tmp_path, {}, done).wait() == 0, done.read_text()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum("ratio_mean" in row for row in rows) == 2
    assert forks.start([*command, "--overwrite", "--objective", "square"], tmp_path, {}, refused).wait() == 2
    assert "triangle" in refused.read_text()

import dataclasses
import json

import pytest

from fused_rlhf.trainers import cli, demo
from fused_rlhf.trainers import model as models
from fused_rlhf.trainers.grpo_config import Config
from fused_rlhf.trainers.loop import to_yaml


def test_every_field_is_a_flag_with_its_docstring(capsys):
    for command in ("grpo", "demo"):
        with pytest.raises(SystemExit) as end:
            cli.main([command, "--help"])
        assert end.value.code == 0
        text = capsys.readouterr().out
        for field in dataclasses.fields(Config):
            assert "--" + field.name.replace("_", "-") in text, field.name
        assert "Completions of each prompt: the group." in text.replace("\n", " ")
        assert "--config FILE.yaml" in text


def test_flags_override_the_file_and_the_file_the_defaults(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("learning_rate: 1e-4\nsteps: 7\nrewards: [exact_match, numeric_answer]\nmask_truncated: true\n")
    config = cli.parse(["grpo", "--steps", "9", "--config", str(path)])
    assert config == Config(learning_rate=1e-4, steps=9, rewards=("exact_match", "numeric_answer"), mask_truncated=True)
    assert type(config) is Config
    assert cli.parse([f"--config={path}", "demo"]) == dataclasses.replace(
        demo.DEFAULTS, learning_rate=1e-4, steps=7, rewards=("exact_match", "numeric_answer"), mask_truncated=True
    )


@pytest.mark.parametrize("config", [Config(), demo.DEFAULTS, Config(reward_weights=(0.5,), rewards=("exact_match",))])
def test_a_saved_configuration_comes_back_as_it_was(tmp_path, config):
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    command = "demo" if isinstance(config, demo.Demo) else "grpo"
    assert cli.parse([command, "--config", str(tmp_path / "config.yaml")]) == config


@pytest.mark.parametrize("name", cli.RECIPES)
def test_recipes_are_valid(name):
    assert isinstance(cli.parse(["grpo", "--config", name]), Config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepps: 3", r"unknown keys \['stepps'\]; allowed are \['task'"),
        ("steps: many", r"run\.yaml: steps: expected int, got 'many'"),
        ("task: chess", r"run\.yaml: task: expected .*gsm8k-steps.*, got 'chess'"),
        ("num_generations: 1", "num_generations: expected at least 2"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, capsys, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        cli.parse(["grpo", "--config", str(path)])
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
        (["--max-new-tokens", "300"], "exceed the model's context of 256"),
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

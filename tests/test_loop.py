import json
import math

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from fused_rlhf.trainers import loop
from fused_rlhf.trainers import model as models
from fused_rlhf.trainers.grpo_config import Config
from fused_rlhf.trainers.loop import Run


@pytest.fixture(scope="module")
def pair():
    return models.build(hidden_size=32, num_layers=1)


def test_metrics_are_strict_json_lines_even_for_nan(tmp_path):
    run = Run(tmp_path / "run", Config())
    for step in run.steps(2, "test"):
        run.log("grpo", step, {"reward": 0.5, "kl": math.nan, "grad_norm": math.inf}, show=("reward", "kl"))
    rows = [json.loads(line, parse_constant=pytest.fail) for line in run.metrics_path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0] | {"seconds": 0} == {
        "phase": "grpo", "step": 1, "seconds": 0, "reward": 0.5, "kl": None, "grad_norm": None
    }  # fmt: skip
    assert rows == run.metrics


def test_the_effective_configuration_lies_beside_the_run(tmp_path):
    config = Config(learning_rate=3e-5, rewards=("exact_match",))
    run = Run(tmp_path / "run", config)
    values = yaml.safe_load((run.folder / "config.yaml").read_text())
    assert Config(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}) == config


def test_a_run_is_not_overwritten_unasked(tmp_path):
    run = Run(tmp_path, Config())
    run.log("grpo", 1, {"reward": 1.0})
    with pytest.raises(FileExistsError, match="already holds a run"):
        Run(tmp_path, Config())
    assert run.metrics_path.read_text()
    Run(tmp_path, Config(), overwrite=True)
    assert not run.metrics_path.read_text()


def test_save_replaces_the_checkpoint_as_a_whole(tmp_path, pair, monkeypatch):
    model, tokenizer = pair
    run = Run(tmp_path, Config())
    run.save(model, tokenizer)
    (run.model_path / "stale").write_text("")
    run.save(model, tokenizer)
    assert not (run.model_path / "stale").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.yaml",
        "metrics.jsonl",
        "model",
        "samples.jsonl",
    ]

    def die(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(tokenizer, "save_pretrained", die)
    with pytest.raises(OSError, match="disk full"):
        run.save(model, tokenizer)
    monkeypatch.undo()
    AutoModelForCausalLM.from_pretrained(run.model_path, local_files_only=True)
    AutoTokenizer.from_pretrained(run.model_path, local_files_only=True)


def test_samples_are_saved_and_printed(tmp_path, capsys):
    run = Run(tmp_path, Config())
    run.samples(3, [{"prompt": "1+1=", "completion": str(i)} for i in range(5)], show=2)
    rows = [json.loads(line) for line in run.samples_path.read_text().splitlines()]
    assert rows[4] == {"step": 3, "prompt": "1+1=", "completion": "4"}
    assert capsys.readouterr().out.count("prompt='1+1='") == 2


def test_curves_are_a_picture_of_what_was_logged(tmp_path):
    run = Run(tmp_path, Config())
    run.plot(["reward"])
    assert not run.curves_path.exists()
    for step in range(3):
        run.log("grpo", step, {"reward": float(step), "kl": math.nan})
    run.plot(["reward", "kl", "never"])
    assert run.curves_path.read_bytes().startswith(b"\x89PNG")


def test_read_yaml_refuses_what_is_not_a_configuration(tmp_path):
    path = tmp_path / "run.yaml"
    with pytest.raises(FileNotFoundError, match=r"no file .*run\.yaml"):
        loop.read_yaml(path, Config)
    path.write_text("learning_rte: 1\nsteps: 3\n")
    with pytest.raises(ValueError, match=r"unknown keys \['learning_rte'\]; allowed are \['task', .*'learning_rate'"):
        loop.read_yaml(path, Config)
    path.write_text("- steps\n")
    with pytest.raises(ValueError, match="must hold a mapping"):
        loop.read_yaml(path, Config)
    path.write_text("steps: [1\n")
    with pytest.raises(ValueError, match="is not YAML"):
        loop.read_yaml(path, Config)
    path.write_text("")
    assert loop.read_yaml(path, Config) == {}

import json
import math

import pytest
import yaml
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from fused_rlhf.trainers import checkpoint, engine
from fused_rlhf.trainers import model as models
from fused_rlhf.trainers.checkpoint import CheckpointError
from fused_rlhf.trainers.config import TrainConfig
from fused_rlhf.trainers.run import Run
from tests import tiny


def opened(tmp_path, **changes):
    own, _ = tiny.build(tmp_path, **changes)
    run = Run(own)
    run.open()
    return run


def test_metrics_are_strict_json_lines_even_for_nan(tmp_path):
    run = opened(tmp_path)
    for step in run.steps(2, "test"):
        run.log("grpo", step, {"reward": 0.5, "kl": math.nan, "grad_norm": math.inf}, show=("reward", "kl"))
    rows = [json.loads(line, parse_constant=pytest.fail) for line in run.metrics_path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0] | {"seconds": 0} == {
        "phase": "grpo", "step": 1, "seconds": 0, "reward": 0.5, "kl": None, "grad_norm": None
    }  # fmt: skip
    assert rows == run.metrics


def test_samples_are_written_whatever_their_texts_hold(tmp_path):
    run = opened(tmp_path)
    run.samples(1, [{"prompt": "é\ud83d", "answer": b"x"}])
    (line,) = run.samples_path.read_text(encoding="utf-8").splitlines()
    assert json.loads(line) == {"step": 1, "prompt": "é\ud83d", "answer": "b'x'"}


def test_the_effective_configuration_lies_beside_the_run(tmp_path):
    opened(tmp_path, learning_rate=3e-5)
    run = opened(tmp_path, learning_rate=3e-5, resume=True)
    values = yaml.safe_load(run.config_path.read_text())
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    assert TrainConfig(**values) == tiny.config(tmp_path, learning_rate=3e-5)  # to be started afresh from there


def test_a_run_is_not_overwritten_unasked(tmp_path):
    run = opened(tmp_path)
    run.log("grpo", 1, {"reward": 1.0})
    checkpoint.save(run.checkpoints, 1, run.engine, {}, 1)
    with pytest.raises(FileExistsError, match="already holds a run; choose another, --resume it, or --overwrite it"):
        opened(tmp_path)
    assert run.metrics_path.read_text()
    left = [run.folder / name for name in ("model", "model.old")]
    for folder in left:
        folder.mkdir()
    run.curves_path.write_bytes(b"")
    opened(tmp_path, overwrite=True)
    assert not any(path.exists() for path in (*left, run.curves_path))
    assert not run.metrics_path.read_text()
    assert not run.checkpoints.exists()


def test_a_model_replaces_the_one_before_as_a_whole(tmp_path, monkeypatch):
    own, loaded = tiny.build(tmp_path)
    run = Run(own)
    run.open()

    def export(folder):
        models.save(own, loaded, folder)

    run.save_model(export, {"accuracy": 0.25})
    (run.model_path / "stale").write_text("")
    run.save_model(export, {"accuracy": 0.25})
    assert not (run.model_path / "stale").exists()
    names = ["checkpoints", "config.yaml", "metrics.jsonl", "model", "samples.jsonl"]
    assert sorted(path.name for path in run.folder.iterdir()) == names[1:]
    assert "| accuracy | 0.25 |" in (run.model_path / "README.md").read_text()

    def die(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(loaded.tokenizer, "save_pretrained", die)
    with pytest.raises(CheckpointError, match=r"the model cannot be written to .*: disk full"):
        run.save_model(export, {})
    monkeypatch.undo()
    assert not (run.folder / "model.new").exists()
    AutoModelForCausalLM.from_pretrained(run.model_path, local_files_only=True)
    AutoTokenizer.from_pretrained(run.model_path, local_files_only=True)


def test_samples_are_saved_and_printed(tmp_path, capsys):
    run = opened(tmp_path)
    run.samples(3, [{"prompt": "1+1=", "completion": str(i)} for i in range(5)], show=2)
    rows = [json.loads(line) for line in run.samples_path.read_text().splitlines()]
    assert rows[4] == {"step": 3, "prompt": "1+1=", "completion": "4"}
    assert capsys.readouterr().out.count("prompt='1+1='") == 2
    run.samples(4, [{"prompt": "1+1=", "step": "mine"}])
    assert json.loads(run.samples_path.read_text().splitlines()[-1])["step"] == 4


@pytest.mark.curves
def test_curves_are_a_picture_of_what_was_logged(tmp_path):
    run = opened(tmp_path)
    run.plot(["reward"])
    assert not run.curves_path.exists()
    for step in range(3):
        run.log("grpo", step, {"reward": float(step), "kl": math.nan})
    run.plot(["reward", "kl", "never"])
    assert run.curves_path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.curves
def test_the_report_is_of_what_lies_in_the_folder(tmp_path):
    run = opened(tmp_path, learning_rate=3e-5)
    run.warn("nothing scored", 2, "")
    for step in range(3):
        run.log("grpo", step, {"reward": float(step), "kl": math.nan})
    run.samples(2, [{"prompt": "é\ud83d", "completion": "<b>"}])
    run.report("GRPO", "2 steps done", ["reward", "kl"], {"accuracy": 0.5}, {}, ["a line"])
    page = run.report_path.read_text(encoding="utf-8")
    changed = "<th>learning_rate</th><td><pre>3e-05</pre>"
    for part in (str(run.folder), "2 steps done", "a line", "<svg", "<pre>&lt;b&gt;</pre>", "é\\ud83d", changed):
        assert part in page
    assert "<li>nothing scored</li>" in page
    opened(tmp_path, overwrite=True)
    assert not run.report_path.exists()


def test_samples_are_printed_for_a_reader(tmp_path, capsys):
    run = opened(tmp_path)
    long = {"solution": "x" * 900, "step": "mine", "prompt": [{"role": "user", "content": "1+1=\n?"}], "reward": 1 / 3}
    run.samples(3, [{"source": "a", "completion": "2", "prompt": "1+1="}, long])
    assert [list(json.loads(line)) for line in run.samples_path.read_text().splitlines()] == [
        ["step", "prompt", "completion", "source"],
        ["step", "prompt", "reward", "solution"],
    ]
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "    prompt='1+1='  completion='2'  source='a'"
    assert out[2:] == [
        "    prompt    user: 1+1=",
        "              ?",
        "    reward    0.3333",
        f"    solution  {'x' * 800} ...",
    ]


def test_trackers_are_known_and_installed(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"report_to: expected one of .*tensorboard.*; got 'notebook'"):
        opened(tmp_path, report_to=("notebook",))
    monkeypatch.setattr(engine, "get_available_trackers", lambda: [])
    with pytest.raises(ValueError, match=r"whose package is installed \(pip install tensorboard\); got 'tensorboard'"):
        opened(tmp_path, report_to=("tensorboard",))
    assert not (tmp_path / "run").exists()


def test_metrics_reach_the_trackers(tmp_path, monkeypatch):
    run = opened(tmp_path)
    logged = []
    run.config = tiny.config(tmp_path, report_to=("tensorboard",))
    monkeypatch.setattr(run.engine.accelerator, "log", lambda values, step: logged.append((values, step)))
    run.log("grpo", 4, {"reward": 0.5})
    assert logged == [({"grpo/reward": 0.5}, 4)]


def test_what_is_no_run_is_left_alone(tmp_path):
    """A folder that holds a model, but no run."""
    tiny.saved_model(tmp_path / "run" / "model")
    run = opened(tmp_path, overwrite=True)
    assert (run.model_path / "config.json").exists()
    for name in ("model", "data"):
        inside = {"hidden_size": 128, "num_layers": 4, name: str(tmp_path / "run" / "model")}
        with pytest.raises(ValueError, match=rf"{name}: expected a path outside of .*model, which the run replaces"):
            Run(Placeless(tiny.config(tmp_path, overwrite=True, **inside)))  # type: ignore[arg-type]


class Placeless:
    rank = 0

    def __init__(self, config):
        self.config = config

    def agree(self, error):
        if error is not None:
            raise error


def test_there_must_be_a_run_to_resume_and_room_for_a_folder(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"resume: '.*run' holds no run to go on from"):
        opened(tmp_path, resume=True)
    (tmp_path / "run").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no run to go on from"):
        opened(tmp_path, resume=True)
    (tmp_path / "file").write_text("")
    for output in ("file", "file/run", "file/more/run"):
        with pytest.raises(NotADirectoryError, match=r"output: .* cannot be a folder, for '.*file' is a file"):
            opened(tmp_path, output=str(tmp_path / output))
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(PermissionError, match=r"output: .* cannot be written"):
        opened(tmp_path, output=str(tmp_path / "new"))


def test_a_file_that_cannot_be_written_is_named_with_the_last_checkpoint(tmp_path):
    run = opened(tmp_path)
    checkpoint.save(run.checkpoints, 1, run.engine, run.progress(), 1)
    for path in (run.metrics_path, run.samples_path):
        path.unlink()
        path.mkdir()
    for write in (lambda: run.log("grpo", 1, {}), lambda: run.samples(1, [{"prompt": "1"}])):
        with pytest.raises(
            CheckpointError, match=r"jsonl cannot be written: .*; the last checkpoint is .*step-00000001"
        ):
            write()

    def full(folder):
        folder.mkdir()
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with pytest.raises(CheckpointError, match=r"the model cannot be written to .*: I/O error: No space left"):
        run.save_model(full, {})
    assert not (run.folder / "model.new").exists()


def test_steps_of_trackers_never_fall(tmp_path, monkeypatch):
    run = opened(tmp_path)
    steps: list[int] = []
    run.config = tiny.config(tmp_path, report_to=("tensorboard",))
    monkeypatch.setattr(run.engine.accelerator, "log", lambda values, step: steps.append(step))
    for phase, step in (*(("warmup", i) for i in range(1, 6)), *(("grpo", i) for i in range(4)), ("grpo", 3)):
        run.log(phase, step, {"loss": 0.0})
    assert steps == [1, 2, 3, 4, 5, 5, 6, 7, 8, 8]

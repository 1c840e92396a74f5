import json
import math

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from fused_rlhf.trainers import checkpoint, engine, loop
from fused_rlhf.trainers import model as models
from fused_rlhf.trainers.checkpoint import CheckpointError
from fused_rlhf.trainers.config import TrainConfig
from fused_rlhf.trainers.engine import NonFiniteLoss
from fused_rlhf.trainers.loop import Run, Verbs
from fused_rlhf.trainers.rewards import RewardError
from tests import tiny
from tests.launch import without_seconds
from tests.test_engine import COUNT, IDS


def opened(tmp_path, **changes):
    own, _ = tiny.build(tmp_path, **changes)
    run = Run(own)
    run.open()
    return run


class Counter:
    def __init__(self):
        self.value = 0

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


def trainer(tmp_path, broken=None, warm=False, **changes):
    """A run whose steps take the data in order, add noise from torch's generator, and count in a controller."""
    own, loaded = tiny.build(tmp_path, **({"steps": 6, "save_steps": 2, "learning_rate": 1e-2} | changes))
    counter = Counter()

    def loss(model, ids, count):
        share, metrics = tiny.logprob_loss(model, ids, count)
        return share * (1 + torch.rand(())), metrics

    def step(i):
        if broken is not None:
            broken(i, own)
        counter.value += i
        metrics = own.update(loss, [(IDS[i % 3 : i % 3 + 2], COUNT)])
        return metrics | {"counter": counter.value}

    run = Run(own)
    verbs = Verbs(
        name="Test",
        step=step,
        evaluate=lambda: {"norm": sum(p.norm().item() for p in own.module.parameters())},
        export=lambda folder: models.save(own, loaded, folder),
        shown=("loss",),
        plotted=("loss", "norm"),
        describe=lambda metrics: f"norm {metrics['norm']:.4f}",
        batch=lambda i: f"rows from {i % 3}",
        warm=(lambda: own.apart(1e-2, lambda _: 1.0).update(loss, [(IDS, COUNT)])) if warm else None,
        controllers={"counter": counter},
    )
    return run, verbs


def weights(run):
    return (run.model_path / "model.safetensors").read_bytes()


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


def test_the_effective_configuration_lies_beside_the_run(tmp_path):
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
    opened(tmp_path, overwrite=True)
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


def test_curves_are_a_picture_of_what_was_logged(tmp_path):
    run = opened(tmp_path)
    run.plot(["reward"])
    assert not run.curves_path.exists()
    for step in range(3):
        run.log("grpo", step, {"reward": float(step), "kl": math.nan})
    run.plot(["reward", "kl", "never"])
    assert run.curves_path.read_bytes().startswith(b"\x89PNG")


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


@pytest.mark.parametrize(("died", "warm"), [(0, False), (1, False), (2, True), (5, False), (0, True)])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, died, warm):
    whole, verbs = trainer(tmp_path / "whole", warm=warm, eval_steps=3)
    want = loop.fit(whole, verbs)

    class Killed(BaseException):  # like SIGKILL: nothing of ours gets to handle it
        pass

    def kill(i, own):
        if i == died + 1:
            raise Killed

    run, verbs = trainer(tmp_path / "part", kill, warm=warm, eval_steps=3)
    with pytest.raises(Killed):
        loop.fit(run, verbs)
    torch.manual_seed(99)
    run, verbs = trainer(tmp_path / "part", warm=warm, eval_steps=3, resume=True)
    got = loop.fit(run, verbs)
    assert without_seconds(got.metrics) == without_seconds(want.metrics)
    assert (got.before, got.after) == (want.before, want.after)
    assert weights(run) == weights(whole)
    rows = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    assert rows == got.metrics
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)


def test_a_finished_run_goes_on_for_more_steps_only(tmp_path, capsys):
    first = loop.fit(*trainer(tmp_path))
    again = loop.fit(*trainer(tmp_path, resume=True))
    assert again.metrics == first.metrics
    assert "resumed from" in capsys.readouterr().out
    more = loop.fit(*trainer(tmp_path, resume=True, steps=8))
    assert [row["step"] for row in more.metrics] == [0, *range(1, 7), 6, 7, 8, 8]
    with pytest.raises(ValueError, match=r"resume, learning_rate: expected 0\.01 as in .*config\.yaml; got 0\.5"):
        trainer(tmp_path, resume=True, learning_rate=0.5)


def test_a_loss_that_is_not_finite_stops_the_run_at_the_last_good_checkpoint(tmp_path):
    def poison(i, own):
        if i == 4:
            with torch.no_grad():
                own.module.model.norm.weight.mul_(math.nan)

    run, verbs = trainer(tmp_path, poison)
    message = r"step 4 \(rows from 1\): the loss is nan in micro-batch 1 of process 0; the last checkpoint is .*00002"
    with pytest.raises(NonFiniteLoss, match=message):
        loop.fit(run, verbs)
    assert len(run.metrics_path.read_text().splitlines()) == 4
    run, verbs = trainer(tmp_path, resume=True)
    assert all(math.isfinite(row["loss"]) for row in loop.fit(run, verbs).metrics[1:-1])


def test_an_error_of_a_reward_leaves_the_step_before_it(tmp_path):
    def breaks(i, own):
        if i == 4:
            raise RewardError("reward 'f' raised KeyError: 'gold'; at prompt '1+1='")

    whole, verbs = trainer(tmp_path / "whole")
    want = loop.fit(whole, verbs)
    run, verbs = trainer(tmp_path / "part", breaks)
    with pytest.raises(RewardError, match=r"step 4 \(rows from 1\): reward 'f' raised .*checkpoint is .*step-00000003"):
        loop.fit(run, verbs)
    run, verbs = trainer(tmp_path / "part", resume=True)
    assert without_seconds(loop.fit(run, verbs).metrics) == without_seconds(want.metrics)
    assert weights(run) == weights(whole)


def test_a_full_disk_stops_the_run_with_the_checkpoint_before(tmp_path, monkeypatch):
    real, calls = checkpoint._write, []

    def full(path, state):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(path, state)

    monkeypatch.setattr(checkpoint, "_write", full)
    run, verbs = trainer(tmp_path)
    with pytest.raises(CheckpointError, match=r"step-00000004 cannot be written.*No space left.*is .*step-00000002"):
        loop.fit(run, verbs)
    monkeypatch.undo()
    whole, verbs = trainer(tmp_path / "whole")
    want = loop.fit(whole, verbs)
    run, verbs = trainer(tmp_path, resume=True)
    assert without_seconds(loop.fit(run, verbs).metrics) == without_seconds(want.metrics)

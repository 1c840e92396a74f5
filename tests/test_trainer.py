import json
import math
import os
import signal
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import fused_rlhf as fr
from fused_rlhf.objectives import PolicyLoss
from fused_rlhf.trainers import checkpoint, trainer
from fused_rlhf.trainers import model as models
from fused_rlhf.trainers.checkpoint import CheckpointError
from fused_rlhf.trainers.engine import NonFiniteLoss
from fused_rlhf.trainers.planning import Workload
from fused_rlhf.trainers.rewards import RewardError
from fused_rlhf.trainers.run import Run
from fused_rlhf.trainers.trainer import Trainer, fit, mode_of, place, plan
from tests import tiny
from tests.launch import without_seconds
from tests.tiny import COUNT, IDS


@pytest.fixture(autouse=True)
def heeds_ctrl_c():
    """A process that a script started in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Counter:
    def __init__(self):
        self.value = 0

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


def noisy(model, ids, count):
    share, metrics = tiny.logprob_loss(model, ids, count)
    return share * (1 + torch.rand(())), metrics


@dataclass(kw_only=True)
class Toy(Trainer):
    """Its steps take the data in order, add noise from torch's generator, and count in a controller."""

    broken: Callable[[int, Any], None] | None
    counter: Counter = field(default_factory=Counter)

    name = "Test"
    shown = ("loss",)
    plotted = ("loss", "norm")

    def objective(self):
        return PolicyLoss()

    def supervise(self):
        self.engine.apart(1e-2, lambda _: 1.0).update(noisy, [(IDS, COUNT)])

    def controllers(self):
        return super().controllers() | {"counter": self.counter}

    def step(self, number):
        if self.broken is not None:
            self.broken(number, self.engine)
        metrics = self.engine.update(noisy, [(IDS[number % 3 : number % 3 + 2], COUNT)])
        self.counter.value += number
        return metrics | {"counter": self.counter.value}

    def evaluate(self):
        return {"norm": sum(p.norm().item() for p in self.engine.module.parameters())}

    def describe(self, metrics):
        return f"norm {metrics['norm']:.4f}"


WORK = Workload("rows", 2, train=6, test=1, note="of integers", sequences=2, length=9, updates=1)


def toy(tmp_path, broken=None, warm=False, reference=None, **changes):
    own, loaded = tiny.build(
        tmp_path, **({"steps": 6, "save_steps": 2, "learning_rate": 1e-2, "warmup_steps": int(warm)} | changes)
    )
    return Toy(
        config=own.config,
        loaded=loaded,
        engine=own,
        reference=None if reference is None else own.frozen(reference),
        workload=WORK,
        run=Run(own),
        broken=broken,
    )


def weights(trainer):
    return (trainer.run.model_path / "model.safetensors").read_bytes()


@pytest.mark.parametrize("objective", [fr.GRPO(), fr.GSPO(), fr.GRPO(entropy_coef=0.1), fr.DPO()])
@pytest.mark.parametrize("trained", [False, True])
def test_the_mode_that_is_said_is_one_that_serves(objective, trained):
    """`check_mode` refuses "one_pass" where it does not."""
    hidden, weight = torch.randn(4, 8), torch.randn(11, 8, requires_grad=trained)
    call: dict[str, Any] = {
        "hidden": hidden,
        "weight": weight,
        "targets": torch.arange(4),
        "cu_seqlens": torch.tensor([0, 2, 4]),
    }
    call |= {"objective": objective, "mode": "one_pass"}
    policy = isinstance(objective, PolicyLoss)
    call |= {"advantages": torch.ones(2)} if policy else {"ref_logprobs": torch.zeros(4)}
    serves = mode_of(objective, trained, hidden.dtype) == "one_pass"
    with nullcontext() if serves else pytest.raises(ValueError, match="mode='one_pass' needs an objective"):
        (fr.linear_policy_loss if policy else fr.linear_preference_loss)(**call)
    assert mode_of(objective, trained, torch.float16) == "two_phase"


def test_a_run_says_what_it_is_made_of_and_its_plan_says_so_before(tmp_path, capsys):
    own = toy(tmp_path, steps=1)
    assert "data            6 training and 1 test rows; of integers" in plan(own)
    assert "steps           1, 1 updates each; 1 in all" in plan(own)
    assert not own.run.folder.exists()
    result = fit(own)
    out = capsys.readouterr().out
    count = own.loaded.model.num_parameters()
    assert f"{count:,} parameters; 6 training and 1 test rows\nbackend chunked on cpu, float32; head" in out
    assert "; mode one_pass; padded rows, whose prompts and padding skip the head\nof integers\nbefore Test:" in out
    assert "after Test: norm" in out
    assert [row["phase"] for row in result.metrics] == ["test"] * 3


def other_model(seed):
    torch.manual_seed(seed)
    return models.build(32, 1)[0]


def test_the_reference_is_the_model_that_the_warm_up_leaves_and_comes_back_from_a_checkpoint(tmp_path):
    own = toy(tmp_path, warm=True, reference=other_model(1))
    fit(own)
    kept = [p.clone() for p in own.reference.module.parameters()]
    trained = own.loaded.model.parameters()
    assert not any(torch.equal(a, b) for a, b in zip(kept, trained, strict=True) if a.dim() > 1)
    again = toy(tmp_path, warm=True, reference=other_model(2), resume=True)
    fit(again)
    assert all(torch.equal(a, b) for a, b in zip(kept, again.reference.module.parameters(), strict=True))


def test_another_model_stays_the_reference_and_out_of_checkpoints(tmp_path):
    for warm, own_reference in ((True, False), (False, True)):
        own = toy(tmp_path, warm=warm, reference=other_model(1), overwrite=True)
        own.own_reference = own_reference
        assert own.controllers() == {"counter": own.counter}
        assert own.warm() is warm
        want = other_model(1).parameters()
        assert all(torch.equal(a, b) for a, b in zip(want, own.reference.module.parameters(), strict=True))


def test_what_the_reference_is_asked(tmp_path):
    other = other_model(1)
    own = toy(tmp_path, reference=other)
    assert own.by_reference(lambda model, *args: (model, args), 1, 2) == (other, (1, 2))
    own.reference = None
    assert own.by_reference(lambda model: model) is own.loaded.model


def test_means_over_updates_keep_the_last_learning_rate():
    updates = [{"loss": 1.0, "learning_rate": 0.5}, {"loss": 2.0, "learning_rate": 0.25}]
    assert trainer.means(updates) == {"loss": 1.5, "learning_rate": 0.25}


def test_a_warm_up_that_processes_cannot_share_is_refused_before_the_run(tmp_path):
    _, loaded = tiny.build(tmp_path)

    class Two:
        num_processes = 2

    with pytest.raises(ValueError, match="warmup_batch_size: expected a multiple of 2, the processes; got 5"):
        place(tiny.config(tmp_path, warmup_steps=1, warmup_batch_size=5), Two(), loaded, WORK, None)


@pytest.mark.parametrize(("died", "warm"), [(0, False), (1, False), (2, True), (5, False), (0, True)])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, died, warm):
    whole = toy(tmp_path / "whole", warm=warm, eval_steps=3)
    want = fit(whole)

    class Killed(BaseException):  # like SIGKILL: nothing of ours gets to handle it
        pass

    def kill(i, its):
        if i == died + 1:
            raise Killed

    own = toy(tmp_path / "part", kill, warm=warm, eval_steps=3)
    with pytest.raises(Killed):
        fit(own)
    torch.manual_seed(99)
    own = toy(tmp_path / "part", warm=warm, eval_steps=3, resume=True)
    got = fit(own)
    assert without_seconds(got.metrics) == without_seconds(want.metrics)
    assert (got.before, got.after) == (want.before, want.after)
    assert weights(own) == weights(whole)
    rows = [json.loads(line) for line in own.run.metrics_path.read_text().splitlines()]
    assert rows == got.metrics
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)


def test_a_finished_run_goes_on_for_more_steps_only(tmp_path, capsys):
    first = fit(toy(tmp_path))
    again = fit(toy(tmp_path, resume=True))
    assert again.metrics == first.metrics
    assert "resumed from" in capsys.readouterr().out
    more = fit(toy(tmp_path, resume=True, steps=8))
    assert [row["step"] for row in more.metrics] == [0, *range(1, 7), 6, 7, 8, 8]
    with pytest.raises(ValueError, match=r"resume, learning_rate: expected 0\.01 as in .*config\.yaml; got 0\.5"):
        toy(tmp_path, resume=True, learning_rate=0.5)


def test_a_loss_that_is_not_finite_stops_the_run_at_the_last_good_checkpoint(tmp_path):
    def poison(i, its):
        if i == 4:
            with torch.no_grad():
                its.module.model.norm.weight.mul_(math.nan)

    own = toy(tmp_path, poison)
    where = r"step 4 \(rows 6 to 7 of the shuffled training set\)"
    message = rf"{where}: the loss is nan in micro-batch 1 of process 0; the last checkpoint is .*00002"
    with pytest.raises(NonFiniteLoss, match=message):
        fit(own)
    assert len(own.run.metrics_path.read_text().splitlines()) == 4
    own = toy(tmp_path, resume=True)
    assert all(math.isfinite(row["loss"]) for row in fit(own).metrics[1:-1])


def test_an_error_of_a_reward_leaves_the_step_before_it(tmp_path):
    def breaks(i, its):
        if i == 4:
            raise RewardError("reward 'f' raised KeyError: 'gold'; at prompt '1+1='")

    whole = toy(tmp_path / "whole")
    want = fit(whole)
    own = toy(tmp_path / "part", breaks)
    with pytest.raises(
        RewardError,
        match=r"step 4 \(rows 6 to 7 of the shuffled training set\): reward 'f' raised .*checkpoint is .*step-00000003",
    ):
        fit(own)
    assert "stopped in step 4 of 6: reward &#39;f&#39; raised KeyError" in own.run.report_path.read_text()
    own = toy(tmp_path / "part", resume=True)
    assert without_seconds(fit(own).metrics) == without_seconds(want.metrics)
    assert weights(own) == weights(whole)


def test_a_full_disk_stops_the_run_with_the_checkpoint_before(tmp_path, monkeypatch):
    real, calls = checkpoint._write, []

    def full(path, state):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(path, state)

    monkeypatch.setattr(checkpoint, "_write", full)
    own = toy(tmp_path)
    with pytest.raises(CheckpointError, match=r"step-00000004 cannot be written.*No space left.*is .*step-00000002"):
        fit(own)
    monkeypatch.undo()
    whole = toy(tmp_path / "whole")
    want = fit(whole)
    own = toy(tmp_path, resume=True)
    assert without_seconds(fit(own).metrics) == without_seconds(want.metrics)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_run_that_goes_on_for_longer_follows_the_longer_schedule(tmp_path, schedule):
    options = {"lr_schedule": schedule, "learning_rate": 1e-2}
    rates = [row["learning_rate"] for row in fit(toy(tmp_path / "whole", steps=8, **options)).metrics[1:-1]]
    fit(toy(tmp_path, steps=4, **options))
    rows = fit(toy(tmp_path, steps=8, resume=True, **options)).metrics
    assert [row["learning_rate"] for row in rows if row["step"] > 4 and "learning_rate" in row] == rates[4:]
    with pytest.raises(ValueError, match=r"resume, steps: expected at least 8, those taken by .*step-00000008; got 6"):
        toy(tmp_path, steps=6, resume=True, **options)


def test_a_run_goes_on_with_the_data_it_began_with_only(tmp_path):
    own = toy(tmp_path, steps=2)
    own.run.data = "of before"
    fit(own)
    with pytest.raises(ValueError, match=r"resume, data: expected the samples that .*step-00000002 has learned from"):
        Run(
            own.engine.__class__(
                tiny.config(tmp_path, resume=True, steps=2, save_steps=2, learning_rate=1e-2),
                own.engine.accelerator,
                own.loaded.model,
                1,
            ),
            "edited",
        )


@pytest.mark.parametrize(("when", "saved"), [("begin", 2), ("update", 2), ("between", 3), ("evaluation", 3)])
def test_ctrl_c_leaves_a_checkpoint_of_whole_steps(tmp_path, monkeypatch, capsys, when, saved):
    """Before a step's update it is abandoned; from then on it is finished first."""
    whole = toy(tmp_path / "whole", eval_steps=3)
    want = fit(whole)

    def press():
        os.kill(os.getpid(), signal.SIGINT)

    own = toy(tmp_path / "part", eval_steps=3, save_steps=0)
    step, evaluate, update = own.step, own.evaluate, own.engine.optimizer.step

    def pressed(number):
        if number == 3 and when == "begin":
            torch.rand(1)
            press()
        if number == 3 and when == "update":
            monkeypatch.setattr(own.engine, "_clip", press)
        if number == 3 and when == "between":
            monkeypatch.setattr(own.engine.optimizer, "step", lambda: (press(), update()))
        return step(number)

    def evaluated():
        if when == "evaluation" and own.engine.updates == 3:
            press()
        return evaluate()

    monkeypatch.setattr(own, "step", pressed)
    monkeypatch.setattr(own, "evaluate", evaluated)
    with pytest.raises(KeyboardInterrupt):
        fit(own)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    out = capsys.readouterr().out
    assert f"--resume goes on from {own.run.checkpoints / f'step-0000000{saved}'}" in out
    assert f"interrupted after step {saved} of 6; " in own.run.report_path.read_text()
    assert not (own.run.folder / "model.new").exists()
    again = toy(tmp_path / "part", eval_steps=3, resume=True)
    assert without_seconds(fit(again).metrics) == without_seconds(want.metrics)
    assert weights(again) == weights(whole)


def test_a_second_ctrl_c_stops_at_once_and_a_third_does_not_spoil_what_is_saved(tmp_path, monkeypatch, capsys):
    own = toy(tmp_path)
    update, save = own.engine.optimizer.step, models.save

    def press(number, its):
        if number == 4:
            monkeypatch.setattr(own.engine.optimizer, "step", twice)

    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        update()
        os.kill(os.getpid(), signal.SIGINT)

    def saved(*arguments, **more):
        os.kill(os.getpid(), signal.SIGINT)
        save(*arguments, **more)

    own.broken = press
    monkeypatch.setattr(models, "save", lambda *a, **more: (saved if own.engine.stepping else save)(*a, **more))
    with pytest.raises(KeyboardInterrupt):
        fit(own)
    captured = capsys.readouterr()
    assert "the run stops after this step; Ctrl-C again to lose it" in captured.err
    assert "step-00000002" in captured.out
    assert sorted(path.name for path in own.run.folder.iterdir() if "model" in path.name) == ["model"]
    assert (own.run.model_path / "README.md").exists()


def test_a_run_ends_with_a_report(tmp_path):
    own = toy(tmp_path, steps=2)
    result = fit(own)
    page = own.run.report_path.read_text()
    assert "<title>Test: " in page
    assert "2 steps done; " in page
    assert "<div>of integers</div>" in page
    assert f'<td class="number">{result.before["norm"]:.4g}</td>' in page
    assert f'<td class="number">{result.after["norm"]:.4g}</td>' in page


def test_weights_that_will_not_change_are_warned_of(tmp_path, capsys):
    fit(toy(tmp_path, steps=1, dtype="bfloat16", learning_rate=1e-6))
    assert "of bfloat16, are too coarse for a step of learning_rate=1e-06" in capsys.readouterr().out
    fit(toy(tmp_path, steps=1, learning_rate=1e-6, overwrite=True))
    assert "warning" not in capsys.readouterr().out

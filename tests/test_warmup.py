from typing import Any

import pytest
import torch

from fused_rlhf.trainers import warmup
from fused_rlhf.trainers.data import Task
from fused_rlhf.trainers.rollout_config import RolloutConfig
from fused_rlhf.trainers.run import Run
from tests import tiny

SAMPLES: list[dict[str, Any]] = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "9*9=", "answer": 81}]


def test_encode_marks_the_answer_and_its_eos(tmp_path):
    _, loaded = tiny.build(tmp_path)
    got, decode = warmup.encode(loaded, SAMPLES), loaded.tokenizer.decode
    assert got.input_ids.shape == got.attention_mask.shape == got.completion_mask.shape == (2, 7)
    assert decode(got.input_ids[0]) == "1+1=2<eos><pad>"
    assert decode(got.input_ids[1][got.completion_mask[1]]) == "81<eos>"
    assert decode(got.input_ids[0][got.completion_mask[0]]) == "2<eos>"
    assert torch.equal(got.attention_mask, torch.arange(7) < torch.tensor([[6], [7]]))


def test_the_loss_is_the_mean_over_answer_tokens(tmp_path):
    _, loaded = tiny.build(tmp_path)
    some = warmup.encode(loaded, SAMPLES)
    loss, _ = warmup.answer_loss(loaded.model, some, some.completion_mask.sum(), "auto", True)
    labels = torch.where(some.completion_mask, some.input_ids, -100)
    want = loaded.model(some.input_ids, some.attention_mask.long(), labels=labels).loss
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)


def test_it_ends_when_told_and_in_micro_batches_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(warmup, "correct", lambda *_: torch.tensor([0.9, 1.0]))
    losses = []
    for size in (256, 1):
        options: dict[str, Any] = {"warmup_steps": 60, "warmup_batch_size": 2, "warmup_learning_rate": 1e-2}
        options["micro_batch_size"] = size
        own, loaded = tiny.build(tmp_path, **options, overwrite=True)
        run = Run(own)
        run.open()
        config = RolloutConfig(**options, warmup_accuracy=0.9)
        warmup.on_answers(run, loaded, Task(SAMPLES, [], "exact_match"), config)
        assert [row["step"] for row in run.metrics] == list(range(1, 26))  # the first time that it evaluates
        assert run.metrics[-1]["accuracy"] == pytest.approx(0.95)
        losses.append([row["loss"] for row in run.metrics])
        assert own.updates == 0
    assert losses[0][-1] < 0.5 * losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("decay", [False, True])
def test_the_learning_rate_rises_over_a_quarter_and_falls_where_it_is_to(tmp_path, monkeypatch, decay):
    own, _ = tiny.build(tmp_path, warmup_steps=8, warmup_learning_rate=1.0)
    run = Run(own)
    run.open()
    asked: list[int] = []
    rates: list[float] = []

    class Apart:
        def __init__(self, learning_rate, shape):
            self.rate = lambda update: learning_rate * shape(update)

        def update(self, loss, pieces):
            rates.append(self.rate(len(rates)))
            return {"loss": 0.0}

    monkeypatch.setattr(run.engine, "apart", Apart)
    warmup.supervise(run, tiny.logprob_loss, lambda step: asked.append(step) or [], decay=decay)
    assert asked == list(range(1, 9))
    want = [0.5] + [1.0] * 7
    assert rates == [min(rate, 1 - update / 8) if decay else rate for update, rate in enumerate(want)]

import dataclasses
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fused_rlhf as fr
from fused_rlhf.trainers import grpo
from fused_rlhf.trainers.data import Task
from fused_rlhf.trainers.grpo import Config

SEVEN = [{"prompt": f"{i}=", "answer": "7"} for i in range(20)]
TASK = Task(SEVEN, SEVEN, "exact_match")


def small(tmp_path, **changes):
    options = {
        "hidden_size": 32,
        "num_layers": 1,
        "steps": 3,
        "prompts_per_step": 4,
        "num_generations": 6,
        "max_new_tokens": 3,
        "learning_rate": 5e-3,
        "output": str(tmp_path / "run"),
        "sample_steps": 0,
        "eval_steps": 0,
        "save_steps": 0,
    }
    return Config(**(options | changes))


def two_digits(completions, **_):
    """Dense enough that an untrained model meets it: the share of digits in a completion of two characters."""
    return [sum(c.isdigit() for c in text) / 2 if len(text) == 2 else 0.0 for text in completions]


def test_the_reward_rises_and_so_does_the_accuracy(tmp_path):
    config = small(
        tmp_path, steps=40, prompts_per_step=8, num_generations=16, max_new_tokens=1, num_iterations=2, beta=1e-3
    )
    result = grpo.train(config, task=TASK)
    rewards = [row["reward"] for row in result.metrics if "reward" in row]
    assert sum(rewards[:5]) / 5 < 0.1
    assert sum(rewards[-5:]) / 5 > 0.9
    assert result.before["accuracy"] < 0.1
    assert result.after["accuracy"] > 0.9
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows == result.metrics
    assert [row["step"] for row in rows] == [0, *range(1, 41), 40]
    assert {"loss", "kl", "entropy", "grad_norm", "clip_ratio/region_mean", "completion_length"} <= set(rows[1])
    assert rows[1]["kl"] < 0.02 < 1 < rows[40]["kl"]  # from the model the steps began with, and away from it


def test_the_warm_up_teaches_the_answers_and_ends_when_told(tmp_path):
    config = small(
        tmp_path, warmup_steps=200, warmup_accuracy=0.9, warmup_learning_rate=1e-2, warmup_batch_size=16, steps=0
    )
    result = grpo.train(config, task=TASK)
    warm = [row for row in result.metrics if row["phase"] == "warmup"]
    assert warm[0]["loss"] == pytest.approx(math.log(100), abs=0.5)  # the mean over tokens of an untrained model
    assert warm[-1]["accuracy"] >= 0.9
    assert len(warm) < 200
    assert result.before["accuracy"] >= 0.9


def test_what_a_run_leaves_and_that_it_can_be_loaded(tmp_path, capsys):
    config = small(tmp_path, sample_steps=1, eval_steps=2, save_steps=2)
    result = grpo.train(config, task=TASK, reward_functions=[two_digits])
    names = {"config.yaml", "curves.png", "metrics.jsonl", "model", "samples.jsonl"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == names
    model = AutoModelForCausalLM.from_pretrained(result.model_path, local_files_only=True)
    AutoTokenizer.from_pretrained(result.model_path, local_files_only=True)
    assert sum(p.numel() for p in model.parameters()) > 0
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 3 * 24
    assert set(samples[0]) == {"step", "prompt", "answer", "completion", "reward"}
    out = capsys.readouterr().out
    assert "completion=" in out
    assert "before GRPO: accuracy" in out

    again = grpo.train(
        dataclasses.replace(
            config, model=str(result.model_path), hidden_size=128, num_layers=4, output=str(tmp_path / "b")
        ),
        task=TASK,
    )
    assert again.before == result.after


def test_ctrl_c_leaves_a_checkpoint_that_loads(tmp_path, capsys):
    calls = 0

    def interrupted(completions, **_):
        nonlocal calls
        calls += 1
        if calls == 4:  # once before training, then in the third rollout
            raise KeyboardInterrupt
        return two_digits(completions)

    config = small(tmp_path, steps=50)
    with pytest.raises(KeyboardInterrupt):
        grpo.train(config, task=TASK, reward_functions=[interrupted])
    folder = tmp_path / "run" / "model"
    assert f"interrupted; the model as it is now lies in {folder}" in capsys.readouterr().out
    trained = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    AutoTokenizer.from_pretrained(folder, local_files_only=True)
    untrained = grpo.prepare(dataclasses.replace(config, output=str(tmp_path / "fresh")), task=TASK).model
    assert any((a != b).any() for a, b in zip(trained.parameters(), untrained.parameters(), strict=True))
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.fixture
def state(tmp_path):
    config = small(tmp_path, num_iterations=2, num_minibatches=2, micro_batch_size=5, beta=0.1, temperature=0.7)
    state = grpo.prepare(config, task=TASK, reward_functions=[two_digits])
    torch.manual_seed(1)
    state.reference = grpo.models.build(32, 1)[0].eval()
    return state


def test_on_policy_the_ratio_is_exactly_one(state):
    batch = grpo.collect(state, SEVEN[:4])
    for mini in grpo.minibatches(state.config, 24):
        for rows in grpo.slices(mini, 5):
            _, metrics = grpo.policy_loss(state, batch, rows, 12, torch.tensor(1))
            assert metrics["ratio"].item() == 1.0
    grpo.update(state, batch)
    _, metrics = grpo.policy_loss(state, batch, slice(0, 5), 12, torch.tensor(1))
    assert metrics["ratio"].item() != 1.0


def test_the_loss_is_the_formula_and_micro_batches_leave_it_alone(state):
    batch = grpo.collect(state, SEVEN[:4])
    batch = dataclasses.replace(batch, old_logprobs=batch.old_logprobs + 0.3 * torch.randn_like(batch.old_logprobs))
    some, beta, low, high = batch.completions, 0.1, 0.8, 1.2
    num_tokens = some.completion_mask.sum()

    model = state.model.double()
    logits = model(some.input_ids, some.attention_mask.long()).logits[:, :-1].double() / 0.7
    logprobs = logits.log_softmax(-1).gather(2, some.input_ids[:, 1:, None])[..., 0]
    ratio = (logprobs - batch.old_logprobs.double()).exp()
    advantages = batch.advantages.double()[:, None]
    kl = (batch.ref_logprobs.double() - logprobs).exp() - (batch.ref_logprobs.double() - logprobs) - 1
    per_token = -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages) + beta * kl
    mask = some.completion_mask[:, 1:].double()
    want = ((per_token * mask).sum(1) / mask.sum(1)).mean()
    want_grad = torch.autograd.grad(want, model.lm_head.weight)[0]

    model.float()
    for size in (24, 5):
        pieces = [grpo.policy_loss(state, batch, rows, 24, num_tokens)[0] for rows in grpo.slices(slice(0, 24), size)]
        grad = torch.autograd.grad(sum(pieces), model.lm_head.weight)[0]
        torch.testing.assert_close(sum(pieces).double(), want, atol=0, rtol=1e-5)
        torch.testing.assert_close(grad.double(), want_grad, atol=1e-6, rtol=1e-4)


def test_groups_lie_together_and_get_their_own_advantages(state):
    batch = grpo.collect(state, SEVEN[:4])
    assert [sample["prompt"] for sample in batch.samples] == [s["prompt"] for s in SEVEN[:4] for _ in range(6)]
    assert batch.rewards.tolist() == two_digits(batch.completions.texts)
    groups = batch.rewards.view(4, 6)
    want = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(batch.advantages.view(4, 6), want)


def test_a_single_update_needs_no_old_logprobs_and_beta_zero_no_reference(tmp_path):
    state = grpo.prepare(small(tmp_path), task=TASK, reward_functions=[two_digits])
    batch = grpo.collect(state, SEVEN[:4])
    assert batch.old_logprobs is None
    assert batch.ref_logprobs is None


def test_truncated_completions_can_be_left_out(tmp_path):
    state = grpo.prepare(
        small(tmp_path, mask_truncated=True, max_new_tokens=2), task=TASK, reward_functions=[two_digits]
    )
    completions = grpo.collect(state, SEVEN[:4]).completions
    assert completions.truncated.any()
    assert not completions.completion_mask[completions.truncated].any()


@pytest.mark.parametrize("objective", ["dr_grpo", "dapo"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_other_objectives_and_bf16_run_with_a_reference(tmp_path, objective, precision):
    config = small(tmp_path, objective=objective, mixed_precision=precision, beta=0.01, num_iterations=2, steps=2)
    result = grpo.train(config, task=TASK, reward_functions=[two_digits])
    assert all(math.isfinite(row["loss"]) for row in result.metrics if "loss" in row)
    assert result.metrics[1]["kl"] < 0.1


def test_several_weighted_rewards(tmp_path):
    config = small(tmp_path, rewards=("exact_match", "numeric_answer"), reward_weights=(2.0, 0.5), steps=1)
    result = grpo.train(config, task=TASK)
    row = result.metrics[1]
    assert row["reward"] == pytest.approx(2 * row["rewards/exact_match"] + 0.5 * row["rewards/numeric_answer"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_generations": 1}, "num_generations: expected at least 2"),
        ({"temperature": 0.0}, "temperature: expected more than 0"),
        ({"steps": -1}, "steps: expected at least 0"),
        ({"num_minibatches": 5}, r"num_minibatches: expected a divisor of .* = 24; got 5"),
        ({"reward_weights": (1.0,)}, "reward_weights: expected one for each"),
        ({"warmup_accuracy": 0.5}, r"warmup_steps: expected at least 1 when warmup_accuracy is given \(0.5\)"),
        ({"warmup_accuracy": 1.5, "warmup_steps": 1}, "warmup_accuracy: expected above 0 and at most 1"),
        ({"data": "x"}, "data: expected none for the task 'arithmetic'"),
        ({"task": "gsm8k"}, "data: expected where the task 'gsm8k' is read from; got None"),
        ({"task": "chess"}, "task: expected one of"),
        ({"chat_template": True}, "chat_template: expected false"),
        ({"model": "some/model"}, "hidden_size, num_layers: expected left alone with model='some/model'"),
        ({"beta": -0.1}, "beta"),
        ({"epsilon_low": math.nan}, "epsilon_low"),
        ({"learning_rate": math.nan}, "learning_rate: expected more than 0; got nan"),
    ],
)
def test_contradictory_options_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        small(tmp_path, **changes)


def test_bad_input_is_refused_before_anything_is_written(tmp_path):
    config = small(tmp_path)
    with pytest.raises(ValueError, match="train data set is empty"):
        grpo.train(config, task=Task([], SEVEN, "exact_match"))
    with pytest.raises(ValueError, match=r"train sample 0: missing \['answer'\]"):
        grpo.train(config, task=Task([{"prompt": "1"}], SEVEN, "exact_match"))
    with pytest.raises(ValueError, match="'<lambda>' returned 1 values for 2 completions"):
        grpo.train(config, task=TASK, reward_functions=[lambda completions, **_: [0.0]])
    with pytest.raises(ValueError, match="raised KeyError: 'gold'"):
        grpo.train(config, task=TASK, reward_functions=[lambda completions, **columns: columns["gold"]])
    with pytest.raises(ValueError, match="reward_weights: expected one per reward"):
        grpo.train(
            dataclasses.replace(config, rewards=("exact_match",), reward_weights=(1.0,)),
            task=TASK,
            reward_functions=[two_digits, two_digits],
        )
    long = [{"prompt": "1" * 254, "answer": "1"}]
    with pytest.raises(ValueError, match="exceed the model's context of 256"):
        grpo.train(config, task=Task(long, SEVEN, "exact_match"))
    with pytest.raises(FileNotFoundError, match="gone"):
        grpo.train(small(tmp_path, model=str(tmp_path / "gone"), hidden_size=128, num_layers=4), task=TASK)
    with pytest.raises(ValueError, match="model, tokenizer: expected both or neither"):
        grpo.train(config, task=TASK, model=fr)
    assert not (tmp_path / "run").exists()


def test_a_reward_that_breaks_later_is_named_too(tmp_path):
    def breaks(completions, **_):
        return [0.0] * (len(completions) if len(completions) == 2 else 1)

    with pytest.raises(ValueError, match="'breaks' returned 1 values for 24 completions"):
        grpo.train(small(tmp_path), task=TASK, reward_functions=[breaks])

import dataclasses
import functools
import json
import math
from typing import Any
from unittest import mock

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fused_rlhf as fr
from fused_rlhf import advantages
from fused_rlhf.objectives import PRESETS
from fused_rlhf.objectives.reductions import combine
from fused_rlhf.trainers import attention, checkpoint, grpo, grpo_rollout
from fused_rlhf.trainers.data import Task
from fused_rlhf.trainers.grpo import Config
from fused_rlhf.trainers.minibatches import Turn, chunks, forwards
from fused_rlhf.trainers.rewards import RewardError
from fused_rlhf.trainers.sampler import SamplerError
from tests import tiny, tiny_vision
from tests.cuts import CUTS, kept_of, logits_of, mask_of, random_sets, within

SEVEN = [{"prompt": f"{i}=", "answer": "7"} for i in range(20)]
TASK = Task(SEVEN, SEVEN, "exact_match")


def small(tmp_path, **changes):
    options: dict[str, Any] = {
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


def digits(completions, **_):
    """Dense enough that an untrained model meets it: the share of digits."""
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]


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


@pytest.mark.curves
def test_what_a_run_leaves_and_that_it_can_be_loaded(tmp_path, capsys):
    config = small(tmp_path, sample_steps=1, eval_steps=2, save_steps=2)
    result = grpo.train(config, task=TASK, reward_functions=[digits])
    names = {"checkpoints", "config.yaml", "curves.png", "metrics.jsonl", "model", "report.html", "samples.jsonl"}
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
        return digits(completions)

    config = small(tmp_path, steps=50)
    with pytest.raises(KeyboardInterrupt):
        grpo.train(config, task=TASK, reward_functions=[interrupted])
    folder = tmp_path / "run" / "model"
    assert f"interrupted; the model as it is now lies in {folder}" in capsys.readouterr().out
    trained = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    AutoTokenizer.from_pretrained(folder, local_files_only=True)
    untrained = grpo.prepare(dataclasses.replace(config, output=str(tmp_path / "fresh")), task=TASK).loaded.model
    assert any((a != b).any() for a, b in zip(trained.parameters(), untrained.parameters(), strict=True))
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.fixture
def trainer(tmp_path):
    return prepared(tmp_path)


def prepared(tmp_path, **changes):
    """Four prompts of six completions, off-policy, with another model as the reference."""
    options = {"num_iterations": 2, "num_minibatches": 2, "micro_batch_size": 5, "beta": 0.1, "temperature": 0.7}
    trainer = grpo.prepare(small(tmp_path, **(options | changes)), task=TASK, reward_functions=[digits])
    torch.manual_seed(1)
    if trainer.reference is not None:
        other = grpo.models.build(32, 1)[0]
        assert attention.adopt(other)
        trainer.reference = trainer.engine.frozen(other.eval())
    return trainer


def rolled(trainer, number, prompts, **changes):
    """What a step learns from, of these prompts."""
    with mock.patch.object(grpo.data, "batch_at", return_value=prompts):
        rollout = grpo.collect(trainer, number)
    return grpo.ready(trainer, number, dataclasses.replace(rollout, **changes))


def share_of(trainer, batch, num_sequences, num_tokens):
    return grpo.policy_loss(trainer.loaded.model, trainer.config, batch, num_sequences, torch.as_tensor(num_tokens))


def test_on_policy_the_ratio_is_exactly_one(trainer):
    batch = rolled(trainer, 1, SEVEN[:4])
    for rows in forwards(batch.turns[:2]):
        own = batch.completions.completion_mask[rows].sum()
        _, metrics = share_of(trainer, batch[rows], 12, own)
        assert metrics["ratio_mean"].item() == 1.0
        assert metrics["approx_kl"].item() == 0.0
    grpo.update(trainer, batch)
    _, metrics = share_of(trainer, batch[range(5)], 12, 1)
    assert metrics["approx_kl"].item() > 0.0


def test_the_loss_is_the_formula_and_micro_batches_leave_it_alone(trainer):
    batch = rolled(trainer, 1, SEVEN[:4])
    batch = dataclasses.replace(batch, old_logprobs=batch.old_logprobs + 0.3 * torch.randn_like(batch.old_logprobs))
    some, beta, low, high = batch.completions, 0.1, 0.8, 1.2
    num_tokens = some.completion_mask.sum()

    model = trainer.loaded.model.double()
    logits = model(some.input_ids, some.attention_mask.long()).logits[:, :-1].double() / 0.7
    logprobs = logits.log_softmax(-1).gather(2, some.input_ids[:, 1:, None])[..., 0]
    ratio = (logprobs - batch.old_logprobs.double()).exp()
    values = batch.advantages.double()[:, None]
    kl = (batch.ref_logprobs.double() - logprobs).exp() - (batch.ref_logprobs.double() - logprobs) - 1
    per_token = -torch.minimum(ratio * values, ratio.clamp(low, high) * values) + beta * kl
    mask = some.completion_mask[:, 1:].double()
    want = ((per_token * mask).sum(1) / mask.sum(1)).mean()
    want_grad = torch.autograd.grad(want, model.lm_head.weight)[0]

    model.float()
    for size in (24, 5):
        pieces = [share_of(trainer, batch[rows], 24, num_tokens) for rows in chunks(range(24), size)]
        total = sum(loss for loss, _ in pieces)
        grad = torch.autograd.grad(total, model.lm_head.weight)[0]
        torch.testing.assert_close(total.double(), want, atol=0, rtol=1e-5)
        torch.testing.assert_close(grad.double(), want_grad, atol=1e-6, rtol=1e-4)
        entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
        found, live = combine([metrics for _, metrics in pieces]), mask.bool()
        for name, value in (("kl", kl), ("ratio_mean", ratio), ("entropy", entropy)):
            assert found[name].item() == pytest.approx(value[live].mean().item(), rel=1e-4), name
        assert found["ratio_var"].item() == pytest.approx(ratio[live].var(correction=0).item(), rel=1e-4)


@pytest.mark.parametrize("objective", sorted(set(PRESETS) - {"clip_cov", "kl_cov"}))
def test_micro_batches_leave_every_objective_alone(tmp_path, objective):
    found = []
    for size in (12, 5):
        changes = {"objective": objective, "micro_batch_size": size, "overwrite": True, "num_minibatches": 1}
        trainer = prepared(tmp_path, **changes)
        batch = rolled(trainer, 1, SEVEN[:2])
        torch.manual_seed(2)
        noise = 0.3 * torch.randn(batch.old_logprobs.shape) * batch.completions.completion_mask[:, 1:]
        old = batch.old_logprobs + noise
        batch = dataclasses.replace(batch, old_logprobs=old, advantages=torch.randn(12))
        found.append(grpo.update(trainer, batch))
    one, other = found
    assert one.keys() == other.keys()
    assert math.isfinite(one["loss"])
    if objective != "bnpo":  # whose denominator is each micro-batch's own
        for name in one:
            assert one[name] == pytest.approx(other[name], rel=2e-3, abs=1e-5), name


@pytest.mark.parametrize("objective", ["clip_cov", "kl_cov"])
def test_objectives_over_whole_batches_run(tmp_path, objective):
    trainer = prepared(tmp_path, objective=objective, micro_batch_size=12)
    assert math.isfinite(grpo.update(trainer, rolled(trainer, 1, SEVEN[:4]))["loss"])


def test_groups_lie_together_and_get_their_own_advantages(trainer):
    batch = rolled(trainer, 1, SEVEN[:4])
    assert [sample["prompt"] for sample in batch.samples] == [s["prompt"] for s in SEVEN[:4] for _ in range(6)]
    torch.testing.assert_close(batch.rewards, torch.tensor(digits(batch.completions.texts)))
    groups = batch.rewards.view(4, 6)
    want = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(batch.advantages.view(4, 6), want)
    again, other = rolled(trainer, 1, SEVEN[:4]), rolled(trainer, 2, SEVEN[:4])
    assert again.completions.texts == batch.completions.texts  # by step and row alone
    assert other.completions.texts != batch.completions.texts


@pytest.mark.parametrize(("baseline", "function"), [("leave_one_out", "rloo_advantages"), ("length_weighted", "opo")])
def test_other_baselines(tmp_path, baseline, function):
    trainer = prepared(tmp_path, baseline=baseline)
    batch = rolled(trainer, 1, SEVEN[:4])
    if function == "rloo_advantages":
        want = advantages.rloo_advantages(batch.rewards, 6)
    else:
        want = advantages.opo_advantages(batch.rewards, batch.lengths, 6)
    assert torch.equal(batch.advantages, want)


def test_several_rewards_normalised_alone(tmp_path):
    config = small(tmp_path, combine_rewards="normalize_then_sum", rewards=("exact_match", "numeric_answer"))

    def short(completions, **_):
        return [-float(len(text)) for text in completions]

    trainer = grpo.prepare(config, task=TASK, reward_functions=[digits, short])
    batch = rolled(trainer, 1, SEVEN[:4])
    want = advantages.combine_rewards(batch.scores, [1.0, 1.0], 6, "normalize_then_sum")
    assert torch.equal(batch.advantages, want)


def test_a_single_update_needs_no_old_logprobs_and_beta_zero_no_reference(tmp_path):
    trainer = grpo.prepare(small(tmp_path), task=TASK, reward_functions=[digits])
    batch = rolled(trainer, 1, SEVEN[:4])
    assert batch.old_logprobs is None
    assert batch.ref_logprobs is None
    assert trainer.reference is None


def test_truncated_completions_can_be_left_out(tmp_path):
    trainer = grpo.prepare(small(tmp_path, mask_truncated=True, max_new_tokens=2), task=TASK, reward_functions=[digits])
    batch = rolled(trainer, 1, SEVEN[:4])
    completions = batch.completions
    assert completions.truncated.any()
    assert not completions.completion_mask[completions.truncated].any()
    assert (batch.lengths[completions.truncated] == 2).all()  # the metrics still know how long they were


def test_a_run_without_a_single_token_to_learn_from_goes_on(tmp_path):
    never_ends = TASK.train
    config = small(tmp_path, mask_truncated=True, max_new_tokens=1, steps=2, beta=0.1, num_iterations=2)
    result = grpo.train(config, task=Task(never_ends, SEVEN, "exact_match"), reward_functions=[digits])
    assert result.metrics[1]["truncated"] == result.metrics[1]["dead_sequences"] == 1.0
    assert result.metrics[1]["skipped_updates"] == 2
    assert result.metrics[1]["loss"] == result.metrics[1]["grad_norm"] == 0.0


def test_samples_may_be_a_list(tmp_path):
    trainer = grpo.prepare(small(tmp_path), SEVEN, [digits])
    assert (len(trainer.task.train), len(trainer.task.test)) == (16, 4)


@pytest.mark.parametrize("count", [1, 4])
def test_with_few_samples_none_are_held_out(tmp_path, capsys, count):
    result = grpo.train(small(tmp_path, steps=1, eval_steps=1), task=SEVEN[:count], reward_functions=[digits])
    assert result.before == result.after == {}
    assert "before GRPO: no samples are held out" in capsys.readouterr().out


def test_samples_may_be_a_data_set(tmp_path):
    whole = datasets.Dataset.from_list(SEVEN)
    splits = {"train": whole.select(range(12)), "test": whole.select(range(12, 15))}
    for given, counts in (
        (whole, (16, 4)),
        (datasets.DatasetDict(splits), (12, 3)),
        (Task(**splits, reward="f"), (12, 3)),
    ):
        trainer = grpo.prepare(small(tmp_path), given, [digits])
        assert (len(trainer.task.train), len(trainer.task.test)) == counts
        assert trainer.task.test[:2][0]["answer"] == "7"
    with pytest.raises(
        ValueError, match=r"task: expected a list of samples, or splits called train and test; got \['prompt'"
    ):
        grpo.prepare(small(tmp_path), {"prompt": ["1"]}, [digits])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="train sample 0: expected a dict"):
        grpo.prepare(small(tmp_path), ["1+1="], [digits])  # type: ignore[list-item]


def test_a_run_is_not_resumed_over_other_samples(tmp_path):
    grpo.train(small(tmp_path, steps=1), task=TASK, reward_functions=[digits])
    other = Task([*SEVEN[:-1], {"prompt": "19=", "answer": "8"}], SEVEN, "exact_match")
    with pytest.raises(ValueError, match="resume, data: expected the samples that"):
        grpo.train(small(tmp_path, steps=2, resume=True), task=other, reward_functions=[digits])
    grpo.train(small(tmp_path, steps=2, resume=True), task=TASK, reward_functions=[digits])


def test_the_summary_counts_what_there_is(tmp_path):
    def some(completions, **_):
        return [None, 1.0, 0.0, 0.0, 0.0, 0.0, *[0.5] * 6, *[None] * 6, *[0.0] * 6][: len(completions)]

    trainer = grpo.prepare(small(tmp_path), task=TASK, reward_functions=[some])
    batch = rolled(trainer, 1, SEVEN[:4])
    got = grpo.summary(trainer, batch)
    assert got["reward"] == pytest.approx((1 + 6 * 0.5) / 17)
    assert got["frac_unscorable"] == pytest.approx(7 / 24)
    assert got["frac_reward_zero_std"] == 0.75
    assert got["completion_length"] == pytest.approx(batch.completions.completion_mask.sum().item() / 24)
    assert got["completion_length/min"] <= got["completion_length"] <= got["completion_length/max"] <= 3
    assert got["truncated"] == batch.completions.truncated.float().mean().item()
    assert got["rewards/some"] == got["reward"]
    assert (batch.advantages[6:] == 0).all()


def test_groups_of_equal_or_no_rewards_teach_nothing_and_say_so(tmp_path):
    for value in (0.5, None):
        config = small(tmp_path, steps=2, overwrite=True)
        result = grpo.train(
            config, task=TASK, reward_functions=[lambda completions, value=value, **_: [value] * len(completions)]
        )
        row = result.metrics[1]
        assert row["frac_reward_zero_std"] == 1.0
        assert row["loss"] == row["grad_norm"] == 0.0
        assert row["reward"] == value
        assert row["frac_unscorable"] == (value is None)


def sometimes(completions, **_):
    """Groups of six, of which every other one has equal rewards."""
    return [0.3 + (i // 6 % 2) * (i % 3) for i in range(len(completions))]


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
@pytest.mark.parametrize(
    "objective", ["grpo", "dr_grpo", "dapo", "gspo", "cispo", "sapo", "gmpo", "luspo", "vespo", "rloo"]
)
def test_without_dead_sequences_an_update_is_the_same(tmp_path, monkeypatch, objective, layout):
    found = {}
    for skips in (True, False):
        monkeypatch.setattr(Config, "skips_dead", skips)
        options = {"objective": objective, "num_iterations": 2, "micro_batch_size": 5, "layout": layout}
        trainer = grpo.prepare(small(tmp_path, overwrite=True, **options), TASK, [sometimes])
        metrics = grpo.update(trainer, rolled(trainer, 1, SEVEN[:4]))
        assert metrics["dead_sequences"] == (0.5 if skips else 0.0)
        found[skips] = metrics, [p.clone() for p in trainer.loaded.model.parameters()]
    assert found[True][0]["loss"] == pytest.approx(found[False][0]["loss"], abs=1e-6)
    assert found[True][0]["grad_norm"] == pytest.approx(found[False][0]["grad_norm"], rel=1e-5)
    for one, other in zip(found[True][1], found[False][1], strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=0)  # Adam has divided gradients of 1e-6 by their size
    assert {"live/entropy", "live/ratio_mean"} <= set(found[True][0])
    assert "entropy" not in found[True][0]


def test_what_the_loss_needs_all_sequences_for_skips_none():
    assert Config().skips_dead
    for options in (
        {"beta": 0.1},
        {"entropy_coef": 0.1},
        {"router_aux_loss_coef": 0.1},
        {"top_entropy_quantile": 0.5},
        {"objective": "bnpo"},
        {"objective": "kl_cov"},
    ):
        assert not Config(**options).skips_dead, options


def test_an_update_that_nothing_has_a_gradient_for_moves_nothing(tmp_path, capsys):
    def equal(completions, **_):
        return [0.1] * len(completions)

    config = small(tmp_path, steps=2, num_iterations=2, lr_schedule="linear", weight_decay=0.1)
    trainer = grpo.prepare(config, TASK, [equal])
    weights = [p.clone() for p in trainer.loaded.model.parameters()]
    rows = [row for row in grpo.fit(trainer).metrics if "loss" in row]
    assert [row["skipped_updates"] for row in rows] == [2, 2]
    assert [row["dead_sequences"] for row in rows] == [1.0, 1.0]
    assert rows[0]["learning_rate"] == rows[1]["learning_rate"] == config.learning_rate
    assert trainer.engine.updates == 0
    moments = trainer.engine.optimizer.optimizer.state.values()  # which a checkpoint has made
    assert all(state["exp_avg_sq"].abs().max() == 0 for state in moments)
    for p, before in zip(trainer.loaded.model.parameters(), weights, strict=True):
        assert torch.equal(p, before)
    assert "2 updates had no sequence with an advantage" in capsys.readouterr().out


def test_dead_groups_give_way_to_those_of_further_rollouts(tmp_path):
    asked = []

    def later(completions, **_):
        """Groups of the first rollout have equal rewards, of the second all but one, of others none."""
        asked.append(len(completions))
        which = len(asked)
        return [float(i % 6 if which > 2 or (which == 2 and i < 6) else 1) for i in range(len(completions))]

    for most, left in ((0, 4), (1, 3), (2, 0), (5, 0)):
        trainer = grpo.prepare(small(tmp_path, overwrite=True, resample_dead=most), TASK, [later])
        asked.clear()
        rollout = grpo.collect(trainer, 1)
        groups = rollout.advantages.view(4, 6)
        assert (groups == 0).all(dim=1).sum() == left
        assert len(asked) == 1 + min(most, 2)
        prompts = [sample["prompt"] for sample in rollout.samples]
        assert all(len(set(prompts[i : i + 6])) == 1 for i in range(0, 24, 6))
        texts = trainer.loaded.tokenizer.batch_decode([p.ids for p in rollout.completions.prompts])
        assert texts == prompts
        again = grpo.prepare(small(tmp_path, overwrite=True, resample_dead=most), TASK, [later])
        asked.clear()
        assert torch.equal(grpo.collect(again, 1).completions.input_ids, rollout.completions.input_ids)


@pytest.mark.parametrize("changes", [{"layout": "packed"}, {"layout": "shared"}, {"layout": "shared", "lora_r": 4},
                                     {"layout": "shared", "gradient_checkpointing": True}])  # fmt: skip
@pytest.mark.parametrize("tokens", [0, 40])
def test_a_step_is_the_same_in_every_layout(tmp_path, changes, tokens):
    """Loss and gradients, of one row a forward in padded rows, and of all or so many tokens together."""
    found = []
    options = {"learning_rate": 1e-3, "beta": 0.1, "num_minibatches": 2, "max_grad_norm": 1e9} | changes
    if "lora_r" in changes:
        options |= {"model": tiny.saved_model(tmp_path / "base"), "hidden_size": 128, "num_layers": 4}
    for more in ({"layout": "padded", "micro_batch_size": 1}, {"micro_batch_tokens": tokens}):
        trainer = grpo.prepare(small(tmp_path, overwrite=True, **(options | more)), TASK, [digits])
        batch = rolled(trainer, 1, SEVEN[:4])
        grads = tiny.gradients_of_updates(trainer)
        found.append((grpo.update(trainer, batch), grads[0], batch))
    (one, its, rows), (other, mine, laid) = found
    assert torch.equal(rows.completions.input_ids, laid.completions.input_ids)
    assert other["loss"] == pytest.approx(one["loss"], abs=1e-6)
    assert other["kl"] == pytest.approx(one["kl"], abs=1e-6)
    for got, want in zip(mine, its, strict=True):
        assert (got - want).norm() <= 1e-5 * want.norm() + 1e-9
    if tokens:
        sizes = laid.completions.sizes()
        assert all(sizes.tokens(micro) <= tokens for turn in laid.turns for micro in turn.micro)
        assert any(len(turn.micro) > 1 for turn in laid.turns)


def test_a_budget_below_one_sequence_is_refused(tmp_path):
    with pytest.raises(ValueError, match="micro_batch_tokens: expected at least 6, those of the longest prompt with"):
        grpo.prepare(small(tmp_path, micro_batch_tokens=5), TASK, [digits])
    with pytest.raises(
        ValueError, match="micro_batch_size: expected 256, for it changes nothing beside micro_batch_tok"
    ):
        small(tmp_path, micro_batch_tokens=60, micro_batch_size=4)
    with pytest.raises(ValueError, match="micro_batch_tokens: expected 0: top_entropy_quantile"):
        small(tmp_path, micro_batch_tokens=60, top_entropy_quantile=0.5)


def test_rewards_that_share_a_name_are_weighted_and_logged_apart(tmp_path):
    def share(completions, of, **_):
        return [sum(c in of for c in text) / max(len(text), 1) for text in completions]

    config = small(tmp_path, steps=1, reward_weights=(0.3, 0.7))
    functions = [functools.partial(share, of="0123456789"), functools.partial(share, of="abcdefghij")]
    row = grpo.train(config, task=TASK, reward_functions=functions).metrics[1]
    assert row["rewards/share"] != row["rewards/share#2"]
    assert row["reward"] == pytest.approx(0.3 * row["rewards/share"] + 0.7 * row["rewards/share#2"])


def test_a_reward_that_scores_nothing_is_said_once_and_counted(tmp_path, capsys):
    def never(completions, **_):
        return [math.nan] * len(completions)

    grpo.train(small(tmp_path), task=TASK, reward_functions=[never, digits])
    out = capsys.readouterr().out
    assert "warning: step 1: the reward 'never' scored no completion (None or NaN for all of them)" in out
    assert "warning: in 3 steps the reward 'never' scored no completion" in out
    assert "'digits'" not in out
    assert out.count("warning") == 2


def sampler_of(trainer, shift):
    """An external sampler: the model's own completions, its log-probs `shift` off."""

    def sample(prompts):
        own, config = dataclasses.replace(trainer, sampler=None), trainer.config
        drawn = [SEVEN[i] for i in range(4)]
        completions = grpo_rollout.sample_completions(own, config.seed, 1, drawn, range(4))
        assert [completions.input_ids[i][: len(ids)].tolist() for i, ids in enumerate(prompts)] == prompts
        turns = [Turn(range(24), [range(24)])]
        logprobs = grpo_rollout.logprobs(config, trainer.engine, completions, turns, config.truncation) - shift
        tokens = [row[keep].tolist() for row, keep in zip(completions.input_ids, completions.completion_mask)]
        found = [row[keep].tolist() for row, keep in zip(logprobs, completions.completion_mask[:, 1:])]
        return tokens, found

    return sample


def test_another_sampler_is_corrected_for(tmp_path):
    config = small(tmp_path, importance_sampling="token_truncate", importance_sampling_max=2.0)
    results = {}
    for shift in (0.0, 0.5):
        trainer = grpo.prepare(
            dataclasses.replace(config, overwrite=True), TASK, [digits], sampler=lambda prompts: ([], None)
        )
        trainer.sampler = sampler_of(trainer, shift)
        batch = rolled(trainer, 1, SEVEN[:4])
        assert grpo.differences(trainer, batch)["live/sampling/logprob_difference"] == pytest.approx(shift, abs=1e-6)
        loss, _ = share_of(trainer, batch, 24, batch.completions.completion_mask.sum())
        results[shift] = torch.autograd.grad(loss, trainer.loaded.model.lm_head.weight)[0]
    # Every token's ratio to the sampler is exp(0.5), below the bound.
    torch.testing.assert_close(results[0.5], math.exp(0.5) * results[0.0], atol=1e-6, rtol=1e-4)
    with pytest.raises(ValueError, match="importance_sampling, its bounds: expected a sampler with them"):
        grpo.prepare(dataclasses.replace(config, overwrite=True), task=TASK)


def without_logprobs(sampler, prompts):
    return sampler(prompts)[0], None


def test_a_sampler_that_reports_logprobs_is_corrected_for_unless_told_otherwise(tmp_path):
    """By default as if sequence_mask with a ratio of at most 3 had been asked for, and not at all without log-probs."""
    losses = {}
    cases: dict[str, dict[str, Any]] = {
        "default": {},
        "asked": {"importance_sampling": "sequence_mask", "importance_sampling_max": 3.0},
        "none": {"importance_sampling": "none"},
        "bounded": {"importance_sampling_max": 1.0},
    }
    for name, options in cases.items():
        config = small(tmp_path, overwrite=True, **options)
        trainer = grpo.prepare(config, TASK, [digits], sampler=lambda prompts: ([], None))
        given = sampler_of(trainer, 0.1)
        trainer.sampler = given
        batch = rolled(trainer, 1, SEVEN[:4], advantages=torch.tensor([-1.0, 2.0] * 12))
        losses[name] = grpo.update(trainer, batch)["loss"]
        trainer.sampler = functools.partial(without_logprobs, given)
        assert name == "asked" or rolled(trainer, 1, SEVEN[:4]).completions.sampling_logprobs is None
    assert losses["default"] == pytest.approx(losses["asked"], rel=1e-6)
    assert losses["none"] == pytest.approx(-0.5, abs=1e-5)
    assert losses["default"] != pytest.approx(losses["none"], rel=1e-2)
    assert losses["bounded"] == pytest.approx(0.0, abs=1e-6)  # every sequence's ratio, exp(0.1 T), is masked
    vespo = small(tmp_path, objective="vespo").with_sampler(True)
    assert (vespo.importance_sampling, vespo.importance_sampling_max) == ("token_mask", 3.0)
    with pytest.raises(ValueError, match="importance_sampling, its bounds: expected a sampler with them"):
        grpo.prepare(small(tmp_path, overwrite=True, importance_sampling_max=2.0), task=TASK)


# ------------------------------------------------------------------------------------------- truncated distributions


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
@pytest.mark.parametrize("cut", CUTS)
def test_on_policy_the_ratio_of_a_cut_distribution_is_exactly_one(tmp_path, cut, layout):
    options = {"layout": layout, "micro_batch_size": 5, "temperature": 0.7} | cut
    trainer = grpo.prepare(small(tmp_path, num_iterations=2, num_minibatches=2, **options), TASK, [sometimes])
    batch = rolled(trainer, 1, SEVEN[:4])
    micro = forwards(batch.turns[:2])
    assert len(micro) > 2
    for rows in micro:
        _, metrics = share_of(trainer, batch[rows], 12, batch.completions.completion_mask[rows].sum())
        assert metrics["ratio_mean"].item() == 1.0
        assert metrics["approx_kl"].item() == 0.0
        assert 0.01 < metrics["entropy"].item() < math.log(60)
        assert metrics["targets_added"].item() == 0
        assert 0 < metrics["untruncated/ratio_mean"].item() < 0.95
        both = metrics["untruncated/ratio_mean"] + metrics["untruncated/ratio_difference"]
        assert both.item() == pytest.approx(1.0, abs=1e-6)
    metrics = grpo.update(trainer, batch)
    assert {"live/ratio_mean", "live/untruncated/ratio_mean", "live/targets_added"} <= set(metrics)
    single = grpo.prepare(small(tmp_path, overwrite=True, **options), TASK, [sometimes])
    batch = rolled(single, 1, SEVEN[:4])
    assert batch.old_logprobs is None
    metrics = grpo.update(single, batch)
    assert metrics["live/ratio_mean"] == 1.0
    assert metrics["live/approx_kl"] == 0.0
    assert metrics["live/untruncated/ratio_mean"] < 0.95


def moved(trainer, scale=0.02):
    """As after some updates: some of the tokens sampled are no longer among those that would be kept."""
    torch.manual_seed(3)
    with torch.no_grad():
        for p in trainer.loaded.model.parameters():
            p.add_(scale * torch.randn_like(p))


@pytest.mark.parametrize("cut", CUTS)
def test_loss_gradient_and_metrics_of_a_cut_distribution_are_those_of_transformers_warpers(tmp_path, cut):
    """The KL is that of whole distributions."""
    trainer = prepared(tmp_path, num_minibatches=1, micro_batch_size=24, entropy_coef=0.01, **cut)
    batch = rolled(trainer, 1, SEVEN[:4])
    moved(trainer)
    mask = batch.completions.completion_mask[:, 1:]
    model = trainer.loaded.model.double()
    logits, targets = logits_of(model, batch.completions, 0.7)
    kept = kept_of(logits.detach(), targets, **cut)
    added = (~kept_of(logits.detach(), logits.argmax(-1), **cut).gather(1, targets[:, None])).sum()
    assert added > 0
    logp, full = within(logits, kept), logits.log_softmax(-1)
    logprobs, whole = (x.gather(1, targets[:, None])[:, 0] for x in (logp, full))
    entropy = -(logp.exp() * logp.masked_fill(~kept, 0.0)).sum(-1)
    old, ref = batch.old_logprobs.double()[mask], batch.ref_logprobs.double()[mask]
    ratio, kl = (logprobs - old).exp(), (ref - whole).exp() - (ref - whole) - 1
    values = batch.advantages.double()[:, None].expand_as(mask)[mask]
    per_token = -torch.minimum(ratio * values, ratio.clamp(0.8, 1.2) * values) + 0.1 * kl
    weights = (mask / mask.sum(1, keepdim=True) / 24)[mask]
    want = (per_token * weights).sum() - 0.01 * entropy.mean()
    want_grad = torch.autograd.grad(want, model.lm_head.weight)[0]
    untruncated = (whole - old).exp()
    by_hand = {
        "ratio_mean": ratio.mean(),
        "kl": kl.mean(),
        "entropy": entropy.mean(),
        "untruncated/ratio_mean": untruncated.mean(),
        "untruncated/ratio_difference": ratio.mean() - untruncated.mean(),
        "targets_added": added,
    }

    model.float()
    for size in (24, 5):
        pieces = [share_of(trainer, batch[rows], 24, mask.sum()) for rows in chunks(range(24), size)]
        total = sum(loss for loss, _ in pieces)
        grad = torch.autograd.grad(total, model.lm_head.weight)[0]
        torch.testing.assert_close(total.double(), want, atol=1e-7, rtol=1e-5)
        torch.testing.assert_close(grad.double(), want_grad, atol=1e-6, rtol=1e-4)
        found = combine([metrics for _, metrics in pieces])
        for name, value in by_hand.items():
            assert found[name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-6), name
    trainer.config = dataclasses.replace(trainer.config, top_k=0, top_p=1.0, min_p=0.0)
    plain = share_of(trainer, batch, 24, mask.sum())[1]
    assert plain["kl"].item() == pytest.approx(found["kl"].item(), abs=1e-6)
    assert "targets_added" not in plain


def reporting(sampler, sets_of):
    """A sampler that also reports what it kept."""

    def sample(prompts):
        completions, logprobs = sampler(prompts)
        return completions, logprobs, sets_of(completions)

    return sample


@pytest.mark.parametrize(
    "changes",
    [
        {"micro_batch_size": 5, "num_minibatches": 2},
        {"layout": "shared", "micro_batch_tokens": 40, "num_minibatches": 2},
        {"layout": "packed", "mask_truncated": True, "max_new_tokens": 8},
        {"top_k": 2, "resample_dead": 1},
    ],
)
def test_reported_sets_stay_with_their_tokens_and_take_the_place_of_the_options(tmp_path, changes):
    options = {"beta": 0.1, "temperature": 0.7, "num_iterations": 2, "importance_sampling": "none"} | changes
    trainer = grpo.prepare(small(tmp_path, **options), TASK, [sometimes], sampler=lambda prompts: ([], None))
    plain = dataclasses.replace(trainer, config=dataclasses.replace(trainer.config, top_k=0))
    trainer.sampler = reporting(sampler_of(plain, 0.0), random_sets)
    batch = rolled(trainer, 1, SEVEN[:4])
    some = batch.completions
    tokens = [ids[keep].tolist() for ids, keep in zip(some.input_ids, some.completion_mask)]
    with torch.no_grad():
        logits, targets = logits_of(trainer.loaded.model, some, 0.7)
        want, full = (x.gather(1, targets[:, None])[:, 0] for x in (
            within(logits, mask_of(random_sets(tokens))), logits.log_softmax(-1)
        ))  # fmt: skip
    mask = some.completion_mask[:, 1:]
    torch.testing.assert_close(batch.old_logprobs[mask], want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(batch.ref_logprobs[mask], full, atol=1e-5, rtol=1e-5)
    metrics = grpo.update(trainer, batch)
    assert metrics["ratio_mean"] != 1.0
    assert {"untruncated/ratio_mean", "untruncated/ratio_difference"} <= set(metrics)
    assert "targets_added" not in metrics  # which are found among what is computed alone


def kept_sets(trainer):
    """The sets that the options of a trainer keep, by its own logits."""

    def sets_of(completions):
        config = trainer.config
        own = dataclasses.replace(trainer, sampler=None)
        made = grpo_rollout.sample_completions(own, config.seed, 1, SEVEN[:4], range(4))
        with torch.no_grad():
            logits, targets = logits_of(trainer.loaded.model, made, config.temperature)
        rules = {"top_k": config.top_k, "top_p": config.top_p, "min_p": config.min_p}
        sets = iter(kept_of(logits, targets, **rules))
        return [[next(sets).nonzero()[:, 0] for _ in row] for row in completions]

    return sets_of


@pytest.mark.parametrize("layout", ["padded", "shared"])
def test_replayed_sets_are_as_good_as_computed_ones(tmp_path, layout):
    """Of a sampler that reports the very sets, and of one that reports none: the same bits."""
    found = []
    cut = {"top_k": 40, "top_p": 0.8, "min_p": 0.3, "layout": layout}
    options = {"num_iterations": 2, "num_minibatches": 2, "micro_batch_size": 5, "temperature": 0.5, "beta": 0.1}
    for reports in (True, False):
        config = small(tmp_path, overwrite=True, **options, **cut)
        trainer = grpo.prepare(config, TASK, [digits], sampler=lambda prompts: ([], None))
        given = functools.partial(without_logprobs, sampler_of(trainer, 0.0))
        trainer.sampler = reporting(given, kept_sets(trainer)) if reports else given
        batch = rolled(trainer, 1, SEVEN[:4])
        assert (batch.completions.kept is not None) == reports
        pieces = [share_of(trainer, batch[rows], 12, 30) for rows in forwards(batch.turns[:2])]
        grads = torch.autograd.grad(sum(loss for loss, _ in pieces), list(trainer.loaded.model.parameters()))
        metrics = combine([metrics for _, metrics in pieces])
        assert metrics.pop("targets_added", 0.0) == 0
        found.append((batch.old_logprobs, metrics, grads))
    (old, its, grads), (other, mine, same) = found
    assert torch.equal(old, other)
    assert its == mine
    for one, two in zip(grads, same, strict=True):
        torch.testing.assert_close(one, two, atol=1e-8, rtol=1e-5)


@pytest.mark.parametrize("reports", [True, False])
def test_a_cut_samplers_log_probs_are_compared_over_what_it_kept(tmp_path, reports):
    config = small(tmp_path, temperature=0.7, top_p=0.5)
    trainer = grpo.prepare(config, TASK, [digits], sampler=lambda prompts: ([], None))
    trainer.sampler = sampler_of(trainer, 0.0)
    if reports:
        trainer.sampler = reporting(trainer.sampler, kept_sets(trainer))
    difference = grpo.differences(trainer, rolled(trainer, 1, SEVEN[:4]))["live/sampling/logprob_difference"]
    assert difference == pytest.approx(0.0, abs=1e-5)


def test_a_micro_batch_without_a_token_of_a_cut_distribution_counts_nothing(tmp_path):
    trainer = prepared(tmp_path, top_p=0.5)
    trainer.sampler = reporting(sampler_of(trainer, 0.0), random_sets)
    for reports in (True, False):
        batch = rolled(trainer, 1, SEVEN[:4])
        some = batch.completions if reports else batch.completions.whole()
        none = dataclasses.replace(some, completion_mask=torch.zeros_like(some.completion_mask))
        loss, metrics = share_of(trainer, dataclasses.replace(batch, completions=none)[[0, 1]], 24, 1)
        assert loss.item() == 0.0
        loss.backward()
        assert all(value.item() == 0 for value in metrics.values())


def test_wrong_sets_stop_a_run_before_an_update_and_it_can_go_on(tmp_path):
    """With the bits of the run that never had any."""
    calls: list[None] = []

    def whole(completions):
        return random_sets(completions)

    def third_call_wrong(completions):
        calls.append(None)
        return [row[:-1] for row in random_sets(completions)] if len(calls) == 3 else random_sets(completions)

    def run(name, sets_of, **changes):
        config = small(tmp_path, output=str(tmp_path / name), num_iterations=2, top_p=0.5, **changes)
        trainer = grpo.prepare(config, TASK, [digits], sampler=lambda prompts: ([], None))
        trainer.sampler = reporting(lambda prompts: ([[5, 6, 7]] * len(prompts), None), sets_of)
        return grpo.fit(trainer)

    words = (
        r"step 3 \(prompts 8 to 11 .*the sampler's completion 0: 2 kept sets for its 3 tokens; the last checkpoint is"
    )
    with pytest.raises(SamplerError, match=words):
        run("run", third_call_wrong)
    other = small(tmp_path, num_iterations=2, top_p=0.6, resume=True)
    with pytest.raises(ValueError, match=r"resume, top_p: expected 0\.5 as in .*; got 0\.6"):
        grpo.prepare(other, TASK, [digits])
    resumed, want = run("run", whole, resume=True), run("whole", whole)
    assert [{**row, "seconds": 0} for row in resumed.metrics] == [{**row, "seconds": 0} for row in want.metrics]


def test_another_reference_by_folder_or_object(tmp_path):
    folder = tiny.saved_model(tmp_path / "ref")
    torch.manual_seed(5)
    policy, tokenizer = grpo.models.build(32, 1)
    other, _ = grpo.models.load(folder)
    base = {"model": "own/policy", "hidden_size": 128, "num_layers": 4, "beta": 0.1, "overwrite": True}
    found, sources = [], [({"ref_model": folder}, None), ({}, other)]
    for changes, given in sources:
        config = small(tmp_path, **base, **changes)
        own = policy.__class__.from_pretrained(None, config=policy.config, state_dict=policy.state_dict())
        trainer = grpo.prepare(config, TASK, [digits], own, tokenizer, ref_model=given)
        batch = rolled(trainer, 1, SEVEN[:4])
        found.append(batch.ref_logprobs)
        some = batch.completions
        with torch.no_grad():
            logprobs = other(some.input_ids, some.attention_mask.long()).logits[:, :-1].double().log_softmax(-1)
        want = logprobs.gather(2, some.input_ids[:, 1:, None])[..., 0] * some.completion_mask[:, 1:]
        torch.testing.assert_close(batch.ref_logprobs.double(), want, atol=1e-5, rtol=1e-5)
        assert trainer.controllers() == {}
    torch.testing.assert_close(found[0], found[1], atol=0, rtol=0)
    config = small(tmp_path, **base)
    wrong: list[tuple[dict[str, Any], Any, str]] = [
        ({"ref_model": folder}, other, "none beside the one given"),
        ({}, policy, "another than the model"),
        ({}, grpo.models.small_model(grpo.models.char_tokenizer("01"), 32, 1), "a vocabulary of 99 tokens"),
        ({"beta": 0.0}, other, "none without a weight of the KL to it"),
    ]
    for more, given, words in wrong:
        with pytest.raises(ValueError, match=f"ref_model: expected {words}"):
            grpo.prepare(dataclasses.replace(config, **more), TASK, [digits], policy, tokenizer, ref_model=given)
    with pytest.raises(ValueError, match="ref_model: expected None, for it changes nothing without beta"):
        dataclasses.replace(config, beta=0.0, ref_model=folder)


def test_a_stop_token_is_the_runs_own(tmp_path):
    """It ends completions and what the saved model generates; the caller's model is as it was."""
    model, tokenizer = grpo.models.build(32, 1)
    before = model.generation_config.to_dict()
    config = small(tmp_path, model="own/model", hidden_size=128, num_layers=4, stop_token="7", steps=1, save_steps=1)
    seven = tokenizer.convert_tokens_to_ids("7")
    result = grpo.train(config, task=TASK, reward_functions=[digits], model=model, tokenizer=tokenizer)
    assert model.generation_config.to_dict() == before
    saved = AutoModelForCausalLM.from_pretrained(result.model_path).generation_config
    assert set(saved.eos_token_id) == {seven, tokenizer.eos_token_id}
    with pytest.raises(ValueError, match="stop_token: expected one token of the tokenizer; got '77'"):
        grpo.prepare(dataclasses.replace(config, stop_token="77", overwrite=True), TASK, [digits], model, tokenizer)


def test_the_off_policy_mask_reads_what_the_sampler_reports(tmp_path):
    config = small(tmp_path, off_policy_mask_threshold=0.1)
    losses = {}
    for shift in (0.0, -0.5):
        trainer = grpo.prepare(
            dataclasses.replace(config, overwrite=True), TASK, [digits], sampler=lambda prompts: ([], None)
        )
        trainer.sampler = sampler_of(trainer, shift)
        batch = rolled(trainer, 1, SEVEN[:4], advantages=torch.tensor([-1.0, 2.0] * 12))
        losses[shift] = share_of(trainer, batch, 24, batch.completions.completion_mask.sum())[0].item()
    assert losses[0.0] == pytest.approx(-0.5, abs=1e-5)
    assert losses[-0.5] == pytest.approx(-1.0, abs=1e-5)  # half of the sequences, those of negative advantage, are out
    trainer.sampler = lambda prompts: ([[5]] * len(prompts), None)
    with pytest.raises(ValueError, match="the sampler reports no log-probs: expected some"):
        rolled(trainer, 1, SEVEN[:4])
    with pytest.raises(ValueError, match="off_policy_mask_threshold: expected a sampler, or several updates"):
        grpo.prepare(config, task=TASK)


def test_a_step_equals_trls(tmp_path):
    """Loss and gradient norm of one micro-batch, from the same weights, completions, old and reference log-probs."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    trainer = prepared(tmp_path, temperature=0.7, num_minibatches=1, micro_batch_size=24, max_grad_norm=1e9)
    batch = rolled(trainer, 1, SEVEN[:4])
    torch.manual_seed(4)
    batch = dataclasses.replace(batch, old_logprobs=batch.old_logprobs + 0.3 * torch.randn_like(batch.old_logprobs))
    some, P = batch.completions, len("0=")
    options = GRPOConfig(
        output_dir=str(tmp_path / "trl"), beta=0.1, temperature=0.7, num_generations=6, max_completion_length=3,
        per_device_train_batch_size=24, loss_type="grpo", use_bias_correction_kl=False, report_to=[], use_cpu=True, bf16=False,
    )  # fmt: skip
    trainer.loaded.model.save_pretrained(tmp_path / "model")
    trainer.loaded.tokenizer.save_pretrained(tmp_path / "model")
    theirs = GRPOTrainer(
        str(tmp_path / "model"),
        digits,
        options,
        Dataset.from_list([{"prompt": "0="}]),
        processing_class=trainer.loaded.tokenizer,
    )
    theirs.current_gradient_accumulation_steps = 1
    ours = grpo.update(trainer, dataclasses.replace(batch, turns=[Turn(range(24), [range(24)])]))
    inputs = {
        "prompt_ids": some.input_ids[:, :P],
        "prompt_mask": some.attention_mask[:, :P].long(),
        "completion_ids": some.input_ids[:, P:],
        "completion_mask": some.completion_mask[:, P:].long(),
        "advantages": batch.advantages,
        "old_per_token_logps": batch.old_logprobs[:, P - 1 :],
        "ref_per_token_logps": batch.ref_logprobs[:, P - 1 :],
        "num_items_in_batch": some.completion_mask.sum(),
    }
    loss = theirs._compute_loss(theirs.model, inputs)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(theirs.model.parameters(), 1e9)
    assert ours["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert ours["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert ours["kl"] == pytest.approx(theirs._metrics["eval"]["kl"][0], rel=1e-4)
    assert ours["entropy"] == pytest.approx(theirs._metrics["eval"]["entropy"][0], rel=1e-4)


def lora(tmp_path, **changes):
    options = {"model": tiny.saved_model(tmp_path / "base"), "lora_r": 4, "beta": 0.1}
    return small(tmp_path, **({"hidden_size": 128, "num_layers": 4} | options | changes))


def test_lora_trains_adapters_against_the_model_without_them(tmp_path):
    from peft import AutoPeftModelForCausalLM

    config = lora(tmp_path, learning_rate=1e-2, steps=4)
    result = grpo.train(config, task=TASK, reward_functions=[digits])
    assert result.metrics[1]["kl"] == 0.0 < 1e-3 < result.metrics[4]["kl"]
    names = {path.name for path in result.model_path.iterdir()}
    assert "adapter_model.safetensors" in names
    assert "model.safetensors" not in names
    base, tuned = AutoModelForCausalLM.from_pretrained(config.model), AutoPeftModelForCausalLM.from_pretrained
    adapted = tuned(result.model_path)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert (adapted(ids).logits - base(ids).logits).abs().max() > 1e-3
        with adapted.disable_adapter():
            torch.testing.assert_close(adapted(ids).logits, base(ids).logits, atol=0, rtol=0)
        whole = AutoModelForCausalLM.from_pretrained(result.model_path)  # transformers finds base and adapter itself
        torch.testing.assert_close(whole(ids).logits, adapted(ids).logits, atol=0, rtol=0)


def test_a_lora_run_is_resumed_to_the_bit(tmp_path):
    config = lora(tmp_path, steps=3, save_steps=1, lora_dropout=0.1)
    whole = grpo.train(config, task=TASK, reward_functions=[digits])
    part = dataclasses.replace(config, output=str(tmp_path / "part"))
    calls = []

    def breaks(completions, **_):
        calls.append(1)
        if len(calls) == 3:
            raise KeyError("gone")
        return digits(completions)

    breaks.__name__ = "digits"
    with pytest.raises(RewardError, match="step 2"):
        grpo.train(part, task=TASK, reward_functions=[breaks])
    again = grpo.train(dataclasses.replace(part, resume=True), task=TASK, reward_functions=[digits])
    for name in ("adapter_model.safetensors",):
        assert (again.model_path / name).read_bytes() == (whole.model_path / name).read_bytes()
    state = torch.load(checkpoint.latest(tmp_path / "part" / "checkpoints") / "state.pt", weights_only=True)
    assert all("lora" in name for name in state["engine"]["module"])  # the frozen base is not written again and again


def test_adapters_on_layers_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(ValueError, match="lora_target_modules: Target modules"):
        grpo.prepare(lora(tmp_path, lora_target_modules=("no_such_layer",)), task=TASK)


def test_images_reach_rollout_and_updates(tmp_path):
    torch.manual_seed(0)
    model, processor = tiny_vision.build()
    rows = tiny_vision.samples(5)
    config = small(
        tmp_path,
        model="tiny/vision",
        hidden_size=128,
        num_layers=4,
        chat_template=True,
        num_minibatches=2,
        micro_batch_size=5,
        beta=0.1,
        steps=2,
        max_new_tokens=2,
    )
    trainer = grpo.prepare(config, Task(rows, rows, "exact_match"), [digits], model, processor)
    batch = rolled(trainer, 1, rows[:4])
    alone = dataclasses.replace(config, micro_batch_size=1)
    torch.testing.assert_close(
        grpo_rollout.logprobs(alone, trainer.engine, batch.completions, batch.turns[:2]),
        batch.old_logprobs,
        atol=1e-5,
        rtol=0,
    )
    blind = [{"prompt": row["prompt"], "answer": "7", "images": [tiny_vision.picture(255)]} for row in rows[:4]]
    other = rolled(trainer, 1, blind)
    assert not torch.equal(other.old_logprobs, batch.old_logprobs)  # the pictures matter
    result = grpo.fit(trainer)
    visual = [name for name, _ in model.named_parameters() if "visual" in name]
    assert visual
    assert all(math.isfinite(row["loss"]) for row in result.metrics if "loss" in row)
    again, _ = grpo.models.AutoModelForImageTextToText.from_pretrained(result.model_path), None
    torch.testing.assert_close(again.state_dict()[visual[0]], model.state_dict()[visual[0]], atol=0, rtol=0)
    assert (result.model_path / "preprocessor_config.json").exists() or (
        result.model_path / "processor_config.json"
    ).exists()


def test_a_mixture_of_experts_adds_its_auxiliary_loss(tmp_path):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    tokenizer = grpo.models.char_tokenizer()
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(  # type: ignore[call-arg]
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, moe_intermediate_size=16,
            num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=16, num_experts=4,
            num_experts_per_tok=2, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    losses = {}
    for coefficient in (0.0, 0.5):
        config = small(tmp_path, router_aux_loss_coef=coefficient, overwrite=True)
        trainer = grpo.prepare(config, TASK, [digits], model, tokenizer)
        batch = rolled(trainer, 1, SEVEN[:4])
        count = batch.completions.completion_mask.sum()
        losses[coefficient] = share_of(trainer, batch, 24, count)[0].item()
    some = batch.completions
    aux = model(some.input_ids, some.attention_mask.long(), output_router_logits=True).aux_loss
    assert losses[0.5] - losses[0.0] == pytest.approx(0.5 * aux.item(), rel=1e-4)


@pytest.mark.parametrize("objective", ["dr_grpo", "dapo"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_other_objectives_and_bf16_run_with_a_reference(tmp_path, objective, precision):
    config = small(tmp_path, objective=objective, mixed_precision=precision, beta=0.01, num_iterations=2, steps=2)
    result = grpo.train(config, task=TASK, reward_functions=[digits])
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
        ({"top_k": -1}, "top_k: expected at least 0; got -1"),
        ({"top_p": 0.0}, "top_p: expected above 0 and at most 1; got 0.0"),
        ({"top_p": 1.1}, "top_p: expected above 0 and at most 1; got 1.1"),
        ({"top_p": math.nan}, "top_p: expected above 0 and at most 1; got nan"),
        ({"min_p": -0.1}, "min_p: expected at least 0 and at most 1; got -0.1"),
        ({"min_p": 1.5}, "min_p: expected at least 0 and at most 1; got 1.5"),
        ({"steps": -1}, "steps: expected at least 0"),
        ({"num_minibatches": 5}, r"num_minibatches: expected a divisor of .* = 24; got 5"),
        ({"rewards": ("length=2",), "reward_weights": (1.0, 2.0)}, "reward_weights: expected one for each"),
        ({"baseline": "leave_one_out", "scale_rewards": "batch"}, "scale_rewards: expected 'group', .* got 'batch'"),
        ({"baseline": "length_weighted", "combine_rewards": "normalize_then_sum"}, "combine_rewards: expected 'sum_t"),
        (
            {"importance_sampling": "none", "importance_sampling_max": 2.0},
            "importance_sampling_max: expected None, .* without importance_sampling",
        ),
        ({"kl": "k1"}, "kl: expected 'k3', for it changes nothing without beta"),
        ({"lora_alpha": 8.0}, "lora_alpha: expected None, for it changes nothing without lora_r"),
        ({"warmup_accuracy": 0.5}, r"warmup_steps: expected at least 1 when warmup_accuracy is given \(0.5\)"),
        ({"warmup_accuracy": 1.5, "warmup_steps": 1}, "warmup_accuracy: expected above 0 and at most 1"),
        ({"data": "x"}, "data: expected none for the task 'arithmetic'"),
        ({"task": "gsm8k"}, "data: expected where the task 'gsm8k' is read from; got None"),
        ({"task": "chess"}, "task: expected one of"),
        ({"model": "some/model"}, "hidden_size, num_layers: expected left alone with model='some/model'"),
        ({"beta": -0.1}, "beta"),
        ({"objective": "unheard"}, "objective: expected one of"),
        ({"kl": "k9"}, "kl: expected one of"),
        ({"top_entropy_quantile": 0.0}, "top_entropy_quantile must lie in"),
        ({"importance_sampling": "token_mask"}, "importance_sampling_min or importance_sampling_max must be given"),
        ({"use_bias_correction_kl": True}, "use_bias_correction_kl must be False when beta is 0"),
        ({"reward_timeout": -1.0}, "reward_timeout: expected at least 0"),
        ({"epsilon_low": math.nan}, "epsilon_low"),
        ({"learning_rate": math.nan}, "learning_rate: expected more than 0; got nan"),
    ],
)
def test_contradictory_options_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        small(tmp_path, **changes)


@pytest.mark.parametrize("top_k", [2.5, True])
def test_a_top_k_that_is_no_int_is_refused(tmp_path, top_k):
    with pytest.raises(TypeError, match="top_k must be an int"):
        small(tmp_path, top_k=top_k)


def test_a_run_says_how_its_distribution_is_cut(tmp_path, capsys):
    grpo.train(small(tmp_path, steps=0, top_k=40, top_p=0.9), task=TASK)
    assert "; mode two_phase, top_k 40, top_p 0.9; " in capsys.readouterr().out


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
            reward_functions=[digits, digits],
        )
    long = [{"prompt": "1" * 1022, "answer": "1"}]
    with pytest.raises(ValueError, match="exceed the model's context of 1024"):
        grpo.train(config, task=Task(long, SEVEN, "exact_match"))
    with pytest.raises(FileNotFoundError, match="gone"):
        grpo.train(small(tmp_path, model=str(tmp_path / "gone"), hidden_size=128, num_layers=4), task=TASK)
    with pytest.raises(ValueError, match="model, tokenizer: expected both or neither"):
        grpo.train(config, task=TASK, model=fr)  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_a_reward_that_breaks_later_is_named_too(tmp_path):
    def breaks(completions, **_):
        return [0.0] * (len(completions) if len(completions) == 2 else 1)

    with pytest.raises(ValueError, match="'breaks' returned 1 values for 24 completions"):
        grpo.train(small(tmp_path), task=TASK, reward_functions=[breaks])


@pytest.mark.parametrize("changes", [{"top_entropy_quantile": 0.2}, {"objective": "kl_cov"}, {"objective": "clip_cov"}])
def test_what_compares_all_tokens_takes_whole_mini_batches(tmp_path, changes):
    with pytest.raises(ValueError, match=r"micro_batch_size: expected at least 12, those of a mini-batch .*; got 11"):
        prepared(tmp_path, micro_batch_size=11, **changes)
    prepared(tmp_path, micro_batch_size=12, **changes)


def test_prompts_need_no_answers_where_no_reward_reads_them(tmp_path, capsys):
    rows = [{"prompt": row["prompt"]} for row in SEVEN]
    result = grpo.train(small(tmp_path, steps=1, eval_steps=1), task=rows, reward_functions=[digits])
    assert set(result.after) == {"score"}
    assert "after GRPO: score" in capsys.readouterr().out

    def reads(completions, answer, **_):
        return [0.0] * len(answer)

    cases: list[Any] = [({"rewards": ("length=2", "exact_match")}, None), ({}, [digits, reads]), ({}, None)]
    for changes, given in cases:
        with pytest.raises(ValueError, match=r"train sample 0: missing \['answer'\]"):
            grpo.prepare(small(tmp_path, overwrite=True, **changes), rows, given)


def test_the_held_out_samples_are_the_same_for_every_seed(tmp_path):
    tests = [grpo.prepare(small(tmp_path, seed=seed)).task.test for seed in (0, 1)]
    assert tests[0] == tests[1]
    other = grpo.prepare(small(tmp_path, split_seed=1)).task.test
    assert other != tests[0]
    lists = [grpo.prepare(small(tmp_path, seed=seed), SEVEN).task.test for seed in (0, 1)]
    assert lists[0] == lists[1]

import copy
import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fused_rlhf.objectives.reductions import combine
from fused_rlhf.trainers import cli, ppo, value
from fused_rlhf.trainers import model as models
from fused_rlhf.trainers.data import Task
from fused_rlhf.trainers.minibatches import chunks, forwards
from fused_rlhf.trainers.ppo import Config, KLController
from fused_rlhf.trainers.value import ScalarModel
from tests import launch, tiny, tiny_vision
from tests.cuts import CUTS, kept_of, logits_of, within
from tests.helpers import relative

SEVEN = [{"prompt": f"{i}=", "answer": "7"} for i in range(20)]
TASK = Task(SEVEN, SEVEN, "exact_match")


def small(tmp_path, **changes):
    options: dict[str, Any] = {
        "hidden_size": 32,
        "num_layers": 1,
        "steps": 3,
        "prompts_per_step": 24,
        "max_new_tokens": 3,
        "learning_rate": 5e-3,
        "output": str(tmp_path / "run"),
        "sample_steps": 0,
        "eval_steps": 0,
        "save_steps": 0,
    }
    return Config(**(options | changes))


def digits(completions, **_):
    """Dense enough that an untrained model meets it: the share of digits among three characters."""
    return [sum(c.isdigit() for c in text[:3]) / 3 for text in completions]


def rows_of(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def without_time(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def one(trainer, number=1):
    return ppo.collect(trainer, number)


def samples_of(trainer):
    """The prompts of step 1."""
    return ppo.data.batch_at(trainer.task.train, trainer.config.seed, 0, trainer.config.prompts_per_step)


# ---------------------------------------------------------------------------------------------------------- learning


@pytest.mark.parametrize("value_model", ["shared", "copy"])
def test_the_score_rises_the_values_learn_it_and_the_kl_is_held(tmp_path, value_model):
    config = small(
        tmp_path,
        steps=40,
        prompts_per_step=128,
        max_new_tokens=1,
        num_ppo_epochs=2,
        value_model=value_model,
        vf_coef=0.5,
        kl_coef=0.01,
    )
    result = ppo.train(config, task=TASK)
    rows = result.metrics[1:-1]
    scores = [row["objective/scores"] for row in rows]
    assert sum(scores[:5]) / 5 < 0.1
    assert sum(scores[-5:]) / 5 > 0.9
    assert result.before["accuracy"] < 0.1
    assert result.after["accuracy"] > 0.9
    assert rows[0]["objective/kl"] == 0
    assert rows[-1]["objective/kl"] > 1
    assert [row["episode"] for row in rows] == [128 * i for i in range(1, 41)]
    assert rows_of(tmp_path / "run") == result.metrics


def test_the_kl_follows_its_coefficient_and_its_target(tmp_path):
    def late_kl(name, **changes):
        options = {"steps": 40, "prompts_per_step": 96, "max_new_tokens": 1, "num_ppo_epochs": 2, "learning_rate": 4e-3}
        result = ppo.train(small(tmp_path / name, **options, **changes), task=TASK, reward_functions=[digits])
        rows = [row for row in result.metrics if "objective/kl" in row]
        return sum(row["objective/kl"] for row in rows[-20:]) / 20, rows[-1]["objective/kl_coef"]

    weak, coef = late_kl("weak", kl_coef=0.02)
    assert weak > 1.5
    assert coef == 0.02
    strong, _ = late_kl("strong", kl_coef=1.0)
    assert abs(strong) < 0.1
    held, coef = late_kl("held", kl_coef=0.1, target_kl=0.5, kl_horizon=150)
    assert 0.2 < held < 1.0
    assert coef != 0.1


def test_without_a_kl_coefficient_there_is_no_reference(tmp_path):
    trainer = ppo.prepare(small(tmp_path, kl_coef=0.0), TASK, [digits])
    assert trainer.reference is None
    result = ppo.fit(trainer)
    assert {row["objective/kl"] for row in result.metrics if "objective/kl" in row} == {0.0}


def test_the_controller_by_hand_and_its_state():
    controller = KLController(0.1, target=2.0, horizon=1000)
    controller.update(2.2, 100)  # 10 % above the target
    assert controller.coef == pytest.approx(0.1 * (1 + 0.1 * 0.1))
    controller.update(40.0, 100)  # clipped to 20 %
    assert controller.coef == pytest.approx(0.1 * 1.01 * 1.02)
    controller.update(0.0, 100)
    assert controller.coef == pytest.approx(0.1 * 1.01 * 1.02 * 0.98)
    controller.update(math.nan, 100)  # nothing could be scored
    assert controller.coef == pytest.approx(0.1 * 1.01 * 1.02 * 0.98)
    other = KLController(7.0, target=2.0, horizon=1000)
    other.load_state_dict(controller.state_dict())
    assert other.coef == controller.coef
    fixed = KLController(0.1, None, 1000)
    fixed.update(50.0, 100)
    assert fixed.coef == 0.1


# -------------------------------------------------------------------------------------- one step, against dense fp64


@pytest.fixture(params=["shared", "copy"])
def trainer(tmp_path, request):
    """A policy away from its reference, with values that are not zero."""
    config = small(
        tmp_path,
        value_model=request.param,
        num_minibatches=2,
        micro_batch_size=5,
        max_new_tokens=12,
        temperature=0.7,
        kl_coef=0.1,
        kl_estimator="k3" if request.param == "copy" else "k1",
        gamma=0.97,
        lam=0.9,
        missing_eos_penalty=0.5,
        vf_coef=0.3,
        entropy_coef=0.02,
    )
    trainer = ppo.prepare(config, TASK, [digits])
    torch.manual_seed(1)
    with torch.no_grad():
        for p in trainer.engine.module.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return trainer


def dense(module, some, temperature):
    """Log-probs, entropies and values of every position by the model's own logits, in fp64 where the model is."""
    mask = some.attention_mask.long()
    out = module.policy(some.input_ids, mask, output_hidden_states=True)
    logp = (out.logits[:, :-1] / temperature).log_softmax(-1)
    logprobs = logp.gather(2, some.input_ids[:, 1:, None])[..., 0]
    entropy = -(logp.exp() * logp).sum(-1)
    if isinstance(module.value, ScalarModel):
        hidden, linear = module.value.body(some.input_ids, mask).last_hidden_state, module.value.score
    else:
        hidden, linear = out.hidden_states[-1], module.value
    return logprobs, entropy, (hidden[:, :-1] * linear.weight[0]).sum(-1) + linear.bias


def expected(trainer, batch):
    """What a rollout should hold, sequence by sequence and token by token."""
    config, some = trainer.config, batch.completions
    module = copy.deepcopy(trainer.engine.module).double()
    reference = copy.deepcopy(trainer.reference.module).double()
    with torch.no_grad():
        logprobs, _, values = dense(module, some, config.temperature)
        logits = reference(some.input_ids, some.attention_mask.long()).logits[:, :-1] / config.temperature
        ref = logits.log_softmax(-1).gather(2, some.input_ids[:, 1:, None])[..., 0]
    mask = some.completion_mask[:, 1:]
    advantages, returns, kl = torch.zeros_like(values), torch.zeros_like(values), torch.zeros_like(values)
    for i in range(len(mask)):
        where = mask[i].nonzero().flatten().tolist()
        d = [(logprobs[i, t] - ref[i, t]).item() for t in where]
        k = [math.exp(-x) + x - 1 if config.kl_estimator == "k3" else x for x in d]
        r = [-config.kl_coef * x for x in k]
        r[-1] += digits([some.texts[i]])[0] - (config.missing_eos_penalty if some.truncated[i] else 0.0)
        v = [values[i, t].item() for t in where] + [0.0]
        delta = [r[j] + config.gamma * v[j + 1] - v[j] for j in range(len(r))]
        for j, t in enumerate(where):
            kl[i, t] = k[j]
            advantages[i, t] = sum((config.gamma * config.lam) ** (m - j) * delta[m] for m in range(j, len(r)))
            returns[i, t] = advantages[i, t] + v[j]
    flat = advantages[mask]
    advantages[mask] = (flat - flat.mean()) / (flat.var() + 1e-8).sqrt()
    zero = torch.zeros_like(values)
    return {
        "old_logprobs": torch.where(mask, logprobs, zero),
        "kl": kl,
        "values": torch.where(mask, values, zero),
        "advantages": advantages,
        "returns": returns,
    }


def test_a_rollout_holds_what_the_formulas_say(trainer):
    batch = one(trainer)
    assert batch.completions.truncated.any()
    assert not batch.completions.truncated.all()
    assert (batch.mask == batch.completions.completion_mask[:, 1:]).all()
    for name, want in expected(trainer, batch).items():
        got = torch.where(batch.mask, getattr(batch, name), 0.0)
        torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=1e-4, msg=f"{name}: {{}}".format)


def perturbed(batch, seed=2):
    """As after some updates: ratios and values away from those of the rollout, on both sides of the clips."""
    generator = torch.Generator().manual_seed(seed)
    noise = [0.3 * torch.randn(batch.mask.shape, generator=generator) for _ in range(2)]
    return dataclasses.replace(
        batch, old_logprobs=batch.old_logprobs + noise[0], values=torch.where(batch.mask, batch.values + noise[1], 0.0)
    )


def test_the_loss_its_gradients_and_metrics_are_those_of_dense_fp64(trainer):
    batch, config = perturbed(one(trainer)), trainer.config
    mask, n = batch.mask, batch.mask.sum()
    module = copy.deepcopy(trainer.engine.module).double()
    logprobs, entropy, values = dense(module, batch.completions, config.temperature)
    adv, ret, old, old_v = (
        x.double()[mask] for x in (batch.advantages, batch.returns, batch.old_logprobs, batch.values)
    )
    lp, h, v = logprobs[mask], entropy[mask], values[mask]
    ratio = (lp - old).exp()
    pg = torch.maximum(-adv * ratio, -adv * ratio.clamp(0.8, 1.2))
    clipped = torch.minimum(torch.maximum(v, old_v - 0.2), old_v + 0.2)
    vf = torch.maximum((v - ret) ** 2, (clipped - ret) ** 2) / 2
    want = pg.sum() / n + 0.3 * vf.sum() / n - 0.02 * h.sum() / n
    truth = torch.autograd.grad(want, list(module.parameters()))

    own: Any = trainer.engine.module
    for size in (24, 5, 7):
        pieces = [ppo.ppo_loss(own, config, batch[rows], n) for rows in chunks(range(24), size)]
        loss = torch.stack([piece[0] for piece in pieces]).sum()
        grads = torch.autograd.grad(loss, list(own.parameters()))
        assert loss.item() == pytest.approx(want.item(), rel=1e-5, abs=1e-7)
        assert relative(torch.cat([g.flatten() for g in grads]), torch.cat([g.flatten() for g in truth])) < 1e-5
        got = {name: value.item() for name, value in combine([piece[1] for piece in pieces]).items()}
        hit = (ratio.clamp(0.8, 1.2) - ratio).abs() > 0
        by_hand = {
            "loss/policy_avg": pg.mean(),
            "loss/value_avg": vf.mean(),
            "policy/approxkl_avg": ((lp - old) ** 2).mean() / 2,
            "policy/clipfrac_avg": (hit & (-adv * ratio.clamp(0.8, 1.2) > -adv * ratio)).double().mean(),
            "policy/entropy_avg": h.mean(),
            "val/clipfrac_avg": ((clipped - ret) ** 2 > (v - ret) ** 2).double().mean(),
            "val/ratio": ratio.mean(),
            "val/ratio_var": ratio.var(correction=0),
        }
        assert by_hand["policy/clipfrac_avg"] > 0
        assert by_hand["val/clipfrac_avg"] > 0
        assert got == pytest.approx({name: value.item() for name, value in by_hand.items()}, rel=1e-4, abs=1e-6)


def test_an_update_is_adamw_on_those_gradients_mini_batch_after_mini_batch(trainer):
    """Two epochs of two mini-batches by hand, each from the gradient of its own loss."""
    config = dataclasses.replace(trainer.config, num_ppo_epochs=2)
    trainer = dataclasses.replace(trainer, config=config)
    batch = one(trainer)
    turns = [turn.rows for turn in batch.turns]
    assert [sorted([*turns[i], *turns[i + 1]]) for i in (0, 2)] == [list(range(24))] * 2
    assert turns[0] != turns[2]
    module = copy.deepcopy(trainer.engine.module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=config.learning_rate, weight_decay=0.0)
    norms = []
    for rows in turns:
        optimizer.zero_grad()
        ppo.ppo_loss(module, config, batch[rows], batch.mask[rows].sum())[0].backward()
        norms.append(torch.nn.utils.clip_grad_norm_(module.parameters(), config.max_grad_norm).item())
        optimizer.step()
    metrics = ppo.update(trainer, batch)
    assert metrics["grad_norm"] == pytest.approx(sum(norms) / 4, rel=1e-4)
    assert metrics["lr"] == config.learning_rate
    for mine, its in zip(module.parameters(), trainer.engine.module.parameters(), strict=True):
        # AdamW's first steps are signs of gradients: where one is next to nothing, rounding may decide.
        assert ((mine - its).abs() > 1e-4).float().mean() < 0.01


def test_before_the_first_update_the_ratio_is_exactly_one(trainer):
    batch = one(trainer)
    for rows in forwards(batch.turns[:2]):
        _, metrics = ppo.ppo_loss(trainer.engine.module, trainer.config, batch[rows], batch.mask[rows].sum())
        assert metrics["val/ratio"].item() == 1.0
        assert metrics["policy/approxkl_avg"].item() == 0.0
    assert ppo.update(trainer, batch)["policy/approxkl_avg"] > 0


def test_the_summary_is_made_of_the_completions_tokens_alone(trainer):
    batch = one(trainer)
    got = ppo.summary(trainer, batch)
    kl, entropy, scores = [], [], digits(batch.completions.texts)
    scores = [s - 0.5 * cut for s, cut in zip(scores, batch.completions.truncated.tolist())]
    for i in range(24):
        kl.append(sum(batch.kl[i][batch.mask[i]].tolist()))
        entropy.append(-sum(batch.old_logprobs[i][batch.mask[i]].tolist()))
    residual, returns = (batch.returns - batch.values)[batch.mask], batch.returns[batch.mask]
    want = {
        "objective/kl": sum(kl) / 24,
        "objective/kl_coef": 0.1,
        "objective/entropy": sum(entropy) / 24,
        "objective/non_score_reward": -0.1 * sum(kl) / 24,
        "objective/rlhf_reward": sum(scores) / 24 - 0.1 * sum(kl) / 24,
        "objective/scores": sum(scores) / 24,
        "val/explained_variance": 1 - (residual.var() / returns.var()).item(),
        "val/num_eos_tokens": 24 - batch.completions.truncated.sum().item(),
        "completion_length": batch.mask.sum().item() / 24,
    }
    assert got == pytest.approx(want, rel=1e-4, abs=1e-6)
    garbage = batch.old_logprobs.masked_fill(~batch.mask, -50.0)
    dirty = dataclasses.replace(batch, old_logprobs=garbage, kl=batch.kl.masked_fill(~batch.mask, 9.0))
    assert ppo.summary(trainer, dirty) == got
    assert ppo.update(trainer, dirty)["loss/policy_avg"] == pytest.approx(0.0, abs=0.2)


# --------------------------------------------------------------------------------------------------------- the parts


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
@pytest.mark.parametrize("cut", CUTS)
def test_before_the_first_update_the_ratio_of_a_cut_distribution_is_exactly_one(tmp_path, cut, layout):
    """And the KL to a reference with the same weights is exactly 0, for it is that of whole distributions."""
    options = {"layout": layout, "num_minibatches": 2, "micro_batch_size": 5, "temperature": 0.7}
    trainer = ppo.prepare(small(tmp_path, **options, **cut), TASK, [digits])
    batch = one(trainer)
    assert batch.kl.abs().max() == 0
    module: Any = trainer.engine.module
    for rows in forwards(batch.turns[:2]):
        _, metrics = ppo.ppo_loss(module, trainer.config, batch[rows], batch.mask[rows].sum())
        assert metrics["val/ratio"].item() == 1.0
        assert metrics["policy/approxkl_avg"].item() == 0.0
        assert metrics["targets_added"].item() == 0
        assert 0 < metrics["untruncated/ratio_mean"].item() < 0.95
    assert {"untruncated/ratio_difference", "targets_added"} <= set(ppo.update(trainer, batch))


@pytest.mark.parametrize("cut", CUTS)
def test_old_log_probs_loss_and_gradient_of_a_cut_distribution_are_those_of_transformers_warpers(trainer, cut):
    config = dataclasses.replace(trainer.config, **cut)
    trainer = dataclasses.replace(trainer, config=config)
    batch = one(trainer)
    mask, n = batch.mask, batch.mask.sum()
    module = copy.deepcopy(trainer.engine.module).double()
    logits, targets = logits_of(module.policy, batch.completions, config.temperature)
    logp = within(logits, kept_of(logits.detach(), targets, **cut))
    lp = logp.gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(batch.old_logprobs[mask].double(), lp.detach(), atol=2e-5, rtol=1e-5)
    whole = expected(trainer, batch)  # of the whole distribution
    assert (batch.old_logprobs[mask] > whole["old_logprobs"][mask]).all()
    torch.testing.assert_close(batch.kl[mask].double(), whole["kl"][mask], atol=2e-5, rtol=1e-4)

    batch = perturbed(batch)
    adv, old = batch.advantages.double()[mask], batch.old_logprobs.double()[mask]
    ratio, entropy = (lp - old).exp(), -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0.0)).sum(-1)
    pg = torch.maximum(-adv * ratio, -adv * ratio.clamp(0.8, 1.2))
    truth = torch.autograd.grad(pg.mean() - 0.02 * entropy.mean(), list(module.policy.parameters()))
    trainer.config = dataclasses.replace(config, vf_coef=0.0)
    own: Any = trainer.engine.module
    for size in (24, 7):
        pieces = [ppo.ppo_loss(own, trainer.config, batch[rows], n) for rows in chunks(range(24), size)]
        loss = torch.stack([piece[0] for piece in pieces]).sum()
        grads = torch.autograd.grad(loss, list(own.policy.parameters()))
        assert relative(torch.cat([g.flatten() for g in grads]), torch.cat([g.flatten() for g in truth])) < 1e-4
        got = combine([piece[1] for piece in pieces])
        assert got["loss/policy_avg"].item() == pytest.approx(pg.mean().item(), rel=1e-4, abs=1e-6)
        assert got["val/ratio"].item() == pytest.approx(ratio.mean().item(), rel=1e-4)
        assert got["policy/entropy_avg"].item() == pytest.approx(entropy.mean().item(), rel=1e-4)


def test_a_sampler_with_one_choice_is_greedy_and_certain(tmp_path):
    for cut in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        trainer = ppo.prepare(small(tmp_path, temperature=0.7, **cut), TASK, [digits])
        batch = one(trainer)
        greedy = ppo.sample_completions(trainer, samples_of(trainer), uniforms=None)
        assert batch.completions.texts == greedy.texts
        assert batch.old_logprobs.abs().max() == 0
        assert ppo.summary(trainer, batch)["objective/entropy"] == 0
    warm = one(ppo.prepare(small(tmp_path, top_k=3), TASK, [digits])).completions.texts
    assert len(set(warm)) > 1


def test_a_stop_token_ends_a_completion_and_a_missing_end_costs(tmp_path):
    trainer = ppo.prepare(small(tmp_path, stop_token="7", missing_eos_penalty=2.0, max_new_tokens=8), TASK, [digits])
    seven, eos = map(trainer.loaded.tokenizer.convert_tokens_to_ids, ("7", "<eos>"))
    with torch.no_grad():  # the 7 is as likely as the rest together
        trainer.loaded.model.model.embed_tokens.weight[seven] = (
            0.5 * trainer.loaded.model.model.embed_tokens.weight.mean(0)
        )
    ended = {"7": 0, "eos": 0, "cut": 0}
    for number in range(1, 9):
        some = (batch := one(trainer, number)).completions
        for i in range(24):
            tokens = some.input_ids[i][some.completion_mask[i]].tolist()
            assert not {seven, eos} & set(tokens[:-1])
            last = "7" if tokens[-1] == seven else "eos" if tokens[-1] == eos else "cut"
            ended[last] += 1
            assert some.truncated[i].item() == (last == "cut")
            assert batch.scores[i].item() == pytest.approx(digits([some.texts[i]])[0] - 2.0 * (last == "cut"))
    assert min(ended.values()) > 0


def test_what_cannot_be_scored_takes_no_part(tmp_path, capsys):
    def odd(completions, prompts, **_):
        return [None if int(p[:-1]) % 2 else x for p, x in zip(prompts, digits(completions))]

    trainer = ppo.prepare(small(tmp_path, micro_batch_size=24), TASK, [odd])
    batch = one(trainer)
    lost = batch.scores.isnan()
    assert lost.any()
    assert not batch.mask[lost].any()
    assert batch.advantages[lost].abs().max() == 0
    live = batch.advantages[batch.mask]
    assert live.mean().item() == pytest.approx(0, abs=1e-6)
    assert live.std().item() == pytest.approx(1, abs=1e-3)
    assert ppo.summary(trainer, batch)["objective/scores"] == pytest.approx(batch.scores.nanmean().item())
    module: Any = trainer.engine.module
    loss, _ = ppo.ppo_loss(module, trainer.config, batch, batch.mask.sum())
    ids = batch.completions.input_ids.clone()
    ids[lost] = 5
    other = dataclasses.replace(batch, completions=dataclasses.replace(batch.completions, input_ids=ids))
    assert ppo.ppo_loss(module, trainer.config, other, batch.mask.sum())[0].item() == pytest.approx(
        loss.item(), rel=1e-5
    )

    nothing = ppo.prepare(small(tmp_path, target_kl=1.0), TASK, [lambda completions, **_: [None] * len(completions)])
    metrics = nothing.step(1)
    assert "warning: step 1: no completion could be scored" in capsys.readouterr().out
    assert metrics["loss"] == 0
    assert math.isnan(metrics["objective/scores"])
    assert nothing.kl.coef == nothing.config.kl_coef


def test_whitened_rewards_have_unit_variance_and_keep_their_mean(tmp_path, monkeypatch):
    seen = {}

    def spy(rewards, values, mask, **options):
        seen["rewards"] = rewards[mask]
        return gae(rewards, values, mask, **options)

    gae = ppo.gae
    monkeypatch.setattr(ppo, "gae", spy)
    one(ppo.prepare(small(tmp_path, kl_coef=0.0), TASK, [digits]))
    plain = seen["rewards"]
    batch = one(ppo.prepare(small(tmp_path, kl_coef=0.0, whiten_rewards=True, whiten_advantages=False), TASK, [digits]))
    assert seen["rewards"].std().item() == pytest.approx(1.0, abs=1e-3)
    assert seen["rewards"].mean().item() == pytest.approx(plain.mean().item(), abs=1e-5)
    assert batch.advantages[batch.mask].std().item() != pytest.approx(1.0, abs=1e-2)


def test_the_values_learn_at_a_rate_of_their_own(tmp_path):
    for options, rate in (
        ({"learning_rate": 1e-6}, 1e-5),
        ({"learning_rate": 1e-3}, 1e-3),
        ({"learning_rate": 1e-3, "value_learning_rate": 2e-4}, 2e-4),
    ):
        trainer = ppo.prepare(small(tmp_path, **options), TASK, [digits])
        module: Any = trainer.engine.module
        rates = {p: group["lr"] for group in trainer.engine.optimizer.param_groups for p in group["params"]}
        assert {rates[p] for p in module.value.parameters()} == {rate}
        assert {rates[p] for p in module.policy.parameters()} == {options["learning_rate"]}
    moved = [p.detach().clone() for p in module.value.parameters()]
    before = [p.detach().clone() for p in module.policy.parameters()]
    ppo.update(trainer, one(trainer))
    # Adam's steps are about as large as the rate.
    assert max((a - b).abs().max().item() for a, b in zip(moved, module.value.parameters())) < 4 * 2 * 2.1e-4
    assert max((a - b).abs().max().item() for a, b in zip(before, module.policy.parameters())) > 1e-3
    with pytest.raises(ValueError, match="value_learning_rate: expected more than 0, or None; got 0"):
        small(tmp_path, value_learning_rate=0.0)


def test_a_run_with_its_value_model_and_reference_as_objects(tmp_path):
    torch.manual_seed(6)
    critic, other = models.build(32, 1)[0], models.build(32, 1)[0]
    config = small(tmp_path, steps=1, save_steps=1)
    trainer = ppo.prepare(config, TASK, [digits], ref_model=other, value_model=critic)
    module: Any = trainer.engine.module
    assert module.value.body is critic.model
    batch = one(trainer)
    some = batch.completions
    with torch.no_grad():
        logprobs = other(some.input_ids, some.attention_mask.long()).logits[:, :-1].double().log_softmax(-1)
    want = logprobs.gather(2, some.input_ids[:, 1:, None])[..., 0]
    kl = (batch.old_logprobs - want)[batch.mask]
    torch.testing.assert_close(batch.kl[batch.mask].double(), kl, atol=1e-5, rtol=1e-4)
    assert ppo.fit(trainer).model_path.with_name("value_model").is_dir()
    with pytest.raises(ValueError, match="ref_model: expected None, for it changes nothing without kl_coef"):
        small(tmp_path, kl_coef=0.0, ref_model="a/b")
    with pytest.raises(ValueError, match="reward_model: expected none beside the one given"):
        ppo.prepare(small(tmp_path, reward_model="a/b"), TASK, reward_model=critic)


def test_several_weighted_rewards_and_a_reward_model_add_up(tmp_path):
    torch.manual_seed(3)
    judge = ScalarModel(models.build(32, 1)[0], torch.nn.Linear(32, 1))
    config = small(tmp_path, rewards=("exact_match", "length=2"), reward_weights=(2.0, 0.5), micro_batch_size=5)
    both = ppo.prepare(config, TASK, reward_model=judge)
    alone = ppo.prepare(small(tmp_path), TASK, reward_model=judge)
    with pytest.raises(ValueError, match="reward_weights: expected none: the reward model's own weight is 1"):
        ppo.prepare(small(tmp_path, reward_weights=(2.0,)), TASK, reward_model=judge)
    assert alone.rewards == []
    batch = one(both)
    functions = ppo.rewards.score(both.rewards, batch.completions.texts, samples_of(both))
    model = ppo.score(alone, batch.completions, samples_of(both))
    torch.testing.assert_close(batch.scores, functions @ torch.tensor([2.0, 0.5]) + model)
    assert model.std() > 1e-3


def test_a_reward_model_from_a_folder_prompts_without_answers_and_its_weights_as_values(tmp_path):
    model, tokenizer = models.build(32, 1)
    for name, made in (("policy", model), ("judge", None)):
        folder = tmp_path / name
        if made is None:
            torch.manual_seed(4)
            made = AutoModelForSequenceClassification.from_pretrained(tmp_path / "policy", num_labels=1)
            torch.nn.init.normal_(made.score.weight)
        made.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{i}+"}) + "\n" for i in range(40)))
    config = Config(
        model=str(tmp_path / "policy"),
        task="prompts",
        data=str(tmp_path / "prompts.jsonl"),
        reward_model=str(tmp_path / "judge"),
        value_model=str(tmp_path / "judge"),
        steps=25,
        prompts_per_step=64,
        max_new_tokens=2,
        learning_rate=3e-3,
        kl_coef=0.001,
        num_ppo_epochs=2,
        output=str(tmp_path / "run"),
        sample_steps=0,
    )
    result = ppo.train(config)
    assert set(result.before) == {"score"}
    scores = [row["objective/scores"] for row in result.metrics if "objective/scores" in row]
    spread = abs(scores[0]) + 0.1
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 0.3 * spread
    assert result.after["score"] > result.before["score"]


# ------------------------------------------------------------------------------------------------ resume, LoRA, dtypes


def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
    """Warm-up, reference, value model, optimiser, controller and data position, all from the checkpoint."""
    calls = 0

    def killed_at(limit):
        def reward(completions, **columns):
            nonlocal calls
            calls += 1
            if calls == limit:
                raise KeyboardInterrupt
            return digits(completions)

        return reward

    def config(name, **changes):
        return small(
            tmp_path,
            output=str(tmp_path / name),
            steps=5,
            save_steps=2,
            eval_steps=2,
            warmup_steps=4,
            warmup_batch_size=8,
            value_model="copy",
            num_minibatches=2,
            num_ppo_epochs=2,
            target_kl=0.01,
            kl_horizon=100,
            lr_schedule="linear",
            top_p=0.8,
            **changes,
        )

    whole = ppo.train(config("whole"), task=TASK, reward_functions=[killed_at(0)])
    for limit in (3, 5):  # once before the run, then in step 2, before any checkpoint but the warm-up's; and in step 4
        name, calls = f"killed{limit}", 0
        with pytest.raises(KeyboardInterrupt):
            ppo.train(config(name), task=TASK, reward_functions=[killed_at(limit)])
        resumed = ppo.train(config(name, resume=True), task=TASK, reward_functions=[killed_at(0)])
        assert without_time(resumed.metrics) == without_time(whole.metrics)
        assert resumed.before == whole.before
        ours = AutoModelForCausalLM.from_pretrained(resumed.model_path)
        theirs = AutoModelForCausalLM.from_pretrained(whole.model_path)
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    coefs = [row["objective/kl_coef"] for row in whole.metrics if "objective/kl_coef" in row]
    assert len(set(coefs)) > 1


def test_after_the_warm_up_reference_and_value_model_are_the_policy(tmp_path):
    trainer = ppo.prepare(small(tmp_path, warmup_steps=3, warmup_batch_size=8, value_model="copy"), TASK, [digits])
    trainer.run.open()
    untrained = copy.deepcopy(trainer.loaded.model)
    assert trainer.warm()
    policy = trainer.loaded.model
    assert any((a != b).any() for a, b in zip(policy.parameters(), untrained.parameters()))
    assert all(
        torch.equal(a, b) for a, b in zip(policy.parameters(), trainer.reference.module.parameters(), strict=True)
    )
    module: Any = trainer.engine.module
    body = module.value.body
    assert all(torch.equal(a, b) for a, b in zip(policy.base_model.parameters(), body.parameters(), strict=True))
    assert one(trainer).kl.abs().max() == 0


def test_lora_trains_adapters_and_values_and_its_reference_is_the_model_without_them(tmp_path):
    pytest.importorskip("peft")
    model, tokenizer = models.build(32, 1)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    config = Config(
        model=str(tmp_path / "base"),
        lora_r=4,
        steps=8,
        prompts_per_step=64,
        max_new_tokens=2,
        learning_rate=2e-2,
        output=str(tmp_path / "run"),
        sample_steps=0,
        eval_steps=0,
    )
    trainer = ppo.prepare(config, TASK, [digits])
    assert trainer.reference is None
    base = {name: p.clone() for name, p in trainer.engine.module.named_parameters() if not p.requires_grad}
    result = ppo.fit(trainer)
    rows = [row for row in result.metrics if "objective/kl" in row]
    assert rows[0]["objective/kl"] == 0
    assert abs(rows[-1]["objective/kl"]) > 1e-3
    now = dict(trainer.engine.module.named_parameters())
    assert all(torch.equal(now[name], p) for name, p in base.items())
    assert now["value.weight"].abs().max() > 0
    assert (result.model_path / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    "changes", [{"mixed_precision": "bf16"}, {"dtype": "bfloat16"}, {"gradient_checkpointing": True}]
)
def test_other_precisions_and_checkpointing_run_and_begin_on_policy(tmp_path, changes):
    trainer = ppo.prepare(small(tmp_path, steps=2, num_ppo_epochs=1, **changes), TASK, [digits])
    metrics = trainer.step(1)
    assert metrics["objective/kl"] == 0
    assert metrics["val/ratio"] == 1
    assert all(math.isfinite(metrics[name]) for name in ("loss", "grad_norm", "policy/entropy_avg"))
    assert trainer.step(2)["objective/kl"] != 0


@pytest.mark.parametrize("value_model", ["shared", "copy"])
def test_images_reach_policy_and_values(tmp_path, value_model):
    torch.manual_seed(0)
    model, processor = tiny_vision.build()
    rows = tiny_vision.samples(5)
    config = Config(
        model="tiny/vision",
        chat_template=True,
        value_model=value_model,
        steps=2,
        prompts_per_step=8,
        num_minibatches=2,
        micro_batch_size=3,
        max_new_tokens=2,
        learning_rate=1e-2,
        output=str(tmp_path / "run"),
        sample_steps=0,
    )
    trainer = ppo.prepare(config, Task(rows, rows, "exact_match"), [digits], None, model, processor)
    result = ppo.fit(trainer)
    assert all(math.isfinite(row["loss"]) for row in result.metrics if "loss" in row)
    batch = one(trainer)
    alone = dataclasses.replace(trainer, config=dataclasses.replace(config, micro_batch_size=1))
    again = one(alone)
    torch.testing.assert_close(again.values[batch.mask], batch.values[batch.mask], atol=1e-5, rtol=0)
    blank = [{**row, "images": [tiny_vision.picture(255)]} for row in rows]
    trainer.task = Task(blank, blank, "exact_match")
    first = batch.mask.long().argmax(dim=1, keepdim=True)  # before anything is sampled
    assert (one(trainer).values.gather(1, first) != batch.values.gather(1, first)).any()


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_minibatches": 5}, r"num_minibatches: expected a divisor of prompts_per_step = 24; got 5"),
        ({"num_ppo_epochs": 0}, "num_ppo_epochs: expected at least 1; got 0"),
        ({"temperature": 0.0}, "temperature: expected more than 0"),
        ({"top_p": 0.0}, "top_p: expected above 0 and at most 1"),
        ({"top_k": -1}, "top_k: expected at least 0"),
        ({"min_p": 2.0}, "min_p: expected at least 0 and at most 1; got 2.0"),
        ({"gamma": 1.01}, "gamma: expected between 0 and 1; got 1.01"),
        ({"lam": -0.1}, "lam: expected between 0 and 1"),
        ({"cliprange": 0.0}, "epsilon_low"),
        ({"cliprange_value": 0.0}, "cliprange_value: expected more than 0"),
        ({"kl_estimator": "k2"}, "kl_estimator: expected one of"),
        ({"target_kl": 0.0}, "target_kl: expected more than 0, or None"),
        ({"target_kl": 1.0, "kl_coef": 0.0}, "kl_coef: expected more than 0 with a target_kl"),
        ({"missing_eos_penalty": -1.0}, "missing_eos_penalty: expected at least 0"),
        ({"kl_coef": math.nan}, "kl_coef: expected at least 0; got nan"),
        ({"rewards": ("length=2",), "reward_weights": (1.0, 2.0)}, "reward_weights: expected one for each"),
        ({"kl_horizon": 5}, "kl_horizon: expected 10000, for it changes nothing without target_kl"),
        ({"kl_coef": 0.0, "kl_estimator": "k3"}, "kl_estimator: expected 'k1', for it changes nothing without kl_coef"),
        ({"data": "x"}, "data: expected none for the task 'arithmetic'"),
        ({"task": "gsm8k"}, "data: expected where the task 'gsm8k' is read from"),
    ],
)
def test_contradictory_options_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        small(tmp_path, **changes)


def test_bad_input_is_refused_before_anything_is_written(tmp_path):
    config = small(tmp_path)
    with pytest.raises(ValueError, match="train data set is empty"):
        ppo.train(config, task=Task([], SEVEN, "exact_match"))
    with pytest.raises(ValueError, match=r"train sample 0: missing \['answer'\]"):
        ppo.train(config, task=Task([{"prompt": "1"}], SEVEN, "exact_match"))
    with pytest.raises(ValueError, match="stop_token: expected one token of the tokenizer; got '77'"):
        ppo.train(dataclasses.replace(config, stop_token="77"), task=TASK)
    with pytest.raises(ValueError, match="stop_token: expected one token of the tokenizer; got 'é'"):
        ppo.train(dataclasses.replace(config, stop_token="é"), task=TASK)
    with pytest.raises(FileNotFoundError, match="reward_model: there is no folder"):
        ppo.train(dataclasses.replace(config, reward_model=str(tmp_path / "gone")), task=TASK)
    with pytest.raises(FileNotFoundError, match="value_model: there is no folder"):
        ppo.train(dataclasses.replace(config, value_model=str(tmp_path / "gone")), task=TASK)
    with pytest.raises(ValueError, match="'<lambda>' returned 1 values for 2 completions"):
        ppo.train(config, task=TASK, reward_functions=[lambda completions, **_: [0.0]])
    with pytest.raises(ValueError, match="exceed the model's context of 1024"):
        ppo.train(config, task=Task([{"prompt": "1" * 1022, "answer": "1"}], SEVEN, "exact_match"))
    assert not (tmp_path / "run").exists()


def test_a_reward_that_breaks_and_a_loss_that_is_not_finite_say_where(tmp_path):
    def breaks(completions, **_):
        return [0.0] * (len(completions) if len(completions) == 2 else 1)

    with pytest.raises(ValueError, match=r"step 1 \(prompts 0 to 23 .*'breaks' returned 1 values for 24 completions"):
        ppo.train(small(tmp_path), task=TASK, reward_functions=[breaks])
    trainer = ppo.prepare(small(tmp_path, output=str(tmp_path / "other"), micro_batch_size=12), TASK, [digits])
    module: Any = trainer.engine.module
    with torch.no_grad():
        module.value.bias.fill_(math.inf)
    with pytest.raises(FloatingPointError, match=r"step 1 \(prompts 0 to 23 of the shuffled training set\): the loss"):
        ppo.fit(trainer)


def test_the_command_line_and_its_plan(tmp_path, capsys):
    flags = [
        "--hidden-size",
        "32",
        "--num-layers",
        "1",
        "--steps",
        "1",
        "--prompts-per-step",
        "8",
        "--max-operand",
        "20",
    ]
    flags += ["--max-new-tokens", "2", "--eval-samples", "8", "--target-kl", "2.5", "--output", str(tmp_path / "run")]
    assert cli.main(["ppo", *flags, "--dry-run"]) == 0
    assert "8 sequences" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    assert cli.main(["ppo", *flags]) == 0
    assert "after PPO: accuracy" in capsys.readouterr().out
    row = rows_of(tmp_path / "run")[1]
    names = {"objective/kl", "objective/entropy", "objective/non_score_reward", "objective/rlhf_reward"}
    names |= {"objective/scores", "policy/approxkl_avg", "policy/clipfrac_avg", "policy/entropy_avg", "loss/policy_avg"}
    names |= {"loss/value_avg", "val/clipfrac_avg", "val/ratio", "val/ratio_var", "val/num_eos_tokens", "lr", "episode"}
    assert names | {"val/explained_variance"} <= set(row)
    assert cli.main(["ppo", *flags, "--lam", "2"]) == 2
    assert "lam: expected between 0 and 1" in capsys.readouterr().err


@pytest.mark.parametrize("value_model", ["shared", "copy"])
@pytest.mark.parametrize(
    "changes", [{"layout": "packed"}, {"layout": "shared"}, {"layout": "shared", "gradient_checkpointing": True}]
)
def test_a_step_is_the_same_in_every_layout(tmp_path, value_model, changes):
    """As of one row a forward in padded rows, values and their gradients among them."""
    found = []
    options = {"value_model": value_model, "num_minibatches": 2, "missing_eos_penalty": 1.0} | changes
    for more in ({"layout": "padded", "micro_batch_size": 1}, {"micro_batch_tokens": 30}):
        trainer = ppo.prepare(small(tmp_path, overwrite=True, **(options | more)), TASK, [digits])
        with torch.no_grad():
            head: Any = trainer.engine.module.value
            for p in head.parameters():
                p.add_(0.01)
        batch = one(trainer)
        grads = tiny.gradients_of_updates(trainer)
        found.append((ppo.update(trainer, batch), grads[0], batch))
    (its, want, rows), (mine, got, laid) = found
    torch.testing.assert_close(laid.values, rows.values, atol=1e-5, rtol=0)
    torch.testing.assert_close(laid.old_logprobs, rows.old_logprobs, atol=1e-5, rtol=0)
    assert mine["loss"] == pytest.approx(its["loss"], abs=1e-6)
    for one_way, other in zip(got, want, strict=True):
        assert (one_way - other).norm() <= 1e-5 * other.norm() + 1e-8


# -------------------------------------------------------------------------------------------------- several processes


@pytest.mark.slow
@pytest.mark.parametrize("value_model", ["shared", "copy"])
def test_two_processes_replicated_or_sharded_do_what_one_does(tmp_path, value_model):
    flags = [
        "--model",
        tiny.saved_model(tmp_path / "base", tied=False),
        "--steps",
        "3",
        "--prompts-per-step",
        "16",
        "--max-operand",
        "20",
    ]
    flags += ["--max-new-tokens", "3", "--num-minibatches", "2", "--num-ppo-epochs", "2", "--micro-batch-size", "3"]
    flags += ["--warmup-steps", "2", "--warmup-batch-size", "8", "--eval-samples", "8", "--value-model", value_model]
    flags += ["--missing-eos-penalty", "1", "--target-kl", "0.01", "--kl-horizon", "100", "--learning-rate", "1e-3"]
    one = launch.run(["ppo", *flags], tmp_path / "one")
    for name, more in (("ddp", []), ("fsdp", ["--fsdp"])):
        two = launch.run(["ppo", *flags, *more], tmp_path / name, processes=2)
        differences = launch.worst(one, two)
        assert {"loss", "grad_norm", "objective/kl", "val/explained_variance", "val/ratio_var"} <= set(differences)
        assert max(differences.values()) < 1e-4, differences
        assert differences["loss"] < 1e-5
        assert ("streamed from 2 shards" in launch.log_of(tmp_path / name).read_text()) == (name == "fsdp")


def test_prompts_need_no_answers_where_no_reward_reads_them(tmp_path):
    rows = [{"prompt": row["prompt"]} for row in SEVEN]
    assert set(ppo.prepare(small(tmp_path), rows, [digits]).evaluate()) == {"score"}
    with pytest.raises(ValueError, match=r"train sample 0: missing \['answer'\]"):
        ppo.prepare(small(tmp_path), rows)


@pytest.mark.parametrize("changes", [{}, {"value_model": "copy"}, {"lora_r": 2}, {"value_model": "copy", "lora_r": 2}])
def test_the_trained_values_are_a_model_to_go_on_with(tmp_path, changes):
    base = {"model": tiny.saved_model(tmp_path / "base"), "hidden_size": 128, "num_layers": 4}
    trainer = ppo.prepare(small(tmp_path, steps=3, learning_rate=1e-2, **base, **changes), TASK, [digits])
    ppo.fit(trainer)
    folder = tmp_path / "run" / "value_model"
    some = one(trainer).completions
    module: Any = trainer.engine.module
    with torch.no_grad():
        want = module(some.batch())[1]
    counted = some.completion_mask[:, 1:]
    assert want.std() > 1e-3
    bias = value.load("value_model", str(folder), torch.float32)[1].bias.item()
    judge = value.value_of(Config(value_model=str(folder)), trainer.loaded)
    torch.testing.assert_close(judge(some.input_ids, some.attention_mask)[:, :-1][counted], want, atol=1e-5, rtol=1e-4)
    theirs = AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True)
    hidden = theirs.base_model(input_ids=some.input_ids, attention_mask=some.attention_mask).last_hidden_state
    torch.testing.assert_close(theirs.score(hidden)[:, :-1, 0][counted] + bias, want, atol=1e-5, rtol=1e-4)
    again = small(tmp_path, **base, value_model=str(folder), overwrite=True)
    with pytest.raises(ValueError, match=r"value_model: expected a path outside of .*value_model, which the run"):
        ppo.prepare(again, TASK, [digits])
    ppo.train(dataclasses.replace(again, output=str(tmp_path / "other")), task=TASK, reward_functions=[digits])

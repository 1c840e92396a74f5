import inspect
import math
import textwrap
from types import SimpleNamespace

import pytest
import torch

from fused_rlhf import advantages
from fused_rlhf.advantages import gae, group_advantages, whiten

NAN = math.nan


def trl_lines(trainer, first, last):
    """The lines of TRL's own rollout method from the one starting `first` up to the one starting `last`, compiled."""
    source = inspect.getsource(trainer._generate_and_score_completions)
    lines = source.splitlines()
    start = next(i for i, line in enumerate(lines) if line.strip().startswith(first))
    stop = next(i for i, line in enumerate(lines) if i > start and line.strip().startswith(last))
    code = compile(textwrap.dedent("\n".join(lines[start:stop])), "trl", "exec")
    return lambda names: exec(code, inspect.getmodule(trainer).__dict__ | names, names)


def scores(num_prompts=5, num_generations=4, functions=3, seed=0):
    """(B, R) scores with unscorable completions: by one function, by all, and groups of one or no scorable left."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(num_prompts * num_generations, functions, generator=generator)
    values[1, 0] = values[2, 1] = values[7] = NAN
    values[8:11] = NAN
    values[12:16] = NAN
    return values


SUM = "sum_then_normalize"


# TRL's normalize_then_sum knows one scale.
@pytest.mark.parametrize(
    ("how", "scale"), [(SUM, "group"), (SUM, "batch"), (SUM, "none"), ("normalize_then_sum", "group")]
)
def test_groups_and_several_rewards_equal_trl(how, scale):
    trl = pytest.importorskip("trl")
    given, weights = scores(), [1.0, 0.5, 2.0]
    names = {
        "self": SimpleNamespace(
            multi_objective_aggregation=how,
            scale_rewards=scale,
            reward_weights=torch.tensor(weights),
            reward_funcs=[None] * 3,
        ),
        "rewards_per_func": given.clone(),
        "num_generations": 4,
        "device": torch.device("cpu"),
    }
    trl_lines(trl.GRPOTrainer, "unscorable_mask =", "# Slice to keep")(names)
    got = advantages.combine_rewards(given, weights, 4, how, scale)
    torch.testing.assert_close(got, names["advantages"], atol=2e-6, rtol=2e-6)
    assert (got[given.isnan().all(1)] == 0).all()


def test_rloo_equals_trl():
    trl = pytest.importorskip("trl")
    names = {
        "self": SimpleNamespace(normalize_advantages=False),
        "rewards": scores()[:, 0],
        "num_generations": 4,
    }
    trl_lines(trl.RLOOTrainer, "grouped_rewards =", "is_std_zero")(names)
    got = advantages.rloo_advantages(scores()[:, 0], 4)
    torch.testing.assert_close(got, names["advantages"], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("scale", ["none", "batch"])
def test_normalize_then_sum_follows_the_scale_of_each_function(scale):
    """Written out for whole groups: each function's centred, scaled scores, weighted, summed and whitened."""
    values = torch.randn(12, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    total = torch.zeros(12, dtype=torch.float64)
    for column, weight in zip(values.unbind(1), (1.0, 3.0)):
        centred = torch.cat([group - group.mean() for group in column.split(4)])
        total += weight * (centred / (column.std() + 1e-4) if scale == "batch" else centred)
    want = (total - total.mean()) / (total.std() + 1e-4)
    got = advantages.combine_rewards(values, [1.0, 3.0], 4, "normalize_then_sum", scale)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, want, atol=1e-13, rtol=1e-13)


def test_group_advantages_by_hand():
    got = group_advantages(torch.tensor([1, 0, 0, 1, 3, 0]), 3)
    first, second = math.sqrt(1 / 3), math.sqrt(7 / 3)  # unbiased standard deviations of (1, 0, 0) and (1, 3, 0)
    want = [(2 / 3) / first, (-1 / 3) / first, (-1 / 3) / first, (-1 / 3) / second, (5 / 3) / second, (-4 / 3) / second]
    torch.testing.assert_close(got, torch.tensor(want), atol=0, rtol=3e-4)  # the 1e-4 beside the std
    assert group_advantages(torch.full((4,), 0.3), 4).abs().max() < 1e-3  # nothing to tell apart, no blow-up


def test_opo_and_remax_by_hand():
    rewards, lengths = torch.tensor([1.0, 0.0, 2.0, NAN, 4.0, 3.0]), torch.tensor([10, 30, 5, 7, 5, 10])
    got = advantages.opo_advantages(rewards, lengths, 3)
    first, second = (10 * 1 + 30 * 0 + 5 * 2) / 45, (5 * 4 + 10 * 3) / 15  # the unscorable completion weighs nothing
    want = [1 - first, 0 - first, 2 - first, 0.0, 4 - second, 3 - second]
    torch.testing.assert_close(got, torch.tensor(want))
    greedy = torch.tensor([0.5, 0.5, NAN, 0.0, 1.0, 3.0])
    assert advantages.remax_advantages(rewards, greedy).tolist() == [0.5, -0.5, 0.0, 0.0, 3.0, 0.0]


def ragged(b=6, t=9, seed=0):
    """(B, T) fp64 rewards and values, and right-padded masks from full to empty."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values = (torch.randn(b, t, generator=generator, dtype=torch.float64) for _ in range(2))
    lengths = torch.tensor([t, t - 1, 4, 1, 0, 5])[:b]
    return rewards, values, torch.arange(t) < lengths[:, None]


def gae_of_a_row(rewards, values, gamma, lam):
    """The definition, summed over k, of one row without padding."""
    n = len(rewards)
    values = [*values, 0.0]
    delta = [rewards[t] + gamma * values[t + 1] - values[t] for t in range(n)]
    return [sum((gamma * lam) ** k * delta[t + k] for k in range(n - t)) for t in range(n)]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.97, 0.0), (0.0, 0.5)])
def test_gae_is_its_definition_on_each_row(gamma, lam):
    rewards, values, mask = ragged()
    got, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    for i in range(len(mask)):
        live = mask[i]
        want = gae_of_a_row(rewards[i][live].tolist(), values[i][live].tolist(), gamma, lam)
        torch.testing.assert_close(got[i][live], torch.tensor(want, dtype=torch.float64), atol=1e-13, rtol=0)
    torch.testing.assert_close(returns, torch.where(mask, got + values, 0.0), atol=0, rtol=0)


def test_gae_identities():
    """gamma = lam = 1: the return is the reward still to come. lam = 0: the advantage is delta. Right V: none at all."""
    rewards, values, mask = ragged()
    inside = torch.where(mask, rewards, 0.0)
    to_come = inside.flip(1).cumsum(1).flip(1) * mask
    advantage, returns = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    torch.testing.assert_close(returns, to_come, atol=1e-13, rtol=0)
    torch.testing.assert_close(advantage, torch.where(mask, to_come - values, 0.0), atol=1e-13, rtol=0)
    for lam in (0.0, 0.7, 1.0):
        assert gae(rewards, to_come, mask, gamma=1.0, lam=lam)[0].abs().max() < 1e-13


def test_gae_steps_over_gaps_and_left_padding():
    rewards, values, _ = ragged(2, 9)
    mask = torch.tensor([[0, 0, 1, 1, 0, 0, 1, 0, 1], [0, 1, 1, 1, 0, 1, 0, 0, 0]]).bool()
    got, _ = gae(rewards, values, mask, gamma=0.9, lam=0.8)
    for i in range(2):
        want = gae_of_a_row(rewards[i][mask[i]].tolist(), values[i][mask[i]].tolist(), 0.9, 0.8)
        torch.testing.assert_close(got[i][mask[i]], torch.tensor(want, dtype=torch.float64), atol=1e-13, rtol=0)


def poisoned(values, mask):
    return values.masked_fill(~mask, NAN)


def test_what_lies_outside_the_mask_never_matters():
    rewards, values, mask = ragged()
    for clean, dirty in zip(
        gae(rewards, values, mask), gae(poisoned(rewards, mask), poisoned(values, mask), mask.int())
    ):
        assert torch.equal(clean, dirty)
        assert (clean[~mask] == 0).all()
    assert torch.equal(whiten(values, mask), whiten(poisoned(values, mask), mask))
    scalar = torch.tensor([1.0, 2.0, NAN, 0.5, 3.0, -1.0])
    plain = advantages.reinforce_pp_advantages(scalar, values, mask, beta=0.1)
    assert torch.equal(plain, advantages.reinforce_pp_advantages(scalar, poisoned(values, mask), mask, beta=0.1))
    assert (plain[~mask] == 0).all()


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten_over_the_mask(shift_mean):
    values, _, mask = ragged()
    values = 3 + 2 * values
    got = whiten(values, mask, shift_mean)[mask]
    inside = values[mask]
    want = (inside - inside.mean()) / (inside.var() + 1e-8).sqrt() + (0 if shift_mean else inside.mean())
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    assert whiten(values, torch.zeros_like(mask)).abs().max() == 0
    assert whiten(torch.tensor([2.0]), torch.tensor([True])).item() == 0


def test_whiten_over_ranks_is_whiten_over_the_whole():
    """Two ranks hold a half each; `total` is what an all-reduce would give them."""
    values, _, mask = ragged()
    halves = [(values[:2], mask[:2]), (values[2:], mask[2:])]
    inside = [torch.where(m, v, 0.0) for v, m in halves]
    count, mean = mask.sum().double(), values[mask].mean()
    sums = torch.stack([count, torch.stack([v.sum() for v in inside]).sum()])
    squares = (values[mask] - mean).square().sum()
    got = [whiten(v, m, total=lambda local: sums if local.ndim else squares) for v, m in halves]
    torch.testing.assert_close(torch.cat(got), whiten(values, mask), atol=1e-13, rtol=0)


def test_moments_over_the_mask():
    values, _, mask = ragged()
    mean, variance = advantages.moments(poisoned(values, mask), mask)
    torch.testing.assert_close(mean, values[mask].mean(), atol=1e-14, rtol=0)
    torch.testing.assert_close(variance, values[mask].var(), atol=1e-14, rtol=0)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_reinforce_pp_by_loops(gamma):
    _, kl, mask = ragged()
    rewards = torch.tensor([1.0, 0.0, 2.0, NAN, 5.0, -1.0], dtype=torch.float64)
    returns = []
    for i in range(len(mask)):
        n = int(mask[i].sum())
        if not rewards[i].isnan():
            r = [-0.2 * kl[i, t].item() + (rewards[i].item() if t == n - 1 else 0.0) for t in range(n)]
            returns += [sum(gamma**k * r[t + k] for k in range(n - t)) for t in range(n)]
    all_returns = torch.tensor(returns, dtype=torch.float64)
    got = advantages.reinforce_pp_advantages(rewards, kl, mask, beta=0.2, gamma=gamma)
    want = (all_returns - all_returns.mean()) / (all_returns.var() + 1e-8).sqrt()
    torch.testing.assert_close(got[mask & ~rewards.isnan()[:, None]], want, atol=1e-12, rtol=1e-12)
    assert (got[3] == 0).all()  # the unscorable completion


def test_the_reward_stands_at_the_last_token():
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]])
    got = advantages.at_last_token(torch.tensor([2.0, -1.0, 7.0]), mask)
    assert got.tolist() == [[0, 2, 0, 0], [0, 0, 0, -1], [0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: group_advantages(torch.ones(4), 3), r"num_generations >= 2, got shape \(4,\) and 3"),
        (lambda: group_advantages(torch.ones(4), 1), r"num_generations >= 2, got shape \(4,\) and 1"),
        (lambda: group_advantages(torch.ones(4), 2, "sum"), "scale: expected 'group'"),  # type: ignore[arg-type]
        (lambda: advantages.combine_rewards(torch.ones(4, 2), [1.0], 2), r"R weights, got \(4, 2\) and 1"),
        (
            lambda: advantages.combine_rewards(torch.ones(4, 1), [1.0], 2, "mean"),  # type: ignore[arg-type]
            "how: expected 'sum_then_normalize'",
        ),
        (lambda: advantages.rloo_advantages(torch.ones(2, 2), 2), r"got shape \(2, 2\) and 2"),
        (lambda: advantages.opo_advantages(torch.ones(4), torch.ones(3), 2), r"lengths must have the shape of rewards"),
        (lambda: advantages.remax_advantages(torch.ones(4), torch.ones(2)), r"greedy_rewards must have the shape"),
        (
            lambda: gae(torch.ones(2, 3), torch.ones(2, 4), torch.ones(2, 3)),
            r"values must have .* \(2, 3\), got \(2, 4\)",
        ),
        (lambda: gae(*[torch.ones(2, 3)] * 3, gamma=1.1), r"gamma must lie in \[0, 1\], got 1.1"),
        (lambda: gae(*[torch.ones(2, 3)] * 3, lam=-0.1), r"lam must lie in \[0, 1\], got -0.1"),
        (lambda: whiten(torch.ones(2, 3), torch.ones(3)), r"mask must have the shape of values \(2, 3\), got \(3,\)"),
        (lambda: advantages.at_last_token(torch.ones(3), torch.ones(2, 3)), r"rewards must be \(B,\)"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()

import math
import sys

import pytest
import torch

from fused_rlhf.trainers import rewards
from fused_rlhf.trainers.rewards import RewardError, exact_match, group_advantages, numeric_answer

SAMPLES = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "2+2=", "answer": "4"}]


def test_exact_match_ignores_white_space_at_the_ends_only():
    assert exact_match(completions=[" 12\n", "1 2", "012"], answer=["12", "12", "12"]) == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        ("so she has 3 and then 1,250 in all.", "1250", 1.0),
        ("#### 18\nbut 20 too", "18", 1.0),
        ("18.0", "18", 1.0),
        ("-5", "5", 0.0),
        ("$5.50", "5.5", 1.0),
        ("none", "5", 0.0),
    ],
)
def test_numeric_answer(completion, answer, right):
    assert numeric_answer(completions=[completion], answer=[answer]) == [right]


def test_group_advantages_by_hand():
    got = group_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0, 3.0, 0.0]), 3)
    first, second = math.sqrt(1 / 3), math.sqrt(7 / 3)  # unbiased standard deviations of (1, 0, 0) and (1, 3, 0)
    want = [(2 / 3) / first, (-1 / 3) / first, (-1 / 3) / first, (-1 / 3) / second, (5 / 3) / second, (-4 / 3) / second]
    torch.testing.assert_close(got, torch.tensor(want), atol=0, rtol=3e-4)  # the 1e-4 beside the std


def test_group_advantages_scales():
    values = torch.tensor([1.0, 0.0, 4.0, 0.0])
    assert group_advantages(values, 2, "none").tolist() == [0.5, -0.5, 2.0, -2.0]
    want = torch.tensor([0.5, -0.5, 2.0, -2.0]) / (values.std() + 1e-4)
    torch.testing.assert_close(group_advantages(values, 2, "batch"), want)
    assert group_advantages(torch.full((4,), 0.3), 4).abs().max() < 1e-3  # nothing to tell apart, no blow-up
    with pytest.raises(ValueError, match="scale: expected 'group'"):
        group_advantages(values, 2, "sum")
    with pytest.raises(ValueError, match=r"shape \(4,\) and 3"):
        group_advantages(values, 3)


def test_an_unscorable_completion_is_in_no_statistic():
    got = group_advantages(torch.tensor([1.0, math.nan, 0.0, math.nan, math.nan, math.nan]), 3)
    want = group_advantages(torch.tensor([1.0, 0.0]), 2)
    assert got.tolist() == [want[0], 0.0, want[1], 0.0, 0.0, 0.0]


def test_weighted_sum_and_nan():
    scores = torch.tensor([[1.0, 2.0], [math.nan, 2.0], [math.nan, math.nan]])
    got = rewards.weighted_sum(scores, [1.0, 0.5])
    assert got[:2].tolist() == [2.0, 1.0]
    assert got[2].isnan()


def test_score_passes_columns_and_takes_none_for_unscorable():
    def by_level(completions, level, **_):
        return [None if n > 1 else n for n in level]

    samples = [{"prompt": "a", "answer": "b", "level": 1}, {"prompt": "c", "answer": "d", "level": 2}]
    got = rewards.score([exact_match, by_level], ["b", "x"], samples)
    assert got[0].tolist() == [1.0, 1.0]
    assert got[1, 0] == 0
    assert got[1, 1].isnan()


def test_own_reward_by_module_and_function(tmp_path, monkeypatch):
    (tmp_path / "my_rewards_module.py").write_text(
        "def length(completions, **_):\n    return [len(c) for c in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))  # resolve adds the working directory
    assert rewards.resolve("my_rewards_module:length")(completions=["ab"]) == [2]
    with pytest.raises(ValueError, match="cannot load 'my_rewards_module:missing'"):
        rewards.resolve("my_rewards_module:missing")
    with pytest.raises(ValueError, match="cannot load 'no_such_module:f'"):
        rewards.resolve("no_such_module:f")
    with pytest.raises(ValueError, match="'exact' is none of"):
        rewards.resolve("exact")


def raises_on_four(completions, answer, **_):
    return [1.0 / (int(a) - 4) for a in answer]


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda completions, **_: [1.0], "returned 1 values for 2 completions"),
        (lambda completions, **_: 1.0, "returned 1.0, expected a list of numbers"),
        (lambda completions, **_: None, "returned None, expected a list of numbers"),
        (lambda completions, **_: ["1", 0.0], r"returned '1', expected a finite number.*prompt '1\+1='"),
        (lambda completions, **_: [0.0, math.inf], r"returned inf, expected a finite number.*prompt '2\+2='"),
        (lambda completions, **_: [0.0, [1]], r"returned \[1\], expected a finite number.*completion '4'"),
        (raises_on_four, r"'raises_on_four' raised ZeroDivisionError.*at prompt '2\+2=', completion '4'"),
    ],
)
def test_a_broken_reward_is_named_with_its_sample(reward, message):
    with pytest.raises(RewardError, match=message):
        rewards.dry_run([exact_match, reward], SAMPLES)

import functools
import math
import queue
import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Qwen3ForSequenceClassification

from fused_rlhf.trainers import model as models
from fused_rlhf.trainers import rewards
from fused_rlhf.trainers.rewards import RewardError, exact_match, numeric_answer
from tests import chats

SAMPLES: list[dict[str, Any]] = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "2+2=", "answer": "4"}]


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


def test_regex_looks_anywhere_and_over_lines():
    reward = rewards.resolve(r"regex=^<think>.*</think>\s*\d+$")
    texts = ["<think>one\ntwo</think> 12", "12", "<think></think>x"]
    assert reward(completions=texts) == [1.0, 0.0, 0.0]
    assert rewards.name_of(reward) == r"regex=^<think>.*</think>\s*\d+$"
    with pytest.raises(ValueError, match=r"rewards: 'regex=\(' cannot be made"):
        rewards.resolve("regex=(")


def test_length_falls_beyond_its_limit():
    reward = rewards.resolve("length=4")
    assert reward(completions=["", "1234", "123456", "12345678", "1" * 99]) == [0.0, 0.0, -0.5, -1.0, -1.0]
    for wrong in ("length=0", "length=x", "length="):
        with pytest.raises(ValueError, match=f"'{wrong}' cannot be made"):
            rewards.resolve(wrong)


def test_a_reward_model_scores_prompt_and_completion(tmp_path):
    torch.manual_seed(0)
    tokenizer = models.char_tokenizer()
    config = models.small_model(tokenizer, 32, 1).config
    config.num_labels = 1
    model = Qwen3ForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    reward = rewards.resolve(f"model={tmp_path}")
    assert isinstance(reward, rewards.RewardModel)
    got = reward(prompts=["1+1=", "2+2="], completions=["2", "44"])
    for value, text in zip(got, ("1+1=2", "2+2=44"), strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        hidden = model.model(ids).last_hidden_state[0, -1]
        assert value == pytest.approx(model.score(hidden).item(), rel=1e-5)  # at the last token, padding or not
    config.num_labels = 3
    Qwen3ForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"a model with one label \(it has 3\)"):
        rewards.resolve(f"model={tmp_path}")
    with pytest.raises(ValueError, match="cannot be made"):
        rewards.resolve(f"model={tmp_path / 'gone'}")


def test_a_reward_model_takes_conversations(tmp_path):
    tokenizer = models.char_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    config = models.small_model(tokenizer, 32, 1).config
    config.num_labels = 1
    Qwen3ForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    reward = rewards.resolve(f"model={tmp_path}")
    assert isinstance(reward, rewards.RewardModel)
    assert reward.text("1+1=", "2") == "[user]1+1=[assistant]2"
    assert reward.text([{"role": "system", "content": "s"}], "2") == "[system]s[assistant]2"
    assert reward.text([{"role": "user", "content": [{"type": "text", "text": "1"}]}], "2") == "[user]1[assistant]2"


@pytest.mark.parametrize("adds", ["", "be"])
@pytest.mark.parametrize("name", ["chatml-bos", "llama3"])
def test_a_reward_model_reads_the_tokens_of_its_template(tmp_path, name, adds):
    tokenizer = chats.tokenizer(name, adds)
    config = models.small_model(tokenizer, 32, 1).config
    config.num_labels = 1
    Qwen3ForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    reward = rewards.resolve(f"model={tmp_path}")
    assert isinstance(reward, rewards.RewardModel)
    messages = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]
    ids = reward.encode([reward.text("1+1=", "2")])["input_ids"][0].tolist()
    assert ids == tokenizer.apply_chat_template(messages, return_dict=False)


def test_a_slow_reward_is_stopped_and_its_sample_named(monkeypatch):
    blocked, end = threading.Event(), threading.Event()

    def slow(completions, answer, **_):
        if "4" in answer:
            blocked.set()
            end.wait()
        return [0.0] * len(completions)

    class Answers(queue.Queue):
        def get(self, block=True, timeout=None):
            """The time is up when the reward is known to hang, and not before: what answers is waited for."""
            while True:
                try:
                    return super().get(timeout=timeout)
                except queue.Empty:
                    if blocked.is_set():
                        blocked.clear()
                        raise

    monkeypatch.setattr(rewards, "queue", SimpleNamespace(SimpleQueue=Answers, Empty=queue.Empty))
    with pytest.raises(RewardError, match=r"'slow' raised TimeoutError: no answer within 0.05 s; at prompt '2\+2='"):
        rewards.score([slow], ["2", "4"], SAMPLES, timeout=0.05)
    end.set()
    monkeypatch.undo()
    assert rewards.score([exact_match], ["2", "5"], SAMPLES, timeout=600).tolist() == [[1.0], [0.0]]
    with pytest.raises(RewardError, match="'raises_on_four' raised ZeroDivisionError"):
        rewards.score([raises_on_four], ["2", "4"], SAMPLES, timeout=600)


def test_a_column_that_a_sample_lacks_is_none():
    def columns(completions, level, **_):
        return [-1.0 if n is None else n for n in level]

    samples = [{**SAMPLES[0], "level": 3}, SAMPLES[1]]
    assert rewards.score([columns], ["2", "4"], samples).tolist() == [[3.0], [-1.0]]


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
        (lambda completions, **_: [0.0, 1e39], r"returned 1e\+39, expected a finite number.*completion '4'"),
        (lambda completions, **_: [0.0, 10**400], r"returned 10+\.\.\., expected a finite number.*completion '4'"),
        (lambda completions, **_: [0.0, b"1"], r"returned b'1', expected a finite number.*completion '4'"),
        (lambda completions, **_: torch.ones(2, 2), r"returned tensor.*expected a finite number.*prompt '1\+1='"),
        (lambda completions, **_: torch.tensor(1.0), r"raised TypeError: .*; it gave no list"),
        (lambda completions, **_: b"ab", "returned b'ab', expected a list of numbers"),
        (lambda completions, **_: {0: 1.0, 1: 0.0}, r"returned \{0: 1.0, 1: 0.0\}, expected a list of numbers"),
        (lambda completions, **_: {0.0, 1.0}, r"returned \{0.0, 1.0\}, expected a list of numbers"),
        (raises_on_four, r"'raises_on_four' raised ZeroDivisionError.*at prompt '2\+2=', completion '4'"),
    ],
)
def test_a_broken_reward_is_named_with_its_sample(reward, message):
    with pytest.raises(RewardError, match=message):
        rewards.dry_run([exact_match, reward], SAMPLES)


def starts_with(completions, letter, **_):
    return [float(text.startswith(letter)) for text in completions]


def test_every_reward_has_a_name_of_its_own():
    some: list[Any] = [functools.partial(starts_with, letter=letter) for letter in "abc"]
    some += [functools.partial(some[0], prompts=[]), exact_match, lambda **_: [], lambda **_: []]
    want = [
        *("starts_with", "starts_with#2", "starts_with#3", "starts_with#4"),
        "exact_match",
        "<lambda>",
        "<lambda>#2",
    ]
    assert rewards.names_of(some) == want
    broken = functools.partial(starts_with, letter=1)
    with pytest.raises(RewardError, match="reward 'starts_with#2' raised TypeError"):
        rewards.score([some[0], broken], ["2", "4"], SAMPLES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f(completions, **_)\n    return 1\n", r"SyntaxError: expected ':' \(broken_0\.py, line 1\)"),
        ("1 / 0\n", "ZeroDivisionError: division by zero"),
        ("import no_such_thing\n", "ModuleNotFoundError: No module named 'no_such_thing'"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_reason(tmp_path, monkeypatch, text, message):
    name = "broken_0" if "return" in text else f"broken_{len(text)}"
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    with pytest.raises(ValueError, match=f"rewards: cannot load '{name}:f': {message}"):
        rewards.resolve(f"{name}:f")

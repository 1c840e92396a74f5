"""Rewards of completions.

A reward is a function `(prompts, completions, **columns) -> one number per completion`, where `columns` are the other
columns of the samples (`answer`, ...) as lists of the same length, so that `def f(completions, answer, **_)` is one.
Samples have no columns called `prompts` or `completions` (`data.check`).
None or NaN says that a completion cannot be scored: it is left out of its group's statistics and gets no advantage.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import math
import os
import queue
import re
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BatchEncoding

from fused_rlhf.trainers.config import require
from fused_rlhf.trainers.conversation import render
from fused_rlhf.trainers.data import Task, short
from fused_rlhf.trainers.pictures import Picture
from fused_rlhf.trainers.rollout_config import RolloutConfig

Reward = Callable[..., Sequence[float | None]]  # with a __name__, if it is no plain function, to be called by

LARGEST = torch.finfo(torch.float32).max
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


class RewardError(ValueError):
    """A reward function raised, or returned something that is not one number per completion."""


def exact_match(completions: Sequence[str], answer: Sequence[Any], **_: Any) -> list[float]:
    """1 where the completion, white space at its ends aside, is the answer; else 0."""
    return [float(got.strip() == str(want).strip()) for got, want in zip(completions, answer, strict=True)]


def numeric_answer(completions: Sequence[str], answer: Sequence[Any], **_: Any) -> list[float]:
    """1 where the completion's number equals the answer's: the first one after `####` if that occurs, else the last."""
    return [
        float((number := number_in(got)) is not None and number == number_in(str(want)))
        for got, want in zip(completions, answer, strict=True)
    ]


def number_in(text: str) -> Fraction | None:
    _, marker, after = text.rpartition("####")
    numbers = NUMBER.findall(after if marker else text)
    return Fraction(numbers[0 if marker else -1].replace(",", "")) if numbers else None


def regex(pattern: str) -> Reward:
    """`regex=PATTERN`: 1 where the pattern is found in the completion (`.` matches line ends too), else 0."""
    compiled = re.compile(pattern, re.DOTALL)

    def matches(completions: Sequence[str], **_: Any) -> list[float]:
        return [float(compiled.search(text) is not None) for text in completions]

    return matches


def length(longest: str) -> Reward:
    """`length=N`: 0 up to N characters, then falling to -1 at 2 N and below."""
    limit = int(longest)
    require(limit > 0, "rewards, length", longest, "a positive number of characters")

    def penalty(completions: Sequence[str], **_: Any) -> list[float]:
        return [-min(max(len(text) - limit, 0) / limit, 1.0) for text in completions]

    return penalty


class RewardModel:
    """`model=FOLDER_OR_ID`: the score of a sequence classification model with one label for prompt and completion."""

    def __init__(self, name: str, batch_size: int = 16) -> None:
        self.__name__ = f"model={name}"
        self.batch_size = batch_size
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        self.model = AutoModelForSequenceClassification.from_pretrained(name).eval()
        labels = self.model.config.num_labels
        require(labels == 1, "rewards", f"model={name}", f"a model with one label (it has {labels})")
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model.config.pad_token_id = self.tokenizer.pad_token_id  # where the model looks for the last token

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], **_: Any) -> list[float]:
        texts = [self.text(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        scores: list[float] = []
        with torch.no_grad():
            for i in range(0, len(texts), self.batch_size):
                inputs = self.encode(texts[i : i + self.batch_size])
                scores += self.model(**inputs.to(self.model.device)).logits[:, 0].float().tolist()
        return scores

    def encode(self, texts: list[str]) -> BatchEncoding:
        """Padded ids; a chat template has put special tokens where they belong."""
        plain = not self.tokenizer.chat_template
        return self.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=plain)

    def text(self, prompt: Any, completion: str) -> str:
        """The two as a conversation by the model's chat template; without one, or with plain text, end to end."""
        if isinstance(prompt, str) and not self.tokenizer.chat_template:
            return prompt + completion
        return render(self.tokenizer, prompt, completion)


REWARDS: dict[str, Reward] = {"exact_match": exact_match, "numeric_answer": numeric_answer}
MADE: dict[str, Callable[[str], Reward]] = {"regex": regex, "length": length, "model": RewardModel}


def resolve(name: str) -> Reward:
    """A reward by its name: exact_match, numeric_answer, regex=PATTERN, length=N, model=FOLDER_OR_ID, or your own by
    `module:function`, for which the working directory is searched too.

    Raises ValueError saying why there is none.
    """
    if name in REWARDS:
        return REWARDS[name]
    kind, equals, argument = name.partition("=")
    if equals and kind in MADE:
        try:
            reward = MADE[kind](argument)
        except (re.error, ValueError, OSError) as error:
            raise ValueError(f"rewards: {name!r} cannot be made: {error}") from error
        reward.__name__ = name
        return reward
    module_name, colon, attribute = name.partition(":")
    if not colon:
        makers = [f"{maker}=..." for maker in MADE]
        raise ValueError(f"rewards: {name!r} is none of {[*REWARDS, *makers]} and no module:function")
    # A console script has its own folder on the path, not the one it is called in, where a module of the user's lies.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        reward = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:  # whatever a file of the user's raises when it is read
        raise ValueError(f"rewards: cannot load {name!r}: {type(error).__name__}: {error}") from error
    if not callable(reward):
        raise ValueError(f"rewards: {name!r} is a {type(reward).__name__}, expected a function")
    return reward


def named(given: Sequence[Reward] | None, config: RolloutConfig) -> list[Reward]:
    """The functions given, or those that `config` names; maybe none. Raises ValueError as `resolve`."""
    return list(given or map(resolve, config.rewards))


def reads_answers(reward: Reward) -> bool:
    """Whether it cannot be called without the column `answer`."""
    try:
        parameter = inspect.signature(reward).parameters.get("answer")
    except (TypeError, ValueError):  # a builtin tells nothing
        return False
    return parameter is not None and parameter.default is inspect.Parameter.empty


def choose(given: Sequence[Reward] | None, config: RolloutConfig, task: Task, device: torch.device) -> list[Reward]:
    """The functions of a run: those `named`, or the task's own; tried on two answers of the task.

    Raises ValueError for an unknown name or weights that are not one per function, RewardError as `score`.
    """
    functions, weights = list(given or [resolve(task.reward)]), config.reward_weights
    require(len(weights) in (0, len(functions)), "reward_weights", weights, "one per reward")
    for function in functions:
        if isinstance(function, RewardModel):
            function.model.to(device)
    dry_run(functions, task.train, config.reward_timeout)
    return functions


def name_of(reward: Reward) -> str:
    """Its `__name__`; a partial goes by the name of its function."""
    while isinstance(reward, functools.partial):
        reward = reward.func
    return getattr(reward, "__name__", type(reward).__name__)


def names_of(rewards: Sequence[Reward]) -> list[str]:
    """One for each: where several share a name, its second owner is called `name#2`, and so on."""
    names: list[str] = []
    for name in map(name_of, rewards):
        numbered = (f"{name}#{i}" for i in itertools.count(2))
        names.append(name if name not in names else next(other for other in numbered if other not in names))
    return names


def score(
    rewards: Sequence[Reward], completions: Sequence[str], samples: Sequence[dict[str, Any]], timeout: float = 0.0
) -> Tensor:
    """Rewards of the completions, (B, R) fp32 with NaN where unscorable.

    Raises RewardError, naming the function and the sample, where a function raises, takes longer than `timeout` seconds
    (0: it may), or returns anything but one finite number or None per completion.
    """
    named = zip(names_of(rewards), rewards)
    return torch.stack([_call(name, reward, completions, samples, timeout) for name, reward in named], dim=1)


def dry_run(rewards: Sequence[Reward], samples: Sequence[dict[str, Any]], timeout: float = 0.0) -> None:
    """Score the answers of the first two samples as if a model had given them: a broken reward shows before a run."""
    some = samples[:2]
    score(rewards, [str(sample.get("answer", "")) for sample in some], some, timeout)


def _call(
    name: str, reward: Reward, completions: Sequence[str], samples: Sequence[dict[str, Any]], timeout: float
) -> Tensor:
    try:
        values = _within(timeout, reward, completions, samples)
    except Exception as error:
        where = _first_failing(reward, completions, samples, timeout)
        raise RewardError(f"reward {name!r} raised {type(error).__name__}: {error}; {where}") from error
    if isinstance(values, (str, bytes, Mapping, Set)) or not isinstance(values, Iterable):
        raise RewardError(f"reward {name!r} returned {short(values)}, expected a list of numbers")
    try:
        values = list(values)
    except Exception as error:  # of a generator, or a tensor without dimensions
        raise RewardError(f"reward {name!r} raised {type(error).__name__}: {error}; it gave no list") from error
    if len(values) != len(completions):
        raise RewardError(f"reward {name!r} returned {len(values)} values for {len(completions)} completions")
    numbers = []
    for value, completion, sample in zip(values, completions, samples, strict=True):
        try:
            number = math.nan if value is None else float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):  # the last of a tensor of several numbers
            number = math.inf
        if abs(number) > LARGEST or isinstance(value, (str, bytes)):
            at = _place(completion, sample)
            raise RewardError(f"reward {name!r} returned {short(value)}, expected a finite number or None; {at}")
        numbers.append(number)
    return torch.tensor(numbers, dtype=torch.float32)


def _within(
    seconds: float, reward: Reward, completions: Sequence[str], samples: Sequence[dict[str, Any]]
) -> Sequence[float | None]:
    """Call a reward; raises TimeoutError where it takes longer. A thread that never returns does not hold up the exit."""
    arguments = _arguments(completions, samples)
    if seconds <= 0:
        return reward(**arguments)
    answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            answers.put((reward(**arguments), None))
        except BaseException as error:
            answers.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        values, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if error is not None:
        raise error
    return values


def _arguments(completions: Sequence[str], samples: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for sample in samples for name in sample)
    columns = {name: [_shown(sample.get(name)) for sample in samples] for name in names}
    return {"prompts": columns.pop("prompt"), "completions": list(completions), **columns}


def _shown(value: Any) -> Any:
    """A column's value as its function gets it: pictures loaded."""
    if isinstance(value, list) and value and all(isinstance(one, Picture) for one in value):
        return [one.load() for one in value]
    return value


def _place(completion: str, sample: dict[str, Any]) -> str:
    return f"at prompt {sample['prompt']!r}, completion {completion!r}"


def _first_failing(
    reward: Reward, completions: Sequence[str], samples: Sequence[dict[str, Any]], timeout: float
) -> str:
    """The sample on which a reward raises when it is called on one sample at a time."""
    for completion, sample in zip(completions, samples, strict=True):
        try:
            _within(timeout, reward, [completion], [sample])
        except Exception:
            return _place(completion, sample)
    return f"in a batch of {len(completions)} completions, at none of them alone"

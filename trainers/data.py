"""Prompts with a verifiable answer.

A sample is a dict with `prompt`, a text or a list of messages, and `answer`, and maybe `images`, `tools` and
`chat_template_kwargs`; whatever else it holds reaches the reward functions as well. A task is a list of samples to train
on, another to be tested on, and the reward that says what a right answer is.
"""

from __future__ import annotations

import functools
import hashlib
import json
import operator
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

from fused_rlhf.trainers import pictures, shapes
from fused_rlhf.trainers.config import require
from fused_rlhf.trainers.rollout_config import PROMPT, RolloutConfig

Sample = dict[str, Any]
T = TypeVar("T")

RESERVED = ("prompts", "completions")  # the first two arguments of a reward

# A calculator annotation of GSM8K, `<<48/2=24>>`, and the expressions that the steps task takes from them.
ANNOTATION = re.compile(r"<<([^<>=]+)=([^<>=]+)>>")
BINARY = re.compile(r"(\d+)([-+*/])(\d+)")
OPERATORS: dict[str, Callable[[Fraction, Fraction], Fraction]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}


class Row(Sample):
    """A sample that knows where it comes from, for messages: some are held out, and the rest is shuffled."""

    def __init__(self, sample: Sample, where: str) -> None:
        super().__init__(sample)
        self.where = where


@dataclass(frozen=True)
class Task:
    """What to train on, what to be tested on, and the name of the reward that decides whether an answer is right."""

    train: Sequence[Sample]
    test: Sequence[Sample]
    reward: str
    note: str = ""  # where the samples come from, and what was left out

    @property
    def pictures(self) -> bool:
        """Whether some sample has one."""
        return any(sample.get("images") for sample in (*self.train, *self.test))


def load_for(config: RolloutConfig, given: Task | Sequence[Sample] | None = None, answers: bool = True) -> Task:
    """The task that `config` asks for, or the one given, maybe as a list of samples; checked as `check` says."""
    if given is None:
        task = load(config.task, config.data, max_operand=config.max_operand, seed=config.split_seed, answers=answers)
    else:
        task = given if isinstance(given, Task) else in_memory(given, seed=config.split_seed, answers=answers)
        task = replace(task, train=list(task.train), test=list(task.test))  # a slice of a data set would be no list
    check(task, answers)
    train, test = (
        formatted(name, gathered(name, samples), config.prompt_format)
        for name, samples in (("train", task.train), ("test", task.test))
    )
    return replace(task, train=train, test=test)


def formatted(name: str, samples: list[Sample], pattern: str) -> list[Sample]:
    """The samples of a split with their prompts put into `pattern`. Raises ValueError for prompts that are messages."""
    if pattern == PROMPT:
        return samples
    rows: list[Sample] = []
    for index, sample in enumerate(samples):
        where = where_of(sample, name, index)
        require(isinstance(sample["prompt"], str), "prompt_format", pattern, f"{PROMPT}, for {where} has messages")
        rows.append(Row({**sample, "prompt": pattern.replace(PROMPT, sample["prompt"])}, where))
    return rows


def gathered(name: str, samples: Sequence[Sample]) -> list[Sample]:
    """The samples of a split with their pictures checked, in the column `images`. Raises as `pictures.gathered`."""
    names = [where_of(sample, name, index) for index, sample in enumerate(samples)]
    return [Row(pictures.gathered(sample, where), where) for sample, where in zip(samples, names)]


def load(name: str, source: str | None, *, max_operand: int, seed: int, answers: bool = True) -> Task:
    """The task of that name, read from `source`; see the functions below."""
    if name == "arithmetic":
        return arithmetic(max_operand, seed=seed)
    if name == "pictures":
        return looking(seed)
    if source is None:
        raise ValueError(f"data: expected where the task {name!r} is read from; got None")
    if name == "gsm8k-steps":
        return gsm8k_steps(source, max_operand)
    return gsm8k(source) if name == "gsm8k" else prompts(source, seed=seed, answers=answers)


def arithmetic(max_operand: int = 99, operators: str = "+-", num_test: int = 500, seed: int = 0) -> Task:
    """Every `a+b=` and `a-b=` (a >= b) up to `max_operand`, each once; `num_test` of them are held out of training."""
    samples = [
        {"prompt": f"{a}{sign}{b}=", "answer": str(OPERATORS[sign](Fraction(a), Fraction(b)))}
        for sign in operators
        for a in range(max_operand + 1)
        for b in range(max_operand + 1)
        if sign != "-" or a >= b
    ]
    if num_test >= len(samples):
        raise ValueError(f"num_test: {num_test} leaves nothing of the {len(samples)} expressions to train on")
    random.Random(seed).shuffle(samples)
    note = f"a {' or '.join(operators)} b, operands up to {max_operand}; no test expression occurs in training"
    return Task(samples[num_test:], samples[:num_test], "exact_match", note)


def looking(seed: int = 0, num_train: int = 4000, num_test: int = 500) -> Task:
    """The generated pictures of `shapes`, no test picture among those to train on."""
    samples = shapes.samples(num_train + num_test, seed)
    note = f"squares on {shapes.SIZE} x {shapes.SIZE} pixels; one answer in four is right without looking"
    return Task(samples[:num_train], samples[num_train:], "exact_match", note)


def steps_of(answer: str, max_operand: int) -> list[Sample]:
    """The calculator steps of a GSM8K answer that are `a op b = c` in non-negative integers, a and b <= `max_operand`.

    Steps with decimals, brackets, more than two operands or an annotated result that is not exactly right are left out.
    """
    samples = []
    for expression, result in ANNOTATION.findall(answer):
        match = BINARY.fullmatch(expression.strip())
        if match is None or not result.strip().isdecimal():
            continue
        a, b = Fraction(match[1]), Fraction(match[3])
        if max(a, b) > max_operand or (match[2] == "/" and b == 0):
            continue
        if OPERATORS[match[2]](a, b) == Fraction(result.strip()):
            samples.append({"prompt": f"{int(a)}{match[2]}{int(b)}=", "answer": str(int(result))})
    return samples


def gsm8k_steps(folder: str | Path, max_operand: int = 20) -> Task:
    """The calculator steps of `folder`/train.jsonl and test.jsonl as prompts: `48/2=`, answer `24`."""
    splits: list[list[Sample]] = []
    notes = []
    for name in ("train.jsonl", "test.jsonl"):
        answers = [row["answer"] for row in read_jsonl(Path(folder) / name, ("question", "answer"))]
        splits.append([sample for answer in answers for sample in steps_of(answer, max_operand)])
        total = sum(len(ANNOTATION.findall(answer)) for answer in answers)
        notes.append(f"{name} {len(splits[-1])} of {total} steps")
    seen = {sample["prompt"] for sample in splits[0]}
    unseen = sum(sample["prompt"] not in seen for sample in splits[1])
    note = f"operands up to {max_operand}: {', '.join(notes)}; {unseen} of the test steps do not occur in training"
    train, test = splits
    return Task(train, test, "exact_match", note)


def gsm8k(folder: str | Path) -> Task:
    """Whole GSM8K questions; the answer is the number after `####`."""
    splits: list[list[Sample]] = []
    for name in ("train.jsonl", "test.jsonl"):
        path = Path(folder) / name
        samples = []
        for number, row in enumerate(read_jsonl(path, ("question", "answer")), 1):
            _, marker, answer = row["answer"].rpartition("####")
            if not marker:
                raise ValueError(f"{path}, row {number}: the answer has no '####' before its number")
            prompt = f"Question: {row['question']}\nAnswer:"
            samples.append({"prompt": prompt, "answer": answer.strip().replace(",", "")})
        splits.append(samples)
    train, test = splits
    return Task(train, test, "numeric_answer", f"GSM8K questions of {folder}")


def prompts(source: str | Path, num_test: int = 500, seed: int = 0, answers: bool = True) -> Task:
    """Your own samples, each with `prompt` (a text or a list of messages) and, unless `answers` is false, `answer`.

    They are read as `read_splits` says. Where there is no test split, `num_test` rows (at most a fifth) are held out.
    """
    splits = read_splits(source, columns_of(answers))
    train, test = (
        rows_of(r, f"{source}, {name}row", answers, 1) for r, name in zip(splits, ("", "test "), strict=True)
    )
    if not test:
        train, test = hold_out(train, num_test, seed)
    return Task(train, test, "exact_match", f"prompts of {source}")


def in_memory(
    samples: Sequence[Sample] | Mapping[str, Sequence[Sample]], num_test: int = 500, seed: int = 0, answers: bool = True
) -> Task:
    """Samples as they are, `num_test` of them (at most a fifth) held out; splits `train` and maybe `test` of a mapping."""
    if isinstance(samples, Mapping):
        require("train" in samples, "task", sorted(samples), "a list of samples, or splits called train and test")
        train, test = (rows_of(samples.get(name, ()), f"{name} sample", answers) for name in ("train", "test"))
        train, test = (train, test) if test else hold_out(train, num_test, seed)
        return Task(train, test, "exact_match", f"{len(train) + len(test)} samples in memory")
    rows = rows_of(samples, "train sample", answers)
    return Task(*hold_out(rows, num_test, seed), "exact_match", f"{len(rows)} samples in memory")


def rows_of(samples: Iterable[Sample], name: str, answers: bool, first: int = 0) -> list[Sample]:
    """Samples that are called `name` and their number. Raises as `check_sample`, of the first that cannot be used."""
    rows: list[Sample] = []
    for number, sample in enumerate(samples, first):
        check_sample(sample, answers, f"{name} {number}")
        rows.append(Row(sample, f"{name} {number}"))
    return rows


def where_of(sample: Sample, name: str, index: int) -> str:
    """What messages call the sample with this index in the split `name`."""
    return sample.where if isinstance(sample, Row) else f"{name} sample {index}"


def read_splits(source: str | Path, columns: Sequence[str]) -> tuple[list[Sample], list[Sample]]:
    """-> training and test rows (the latter maybe none) of a folder with train.jsonl and test.jsonl (or .parquet), a
    .jsonl or .parquet file, or a hub data set's id.

    Raises FileNotFoundError, or ValueError naming file, row and columns where a row lacks one of `columns`, or where a
    hub set has no training split.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        suffix = ".parquet" if (path / "train.parquet").is_file() else ".jsonl"
        return _read_file(path / f"train{suffix}", columns), _read_file(path / f"test{suffix}", columns)
    if path.suffix in (".jsonl", ".parquet"):
        return _read_file(path, columns), []
    if str(source).count("/") != 1 or path.parent.is_dir():
        raise FileNotFoundError(f"data: there is no folder or .jsonl or .parquet file {str(path)!r}")
    from datasets import load_dataset  # slow to import, and only parquet files and the hub need it

    splits = load_dataset(str(source))
    if "train" not in splits:
        raise ValueError(f"data: the set {source} has no split 'train'; it has {sorted(splits)}")
    train, test = list(splits["train"]), list(splits["test"]) if "test" in splits else []
    for name, rows in (("train", train), ("test", test)):
        for number, row in enumerate(rows, 1):
            require_columns(row, columns, f"{source}, {name} row {number}")
    return train, test


def hold_out(rows: Sequence[Sample], num_test: int, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Shuffled rows without, and the `num_test` rows (at most a fifth) that are held out."""
    shuffled = random.Random(seed).sample(rows, len(rows))
    num_test = min(num_test, len(rows) // 5)
    return shuffled[num_test:], shuffled[:num_test]


def _read_file(path: Path, columns: Sequence[str]) -> list[Sample]:
    return [pictures.located(row, path.parent) for row in _rows_of(path, columns)]


def _rows_of(path: Path, columns: Sequence[str]) -> list[Sample]:
    if path.suffix != ".parquet":
        return read_jsonl(path, columns)
    if not path.is_file():
        raise FileNotFoundError(f"data: there is no file {str(path)!r}")
    from datasets import load_dataset

    rows = list(load_dataset("parquet", data_files=str(path), split="train"))
    for number, row in enumerate(rows, 1):
        require_columns(row, columns, f"{path}, row {number}")
    return rows


def read_jsonl(path: Path, columns: Sequence[str]) -> list[Sample]:
    """The rows of a JSON-lines file. Raises naming the file, and the row, where one is not an object with `columns`."""
    if not path.is_file():
        raise FileNotFoundError(f"data: there is no file {str(path)!r}")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: expected an object with {list(columns)}, got {line[:60]!r}")
        require_columns(row, columns, f"{path}, line {number}")
        rows.append(row)
    return rows


def require_columns(row: Sample, columns: Sequence[str], where: str) -> None:
    """Raises ValueError where `row` is no dict of columns by their names, or lacks one of `columns`."""
    named = isinstance(row, dict) and all(isinstance(name, str) for name in row)
    require(named, where, row, f"a dict of columns by their names, {' and '.join(columns)} among them")
    missing = [name for name in columns if name not in row]
    if missing:
        raise ValueError(f"{where}: missing {missing}; the columns there are {sorted(row)}{_about_ids(row)}")


def _about_ids(row: Sample) -> str:
    made = [name for name in row if name.endswith("_ids")]
    return f"; {made} are not read: expected texts or lists of messages, not token ids" if made else ""


def refuse_ids(row: Sample, name: str, where: str) -> None:
    """Raises ValueError where an optional column is there as token ids alone."""
    made = [column for column in (f"{name}_input_ids", f"{name}_ids") if row.get(column) is not None]
    if made and row.get(name) is None:
        raise ValueError(f"{where}: {name}: expected a text or a list of messages, got token ids alone, {made[0]!r}")


def columns_of(answers: bool) -> tuple[str, ...]:
    return ("prompt", "answer") if answers else ("prompt",)


def check(task: Task, answers: bool = True) -> None:
    """Raises ValueError where there is nothing to train on, and as `check_sample`."""
    if len(task.train) == 0:
        raise ValueError("the train data set is empty: expected at least one sample with a prompt and an answer")
    for name, samples in (("train", task.train), ("test", task.test)):
        for index, sample in enumerate(samples):
            check_sample(sample, answers, where_of(sample, name, index))


def check_sample(sample: Sample, answers: bool, where: str) -> None:
    """Raises ValueError where it is no dict with a `prompt` and, with `answers`, an `answer`; null is none."""
    require_columns(sample, columns_of(answers), where)
    if answers and sample["answer"] is None:
        raise ValueError(f"{where}: answer: expected one, got None")
    taken = [column for column in RESERVED if column in sample]
    if taken:
        raise ValueError(
            f"{where}: the column {taken[0]!r} must have another name: a reward function gets what the model was asked "
            "and said under that one"
        )
    check_prompt(sample["prompt"], where)


def check_prompt(prompt: Any, where: str) -> None:
    """Raises ValueError unless `prompt` is a text, not empty, or a list of messages with role, and content or calls."""
    if not (isinstance(prompt, str) or are_messages(prompt)) or not prompt:
        raise ValueError(
            f"{where}: prompt must be a text or a list of messages with role and content, not empty; got {short(prompt)}"
        )
    if isinstance(prompt, str):
        check_text(prompt, where, "prompt")
    else:
        check_contents(prompt, where, "prompt")


def check_text(text: str, where: str, field: str) -> None:
    """Raises ValueError where a text cannot be encoded, for JSON may hold halves of characters (`"\\ud83d"`)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise ValueError(f"{where}: {field}: expected whole characters, got {half!r} at {error.start}") from None


def are_messages(value: Any) -> bool:
    """Whether it is a list of messages, each with a role, and with content or tool calls."""
    return isinstance(value, list) and all(
        isinstance(m, Mapping) and isinstance(m.get("role"), str) and ("content" in m or bool(m.get("tool_calls")))
        for m in value
    )


def check_contents(messages: Sequence[Mapping[str, Any]], where: str, field: str) -> None:
    """Raises ValueError where a message's content is neither a text nor in parts, each with its type, nor null."""
    for message in messages:
        content = message.get("content")
        parts = content if isinstance(content, list) else []
        typed = all(isinstance(part, Mapping) and isinstance(part.get("type"), str) for part in parts)
        if not (content is None or isinstance(content, (str, list))) or not typed:
            raise ValueError(
                f"{where}: {field}: expected content as a text or in parts with a type, got {short(content)}"
            )
        for part in parts:
            if part["type"] == "text" and not isinstance(part.get("text"), (str, type(None))):
                raise ValueError(f"{where}: {field}: expected a part of type 'text' with a text, got {short(part)}")
        texts = [content] if isinstance(content, str) else [part.get("text") for part in parts]
        for text in texts:
            check_text(text if isinstance(text, str) else "", where, field)


def short(value: Any) -> str:
    """Its repr for a message, cut."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def fingerprint(rows: Iterable[Any]) -> str:
    """The same for the same samples in the same order, in every process."""

    def told(value: Any) -> str:
        if isinstance(value, bytes):
            return hashlib.sha256(value).hexdigest()
        text = str(pictures.described(value))  # unless that is an address
        return text if " at 0x" not in text else f"{type(value).__name__} {getattr(value, 'size', '')}"

    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, default=told, skipkeys=True).encode())
    return digest.hexdigest()


def asked(sample: Sample) -> str:
    """What a sample asks, its pictures included, to be compared."""
    return json.dumps([sample["prompt"], sample.get("images")], default=pictures.described)


def batch_at(samples: Sequence[T], seed: int, start: int, count: int) -> list[T]:
    """Samples number start ... start + count - 1 of an endless stream, in a new order in every epoch.

    Nothing is remembered between calls, so that a run can go on from any step.
    """
    return [
        samples[_order(len(samples), seed, i // len(samples))[i % len(samples)]] for i in range(start, start + count)
    ]


@functools.lru_cache(maxsize=8)  # a shuffle of the whole set; every sample of a step asks for one
def _order(length: int, seed: int, epoch: int) -> list[int]:
    return random.Random(f"{seed} {epoch}").sample(range(length), length)

"""Preference data as people write it: rows of a prompt and two completions, one chosen over the other.

    row         prompt, chosen, rejected: texts or lists of messages. Without a prompt it is the beginning that chosen
                and rejected share; two conversations may hold it all the same. images (or image): those of the prompt.
                tools, chat_template_kwargs: what the chat template gets besides the messages.
                ref_chosen_logps, ref_rejected_logps: summed log-probs of a reference, where they are known
    Preference  a row that has been checked

The prompt of a pair of conversations is what both begin with. `pairs` makes token ids of them.
"""

from __future__ import annotations

import json
import math
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fused_rlhf.trainers import conversation, pictures, shapes
from fused_rlhf.trainers.config import require
from fused_rlhf.trainers.conversation import Text, without_nulls
from fused_rlhf.trainers.data import (
    Sample,
    are_messages,
    check_contents,
    check_text,
    read_jsonl,
    read_splits,
    refuse_ids,
    require_columns,
    short,
)
from fused_rlhf.trainers.inputs import common_start
from fused_rlhf.trainers.pictures import Message, Picture

if TYPE_CHECKING:
    from fused_rlhf.trainers.dpo_config import Config

REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
SOLVERS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


@dataclass(frozen=True)
class Preference:
    """A checked row: all texts, or all lists of messages."""

    where: str  # file and row, for messages
    prompt: Text | None  # None: the beginning that chosen and rejected, two texts, share
    chosen: Text
    rejected: Text
    images: tuple[Picture, ...] = ()
    ref: tuple[float, float] | None = None  # summed log-probs of chosen and rejected
    columns: dict[str, Any] = field(default_factory=dict)  # tools, chat_template_kwargs

    @property
    def row(self) -> dict[str, Any]:
        """Its prompt as `conversation.encode` takes it."""
        return {"prompt": self.prompt, "images": list(self.images), **self.columns}


@dataclass(frozen=True)
class Preferences:
    """What to train on, what is held out, and where it all comes from."""

    train: Sequence[Preference]
    test: Sequence[Preference]
    note: str = ""


def load_for(config: Config, rows: Sequence[Sample] | None, test_rows: Sequence[Sample]) -> Preferences:
    """The pairs that `config` asks for, or the rows given. Raises as `load` and `check_row`."""
    if rows is None and config.task == "pictures":
        return looking(config.split_seed)
    if rows is None:
        require(config.data is not None, "data", None, f"where the pairs of the task {config.task!r} are read from")
        return load(config.task, str(config.data), config.num_test, config.split_seed)
    require(config.data is None, "data", config.data, "none where rows are given")
    train, test = check(rows, "row"), check(test_rows, "test row")
    return Preferences(train, test) if test else Preferences(*hold_out(train, config.num_test, config.split_seed))


def looking(seed: int, num_train: int = 2000, num_test: int = 500) -> Preferences:
    """The generated pictures of `shapes`, no test picture among those to train on."""
    found = check(shapes.pairs(num_train + num_test, seed), "row")
    note = f"squares on {shapes.SIZE} x {shapes.SIZE} pixels; one pair in two is right without looking"
    return Preferences(found[:num_train], found[num_train:], note)


def load(task: str, source: str, num_test: int, seed: int) -> Preferences:
    """The pairs of a file, a folder or a hub id, as `data.read_splits` reads it, or those of `gsm8k_solutions`.

    Raises FileNotFoundError, or ValueError naming row and field.
    """
    if task == "gsm8k-solutions":
        train, test = gsm8k_solutions(source), []
    else:
        splits = read_splits(source, ("chosen", "rejected"))
        train, test = (check(rows, f"{source}, {name}row") for rows, name in zip(splits, ("", "test "), strict=True))
    if not test:
        train, test = hold_out(train, num_test, seed)
    return Preferences(train, test, f"pairs of {source}: {len(train)} to train on, {len(test)} held out")


def gsm8k_solutions(source: str | Path) -> list[Preference]:
    """Every correct solution against every wrong one to the same question, among those of four models.

    `source`: GSM8K's example_model_solutions.jsonl, or the folder it lies in.
    """
    path = Path(source).expanduser()
    path = path / "example_model_solutions.jsonl" if path.is_dir() else path
    rows = []
    for number, row in enumerate(read_jsonl(path, ("question", *SOLVERS)), 1):
        prompt = f"Question: {row['question']}\nAnswer:"
        solutions = [row[solver] for solver in SOLVERS]
        right, wrong = ([f" {s['solution']}" for s in solutions if s["is_correct"] is is_so] for is_so in (True, False))
        made = [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for chosen in right for rejected in wrong]
        rows += [check_row(sample, f"{path}, row {number}") for sample in made]
    return rows


def hold_out(pairs: Sequence[Preference], num_test: int, seed: int) -> tuple[list[Preference], list[Preference]]:
    """The rest, and all pairs of as many prompts as make `num_test` pairs, or a fifth of them if that is less."""
    by_prompt: dict[str, list[Preference]] = defaultdict(list)
    for pair in pairs:
        prompt = pair.where if pair.prompt is None else pair.prompt
        by_prompt[json.dumps([prompt, pair.images], default=pictures.described)].append(pair)
    groups = list(by_prompt.values())
    random.Random(seed).shuffle(groups)
    test: list[Preference] = []
    while len(test) < min(num_test, len(pairs) // 5) and len(groups) > 1:
        test += groups.pop()
    return [pair for group in groups for pair in group], test


def check(rows: Sequence[Sample], name: str) -> list[Preference]:
    """`check_row` of each, called `name` and its number."""
    return [check_row(row, f"{name} {number}") for number, row in enumerate(rows, 1)]


def check_row(row: Sample, where: str) -> Preference:
    """A row as a `Preference`; a text among messages becomes one.

    Raises ValueError naming row and field: a missing column, something that is neither text nor messages, an empty
    prompt or completion, a chosen equal to the rejected, images in a completion.
    """
    require_columns(row, ("chosen", "rejected"), where)
    refuse_ids(row, "prompt", where)
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    for name, value in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
        if not (name == "prompt" and value is None):
            _check_text(value, where, name)
    named = (("prompt", prompt), ("chosen", chosen), ("rejected", rejected))
    prompt, chosen, rejected = (pictures.in_parts(value, f"{where}: {name}") for name, value in named)
    if chosen == rejected:
        raise ValueError(f"{where}: chosen and rejected are equal: {short(chosen)}")
    prompt, chosen, rejected = (without_nulls(x) for x in (prompt, chosen, rejected))
    conversations = isinstance(chosen, list) and isinstance(rejected, list)
    shared = common_start(chosen, rejected) if conversations else 0
    if conversations and _holds(chosen[:shared], prompt):
        # Messages of the assistant in a row stay apart; those that a prompt ends with would be gone on with.
        while shared and chosen[shared - 1]["role"] == "assistant":
            if "assistant" not in _roles(chosen[shared:][:1] + rejected[shared:][:1]):
                break
            shared -= 1
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    elif isinstance(prompt, list) or isinstance(chosen, list) or isinstance(rejected, list):
        if prompt is None:
            raise ValueError(f"{where}: without a prompt, chosen and rejected must be two texts or two conversations")
        prompt = _messages(prompt, "user")
        sides = [_messages(x, "assistant") for x in (chosen, rejected)]
        chosen, rejected = (_without_end_of(prompt, *both) for both in (sides, sides[::-1]))
        asked = next((i for i, m in enumerate(chosen) if m["role"] == "assistant"), 0)
        asked = min(asked, common_start(chosen, rejected))
        prompt, chosen, rejected = prompt + chosen[:asked], chosen[asked:], rejected[asked:]
    for name, value in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
        if value == []:
            what = "no message is shared" if name == "prompt" else "no message is left beyond those shared"
            raise ValueError(f"{where}: {name} is empty: {what} by chosen and rejected")
        if name != "prompt" and any(part["type"] != "text" for part in _parts(value)):
            raise ValueError(f"{where}: {name}: expected text alone; images belong to the prompt")
    own = {name: row[name] for name in pictures.COLUMNS if name in row}
    placed = pictures.gathered({"prompt": prompt, **own}, where)
    images = tuple(placed.get("images", ()))
    if images and prompt is None:
        raise ValueError(f"{where}: images: expected none without a prompt, got {len(images)}")
    columns = {name: row[name] for name in conversation.COLUMNS if row.get(name) is not None}
    return Preference(where, placed["prompt"], chosen, rejected, images, _reference(row, where), columns)


def _reference(row: Sample, where: str) -> tuple[float, float] | None:
    """The reference's log-probs, where the row holds them."""
    if not any(name in row for name in REFERENCE):
        return None
    require_columns(row, REFERENCE, where)
    for name in REFERENCE:
        value = row[name]
        if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
            raise ValueError(f"{where}: {name}: expected a finite number, the summed log-prob; got {short(value)}")
    return float(row[REFERENCE[0]]), float(row[REFERENCE[1]])


def _check_text(value: Any, where: str, name: str) -> None:
    if not (isinstance(value, str) or are_messages(value)):
        raise ValueError(
            f"{where}: {name}: expected a text or a list of messages with role and content, got {short(value)}"
        )
    if isinstance(value, str):
        check_text(value, where, name)
    else:
        check_contents(value, where, name)
    last: Any = value if isinstance(value, str) else value[-1] if value else {"content": ""}
    content = last if isinstance(last, str) else last.get("content")
    if isinstance(content, list):
        content = "".join(part.get("text") or "" if part["type"] == "text" else part["type"] for part in content)
    calls = isinstance(last, dict) and last.get("tool_calls")
    if not (content or "").strip() and not calls:
        raise ValueError(f"{where}: {name} is empty: {short(value)}")


def _holds(messages: Sequence[Message], prompt: Text | None) -> bool:
    """Whether the prompt is their beginning, or a user's message among them."""
    if isinstance(prompt, str):
        return any(m["role"] == "user" and _plain([m]) == _plain(_messages(prompt, "user")) for m in messages)
    return prompt is None or _plain(messages[: len(prompt)]) == _plain(prompt)


def _without_end_of(prompt: Sequence[Message], completion: list[Message], other: list[Message]) -> list[Message]:
    """A completion without the messages, a user's among them, that the prompt ends with and it begins with.

    Where they begin with the assistant's, which may be what it says, the other completion must begin with them, too.
    """
    asked, begun, others = _plain(prompt), _plain(completion), _plain(other)
    for count in range(min(len(asked), len(begun)), 0, -1):
        end = asked[len(asked) - count :]
        meant = end[0]["role"] != "assistant" or others[:count] == end
        if begun[:count] == end and _roles(end) != {"assistant"} and meant:
            return completion[count:]
    return completion


def _plain(messages: Sequence[Message]) -> list[Message]:
    """Messages with those contents as texts that are parts of text alone, so that both forms compare equal."""
    made = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list) and all(part["type"] == "text" for part in content):
            content = "".join(part.get("text", "") for part in content)
        made.append({**message, "content": content})
    return made


def _roles(messages: Sequence[Message]) -> set[str]:
    return {message["role"] for message in messages}


def _messages(value: Text, role: str) -> list[Message]:
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def _parts(value: Text | None) -> list[dict[str, Any]]:
    """The parts of those messages whose content is in parts."""
    messages = value if isinstance(value, list) else []
    return [part for m in messages if isinstance(m.get("content"), list) for part in m["content"]]

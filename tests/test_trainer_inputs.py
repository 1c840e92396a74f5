"""Whatever rows, templates and rewards a trainer gets: a right run, or an error that names row and field.

A right run is one whose token ids are those of the tokenizer's own chat template, or of its own texts, and whose metrics
are numbers. An error is a ValueError or TypeError before the first step, with nothing written; that of a reward names the
function, and comes whenever that is called. Numbers of examples: as in test_properties.py.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from fused_rlhf.trainers import dpo, grpo, ppo, rollout
from fused_rlhf.trainers import model as models
from fused_rlhf.trainers.pair_rows import REFERENCE
from fused_rlhf.trainers.rewards import RewardError
from fused_rlhf.trainers.trainer import fit
from tests import chats
from tests.chats import FAMILIES
from tests.test_properties import PROPERTY, SHARE

TEMPLATES = {
    None: None,
    "raises": "{{ raise_exception('not today') }}",
    "no system": "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}",
    "nothing": "",
}
FIELDS = (
    "prompt|chosen|rejected|answer|images?|tools|tool_calls|chat_template_kwargs|chat.template|column|missing|dict|"
    "ref_chosen_logps|ref_rejected_logps"
)
FITS = 15  # of 16 trainers that can be prepared, how many are not run
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"city": {"type": "string"}}}}]

# -------------------------------------------------------------------------------------------------------------- rows

RARE = ["é", "💡", "\u2028", "\x00"]  # which tokenizers without bytes drop
CHARACTERS = st.sampled_from([*"ab1 \n.<", *RARE, "<|im_end|>", "<s>", "</s>", "[INST]", "<eos>", "<think>"])
TEXTS = st.lists(CHARACTERS, min_size=1, max_size=5).map("".join).filter(str.strip)
NOT_TEXTS: list[Any] = [None, 3, math.nan, True, b"ab", {}, {"text": "a"}, [], [1, 2], ["a"], [["a"]], [None], ("a",)]
NOT_TEXTS += ["", "\ud83d", np.array([1, 2]), {"role": "user", "content": "a"}, [{"role": "user"}], [{"content": "a"}]]
NOT_TEXTS += [[{"role": None, "content": "a"}], [{"role": 3, "content": "a"}]]


def contents(text: str) -> st.SearchStrategy[Any]:
    """The ways of writing one."""
    part = {"type": "text", "text": text}
    cut = len(text) // 2
    halves = [{"type": "text", "text": half} for half in (text[:cut], text[cut:])]
    return st.sampled_from([text, text, [part], [{**part, "image": None}], halves])


@st.composite
def messages(draw: Any, roles: str) -> list[dict[str, Any]]:
    """One for each letter of `roles`; s, u, a, t as roles begin, c an assistant's call."""
    made = []
    for letter in roles:
        role = {"s": "system", "u": "user", "a": "assistant", "t": "tool", "c": "assistant"}[letter]
        message: dict[str, Any] = {"role": role}
        if letter == "c":
            arguments = draw(st.sampled_from([{"city": "Rome"}, {"city": "Rome", "day": None}, {}]))
            message["tool_calls"] = [{"type": "function", "function": {"name": "weather", "arguments": arguments}}]
            message |= draw(st.sampled_from([{}, {"content": None}, {"content": "a"}]))
        else:
            message["content"] = draw(contents(draw(TEXTS)))
        message |= draw(st.sampled_from([{}, {}, {"tool_calls": None}, {"name": None}])) if letter != "c" else {}
        made.append(message)
    return made


EXTRAS = st.fixed_dictionaries(
    {},
    optional={
        "tools": st.sampled_from([None, [], TOOLS, json.dumps(TOOLS)]),
        "chat_template_kwargs": st.sampled_from([None, {}, {"enable_thinking": False}, '{"enable_thinking": false}']),
        "images": st.sampled_from([None, []]),
        "answer": st.sampled_from(["1", 1, "é"]),
        "step": st.integers(0, 3),
        "self": st.just("a"),
        "completion": st.just({"b": [None, b"x"]}),
    },
)
BROKEN: dict[str, list[Any]] = {
    "tools": [3, "not json", "3", {"name": "a"}, ["a"], [None], b"x"],
    "chat_template_kwargs": [3, "not json", ["a"], {"tokenize": True}, {"messages": []}, b"x"],
    "images": ["a.png", ["a.png"], [None], 3, {"path": "a.png"}],
    "image": ["a.png", 3],
    "prompts": ["a"],
    "completions": [None],
}
PROMPTS = ["u", "u", "su", "uau", "suau", "uct", "uctu", "ua", "sua"]


def wrong_message(draw: Any, message: dict[str, Any]) -> Any:
    """What is left of a message once something of it is wrong."""
    wrong: dict[str, list[Any]] = {
        "content": [3, b"a", {}, {"type": "text"}, [3], [None], [{}], [{"type": None}], "\ud83d", ...],
        "role": [None, 3, "", "nobody", ["user"], ...],
        "tool_calls": ["a", 3, [3], [None], [{}], [{"function": None}]],
    }
    wrong["content"] += [[{"type": "text", "text": 3}], [{"type": "image"}], [{"type": ["text"], "text": "a"}]]
    name = draw(st.sampled_from(sorted(wrong)))
    changed = message | {name: copy.deepcopy(draw(st.sampled_from(wrong[name])))}
    return draw(st.sampled_from([{k: v for k, v in changed.items() if v is not ...}, None, "a", 3, [message]]))


def wrong_text(draw: Any, value: Any) -> Any:
    """What is left of a text or of messages once something of it is wrong."""
    if isinstance(value, list) and draw(st.booleans()):
        at = draw(st.integers(0, len(value) - 1))
        return [*value[:at], wrong_message(draw, value[at]), *value[at + 1 :]]
    return copy.deepcopy(draw(st.sampled_from(NOT_TEXTS)))


def broken(draw: Any, row: dict[str, Any], texts: tuple[str, ...]) -> Any:
    """A row of which one thing is wrong, or may be."""
    name = draw(st.sampled_from([*texts, *texts, *BROKEN, "row", "ids"]))
    if name == "row":
        rows: list[Any] = [None, 3, "a", [row], {3: row}, {(1, 2): "a"} | row]
        return draw(st.sampled_from(rows))
    if name == "ids":
        return {key: value for key, value in row.items() if key not in texts} | {f"{texts[-1]}_input_ids": [5, 3]}
    if name in BROKEN:
        return row | {name: draw(st.sampled_from(BROKEN[name]))}
    if name in row and draw(st.integers(0, 4)):
        return row | {name: wrong_text(draw, row[name])}
    return {key: value for key, value in row.items() if key != name}


@st.composite
def prompt_rows(draw: Any) -> dict[str, Any]:
    if draw(st.integers(0, 2)) == 0:
        prompt = draw(TEXTS) + draw(st.sampled_from(["", "<|im_end|>", "</s>"]))
        return {"prompt": prompt, **draw(EXTRAS)}
    return {"prompt": draw(messages(draw(st.sampled_from(PROMPTS)))), **draw(EXTRAS)}


# ----------------------------------------------------------------------------------------------- what is right of a row


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def text_of(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content or ())


def plain(some: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as a template of texts takes them."""
    made = []
    for message in some:
        clean = without_nulls(message)
        if "content" in clean or not clean.get("tool_calls"):
            clean["content"] = text_of(message.get("content"))
        made.append(clean)
    return made


def json_of(row: dict[str, Any], name: str) -> Any:
    value = row.get(name)
    return without_nulls(json.loads(value) if isinstance(value, str) else value)


def rendered(tokenizer: Any, row: dict[str, Any], some: list[dict[str, Any]], **how: Any) -> list[list[int]]:
    """By the tokenizer's own template; where a message has calls alone, with and without an empty content."""
    keywords = {"tools": json_of(row, "tools") or None, **(json_of(row, "chat_template_kwargs") or {}), **how}
    found = []
    for form in (plain(some), [{"content": "", **message} for message in plain(some)]):
        with contextlib.suppress(Exception):
            found.append(tokenizer.apply_chat_template(form, tokenize=True, return_dict=False, **keywords))
    return found


def begun(tokenizer: Any, starts: tuple[str, ...], text: str) -> list[int]:
    """A text's ids behind what the tokenizer begins texts with, once."""
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    before = tokenizer.convert_tokens_to_ids(list(starts))
    return ids if ids[: len(before)] == before else before + ids


def right_prompts(tokenizer: Any, starts: tuple[str, ...], row: dict[str, Any], chat: bool) -> list[list[int]]:
    prompt = row["prompt"]
    if isinstance(prompt, str) and not chat:
        return [begun(tokenizer, starts, prompt)]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    goes_on = prompt[-1]["role"] == "assistant"
    return rendered(tokenizer, row, prompt, **{"continue_final_message" if goes_on else "add_generation_prompt": True})


def usable(made: Models, row: dict[str, Any], chat: bool) -> bool:
    """Whether a row that is well-formed can be asked: its template takes it, and there is nothing beside a text."""
    beside = json_of(row, "tools") or json_of(row, "chat_template_kwargs")
    if beside and isinstance(row["prompt"], str) and not chat:
        return False
    return any(right_prompts(made.tokenizer, made.starts, row, chat))


# ------------------------------------------------------------------------------------------------------------- runs


class Models:
    """A family's tokenizer, which adds BOS or EOS to texts or not, maybe with another template; and small models."""

    def __init__(self, name: str, adds: str, template: str | None) -> None:
        family = FAMILIES[name]
        self.drops = family.spaces
        self.starts = (family.starts or ((family.bos,) if family.bos else ())) if "b" in adds else ()
        self.tokenizer: Any = chats.tokenizer(name, adds)
        if template != "own":
            self.tokenizer = copy.deepcopy(self.tokenizer)
            self.tokenizer.chat_template = TEMPLATES[template]

    def build(self) -> Any:
        torch.manual_seed(0)
        return models.small_model(self.tokenizer, 32, 1, 1024)


TEMPLATE = st.sampled_from(["own"] * 6 + list(TEMPLATES))
MODELS = st.builds(Models, st.sampled_from(sorted(FAMILIES)), st.sampled_from(["", "b", "be"]), TEMPLATE)
OPTIONS: dict[str, Any] = {"steps": 1, "micro_batch_size": 8, "sample_steps": 1, "eval_steps": 0, "save_steps": 0}


def attempt(function: Callable[..., Any], *args: Any, **options: Any) -> tuple[Any, Exception | None]:
    """What it returns, or what it raises."""
    try:
        return function(*args, **options), None
    except Exception as error:
        return None, error


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as path:
        yield Path(path) / "run"


def row_named_by(error: Exception, name: str) -> int:
    """The number of the row that an error names, with a field of it."""
    assert isinstance(error, (ValueError, TypeError)), repr(error)
    found = re.search(rf"{name} (\d+)\b.*({FIELDS})", str(error), re.DOTALL)
    assert found, repr(error)
    return int(found[1])


def finite(result: Any, unscored: bool) -> None:
    """Metrics are numbers unless nothing could be scored, and the model's files are there."""
    for row in result.metrics:
        assert unscored or None not in row.values(), row
    assert (result.model_path / "config.json").is_file()
    lines = (result.model_path.parent / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result.metrics


def length(completions: Any, **_: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def prepared(kind: Any, rows: list[Any], made: Models, output: Path, **more: Any) -> Any:
    """GRPO's or PPO's trainer of a list of samples."""
    rewards, options = more.pop("rewards", [length]), {"prompts_per_step": 2, "max_new_tokens": 3, **OPTIONS}
    own = {"num_generations": 2} if kind is grpo else {"num_ppo_epochs": 1}
    config = kind.Config(output=str(output), **options, **own, **more)
    return kind.prepare(config, rows, rewards, model=made.build(), tokenizer=made.tokenizer)


def run_prompts(kind: Any, data: st.DataObject, rows: list[Any], bad: int | None, chat: bool, made: Models) -> None:
    with folder() as output:
        trainer, error = attempt(prepared, kind, rows, made, output, chat_template=chat)
        if error is not None:
            assert not output.exists()
            refused = row_named_by(error, "train sample")
            assert refused == bad or not usable(made, rows[refused], chat), repr(error)
            return
        found = rollout.encoded(trainer.loaded, trainer.task.train, trainer.config)
        for sample, encoded in zip(trainer.task.train, found, strict=True):
            assert encoded.ids in right_prompts(made.tokenizer, made.starts, sample, chat)
            assert not any(sample.get(name) for name in ("images", "image"))
        if data.draw(st.integers(0, FITS)) == 0:
            finite(fit(trainer), unscored=False)


@pytest.mark.parametrize("kind", [grpo, ppo])
@PROPERTY
@given(data=st.data())
def test_prompts(kind: Any, data: st.DataObject) -> None:
    made, draw = data.draw(MODELS), data.draw
    rows: list[Any] = draw(st.lists(prompt_rows(), min_size=1, max_size=4))
    bad = draw(st.sampled_from([None, *range(len(rows))]))
    if bad is not None:
        rows[bad] = broken(draw, rows[bad], ("prompt",))
    run_prompts(kind, data, rows, bad, draw(st.booleans()), made)


# ------------------------------------------------------------------------------------------------------------- pairs


@st.composite
def pair_rows(draw: Any) -> tuple[dict[str, Any], Any]:
    """A row, and its two whole conversations; of texts, the row alone."""
    if draw(st.integers(0, 3)) == 0:
        prompt, chosen, rejected = draw(TEXTS), draw(TEXTS), draw(TEXTS)
        assume(chosen != rejected)
        row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        if draw(st.booleans()):
            row = {"chosen": f"1{prompt}{chosen}", "rejected": f"1{prompt}{rejected}", "prompt": None}
        return row | draw(EXTRAS), None
    prompt = draw(messages(draw(st.sampled_from(PROMPTS))))
    chosen, rejected = (draw(messages(draw(st.sampled_from(["a", "a", "aua", "cta"])))) for _ in range(2))
    chosen[0].pop("name", None)
    rejected[0].pop("name", None)
    assume(plain(chosen) != plain(rejected))
    whole = [continued(prompt, completion) for completion in (chosen, rejected)]
    ways = ["apart"]
    if prompt[-1]["role"] != "assistant":
        ways += ["implicit", "repeated", "implicit"]
    if len(prompt) == 1 and isinstance(prompt[0]["content"], str):
        ways += ["text before messages"]
    if all(len(c) == 1 and isinstance(c[0].get("content"), str) for c in (chosen, rejected)):
        ways += ["messages before texts"]
    way = draw(st.sampled_from(ways))
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    if way in ("implicit", "repeated"):
        row = {"chosen": prompt + chosen, "rejected": prompt + rejected}
    if way == "repeated":
        row |= {"prompt": prompt}
    if way == "text before messages":
        row |= {"prompt": prompt[0]["content"]}
    if way == "messages before texts":
        row |= {"chosen": chosen[0]["content"], "rejected": rejected[0]["content"]}
    return copy.deepcopy(row) | draw(EXTRAS), whole


def continued(prompt: list[dict[str, Any]], completion: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One conversation; a completion goes on with the message of the assistant's that the prompt ends with."""
    last, first = prompt[-1], completion[0]
    if last["role"] != "assistant":
        return prompt + completion
    both = {**without_nulls(last), **without_nulls(first)}
    return [*prompt[:-1], both | {"content": text_of(last["content"]) + text_of(first.get("content"))}, *completion[1:]]


def right_pair(made: Models, row: dict[str, Any], whole: Any, chat: bool, found: Any) -> bool:
    """Whether a pair's sequences are its row's conversations, or texts that begin and end as texts do."""
    both = [found.prompt + found.chosen, found.prompt + found.rejected]
    if whole is not None or chat:
        return all(ids in rendered(made.tokenizer, row, some) for ids, some in zip(both, whole or asked(row)))
    prompt, eos, decode = row["prompt"] or "", [made.tokenizer.eos_token_id], made.tokenizer.decode
    start = begun(made.tokenizer, made.starts, prompt)
    for ids, text in zip(both, (row["chosen"], row["rejected"])):
        right = begun(made.tokenizer, made.starts, prompt + text)
        right += eos if begun(made.tokenizer, (), text)[-1:] != eos else []
        # A prompt is encoded alone: then the tokens around its end may be others than those of the whole.
        if decode(ids) != decode(right) or (found.prompt != start if prompt else ids != right):
            return False
    return True


def asked(row: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """A pair of texts as conversations."""
    first = {"role": "user", "content": row["prompt"]}
    return [[first, {"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")]


def run_pairs(
    data: st.DataObject, rows: list[Any], wholes: list[Any], bad: int | None, chat: bool, made: Models
) -> None:
    with folder() as output:
        own: dict[str, Any] = {"num_test": 0, "batch_size": 2, "sample_tokens": 2, "chat_template": chat}
        config = dpo.Config(output=str(output), **own, **OPTIONS)
        trainer, error = attempt(dpo.prepare, config, rows, model=made.build(), tokenizer=made.tokenizer)
        if error is not None:
            assert not output.exists()
            if "in every row, or in none" in str(error):  # of the reference: then it is not one row's fault
                assert len({reference in row for row in rows for reference in REFERENCE}) == 2
                return
            refused = row_named_by(error, "row") - 1
            assert refused == bad or not comparable(made, rows[refused], wholes[refused], chat), repr(error)
            return
        for pair in trainer.train:
            number = int(pair.where.removeprefix("row ")) - 1
            assert number == bad or right_pair(made, rows[number], wholes[number], chat, pair), pair
            assert not any(rows[number].get(name) for name in ("images", "image"))
            assert pair.ref is None or pair.ref == tuple(rows[number][name] for name in REFERENCE)
        if data.draw(st.integers(0, FITS)) == 0:
            finite(fit(trainer), unscored=False)


def comparable(made: Models, row: dict[str, Any], whole: Any, chat: bool) -> bool:
    """Whether a well-formed pair can be used: its template renders it, every message alike whatever follows, and neither
    of its conversations is the other's beginning, nor equal to it as tokens."""
    if made.drops and any(repr(character)[1:-1] in repr(row) for character in RARE):
        return False
    if whole is None and not chat:
        ids = [begun(made.tokenizer, made.starts, row[side]) for side in ("chosen", "rejected")]
        return ids[0] != ids[1] and not (json_of(row, "tools") or json_of(row, "chat_template_kwargs"))
    if whole is None and row["prompt"] is None:
        return False
    both = whole or asked(row)
    texts = [[made.tokenizer.decode(ids) for ids in rendered(made.tokenizer, row, some)] for some in both]
    alike = [a == b for a, b in zip(plain(both[0]), plain(both[1]))]
    if all(alike) or not all(texts) or texts[0] == texts[1]:
        return False
    prompt = row.get("prompt")
    if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        begins = rendered(made.tokenizer, row, prompt, continue_final_message=True)
        if not all(
            any(text.startswith(made.tokenizer.decode(ids)) for text in some for ids in begins) for some in texts
        ):
            return False
    for some, ends in zip(both, texts):
        for count in range(max(alike.index(False), 1), len(some)):
            starts = [made.tokenizer.decode(ids) for ids in rendered(made.tokenizer, row, some[:count])]
            if not any(end.startswith(start) for start in starts for end in ends):
                return False
    return True


@PROPERTY
@given(data=st.data())
def test_pairs(data: st.DataObject) -> None:
    made, draw = data.draw(MODELS), data.draw
    some = draw(st.lists(pair_rows(), min_size=1, max_size=4))
    rows: list[Any] = [row for row, _ in some]
    wholes = [whole for _, whole in some]
    bad = draw(st.sampled_from([None, *range(len(rows))]))
    if draw(st.integers(0, 3)) == 0:
        for row in rows:
            row |= {name: draw(st.sampled_from([-1.5, -2, np.float32(-0.5)])) for name in REFERENCE}
    if bad is not None and draw(st.integers(0, 9)):
        rows[bad] = broken(draw, rows[bad], ("prompt", "chosen", "rejected"))
    elif bad is not None:
        wrong = draw(st.sampled_from([None, math.nan, -math.inf, "-1.5", [-1.0], True]))
        rows[bad] |= dict.fromkeys(REFERENCE, -1.0) | {draw(st.sampled_from(REFERENCE)): wrong}
    run_pairs(data, rows, wholes, bad, draw(st.booleans()), made)


# ------------------------------------------------------------------------------------------------------------ rewards


def each(value: Any) -> Any:
    def reward(completions: Any, **_: Any) -> Any:
        return [value] * len(completions)

    return reward


def raising(completions: Any, **_: Any) -> Any:
    raise KeyError("gold")


def reading(completions: Any, answer: Any, **_: Any) -> Any:
    return [float(len(str(one))) for one in answer]


def every_other(completions: Any, **_: Any) -> Any:
    return [None if i % 2 else 1.0 for i in range(len(completions))]


def given_as(make: Any) -> Any:
    def reward(completions: Any, **_: Any) -> Any:
        return make([float(len(text)) for text in completions])

    return reward


RIGHT = {
    "length": length,
    "reading": reading,
    "integers": each(2),
    "booleans": each(True),
    "numpy numbers": each(np.float32(0.5)),
    "0-d tensors": each(torch.tensor(0.5)),
    "array": given_as(np.array),
    "tensor": given_as(torch.tensor),
    "bf16": given_as(lambda x: torch.tensor(x).bfloat16()),
    "tuple": given_as(tuple),
    "generator": given_as(iter),
}
UNSCORED = {"None": each(None), "NaN": each(math.nan), "every other": every_other}
NOT_NUMBERS: list[Any] = ["1.0", b"1", math.inf, -math.inf, 1e39, 10**400, 1j, [1.0], {}, object]
WRONG = {
    "raising": raising,
    "too few": lambda completions, **_: [0.0] * (len(completions) - 1),
    "too many": lambda completions, **_: [0.0] * (len(completions) + 1),
    "a number": lambda completions, **_: 1.0,
    "a number's tensor": lambda completions, **_: torch.tensor(1.0),
    "nothing": lambda completions, **_: None,
    "a text": lambda completions, **_: "1" * len(completions),
    "bytes": lambda completions, **_: b"1" * len(completions),
    "a dict": lambda completions, **_: dict.fromkeys(range(len(completions)), 1.0),
    "a set": lambda completions, **_: set(range(len(completions))),
    "an array of rows": lambda completions, **_: np.ones((len(completions), 2)),
    "a tensor of rows": lambda completions, **_: torch.ones(len(completions), 2),
    "an unknown argument": lambda completions: [0.0] * len(completions),
    **{repr(value): each(value) for value in NOT_NUMBERS},
}
REWARDS: dict[str, Any] = {**RIGHT, **UNSCORED, **WRONG}


def run_rewards(kind: Any, names: list[str], rows: list[Any]) -> None:
    wrong, made = [name for name in names if name in WRONG], Models("chatml", "", "own")
    unanswered = "reading" in names and any(row.get("answer") is None for row in rows)
    with folder() as output:
        trainer, error = attempt(prepared, kind, rows, made, output, rewards=[REWARDS[name] for name in names])
        if error is None:
            assert not wrong
            assert not unanswered
            finite(fit(trainer), unscored=any(name in UNSCORED for name in names))
        else:
            assert wrong or unanswered, repr(error)
            assert not output.exists()
        if error is not None and unanswered:
            assert rows[row_named_by(error, "train sample")].get("answer") is None
        elif error is not None:  # function and prompt, unless all of its answer is at fault
            assert isinstance(error, RewardError), repr(error)
            place = "at prompt '[ab]'|expected a list of numbers|values for 2 completions|it gave no list"
            assert re.match(rf"reward '[\w<>#]+' (returned|raised) .*({place})", str(error), re.DOTALL), repr(error)


@pytest.mark.parametrize("kind", [grpo, ppo])
@PROPERTY
@given(data=st.data())
def test_rewards(kind: Any, data: st.DataObject) -> None:
    draw = data.draw
    names = draw(st.lists(st.sampled_from(sorted(WRONG)), max_size=1))
    names += draw(st.lists(st.sampled_from(sorted(RIGHT | UNSCORED)), min_size=not names, max_size=2))
    # Whole runs take long: of functions that are right alone, some are tried.
    assume(bool(set(names) & set(WRONG)) or draw(st.integers(0, FITS)) == 0)
    answers = st.fixed_dictionaries({}, optional={"answer": st.sampled_from(["1", 2, None])})
    run_rewards(kind, names, [{"prompt": prompt, **draw(answers)} for prompt in "ab"])


@pytest.mark.parametrize("kind", [grpo, ppo])
@pytest.mark.parametrize("name", [*RIGHT, *UNSCORED])
def test_rewards_that_are_right(kind: Any, name: str) -> None:
    run_rewards(kind, [name], [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": 2}])


# -------------------------------------------------------------------------------------------------------------- files


@pytest.fixture
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))


@pytest.mark.usefixtures("_own_cache")
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@SHARE
@given(data=st.data())
def test_files(suffix: str, data: st.DataObject) -> None:
    """Rows from a file, which fills with nulls, are those in memory; a row that is refused is so in either."""
    draw, made = data.draw, Models(data.draw(st.sampled_from(["chatml", "llama3", "mistral"])), "b", "own")
    rows: list[Any] = draw(st.lists(prompt_rows(), min_size=1, max_size=4))
    for row in rows:
        row.pop("completion", None)  # holds bytes
    if suffix == "jsonl" and draw(st.booleans()):
        rows[0] = broken(draw, rows[0], ("prompt",))
        assume(isinstance(rows[0], dict) and attempt(json.dumps, rows[0])[1] is None)
        rows = json.loads(json.dumps(rows))
    with folder() as output:
        path = output.with_name(f"rows.{suffix}")
        if suffix == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            assume(attempt(pandas.DataFrame(rows).to_parquet, path)[1] is None)  # no column of several types there
        options = {"task": "prompts", "data": str(path)}
        (here, refused), (there, refused_there) = (
            attempt(prepared, grpo, given, made, output, **more) for given, more in ((rows, {}), (None, options))
        )
        assert (refused is None) == (refused_there is None), (refused, refused_there)
        if refused is not None:
            number = row_named_by(refused, "train sample")
            assert row_named_by(refused_there, rf"{path}, (?:row|line)") == number + 1
            return
        for trainer in (here, there):
            for sample, encoded in zip(
                trainer.task.train, rollout.encoded(trainer.loaded, trainer.task.train, trainer.config)
            ):
                assert encoded.ids in right_prompts(made.tokenizer, made.starts, sample, False)
        assert [without_nulls(s["prompt"]) for s in here.task.train] == [
            without_nulls(s["prompt"]) for s in there.task.train
        ]

import functools
import itertools
import json
import re
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fused_rlhf.trainers import data, inputs, rollout, warmup
from fused_rlhf.trainers import model as models
from fused_rlhf.trainers.conversation import encode, following, render
from fused_rlhf.trainers.data import Task
from fused_rlhf.trainers.pair_rows import check_row
from fused_rlhf.trainers.pairs import Encoder
from fused_rlhf.trainers.rollout_config import RolloutConfig
from tests import chats, tiny_vision
from tests.chats import FAMILIES

ADDS = ("", "b", "e", "be")
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"city": {"type": "string"}}}}]
TEXT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text if part.type == 'text' else '[image]' }}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def user(text: Any = "What is 6*7?") -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: Any = "The answer is 42.", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def system(text: Any = "Be brief.") -> dict[str, Any]:
    return {"role": "system", "content": text}


def call(**arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "weather", "arguments": arguments}}


def own(tokenizer: Any, messages: list[dict[str, Any]], **how: Any) -> list[int]:
    return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **how))


@functools.cache
def compiled(template: str) -> Any:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda x, **_: json.dumps(x, ensure_ascii=False)
    return environment.from_string(template)


def rendered(tokenizer: Any, messages: list[dict[str, Any]], answering: bool, **keywords: Any) -> str:
    """The template's text, by jinja alone."""
    variables = {"tools": None, **tokenizer.special_tokens_map, **keywords}
    return compiled(tokenizer.chat_template).render(messages=messages, add_generation_prompt=answering, **variables)


def true_mask(tokenizer: Any, messages: list[Any], completion: list[Any], **keywords: Any) -> list[bool]:
    """By the tokens' places in the text: the completion begins at the first that the prompt's text does not have there."""
    texts = (
        rendered(tokenizer, messages, True, **keywords),
        rendered(tokenizer, messages + completion, False, **keywords),
    )
    before, whole = (
        list(zip(made["input_ids"], made["offset_mapping"], strict=True))
        for made in (tokenizer(text, add_special_tokens=False, return_offsets_mapping=True) for text in texts)
    )
    start = next(i for i, token in enumerate(whole) if token not in before)
    return [i >= start for i in range(len(whole))]


def conversations(family: chats.Family) -> list[tuple[list[dict[str, Any]], dict[str, Any]]]:
    """Prompts of 1 to 4 turns, with and without system, tools and a call with a null content."""
    found = []
    for turns, with_system, with_tools, null in itertools.product(range(1, 5), (0, 1), (0, 1), (0, 1)):
        if (with_system and not family.system) or ((with_tools or null) and not family.tools):
            continue
        messages = [system()] if with_system else []
        for turn in range(turns):
            messages.append(user(f"Turn {turn}\n\n, two  spaces"))
            if null and turn == 0:
                messages += [assistant(None, tool_calls=[call(city="Rome")]), {"role": "tool", "content": "sunny"}]
                if turn < turns - 1:
                    messages.append(assistant("It is sunny."))
            elif turn < turns - 1:
                messages.append(assistant(f"Answer {turn}"))
        found.append((messages, {"tools": TOOLS} if with_tools else {}))
    return found


# ------------------------------------------------------------------------------------------------- every family's shape


@pytest.mark.parametrize("adds", ADDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_conversation_is_what_the_tokenizers_own_template_makes_of_it(name, adds):
    tokenizer = chats.tokenizer(name, adds)
    for messages, columns in conversations(FAMILIES[name])[:: 1 if adds == "be" else 5]:
        got = encode(tokenizer, None, {"prompt": messages, **columns})
        assert got.ids == own(tokenizer, messages, add_generation_prompt=True, **columns)
        assert got.completion == 0
        for text in ("The answer is 42.", "\n\nIt is sunny.", "<tool_call>\n{}"):
            completion = [assistant(text)]
            got = encode(tokenizer, None, {"prompt": messages, **columns}, completion)
            assert got.ids == own(tokenizer, messages + completion, **columns)
            clean = [{k: v for k, v in m.items() if v is not None} for m in messages]
            assert got.mask == true_mask(tokenizer, clean, completion, **columns)
            said = tokenizer.decode(got.ids[len(got.prompt) :])
            assert text.strip() in said
            assert "Turn" not in said
        assert encode(tokenizer, None, {"prompt": messages, **columns}, text) == got


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_that_ends_with_the_assistant_is_gone_on_with(name):
    tokenizer = chats.tokenizer(name, "be")
    messages = [user(), assistant("The answer")]
    got = encode(tokenizer, None, {"prompt": messages})
    assert got.ids == own(tokenizer, messages, continue_final_message=True)
    assert str(tokenizer.decode(got.ids)).endswith("The answer")
    in_parts = [user(), assistant([{"type": "text", "text": "The answer"}])]
    assert encode(tokenizer, None, {"prompt": in_parts}) == got
    for completion in (" is 42.", [assistant(" is 42.")]):
        whole = encode(tokenizer, None, {"prompt": messages}, completion)
        assert whole.ids == own(tokenizer, [user(), assistant("The answer is 42.")])
        assert whole.prompt == got.ids
        assert re.match(r" ?is 42\.", str(tokenizer.decode(whole.ids[len(whole.prompt) :])))
    for last in (assistant(""), assistant(None, tool_calls=[call()]), assistant("x", tool_calls=[call()])):
        with pytest.raises(
            ValueError, match=r"row 3: prompt: its last message is the assistant's: expected a text to go on"
        ):
            encode(tokenizer, None, {"prompt": [user(), last]}, where="row 3")


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if not family.system])
def test_a_template_that_refuses_the_system_role_is_told_by_row(name):
    with pytest.raises(ValueError, match=r"row 7: the chat template cannot render it: .* roles are system, user"):
        encode(chats.tokenizer(name), None, {"prompt": [system(), user()]}, where="row 7")


def test_keywords_reach_the_template():
    tokenizer, messages = chats.tokenizer("thinking"), [user()]
    forms: tuple[Any, ...] = tuple({"enable_thinking": value} for value in (False, True, None))
    for keywords in (*forms, None, '{"enable_thinking": false}'):
        got = encode(tokenizer, None, {"prompt": messages, "chat_template_kwargs": keywords})
        given = json.loads(keywords) if isinstance(keywords, str) else keywords or {}
        given = {k: v for k, v in given.items() if v is not None}
        assert got.ids == own(tokenizer, messages, add_generation_prompt=True, **given)
    row = {"prompt": messages, "tools": json.dumps(TOOLS)}
    assert encode(tokenizer, None, row).ids == own(tokenizer, messages, add_generation_prompt=True, tools=TOOLS)
    assert encode(tokenizer, None, {"prompt": messages, "tools": []}) == encode(tokenizer, None, {"prompt": messages})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tools": "[{"}, r"row 2: tools: expected JSON, got '\[\{'"),
        ({"tools": [3]}, r"row 2: tools: expected a list of JSON schemas or functions, got \[3\]"),
        ({"chat_template_kwargs": [3]}, r"row 2: chat_template_kwargs: expected keywords and their values, got \[3\]"),
        ({"chat_template_kwargs": {"tokenize": True}}, r"row 2: chat_template_kwargs: expected none .*\['tokenize'\]"),
        ({"prompt": "a", "tools": TOOLS}, "row 2: tools: expected none beside a prompt that is a text, got"),
        ({"prompt": "a", "chat_template_kwargs": {"a": 1}}, "row 2: chat_template_kwargs: expected none beside a prompt"),
        ({"prompt": []}, r"row 2: prompt: expected a text or a list of messages with role and content, not empty; got \[\]"),
        ({"prompt": [{"role": "user"}]}, "row 2: prompt: expected a text or a list of messages"),
        ({"prompt": [user(3)]}, "row 2: prompt: expected content as a text or in parts with a type, got 3"),
        ({"prompt": [user(["a"])]}, r"row 2: prompt: expected content as a text or in parts .*got \['a'\]"),
        ({"prompt": [user([{"type": "audio"}])]}, "row 2: prompt: expected parts of type 'text', all that the model takes"),
        ({"images": [tiny_vision.picture(0)]}, "row 2: images: the model takes none, got 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_encoded_is_refused_by_row_and_field(change, message):
    with pytest.raises(ValueError, match=message):
        encode(chats.tokenizer("chatml"), None, {"prompt": [user()]} | change, where="row 2")


def test_without_a_chat_template_messages_are_refused():
    with pytest.raises(ValueError, match="chat_template: expected a tokenizer that has one; this one has none"):
        encode(models.char_tokenizer(), None, {"prompt": [user()]})


def test_a_template_that_moves_what_the_prompt_holds_is_refused():
    row = {
        "prompt": [user("a")],
        "tools": TOOLS,
    }  # the tools stand before the last question: before another, once it is asked
    with pytest.raises(
        ValueError, match=r"row 4: prompt: expected a chat template that renders it alike .*AVAILABLE_TOOLS"
    ):
        encode(chats.tokenizer("mistral-system"), None, row, [assistant("b"), user("c"), assistant("d")], where="row 4")


# ---------------------------------------------------------------------------------------------------- contents and nulls


@pytest.mark.parametrize("name", FAMILIES)
def test_contents_in_parts_are_their_texts(name):
    tokenizer = chats.tokenizer(name)
    parts = [{"type": "text", "text": "What is", "image": None}, {"type": "text", "text": " 6*7?"}]
    assert encode(tokenizer, None, {"prompt": [user(parts)]}) == encode(tokenizer, None, {"prompt": [user()]})


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.tools])
def test_arrows_nulls_are_not_rendered(name):
    tokenizer = chats.tokenizer(name)
    clean = [user(), assistant(None, tool_calls=[call(city="Rome")]), {"role": "tool", "content": "sunny"}]
    nulls: list[dict[str, Any]] = [
        {"role": "user", "content": "What is 6*7?", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [call(city="Rome", a=None, b={"c": None}) | {"id": None}]},
        {"role": "tool", "content": "sunny", "tool_calls": None, "name": None},
    ]
    nulls[1]["tool_calls"][0]["function"]["arguments"].pop("b")
    tools = [TOOLS[0] | {"strict": None}]
    got = encode(tokenizer, None, {"prompt": nulls, "tools": tools, "chat_template_kwargs": {"a": None}})
    assert got == encode(tokenizer, None, {"prompt": clean, "tools": TOOLS})
    assert not any(word in tokenizer.decode(got.ids) for word in ("null", "None"))
    as_text = [
        user(),
        assistant(None, tool_calls=[{"function": {"name": "weather", "arguments": '{"a": null}'}}]),
        clean[2],
    ]
    assert "null" in tokenizer.decode(encode(tokenizer, None, {"prompt": as_text}).ids)


def test_a_null_content_is_an_empty_one_where_the_template_cannot_do_without():
    tokenizer = chats.tokenizer("chatml-plain")
    for content in ({"content": None}, {}):
        history: list[dict[str, Any]] = [user(), {"role": "assistant", "tool_calls": [call()], **content}, user()]
        got = encode(tokenizer, None, {"prompt": history})
        assert got.ids == own(tokenizer, [user(), assistant(""), user()], add_generation_prompt=True)
    got = encode(tokenizer, None, {"prompt": [user(), assistant(None), user()]})
    assert got.ids == own(tokenizer, [user(), assistant(""), user()], add_generation_prompt=True)
    naming = models.char_tokenizer()
    naming.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.get('content', 'None') }}{% endfor %}"
    history = [user("a"), {"role": "assistant", "content": None, "tool_calls": [call()]}, user("b")]
    assert naming.decode(encode(naming, None, {"prompt": history}).ids) == "<user>a<assistant><user>b"


PARTS_ONLY = TEXT_TEMPLATE.replace("{% if m.content is string %}{{ m.content }}{% else %}", "").replace(
    "{% endfor %}{% endif %}{% endfor %}", "{% endfor %}{% endfor %}"
)
OPEN = "{% if add_generation_prompt %}<assistant>{% endif %}"
TEXTS_ONLY = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}" + OPEN


@pytest.mark.parametrize("template", [tiny_vision.TEMPLATE, PARTS_ONLY, TEXTS_ONLY])
@pytest.mark.parametrize("content", ["6*7?", [{"type": "text", "text": "6*7?"}]])
def test_an_image_text_model_reads_both_forms(template, content):
    _, processor = tiny_vision.build()
    processor.chat_template = template
    got = encode(processor.tokenizer, processor, {"prompt": [system(), user(content)]}, "42")
    assert processor.tokenizer.decode(got.ids) == "<system>Be brief.<user>6*7?<assistant>42"
    assert processor.tokenizer.decode(got.prompt) == "<system>Be brief.<user>6*7?<assistant>"
    if template != TEXTS_ONLY:
        got = encode(processor.tokenizer, processor, {"prompt": [user(content), assistant("4")]}, "2")
        assert processor.tokenizer.decode(got.prompt) == "<user>6*7?<assistant>4"


# ----------------------------------------------------------------------------------------------------------------- texts


@pytest.mark.parametrize("adds", ADDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_text_begins_as_the_tokenizer_begins_texts_and_ends_with_eos_once(name, adds):
    tokenizer, family = chats.tokenizer(name, adds), FAMILIES[name]
    starts = family.starts or ((family.bos,) if family.bos else ())
    start = [tokenizer.convert_tokens_to_ids(token) for token in starts] if "b" in adds else []
    text = inputs.bare(tokenizer, "2+2=")
    assert tokenizer.decode(text) == "2+2="
    prompt = encode(tokenizer, None, {"prompt": "2+2="})
    assert prompt.ids == start + text
    if start:
        assert encode(tokenizer, None, {"prompt": "".join(starts) + "2+2="}).ids[: len(start) + 1] != start + start[:1]
    for said in ("4", f"4{family.eos}"):
        got = encode(tokenizer, None, {"prompt": "2+2="}, said)
        assert got.prompt == prompt.ids
        after = got.ids[len(got.prompt) :]
        assert after[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(after[:-1]) == "4"
        assert after.count(tokenizer.eos_token_id) == 1


def test_no_space_is_put_before_a_continuation_that_stands_alone():
    tokenizer = chats.tokenizer("llama2")
    vocabulary = tokenizer.get_vocab()
    merged = next(t for t in sorted(vocabulary) if len(t) == 2 and t.isalpha() and t.isascii())
    ids = following(tokenizer, merged[0], merged[1])
    assert tokenizer.convert_ids_to_tokens(ids)[0] == merged[1]


@pytest.mark.parametrize(("text", "completion"), [("a\n", "\nb"), ("a\n", "\n\n"), ("a", "\n\nb")])
def test_no_space_is_put_before_a_completion_that_joins_the_text(text, completion):
    tokenizer = chats.tokenizer("llama2", "b")  # has a token of two line breaks
    ids = following(tokenizer, text, completion)
    assert "".join(tokenizer.convert_ids_to_tokens(ids)) == f"{completion}</s>"


def test_half_a_character_anywhere_in_a_conversation_is_refused_by_row():
    tokenizer = chats.tokenizer("chatml")
    row = {"prompt": [user(), assistant(None, tool_calls=[call(city="\ud83d")]), {"role": "tool", "content": "x"}]}
    with pytest.raises(ValueError, match="row 2: prompt, tools or tool_calls: expected whole characters"):
        encode(tokenizer, None, row, where="row 2")
    with pytest.raises(ValueError, match="row 2: completion: expected whole characters"):
        encode(tokenizer, None, {"prompt": "a"}, "\ud83d", where="row 2")


# -------------------------------------------------------------------------------------------------------------- rollouts

ROWS: list[dict[str, Any]] = [
    {"prompt": [system(), user()], "answer": "42", "tools": TOOLS},
    {"prompt": [user(), assistant("It")], "answer": " is 42", "chat_template_kwargs": {"enable_thinking": False}},
    {"prompt": [user(), assistant(None, tool_calls=[call(a=None)]), {"role": "tool", "content": "x"}], "answer": "42"},
    {"prompt": "2+2=", "answer": "4<|im_end|>"},
]


@pytest.mark.parametrize("name", ["chatml", "chatml-bos", "chatml-opens", "thinking"])
def test_rollouts_warm_up_and_evaluation_see_the_same_prompts(name):
    tokenizer = chats.tokenizer(name, "be")
    loaded = models.Loaded(models.small_model(tokenizer, 32, 1), tokenizer, None)
    prompts = rollout.encoded(loaded, ROWS, RolloutConfig())
    assert prompts[0].ids == own(tokenizer, ROWS[0]["prompt"], add_generation_prompt=True, tools=TOOLS)
    assert prompts[1].ids == own(tokenizer, ROWS[1]["prompt"], continue_final_message=True, enable_thinking=False)
    made = warmup.encode(loaded, ROWS)
    for ids, real, mask, prompt, row in zip(
        made.input_ids, made.attention_mask, made.completion_mask, prompts, ROWS, strict=True
    ):
        assert ids[real & ~mask].tolist() == prompt.ids
        assert tokenizer.decode(ids[mask][:-1]) == row["answer"].removesuffix("<|im_end|>")
        assert ids[mask][-1] == tokenizer.eos_token_id
        assert ids[mask].tolist().count(tokenizer.eos_token_id) == 1


def test_a_row_that_cannot_be_encoded_is_refused_before_the_run():
    tokenizer = chats.tokenizer("gemma")
    loaded = models.Loaded(models.small_model(tokenizer, 32, 1), tokenizer, None)
    good = {"prompt": [user()], "answer": "42"}
    task = Task([good, good], [good, {**good, "prompt": [system(), user()]}], "exact_match")
    with pytest.raises(
        ValueError, match="test sample 1: the chat template cannot render it: System role not supported"
    ):
        rollout.longest_prompt(loaded, task, RolloutConfig())
    null = Task([{**good, "prompt": [user(), assistant(None), user()]}], [good], "exact_match")
    data.check(null)
    assert rollout.longest_prompt(loaded, null, RolloutConfig()) > 0
    pair = check_row({"prompt": [system(), user()], "chosen": "a", "rejected": "b"}, "rows.jsonl, line 3")
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 3: the chat template cannot render it: System role not"):
        Encoder(tokenizer, None, None).pairs([pair])


def test_rows_that_arrow_filled_are_read_as_they_were_written(tmp_path):
    import datasets

    asks = [user(), assistant("", tool_calls=[call(city="Rome")]), {"role": "tool", "content": "sunny"}]
    other = [user(), assistant("", tool_calls=[call(a=1)]), {"role": "tool", "content": "x", "name": "n"}]
    rows = [{"prompt": messages, "answer": "42", "tools": TOOLS} for messages in (asks, other)]
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_list(rows).to_parquet(path)
    read, _ = data.read_splits(path, ("prompt", "answer"))
    tokenizer = chats.tokenizer("chatml")
    for row, written in zip(read, rows, strict=True):
        assert encode(tokenizer, None, row) == encode(tokenizer, None, written)


# --------------------------------------------------------------------------------------------------------------- rewards


def test_a_whole_conversation_as_a_text():
    tokenizer = chats.tokenizer("chatml-bos", "be")
    expected = tokenizer.apply_chat_template([user(), assistant("42")], tokenize=False)
    assert render(tokenizer, [user([{"type": "image"}, {"type": "text", "text": "What is 6*7?"}])], "42") == expected
    assert render(tokenizer, "What is 6*7?", "42") == expected
    assert render(tokenizer, [user(), assistant("4")], "2") == expected


# ----------------------------------------------------------------------------------------------------------------- pairs


@pytest.mark.parametrize("adds", ADDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_pairs_are_the_same_conversations(name, adds):
    tokenizer = chats.tokenizer(name, adds)
    encoder = Encoder(tokenizer, None, None)
    for chosen, rejected in (("42", "43"), ("<tool_call>\nx", "<think>\na</think>b"), ("<think>\na</think>b", "\n\nc")):
        row = {"prompt": [user()], "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}
        (pair,) = encoder.pairs([check_row(row, "row 1")])
        assert pair.prompt + pair.chosen == own(tokenizer, [user(), assistant(chosen)])
        assert pair.prompt + pair.rejected == own(tokenizer, [user(), assistant(rejected)])
        starts = [true_mask(tokenizer, [user()], [assistant(text)]).index(True) for text in (chosen, rejected)]
        assert len(pair.prompt) == min(starts)


def test_a_pair_is_not_cut_inside_a_special_token():
    tokenizer = chats.tokenizer("chatml-opens")  # an answer is opened with <think>
    row = {"prompt": [user()], "chosen": "<tool_call>\nx", "rejected": "<answer>"}
    (pair,) = Encoder(tokenizer, None, None).pairs([check_row(row, "row 1")])
    assert str(tokenizer.decode(pair.prompt)).endswith("<|im_start|>assistant\n")
    assert pair.chosen[0] == tokenizer.convert_tokens_to_ids("<tool_call>")


def test_pairs_take_tools_and_keywords():
    tokenizer = chats.tokenizer("thinking")
    columns: dict[str, Any] = {"tools": TOOLS, "chat_template_kwargs": {"enable_thinking": False}}
    row = {"prompt": [user()], "chosen": "a", "rejected": "b", **columns}
    (pair,) = Encoder(tokenizer, None, None).pairs([check_row(row, "row 1")])
    assert pair.prompt + pair.chosen == own(tokenizer, [user(), assistant("a")], tools=TOOLS, enable_thinking=False)
    assert pair.prompt == encode(tokenizer, None, {"prompt": [user()], **columns}, "a").prompt
    before = own(tokenizer, [user()], add_generation_prompt=True, tools=TOOLS, enable_thinking=False)
    assert pair.prompt == before[: len(pair.prompt)]
    assert len(pair.prompt) == len(before) - 1  # two line breaks are one token, but not where a word follows them


def test_pairs_of_prefilled_answers():
    tokenizer = chats.tokenizer("chatml")
    row = {"prompt": [user(), assistant("It is")], "chosen": " sunny", "rejected": [assistant(" not")]}
    (pair,) = Encoder(tokenizer, None, None).pairs([check_row(row, "row 1")])
    assert pair.prompt == own(tokenizer, [user(), assistant("It is")], continue_final_message=True)
    assert pair.prompt + pair.rejected == own(tokenizer, [user(), assistant("It is not")])


@pytest.mark.parametrize("adds", ADDS)
def test_rows_without_a_prompt_end_with_eos_once(adds):
    tokenizer = chats.tokenizer("llama3", adds)
    row = {"chosen": "2+2=4<|eot_id|>", "rejected": "2+2=5"}
    (pair,) = Encoder(tokenizer, None, None).pairs([check_row(row, "row 1")])
    for ids, text in ((pair.chosen, "2+2=4<|eot_id|>"), (pair.rejected, "2+2=5<|eot_id|>")):
        whole = pair.prompt + ids
        assert tokenizer.decode(whole) == ("<bot>" if "b" in adds else "") + text


def test_a_message_that_prompt_and_completions_share_stands_once():
    tokenizer = chats.tokenizer("chatml")
    expected = check_row(
        {"prompt": [system(), user()], "chosen": [assistant("a")], "rejected": [assistant("b")]}, "row 1"
    )
    parts = user([{"type": "text", "text": "What is 6*7?"}])
    for prompt, chosen, rejected in (
        ([system(), user()], [user(), assistant("a")], [user(), assistant("b")]),
        ([system(), user()], [parts, assistant("a")], [user(), assistant("b")]),
        ([system(), user()], [user(), assistant("a")], [assistant("b")]),
        ([system(), user()], [user(), assistant("a")], "b"),
        ([system(), user()], [system(), user(), assistant("a")], "b"),
        ([system()], [user(), assistant("a")], [user(), assistant("b")]),
    ):
        got = check_row({"prompt": prompt, "chosen": chosen, "rejected": rejected}, "row 1")
        assert (got.prompt, got.chosen, got.rejected) == (expected.prompt, expected.chosen, expected.rejected)
        assert Encoder(tokenizer, None, None).pairs([got]) == Encoder(tokenizer, None, None).pairs([expected])
    again = {"prompt": [user()], "chosen": [assistant("a"), user(), assistant("a")], "rejected": [assistant("b")]}
    assert check_row(again, "row 1").chosen == again["chosen"]  # asked again later on
    with pytest.raises(ValueError, match="row 1: rejected is empty: no message is left beyond those shared"):
        check_row({"prompt": [system(), user()], "chosen": [user(), assistant("a")], "rejected": [user()]}, "row 1")


@pytest.mark.parametrize("content", [3, ["a"], [{"text": "a"}]])
def test_a_content_of_another_kind_is_refused_by_row_and_field(content):
    refused = [user(content)]
    for field in ("prompt", "chosen"):
        row = {"prompt": [user()], "chosen": "a", "rejected": "b", field: refused}
        with pytest.raises(
            ValueError, match=f"row 1: {field}: expected content as a text or in parts with a type, got"
        ):
            check_row(row, "row 1")
    with pytest.raises(ValueError, match="row 1: prompt: expected content as a text or in parts with a type, got"):
        data.check_prompt(refused, "row 1")
    with pytest.raises(ValueError, match=r"row 1: prompt: expected a part of type 'text' with a text, got \{'type'"):
        data.check_prompt([user([{"type": "text", "text": content}])], "row 1")


def test_messages_of_the_assistant_in_a_row_stay_apart():
    tokenizer = chats.tokenizer("chatml")
    for first in (assistant("x"), assistant(None, tool_calls=[call()])):
        chosen, rejected = [user(), first, assistant("1")], [user(), first, assistant("2")]
        for prompt in ({}, {"prompt": [user()]}, {"prompt": [user(), first]}):
            row = {"chosen": chosen, "rejected": rejected, **prompt}
            (pair,) = Encoder(tokenizer, None, None).pairs([check_row(row, "row 1")])
            assert pair.prompt + pair.chosen == own(tokenizer, chosen)
            assert pair.prompt + pair.rejected == own(tokenizer, rejected)
            assert pair.prompt == own(tokenizer, [user()], add_generation_prompt=True)[: len(pair.prompt)]


def test_a_picture_leaves_the_boundary_between_tokens():
    _, processor = tiny_vision.build()
    tokenizer = processor.tokenizer
    processor.chat_template = tiny_vision.TEMPLATE.replace("%}<assistant>{%", "%}<assistant>~<|vision_end|>{%")
    row = {"prompt": [user()], "chosen": "42", "rejected": "~43", "images": [tiny_vision.picture(40)]}
    encoder = Encoder(tokenizer, processor, 256)
    (waiting,) = encoder.pairs([check_row(row, "row 1")])
    pair = encoder.with_images(waiting)
    assert str(tokenizer.decode(pair.prompt)).endswith("What is 6*7?<assistant>")
    assert [tokenizer.decode(ids) for ids in (pair.chosen, pair.rejected)] == ["42", "~43"]
    assert pair.extras["mm_token_type_ids"].shape == (1, len(pair.prompt))
    whole = encode(tokenizer, processor, {"prompt": [user()], "images": row["images"]}, "42")
    assert whole.ids == pair.prompt + pair.chosen
    assert whole.prompt == pair.prompt

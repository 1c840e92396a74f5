"""Prompts and conversations as token ids, with where the completion begins.

    row          prompt: a text or a list of messages; images (or image, or pictures in the messages' parts: `pictures` says
                 in what forms), tools, chat_template_kwargs, where there are any
    message      role, with content (a text, a list of parts, or null) or tool_calls, as chat templates know them
    completion   a text, or messages that follow the prompt's

A conversation is what the tokenizer's own `apply_chat_template` makes of it, token for token: nothing is added to it or
taken away, whatever the tokenizer adds to texts by itself. Its completion begins at the first token in which it differs
from the prompt alone, where an answer is to begin. A prompt whose last message is the assistant's is not closed: the
completion goes on with that message.

A text begins as the tokenizer begins texts (BOS), and ends with EOS if it is a completion, in either case once.

A null and a key that is missing are one, since Arrow fills with nulls whatever other rows have. An argument that is to be
null stands in arguments given as a JSON text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from fused_rlhf.trainers import inputs, pictures
from fused_rlhf.trainers.data import are_messages, check_contents, check_text, short
from fused_rlhf.trainers.inputs import Encoded, bare, common_start
from fused_rlhf.trainers.pictures import Message, at_places

Text = str | list[Message]

PROBE = [{"role": "user", "content": [{"type": "text", "text": "probe"}]}]
MARKS = ("\n", "a", ".")  # a token may span one of them and a text's first character, hardly all
COLUMNS = ("tools", "chat_template_kwargs")
OURS = (
    "conversation",
    "messages",
    "tools",
    "tokenize",
    "return_dict",
    "add_generation_prompt",
    "continue_final_message",
)


def encode(
    tokenizer: PreTrainedTokenizerBase,
    processor: ProcessorMixin | None,
    row: Mapping[str, Any],
    completion: Text | None = None,
    *,
    chat_template: bool = False,
    sampled: bool = False,
    load: bool = True,
    field: str = "completion",
    where: str = "the row",
) -> Encoded:
    """A row's prompt, and what follows it where a completion is given.

    Args:
        chat_template: texts are a user's message and an assistant's.
        sampled: a completion that is a text goes on where an answer is to begin and ends with EOS, as sampled ones do,
            whatever the template would put around it.
        load: false leaves each picture the one token that stands for it, and counts the others.
        field, where: of the completion and of the row, for messages.

    Raises ValueError naming row and field: something that is neither text nor messages, parts that the model does not
    take, pictures without a processor or a place, places without a picture, image tokens in a completion, tools or keywords
    beside a text, no chat template, one that refuses the messages or renders the prompt differently once an answer follows it.
    """
    row = pictures.gathered(row, where)
    prompt, images = row["prompt"], row.get("images", [])
    if images and processor is None:
        raise ValueError(f"{where}: images: the model takes none, got {len(images)}")
    tools, keywords = _tools(row, where), _keywords(row, where)
    plain = isinstance(prompt, str) and not chat_template and not isinstance(completion, list)
    ids: list[int] = []
    if plain:
        for name, value in (("tools", tools), ("chat_template_kwargs", keywords)):
            if value:
                raise ValueError(
                    f"{where}: {name}: expected none beside a prompt that is a text, got {short(value)}; chat_template "
                    "makes such a prompt a user's message"
                )
        start = str(prompt)
        check_text(start, where, "prompt")
    else:
        chat = _Chat(tokenizer, processor, tools, keywords, where)
        messages = at_places(chat.messages(prompt, "prompt", "user"), len(images))
        after = [] if completion is None or sampled else chat.messages(completion, field, "assistant")
        start, ids = chat.prompt(messages, after)
    start = _with_places(processor, start, len(images), plain, where)
    try:
        made = inputs.encode(tokenizer, processor, start, images, chat=not plain, load=load)
    except inputs.ProcessorError as error:
        raise ValueError(f"{where}: images: {error}") from error
    if completion is None:
        return made
    if plain or sampled:
        check_text(str(completion), where, "completion")
        rest = following(tokenizer, start, str(completion))
    else:
        begun = bare(tokenizer, start)  # with no more than a token for each image, like `ids`
        cut = common_start(begun, ids)
        made, rest = made.without_last(len(begun) - cut), ids[cut:]
    _without_pictures(processor, rest, f"{where}: {field}")
    return replace(made, ids=[*made.ids, *rest], completion=len(rest))


def _with_places(processor: ProcessorMixin | None, text: str, count: int, plain: bool, where: str) -> str:
    """A prompt's text with a place for each of its pictures, which a plain text may leave to us: before it.

    Raises ValueError where it has other places.
    """
    if processor is None:
        return text
    try:
        places = inputs.places(processor)
    except ValueError as error:
        if count == 0:
            return text
        raise ValueError(f"{where}: {error}") from error
    ids = bare(processor.tokenizer, text)  # type: ignore[attr-defined]
    found = places.count(ids)
    if found == 0 and plain and count:
        return places.text * count + text
    if found != count or any(token in places.shown and token not in places.counts for token in ids):
        tokens = ", ".join(repr(processor.tokenizer.decode([token])) for token in places.counts)  # type: ignore[attr-defined]
        raise ValueError(
            f"{where}: prompt: expected places for {count} pictures and no other image tokens (a place is a part of type "
            f"'image', which the chat template shows as {tokens}); got {short(text)}"
        )
    return text


def _without_pictures(processor: ProcessorMixin | None, ids: Sequence[int], where: str) -> None:
    """Raises ValueError where a completion holds tokens of pictures."""
    if processor is None:
        return
    try:
        shown = inputs.places(processor).shown
    except ValueError:  # a processor that makes none
        return
    if bad := [token for token in ids if token in shown]:
        name = processor.tokenizer.decode(bad[:1])  # type: ignore[attr-defined]
        raise ValueError(f"{where}: expected text alone, got the image token {name!r}; pictures belong to the prompt")


def render(tokenizer: PreTrainedTokenizerBase, prompt: Text, answer: str, where: str = "the row") -> str:
    """The texts of a conversation as the chat template puts them together, its special tokens included.

    Raises ValueError as `encode`.
    """
    chat = _Chat(tokenizer, None, None, {}, where)
    messages = chat.messages(prompt, "prompt", "user", texts_only=True)
    return chat.render(chat.whole(messages, chat.messages(answer, "completion", "assistant")))


def following(tokenizer: PreTrainedTokenizerBase, text: str, completion: str) -> list[int]:
    """Ids of a text's continuation, EOS at their end: those that the whole has after the text's own, unless a token would
    span the boundary."""
    before, whole = bare(tokenizer, text), bare(tokenizer, text + completion)
    if before and whole[: len(before)] == before:
        ids = whole[len(before) :]
    else:  # behind some character, so that no tokenizer takes it for the beginning of a text and puts a space before it
        behind = (_behind(tokenizer, mark, completion) for mark in MARKS)
        found = next((ids for ids in behind if ids is not None), None)
        ids = bare(tokenizer, completion) if found is None else found
    end = [tokenizer.eos_token_id]
    return ids if ids[-1:] == end else ids + end


def _behind(tokenizer: PreTrainedTokenizerBase, mark: str, text: str) -> list[int] | None:
    """Ids of a text behind a mark, None where a token would span the two."""
    before, whole = bare(tokenizer, mark), bare(tokenizer, mark + text)
    return whole[len(before) :] if whole[: len(before)] == before else None


def without_nulls(value: Any) -> Any:
    """The same without keys whose value is null, at any depth."""
    if isinstance(value, Mapping):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, (list, tuple)) else value


class _Chat:
    """A chat template with the tools and keywords of one row."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        processor: ProcessorMixin | None,
        tools: list[Any] | None,
        keywords: Mapping[str, Any],
        where: str,
    ) -> None:
        self.tokenizer, self.tools, self.keywords, self.where = tokenizer, tools, keywords, where
        self.renderer: Any = processor if processor is not None and processor.chat_template else tokenizer
        self.images = processor is not None
        if not self.renderer.chat_template:
            raise ValueError(f"{where}: chat_template: expected a tokenizer that has one; this one has none")
        self.parts = processor is not None and self._knows_parts()

    def prompt(self, prompt: list[Message], answer: list[Message]) -> tuple[str, list[int]]:
        """The prompt's text, up to where an answer is to begin, and the ids of the whole with the answer, if there is one.

        Nothing but its end may change once the answer follows: the text that it has with and without the beginning of an
        answer is that of the whole too.
        """
        whole, last = self.whole(prompt, answer), prompt[-1]
        prefill = self._goes_on(prompt, answer)
        known = [*whole[: len(prompt) - 1], last] if prefill else whole[: len(prompt)]
        start = self.render(known, **{"continue_final_message" if prefill else "add_generation_prompt": True})
        if not answer:
            return start, []
        fixed = start if prefill else start[: common_start(start, self.render(known))]
        text = self.render(whole)
        if not text.startswith(fixed):
            at = common_start(fixed, text)
            raise ValueError(
                f"{self.where}: prompt: expected a chat template that renders it alike with and without an answer; "
                f"{fixed[at : at + 40]!r} becomes {text[at : at + 40]!r}"
            )
        return start, bare(self.tokenizer, text)

    def whole(self, prompt: list[Message], answer: list[Message]) -> list[Message]:
        """A prompt and its answer, which may go on with the prompt's last message."""
        joined = self._goes_on(prompt, answer) and answer
        end = [self._joined(prompt[-1], answer[0]), *answer[1:]] if joined else [prompt[-1], *answer]
        return self._filled([*prompt[:-1], *end])

    def _goes_on(self, prompt: list[Message], answer: list[Message]) -> bool:
        """Whether the prompt's last message is to be gone on with. Raises ValueError where it cannot be."""
        last = prompt[-1]
        if last["role"] != "assistant" or (answer and answer[0]["role"] != "assistant"):
            return False
        if not _text_of(last).strip() or last.get("tool_calls"):
            raise ValueError(
                f"{self.where}: prompt: its last message is the assistant's: expected a text to go on with, and no tool "
                f"calls, got {short(last)}"
            )
        return True

    def render(self, messages: Sequence[Message], **how: bool) -> str:
        try:
            text = self._render(messages, **how)
        except Exception as error:  # a template may raise anything
            roles = ", ".join(m["role"] for m in messages)
            raise ValueError(
                f"{self.where}: the chat template cannot render it: {str(error)[:300]}; the messages' roles are {roles}: "
                "expected those that the template takes, in its order"
            ) from error
        check_text(text, self.where, "prompt, tools or tool_calls")
        return text

    def messages(self, value: Any, field: str, role: str, texts_only: bool = False) -> list[Message]:
        """Messages without nulls, their contents in the form that the template knows; a text is one of `role`.

        Raises ValueError for what is neither, and for parts other than text where the model takes none.
        """
        if isinstance(value, str):
            value = [{"role": role, "content": value}]
        if not value or not are_messages(value):
            raise ValueError(
                f"{self.where}: {field}: expected a text or a list of messages with role and content, not empty; "
                f"got {short(value)}"
            )
        check_contents(value, self.where, field)
        made = []
        for message in value:
            clean = without_nulls(message)
            if texts_only and isinstance(clean.get("content"), list):
                clean["content"] = [part for part in clean["content"] if part.get("type") == "text"]
            if "content" in clean:
                clean["content"] = self._content(clean["content"], field)
            elif not clean.get("tool_calls"):
                clean["content"] = self._content("", field)
            made.append(clean)
        return made

    def _content(self, content: Any, field: str) -> Any:
        if isinstance(content, str):
            return [{"type": "text", "text": content}] if self.parts else content
        known = ("text", "image") if self.images else ("text",)
        for part in content:
            if part["type"] not in known:
                words = " or ".join(map(repr, known))
                raise ValueError(
                    f"{self.where}: {field}: expected parts of type {words}, all that the model takes, got {short(part)}"
                )
        if self.parts or any(part["type"] != "text" for part in content):
            # Templates look for a picture's keys; the picture itself is the processor's.
            return [
                {"type": "text", "text": part.get("text", "")} if part["type"] == "text" else {"type": part["type"]}
                for part in content
            ]
        return "".join(part.get("text", "") for part in content)

    def _joined(self, first: Message, second: Message) -> Message:
        """Two messages of one speaker as one."""
        a, b = (m.get("content", [] if self.parts else "") for m in (first, second))
        if isinstance(a, list) and isinstance(b, list) and a and b and {a[-1]["type"], b[0]["type"]} == {"text"}:
            a, b = a[:-1], [{"type": "text", "text": a[-1]["text"] + b[0]["text"]}, *b[1:]]
        return {**first, **second, "content": a + b}

    def _filled(self, messages: list[Message]) -> list[Message]:
        """Messages that have tool calls alone get an empty content where the template fails or says "None" without one."""
        if all("content" in message for message in messages):
            return messages
        empty: Any = [] if self.parts else ""
        filled = [{"content": empty, **message} for message in messages]
        try:
            as_it_is = self._render(messages)
        except Exception:  # what it raises with contents, `render` reports
            return filled
        try:
            return filled if as_it_is.count("None") > self._render(filled).count("None") else messages
        except Exception:
            return messages

    def _knows_parts(self) -> bool:
        """Whether the template of an image-text model reads contents in parts."""
        try:
            text = str(self.renderer.apply_chat_template(PROBE, tokenize=False))
        except Exception:
            return False
        return "probe" in text and not any(shown in text for shown in ("{'type'", '{"type"'))

    def _render(self, messages: Sequence[Message], **how: bool) -> str:
        return str(
            self.renderer.apply_chat_template(list(messages), tools=self.tools, tokenize=False, **how, **self.keywords)
        )


def _text_of(message: Message) -> str:
    content = message.get("content", "")
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _tools(row: Mapping[str, Any], where: str) -> list[Any] | None:
    """Its tools, a list of JSON schemas or functions, or the JSON text of one; None where there are none."""
    tools = _column(row, "tools", where)
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) or callable(tool) for tool in tools):
        raise ValueError(f"{where}: tools: expected a list of JSON schemas or functions, got {short(tools)}")
    return tools


def _keywords(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The keywords that its chat template gets, or none."""
    keywords = _column(row, "chat_template_kwargs", where)
    if not keywords:
        return {}
    if not isinstance(keywords, dict):
        raise ValueError(f"{where}: chat_template_kwargs: expected keywords and their values, got {short(keywords)}")
    taken = [name for name in OURS if name in keywords]
    if taken:
        raise ValueError(f"{where}: chat_template_kwargs: expected none that are set already, got {taken}")
    return keywords


def _column(row: Mapping[str, Any], name: str, where: str) -> Any:
    value = row.get(name)
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: {name}: expected JSON, got {short(value)}: {error}") from error
    return without_nulls(value)

import dataclasses
import json
import math
from collections import Counter

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fused_rlhf.trainers import pairs
from fused_rlhf.trainers.collation import Collator
from fused_rlhf.trainers.inputs import Encoded
from fused_rlhf.trainers.model import char_tokenizer
from fused_rlhf.trainers.pairs import Encoder, Pair, check_row, collate
from fused_rlhf.trainers.pictures import read
from tests import tiny_vision
from tests.gsm8k import GSM8K, needs_gsm8k

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ '<eos>' if m.role == 'assistant' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ROW = {"prompt": "1+1=", "chosen": "2", "rejected": "3"}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def encoder(tokenizer=None, **options):
    return Encoder(tokenizer or char_tokenizer(), None, options.pop("context", None), **options)


def chat_tokenizer(template=TEMPLATE):
    tokenizer = char_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<system>", "<assistant>"]})
    tokenizer.chat_template = template
    return tokenizer


def one(row, **options):
    (pair,) = encoder(**options).pairs([check_row(row, "row 1")])
    return pair


def texts(pair, tokenizer=None):
    tokenizer = tokenizer or char_tokenizer()
    return tuple(tokenizer.decode(ids) for ids in (pair.prompt, pair.chosen, pair.rejected))


# ---------------------------------------------------------------------------------------------------------------- rows


def test_rows_of_every_form():
    plain = check_row(ROW, "row 1")
    assert (plain.where, plain.prompt, plain.chosen, plain.rejected) == ("row 1", "1+1=", "2", "3")
    assert (plain.images, plain.ref) == ((), None)
    assert check_row({"chosen": "ab", "rejected": "ac"}, "").prompt is None
    assert check_row({**ROW, "prompt": None}, "").prompt is None  # a column that other rows fill

    talk = [user("a"), assistant("b"), user("c")]
    implicit = check_row({"chosen": [*talk, assistant("d")], "rejected": [*talk, assistant("e")]}, "")
    assert (implicit.prompt, implicit.chosen, implicit.rejected) == (talk, [assistant("d")], [assistant("e")])
    for prompt in ("c", talk):  # given, and repeated in both
        repeated = {"prompt": prompt, "chosen": [*talk, assistant("d")], "rejected": [*talk, assistant("e")]}
        assert check_row(repeated, "") == implicit
    mixed = check_row({"prompt": talk, "chosen": "d", "rejected": [assistant("e")]}, "")
    assert mixed == implicit
    assert check_row({"prompt": "a", "chosen": [assistant("d")], "rejected": "e"}, "").prompt == [user("a")]

    refs = check_row({**ROW, "ref_chosen_logps": -1, "ref_rejected_logps": -2.5}, "")
    assert refs.ref == (-1.0, -2.5)
    a, b = (read(tiny_vision.picture(shade), "") for shade in (0, 200))
    assert check_row({**ROW, "images": [a, b]}, "").images == (a, b)
    assert check_row({**ROW, "image": a}, "").images == (a,)
    parts = [user([{"type": "image", "image": a}, {"type": "text", "text": "what?", "image": None}])]
    bare = [user([{"type": "image"}, {"type": "text", "text": "what?"}])]
    for row in ({**ROW, "prompt": parts}, {**ROW, "prompt": bare, "images": [a]}):
        assert (check_row(row, "").images, check_row(row, "").prompt) == ((a,), bare)
    shared = {"chosen": [*parts, assistant("d")], "rejected": [*parts, assistant("e")]}
    assert (check_row(shared, "").images, check_row(shared, "").prompt) == ((a,), bare)
    with pytest.raises(ValueError, match="row 1: images: expected none without a prompt, got 1"):
        check_row({"chosen": "ab", "rejected": "ac", "images": [a]}, "row 1")


def test_what_one_completion_alone_begins_with_is_its_own():
    talk = [user("a"), assistant("b"), user("c")]
    again = [assistant("b"), user("c"), assistant("d")]
    both = check_row({"prompt": talk, "chosen": again, "rejected": [*again[:2], assistant("e")]}, "")
    assert (both.chosen, both.rejected) == ([assistant("d")], [assistant("e")])
    one_alone = check_row({"prompt": talk, "chosen": [assistant("d")], "rejected": again}, "")
    assert (one_alone.prompt, one_alone.chosen, one_alone.rejected) == (talk, [assistant("d")], again)
    repeats_its_question = check_row({"prompt": talk, "chosen": "e", "rejected": again[1:]}, "")
    assert (repeats_its_question.chosen, repeats_its_question.rejected) == ([assistant("e")], [assistant("d")])


def test_rows_of_token_ids_are_refused_by_name():
    made = {f"{name}_input_ids": [5, 3] for name in ROW}
    with pytest.raises(
        ValueError, match=r"row 1: missing \['chosen', 'rejected'\]; .*'prompt_input_ids', .* are not read: "
    ):
        check_row(made, "row 1")
    texts = {"chosen": "ab", "rejected": "ac"}
    with pytest.raises(ValueError, match=r"row 1: prompt: expected a text .*, got token ids alone, 'prompt_input_ids'"):
        check_row({**texts, "prompt_input_ids": [5]}, "row 1")
    assert check_row({**ROW, "prompt_input_ids": [5]}, "row 1") == check_row(ROW, "row 1")
    assert check_row({**texts, "prompt_ids": None}, "row 1").prompt is None


@pytest.mark.parametrize("row", [None, 3, "1+1=", [ROW], {3: "1+1=", "chosen": "2"}])
def test_what_is_no_row_of_pairs_is_refused_by_number(row):
    with pytest.raises(ValueError, match="row 2: "):
        pairs.check([ROW, row], "row")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": ...}, r"row 7: missing \['chosen'\]; the columns there are \['prompt', 'rejected'\]"),
        ({"rejected": "2"}, "row 7: chosen and rejected are equal: '2'"),
        ({"chosen": " \n"}, r"row 7: chosen is empty: ' \\n'"),
        ({"rejected": None}, "row 7: rejected: expected a text or a list of messages with role and content, got None"),
        ({"chosen": [{"role": "assistant"}]}, "row 7: chosen: expected a text or a list of messages"),
        ({"chosen": [assistant("")]}, "row 7: chosen is empty"),
        ({"chosen": [assistant([{"type": "text", "text": ""}])]}, "row 7: chosen is empty"),
        ({"prompt": ""}, "row 7: prompt is empty: ''"),
        ({"chosen": "\ud83d"}, "row 7: chosen: expected whole characters"),
        (
            {"chosen": [assistant([{"type": None}])]},
            "row 7: chosen: expected content as a text or in parts with a type",
        ),
        ({"prompt": []}, "row 7: prompt is empty"),
        ({"prompt": 3}, "row 7: prompt: expected a text or a list of messages with role and content, got 3"),
        (
            {"prompt": None, "chosen": [assistant("a")]},
            "row 7: without a prompt, chosen and rejected must be two texts",
        ),
        (
            {"prompt": None, "chosen": [user("a")], "rejected": [user("b")]},
            "row 7: prompt is empty: no message is shared",
        ),
        (
            {"prompt": None, "chosen": [user("a")], "rejected": [user("a"), assistant("b")]},
            "row 7: chosen is empty: no message is left",
        ),
        (
            {"prompt": [user("a")], "chosen": [assistant([{"type": "image"}])]},
            "row 7: chosen: expected text alone; images belong to the prompt",
        ),
        ({"ref_chosen_logps": -1.0}, r"row 7: missing \['ref_rejected_logps'\]"),
        *(
            (
                {"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0} | {name: value},
                f"row 7: {name}: expected a finite",
            )
            for name in pairs.REFERENCE
            for value in (None, math.nan, -math.inf, "-1.5", [-1.0], True)
        ),
    ],
)
def test_a_row_that_cannot_be_used_is_refused_by_number_and_field(change, message):
    row = {name: value for name, value in (ROW | change).items() if value is not ...}
    with pytest.raises(ValueError, match=message):
        pairs.check([ROW] * 6 + [row], "row")


def test_files_of_every_kind_hold_the_same_pairs(tmp_path):
    import datasets

    rows = [{"prompt": f"{i}+{i}=", "chosen": str(2 * i), "rejected": str(2 * i + 1)} for i in range(20)]
    jsonl, parquet, folder = tmp_path / "a.jsonl", tmp_path / "a.parquet", tmp_path / "both"
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows))
    datasets.Dataset.from_list(rows).to_parquet(parquet)
    folder.mkdir()
    for name, some in (("train", rows[5:]), ("test", rows[:5])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    found = [pairs.load("pairs", str(source), num_test=4, seed=0) for source in (jsonl, parquet)]
    for split in found:
        assert (len(split.train), len(split.test)) == (16, 4)
    assert [p.chosen for p in found[0].test] == [p.chosen for p in found[1].test]
    assert found[0].train[0].where.startswith(f"{jsonl}, row ")
    split = pairs.load("pairs", str(folder), num_test=4, seed=0)
    assert [p.chosen for p in split.test] == ["0", "2", "4", "6", "8"]
    assert split.test[2].where == f"{folder}, test row 3"
    assert "15 to train on, 5 held out" in split.note


def test_held_out_pairs_share_no_prompt_with_those_trained_on():
    rows = [{"prompt": f"{i // 3}", "chosen": f"{i}", "rejected": "x"} for i in range(60)]
    every = pairs.check(rows, "row")
    train, test = pairs.hold_out(every, 10, seed=0)
    assert len(train) + len(test) == 60
    assert len(test) == 12  # whole prompts, of three pairs each
    assert not {p.prompt for p in train} & {p.prompt for p in test}
    assert (train, test) == pairs.hold_out(every, 10, seed=0)
    assert test != pairs.hold_out(every, 10, seed=1)[1]
    assert len(pairs.hold_out(every, 1000, seed=0)[1]) == 12  # a fifth
    assert pairs.hold_out(every, 0, seed=0)[1] == []
    same = pairs.check([{"prompt": "1", "chosen": f"{i}", "rejected": "x"} for i in range(9)], "row")
    assert len(pairs.hold_out(same, 5, seed=0)[0]) == 9  # one prompt: nothing else to train on


@needs_gsm8k
def test_solutions_of_the_real_file():
    made = pairs.load("gsm8k-solutions", str(GSM8K), num_test=500, seed=0)
    train, test = made.train, made.test
    rows = [json.loads(line) for line in (GSM8K / "example_model_solutions.jsonl").read_text().splitlines()]
    right = {row["question"]: sum(row[s]["is_correct"] for s in pairs.SOLVERS) for row in rows}
    assert len(train) + len(test) == sum(n * (4 - n) for n in right.values()) == 2429
    assert 0.19 < len(test) / 2429 < 0.21
    per_prompt = Counter(p.prompt for p in (*train, *test))
    assert set(per_prompt.values()) == {3, 4}  # one or three of four are right: 3 pairs; two: 4
    assert not {p.prompt for p in train} & {p.prompt for p in test}
    truth = {f"Question: {row['question']}\nAnswer:": row["ground_truth"].rpartition("A: ")[2] for row in rows}
    agree = [str(p.chosen).rpartition("A: ")[2].strip() == truth[str(p.prompt)] for p in train]
    wrong = [str(p.rejected).rpartition("A: ")[2].strip() == truth[str(p.prompt)] for p in train]
    assert sum(agree) > 0.99 * len(train)  # 18 or 18.0
    assert sum(wrong) < 0.01 * len(train)
    assert pairs.load("gsm8k-solutions", str(GSM8K / "example_model_solutions.jsonl"), 500, 0) == pairs.Preferences(
        *pairs.hold_out(pairs.gsm8k_solutions(GSM8K), 500, 0),
        note=f"pairs of {GSM8K / 'example_model_solutions.jsonl'}: {len(train)} to train on, {len(test)} held out",
    )


def test_a_file_that_is_not_there_or_lacks_a_column(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data: there is no .*none\.jsonl"):
        pairs.load("pairs", str(tmp_path / "none.jsonl"), 5, 0)
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + json.dumps({"prompt": "a", "chosen": "b"}) + "\n")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: missing \['rejected'\]"):
        pairs.load("pairs", str(path), 5, 0)


# ----------------------------------------------------------------------------------------------------------- token ids


def test_texts_end_with_eos_once():
    assert texts(one(ROW)) == ("1+1=", "2<eos>", "3<eos>")
    assert texts(one({**ROW, "chosen": "2<eos>"})) == ("1+1=", "2<eos>", "3<eos>")


def merging_tokenizer(bos=False):
    """The characters a, b, c, and ab as one token."""
    vocabulary = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "a": 3, "b": 4, "c": 5, "ab": 6}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if bos:
        raw.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 2)])
    special = {"pad_token": "<pad>", "eos_token": "<eos>"} | ({"bos_token": "<bos>"} if bos else {})
    return PreTrainedTokenizerFast(tokenizer_object=raw, **special)


@pytest.mark.parametrize("bos", [False, True])
def test_the_prompt_is_tokenised_as_if_nothing_followed(bos):
    start = [2] if bos else []
    pair = one({"prompt": "ca", "chosen": "ab", "rejected": "bc"}, tokenizer=merging_tokenizer(bos))
    assert pair.prompt == [*start, 5, 3]
    assert pair.chosen == [6, 1]  # as the text's own continuation
    assert pair.rejected == [4, 5, 1]  # not ab: it would span the boundary


def test_an_implicit_prompt_is_the_tokens_that_both_begin_with():
    pair = one({"chosen": "1+1=2", "rejected": "1+1=11"})
    assert texts(pair) == ("1+1=", "2<eos>", "11<eos>")
    assert pair.text == "1+1="
    pair = one({"chosen": "cab", "rejected": "cac"}, tokenizer=merging_tokenizer())
    assert (pair.prompt, pair.chosen, pair.rejected) == ([5], [6, 1], [3, 5, 1])
    with pytest.raises(ValueError, match="row 1: prompt: expected one, or a beginning that chosen and rejected share"):
        one({"chosen": "a", "rejected": "b"})
    assert one({"chosen": "ab", "rejected": "b"}, tokenizer=merging_tokenizer(bos=True)).prompt == [2]
    with pytest.raises(ValueError, match="row 1: prompt: expected one with chat_template"):
        one({"chosen": "ab", "rejected": "ac"}, tokenizer=chat_tokenizer(), chat_template=True)


def test_conversations_are_rendered_and_end_as_the_template_ends_them():
    tokenizer = chat_tokenizer()
    row = {
        "prompt": [{"role": "system", "content": "s"}, user("1+1?")],
        "chosen": [assistant("2")],
        "rejected": [assistant("3"), user("no"), assistant("4")],
    }
    pair = one(row, tokenizer=tokenizer)
    assert texts(pair, tokenizer) == ("<system>s<user>1+1?<assistant>", "2<eos>", "3<eos><user>no<assistant>4<eos>")
    in_parts = {name: [dict(m, content=[{"type": "text", "text": m["content"]}]) for m in row[name]] for name in row}
    assert one(in_parts, tokenizer=tokenizer) == pair
    as_texts = one({"prompt": "1+1?", "chosen": "2", "rejected": "3"}, tokenizer=tokenizer, chat_template=True)
    assert texts(as_texts, tokenizer) == ("<user>1+1?<assistant>", "2<eos>", "3<eos>")

    # A prompt may end as no answer begins; the completion starts where they part.
    thinking = TEMPLATE.replace("%}<assistant>{%", "%}<assistant>~think{%")
    tokenizer = chat_tokenizer(thinking)
    assert texts(one(row, tokenizer=tokenizer), tokenizer)[:2] == ("<system>s<user>1+1?<assistant>", "2<eos>")


def test_what_a_tokenizer_cannot_do_is_refused_by_row():
    messages = {"prompt": [user("1+1?")], "chosen": "2", "rejected": "3"}
    with pytest.raises(ValueError, match=r"row 1: .*chat_template: expected a tokenizer that has one"):
        one(messages)
    with pytest.raises(ValueError, match=r"row 1: .*chat_template: expected a tokenizer that has one"):
        one(ROW, chat_template=True)
    with pytest.raises(ValueError, match="row 1: the chat template cannot render it: roles must alternate"):
        one(messages, tokenizer=chat_tokenizer("{{ raise_exception('roles must alternate') }}"))
    with pytest.raises(ValueError, match="row 1: images: the model takes none, got 1"):
        one({**ROW, "images": [tiny_vision.picture(0)]})
    lossy = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1, "a": 2}, unk_token="<unk>")),
        unk_token="<unk>",
        eos_token="<eos>",
    )
    with pytest.raises(ValueError, match="row 1: chosen and rejected are equal as tokens"):
        one({"prompt": "a", "chosen": "b", "rejected": "c"}, tokenizer=lossy)


LONG = {"prompt": "abcdefgh", "chosen": "123", "rejected": "45"}  # 8 + 4 and 8 + 3 tokens


@pytest.mark.parametrize(
    ("max_length", "truncate", "expected"),
    [
        (12, "prompt_start", ("abcdefgh", "123<eos>", "45<eos>")),
        (10, "prompt_start", ("cdefgh", "123<eos>", "45<eos>")),
        (5, "prompt_start", ("h", "123<eos>", "45<eos>")),
        (3, "prompt_start", ("h", "12", "45")),
        (11, "completion_end", ("abcdefgh", "123", "45<eos>")),
        (9, "completion_end", ("abcdefgh", "1", "4")),
    ],
)
def test_what_is_cut_where_a_pair_is_too_long(max_length, truncate, expected):
    assert texts(one(LONG, max_length=max_length, truncate=truncate)) == expected


def test_bos_stays_where_a_prompt_is_cut():
    tokenizer = merging_tokenizer(bos=True)
    row = {"prompt": "cccaa", "chosen": "b", "rejected": "c"}
    assert one(row, tokenizer=tokenizer, max_length=5).prompt == [2, 3, 3]
    assert one(row, tokenizer=tokenizer, max_length=3).prompt == [3]  # one token alone is the prompt's last


def test_pairs_that_do_not_fit_are_left_out_or_refused():
    some = [check_row(row, f"row {i}") for i, row in enumerate((ROW, LONG, ROW), 1)]
    kept = encoder(max_length=8, truncate="drop").pairs(some)
    assert [pair.where for pair in kept] == ["row 1", "row 3"]
    with pytest.raises(ValueError, match=r"row 2: prompt of 8 tokens, chosen of 4, rejected of 3: beyond the model's "):
        encoder(context=11).pairs(some)
    assert len(encoder(context=12).pairs(some)) == 3
    with pytest.raises(ValueError, match="row 2: prompt of 8 tokens: expected fewer than max_length=8; truncate="):
        encoder(max_length=8, truncate="completion_end").pairs(some)
    alike = check_row({"prompt": "abc", "chosen": "xy1", "rejected": "xy2"}, "row 4")
    with pytest.raises(ValueError, match="row 4: chosen and rejected are equal as tokens, cut to max_length=5"):
        encoder(max_length=5, truncate="completion_end").pairs([alike])


def test_images_wait_and_become_a_part_of_the_prompt():
    _, processor = tiny_vision.build()
    made = Encoder(processor.tokenizer, processor, 256)
    picture = tiny_vision.picture(40)
    rows = [
        {"prompt": [user("what?")], "chosen": "red", "rejected": "blue", "images": [picture]},
        {"prompt": [user("what?")], "chosen": "red", "rejected": "blue", "images": []},
    ]
    with_picture, without = made.pairs(pairs.check(rows, "row"))
    assert with_picture.length == len(with_picture.prompt) + 1 + 4  # two tokens where there is one place
    assert made.with_images(without) is without
    whole = made.with_images(with_picture)
    patches = whole.extras["image_grid_thw"].prod().item() // 4  # merged two by two
    assert whole.prompt.count(processor.image_token_id) == patches == 2
    assert whole.extras["pixel_values"].shape[0] == 4 * patches
    assert processor.tokenizer.decode(whole.prompt).endswith("<|vision_end|>what?<assistant>")
    assert with_picture.length == whole.length
    assert with_picture.extras == {}  # the loaded one can be forgotten

    batch = collate([whole, without], pad_token_id=0)
    assert batch.input_ids.shape[0] == 4
    collator = Collator(
        frozenset({"mm_token_type_ids"}), frozenset({"mm_token_type_ids"}), spare=Encoded([], whole.extras)
    )
    found = dataclasses.replace(batch, collator=collator).batch().rows.pictures()
    assert found["pixel_values"].shape[0] == 2 * 4 * patches  # chosen and rejected have it both
    assert torch.equal(batch.input_ids[0, : len(whole.prompt)], batch.input_ids[2, : len(whole.prompt)])
    kinds = found["mm_token_type_ids"]
    assert torch.equal(kinds == 1, batch.input_ids == processor.image_token_id)
    length = len(whole.prompt) + len(whole.rejected)

    def cut(truncate):
        return Encoder(processor.tokenizer, processor, 256, max_length=length - 1, truncate=truncate)

    some = pairs.check(rows[:1], "row")
    with pytest.raises(ValueError, match=f"row 1: images: with them it has {length} tokens; expected at most"):
        cut("prompt_start").pairs(some)
    assert cut("drop").pairs(some) == []
    (shorter,) = cut("completion_end").pairs(some)
    assert (shorter.chosen, shorter.rejected) == (whole.chosen, whole.rejected[:-1])
    assert len(Encoder(processor.tokenizer, processor, 256, max_length=length).pairs(some)) == 1


# ------------------------------------------------------------------------------------------------------------- batches

SOME = [
    Pair("row 1", "", [1, 2, 3], [4, 5], [6], ref=(-1.0, -2.0)),
    Pair("row 2", "", [7], [8], [9, 10, 11], ref=(-3.0, -4.0)),
]


def test_the_length_of_a_pair_is_that_of_its_longer_sequence():
    assert [pair.length for pair in SOME] == [5, 4]


def test_a_padded_batch():
    batch = collate(SOME, pad_token_id=0)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5], [7, 8, 0, 0, 0], [1, 2, 3, 6, 0], [7, 9, 10, 11, 0]]
    assert batch.completion_mask.int().tolist() == [[0, 0, 0, 1, 1], [0, 1, 0, 0, 0], [0, 0, 0, 1, 0], [0, 1, 1, 1, 0]]
    assert batch.attention_mask.sum(dim=1).tolist() == [5, 2, 4, 4]
    assert batch.ref_logprobs.tolist() == [-1.0, -3.0, -2.0, -4.0]
    assert (batch.num_pairs, batch.num_tokens) == (2, 15)


def test_a_pair_without_reference_leaves_the_batch_without():
    assert collate([SOME[0], Pair("", "", [1], [2], [3])], pad_token_id=0).ref_logprobs is None


def test_a_batch_moves_as_a_whole():
    batch = collate(SOME, pad_token_id=0).to(torch.device("meta"))
    assert {x.device.type for x in (batch.input_ids, batch.attention_mask)} == {"meta"}

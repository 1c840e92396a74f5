import dataclasses

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fused_rlhf.trainers import pair_rows
from fused_rlhf.trainers.collation import Collator
from fused_rlhf.trainers.inputs import Encoded
from fused_rlhf.trainers.model import char_tokenizer
from fused_rlhf.trainers.pair_rows import check_row
from fused_rlhf.trainers.pairs import Encoder, Pair, collate
from tests import tiny_vision

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
    with_picture, without = made.pairs(pair_rows.check(rows, "row"))
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

    some = pair_rows.check(rows[:1], "row")
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

"""Rows with pictures in one batch against each of them alone, in families whose processors differ most."""

import dataclasses

import pytest
import torch

import fused_rlhf as fr
from fused_rlhf.bench.picture_rows import picture
from fused_rlhf.trainers import collation, forwards
from fused_rlhf.trainers import model as models
from fused_rlhf.trainers.collation import Collator, joined
from fused_rlhf.trainers.conversation import encode
from fused_rlhf.trainers.forwards import Rows
from fused_rlhf.trainers.rollout import generate, uniforms
from tests.vision_families import FAMILIES

SIX = {
    "qwen2.5-vl": ("zero", "all", False),
    "llava-onevision": (None, "all", False),
    "gemma3": ("zero", "all", False),
    "idefics3": (None, "all", False),
    "paligemma": ("one", "all", True),
    "mllama": ("last", "alike", False),
}


@pytest.fixture(scope="module", params=SIX)
def family(request):
    model, processor = FAMILIES[request.param]()
    models.complete_tokenizer(processor.tokenizer, request.param)
    return request.param, model, processor, collation.learned(model, processor.tokenizer, processor, True)


def prompts(processor):
    """Of one picture, of none, of three in two turns, of another size."""
    sizes = ((40, 28), (28, 56), (64, 32), (36, 44), (16, 80))
    a, b, c, d, e = ({"type": "image", "image": picture(40 * i, *size)} for i, size in enumerate(sizes))

    def text(words):
        return {"type": "text", "text": words}

    turns = [("user", [b, text("First?")]), ("assistant", [text("1")]), ("user", [c, text("and"), d, text("?")])]
    rows = [
        [{"role": "user", "content": [text("What is"), a, text("this?")]}],
        [{"role": "user", "content": [text("2+2?")]}],
        [{"role": role, "content": parts} for role, parts in turns],
        [{"role": "user", "content": [e, text("?")]}],
    ]
    return [encode(processor.tokenizer, processor, {"prompt": messages}) for messages in rows]


def as_rows(made, completions, collator, pad=0):
    ids = [torch.tensor([*row.ids, *more]) for row, more in zip(made, completions, strict=True)]
    padded = torch.nn.utils.rnn.pad_sequence(ids, True, pad)
    mask = torch.arange(padded.shape[1]) < torch.tensor([len(x) for x in ids])[:, None]
    return Rows(padded, mask.long(), [row.extras for row in made], [len(row.ids) for row in made], collator)


def head_inputs(model, rows):
    """With hidden states of all tokens, (B, T, H)."""
    parts = []

    def call(input_ids, attention_mask, **extras):
        parts.append(fr.lm_head.forward(model, input_ids, attention_mask, **extras))
        return parts[-1].hidden

    hidden = rows.through(call)
    return dataclasses.replace(parts[0], hidden=hidden)


COMPLETIONS = [[5, 6, 7, 8], [9], [6, 5], [8, 8, 5]]


def test_what_is_found_by_trial(family):
    name, _, _, found = family
    fill, share, typed = SIX[name]
    assert set(found.fills.values()) == ({fill} if fill else set())
    assert (found.share, found.typed) == (share, typed)


def test_the_same_is_found_in_half_precision(family):
    name, _, _, found = family
    model, processor = FAMILIES[name]()
    half = collation.learned(model.bfloat16(), processor.tokenizer, processor, True)
    assert {**vars(half), "spare": None} == {**vars(found), "spare": None}


def test_a_batch_is_its_rows_alone(family):
    _, model, processor, found = family
    made = prompts(processor)
    rows = as_rows(made, COMPLETIONS, found)
    with torch.no_grad():
        together = head_inputs(model, rows).hidden
        for i, row in enumerate(made):
            length = len(row.ids) + len(COMPLETIONS[i])
            one = head_inputs(model, forwards.alone(row, found, "cpu", COMPLETIONS[i])).hidden[0]
            assert one.shape[0] == length
            torch.testing.assert_close(together[i, :length], one, atol=1e-5, rtol=1e-5)


def test_a_changed_picture_changes_the_log_probs(family):
    _, model, processor, found = family
    made = prompts(processor)[:1]
    other = encode(
        processor.tokenizer,
        processor,
        {"prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}],
         "images": [picture(200, 40, 28)]},
    )  # fmt: skip
    same = encode(
        processor.tokenizer,
        processor,
        {"prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}],
         "images": [picture(20, 40, 28)]},
    )  # fmt: skip
    assert other.ids == same.ids
    found_logprobs = []
    for row in (made[0], same, other):
        inputs = head_inputs(model, forwards.alone(row, found, "cpu", [5, 6, 7]))
        targets = torch.tensor([[5, 6, 7]])
        hidden = inputs.hidden[:, len(row.ids) - 1 : -1]
        found_logprobs.append(fr.linear_logprobs(hidden, inputs.head, targets).logprobs)
    assert (found_logprobs[1] - found_logprobs[2]).abs().max() > 1e-4


def test_log_probs_are_those_of_the_models_own_generation(family):
    """Sampled together, the text row and the three pictures among them."""
    _, model, processor, found = family
    made = prompts(processor)
    tokenizer = processor.tokenizer
    some = generate(model, tokenizer, made, max_new_tokens=4, uniforms=uniforms(0, 1, 4, 4), collator=found)
    with torch.no_grad():
        inputs = head_inputs(model, some.rows())
        targets = some.input_ids[:, 1:].masked_fill(~some.completion_mask[:, 1:], -100)
        got = fr.linear_logprobs(inputs.hidden[:, :-1], inputs.head, targets).logprobs
    for i, row in enumerate(made):
        ids = some.input_ids[i][some.attention_mask[i]].tolist()
        new = ids[len(row.ids) :]
        (own,) = (
            model.generate(
                input_ids=torch.tensor([row.ids]),
                attention_mask=torch.ones(1, len(row.ids), dtype=torch.int64),
                **row.extras,
                do_sample=False,
                max_new_tokens=len(new),
                logits_processor=[Forced(new, len(row.ids))],
                output_logits=True,
                return_dict_in_generate=True,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=None,
            ).logits,
        )
        want = torch.stack(own, 1)[0].log_softmax(-1)[range(len(new)), new]
        torch.testing.assert_close(got[i][some.completion_mask[i, 1:]], want.float(), atol=1e-5, rtol=1e-5)


class Forced:
    """Makes `generate` go along given tokens."""

    def __init__(self, tokens, start):
        self.tokens, self.start = tokens, start

    def __call__(self, input_ids, scores):
        token = self.tokens[input_ids.shape[1] - self.start]
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([token]), 0.0)


def test_rows_without_a_picture_run_the_vision_modules_where_all_processes_must(family):
    _, model, processor, found = family
    text = [row for row in prompts(processor) if not row.extras]
    rows = as_rows(text, [[5, 6]], found)
    plain = head_inputs(model, rows).hidden
    always = Collator(**{**vars(found), "always": True})
    hidden = head_inputs(model, as_rows(text, [[5, 6]], always)).hidden
    torch.testing.assert_close(hidden, plain, atol=1e-5, rtol=1e-5)
    model.zero_grad()
    hidden.square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    vision = [name for name in grads if "vision" in name or "visual" in name]
    assert vision
    assert max(grads[name].abs().max().item() for name in vision) == 0
    model.zero_grad()
    plain.square().sum().backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(grads[name], p.grad, atol=1e-4, rtol=1e-4)
    model.zero_grad()


def test_joined():
    a, b = torch.ones(1, 2, 3), 2 * torch.ones(1, 4, 2)
    got = joined([a, b], by_row=True)
    assert got.shape == (2, 4, 3)
    assert got[0, :2, :3].eq(1).all()
    assert got[0, 2:].eq(0).all()
    assert got[1, :, :2].eq(2).all()
    assert got[1, :, 2].eq(0).all()
    assert joined([None, a], by_row=True).shape == (2, 2, 3)
    assert torch.equal(joined([None, a], by_row=False), a)


def test_rows_that_share_no_batch_keep_their_order():
    found = Collator(share="alike")
    made = [torch.full((1, size), float(size)) for size in (3, 2, 3, 4)]
    rows = Rows(torch.arange(8).view(4, 2), torch.ones(4, 2), [{"x": x} for x in made], [2] * 4, found)
    seen = []

    def call(input_ids, attention_mask, x):
        seen.append((input_ids[:, 0].tolist(), tuple(x.shape)))
        return input_ids * 10

    assert torch.equal(rows.through(call), rows.input_ids * 10)
    assert seen == [([0, 4], (2, 3)), ([2], (1, 2)), ([6], (1, 4))]
    assert Collator(share="none").groups([{}, {}]) == [[0], [1]]

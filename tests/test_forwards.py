"""States, losses and gradients of sequences in any layout, against each of them by itself."""

import copy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import fused_rlhf as fr
from fused_rlhf.trainers import attention
from fused_rlhf.trainers import model as models
from fused_rlhf.trainers.forwards import Batch, Rows
from fused_rlhf.trainers.layout import Layout

LAYOUTS = [
    Layout(),
    Layout(masked=False),
    Layout("packed"),
    Layout("packed", table=False),
    Layout("shared"),
]
TEXTS = [("12+3=", "15"), ("12+3=", "7"), ("1", "123"), ("12+3=", "15000"), ("9-", "2")]


@pytest.fixture(scope="module")
def pair():
    """A model that computes in the dtype that it has: norms of many are fp32 in any."""
    torch.manual_seed(0)
    tokenizer = models.char_tokenizer()
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=32)
    ).eval()
    for parameter in model.parameters():
        parameter.data.mul_(2.0)
    assert attention.adopt(model)
    return model.double(), tokenizer


def batch_of(tokenizer, layout, counted=lambda mask: mask):
    prompts, answers = ([tokenizer(text)["input_ids"] for text in column] for column in zip(*TEXTS, strict=True))
    rows = [torch.tensor(p + a) for p, a in zip(prompts, answers, strict=True)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, True, tokenizer.pad_token_id)
    at, sizes = torch.arange(ids.shape[1]), torch.tensor([len(row) for row in rows])[:, None]
    lengths = [len(prompt) for prompt in prompts]
    mask = (at < sizes) & (at >= torch.tensor(lengths)[:, None])
    return Batch(Rows(ids, at < sizes, [{}] * len(ids), lengths, None), counted(mask), layout)


def by_itself(model, batch):
    """(N,) log-probs of the counted tokens, a row at a time, by the model's own logits."""
    found = []
    for i, length in enumerate(batch.rows.lengths()):
        ids = batch.rows.input_ids[i : i + 1, :length]
        logprobs = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        found.append(logprobs[batch.completion_mask[i, 1:length]])
    return torch.cat(found)


def logprobs(model, batch):
    inputs = batch.head_inputs(model)
    return fr.linear_logprobs(inputs.hidden, inputs.head, batch.targets).logprobs


def without_some(mask):
    """A sequence whose completion does not count, and one with a hole."""
    mask = mask.clone()
    mask[1] = False
    mask[3, 7] = False
    return mask


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("counted", [lambda mask: mask, without_some])
def test_values_and_gradients_are_those_of_rows_by_themselves(pair, layout, counted):
    model, tokenizer = copy.deepcopy(pair[0]), pair[1]
    batch = batch_of(tokenizer, layout, counted)
    upstream = torch.linspace(-1, 1, int(batch.completion_mask.sum()), dtype=torch.float64)
    want = by_itself(model, batch)
    (want * upstream).sum().backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    got = logprobs(model, batch)
    torch.testing.assert_close(got, want, atol=1e-10, rtol=0)
    (got * upstream).sum().backward()
    for p, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad, atol=1e-10, rtol=1e-8)


def test_what_the_losses_take(pair):
    batch = batch_of(pair[1], Layout("shared"), without_some)
    assert batch.cu_seqlens.tolist() == [0, 2, 2, 5, 9, 10]
    assert batch.targets.tolist() == batch.rows.input_ids[batch.completion_mask].tolist()
    values = torch.arange(1.0, 11.0)
    spread = batch.spread(values)
    assert spread.shape == (5, batch.rows.input_ids.shape[1] - 1)
    assert torch.equal(batch.flat(spread), values)
    assert spread.sum() == values.sum()


def test_a_shared_prompt_is_read_once(pair):
    tokenizer, seen = pair[1], []
    for name in ("padded", "packed", "shared"):
        batch_of(tokenizer, Layout(name)).states(
            lambda ids, mask, **more: seen.append(ids.numel()) or torch.zeros(*ids.shape, 4)
        )
    assert seen == [5 * 10, 7 + 6 + 4 + 10 + 3, 7 + 6 + 4 + 10 + 3 - 2 * 5]


def test_numbers_for_each_token(pair):
    """(rows, length) as of a value head, in place of states."""
    for layout in LAYOUTS[::2]:
        batch = batch_of(pair[1], layout)
        got = batch.states(lambda ids, mask, **more: ids.double() * 3)
        assert torch.equal(got, 3.0 * batch.rows.input_ids[:, :-1][batch.completion_mask[:, 1:]])

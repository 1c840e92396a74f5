"""Attention over rows of several sequences, against one dense mask."""

import copy
import itertools
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask
from transformers import GptOssConfig, GptOssForCausalLM, LlamaConfig, LlamaForCausalLM

from fused_rlhf.trainers import attention
from fused_rlhf.trainers.attention import NO_WINDOW, Group, groups_of, pieces, seen, table_of

ROWS = [
    [Group(13, (7, 5, 11)), Group(9, (6, 4)), Group(8)],
    [Group(3, (1,)), Group(1, (9, 9)), Group(2, (0, 4))],
    [Group(20)],
]
WINDOWS = [1, 2, 6, 9, 14, 40, NO_WINDOW]
BASE: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def dense(groups, window):
    """Which tokens see which, one by one."""
    tokens = [
        (number, part, (group.prompt if part else 0) + i)
        for number, group in enumerate(groups)
        for part, length in enumerate((group.prompt, *group.completions))
        for i in range(length)
    ]

    def sees(query, key):
        (group, part, at), (other, its, where) = tokens[query], tokens[key]
        return group == other and its in (0, part) and where <= at and at - where < window and key <= query

    return torch.tensor([[sees(i, j) for j in range(len(tokens))] for i in range(len(tokens))])


@pytest.mark.parametrize("groups", ROWS)
def test_a_table_holds_what_it_was_made_of(groups):
    table = table_of(groups)
    assert table.shape == (1, 1, 3, sum(group.length for group in groups))
    assert attention.is_table(table)
    parts = [(group.prompt, *filter(None, group.completions)) for group in groups]  # a part without tokens is none
    assert [(group.prompt, *group.completions) for group in groups_of(table)] == parts


@pytest.mark.parametrize(("groups", "window"), itertools.product(ROWS, WINDOWS))
def test_pieces_blocks_and_the_dense_mask_say_the_same(groups, window):
    want, table = dense(groups, window), table_of(groups)
    assert torch.equal(seen(table, window), want)
    counts = torch.zeros(want.shape, dtype=torch.int64)
    for piece in pieces(groups, window):
        shape = piece.queries.stop - piece.queries.start, piece.keys.stop - piece.keys.start
        whole = torch.ones(shape, dtype=torch.bool)
        met = whole.tril() if piece.causal else whole if piece.mask is None else piece.mask
        assert met.any(dim=1).all()  # a query without keys would be NaN
        counts[piece.queries, piece.keys] += met
    assert torch.equal(counts, want.long())  # each pair once
    length = len(want)
    found = create_mask(attention.visible(table, window), None, None, length, length, device="cpu")
    assert torch.equal(found[0, 0], want)


@pytest.mark.parametrize(("groups", "window"), itertools.product(ROWS, [2, 9, NO_WINDOW]))
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_values_and_gradients_of_pieces(groups, window, kv_heads):
    torch.manual_seed(0)
    length = sum(group.length for group in groups)
    q, k, v = (torch.randn(1, heads, length, 8, dtype=torch.float64) for heads in (4, kv_heads, kv_heads))
    some = [x.requires_grad_() for x in (q, k, v)]
    upstream = torch.randn(1, 4, length, 8, dtype=torch.float64)
    got = attention._ByPieces.apply(q, k, v, pieces(groups, window), 0.3)
    want = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=dense(groups, window), scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    pairs = zip(torch.autograd.grad(got, some, upstream), torch.autograd.grad(want, some, upstream), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-12)


def test_no_more_is_kept_for_the_backward_than_by_one_call():
    """Queries, keys, values, the output and its sums, of the row: nothing that grows with completions times prompt."""
    groups, kept = [Group(64, (8,) * 16)], []
    length = groups[0].length
    q, k, v = (torch.randn(1, 2, length, 8, requires_grad=True) for _ in range(3))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        attention._ByPieces.apply(q, k, v, pieces(groups), None)
    assert sum(kept) == 4 * 2 * length * 8 + 2 * length


def models():
    torch.manual_seed(0)
    experts: dict[str, Any] = {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8, "sliding_window": 4}
    return {
        "sdpa": LlamaForCausalLM(LlamaConfig(**BASE)),
        "eager": LlamaForCausalLM._from_config(LlamaConfig(**BASE), attn_implementation="eager"),
        "sinks": GptOssForCausalLM(GptOssConfig(**BASE | experts)),  # eager, and every other layer through a window
    }


@pytest.mark.parametrize("name", ["sdpa", "eager", "sinks"])
def test_an_adopted_model_reads_tables_and_is_otherwise_as_it_was(name):
    model = models()[name].eval()
    prompt, completions = torch.arange(1, 8), (torch.arange(20, 25), torch.arange(30, 33))
    whole = [torch.cat([prompt, c])[None] for c in completions]
    before = [model(ids).logits[0] for ids in whole]
    own = model.config._attn_implementation
    assert attention.adopt(model)
    assert attention.adopt(model)  # once is enough
    assert model.config._attn_implementation == attention.PREFIX + own
    assert "attn" not in str(model.config.to_dict().keys())  # a saved model knows nothing of it
    for ids, logits in zip(whole, before, strict=True):
        assert torch.equal(model(ids).logits[0], logits)
    padded = torch.cat([whole[0], torch.nn.functional.pad(whole[1], (0, 2))])
    mask = torch.arange(12) < torch.tensor([[12], [10]])
    torch.testing.assert_close(model(padded, attention_mask=mask).logits[1, :10], before[1], atol=1e-5, rtol=1e-5)
    row = torch.cat([prompt, *completions])[None]
    positions = torch.cat([torch.arange(7), 7 + torch.arange(5), 7 + torch.arange(3)])[None]
    got = model(row, attention_mask=table_of([Group(7, (5, 3))]), position_ids=positions).logits[0]
    torch.testing.assert_close(got[:12], before[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got[12:], before[1][7:], atol=1e-5, rtol=1e-5)
    tokens = model.generate(whole[0], max_new_tokens=4, do_sample=False)
    assert tokens.shape == (1, 16)


def test_a_copy_of_an_adopted_model_is_one_too():
    model = models()["sdpa"]
    assert attention.adopt(model)
    assert copy.deepcopy(model).config._attn_implementation == attention.PREFIX + "sdpa"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_under_autocast_and_checkpointing(checkpointing):
    model = models()["sdpa"].train()
    assert attention.adopt(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids, table = torch.arange(1, 13)[None], table_of([Group(5, (4, 3))])
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8, 5, 6, 7]])
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(ids, attention_mask=table, position_ids=positions, use_cache=False).logits
    exact = model(ids, attention_mask=table, position_ids=positions, use_cache=False).logits
    assert 0 < (rounded - exact).abs().max() < 0.05 * exact.abs().max()
    exact.square().sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_disable()
    model(ids, attention_mask=table, position_ids=positions, use_cache=False).logits.square().sum().backward()
    for once, p in zip(grads, model.parameters(), strict=True):
        assert torch.equal(once, p.grad)

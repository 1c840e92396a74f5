import pytest
import torch
from transformers import GenerationConfig

import fused_rlhf as fr
from fused_rlhf.trainers import model as models
from fused_rlhf.trainers import rollout
from fused_rlhf.trainers.data import Task


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    model, tokenizer = models.build(hidden_size=32, num_layers=2)
    return model.eval(), tokenizer


def test_pack_keeps_the_eos_and_drops_what_follows(pair):
    _, tokenizer = pair
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    output = torch.tensor(
        [
            [pad, 5, 6, 7, eos, pad],  # a left-padded prompt, an answer that ends
            [5, 6, 7, 8, 9, 10],  # never ends
            [pad, pad, 5, eos, 8, eos],  # ends at once; a sampler's tokens after the EOS are not the completion's
        ]
    )
    prompt_mask = torch.tensor([[0, 1, 1], [1, 1, 1], [0, 0, 1]]).bool()
    got = rollout.pack(output, prompt_mask, [eos], tokenizer)
    assert got.input_ids.tolist() == [
        [5, 6, 7, eos, pad, pad],
        [5, 6, 7, 8, 9, 10],
        [5, eos, pad, pad, pad, pad],
    ]
    assert got.completion_mask.int().tolist() == [[0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1], [0, 1, 0, 0, 0, 0]]
    assert got.attention_mask.int().tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6, [1, 1, 0, 0, 0, 0]]
    assert got.truncated.tolist() == [False, True, False]
    assert got.texts == [tokenizer.decode([7]), tokenizer.decode([8, 9, 10]), ""]
    assert got.without_truncated().completion_mask[1].any().item() is False
    assert got.without_truncated().completion_mask[0].sum() == 2
    assert got[slice(0, 1)].input_ids.tolist() == [[5, 6, 7, eos]]


def test_an_eos_that_is_also_the_padding_counts_once(pair):
    _, tokenizer = pair
    eos = tokenizer.eos_token_id
    got = rollout.pack(torch.tensor([[eos, 5, 7, eos, eos]]), torch.tensor([[False, True]]), [eos], tokenizer)
    assert got.completion_mask.tolist() == [[False, True, True]]


def test_left_padding_changes_no_token_and_no_logprob(pair):
    model, tokenizer = pair
    prompts = ["1+1=", "12345+67890=", "7"]
    (together,) = rollout.generate(model, tokenizer, prompts, max_new_tokens=6, temperature=0.0)
    logprobs = fr.lm_head.logprobs(
        model, together.input_ids, together.attention_mask, completion_mask=together.completion_mask
    ).logprobs
    for row, prompt in enumerate(prompts):
        (alone,) = rollout.generate(model, tokenizer, [prompt], max_new_tokens=6, temperature=0.0)
        live = together.attention_mask[row]
        assert together.input_ids[row, live].tolist() == alone.input_ids[0].tolist()
        assert tokenizer.decode(alone.input_ids[0]).startswith(prompt)
        dense = model(alone.input_ids).logits[0, :-1].double().log_softmax(-1)
        want = dense.gather(1, alone.input_ids[0, 1:, None])[:, 0] * alone.completion_mask[0, 1:]
        torch.testing.assert_close(logprobs[row, : len(want)].double(), want, atol=1e-5, rtol=0)
        assert logprobs[row, len(want) :].abs().max().item() == 0 if len(want) < logprobs.shape[1] else True


def test_sampling_is_from_the_whole_distribution_whatever_the_models_own_configuration(pair):
    model, tokenizer = pair
    own = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=1, min_p=0.9, repetition_penalty=3.0, eos_token_id=own.eos_token_id
    )
    try:
        (some,) = rollout.generate(model, tokenizer, ["1+1="] * 400, max_new_tokens=1)
        assert model.generation_config.top_k == 1
    finally:
        model.generation_config = own
    first = some.input_ids[:, 4]
    p = model(some.input_ids[:1, :4]).logits[0, -1].softmax(-1)
    expected = 1 - (1 - p).pow(400)  # the chance that a token is seen in 400 draws
    seen = len(first.unique())
    spread = (expected * (1 - expected)).sum().sqrt()
    assert abs(seen - expected.sum()) < 5 * spread


def test_every_eos_of_the_generation_configuration_ends_a_completion(pair):
    model, tokenizer = pair
    own = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=[7, 9])
    try:
        assert rollout.eos_ids(model, tokenizer) == sorted({7, 9, tokenizer.eos_token_id})
    finally:
        model.generation_config = own


def test_generate_in_batches_gives_the_same_greedy_texts(pair):
    model, tokenizer = pair
    prompts = [f"{i}*{i}=" for i in range(7)]
    batches = rollout.generate(model, tokenizer, prompts, max_new_tokens=4, temperature=0.0, batch_size=3)
    assert [len(batch.texts) for batch in batches] == [3, 3, 1]
    (whole,) = rollout.generate(model, tokenizer, prompts, max_new_tokens=4, temperature=0.0)
    assert [text for batch in batches for text in batch.texts] == whole.texts


def test_slices():
    assert rollout.slices(slice(2, 9), 3) == [slice(2, 5), slice(5, 8), slice(8, 9)]
    assert rollout.slices(slice(0, 0), 3) == []


def test_a_prompt_beyond_the_context_is_named(pair):
    model, tokenizer = pair
    short = {"prompt": "1+1=", "answer": "2"}
    long = {"prompt": "1+" * 120, "answer": "2"}
    rollout.check_lengths(model, tokenizer, Task([short], [long], "exact_match"), max_new_tokens=16)
    with pytest.raises(
        ValueError, match=r"test sample 1: its prompt of 240 tokens and max_new_tokens=17 .*context of 256"
    ):
        rollout.check_lengths(model, tokenizer, Task([short], [short, long], "exact_match"), max_new_tokens=17)

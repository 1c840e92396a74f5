import dataclasses

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper

import fused_rlhf as fr
from fused_rlhf.trainers import engine, generation, rollout
from fused_rlhf.trainers import model as models
from fused_rlhf.trainers.grpo_config import Config
from fused_rlhf.trainers.inputs import Encoded, encode
from fused_rlhf.trainers.reported import TokenSets
from tests.cuts import CUTS, kept_of


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    model, tokenizer = models.build(hidden_size=32, num_layers=2)
    return model.eval(), tokenizer


def encoded(tokenizer, *texts):
    return [encode(tokenizer, None, text) for text in texts]


def test_assemble_keeps_the_eos_and_drops_what_follows(pair):
    _, tokenizer = pair
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    prompts = [Encoded([5, 6]), Encoded([5, 6, 7]), Encoded([5])]
    # One that ends, one that never does, one that ends at once: what a sampler adds after the EOS is not its own.
    tokens = [[7, eos, pad], [8, 9, 10], [eos, 8, eos]]
    sampled = [[-0.1, -0.2, 9.0], [-0.3, -0.4, -0.5], [-0.6, 9.0, 9.0]]
    sets = [TokenSets(torch.arange(6, dtype=torch.int32) + 10 * row, torch.tensor([1, 2, 3])) for row in range(3)]
    got = rollout.assemble(prompts, tokens, [eos], tokenizer, sampling_logprobs=sampled, kept=sets)
    assert got.input_ids.tolist() == [
        [5, 6, 7, eos, pad, pad],
        [5, 6, 7, 8, 9, 10],
        [5, eos, pad, pad, pad, pad],
    ]
    assert got.completion_mask.int().tolist() == [[0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1], [0, 1, 0, 0, 0, 0]]
    assert got.attention_mask.int().tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6, [1, 1, 0, 0, 0, 0]]
    want = torch.tensor([[0.0, -0.1, -0.2, 0.0, 0.0], [0.0, 0.0, -0.3, -0.4, -0.5], [-0.6, 0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(got.sampling_logprobs, want)  # entry t is of token t + 1
    assert got.truncated.tolist() == [False, True, False]
    assert got.texts == [tokenizer.decode([7]), tokenizer.decode([8, 9, 10]), ""]
    assert got.without_truncated().completion_mask[1].any().item() is False
    assert got.without_truncated().completion_mask[0].sum() == 2
    assert got[range(1)].input_ids.tolist() == [[5, 6, 7, eos]]
    assert got[range(1)].sampling_logprobs.shape == (1, 3)
    assert listed(got) == [[0], [1, 2], [10], [11, 12], [13, 14, 15], [20]]
    assert listed(got.without_truncated()) == [[0], [1, 2], [20]]
    assert listed(got[[2, 0]]) == [[20], [0], [1, 2]]
    assert listed(rollout.joined([got[[2]], got])) == [[20], *listed(got)]
    assert listed(got.to("cpu")) == listed(got)
    assert rollout.joined([got, got.whole()]).cut(None) == {}
    some = fr.Truncation(top_p=0.5)
    assert got.whole().cut(some) == {"truncation": some}


def listed(some):
    """The sets that the op is told, token by token."""
    ids, offsets = some.cut(fr.Truncation(top_k=1))["kept"]
    return [part.tolist() for part in ids.split(offsets.diff().tolist())]


def test_an_eos_that_is_also_the_padding_counts_once(pair):
    _, tokenizer = pair
    eos = tokenizer.eos_token_id
    got = rollout.assemble([Encoded([5])], [[7, eos, eos]], [eos], tokenizer)
    assert got.completion_mask.tolist() == [[False, True, True]]


def test_left_padding_changes_no_token_and_no_logprob(pair):
    model, tokenizer = pair
    prompts = ["1+1=", "12345+67890=", "7"]
    together = rollout.generate(model, tokenizer, encoded(tokenizer, *prompts), max_new_tokens=6)
    logprobs = fr.lm_head.logprobs(
        model, together.input_ids, together.attention_mask, completion_mask=together.completion_mask
    ).logprobs
    for row, prompt in enumerate(prompts):
        alone = rollout.generate(model, tokenizer, encoded(tokenizer, prompt), max_new_tokens=6)
        live = together.attention_mask[row]
        assert together.input_ids[row, live].tolist() == alone.input_ids[0].tolist()
        assert tokenizer.decode(alone.input_ids[0]).startswith(prompt)
        dense = model(alone.input_ids).logits[0, :-1].double().log_softmax(-1)
        want = dense.gather(1, alone.input_ids[0, 1:, None])[:, 0] * alone.completion_mask[0, 1:]
        torch.testing.assert_close(logprobs[row, : len(want)].double(), want, atol=1e-5, rtol=0)
        assert logprobs[row, len(want) :].abs().max().item() == 0 if len(want) < logprobs.shape[1] else True


def frequencies(model, tokenizer, draws, **options):
    """How often each token was drawn first after `1+1=`, and the model's own probabilities."""
    prompts = encoded(tokenizer, "1+1=") * draws
    some = rollout.generate(
        model, tokenizer, prompts, max_new_tokens=1, uniforms=rollout.uniforms(0, 1, draws, 1), **options
    )
    counts = torch.bincount(some.input_ids[:, 4], minlength=len(tokenizer)).double()
    return counts / draws, model(some.input_ids[:1, :4]).logits[0, -1].double()


def test_sampling_is_from_the_whole_distribution_whatever_the_models_own_configuration(pair):
    model, tokenizer = pair
    own = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=1, min_p=0.9, repetition_penalty=3.0, eos_token_id=own.eos_token_id
    )
    try:
        for temperature in (1.0, 0.5):
            got, logits = frequencies(model, tokenizer, 20000, temperature=temperature)
            p = (logits / temperature).softmax(-1)
            assert ((got - p).abs() < 5 * (p * (1 - p) / 20000).sqrt() + 1e-4).all()
        assert model.generation_config.top_k == 1
    finally:
        model.generation_config = own


@pytest.mark.parametrize("cut", [{"top_k": 5}, {"top_p": 0.1}, {"min_p": 0.95}])
def test_a_distribution_can_be_cut(pair, cut):
    got, logits = frequencies(pair[0], pair[1], 5000, **cut)
    p, order = logits.softmax(-1), logits.argsort(descending=True)
    kept = {
        "top_k": order[:5],
        "top_p": order[: int((p[order].cumsum(0) < 0.1).sum()) + 1],
        "min_p": (p >= 0.95 * p.max()).nonzero()[:, 0],
    }[next(iter(cut))]
    assert set(got.nonzero()[:, 0].tolist()) == set(kept.tolist())
    want = p[kept] / p[kept].sum()
    assert ((got[kept] - want).abs() < 5 * (want / 5000).sqrt()).all()


@pytest.mark.parametrize("cut", CUTS)
def test_the_temperature_comes_first_and_the_rules_in_order(pair, cut):
    """And greedy answers are of no temperature and no rule."""
    model, tokenizer = pair
    got, logits = frequencies(model, tokenizer, 3000, temperature=0.3, **cut)
    want = kept_of(logits.float()[None] / 0.3, logits.argmax()[None], **cut)[0]
    assert set(got.nonzero()[:, 0].tolist()) <= set(want.nonzero()[:, 0].tolist())
    p = (logits / 0.3).softmax(-1)[want]
    p = p / p.sum()
    assert ((got[want] - p).abs() < 5 * (p / 3000).sqrt()).all()
    prompts = encoded(tokenizer, "1+1=", "7")
    greedy = rollout.generate(model, tokenizer, prompts, max_new_tokens=4)
    assert torch.equal(rollout.generate(model, tokenizer, prompts, max_new_tokens=4, **cut).input_ids, greedy.input_ids)


def test_what_a_row_samples_is_its_own(pair):
    model, tokenizer = pair
    prompts = encoded(tokenizer, *(f"{i}*{i}=" for i in range(7)))
    drawn = rollout.uniforms(3, 5, 7, 4)
    whole = rollout.generate(model, tokenizer, prompts, max_new_tokens=4, uniforms=drawn)
    batches = rollout.generate(model, tokenizer, prompts, max_new_tokens=4, uniforms=drawn, batch_size=3)
    some = rollout.generate(model, tokenizer, prompts[2:5], max_new_tokens=4, uniforms=drawn[2:5])
    torch.rand(9)
    assert whole.texts == batches.texts
    assert some.texts == whole.texts[2:5]
    assert torch.equal(whole.input_ids, batches.input_ids)
    assert torch.equal(rollout.uniforms(3, 5, 4, 4), drawn[:4])
    assert not torch.equal(rollout.uniforms(3, 6, 7, 4), drawn)
    assert not torch.equal(rollout.uniforms(4, 5, 7, 4), drawn)


def test_every_eos_of_the_generation_configuration_ends_a_completion(pair):
    model, tokenizer = pair
    own = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=[7, 9])
    try:
        assert rollout.eos_ids(model, tokenizer) == sorted({7, 9, tokenizer.eos_token_id})
    finally:
        model.generation_config = own


def test_a_prompt_beyond_the_context_or_without_tokens_is_named(pair):
    model, tokenizer = pair
    short, long = encoded(tokenizer, "1+1=", "1+" * 504)
    rollout.check_lengths(["test sample 0", "test sample 1"], [short, long], model, max_new_tokens=16)
    with pytest.raises(
        ValueError, match=r"test sample 1: its prompt of 1008 tokens and max_new_tokens=17 .*context of 1024"
    ):
        rollout.check_lengths(["test sample 0", "test sample 1"], [short, long], model, max_new_tokens=17)
    with pytest.raises(ValueError, match="train sample 0: the prompt has no tokens"):
        rollout.check_lengths(["train sample 0"], [Encoded([])], model, max_new_tokens=1)


def drawn(scores, uniforms, warpers=()):
    """As a whole, in the plainest way."""
    for warper in warpers:
        scores = warper(None, scores)
    cdf = scores.float().double().softmax(dim=-1).cumsum(dim=-1)
    return torch.searchsorted(cdf, uniforms * cdf[:, -1:], right=True).clamp(max=scores.shape[1] - 1)


@pytest.mark.parametrize("block", [1, 3 * 1003, 1 << 22])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_drawn_in_blocks_to_the_bit(monkeypatch, block, dtype):
    monkeypatch.setattr(rollout, "BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    scores = (9 * torch.randn(7, 1003, generator=generator)).to(dtype)
    uniforms = torch.rand(7, 2, generator=generator, dtype=torch.float64)
    uniforms[0], uniforms[1] = 0.0, 1.0 - 2.0**-53
    warpers = LogitsProcessorList([TemperatureLogitsWarper(0.7), TopKLogitsWarper(40)])
    want = drawn(scores.float(), uniforms[:, 1:], warpers)
    ids = torch.zeros(7, 6, dtype=torch.int64)
    left = rollout._InverseCDF(uniforms, 5, warpers)(ids, scores.clone())
    assert left.dtype is dtype
    assert torch.equal(left.argmax(dim=1, keepdim=True), want)
    assert (left.isfinite().sum(dim=1) == 1).all()


def test_how_many_are_sampled_together_is_bounded_and_changes_nothing(pair, monkeypatch, tmp_path):
    model, tokenizer = pair
    config = Config(output=str(tmp_path / "run"), hidden_size=32, num_layers=2, max_new_tokens=5)
    loaded = models.Loaded(model, tokenizer, None)
    placed = engine.Placed(engine.start(config), model, fsdp=False)
    prompts = encoded(tokenizer, "1+1=", "12345+67890=", "7", "8-3=")
    longest = len("12345+67890=") + 5
    row = 2 * 2 * 32 * longest * 4 + 2 * 4 * model.config.vocab_size  # keys and values of 2 layers; logits
    assert generation.row_bytes(model, longest) == row
    sizes: list[int] = []
    generate = type(model).generate

    def counted(self, input_ids, **more):
        sizes.append(len(input_ids))
        return generate(self, input_ids=input_ids, **more)

    monkeypatch.setattr(type(model), "generate", counted)
    uniforms = rollout.uniforms(0, 1, 4, 5)
    want = rollout.complete(placed, loaded, prompts, config, uniforms)
    for together, expected in ((3.9 * row, [3, 1]), (1.0, [1, 1, 1, 1])):
        sizes.clear()
        monkeypatch.setattr(generation, "TOGETHER", together)
        got = rollout.complete(placed, loaded, prompts, config, uniforms)
        assert sizes == expected
        assert torch.equal(got.input_ids, want.input_ids)
    sizes.clear()
    rollout.complete(placed, loaded, prompts, dataclasses.replace(config, rollout_batch_size=2), uniforms)
    assert sizes == [2, 2]

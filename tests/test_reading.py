"""Which tokens a model predicts, in which direction, and where its positions begin; adapters a row, rows of the head."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_rlhf import lm_head, reading

transformers = pytest.importorskip("transformers")
V, PAD = 97, 0
SMALL = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT = {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "pad_token_id": PAD}
GPT |= {"bos_token_id": 1, "eos_token_id": 2}
T5 = {"vocab_size": V, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "pad_token_id": PAD}
T5 |= {"decoder_start_token_id": PAD}
BART = {"vocab_size": V, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 64}
BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
BART |= {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}


def build(model_type: str, sizes: dict[str, Any], auto: str = "AutoModelForCausalLM", **changes: object) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **{**sizes, **changes})
    model = getattr(transformers, auto).from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():  # so that a wrong position or adapter is worth some nats
        for name, p in model.named_parameters():
            p.normal_(0.0, 0.3) if p.dim() > 1 else None
            if "lm_head" in name and p.dim() > 1:
                p.normal_(0.0, 1.0)
    return model


def ids(B: int, T: int, seed: int = 1) -> Tensor:
    return torch.randint(3, V, (B, T), generator=torch.Generator().manual_seed(seed))


def gathered(logits: Tensor, scored: Tensor) -> Tensor:
    return logits[:, :-1].log_softmax(-1).gather(-1, scored[:, 1:, None])[..., 0]


# ------------------------------------------------------------------------------------------- encoder and decoder


@pytest.mark.parametrize(("model_type", "sizes"), [("t5", T5), ("bart", BART)])
def test_an_encoder_decoder_scores_its_decoders_tokens(model_type: str, sizes: dict[str, Any]) -> None:
    """Source and target of one length are no reason to take the one for the other."""
    model = build(model_type, sizes, "AutoModelForSeq2SeqLM")
    source, target = ids(3, 8), ids(3, 8, seed=2)
    source_mask, target_mask, completion = torch.ones_like(source), torch.ones_like(target), torch.ones_like(target)
    source_mask[0, 5:] = 0
    target_mask[1, 6:] = 0
    completion[2, :4] = 0
    more: dict[str, Any] = {"decoder_input_ids": target, "decoder_attention_mask": target_mask}
    with torch.no_grad():
        ours = lm_head.logprobs(model, source, source_mask, completion_mask=completion, **more).logprobs
        truth = gathered(model(input_ids=source, attention_mask=source_mask, **more).logits, target)
    truth = truth * target_mask[:, 1:] * target_mask[:, :-1] * completion[:, 1:]
    torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-5)
    longer = ids(3, 11, seed=3)
    with torch.no_grad():
        ours = lm_head.logprobs(model, longer, decoder_input_ids=target).logprobs
        torch.testing.assert_close(
            ours, gathered(model(input_ids=longer, decoder_input_ids=target).logits, target), rtol=1e-5, atol=1e-5
        )


def test_an_encoder_decoder_without_a_target_is_refused() -> None:
    model = build("bart", BART, "AutoModelForSeq2SeqLM")  # would shift the source to the right, and predict that
    with pytest.raises(
        ValueError, match=r"decoder_input_ids must be .* BartForConditionalGeneration, an encoder-decoder"
    ):
        lm_head.logprobs(model, ids(2, 5))
    mask = torch.ones(2, 4)
    with pytest.raises(ValueError, match="decoder_attention_mask must have the shape of decoder_input_ids"):
        lm_head.logprobs(model, ids(2, 5), decoder_input_ids=ids(2, 5), decoder_attention_mask=mask)
    with pytest.raises(ValueError, match="decoder_input_ids must not be given: GPT2LMHeadModel"):
        lm_head.logprobs(build("gpt2", GPT), ids(2, 5), decoder_input_ids=ids(2, 5))


def test_a_decoder_with_learned_positions_is_padded_on_the_right() -> None:
    model, target = build("bart", BART, "AutoModelForSeq2SeqLM"), ids(2, 6)
    mask = torch.ones_like(target)
    mask[0, :2] = 0
    with pytest.raises(ValueError, match="decoder_attention_mask must not begin with 0"):
        lm_head.logprobs(model, ids(2, 5), decoder_input_ids=target, decoder_attention_mask=mask)


# ------------------------------------------------------------------------------------------- both ways


@pytest.mark.parametrize(
    ("model_type", "auto", "changes"),
    [
        ("bert", "AutoModelForCausalLM", {"is_decoder": False}),
        ("bert", "AutoModelForMaskedLM", {}),
        ("distilbert", "AutoModelForMaskedLM", {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}),
        ("qwen2", "AutoModelForCausalLM", {"is_causal": False}),  # a switch of transformers for embedding models
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_a_bidirectional_model_is_refused(model_type: str, auto: str, changes: dict[str, Any], training: bool) -> None:
    model = build(model_type, {**SMALL}, auto, **changes).train(training)
    state = torch.get_rng_state()
    for call in (lm_head.logprobs, lm_head.forward, lm_head.hidden_states):
        with pytest.raises(ValueError, match="model must be causal"):
            call(model, ids(2, 5))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training is training for module in model.modules())


def test_how_a_model_reads_is_asked_once() -> None:
    model, calls = build("gpt2", GPT | {"n_embd": 16}), []
    model.transformer.register_forward_hook(lambda module, args, output: calls.append(1))
    lm_head.logprobs(model, ids(2, 5))
    tried = len(calls) - 1
    assert 1 <= tried <= 2
    lm_head.logprobs(model, ids(2, 5))
    assert len(calls) == tried + 2
    alike = copy.deepcopy(model)  # with its hook
    calls.clear()
    lm_head.logprobs(alike, ids(2, 5))
    assert len(calls) == 1
    alike.config.is_causal = False
    with pytest.raises(ValueError, match="model must be causal"):
        lm_head.logprobs(alike, ids(2, 5))


# ------------------------------------------------------------------------------------------- padding on the left


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("model_type", "sizes", "how"),
    [
        ("gpt2", GPT, "position_ids"),
        ("gpt_bigcode", GPT, "position_ids"),
        ("bert", SMALL | {"is_decoder": True}, "position_ids"),
        ("opt", SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 32}, "own"),
        ("bloom", SMALL | {"n_layer": 2, "n_head": 4}, "own"),
        ("qwen2", SMALL, "own"),
    ],
)
def test_padding_on_the_left_takes_no_position(model_type: str, sizes: dict, how: str, training: bool) -> None:
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "dropout": 0.0, "layerdrop": 0.0}
    dropout |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = build(model_type, {**sizes, **(dropout if training else {})}).train(training)
    rows = [ids(1, 9, seed=s)[:, :length] for s, length in ((1, 9), (2, 5), (3, 6))]
    padded = torch.full((3, 9), 7)  # no padding token: the mask says what is padding
    mask = torch.zeros_like(padded)
    for b, (row, start) in enumerate(zip(rows, (0, 4, 0))):  # none, left, right
        padded[b, start : start + row.shape[1]] = row
        mask[b, start : start + row.shape[1]] = 1
    with torch.no_grad():
        ours = lm_head.logprobs(model, padded, mask).logprobs
        hidden = lm_head.hidden_states(model, padded, mask)
        for b, (row, start) in enumerate(zip(rows, (0, 4, 0))):
            truth = gathered(model(input_ids=row).logits, row)[0]
            torch.testing.assert_close(ours[b, start : start + len(truth)], truth, rtol=1e-4, atol=1e-4)
            alone = lm_head.hidden_states(model, row)[0]
            torch.testing.assert_close(hidden[b, start : start + row.shape[1]], alone, rtol=1e-3, atol=1e-3)
    (found,) = reading._readings[model].values()
    assert (found.causal, found.left_padding) == (True, how)


def test_position_ids_of_the_caller_are_kept() -> None:
    model, row = build("gpt2", GPT), ids(2, 6)
    mask = torch.ones_like(row)
    mask[0, :2] = 0
    position_ids = torch.arange(5, 11).expand(2, 6)
    with torch.no_grad():
        ours = lm_head.logprobs(model, row, mask, position_ids=position_ids).logprobs
        truth = gathered(model(input_ids=row, attention_mask=mask, position_ids=position_ids).logits, row)
    torch.testing.assert_close(ours[1], truth[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[0, 2:], truth[0, 2:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_convolution_over_padding_is_seen_in_any_dtype(dtype: torch.dtype) -> None:
    sizes = SMALL | {"num_hidden_layers": 3, "lru_width": 32, "head_dim": 8}
    model, row = build("recurrent_gemma", sizes).to(dtype), ids(2, 6)
    mask = torch.ones_like(row)
    mask[0, :2] = 0
    with pytest.raises(ValueError, match="attention_mask must not begin with 0: RecurrentGemma"):
        lm_head.logprobs(model, row, mask)


def test_a_memory_of_what_is_masked_is_refused() -> None:
    sizes = {"vocab_size": V, "hidden_size": 128, "num_hidden_layers": 1, "num_heads": 2, "chunk_size": 16}
    model, row = build("xlstm", sizes), ids(2, 6)
    mask = torch.ones_like(row)
    mask[0, 4:] = 0
    lm_head.logprobs(model, row, mask)
    with pytest.raises(ValueError, match=r"attention_mask must not begin with 0: xLSTM.*pad on the right"):
        lm_head.logprobs(model, row, mask.flip(1))


# ------------------------------------------------------------------------------------------- PEFT


def two_adapters(**config: object) -> Any:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build("qwen2", SMALL), peft.LoraConfig(r=2, task_type="CAUSAL_LM", **config))
    model.add_adapter("other", peft.LoraConfig(r=2, task_type="CAUSAL_LM", **config))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                p.normal_(0.0, 0.3)
    return model.eval()


def test_adapters_by_row_in_the_body() -> None:
    model, row = two_adapters(target_modules=["q_proj", "down_proj"]), ids(3, 6)
    names = ["default", "other", "__base__"]
    with torch.no_grad():
        ours = lm_head.logprobs(model, row, adapter_names=names).logprobs
        truth = gathered(model(input_ids=row, adapter_names=names).logits, row)
        plain = lm_head.logprobs(model, row).logprobs
    torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-5)
    assert (ours - plain).abs().max() > 0.1


@pytest.mark.parametrize(
    "config",
    [{"target_modules": ["q_proj", "lm_head"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}],
)
def test_adapters_by_row_on_the_head_are_refused(config: dict[str, Any]) -> None:
    model, row = two_adapters(**config), ids(3, 6)
    for names in (["default", "other", "__base__"], ["other"] * 3, ["__base__"] * 3):
        with pytest.raises(ValueError, match="adapter_names must not concern the head"):
            lm_head.logprobs(model, row, adapter_names=names)
    for name in ("default", "other"):  # what the error says to do
        model.set_adapter(name)
        with torch.no_grad():
            ours, truth = lm_head.logprobs(model, row).logprobs, gathered(model(input_ids=row).logits, row)
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-5)


def test_trained_rows_of_a_tied_head_are_named() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"], trainable_token_indices=[4, 5])
    tied: nn.Module = peft.get_peft_model(build("qwen2", SMALL, tie_word_embeddings=True), copy.deepcopy(config))
    with pytest.raises(ValueError, match=r"trainable_token_indices.*tied"):
        lm_head.logprobs(tied, ids(2, 5))
    untied: Any = peft.get_peft_model(build("qwen2", SMALL, tie_word_embeddings=False), copy.deepcopy(config))
    with torch.no_grad():
        ours, truth = lm_head.logprobs(untied, ids(2, 5)).logprobs, gathered(untied(ids(2, 5)).logits, ids(2, 5))
    torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-5)

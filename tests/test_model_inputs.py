from typing import Any

import pytest
import torch
from transformers import BartConfig, BartForCausalLM, GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

from fused_rlhf import lm_head

SMALL: dict[str, Any] = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
B, T = 2, 6
IDS = torch.randint(0, 60, (B, T), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=60, num_key_value_heads=1, head_dim=16, **sizes, **SMALL)).eval()


CAUSAL = torch.ones(T, T, dtype=torch.bool).tril()[None, None]


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(B, T),
        CAUSAL,
        CAUSAL.expand(B, 1, T, T),
        CAUSAL.expand(B, 2, T, T),
        torch.zeros(1, 1, T, T).masked_fill(~CAUSAL, -1e9),
        {"full_attention": CAUSAL},
        None,
    ],
)
def test_masks_that_a_model_takes_stay(model, mask):
    want = lm_head.hidden_states(model, IDS)
    torch.testing.assert_close(lm_head.hidden_states(model, IDS, mask), want)


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(B, T - 1),
        torch.ones(B, T + 3),
        torch.ones(1, T),
        torch.ones(B * T),
        CAUSAL[..., :-1],
        CAUSAL.expand(3, 1, T, T),
        torch.ones(B, T - 1, T),
        {"full_attention": CAUSAL[..., :-1, :]},
    ],
)
def test_masks_of_another_shape_are_refused(model, mask):
    with pytest.raises(
        ValueError, match=r"attention_mask.* must be \(B, T\) or \(2 or 1, heads or 1, T, T\).*\(2, 6\), got"
    ):
        lm_head.forward(model, IDS, mask)
    embeds = model.get_input_embeddings()(IDS)
    with pytest.raises(ValueError, match="must be"):
        lm_head.forward(model, attention_mask=mask, inputs_embeds=embeds)


def test_a_4d_mask_of_integers_reaches_the_attention_that_reads_it(model):
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    seen = []

    def attention(module, query, key, value, attention_mask, **kwargs):
        seen.append(attention_mask)
        return sdpa_attention_forward(module, query, key, value, None, **kwargs)

    AttentionInterface.register("rows_of_integers", attention)
    AttentionMaskInterface.register("rows_of_integers", lambda *args, attention_mask=None, **kwargs: attention_mask)
    mask = torch.ones(1, 1, 3, T, dtype=torch.int32)
    before = model.config._attn_implementation
    model.set_attn_implementation("rows_of_integers")
    try:
        lm_head.forward(model, IDS, mask)
    finally:
        model.set_attn_implementation(before)
    assert any(it is not None and it.shape == mask.shape for it in seen)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("positionids", "position_ids"),
        ("position_id", "position_ids"),
        ("attention_masks", "attention_mask"),
        ("atention_mask", "attention_mask"),
        ("input_embeds", "inputs_embeds"),
        ("output_attention", "output_attentions"),
        ("cu_seqlens_q", "cu_seq_lens_q"),
    ],
)
def test_a_name_that_is_nearly_one_of_the_models_is_refused(model, name, meant):
    with pytest.raises(ValueError, match=f"^{name} is no input of the model, .* mean '{meant}'"):
        lm_head.forward(model, IDS, **{name: torch.arange(T)[None]})


def test_what_something_in_it_may_read_is_handed_down(model):
    more: dict[str, Any] = {
        "cu_seq_lens_q": torch.tensor([0, T]),
        "my_own": 1,
        "mm_token_type_ids": None,
        "cache_position": None,
    }
    lm_head.forward(model, IDS, output_attentions=False, **more)
    with torch.no_grad():
        cache = model(IDS[:, :4], use_cache=True).past_key_values
    lm_head.forward(model, IDS[:, 4:], torch.ones(B, T), past_key_values=cache, use_cache=True)


def test_other_families_and_wrappers():
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=60, **SMALL))
    with pytest.raises(ValueError, match="position_ids"):
        lm_head.forward(torch.nn.parallel.DataParallel(gpt2, device_ids=[]), IDS, positionids=IDS)
    with pytest.raises(ValueError, match="attention_mask must be"):
        lm_head.forward(gpt2, IDS, torch.ones(B, 2 * T))
    sizes: dict[str, Any] = {"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}
    bart = BartForCausalLM(BartConfig(vocab_size=60, is_encoder_decoder=False, is_decoder=True, **sizes))
    with pytest.raises(ValueError, match="attention_mask must be"):
        lm_head.forward(bart, IDS, torch.ones(B, T - 2))

"""Which layouts models of many families are found to support, and that a wrong one is found out."""

from typing import Any

import pytest
import torch
import transformers as hf

from fused_rlhf.trainers import attention, layout_trial
from fused_rlhf.trainers.layout import Layout
from fused_rlhf.trainers.layout_trial import choose, of_policy
from fused_rlhf.trainers.model import Loaded, build, char_tokenizer

V = 103
BASE: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SMALL: dict[str, Any] = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2}
FAMILIES = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, BASE),
    "qwen2, a window in some layers": (
        hf.Qwen2ForCausalLM,
        hf.Qwen2Config,
        BASE | {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1},
    ),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config, BASE | {"head_dim": 8}),
    "qwen3 moe": (hf.Qwen3MoeForCausalLM, hf.Qwen3MoeConfig, BASE | EXPERTS | {"head_dim": 8}),
    "mistral, a window": (hf.MistralForCausalLM, hf.MistralConfig, BASE | {"sliding_window": 4096}),
    "gemma 2, windows": (hf.Gemma2ForCausalLM, hf.Gemma2Config, BASE | {"head_dim": 8, "sliding_window": 11}),
    "gemma 3, windows": (hf.Gemma3ForCausalLM, hf.Gemma3TextConfig, BASE | {"head_dim": 8, "sliding_window": 11}),
    "gpt-neox": (hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig, SMALL | {"intermediate_size": 64, "num_attention_heads": 4}),
    "gpt-2, learned positions": (hf.GPT2LMHeadModel, hf.GPT2Config, SMALL | {"n_head": 4, "n_positions": 64}),
    "phi 3": (hf.Phi3ForCausalLM, hf.Phi3Config, BASE),
    "gpt-oss, sinks": (
        hf.GptOssForCausalLM,
        hf.GptOssConfig,
        BASE | {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 128},
    ),
}
ELSEWHERE = {  # what is found instead, and why
    "llama 4, chunks": (
        *(hf.Llama4ForCausalLM, hf.Llama4TextConfig),
        BASE | {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 64, "attention_chunk_size": 128},
        *("packed", "its states differ by"),
    ),
    "gpt-j, its own attention": (
        *(
            hf.GPTJForCausalLM,
            hf.GPTJConfig,
            {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
        ),
        *("packed", "does not let its attention be chosen"),
    ),
    "lfm 2, convolutions": (
        *(hf.Lfm2ForCausalLM, hf.Lfm2Config, BASE | {"layer_types": ["conv", "full_attention", "conv"]}),
        *("padded", "its states differ by"),
    ),
    "mamba, a state": (hf.MambaForCausalLM, hf.MambaConfig, SMALL, "padded", "MambaForCausalLM"),
    "bloom, alibi": (
        hf.BloomForCausalLM,
        hf.BloomConfig,
        SMALL | {"n_head": 4},
        "padded",
        "does not let its attention",
    ),
}


@pytest.fixture(autouse=True)
def afresh(monkeypatch):
    monkeypatch.setattr(layout_trial, "_known", {})


def made(model, config, options):
    torch.manual_seed(0)
    return model(config(**options)).eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_families_that_share_prompts(name):
    model = made(*FAMILIES[name])
    found = choose([of_policy(model)], V, longest=4096)
    assert found == Layout("shared")
    packed = choose([of_policy(model)], V, 4096, ["packed"])
    assert packed.name == "packed"


@pytest.mark.parametrize("name", ELSEWHERE)
def test_families_that_do_not(name):
    model, config, options, layout, why = ELSEWHERE[name]
    found = choose([of_policy(made(model, config, options))], V, longest=100)
    assert found.name == layout
    assert found.why.startswith("shared: ")
    assert why in found.why
    if layout == "padded":
        assert not found.masked  # none of them needs the mask of padding on the right


def test_half_precision_is_tried_in_fp32():
    model = made(*FAMILIES["qwen3"]).bfloat16()
    before = dict(model.named_parameters())
    assert choose([of_policy(model)], V, 100) == Layout("shared")
    for name, p in model.named_parameters():
        assert p is before[name]
        assert p.dtype == torch.bfloat16


def test_windows_are_as_they_were_afterwards():
    model = made(*FAMILIES["gemma 2, windows"])
    before = sorted((name, value) for _, name, value in layout_trial.named_windows(model))
    assert ("sliding_window", 11) in before
    choose([of_policy(model)], V, 100)
    assert sorted((name, value) for _, name, value in layout_trial.named_windows(model)) == before


def test_a_window_that_cannot_be_shortened_limits_the_sequences():
    """GPT-Neo makes its masks when it is built."""
    config = hf.GPTNeoConfig(
        vocab_size=V,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=64,
    )
    torch.manual_seed(0)
    model = hf.GPTNeoForCausalLM(config).eval()
    assert choose([of_policy(model)], V, longest=64).name == "packed"
    beyond = choose([of_policy(model)], V, longest=65, names=["packed"])
    assert beyond.name == "padded"
    assert choose([of_policy(model)], V, longest=64, names=["packed"]).name == "packed"


def test_an_attention_that_forgets_a_part_of_the_table_is_found_out(monkeypatch):
    """Completions that see each other; a window counted in the row; a prompt that is not seen."""
    model = made(*FAMILIES["mistral, a window"])
    assert attention.adopt(model)
    right = attention.pieces

    def neighbours(groups, window):
        return right([attention.Group(g.prompt, (sum(g.completions),)) for g in groups], window)

    def no_prompt(groups, window):
        return [piece for piece in right(groups, window) if not piece.more]

    def wider(groups, window):
        return right(groups, window + 1)

    for wrong in (neighbours, no_prompt, wider):
        monkeypatch.setattr(layout_trial, "_known", {})
        monkeypatch.setattr(attention, "pieces", wrong)
        found = choose([of_policy(model)], V, 100, ["shared"])
        assert "its states differ by" in found.why, wrong.__name__


def test_a_model_that_sees_no_other_token_proves_nothing():
    model = made(*FAMILIES["llama"])
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    found = choose([of_policy(model)], V, 100)
    assert found.name == "padded"
    assert "nothing can be proven by it" in found.why


def test_all_models_of_a_run_must_support_it():
    good, other = made(*FAMILIES["llama"]), made(*ELSEWHERE["mamba, a state"][:3])
    assert choose([of_policy(good), of_policy(other)], V, 100).name == "padded"


def test_what_a_run_takes_and_refuses():
    from fused_rlhf.trainers.grpo import Config

    model, tokenizer = build(32, 1)
    loaded, cpu = Loaded(model, tokenizer, None), torch.device("cpu")

    def settle(loaded=loaded, **options):
        return layout_trial.settled(Config(**options), cpu, loaded, 64, []).layout

    assert settle().name == "shared"
    assert settle(layout="packed").name == "packed"
    assert settle(layout="padded") == Layout(masked=False)
    assert "lora_dropout" in settle(lora_r=2, lora_dropout=0.1).why
    with pytest.raises(ValueError, match="layout: expected 'padded': lora_dropout draws otherwise"):
        settle(layout="shared", lora_r=2, lora_dropout=0.1)
    experts = settle(router_aux_loss_coef=0.1)
    assert (experts.name, experts.masked) == ("padded", True)
    with pytest.raises(ValueError, match="layout: expected 'padded': router_aux_loss_coef"):
        settle(layout="packed", router_aux_loss_coef=0.1)
    mamba = hf.MambaForCausalLM(hf.MambaConfig(**SMALL | {"vocab_size": len(char_tokenizer())}))
    with pytest.raises(ValueError, match="layout: expected 'auto', which takes padded rows here, for shared: MambaFor"):
        settle(Loaded(mamba, tokenizer, None), layout="shared")
    with pytest.raises(ValueError, match="layout: expected one of"):
        settle(layout="shraed")

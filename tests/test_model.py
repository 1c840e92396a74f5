import dataclasses
import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fused_rlhf.trainers import adapters, engine, sources
from fused_rlhf.trainers import model as models
from fused_rlhf.trainers.config import TrainConfig
from fused_rlhf.trainers.engine import Engine
from tests import tiny


def test_character_tokenizer_round_trips():
    tokenizer = models.char_tokenizer()
    text = "Q: 12+3 = ?\nA: $15."
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, tokenizer.eos_token_id, tokenizer.pad_token_id], skip_special_tokens=True) == text
    assert tokenizer("é")["input_ids"] == [tokenizer.unk_token_id]


def test_a_built_model_is_saved_and_loaded_without_the_network(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model, tokenizer = models.build(hidden_size=32, num_layers=1)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, loaded_tokenizer = models.load(str(tmp_path))
    input_ids = tokenizer("1+2=3", return_tensors="pt")["input_ids"]
    assert loaded_tokenizer("1+2=3")["input_ids"] == input_ids[0].tolist()
    assert loaded_tokenizer.padding_side == "left"
    torch.testing.assert_close(loaded(input_ids).logits, model(input_ids).logits, atol=0, rtol=0)
    assert models.max_positions(loaded) == 1024


def test_a_missing_model_is_named(tmp_path):
    for name in (str(tmp_path / "gone"), "./gone", "runs/some/where", "~/gone-model", "gone"):
        with pytest.raises(FileNotFoundError, match=r"gone|where"):
            models.load(name)
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        models.load(str(tmp_path))


def test_a_path_below_an_existing_folder_is_not_taken_for_a_hub_id(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder 'runs/demo'"):
        models.load("runs/demo")


def options(tmp_path, **changes):
    return TrainConfig(output=str(tmp_path / "run"), **({"model": tiny.saved_model(tmp_path / "model")} | changes))


def test_a_tokenizer_without_padding_pads_with_its_eos_and_one_without_eos_is_refused(tmp_path):
    loaded = models.load_for(options(tmp_path, model=tiny.saved_model(tmp_path / "a", pad_token=None)))
    assert loaded.tokenizer.pad_token_id == loaded.tokenizer.eos_token_id
    assert loaded.tokenizer.padding_side == "left"
    with pytest.raises(ValueError, match=r"the tokenizer of '.*b' has no EOS token, so a completion could not end"):
        models.load_for(options(tmp_path, model=tiny.saved_model(tmp_path / "b", eos_token=None)))


def test_weights_have_the_dtype_asked_for(tmp_path):
    loaded = models.load_for(options(tmp_path, dtype="bfloat16"))
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    assert not loaded.model.training
    assert loaded.processor is None


def test_model_and_tokenizer_are_given_together(tmp_path):
    model, _ = models.build(32, 1)
    with pytest.raises(ValueError, match="model, tokenizer: expected both or neither"):
        models.load_for(options(tmp_path), model)


def test_dropout_is_off_even_in_training_mode(tmp_path):
    tokenizer = models.char_tokenizer()
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=32))
    ids = torch.tensor([[5, 6, 7, 8]])
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)
    models.without_dropout(model)
    assert torch.equal(model(ids).logits, model(ids).logits)
    assert torch.equal(model(ids).logits, model.eval()(ids).logits)


def test_a_model_given_as_an_object_may_have_adapters_and_a_built_one_may_not(tmp_path):
    for changes, message in (({"lora_r": 4}, "lora_r: expected 0 without"), ({"chat_template": True}, "chat_template")):
        with pytest.raises(ValueError, match=message):
            models.load_for(options(tmp_path, model=None, **changes))
    given = models.build(16, 1)
    loaded = models.load_for(options(tmp_path, model=None, lora_r=4), *given)
    assert any("lora_A" in name for name, _ in loaded.model.named_parameters())


def test_adapters_are_on_all_linear_layers_but_the_head(tmp_path):
    assert options(tmp_path, lora_r=3).lora_scaling == options(tmp_path, lora_r=8).lora_scaling == 2.0
    config = options(tmp_path, lora_r=3, lora_alpha=6.0)
    loaded = models.load_for(config)
    trained = [name for name, p in loaded.model.named_parameters() if p.requires_grad]
    layers = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {layer for layer in layers if any(f"{layer}.lora_" in name for name in trained)} == layers
    assert not any("lm_head" in name or "embed" in name for name in trained)
    assert adapters.base_of(loaded.model).get_output_embeddings() is loaded.model.get_output_embeddings()
    ids = torch.tensor([[5, 6, 7, 8]])
    base, _ = models.load(config.model)
    with torch.no_grad():
        for p in loaded.model.parameters():
            if p.requires_grad:
                p.add_(0.1)
        assert not torch.equal(loaded.model(ids).logits, base(ids).logits)
        with adapters.without_adapters(loaded.model):
            assert torch.equal(loaded.model(ids).logits, base(ids).logits)
    one = models.load_for(dataclasses.replace(config, lora_target_modules=("q_proj",)))
    assert all("q_proj" in name for name, p in one.model.named_parameters() if p.requires_grad)


def test_liger_layers_are_refused_where_they_cannot_be(tmp_path, monkeypatch):
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="liger_layers: expected false without a GPU"):
            models.load_for(options(tmp_path, liger_layers=True))
    model = GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(
        ValueError, match=r"liger_layers: expected a model of a type that Liger has kernels for: .*qwen3"
    ):
        models.use_liger_layers(model)


def test_liger_gives_its_layers_and_not_its_loss(monkeypatch):
    """What is patched, told apart without a GPU: the layers' classes change, the model's forward does not."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    from transformers.models.qwen3 import modeling_qwen3

    kept = {name: getattr(modeling_qwen3, name) for name in ("apply_rotary_pos_emb", "Qwen3RMSNorm", "Qwen3MLP")}
    model, _ = models.build(32, 1)
    forward = type(model).forward
    try:
        models.use_liger_layers(model)
        assert "forward" not in vars(model)
        assert type(model).forward is forward
        patched = [type(m).__name__ for m in model.modules() if "iger" in str(vars(m).get("forward", ""))]
        assert patched.count("Qwen3MLP") == 1
        assert len(patched) == 6  # with both norms of the layer, those of query and key, and the last
    finally:
        for name, value in kept.items():
            setattr(modeling_qwen3, name, value)


def test_tied_weights_are_written_once(tmp_path, monkeypatch):
    own, loaded = tiny.build(tmp_path)
    state = own.weights()
    state["lm_head.weight"] = state["lm_head.weight"].clone()  # as shards are when they are gathered
    monkeypatch.setattr(own, "weights", lambda module=None: state)
    models.save(own, loaded, tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    again, _ = models.load(str(tmp_path / "out"))
    assert torch.equal(again.lm_head.weight, loaded.model.lm_head.weight)


def adapted(tmp_path) -> Any:
    """Adapters that are not zero, on a saved base."""
    from peft import LoraConfig, get_peft_model

    base, tokenizer = models.load(tiny.saved_model(tmp_path / "base"))
    torch.manual_seed(1)
    layers = ["q_proj", "k_proj", "v_proj", "o_proj"]
    settings = LoraConfig(r=4, init_lora_weights=False, target_modules=layers, task_type="CAUSAL_LM")
    return get_peft_model(base, settings), tokenizer


def test_adapters_that_are_there_are_kept_or_refused_and_frozen_ones_are_named(tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = options(tmp_path, model=None)
    given = adapted(tmp_path)
    given[0].save_pretrained(tmp_path / "adapters")
    base = models.load(str(tmp_path / "base"))[0]
    others: Any = PeftModel.from_pretrained(base, str(tmp_path / "adapters"), is_trainable=True), given[1]
    own = AutoModelForCausalLM.from_pretrained(str(tmp_path / "adapters")), given[1]
    for model, tokenizer in (given, others, own):
        with pytest.raises(ValueError, match=r"lora_r: expected 0 for a .* that has adapters already; got 8"):
            models.load_for(dataclasses.replace(config, lora_r=8), model, tokenizer)
    assert models.load_for(config, *given).model is given[0]
    frozen: Any = PeftModel.from_pretrained(models.load(str(tmp_path / "base"))[0], str(tmp_path / "adapters"))
    with pytest.raises(
        ValueError, match=r"model: expected at least one weight that requires a gradient .*is_trainable"
    ):
        models.load_for(config, frozen, given[1])
    with pytest.raises(ValueError, match=r"model: expected at least one weight .*; got 'Qwen3ForCausalLM'"):
        models.load_for(config, models.build(32, 1)[0].requires_grad_(False), given[1])


def test_a_folder_of_adapters_is_their_base_with_them_merged(tmp_path):
    model, tokenizer = adapted(tmp_path)
    folder = tmp_path / "adapters"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = options(tmp_path, model=str(folder))
    loaded = models.load_for(config)
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(loaded.model(ids).logits, model.eval()(ids).logits, atol=1e-5, rtol=1e-5)
    assert all(p.requires_grad for p in loaded.model.parameters())
    assert len(loaded.tokenizer) == len(tokenizer)
    with pytest.raises(ValueError, match="lora_r: expected 0 for a folder of adapters"):
        models.load_for(dataclasses.replace(config, lora_r=4))
    with pytest.raises(FileNotFoundError, match=r"value_model: the folder .* holds adapters; merge them"):
        sources.locate("value_model", str(folder))
    path = folder / adapters.FILE
    values = json.loads(path.read_text())
    for base, message in (
        (str(tmp_path / "gone"), "the base of the adapters in .* cannot be loaded: .*gone"),
        ("", "base"),
    ):
        path.write_text(json.dumps(values | {"base_model_name_or_path": base}))
        with pytest.raises(ValueError, match=f"model: .*{message}"):
            models.load(str(folder))


def test_adapters_are_written_the_same_every_time(tmp_path):
    loaded = models.load_for(options(tmp_path, lora_r=3))
    own = Engine(options(tmp_path), engine.start(options(tmp_path)), loaded.model, 1)
    models.save(own, loaded, tmp_path / "out")
    layers = json.loads((tmp_path / "out" / adapters.FILE).read_text())["target_modules"]
    assert layers == sorted(layers)
    assert len(layers) == 14


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt2"])
def test_a_folder_without_a_tokenizer_is_named(tmp_path, kind):
    small: dict[str, Any] = {"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = LlamaConfig(intermediate_size=16, **small)
    made = {
        "qwen3": lambda: models.build(32, 1)[0],
        "llama": lambda: LlamaForCausalLM(llama),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=16, n_layer=1, n_head=2)),
    }
    made[kind]().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"model: .*tokenizer"):
        models.load(str(tmp_path / "model"))


def test_a_tokenizer_larger_than_the_embeddings_is_named(tmp_path):
    model: Any
    model, tokenizer = models.build(32, 1)
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    rows = model.get_input_embeddings().num_embeddings
    with pytest.raises(ValueError, match=rf"tokenizer: expected tokens below {rows}, .*; got '<new> = {rows}'"):
        models.load_for(options(tmp_path, model=None), model, tokenizer)
    tokenizer.add_tokens(["<more>"])
    model.resize_token_embeddings(rows + 1)
    with pytest.raises(ValueError, match=f"got '<more> = {rows + 1}'"):
        models.load_for(options(tmp_path, model=None), model, tokenizer)
    model.resize_token_embeddings(rows + 8)
    models.load_for(options(tmp_path, model=None), model, tokenizer)

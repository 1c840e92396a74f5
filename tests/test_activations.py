import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, AutoModelForCausalLM

from fused_rlhf.trainers import activations, adapters, attention
from fused_rlhf.trainers import model as models
from fused_rlhf.trainers.attention import Group
from fused_rlhf.trainers.layout import Layout
from tests import tiny

WIDE: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": WIDE,
    "qwen3": WIDE | {"head_dim": 32},
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4},
    "gemma2": WIDE | {"head_dim": 32},
    "gemma3_text": WIDE | {"head_dim": 32},
}
B, T, H = 3, 40, 64
CPU = torch.device("cpu")
ALL = [Group(T)] * B
SHARED = [Group(30, (10, 4, 6)), Group(12, (8,)), Group(9)]


def build(family: str) -> Any:
    none = {"vocab_size": 200, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family], **none))


def saved_bytes(model: Any, autocast: bool, packed: Sequence[Group] = ()) -> int:
    """Of the storages that torch saves for a backward, weights left out, before the head."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, tuple[int, torch.UntypedStorage]] = {}  # kept, so that no address is used again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and hooked:
            found[storage.data_ptr()] = storage.nbytes(), storage
        return tensor

    def at_head(module: Any, args: Any) -> None:
        hooked.clear()

    hooked = [True]
    model.get_output_embeddings().register_forward_pre_hook(at_head)
    ids, mask = torch.ones(B, T, dtype=torch.long), torch.ones(B, T, dtype=torch.bool)
    mask[0, -3:] = False  # without padding torch is spared the mask
    told = {"attention_mask": mask}
    if packed:
        table = attention.table_of(packed)
        ids, told = torch.ones_like(table[0, 0, :1]), {"attention_mask": table, "position_ids": table[0, 0, 2:]}
    with saved_tensors_hooks(pack, lambda it: it), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(input_ids=ids, use_cache=False, **told)
    return sum(size for size, _ in found.values())


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_kept_is_what_torch_saves(tmp_path, family, checkpointing, precision):
    config = tiny.config(tmp_path, gradient_checkpointing=checkpointing, mixed_precision=precision)
    model = build(family)
    found = activations.trial(model, config, CPU, ALL)
    real = copy.deepcopy(model)
    models.prepare_body(config, real)
    saved = saved_bytes(real.train(), precision == "bf16")
    hidden = B * T * H * 4
    assert saved <= found.kept <= 1.05 * saved + 3 * hidden  # the head's input, and what a frame still names
    assert found.kept <= found.peak


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gemma3_text"])
def test_packed_rows_are_tried_as_they_are_read(tmp_path, family):
    model, config = build(family), tiny.config(tmp_path)
    models.prepare_body(config, model)
    assert attention.adopt(model)
    for groups in (ALL, SHARED):
        found = activations.trial(model, config, CPU, groups, Layout("shared"))
        saved = saved_bytes(copy.deepcopy(model).train(), False, packed=groups)
        assert saved <= found.kept <= 1.05 * saved + 3 * sum(group.length for group in groups) * H * 4


def test_adapters_and_frozen_weights_are_in_it(tmp_path):
    """Fewer gradients, and so fewer inputs to keep; adapters keep some of their own."""
    model = build("llama")
    every = activations.trial(model, tiny.config(tmp_path), CPU, ALL)
    config = tiny.config(tmp_path, model="x", hidden_size=128, num_layers=4, lora_r=4)
    adapted = adapters.with_adapters(config, copy.deepcopy(model))
    mine = activations.trial(adapted.get_base_model(), config, CPU, ALL)
    saved = saved_bytes(adapted.get_base_model().train(), False)
    assert saved <= mine.kept <= 1.05 * saved + 2 * B * T * H * 4
    assert mine.kept != every.kept


def test_a_body_without_a_head_is_tried_and_nothing_is_left_of_it(tmp_path):
    model, config = build("llama"), tiny.config(tmp_path)
    dtype = torch.get_default_dtype()
    body = activations.trial(model.model, config, CPU, ALL)
    assert body.kept == pytest.approx(activations.trial(model, config, CPU, ALL).kept, rel=0.05)
    assert torch.get_default_dtype() is dtype
    assert all(p.grad is None and type(p) is torch.nn.Parameter for p in model.parameters())

import copy
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fused_rlhf.trainers import activations, adapters, tiled_mlp
from fused_rlhf.trainers import model as models
from fused_rlhf.trainers.attention import Group
from tests import tiny
from tests.launch import run, worst
from tests.test_activations import FAMILIES, WIDE, B, T, build, saved_bytes
from tests.test_distributed import of_model
from tests.tiny import pieces

NONE: dict[str, Any] = {"vocab_size": 200, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SAVED = {"gpt2": 5}  # tensors of (tokens, intermediate_size) that a gelu in Python keeps; a gated MLP keeps four


@pytest.mark.parametrize("tokens", [1, 7, 1000])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_whole(family, tokens):
    torch.manual_seed(0)
    model = build(family).double()  # but for norms that are fp32 in any dtype
    models.without_dropout(model)
    ids = torch.randint(0, 200, (B, T), generator=torch.Generator().manual_seed(0))
    found = []
    for one in (model, copy.deepcopy(model)):
        if one is not model:
            tiled_mlp.tile_mlps(one, tokens)
        loss = one(input_ids=ids, labels=ids).loss
        (3.7 * loss).backward()
        found.append((loss.detach(), {name: p.grad for name, p in one.named_parameters()}))
    (want, its), (got, mine) = found
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    for name, grad in its.items():
        torch.testing.assert_close(mine[name], grad, rtol=1e-6, atol=1e-6 * float(grad.abs().max()))


OPTIONS = [{}, {"gradient_checkpointing": True}, {"gradient_checkpointing": True, "offload_activations": True}]


@pytest.mark.parametrize("options", OPTIONS)
def test_an_update_is_the_same(tmp_path, options):
    plain, _ = tiny.build(tmp_path)
    own, _ = tiny.build(tmp_path, tiled_mlp=5, **options)
    calls: list[int] = []
    module: Any = own.module
    module.model.layers[0].mlp.up_proj.register_forward_hook(lambda m, args, output: calls.append(output.shape[1]))
    want, got = plain.update(tiny.logprob_loss, pieces(6)), own.update(tiny.logprob_loss, pieces(6))
    assert got == pytest.approx(want, rel=1e-6)
    assert max(calls) == 5
    # Each tile again; of a block again all but the last one, after which nothing of the block is kept.
    assert sum(calls) == (3 * 6 * 9 - 4 if options else 2 * 6 * 9)


def test_adapters_and_copies_have_tiles_of_their_own(tmp_path):
    folder = tiny.saved_model(tmp_path / "base")
    options: dict[str, Any] = {"model": folder, "hidden_size": 128, "num_layers": 4, "lora_r": 2, "learning_rate": 1e-2}
    plain, _ = tiny.build(tmp_path, **options)
    own, loaded = tiny.build(tmp_path, tiled_mlp=5, **options)
    for (name, a), b in zip(own.module.named_parameters(), plain.module.parameters(), strict=True):
        if "lora" in name:
            b.data.copy_(a)
    for _ in range(3):
        want, got = plain.update(tiny.logprob_loss, pieces(6)), own.update(tiny.logprob_loss, pieces(6))
        assert got == pytest.approx(want, rel=1e-5)
    model = adapters.base_of(loaded.model)
    other = copy.deepcopy(model)
    assert (
        list(tiled_mlp.tiled(other)) == list(tiled_mlp.tiled(model)) == [(f"model.layers.{i}.mlp", 5) for i in (0, 1)]
    )
    assert other.model.layers[0].mlp.forward.args[0].__self__ is other.model.layers[0].mlp


@pytest.mark.usefixtures("group")
def test_shards_are_whole_for_their_tiles(tmp_path):
    plain, _ = tiny.build(tmp_path)
    own, _ = tiny.build(tmp_path, fsdp=True, tiled_mlp=5, gradient_checkpointing=True, offload_activations=True)
    for _ in range(2):
        want, got = plain.update(tiny.logprob_loss, pieces(4, 2)), own.update(tiny.logprob_loss, pieces(4, 2))
        assert got == pytest.approx(want, rel=1e-5)


@pytest.mark.slow
def test_two_processes_with_tiles_do_what_one_does_without(tmp_path):
    flags = of_model(tmp_path / "base", tied=False)
    want = run(flags, tmp_path / "one")
    tiles = ["--tiled-mlp", "4", "--gradient-checkpointing", "--offload-activations"]
    found = worst(run([*flags, "--fsdp", *tiles], tmp_path / "two", processes=2), want)
    assert found["loss"] < 1e-5
    assert max(found.values()) < 1e-3, found


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_falls_by_the_intermediates(family):
    model = build(family)
    models.without_dropout(model)
    before = saved_bytes(copy.deepcopy(model), False)
    tiled_mlp.tile_mlps(model, 8)
    after = saved_bytes(model, False)
    wide = getattr(model.config, "intermediate_size", 4 * model.config.hidden_size)
    assert before - after == SAVED.get(family, 4) * model.config.num_hidden_layers * B * T * wide * 4


@pytest.mark.parametrize("options", OPTIONS)
def test_the_plan_counts_tiles(tmp_path, options):
    """What the trial says is what torch saves; the intermediates of a block that is computed again are smaller, too."""
    found = []
    for tokens in (0, 8):
        model, config = build("qwen3"), tiny.config(tmp_path, tiled_mlp=tokens, **options)
        models.prepare_body(config, model)
        found.append(activations.trial(model, config, torch.device("cpu"), [Group(T)] * B))
        saved = 0 if config.offload_activations else saved_bytes(model.train(), False)
        assert found[-1].kept >= saved
        assert config.offload_activations or found[-1].kept <= 1.05 * saved + 3 * B * T * 64 * 4
    assert found[0].peak - found[1].peak > 2 * B * T * 192 * 4


@pytest.mark.parametrize(
    ("family", "changes", "count"),
    [
        ("qwen3_moe", WIDE | EXPERTS, 0),
        ("opt", {"hidden_size": 64, "ffn_dim": 64, "num_attention_heads": 4, "word_embed_proj_dim": 64}, 0),
        ("bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 4}, 0),  # its MLP adds the residual
    ],
)
def test_blocks_without_an_mlp_of_their_own_are_refused(family, changes, count):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **changes, **NONE))
    with pytest.raises(ValueError, match=rf"^tiled_mlp: expected 0 for .*, whose block .* has {count} MLPs.*; got 8"):
        tiled_mlp.tile_mlps(model, 8)
    assert not list(tiled_mlp.tiled(model))


def test_what_is_an_mlp_is_found_by_what_it_does():
    width = 8

    class Mixes(torch.nn.Module):
        """Looks at other tokens."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Linear(width, width), torch.nn.Linear(width, width)

        def forward(self, x):
            return self.b(self.a(x).cumsum(dim=1))

    mlp = torch.nn.Sequential(torch.nn.Linear(width, 3 * width), torch.nn.GELU(), torch.nn.Linear(3 * width, width))
    narrow = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.Linear(width, 4))
    others = [torch.nn.LayerNorm(width), torch.nn.Linear(width, width), Mixes(), narrow]
    block = torch.nn.ModuleDict({str(i): m for i, m in enumerate([*others, mlp])})
    assert list(tiled_mlp.mlps_of(block, width)) == [mlp]

"""The head adapter against the model's own logits, over families that treat their logits differently."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fused_rlhf as fr
from fused_rlhf import lm_head
from tests import launch

transformers = pytest.importorskip("transformers")
V = 257
IDS = {"vocab_size": V, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
MOE = {"experts_implementation": "eager", "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}

# name: model_type, its configuration, (logit_scale, softcap) that it must be found to have
FAMILIES: dict[str, tuple[str, dict, float, float | None]] = {
    "qwen2": ("qwen2", SMALL, 1.0, None),
    "qwen2_tied": ("qwen2", {**SMALL, "tie_word_embeddings": True}, 1.0, None),
    "qwen3": ("qwen3", {**SMALL, "head_dim": 8}, 1.0, None),
    "llama": ("llama", SMALL, 1.0, None),
    "llama_tied": ("llama", {**SMALL, "tie_word_embeddings": True}, 1.0, None),
    "gemma2": ("gemma2", {**SMALL, "head_dim": 8}, 1.0, 30.0),
    "gemma2_no_cap": ("gemma2", {**SMALL, "head_dim": 8, "final_logit_softcapping": None}, 1.0, None),
    "gemma3": ("gemma3_text", {**SMALL, "head_dim": 8, "final_logit_softcapping": 17.3}, 1.0, 17.3),
    "cohere": ("cohere", {**SMALL, "logit_scale": 0.3}, 0.3, None),
    "cohere2": ("cohere2", {**SMALL, "head_dim": 8, "logit_scale": 0.7, "tie_word_embeddings": False}, 0.7, None),
    "granite": ("granite", {**SMALL, "logits_scaling": 13.0}, 1 / 13, None),
    "hyperclovax": ("hyperclovax", {**SMALL, "logits_scaling": 0.37}, 0.37, None),
    "phi": ("phi", SMALL, 1.0, None),
    "recurrent_gemma": (
        "recurrent_gemma",
        {**SMALL, "num_hidden_layers": 3, "lru_width": 32, "head_dim": 8, "logits_soft_cap": 11.0},
        1.0,
        11.0,
    ),
    "gpt2": ("gpt2", GPT, 1.0, None),
    "gpt2_untied": ("gpt2", {**GPT, "tie_word_embeddings": False}, 1.0, None),
    "gpt_neox": ("gpt_neox", SMALL, 1.0, None),
    "gptj": ("gptj", {**GPT, "rotary_dim": 4}, 1.0, None),
    "opt": (
        "opt",
        {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 16},  # hidden states projected before the head
        1.0,
        None,
    ),
    "minicpm3": (  # hidden states divided before the head
        "minicpm3",
        {**SMALL, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8}
        | {"qk_nope_head_dim": 8, "v_head_dim": 8, "dim_model_base": 8},
        1.0,
        None,
    ),
    "falcon_h1": (
        "falcon_h1",
        {**SMALL, "head_dim": 8, "mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8}
        | {"mamba_chunk_size": 16, "lm_head_multiplier": 0.21},
        0.21,
        None,
    ),
    "mixtral": ("mixtral", {**SMALL, **MOE}, 1.0, None),
    "qwen3_moe": ("qwen3_moe", {**SMALL, **MOE, "head_dim": 8, "moe_intermediate_size": 16}, 1.0, None),
    "nanochat": ("nanochat", {**SMALL, "head_dim": 8}, 1.0, 15.0),
    "xlstm": ("xlstm", {"hidden_size": 128, "num_hidden_layers": 1, "num_heads": 2, "chunk_size": 16}, 1.0, 30.0),
    "mamba": ("mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}, 1.0, None),
    "bert": ("bert", {**SMALL, "is_decoder": True}, 1.0, None),  # dense, gelu and norm before the head
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The matrices are tiny: a second thread only waits, and waits long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(family: str = "qwen2", seed: int = 0, **changes: object) -> Any:
    """A tiny random model whose head products have a standard deviation of about 10, so that caps and scales matter."""
    model_type, config, _, _ = FAMILIES[family]
    torch.manual_seed(seed)
    full = transformers.AutoConfig.for_model(model_type, **{**IDS, **config, **changes})
    model = transformers.AutoModelForCausalLM.from_config(full, dtype=torch.float32).eval()
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight.normal_(0.0, 10 / head.weight.shape[1] ** 0.5)
        if head.bias is not None:
            head.bias.normal_(0.0, 2.0)
    return model


def batch(B: int = 3, T: int = 9, seed: int = 1) -> Tensor:
    return torch.randint(3, V, (B, T), generator=torch.Generator().manual_seed(seed))


def dense_logprobs(model: nn.Module, input_ids: Tensor, temperature: float = 1.0, **model_inputs: object) -> Tensor:
    logits = model(input_ids=input_ids, **model_inputs).logits[:, :-1]
    return (logits / temperature).log_softmax(-1).gather(-1, input_ids[:, 1:, None])[..., 0]


def assert_as_good_as_torch(value: Tensor, torch_value: Tensor, truth: Tensor) -> None:
    error, torch_error = (value - truth).abs().max().item(), (torch_value - truth).abs().max().item()
    # The floor is one fp32 rounding of a log-probability of a few dozen nats.
    assert error <= 2 * torch_error + 4e-6, f"{error:.2e} against torch's {torch_error:.2e}"


@pytest.mark.parametrize("family", FAMILIES)
def test_matches_the_models_own_logits(family: str) -> None:
    model = build(family)
    input_ids = batch()
    with torch.no_grad():
        ours = lm_head.logprobs(model, input_ids, temperature=0.7)
        dense = dense_logprobs(model, input_ids, temperature=0.7)
        truth = dense_logprobs(copy.deepcopy(model).double(), input_ids, temperature=0.7)
        hidden, head = lm_head.hidden_states(model, input_ids), lm_head.find_head(model)
    assert ours.logprobs.shape == (3, 8)
    assert ours.logprobs.dtype == torch.float32
    assert_as_good_as_torch(ours.logprobs, dense, truth)

    _, _, logit_scale, softcap = FAMILIES[family]
    assert head.logit_scale == pytest.approx(logit_scale, rel=1e-7)
    assert head.softcap == (None if softcap is None else pytest.approx(softcap, rel=1e-7))
    assert head.weight is model.get_output_embeddings().weight
    assert hidden.shape == (3, 9, head.weight.shape[1])
    split = fr.linear_logprobs(hidden[:, :-1], head.weight, input_ids[:, 1:], temperature=0.7, **head.kwargs())
    assert torch.equal(split.logprobs, ours.logprobs)


def test_tied_and_untied_heads_are_what_they_say() -> None:
    tied, untied = build("llama_tied"), build("llama")
    assert lm_head.find_head(tied).weight is tied.get_input_embeddings().weight
    assert lm_head.find_head(untied).weight is not untied.get_input_embeddings().weight


def test_weight_and_transform_are_those_of_the_moment() -> None:
    model = build("gemma2")
    assert lm_head.find_head(model).softcap == 30.0
    model.config.final_logit_softcapping = 12.0
    model.set_output_embeddings(nn.Linear(32, V, bias=True))
    head = lm_head.find_head(model)
    assert head.softcap == 12.0
    assert head.weight is model.lm_head.weight
    assert head.bias is model.lm_head.bias
    with torch.no_grad():
        ours, dense = lm_head.logprobs(model, batch()).logprobs, dense_logprobs(model, batch())
    torch.testing.assert_close(ours, dense, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------- masks and shapes


def test_padding_on_either_side_costs_nothing_and_reads_zero() -> None:
    model, input_ids = build(), batch()
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, :3] = 0  # left
    attention_mask[1, 6:] = 0  # right
    completion_mask = torch.ones_like(input_ids)
    completion_mask[2, :5] = 0
    wanted = attention_mask[:, 1:].bool() & attention_mask[:, :-1].bool() & completion_mask[:, 1:].bool()
    with torch.no_grad():
        ours = lm_head.logprobs(model, input_ids, attention_mask, completion_mask=completion_mask, outputs=("entropy",))
        dense = dense_logprobs(model, input_ids, attention_mask=attention_mask)
    assert ours.entropy is not None
    assert wanted.sum() == 5 + 5 + 4
    assert (ours.logprobs[~wanted] == 0).all()
    assert (ours.entropy[~wanted] == 0).all()
    torch.testing.assert_close(ours.logprobs[wanted], dense[wanted], rtol=1e-5, atol=1e-5)


def test_no_logits_over_the_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("gemma2")
    head_rows: list[int] = []
    linear = F.linear

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if len(weight) == V:
            head_rows.append(x.shape[:-1].numel())
        return linear(x, weight, bias)

    monkeypatch.setattr(F, "linear", counted)
    lm_head.hidden_states(model, batch(B=2, T=40))
    assert head_rows == [0]


def test_one_token_and_no_token_wanted() -> None:
    model, input_ids = build(), batch()
    assert lm_head.logprobs(model, input_ids[:, :1]).logprobs.shape == (3, 0)
    nothing = lm_head.logprobs(model, input_ids, completion_mask=torch.zeros_like(input_ids)).logprobs
    assert (nothing == 0).all()
    nothing.sum().backward()


def test_logits_to_keep_and_inputs_embeds_reach_the_model() -> None:
    model, input_ids = build(), batch()
    with torch.no_grad():
        full = lm_head.hidden_states(model, input_ids)
        assert torch.equal(lm_head.hidden_states(model, input_ids, logits_to_keep=4), full[:, -4:])
        embeds = model.get_input_embeddings()(input_ids)
        torch.testing.assert_close(lm_head.hidden_states(model, inputs_embeds=embeds), full)


def test_auxiliary_loss_of_a_mixture_of_experts() -> None:
    model, input_ids = build("mixtral"), batch()
    inputs = lm_head.forward(model, input_ids, output_router_logits=True)
    assert inputs.aux_loss is not None
    torch.testing.assert_close(inputs.aux_loss, model(input_ids, output_router_logits=True).aux_loss)
    assert lm_head.forward(model, input_ids).aux_loss is None


# ------------------------------------------------------------------------------------------- gradients and modes


@pytest.mark.parametrize(
    ("family", "checkpointing"), [("gemma2", False), ("qwen2_tied", False), ("qwen2_tied", True), ("phi", False)]
)
def test_gradients_match_dense_autograd(family: str, checkpointing: bool) -> None:
    model, input_ids = build(family), batch()
    upstream = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
    upstream[0] = 0.0

    def gradients(m: nn.Module, ours: bool) -> dict[str, Tensor]:
        m.zero_grad()
        values = lm_head.logprobs(m, input_ids).logprobs if ours else dense_logprobs(m, input_ids)
        (3.7 * (values * upstream).sum()).backward()
        return {name: p.grad.clone() for name, p in m.named_parameters() if p.grad is not None}

    truth, dense = gradients(copy.deepcopy(model).double(), ours=False), gradients(model, ours=False)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()  # checkpoints only then; nothing here drops out
    ours = gradients(model, ours=True)
    assert ours.keys() == dense.keys() == truth.keys()
    for name, true in truth.items():
        error, torch_error = (ours[name] - true).abs().max(), (dense[name] - true).abs().max()
        assert error <= 2 * torch_error + 1e-6 * true.abs().max(), f"{name}: {error:.2e} against {torch_error:.2e}"


@pytest.mark.parametrize("inside", [False, True], ids=["around", "inside_forward"])
def test_autocast_of_the_models_own_head_is_followed(inside: bool) -> None:
    model, input_ids = build(), batch()
    if inside:  # as accelerate prepares a model
        model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(model.forward)
        inputs = lm_head.forward(model, input_ids)
        ours = lm_head.logprobs(model, input_ids).logprobs
    else:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inputs = lm_head.forward(model, input_ids)
            ours = lm_head.logprobs(model, input_ids).logprobs
    assert inputs.autocast_dtype is torch.bfloat16
    assert inputs.head.weight.dtype is torch.float32
    rounded = F.linear(inputs.hidden.bfloat16().double(), inputs.head.weight.bfloat16().double())
    truth = rounded[:, :-1].log_softmax(-1).gather(-1, input_ids[:, 1:, None])[..., 0]
    assert (ours - truth).abs().max() <= 5e-5  # the contract for bf16 operands


def test_bf16_model() -> None:
    model, input_ids = build("gemma2").bfloat16(), batch()
    with torch.no_grad():
        inputs = lm_head.forward(model, input_ids)
        ours = lm_head.logprobs(model, input_ids).logprobs
    assert (inputs.head.logit_scale, inputs.head.softcap) == (1.0, 30.0)
    assert inputs.hidden.dtype is torch.bfloat16
    logits = 30 * torch.tanh(F.linear(inputs.hidden.double(), inputs.head.weight.double()) / 30)
    truth = logits[:, :-1].log_softmax(-1).gather(-1, input_ids[:, 1:, None])[..., 0]
    assert (ours - truth).abs().max() <= 5e-5


def test_find_head_draws_no_random_numbers() -> None:
    model = build("gpt2").train()  # with dropout
    state = torch.get_rng_state()
    lm_head.find_head(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_parametrised_weight_keeps_its_graph() -> None:
    model, input_ids = build(), batch()
    nn.utils.parametrizations.weight_norm(model.lm_head)
    assert lm_head.find_head(model).weight.requires_grad
    lm_head.logprobs(model, input_ids).logprobs.sum().backward()
    ours = model.lm_head.parametrizations.weight.original1.grad.clone()
    model.zero_grad()
    dense_logprobs(model, input_ids).sum().backward()
    torch.testing.assert_close(ours, model.lm_head.parametrizations.weight.original1.grad, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------- wrappers


@pytest.mark.parametrize("where", ["whole", "in_place", "backbone"])
def test_compiled_models(where: str) -> None:
    model, input_ids = build("gemma2", num_hidden_layers=1), batch()
    with torch.no_grad():
        expected = model(input_ids).logits
        values = dense_logprobs(model, input_ids)
        compiled: Any = torch.compile(model, backend="eager") if where == "whole" else model
        if where == "in_place":
            model.compile(backend="eager")
        if where == "backbone":
            model.model.compile(backend="eager")
        for _ in range(2):
            torch.testing.assert_close(lm_head.logprobs(compiled, input_ids).logprobs, values, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(compiled(input_ids).logits, expected)


@pytest.fixture
def one_process_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def with_dense_gradients() -> tuple[Any, dict[str, Tensor]]:
    model = build()
    dense_logprobs(model, batch()).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return model, gradients


@pytest.mark.usefixtures("one_process_group")
def test_distributed_data_parallel() -> None:
    model, expected = with_dense_gradients()
    # Asked to find unused parameters, DDP looks for them in the graph of what the forward returns.
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    for _ in range(2):
        wrapped.zero_grad()
        lm_head.logprobs(wrapped, batch()).logprobs.sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("one_process_group")
def test_fully_sharded_with_the_head_in_the_root_group() -> None:
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    model, expected = with_dense_gradients()
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fsdp.fully_shard(layer, mesh=mesh)
    fsdp.fully_shard(model, mesh=mesh)
    for _ in range(2):
        model.zero_grad()
        lm_head.logprobs(model, batch()).logprobs.sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad.full_tensor(), expected[name], rtol=1e-4, atol=1e-4)


def sharded(case: str, shard: bool) -> Any:
    """A model of one of SHARDED, each group of it under FSDP2, or as it is."""
    from torch.distributed.fsdp import fully_shard

    family, groups, *_ = SHARDED[case]
    model = build(family)
    if "adapters" in case:
        model = lora(model, target_modules=["q_proj", "lm_head"])
    if "modules_to_save" in case:
        model = lora(model, target_modules=["q_proj"], modules_to_save=["lm_head"])
    base = getattr(model, "base_model", model).model if hasattr(model, "get_base_model") else model
    if "frozen" in case:
        base.model.requires_grad_(False)
    if not shard:
        return model
    if "blocks" in groups:
        for block in base.model.layers:
            fully_shard(block)
    if "embedding" in groups:
        fully_shard(base.get_input_embeddings())
    if "norm" in groups:
        fully_shard([base.model.norm, base.get_output_embeddings()])
    elif "head" in groups:
        fully_shard(base.get_output_embeddings(), reshard_after_forward=False if "stays" in case else None)
    return fully_shard(model)


SHARDED: dict[str, tuple[str, set[str]]] = {
    "a group of its own": ("qwen2", {"blocks", "embedding", "head"}),
    "that stays whole after the forward": ("qwen2", {"blocks", "head"}),
    "apart from all else": ("qwen2", {"head"}),
    "one group": ("qwen2", set()),
    "on a frozen body": ("qwen2", {"blocks", "head"}),
    "in the root's group on a frozen body": ("qwen2", {"blocks"}),
    "a bias": ("phi", {"blocks", "head"}),
    "a softcap": ("nanochat", {"blocks", "head"}),
    "in one group with the last norm": ("qwen2", {"blocks", "norm", "head"}),
    "tied": ("gemma2", {"blocks"}),
    "adapters": ("qwen2", {"blocks", "head"}),
    "modules_to_save": ("qwen2", {"blocks", "head"}),
}


def loss_in_two_forwards(model: nn.Module, ids: Tensor) -> Tensor:
    """A backward through the second one must not take the weight from the first."""
    return sum((lm_head.logprobs(model, some).logprobs.pow(2).sum() for some in ids.split(2)), torch.zeros(()))


def compare_sharded_heads() -> None:
    """Gradients of two processes that have two batches each, and those of one that has all four; in both processes."""
    from torch.distributed.tensor import DTensor

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank, ids = torch.distributed.get_rank(), batch(B=8)
    for case in SHARDED:
        alone, model = sharded(case, False), sharded(case, True)
        mine = ids[4 * rank : 4 * rank + 4]
        for scale in (1.0, 3.7):  # the second one is added to the first, as of another micro-batch
            (scale * loss_in_two_forwards(alone, ids) / 2).backward()
            (scale * loss_in_two_forwards(model, mine)).backward()
        head = lm_head.unwrap(model).base.get_output_embeddings()
        assert all(isinstance(p, DTensor) for p in head.parameters()), case
        for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), (case, name)
            if q.grad is not None:
                error = (p.grad.full_tensor() - q.grad).abs().max() / q.grad.abs().max()
                assert error < 1e-4, (case, name, error)
        with torch.no_grad():
            out = lm_head.logprobs(model, mine).logprobs
            torch.testing.assert_close(out, dense_logprobs(model, mine), rtol=1e-4, atol=1e-4)
        if "head" in SHARDED[case][1] and "stays" not in case:
            assert all(isinstance(p, DTensor) for p in head.parameters()), case
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_heads_sharded_over_two_processes_equal_whole_ones(tmp_path: Path) -> None:
    launch.together("from tests import test_lm_head as t; t.compare_sharded_heads()", tmp_path)


@pytest.mark.usefixtures("one_process_group")
@pytest.mark.parametrize("alone", [True, False])
def test_a_sharded_head_is_streamed_or_whole_in_a_forward_alone(alone: bool) -> None:
    model = build()
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    fsdp.fully_shard(model.lm_head if alone else [model.model.norm, model.lm_head])
    fsdp.fully_shard(model)
    expected = build()
    inputs = lm_head.forward(model, batch())
    assert (inputs.head.stream is not None) == alone
    torch.testing.assert_close(inputs.head.whole().weight, expected.lm_head.weight)
    loss = fr.linear_logprobs(inputs.hidden, inputs.head, batch()).logprobs.sum()
    for _ in range(2):
        loss.backward(retain_graph=True)
    fr.linear_logprobs(
        lm_head.hidden_states(expected, batch()), expected.lm_head.weight, batch()
    ).logprobs.sum().backward()
    torch.testing.assert_close(model.lm_head.weight.grad.full_tensor(), 2 * expected.lm_head.weight.grad)
    if alone:
        found = lm_head.find_head(model)
        assert found.stream == inputs.head.stream
        assert found.weight.requires_grad
    else:
        with pytest.raises(ValueError, match=r"its weight is a DTensor, Shard.* not for find_head"):
            lm_head.find_head(model)


def assert_refused_as_split(model: nn.Module) -> None:
    for call in (lm_head.find_head, lambda m: lm_head.forward(m, batch()), lambda m: lm_head.logprobs(m, batch())):
        with pytest.raises(ValueError, match=r"a DTensor, .* over \d processes \(tensor parallelism .*to_local"):
            call(model)


@pytest.mark.usefixtures("one_process_group")
def test_tensor_parallelism_is_refused_by_its_name() -> None:
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    hooked = build("llama")
    parallelize_module(hooked, mesh, {"lm_head": ColwiseParallel(use_local_output=False)})
    replaced = build("llama")  # as transformers does it
    replaced.lm_head.weight = nn.Parameter(distribute_tensor(replaced.lm_head.weight.detach(), mesh, [Shard(0)]))
    replaced.lm_head.forward = replaced.lm_head.forward
    for model in (hooked, replaced):
        assert_refused_as_split(model)


def test_accelerates_device_hooks() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model, input_ids = build(), batch()
    with torch.no_grad():
        expected = dense_logprobs(model, input_ids)
        hooks.add_hook_to_module(model.lm_head, hooks.AlignDevicesHook(execution_device="cpu"))
        torch.testing.assert_close(lm_head.logprobs(model, input_ids).logprobs, expected, rtol=1e-5, atol=1e-5)
        hooks.remove_hook_from_module(model.lm_head)
        hooks.add_hook_to_module(model.lm_head, hooks.AlignDevicesHook(execution_device="cpu", offload=True))
        with pytest.raises(ValueError, match="meta device"):
            lm_head.logprobs(model, input_ids)


# ------------------------------------------------------------------------------------------- PEFT


def lora(model: nn.Module, **config: object) -> Any:
    """LoRA with weights that matter: as made, its update is zero."""
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, task_type="CAUSAL_LM", **config))
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                p.normal_(0.0, 0.3)
    return wrapped


def test_lora_in_the_body_on_and_off() -> None:
    model, input_ids = lora(build(), target_modules=["q_proj", "down_proj"]).eval(), batch()
    with torch.no_grad():
        on = lm_head.logprobs(model, input_ids).logprobs
        torch.testing.assert_close(on, dense_logprobs(model, input_ids), rtol=1e-5, atol=1e-5)
        with model.disable_adapter():
            off = lm_head.logprobs(model, input_ids).logprobs
            torch.testing.assert_close(off, dense_logprobs(model, input_ids), rtol=1e-5, atol=1e-5)
    assert (on - off).abs().max() > 0.1
    lm_head.logprobs(model, input_ids).logprobs.sum().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name, _ in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("family", ["qwen2", "qwen2_tied"])
def test_modules_to_save_uses_the_active_head(family: str) -> None:
    model, input_ids = lora(build(family), target_modules=["q_proj"], modules_to_save=["lm_head"]).eval(), batch()
    with torch.no_grad():
        saved = lm_head.find_head(model).weight
        on = lm_head.logprobs(model, input_ids).logprobs
        torch.testing.assert_close(on, dense_logprobs(model, input_ids), rtol=1e-5, atol=1e-5)
        with model.disable_adapter():
            original = lm_head.find_head(model).weight
            off = lm_head.logprobs(model, input_ids).logprobs
            torch.testing.assert_close(off, dense_logprobs(model, input_ids), rtol=1e-5, atol=1e-5)
    wrapper = model.get_base_model().lm_head
    assert saved is wrapper.modules_to_save["default"].weight
    assert original is wrapper.original_module.weight
    lm_head.logprobs(model, input_ids).logprobs.sum().backward()
    assert saved.grad is not None
    assert original.grad is None


@pytest.mark.parametrize("rslora", [False, True])
def test_lora_on_the_head(rslora: bool) -> None:
    """Values and gradients of the adapter's factors are PEFT's own; the head's weight gets none."""
    options = {"target_modules": ["q_proj", "lm_head"], "use_rslora": rslora}
    model, input_ids = lora(build(), **options).eval(), batch()
    ours = lm_head.logprobs(model, input_ids).logprobs
    with torch.no_grad():
        torch.testing.assert_close(ours, dense_logprobs(model, input_ids), rtol=1e-5, atol=1e-5)
        with model.disable_adapter():  # the reference policy needs no adapter
            off = lm_head.logprobs(model, input_ids).logprobs
            torch.testing.assert_close(off, dense_logprobs(model, input_ids), rtol=1e-5, atol=1e-5)
    assert (ours - off).abs().max() > 0.1
    trained = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(ours.sum(), trained)
    truth = torch.autograd.grad(dense_logprobs(model, input_ids).sum(), trained)
    assert any("lm_head.lora_A" in name for name, p in model.named_parameters() if p.requires_grad)
    for a, b in zip(found, truth):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        model.merge_adapter()
        merged = lm_head.logprobs(model, input_ids).logprobs
        torch.testing.assert_close(merged, dense_logprobs(model, input_ids), rtol=1e-5, atol=1e-5)
        with model.disable_adapter():  # takes the merged update out again, during the forward
            torch.testing.assert_close(lm_head.logprobs(model, input_ids).logprobs, off, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"), [({"use_dora": True}, "one plain LoRA"), ({"lora_dropout": 0.1}, "lora_dropout must be 0")]
)
def test_other_adapters_on_the_head_are_refused(options: dict[str, object], message: str) -> None:
    model = lora(build(), target_modules=["lm_head"], **options).train()
    with pytest.raises(ValueError, match=message):
        lm_head.logprobs(model, batch())


def test_prompt_tuning_leaves_the_virtual_tokens_out() -> None:
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    model, input_ids = peft.get_peft_model(build(), config).eval(), batch()
    attention_mask = torch.ones_like(input_ids)
    with torch.no_grad():
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
        assert logits.shape[1] == 14
        expected = logits[:, 5:-1].log_softmax(-1).gather(-1, input_ids[:, 1:, None])[..., 0]
        ours = lm_head.logprobs(model, input_ids, attention_mask).logprobs
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------- what is refused


def altered(change: object) -> nn.Module:
    """A Qwen2 whose forward changes the logits after the head."""
    model = build()
    own = model.forward

    def forward(*args: object, **kwargs: object) -> object:
        output = own(*args, **kwargs)
        output.logits = change(output.logits)  # type: ignore[operator]
        return output

    model.forward = forward
    return model


def one_column_masked(logits: Tensor) -> Tensor:
    logits = logits.clone()
    logits[..., 100] = torch.finfo(logits.dtype).min
    return logits


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda z: z + 0.5, "are not softcap tanh"),
        (lambda z: z.clamp(-30, 30), "are not softcap tanh"),
        (lambda z: 30 * F.softsign(z / 30), "are not softcap tanh"),
        (lambda z: z.log_softmax(-1), "are not softcap tanh"),
        (lambda z: z - z.mean(-1, keepdim=True), "are not softcap tanh"),
        (lambda z: z * torch.linspace(1, 1.001, V), "are not softcap tanh"),
        (lambda z: z * 0, "are not softcap tanh"),
        (lambda z: z * float("nan"), "are not softcap tanh"),
        (lambda z: z.abs(), "are not softcap tanh"),
        (lambda z: torch.where(z > 0, z, 0.5 * z), "are not softcap tanh"),
        (one_column_masked, "are not softcap tanh"),
        (lambda z: z[..., :-7], "padded or cut vocabulary"),
        (lambda z: F.pad(z, (0, 7)), "padded or cut vocabulary"),
        (lambda z: z[:, -1:], "positions dropped"),
        (lambda z: z.bfloat16(), "rounds its logits to torch.bfloat16"),
        (lambda z: None, "returns no logits"),
        (lambda z: z @ torch.ones(V, V, dtype=torch.float32), "fails on the probe"),
    ],
)
def test_other_transforms_are_refused(change: object, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        lm_head.find_head(altered(change))


def test_transforms_of_the_form_are_found_wherever_they_are_made() -> None:
    head = lm_head.find_head(altered(lambda z: 8.0 * torch.tanh(z.float() * (0.123 / 8.0))))
    assert head.logit_scale == pytest.approx(0.123, rel=1e-6)
    assert head.softcap == pytest.approx(8.0, rel=1e-6)
    model = build()
    model.lm_head.register_forward_hook(lambda module, args, z: z / 3)
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] * 5,))
    with torch.no_grad():
        ours, dense = lm_head.logprobs(model, batch()).logprobs, dense_logprobs(model, batch())
    torch.testing.assert_close(ours, dense, rtol=1e-5, atol=1e-5)


class Normalised(nn.Linear):
    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, F.normalize(self.weight))


class Packed(nn.Parameter):
    """Stands for a quantised weight: a parameter whose numbers are not the weights."""


def with_head(head: nn.Module) -> nn.Module:
    model = build()
    model.lm_head = head
    return model


def with_int8_head() -> nn.Module:
    head = nn.Linear(32, V, bias=False)
    head.weight = nn.Parameter(head.weight.detach().to(torch.int8), requires_grad=False)
    return with_head(head)


def with_packed_head() -> nn.Module:
    head = nn.Linear(32, V, bias=False)
    head.weight = Packed(head.weight.detach())
    return with_head(head)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: with_head(nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, V))), "got Sequential"),
        (lambda: with_head(Normalised(32, V, bias=False)), "got Normalised"),
        (lambda: with_head(transformers.pytorch_utils.Conv1D(V, 32)), "got Conv1D"),
        (with_int8_head, "torch.int8"),
        (with_packed_head, "got Packed"),
        (lambda: with_head(None), "no output embeddings"),  # type: ignore[arg-type]
        (lambda: build().model, "no output embeddings"),
    ],
)
def test_other_heads_are_refused(make: object, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        lm_head.find_head(make())  # type: ignore[operator]


def test_a_forward_that_passes_its_head_by_is_refused() -> None:
    model = build()

    def forward(input_ids: Tensor, **kwargs: object) -> object:
        hidden = model.model(input_ids).last_hidden_state
        logits = F.linear(hidden, model.lm_head.weight)
        return transformers.modeling_outputs.CausalLMOutputWithPast(logits=logits)

    model.forward = forward
    with pytest.raises(ValueError, match="0 times"):
        lm_head.find_head(model)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"input_ids": torch.zeros(4, dtype=torch.int64)}, "input_ids must be"),
        ({"input_ids": torch.zeros(2, 4)}, "input_ids must be"),
        ({"attention_mask": torch.ones(3, 8)}, "attention_mask must have"),
        ({"completion_mask": torch.ones(3, 8)}, "completion_mask must have"),
        ({"labels": batch()}, "labels must not"),
        ({"logits_to_keep": 2}, "logits_to_keep must not"),
        ({"temperature": 0.0}, "temperature"),
        ({"outputs": ("entropies",)}, "outputs"),
        ({"backend": "cuda"}, "backend"),
    ],
)
def test_bad_arguments(changes: dict, why: str) -> None:
    model = build()
    with pytest.raises(ValueError, match=why):
        lm_head.logprobs(model, **{"input_ids": batch(), **changes})


@pytest.mark.parametrize("thing", [nn.Linear(3, 3), "qwen2", None])
def test_not_a_model(thing: object) -> None:
    with pytest.raises(TypeError, match="transformers causal LM"):
        lm_head.find_head(thing)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------- nothing is left behind


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_the_head_is_itself_again_after_success_and_after_exceptions() -> None:
    model, input_ids = build(), batch()
    expected = model(input_ids).logits
    lm_head.logprobs(model, input_ids)
    assert hooks_of(model) == 0
    assert torch.equal(model(input_ids).logits, expected)

    with pytest.raises(IndexError):  # the model's own complaint comes through as it is
        lm_head.logprobs(model, input_ids + V)
    interrupted = model.lm_head.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        lm_head.logprobs(model, input_ids)
    interrupted.remove()
    assert hooks_of(model) == 0
    assert torch.equal(model(input_ids).logits, expected)


def test_another_thread_keeps_its_logits() -> None:
    model, input_ids = build(), batch()
    with torch.no_grad():
        expected = model(input_ids).logits
    values = lm_head.logprobs(model, input_ids).logprobs.detach()
    entered, done = threading.Event(), threading.Event()
    seen: list[Tensor] = []

    def other() -> None:
        entered.wait(10)
        with torch.no_grad():
            seen.append(model(input_ids).logits)
            seen.append(lm_head.logprobs(model, input_ids).logprobs)
        done.set()

    def pause(*_: object) -> None:  # holds the first forward between its backbone and its head, hooks in place
        if threading.current_thread() is threading.main_thread():
            entered.set()
            done.wait(10)

    model.model.register_forward_hook(pause)
    thread = threading.Thread(target=other)
    thread.start()
    mine = lm_head.logprobs(model, input_ids).logprobs
    thread.join()
    assert done.is_set()
    assert torch.equal(seen[0], expected)
    assert torch.equal(seen[1], values)
    assert torch.equal(mine, values)

"""fused-rlhf: ours[-BACKEND][-MODE][-rounded]; without a backend it is "auto", without a mode likewise."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from bench import objectives
from bench.cases import DTYPES, Case
from bench.inputs import Inputs
from bench.ops import DPO_BETA, ENTROPY_COEF, EPSILON, OPS, Values
from bench.provider import CONTRACT, ROUNDED, Output, Step, provider

OBJECTIVES = ("grpo", "ppo", "dpo")


def ours(inputs: Inputs, *, backend: str, mode: str, rounded: bool) -> Step:
    import fused_rlhf as fr

    case, labels = inputs.case, inputs.labels
    if case.op == "kl":
        divergence = partial(fr.linear_kl, kind="reverse", mask=inputs.mask, backend=backend)
        assert inputs.ref_hidden is not None
        ref_hidden, ref_weight = inputs.ref_hidden, inputs.weight.detach()
        return lambda: divergence(inputs.hidden, inputs.weight, ref_hidden, ref_weight)
    if case.op not in OBJECTIVES:
        logprobs = partial(fr.linear_logprobs, backend=backend, round_logits=rounded)
        return lambda: Values(logprobs(inputs.hidden, inputs.weight, labels).logprobs)
    batch: dict[str, Any] = {
        "completion_mask": inputs.sequences(inputs.mask) if case.density < 1 else None,
        "ref_logprobs": None if inputs.ref_logprobs is None else inputs.sequences(inputs.ref_logprobs),
    }
    function: Callable[..., Any] = fr.linear_preference_loss if case.op == "dpo" else fr.linear_policy_loss
    if case.objective:
        batch["objective"] = objectives.of(case)
    if case.op == "dpo":
        batch.setdefault("objective", fr.DPO(beta=DPO_BETA))
        if not batch["objective"].needs_reference:
            batch["ref_logprobs"] = None
    else:
        batch["advantages"] = inputs.sequences(inputs.advantages)
        batch["old_logprobs"] = inputs.sequences(inputs.old_logprobs)
        clip = {"epsilon_low": EPSILON, "epsilon_high": EPSILON}
        usual = fr.GRPO(beta=case.beta, **clip) if case.op == "grpo" else fr.PPO(entropy_coef=ENTROPY_COEF, **clip)
        batch.setdefault("objective", usual)
    hidden, targets = inputs.sequences, inputs.sequences(inputs.targets)

    def run() -> Output:
        loss, _ = function(
            hidden(inputs.hidden), inputs.weight, targets, backend=backend, mode=mode, round_logits=rounded, **batch
        )
        return Output(loss)

    return run


def memory(case: Case, device: str, *, backend: str, mode: str) -> float | None:
    """Peak over the inputs; the backends' docstrings say why."""
    if backend == "auto":
        backend = "triton" if device == "cuda" and case.op != "kl" else "chunked"
    tokenwise = case.op in ("grpo", "ppo")
    one_pass = case.op in OBJECTIVES and mode != "two_phase" and (tokenwise or case.frozen_head)
    if backend == "triton":
        return triton_memory(case, one_pass)
    return chunked_memory(case, one_pass) if backend == "chunked" else None


def chunked_memory(case: Case, one_pass: bool) -> float:
    """Tiles that stay in cache; one pass and the divergence keep a block of whole rows. Both passes hold the rows'
    operands and gradients in fp32, and one pass under a bf16 head its dW."""
    from fused_rlhf.backends import chunked

    op, tokens = OPS[case.op], case.rows[0]
    tile = 4.0 * min(chunked.ROWS, case.N) * min(chunked.TILE, case.V)
    tiles = {"kl": 12, "ppo": 3}.get(op.name, 2) * tile
    if op.values == "kl":
        kept = 8.0 * min(chunked.row_block(2 * case.V, 4), case.N) * case.V + tiles
        return max(kept, tiles + 4 * case.N * case.H + case.gradient_bytes)
    if not op.backward:
        return tiles + 4 * tokens * case.H
    if one_pass:
        wide = 4 * case.V * case.H if case.itemsize < 4 and not case.frozen_head else 0
        rows = min(chunked.row_block(case.V, 4), case.N)
        return 4.0 * rows * (case.V + 3 * case.H) + tiles + wide + case.gradient_bytes
    return tiles + (8 + case.itemsize) * tokens * case.H + case.gradient_bytes


def triton_memory(case: Case, one_pass: bool) -> float:
    """As its GPU test has it: statistics per tile, then dlogits of a block of columns and dX in fp32, or, in one pass,
    exponentials of a block of rows and the low halves of a sum of dW over several blocks."""
    import torch

    from fused_rlhf.kernels import ops
    from fused_rlhf.kernels.interface import Head

    dtype = DTYPES[case.dtype]
    head = Head(torch.empty(case.V, case.H, dtype=dtype, device="meta"), compute_dtype=dtype)
    rows, gradients = min(case.N, ops.ROWS), case.gradient_bytes
    statistics = 8.0 * rows * -(-case.V // 128)
    if not OPS[case.op].backward:
        return statistics + 64 * case.N
    if one_pass and not OPS[case.op].entropy:
        block = ops.one_pass_rows(case.N, head, not case.frozen_head)
        low = case.V * case.H * case.itemsize if block < case.N and case.itemsize == 2 and not case.frozen_head else 0
        return block * (case.V * case.itemsize + 8 * case.H + 8 * -(-case.V // 128)) + low + gradients
    columns = ops.COLUMNS_PER_SM * 132  # multiprocessors of an H100 or H200
    return max(statistics, rows * columns * case.itemsize + 4 * columns * case.H) + 4 * case.N * case.H + gradients


def has(case: Case, *, backend: str, mode: str, rounded: bool) -> bool:
    if case.op == "kl":  # which has no modes, no Triton kernel and nothing to round
        return mode == "auto" and not rounded and backend != "triton"
    if case.op not in OBJECTIVES:
        return mode == "auto"
    if case.objective and case.op == "grpo" and mode == "one_pass" and not case.frozen_head:
        return objectives.of(case).tokenwise  # type: ignore[union-attr]
    # A pair's loss needs both completions before the first gradient, so one pass serves a frozen head alone.
    return mode != "one_pass" or case.op != "dpo" or case.frozen_head


for _backend in ("auto", "triton", "chunked", "reference"):
    for _mode in ("auto", "one_pass", "two_phase"):
        for _rounded in (False, True):
            _parts = ["ours", *(p for p in (_backend, _mode) if p != "auto"), *(["rounded"] if _rounded else [])]
            provider(
                "-".join(_parts),
                packages=("fused-rlhf", "torch", "triton"),
                where=partial(has, backend=_backend, mode=_mode, rounded=_rounded),
                tolerance=ROUNDED if _rounded else CONTRACT,
                memory=partial(memory, backend=_backend, mode=_mode),
            )(partial(ours, backend=_backend, mode=_mode, rounded=_rounded))

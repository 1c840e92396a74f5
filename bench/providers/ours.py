"""fused-rlhf: ours[-BACKEND][-MODE][-rounded]; without a backend it is "auto", without a mode likewise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from fused_rlhf.bench import objectives
from fused_rlhf.bench.cases import Case
from fused_rlhf.bench.ops import DPO_BETA, ENTROPY_COEF, EPSILON, OPS, Values
from fused_rlhf.bench.provider import CONTRACT, ROUNDED, Output, Step, provider

if TYPE_CHECKING:
    from fused_rlhf.bench.inputs import Inputs

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
        grpo = case.op == "grpo"
        usual = fr.GRPO(epsilon=EPSILON, beta=case.beta) if grpo else fr.PPO(epsilon=EPSILON, entropy_coef=ENTROPY_COEF)
        batch.setdefault("objective", usual)
    hidden, targets = inputs.sequences, inputs.sequences(inputs.targets)

    def run() -> Output:
        loss, _ = function(
            hidden(inputs.hidden), inputs.weight, targets, backend=backend, mode=mode, round_logits=rounded, **batch
        )
        return Output(loss)

    return run


def memory(case: Case, device: str, *, backend: str, mode: str) -> float:
    """Peak over the inputs, as the library's own backend says."""
    import torch

    from fused_rlhf import backends
    from fused_rlhf.bench.inputs import DTYPES
    from fused_rlhf.kernels.interface import Needs, Route, Work

    op, tokens = OPS[case.op], round(case.rows[0])
    one_pass = case.op in OBJECTIVES and mode != "two_phase" and (case.op in ("grpo", "ppo") or case.frozen_head)
    route: Route = (
        "divergence" if op.values == "kl" else "one_pass" if one_pass else "two_phase" if op.backward else "forward"
    )
    if backend == "auto":
        backend = "triton" if device == "cuda" else "chunked"
    needs = Needs(op.backward, op.backward and not case.frozen_head, False)
    work = Work(route, tokens, case.H, case.V, DTYPES[case.dtype], needs, needs_entropy=op.entropy)
    if device == "cuda" and torch.cuda.is_available():
        work = replace(work, multiprocessors=torch.cuda.get_device_properties(0).multi_processor_count)
    # Rows outside the mask have gradients too, which are zero.
    return backends.load(backend).memory(work) + case.gradient_bytes - work.gradients


def has(case: Case, *, backend: str, mode: str, rounded: bool) -> bool:
    if case.op == "kl":  # which has no modes and nothing to round
        return mode == "auto" and not rounded
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

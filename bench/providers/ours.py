"""fused-rlhf: ours[-BACKEND][-MODE][-rounded]; without a backend it is "auto", without a mode likewise. ours-lora: with an
adapter on a frozen head. ours-compiled, ours-graphs: inside torch.compile, in its default mode and in "reduce-overhead"."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from fused_rlhf.bench import objectives
from fused_rlhf.bench.cases import Case
from fused_rlhf.bench.ops import DPO_BETA, ENTROPY_COEF, EPSILON, OPS, TOP_P, Values
from fused_rlhf.bench.provider import CONTRACT, ROUNDED, Output, Step, provider
from fused_rlhf.bench.providers.plain import LOGPROB_OPS, adapter

if TYPE_CHECKING:
    from torch import Tensor

    from fused_rlhf.bench.inputs import Inputs

PACKAGES = ("fused-rlhf", "torch", "triton")
OBJECTIVES = ("sft", "grpo", "ppo", "dpo")


def ours(inputs: Inputs, *, backend: str, mode: str, rounded: bool, lora: bool = False) -> Step:
    import fused_rlhf as fr

    case, labels = inputs.case, inputs.labels
    on_head: dict[str, Any] = {"lora": adapter(inputs)} if lora else {}
    if case.op == "kl":
        divergence = partial(fr.linear_kl, kind="reverse", mask=inputs.mask, backend=backend)
        assert inputs.ref_hidden is not None
        ref_hidden, ref_weight = inputs.ref_hidden, inputs.weight.detach()
        return lambda: divergence(inputs.hidden, inputs.weight, ref_hidden, ref_weight)
    if case.op not in OBJECTIVES:
        options: dict[str, Any] = {"backend": backend, "round_logits": rounded, **on_head, **sampling(inputs)}

        def logprobs() -> Values:
            found = fr.linear_logprobs(inputs.hidden, inputs.weight, labels, **options)
            return Values(found.logprobs if found.id_logprobs is None else found.logprobs + found.id_logprobs.mean(1))

        return logprobs
    batch: dict[str, Any] = on_head | {
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
    elif case.op == "sft":  # a policy whose advantages are all 1, so that one pass serves
        batch |= {"advantages": inputs.upstream.new_ones(case.N // case.T), "objective": fr.REINFORCE()}
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


def sampling(inputs: Inputs) -> dict[str, Any]:
    """What `linear_logprobs` is told of the tokens that a sampler kept, or of further ones."""
    import torch

    import fused_rlhf as fr

    op = OPS[inputs.case.op]
    if inputs.case.op == "top_p":
        return {"truncation": fr.Truncation(top_p=TOP_P)}
    if inputs.ids is None or op.whole:
        return {"ids": inputs.ids}
    offsets = torch.arange(0, inputs.ids.numel() + 1, op.ids, device=inputs.ids.device)
    return {"kept": (inputs.ids.flatten(), offsets)}


def memory(case: Case, device: str, *, backend: str, mode: str) -> float:
    """Peak over the inputs, as the library's own backend says."""
    import torch

    from fused_rlhf import backends
    from fused_rlhf.bench.inputs import DTYPES
    from fused_rlhf.kernels.interface import Needs, Route, Work

    op, tokens = OPS[case.op], round(case.rows[0])
    one_pass = case.op in OBJECTIVES and mode != "two_phase" and (case.op != "dpo" or case.frozen_head)
    route: Route = (
        "divergence" if op.values == "kl" else "one_pass" if one_pass else "two_phase" if op.backward else "forward"
    )
    if backend == "auto":
        backend = "triton" if device == "cuda" else "chunked"
    needs = Needs(op.backward, op.backward and not case.frozen_head, False)
    work = Work(route, tokens, case.H, case.V, DTYPES[case.dtype], needs, needs_entropy=op.entropy)
    if device == "cuda" and torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        work = replace(work, multiprocessors=found.multi_processor_count, device_bytes=found.total_memory)
    formula = backends.load(backend).memory
    # Rows outside the mask have gradients too, which are zero.
    peak = formula(work) + case.gradient_bytes - work.gradients if op.whole else case.gradient_bytes
    if case.op == "top_p":  # a block of whole rows until its sets are found, before there are gradients
        peak = max(peak, formula(replace(work, route="one_pass", needs=Needs(False, False, False))))
    return peak + of_ids(case) if op.ids else peak


def of_ids(case: Case) -> float:
    """Products with given tokens' rows of the head, which are fetched a few MB at a time, their gradients summed by the tokens
    of a tile. 64 bytes a token: its row and place, logit and gradient, and these in the order of the tokens."""
    from fused_rlhf.backends import gathered, tiling

    tokens = round(case.rows[0])
    wide = 4.0 * tokens * case.H if case.itemsize < 4 else 0.0
    return 64.0 * tokens * OPS[case.op].ids + wide + max(2 * gathered.BYTES, 4.0 * min(tiling.TILE, case.V) * case.H)


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
                packages=PACKAGES,
                where=partial(has, backend=_backend, mode=_mode, rounded=_rounded),
                tolerance=ROUNDED if _rounded else CONTRACT,
                memory=partial(memory, backend=_backend, mode=_mode),
            )(partial(ours, backend=_backend, mode=_mode, rounded=_rounded))


LORA_OPS = ("logprobs_fwd_bwd", "grpo")
provider("ours-lora", packages=PACKAGES, ops=LORA_OPS, where=lambda case: case.frozen_head)(
    partial(ours, backend="auto", mode="auto", rounded=False, lora=True)
)


@cache
def compiled(device: str, mode: str) -> Callable[..., Tensor]:
    """For all samples, so that one compilation serves them. On a CPU the graph is made and run, but no code of it."""
    import torch

    import fused_rlhf as fr

    def logprobs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return fr.linear_logprobs(hidden, weight, labels).logprobs

    options: dict[str, Any] = {"mode": mode} if device == "cuda" else {"backend": "aot_eager"}
    return torch.compile(logprobs, fullgraph=True, **options)


def inside_torch_compile(inputs: Inputs, *, mode: str) -> Step:
    import torch

    function, labels = compiled(inputs.hidden.device.type, mode), inputs.labels

    def run() -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return function(inputs.hidden, inputs.weight, labels)

    return run


for _name, _mode in (("ours-compiled", "default"), ("ours-graphs", "reduce-overhead")):
    provider(_name, packages=PACKAGES, ops=LOGPROB_OPS)(partial(inside_torch_compile, mode=_mode))

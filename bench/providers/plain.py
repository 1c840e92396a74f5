"""Plain torch: dense logits, torch's own chunked cross entropy, and the bare products."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fused_rlhf.bench.cases import Case
from fused_rlhf.bench.ops import OPS, TOP_P, Values
from fused_rlhf.bench.provider import FP32_LOGITS, ROUNDED, Output, Step, provider

if TYPE_CHECKING:
    from torch import Tensor

    from fused_rlhf.bench.inputs import Inputs


def dense_memory(case: Case, device: str) -> float:
    """Counted in fp32 buffers of N V: how many are alive at once."""
    logits = 4.0 * case.N * case.V
    if not OPS[case.op].backward:
        return 2 * logits  # logits, log-softmax
    # Log-softmax, the gradient by it, the gradient by the logits; kept: logits and their gradient; top_p: logits, the same in
    # order, their indices as two, softmax, its sums, two masks of bytes, what is kept.
    alive = {"ppo": 5.0, "kl": 6.0, "top_p": 7.5, "kept": 2.0}.get(case.op, 3.0)
    narrow = logits * case.itemsize / 4 if case.itemsize < 4 else 0.0  # which the products take rounded again
    return max(alive * logits, logits + narrow + case.gradient_bytes)


def log_softmax_values(logits: Tensor, ref_logits: Tensor | None, inputs: Inputs) -> Tensor | Values:
    """What the op wants of (N, V) fp32 logits."""
    from torch.nn.functional import cross_entropy

    op = OPS[inputs.case.op]
    if op.values == "kl":
        assert ref_logits is not None
        log_p = logits.log_softmax(1)
        return (log_p.exp() * (log_p - ref_logits.log_softmax(1))).sum(1)
    if op.entropy:
        log_p = logits.log_softmax(1)
        return Values(log_p.gather(1, inputs.targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(1))
    if op.values == "sampled":
        return sampled_values(logits, inputs)
    return -cross_entropy(logits, inputs.labels, reduction="none")


def sampled_values(logits: Tensor, inputs: Inputs) -> Tensor:
    """Of (N, V) fp32 logits."""
    import torch

    targets = inputs.targets[:, None]
    if inputs.ids is None:
        return within_nucleus(logits, targets)
    whole = OPS[inputs.case.op].whole
    # Gathered at once: the gradient of each gather is a buffer of N V.
    found = (logits.log_softmax(1) if whole else logits).gather(1, torch.cat([targets, inputs.ids], 1))
    return found[:, 0] + found[:, 1:].mean(1) if whole else found[:, 0] - found[:, 1:].logsumexp(1)


def within_nucleus(logits: Tensor, targets: Tensor) -> Tensor:
    """By transformers' own rule. A target outside, where the log-prob would be -inf, is put back."""
    from transformers import TopPLogitsWarper

    kept = TopPLogitsWarper(TOP_P)(None, logits)
    kept.scatter_(1, targets, logits.gather(1, targets))
    return kept.log_softmax(1).gather(1, targets).squeeze(1)


@provider("dense", tolerance=ROUNDED, memory=dense_memory)
def dense(inputs: Inputs) -> Step:
    """The best plain torch has in the operands' dtype."""

    def run() -> Tensor | Values:
        ref = None
        if inputs.case.op == "kl":
            assert inputs.ref_hidden is not None
            ref = (inputs.ref_hidden @ inputs.weight.detach().T).float()
        return log_softmax_values((inputs.hidden @ inputs.weight.T).float(), ref, inputs)

    return run


RANK, SCALE = 16, 2.0


def adapter(inputs: Inputs) -> tuple[Tensor, Tensor, float]:
    """A (RANK, H), B (V, RANK) and their scale, as an adapter begins: B is 0, and the log-probs are those without it."""
    import torch

    weight = inputs.weight.detach()
    rng = torch.Generator(weight.device).manual_seed(inputs.case.seed)
    a = torch.randn(RANK, inputs.case.H, generator=rng, device=weight.device) / inputs.case.H**0.5
    b = torch.zeros(inputs.case.V, RANK, dtype=weight.dtype, device=weight.device)
    return a.to(weight.dtype).requires_grad_(), b.requires_grad_(), SCALE


@provider("dense-lora", tolerance=ROUNDED, ops=("logprobs_fwd_bwd", "grpo"), where=lambda case: case.frozen_head)
def dense_lora(inputs: Inputs) -> Step:
    """Dense torch under an adapter of the head."""
    a, b, scale = adapter(inputs)

    def run() -> Tensor | Values:
        logits = inputs.hidden @ inputs.weight.T + scale * (inputs.hidden @ a.T) @ b.T
        return log_softmax_values(logits.float(), None, inputs)

    return run


def converted_memory(case: Case, device: str) -> float:
    copies = 4.0 * (case.N + case.V) * case.H if case.itemsize < 4 else 0.0
    return dense_memory(case, device) + OPS[case.op].heads * copies


@provider("dense-fp32", tolerance=FP32_LOGITS, memory=converted_memory)
def dense_fp32(inputs: Inputs) -> Step:
    """Dense torch with fp32 logits: the operands are converted first."""

    def run() -> Tensor | Values:
        ref = None
        if inputs.case.op == "kl":
            assert inputs.ref_hidden is not None
            ref = inputs.ref_hidden.float() @ inputs.weight.detach().float().T
        return log_softmax_values(inputs.hidden.float() @ inputs.weight.float().T, ref, inputs)

    return run


LOGPROB_OPS = tuple(op.name for op in OPS.values() if op.values == "logprobs" and not op.entropy)


@provider("torch-lce", tolerance=ROUNDED, ops=LOGPROB_OPS)
def torch_lce(inputs: Inputs) -> Step:
    """`F.linear_cross_entropy` (torch 2.13), chunked as it chooses, per-token results; it recomputes in the backward."""
    from torch.nn import LinearCrossEntropyOptions
    from torch.nn.functional import linear_cross_entropy

    options, labels = LinearCrossEntropyOptions(), inputs.labels
    return lambda: (
        -linear_cross_entropy(
            inputs.hidden, inputs.weight, labels, reduction="none", ignore_index=-100, options=options
        )
    )


def whole_products_memory(case: Case, device: str) -> float:
    return case.N * case.V * case.itemsize + case.gradient_bytes


def multiplies(case: Case) -> bool:
    return OPS[case.op].whole


@provider("gemm", roof=True, where=multiplies, memory=whole_products_memory)
def gemm(inputs: Inputs) -> Step:
    """The bare products, whole, into buffers made beforehand: X W^T, then dZ W and dZ^T X. No softmax, nothing else."""
    return bare_products(inputs, len(inputs.hidden))


ROWS = {"cpu": 512, "cuda": 8192}


def blocked_products_memory(case: Case, device: str) -> float:
    d_weight = case.V * case.H if OPS[case.op].backward and not case.frozen_head else 0
    return (min(ROWS[device], case.N) * (case.V + case.H) + d_weight) * case.itemsize


@provider("gemm-blocked", roof=True, where=multiplies, memory=blocked_products_memory)
def gemm_blocked(inputs: Inputs) -> Step:
    """The same products, 512 rows at a time (8192 on a GPU): on a CPU faster than whole ones, and possible at any N."""
    return bare_products(inputs, ROWS[inputs.hidden.device.type])


def bare_products(inputs: Inputs, rows: int) -> Step:
    """One product per head forward, and those of the backward, in blocks of rows."""
    import torch

    blocks, w = inputs.hidden.detach().split(rows), inputs.weight.detach()
    z, dx = blocks[0].new_empty(len(blocks[0]), len(w)), torch.empty_like(blocks[0])
    trainable = OPS[inputs.case.op].backward and not inputs.case.frozen_head
    dw = torch.empty_like(w) if trainable else None

    def backward() -> None:
        for number, block in enumerate(blocks):
            torch.mm(z[: len(block)], w, out=dx[: len(block)])
            if dw is not None and number == 0:
                torch.mm(z[: len(block)].T, block, out=dw)
            elif dw is not None:
                dw.addmm_(z[: len(block)].T, block)

    def run() -> Output:
        for block in blocks:
            for _ in range(OPS[inputs.case.op].heads):
                torch.mm(block, w.T, out=z[: len(block)])
        return Output(backward=backward)

    return run

"""Named runs: which rows are measured, and what is claimed of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from fused_rlhf.bench.document import bf16_products
from fused_rlhf.bench.plan import Row
from fused_rlhf.bench.registry import MODELS, OPS, PROVIDERS, Case
from fused_rlhf.bench.targets import Figure, Target


@dataclass(frozen=True)
class Suite:
    about: str
    cases: dict[str, Case]
    rows: list[Row]
    targets: list[Target] = field(default_factory=list)
    together: bool = False  # one process per case rather than per row and round
    groups: tuple[tuple[str, ...], ...] = ()  # with `together`: cases that share a process, their rows all taking turns
    threads: int = 2
    in_turn: bool = False  # with `together`: all rounds of a row, then the next row's, rather than round by round
    repeats: int = 1  # samples of a row in each of its processes
    memory: float | None = None  # bytes a process on a CPU may take
    predict: bool = True  # leave out what would not fit by its formula, rather than let it try
    limit_s: float = math.inf


def rows(case: str, providers: str, rounds: int) -> list[Row]:
    return [Row(case, provider, rounds) for provider in providers.split()]


def able(cases: dict[str, Case], providers: str, rounds: int) -> list[Row]:
    """Every provider on each of the cases that it has."""
    return [
        Row(name, provider, rounds)
        for name, case in cases.items()
        for provider in providers.split()
        if PROVIDERS[provider].takes(case)
    ]


# -------------------------------------------------------------------------------------------------------------- quick


def quick() -> Suite:
    small = Case(N=256, H=128, V=8000, T=64)
    cases = {op: replace(small, op=op) for op in OPS}
    cases |= {
        "bf16": replace(small, N=128, dtype="bf16"),
        "padded": replace(small, density=0.5),
        "frozen": replace(small, op="dpo", frozen_head=True),
    }
    return Suite(
        "every op and provider at a small shape, to see that all is well: the times say little",
        cases,
        able(cases, "gemm-blocked dense trl liger ours ours-two_phase", 2) + rows("logprobs_fwd_bwd", "torch-lce", 2),
        together=True,
        in_turn=True,
        threads=1,  # two that wait for each other on a busy machine take ten times as long
        limit_s=110,
    )


# --------------------------------------------------------------------------------------------------------- foundation


def foundation() -> Suite:
    """One update of a 0.5B model's head (Qwen2.5-0.5B: H=896, V=151936) on 2 cores. Dense bf16 is left out where it
    would take minutes; its target is "not measured" there."""
    main = Case(N=2048, H=896, V=151936, T=256)
    cases = {
        "main": main,
        "forward": replace(main, op="logprobs_fwd"),
        "zero rows": replace(main, beta=0.0, zero_rows=0.8),
        "frozen": replace(main, frozen_head=True),
        "bf16": replace(main, dtype="bf16"),
        "long": replace(main, N=16384),
    }
    one, two = "ours-one_pass", "ours-two_phase"
    targets = [
        Target("fp32 one-pass time / dense", 0.68, Figure("main", one), Figure("main", "dense")),
        Target("fp32 one-pass time / TRL", 0.50, Figure("main", one), Figure("main", "trl")),
        Target("fp32 one-pass time / Liger", 0.75, Figure("main", one), Figure("main", "liger")),
        Target(
            "fp32 one-pass extra memory / dense",
            0.30,
            Figure("main", one, "peak_extra_bytes"),
            Figure("main", "dense", "peak_extra_bytes"),
        ),
        Target(
            "bf16, rounded logits allowed: one-pass time / dense",
            0.62,
            Figure("bf16", f"{one}-rounded"),
            Figure("bf16", "dense"),
        ),
        Target("N=16384 one-pass extra memory, bytes", 1.3e9, Figure("long", one, "peak_extra_bytes")),
        Target(
            "N=16384 one-pass time per token / N=2048",
            1.1,
            Figure("long", one, "us_per_token"),
            Figure("main", one, "us_per_token"),
        ),
        Target(
            "80 % zero-advantage rows: two-phase backward / none",
            1 / 3,
            Figure("zero rows", two, "backward_s"),
            Figure("main", two, "backward_s"),
        ),
        Target("frozen head: one-pass time / trainable", 0.75, Figure("frozen", one), Figure("main", one)),
    ]
    return Suite(
        "the CPU figures of the foundation",
        cases,
        rows("main", f"gemm-blocked dense {one} {two} trl liger", 3)
        + rows("main", "gemm", 1)
        + rows("zero rows", f"{one} {two}", 2)
        + rows("frozen", f"{one} {two}", 2)
        + rows("forward", "dense ours trl", 2)
        + rows("bf16", f"{'dense ' if bf16_products() else ''}dense-fp32 {one} {one}-rounded", 1)
        + rows("long", one, 1),
        targets,
    )


# --------------------------------------------------------------------------------------------------------- objectives


def objectives() -> Suite:
    """Two sequences of 8192 tokens at the head of a 0.5B model: an objective needs memory for its gradients and little
    else, whatever it compares. `dpo short` is where the others fit, too."""
    long = Case(op="dpo", N=16384, T=8192)
    cases = {
        "dpo": long,
        "dpo frozen": replace(long, frozen_head=True),
        "grpo": replace(long, op="grpo"),
        "grpo frozen": replace(long, op="grpo", frozen_head=True),
        "dpo short": replace(long, N=2048, T=512),
    }
    ours = {"dpo": "ours-two_phase", "dpo frozen": "ours", "grpo": "ours-one_pass", "grpo frozen": "ours"}
    return Suite(
        "DPO and GRPO over two sequences of 8192 tokens, and DPO where the others fit",
        cases,
        [row for case, provider in ours.items() for row in rows(case, provider, 1)]
        + rows("grpo", "gemm-blocked liger dense trl", 1)
        + rows("dpo", "liger dense torch-lce trl", 1)
        + rows("dpo short", "ours-two_phase gemm-blocked liger dense torch-lce trl", 2),
        [
            Target(f"{case}: extra memory of {provider}, bytes", 1.3e9, Figure(case, provider, "peak_extra_bytes"))
            for case, provider in ours.items()
        ],
    )


# ------------------------------------------------------------------------------------------------------------- matrix

PEERS = "gemm-blocked dense torch-lce trl liger"
OURS = "ours ours-one_pass ours-two_phase"


def matrix() -> Suite:
    """Every op, then sweeps around one GRPO case and one DPO case, at sizes that two cores do in 35 minutes."""
    base = Case(N=1024, H=512, V=32768, T=128)
    dpo = replace(base, op="dpo")
    ops = {op: replace(base, op=op) for op in OPS}
    sweeps = {
        **{f"N={n}": replace(base, N=n) for n in (256, 4096, 8192)},
        **{f"V={v}": replace(base, V=v) for v in (8192, 131072)},
        **{f"H={h}": replace(base, H=h) for h in (128, 2048)},
        **{f"T={t}": replace(base, T=t) for t in (32, 512)},
        **{f"T={t // 1024}k": replace(base, N=t, T=t, H=64) for t in (8192, 32768, 131072)},
        **{f"density={d}": replace(base, density=d) for d in (0.5, 0.25)},
        "frozen": replace(base, frozen_head=True),
        **{f"dpo T={t}": replace(dpo, T=t) for t in (32, 512)},
        "dpo density=0.25": replace(dpo, density=0.25),
        "dpo frozen": replace(dpo, frozen_head=True),
    }
    silent = {f"zero={z}": replace(base, beta=0.0, zero_rows=z) for z in (0.0, 0.5, 0.9)}
    narrow = {f"{op} bf16": replace(base, op=op, dtype="bf16") for op in ("grpo", "kl")}
    models = {name: _model(name, 256) for name in ("qwen3-0.6b", "gemma3-1b")}
    return Suite(
        "every op and provider, and sweeps over N, V, H, T, padding, zero gradients, a frozen head and bf16",
        {**ops, **sweeps, **silent, **narrow, **models},
        able(ops, f"{PEERS} {OURS}", 2)
        + able({n: c for n, c in sweeps.items() if n[0] in "VH"}, "gemm-blocked", 1)
        + able(sweeps, "dense trl liger ours-one_pass ours-two_phase", 1)
        + able(silent, "dense trl ours-one_pass ours-two_phase", 1)
        + able(narrow, "gemm-blocked dense dense-fp32 trl ours-one_pass ours-one_pass-rounded", 1)
        + able({"kl bf16": narrow["kl bf16"]}, "ours", 1)
        + able(models, "gemm-blocked dense trl ours-one_pass", 1),
        repeats=3,
    )


def _model(name: str, N: int, **changes: object) -> Case:
    return replace(Case(N=N, T=128, H=MODELS[name].H, V=MODELS[name].V), **changes)  # type: ignore[arg-type]


def models() -> Suite:
    """The heads of published models, few tokens each."""
    cases = {name: _model(name, 256) for name in MODELS}
    return Suite("heads of published models", cases, able(cases, "gemm-blocked dense ours-one_pass ours-two_phase", 1))


# --------------------------------------------------------------------------------------------------------------- real


def real() -> Suite:
    """Operands in bf16, as a model is trained in; H and V are those of whichever model the command line names."""
    update = Case(N=2048, H=576, V=49152, dtype="bf16", inputs="smollm2")
    cases = {"log-probs": replace(update, op="logprobs_fwd"), "update": update}
    return Suite(
        "errors on the hidden states and the head of SmolLM2-135M-Instruct, reading GSM8K: needs --data DIR",
        cases,
        rows("log-probs", "dense trl trl-selective dense-fp32 ours", 1)
        + rows("update", "dense trl liger dense-fp32 ours", 1),
        together=True,
    )


# ----------------------------------------------------------------------------------------------------------- sampling


def sampling() -> Suite:
    """What a truncated sampler's log-probs cost beside those of the whole vocabulary, which `full` has: in one process, so
    that the times compare. Dense torch, which sorts all logits for a nucleus, once."""
    full = Case(op="logprobs_fwd_bwd")
    cases = {"full": full, **{op: replace(full, op=op) for op in ("kept", "top_p", "ids")}}

    return Suite(
        "log-probs of kept sets, of a nucleus and of further tokens of each row, N=2048, beside those of the whole vocabulary",
        cases,
        rows("full", "gemm-blocked", 3)
        + [row for name in cases for row in rows(name, "ours", 3) + rows(name, "dense", 1)],
        [
            *times_of_sampled("full"),
            Target(
                "sets of 20 tokens: memory beside the gradients, bytes", 64e6, Figure("kept", "ours", "scratch_bytes")
            ),
        ],
        together=True,
        groups=(tuple(cases),),
    )


def times_of_sampled(full: str) -> list[Target]:
    """Beside the case `full`, the same of the whole vocabulary."""
    return [
        Target(f"{what}: time / log-probs of the whole vocabulary", limit, Figure(op, "ours"), Figure(full, "ours"))
        for what, limit, op in (
            ("sets of 20 tokens", 0.05, "kept"),
            ("nucleus 0.9", 1.35, "top_p"),
            ("64 further tokens", 1.10, "ids"),
        )
    ]


# --------------------------------------------------------------------------------------------------------------- long


def long(device: str = "cpu") -> Suite:
    """One update at growing length, dense against ours: dense is let run until its memory is refused."""
    base = Case(H=64) if device == "cpu" else Case(H=4096, dtype="bf16")
    cases = {f"T={t}k": replace(base, N=1024 * t, T=1024 * t) for t in (1, 4, 16, 64)}
    return Suite(
        "one sequence of 1k to 64k tokens, V=151936: dense until it dies, and ours",
        cases,
        rows("T=1k", "gemm-blocked", 1) + [row for name in cases for row in rows(name, "dense ours-one_pass", 1)],
        together=device == "cuda",
        memory=12e9,
        predict=False,
    )


# ---------------------------------------------------------------------------------------------------------------- GPU


def gpu(scale: int = 1) -> Suite:
    """One update of an 8B model's head (Qwen3-8B: H=4096, V=151936), and what differs from it. `scale` divides every size, for
    a trial run. The cases of a group take turns in one process: what is compared below is of one."""

    def case(N: int = 8192, H: int = 4096, T: int = 1024, **changes: Any) -> Case:
        length = max(T // scale, 8)
        rows = max(N // scale // length, 1) * length
        given = {"dtype": "bf16", **changes}
        return Case(N=rows, H=max(H // scale, 32), V=max(151936 // scale, 1000), T=length, **given)

    logprobs: dict[str, Any] = {"op": "logprobs_fwd_bwd"}
    groups: dict[str, dict[str, Case]] = {
        "main": {
            "main": case(),
            "forward": case(op="logprobs_fwd"),
            "zero": case(beta=0.0, zero_rows=0.8),
            "frozen": case(frozen_head=True),
            "kl": case(op="kl"),
        },
        "accuracy": {
            "accuracy": case(2048, **logprobs),
            "outliers-4k": case(2048, outliers=4, **logprobs),
            "outliers-8k": case(2048, 8192, outliers=4, **logprobs),
        },
        "long": {"n128k": case(131072, T=131072)},
        "small": {f"n{n}": case(n, T=n // 2, wall=True) for n in (64, 256, 1024)},
        "narrow": {f"h{h}-{k}k": case(1024 * k, h, T=4096) for h in (896, 1536, 2048) for k in (16, 64)},
        "objectives": {
            "logprobs": case(**logprobs),
            "sft": case(op="sft"),
            "dpo": case(op="dpo"),
            "gspo": case(objective="gspo"),
            "entropy": case(op="ppo"),
            "lora": case(frozen_head=True),
            "masters": case(masters=True),
            "padded": case(density=0.5),
            "lengths": case(4096, lengths=8),
        },
        "sampled": {"whole": case(2048, **logprobs), **{op: case(2048, op=op) for op in ("kept", "top_p", "ids")}},
        "graphs": {"graphs": case(256, T=128, wall=True, **logprobs)},
        "precision": {how: case(2048, dtype=dtype) for how, dtype in (("ieee", "fp32"), ("tf32", "tf32"))},
    }
    one, two = "ours-one_pass", "ours-two_phase"
    return Suite(
        "the GPU figures: time against bare products and peers, errors, memory, small and long batches, every objective",
        {name: found for group in groups.values() for name, found in group.items()},
        rows("main", f"gemm trl {one} {two} dense", 10)
        + rows("main", "liger", 3)
        + rows("forward", "gemm trl ours dense liger-scaled cce verl", 10)
        + rows("zero", f"gemm trl {one} {two}", 10)
        + rows("frozen", f"gemm trl {one} {two}", 10)
        + rows("kl", "gemm ours trl", 5)
        + [row for name in groups["accuracy"] for row in rows(name, "ours dense-fp32 dense trl", 2)]
        + rows("n128k", f"gemm-blocked {one} {two} trl", 3)
        + [row for name in groups["small"] for row in rows(name, "dense ours trl", 15)]
        + [row for name in groups["narrow"] for row in rows(name, f"gemm-blocked {one} trl", 4)]
        + rows("logprobs", "gemm ours trl dense torch-lce liger-scaled liger-flce quack cce cce-exact verl", 5)
        + rows("sft", f"gemm {one} trl dense liger-flce quack-chunked cce", 5)
        + rows("dpo", "dense ours trl liger", 5)
        + rows("gspo", "dense ours trl", 5)
        + rows("entropy", "dense ours trl verl", 5)
        + rows("lora", "dense-lora ours-lora", 5)
        + rows("masters", "dense ours", 5)
        + rows("padded", "dense ours trl liger", 5)
        + rows("lengths", "ours trl", 5)
        + [row for name in groups["sampled"] for row in rows(name, "ours", 5)]
        + rows("graphs", "dense ours ours-compiled ours-graphs", 15)
        + [row for name in groups["precision"] for row in rows(name, f"gemm {one} dense trl", 5)],
        [*times_of_gpu(one, two), *times_of_sampled("whole"), *memory_of_gpu(one, two, case()), *errors_of_gpu()],
        together=True,
        groups=tuple(map(tuple, groups.values())),
    )


def times_of_gpu(one: str, two: str) -> list[Target]:
    def over(what: str, limit: float, name: str, ours: str, base: str, field: str = "both_s") -> Target:
        return Target(what, limit, Figure(name, ours), Figure(name, base, field))

    return [
        over("forward only / one bare product", 1.06, "forward", "ours", "gemm"),
        over("forward only / TRL", 1.0, "forward", "ours", "trl"),
        over("one-pass / three bare products", 1.05, "main", one, "gemm"),
        over("one-pass / TRL", 0.75, "main", one, "trl"),
        over("two-phase / four bare products", 1.08, "main", two, "gemm", "recompute_s"),
        over("80 % zero-gradient rows: one-pass / TRL", 0.40, "zero", one, "trl"),
        over("exact KL / its four bare products", 1.35, "kl", "ours", "gemm"),
        over("N=131072: one-pass / three bare products", 1.10, "n128k", one, "gemm-blocked"),
        over("N=131072: two-phase / four bare products", 1.10, "n128k", two, "gemm-blocked", "recompute_s"),
        over("N=256 by the clock: ours / dense", 1.5, "n256", "ours", "dense"),
        over("H=896, N=16384: one-pass / three bare products", 1.25, "h896-16k", one, "gemm-blocked"),
        over("H=896, N=65536: one-pass / three bare products", 1.25, "h896-64k", one, "gemm-blocked"),
    ]


def memory_of_gpu(one: str, two: str, main: Case) -> list[Target]:
    """Bytes, which other than times compare across runs."""
    scratch = "scratch_bytes"
    targets = [
        Target("scratch memory: two-phase / TRL", 0.20, Figure("main", two, scratch), Figure("main", "trl", scratch)),
        Target("scratch memory: one-pass / TRL", 1.0, Figure("main", one, scratch), Figure("main", "trl", scratch)),
    ]
    # What may grow with N: dX in fp32 and 64 bytes per row of vectors.
    growth = 15 * main.N * (4 * main.H + 64)
    for name, provider in (("one-pass", one), ("two-phase", two)):
        what = f"scratch growth to N=128k over fp32 dX and 64 B a row: {name}"
        ends = Figure("n128k", provider, scratch), Figure("main", provider, scratch)
        targets.append(Target(what, 1.0, *ends, unit=growth))
    return targets


def errors_of_gpu() -> list[Target]:
    found = [
        Target(f"max log-prob error{where}, nats", 5e-5, Figure(name, "ours", "logprob_max_abs"))
        for name, where in (
            ("accuracy", " at logits of +-25"),
            ("outliers-4k", " with outlier channels, H=4096"),
            ("outliers-8k", " with outlier channels, H=8192"),
        )
    ]
    for grad in ("dhidden", "dweight"):
        pair = Figure("accuracy", "ours", f"{grad}_rel"), Figure("accuracy", "dense-fp32", f"{grad}_rel")
        found.append(Target(f"{grad} error / dense torch with fp32 logits", 2.0, *pair))
    return found


def gpu_objectives(scale: int = 1) -> Suite:
    """What suite `gpu` has no time for: the other objectives, padding, new lengths, the heads of published models."""
    main = Case(
        N=8192 // scale, H=max(4096 // scale, 32), V=max(151936 // scale, 1000), T=max(1024 // scale, 8), dtype="bf16"
    )
    ops = {op: replace(main, op=op) for op in ("logprobs_fwd", "logprobs_fwd_bwd", "dpo", "ppo", "kl")}
    more = {
        "padded": replace(main, density=0.5),
        "lengths": replace(main, N=4 * main.T, lengths=8),
        "dpo frozen": replace(main, op="dpo", frozen_head=True),
    }
    heads = {name: _model(name, 8192 // scale, dtype="bf16") for name in (MODELS if scale == 1 else ())}
    providers = "gemm dense torch-lce trl liger liger-flce cce cce-exact verl"
    return Suite(
        "the GPU figures of the other objectives and heads",
        {**ops, **more, **heads},
        able(ops, f"{providers} {OURS}", 10)
        + able(more, f"dense trl liger {OURS}", 5)
        + able(heads, "gemm trl ours-one_pass ours-two_phase", 5),
        together=True,
    )


SUITES: dict[str, Callable[[], Suite]] = {
    "quick": quick,
    "foundation": foundation,
    "objectives": objectives,
    "matrix": matrix,
    "models": models,
    "real": real,
    "sampling": sampling,
    "long": long,
    "gpu": gpu,
    "gpu-tiny": partial(gpu, 128),
    "gpu-objectives": gpu_objectives,
    "gpu-objectives-tiny": partial(gpu_objectives, 128),
    "gpu-long": partial(long, "cuda"),
}

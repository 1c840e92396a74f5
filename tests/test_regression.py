"""The hot paths, against dense torch in the same run and against counts that no noise moves.

Times are CPU seconds of this process on one thread, the least of several rounds in which dense and ours alternate. What
`bench/baseline.json` holds is their ratio; a machine has other ratios than the next, and a busy one others than an idle
one, so the limit is `margin` times that, a ratio above it is measured again, and where the machine is seen to be busy it
is no failure. It catches a path that fell off a cliff. What it cannot see, a product or a pass too many, the counts do
exactly, on any machine; the times are among the slow tests, run alone.

    pytest tests/test_regression.py --benchmark-only --benchmark-json=OUT    # extra_info.ratio is what the file holds
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fused_rlhf.bench.cases import Case
from fused_rlhf.bench.inputs import Inputs, build, fp64_reference
from fused_rlhf.bench.ops import OPS, Values
from fused_rlhf.bench.registry import PROVIDERS

BASELINE = json.loads((Path(__file__).resolve().parent.parent / "bench/baseline.json").read_text())
SMALL = Case(N=256, H=128, V=8192, T=64)
ROUNDS = 7
TRIES = 3  # once more each, before a ratio counts as too high
QUIET = 0.97  # of the time with a CPU of its own: below, others are at work

TIMED = {
    "logprobs forward": (replace(SMALL, op="logprobs_fwd"), "ours-chunked"),
    "logprobs": (replace(SMALL, op="logprobs_fwd_bwd"), "ours-chunked"),
    "grpo one pass": (SMALL, "ours-chunked-one_pass"),
    "grpo two-phase": (SMALL, "ours-chunked-two_phase"),
    "grpo zero advantages": (replace(SMALL, beta=0.0, zero_rows=0.75), "ours-chunked-two_phase"),
    "ppo": (replace(SMALL, op="ppo"), "ours-chunked"),
    "dpo": (replace(SMALL, op="dpo"), "ours-chunked"),
    "dpo frozen head": (replace(SMALL, op="dpo", frozen_head=True), "ours-chunked"),
    "kl": (replace(SMALL, op="kl"), "ours-chunked"),
}


def update_of(case: Case, provider: str, inputs: Inputs) -> Callable[[], object]:
    """One forward and, where the op has one, backward."""
    step = PROVIDERS[provider].step(inputs)

    def run() -> None:
        inputs.hidden.grad = inputs.weight.grad = None
        with torch.set_grad_enabled(OPS[case.op].backward):
            output = step()
        if OPS[case.op].backward:
            output.loss.backward()

    return run


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def measured_again(ours: Callable[[], object], dense: Callable[[], object]) -> tuple[float, float]:
    """The ratio of the least CPU seconds, and the share of the time in which this process had a CPU."""
    began, used = time.perf_counter(), time.process_time()
    least = [math.inf, math.inf]
    for _ in range(ROUNDS):
        for i, work in enumerate((dense, ours)):
            start = time.process_time()
            work()
            least[i] = min(least[i], time.process_time() - start)
    return least[1] / least[0], (time.process_time() - used) / (time.perf_counter() - began)


@pytest.mark.slow
@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("name", TIMED)
def test_time_over_dense(benchmark, one_thread, name):
    case, provider = TIMED[name]
    inputs = build(case, "cpu", fp64_reference(case, "cpu"))
    ours, dense = update_of(case, provider, inputs), update_of(case, "dense", inputs)
    seconds: list[float] = []

    def dense_round() -> None:
        start = time.process_time()
        dense()
        seconds.append(time.process_time() - start)

    benchmark.pedantic(ours, setup=dense_round, rounds=ROUNDS, warmup_rounds=1)
    if benchmark.disabled:
        return
    ratio = benchmark.stats.stats.min / min(seconds)
    benchmark.extra_info["ratio"] = ratio
    limit = BASELINE["margin"] * BASELINE["ratios"][name]
    shares: list[float] = []
    while ratio > limit and len(shares) < TRIES:
        ratio, share = measured_again(ours, dense)
        shares.append(share)
    if ratio > limit and min(shares) < QUIET:
        pytest.skip(
            f"{ratio:.2f} times dense, limit {limit:.2f}, on a busy machine: a CPU for {min(shares):.0%} of the time"
        )
    assert ratio <= limit, (
        f"{name}: {ratio:.2f} times dense; it was {BASELINE['ratios'][name]}, the limit is {limit:.2f}"
    )


@pytest.fixture
def products(monkeypatch):
    """A list of the operations of every product that is asked for by name, inside custom operators, too."""
    found: list[int] = []

    def count(owner: object, name: str) -> None:
        function = getattr(owner, name)

        def counted(*args, **kwargs):
            a, b = args[-2:]
            found.append(2 * a.shape[0] * a.shape[1] * b.shape[1])
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    count(torch, "mm")
    count(torch.Tensor, "addmm_")
    count(torch.Tensor, "__matmul__")
    return found


COUNTED = {
    "logprobs forward": 1,
    "logprobs": 4,
    "grpo one pass": 3,
    "grpo two-phase": 4,
    "grpo zero advantages": 1 + 3 * 0.25,  # about; see below
    "ppo": 3,
    "dpo": 4,
    "dpo frozen head": 2,
    "kl": 6,  # two heads, both again in the backward, and the two gradients
}


@pytest.mark.parametrize("density", [1.0, 0.5])
@pytest.mark.parametrize("name", COUNTED)
def test_matrix_products(products, name, density):
    """In units of 2 N V H, over the tokens that count."""
    case, provider = TIMED[name]
    case = replace(case, density=density)
    reference = fp64_reference(case, "cpu")
    inputs = build(case, "cpu", reference)
    expected = COUNTED[name]
    if case.zero_rows:  # without a KL term, clipped tokens have no gradient either
        logprobs = reference.logprobs.clone().requires_grad_()
        OPS[case.op].loss(Values(logprobs), inputs).backward()
        expected = 1 + 3 * (logprobs.grad != 0).sum().item() / inputs.mask.sum().item()
    products.clear()
    update_of(case, provider, inputs)()
    assert sum(products) / (2 * inputs.mask.sum().item() * case.V * case.H) == pytest.approx(expected, rel=1e-3)


def test_the_baseline_is_of_these_cases():
    assert set(BASELINE["ratios"]) == set(TIMED) == set(COUNTED)
    assert BASELINE["margin"] >= 1.6
    assert all(0 < ratio < math.inf for ratio in BASELINE["ratios"].values())

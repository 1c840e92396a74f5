"""Every kernel the Triton backend launches, compiled ahead of time for several architectures; no GPU is needed.

The launches are recorded from the backend itself on small CPU tensors, once per set of options, with the tile records
of the architecture in question; each distinct one is compiled and its code inspected.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from fused_rlhf.kernels import (  # noqa: E402
    exact,
    gathered,
    linear_kl,
    linear_logprobs,
    objectives,
    ops,
    primitives,
    scaling,
    tiles,
    truncation,
)
from fused_rlhf.kernels.interface import (  # noqa: E402
    KINDS,
    Border,
    Comparison,
    Cut,
    Entries,
    EntryGrads,
    Needs,
    RowPairs,
    Rows,
    Shard,
    Stats,
    TokenGrads,
)
from fused_rlhf.kernels.statistics import OUTPUTS  # noqa: E402
from fused_rlhf.objectives import BoundPolicyLoss, PolicyLoss  # noqa: E402
from fused_rlhf.preferences import BoundPreferenceLoss, PreferenceLoss  # noqa: E402
from fused_rlhf.segments import Sequences  # noqa: E402
from tests.helpers import projection  # noqa: E402

ROOT = Path(__file__).parents[1]
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TENSOR_CORES = {
    "sm_80": "mma.sync",
    "sm_89": "mma.sync",
    "sm_90": "wgmma.mma_async",
    "sm_100": "tcgen05.mma",
    "sm_120": "mma.sync",
    "gfx942": "v_mfma",
}
KERNEL_FILES = (linear_logprobs, linear_kl, objectives, gathered, scaling, truncation)
TWINS = ("SURROGATE", "KL", "LEVEL", "PREFERENCE", "TERMS", "PUSH")  # what picks a device function or a branch
OPTIONAL = (
    *("bias_ptr", "exps", "h_ptr", "square_ptr", "flat_ptr", "raw_ptr", "floor_ptr", "lora_ptr", "table_ptr"),
    *("top_k_ptr", "top_p_ptr"),
)
GEMM_KERNELS = ("stats_kernel", "dlogits_kernel")
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class Launch:
    """One compilation, in picklable form."""

    kernel: str
    arch: str
    how: str  # "half", "tf32" or "ieee"
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]  # arguments divisible by 16
    options: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        twins = [str(v) for k, v in self.constants if k in TWINS and v]
        asked = [k for k in ("ENTROPY", "MARGIN") if dict(self.constants).get(k)]
        constants, types = dict(self.constants), dict(self.signature)
        present = [k for k in OPTIONAL if types.get(k, "constexpr") != "constexpr"]
        present += [str(constants["SLOPE"])] if constants.get("SLOPE") else []
        return "-".join([self.kernel, self.arch, self.how, *twins, *asked, *present])


class Recorder:
    """Stands in for a jitted kernel and notes how it was launched."""

    def __init__(self, kernel: Any, arch: str, how: str, launches: dict[Launch, None]) -> None:
        self.kernel, self.arch, self.how, self.launches = kernel, arch, how, launches

    def __getitem__(self, grid: tuple) -> Any:
        return self.launch

    def launch(self, *args: Any, **kwargs: Any) -> None:
        names = self.kernel.arg_names
        values = dict(zip(names, args)) | {k: v for k, v in kwargs.items() if k in names}
        options = {k: v for k, v in kwargs.items() if k not in names}
        free = {p.name for p in self.kernel.params if p.do_not_specialize}
        declared = {p.name for p in self.kernel.params if p.is_constexpr}
        signature, constants, aligned = {}, {}, []
        for i, name in enumerate(names):
            value = values[name]
            if name in declared or value is None or (isinstance(value, int) and value == 1 and name not in free):
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, TensorDescriptor):
                dtype = POINTERS[value.base.dtype][1:]
                signature[name] = f"tensordesc<{dtype}{list(value.block_shape)}>"
            elif isinstance(value, torch.Tensor):
                signature[name] = POINTERS[value.dtype]
                aligned.append(i)
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32"
                if isinstance(value, int) and value % 16 == 0 and name not in free:
                    aligned.append(i)
        launch = Launch(
            self.kernel.__name__, self.arch, self.how, tuple(signature.items()),
            tuple((k, getattr(v, "__name__", v) if callable(v) else v) for k, v in constants.items()),
            tuple(aligned), tuple(options.items()),
        )  # fmt: skip
        self.launches[launch] = None


def record(arch: str, how: str) -> list[Launch]:
    """Launches of forward, backward, one_pass and divergence on `arch`, over the options that change the code."""
    launches: dict[Launch, None] = {}
    dtype = torch.bfloat16 if how == "half" else torch.float32
    with pytest.MonkeyPatch.context() as patch:
        for module in KERNEL_FILES:
            for name in filter(lambda name: name.endswith("_kernel"), dir(module)):
                patch.setattr(module, name, Recorder(getattr(module, name), arch, how, launches))
        for module in (ops, tiles):
            patch.setattr(module, "arch", lambda device: arch)
            patch.setattr(module, "precision", lambda dtype: how)
        patch.setattr(linear_logprobs, "_multiply_as", lambda dtype: "tf32" if how == "tf32" else "ieee")
        N, H, V = 96, 128, 528
        hidden, weight, bias = torch.zeros(N, H, dtype=dtype), torch.zeros(V, H, dtype=dtype), torch.zeros(V)
        targets, ones = torch.zeros(N, dtype=torch.int64), torch.ones(N)
        rows, plain = Rows(hidden, targets, ones), projection(weight)
        full = projection(weight, bias, logit_scale=0.5, softcap=30.0)
        objective = policy_of("ppo_clip", N)
        for head, outputs in ((plain, ()), (plain, ("entropy",)), (full, OUTPUTS[:-1]), (full, OUTPUTS)):
            stats = ops.statistics(rows, head, outputs)
        for head, grads in (
            (plain, TokenGrads(ones)),
            (plain, TokenGrads(ones, ones)),
            (full, TokenGrads(ones, ones, ones)),
            (plain, TokenGrads(None, sum_sq=ones)),
            (plain, TokenGrads(None, mean_logit=ones)),
            (plain, TokenGrads(ones, ones, ones, ones, ones)),
            (full, TokenGrads(ones, ones, ones, ones, ones)),
        ):
            ops.gradients(rows, head, stats, grads, Needs(True, True, True))
        if how != "tf32":
            for head, outputs in ((plain, ()), (plain, ("entropy",)), (replace(full, bias=None), ("entropy",))):
                ops.one_pass(rows, head, outputs, objective, Needs(True, True, False))
            ops.scaled(weight, torch.ones(()))
        pairs = RowPairs(hidden, hidden, ones)
        for kind in KINDS if how == "half" else KINDS[-1:]:  # fp32 differs in the dtype of dz alone
            for head in (plain, full):
                of = Comparison(head, head, kind, 0.5)
                _, sums = ops.divergence(pairs, of)
                ops.divergence_gradients(pairs, of, sums, ones, Needs(True, True, head.bias is not None))
                shard = replace(head, shard=Shard("", 2, 0, 2 * V, True, N))
                ops.divergence(pairs, replace(of, policy=shard), lambda totals: totals)
        if how != "tf32":
            record_kept_sets(rows, how)
        if how == "half":
            # cuBLAS products with the kernels as their epilogue, and an fp32 dW over several blocks of rows.
            patch.setattr(ops, "tune", lambda *args: tiles.RAW)
            patch.setattr(ops, "one_pass_rows", lambda *args: 64)
            ops.one_pass(rows, plain, ("entropy",), objective, Needs(True, True, False))
            ops.gradients(rows, plain, stats, TokenGrads(ones), Needs(True, True, False))
            # Every twin, in one pass and on its own; all of them are fp32 whatever the operands are.
            for name in objectives.SURROGATES:
                for level in ("token", "sequence"):
                    ops.loss(policy_of(name, N, level=level), ones, None)
                some = replace(policy_of(name, N), kl="", old_logprobs=None)
                ops.one_pass(rows, plain, (), some, Needs(True, False, False))
            for level in ("sequence_sum", "sequence_token"):
                ops.loss(policy_of("ppo_clip", N, level=level), ones, None)
            for kl in objectives.KL_ESTIMATORS:
                ops.one_pass(rows, plain, (), policy_of("ppo_clip", N, kl=kl), Needs(True, True, False))
                ops.loss(policy_of("ppo_clip", N, level="sequence", kl=kl), ones, None)
            for name in objectives.PREFERENCES:
                for ld_alpha, ref in ((None, ones), (0.5, None)):
                    ops.loss(pairs_of(name, ld_alpha, ref, N), ones, None)
    return list(launches)


def record_kept_sets(rows: Rows, how: str) -> None:
    """Entries with and without an adapter, rows with a border, and all that can cut a row, which is fp32 whatever the
    operands are."""
    (N, H), V, ones, zeros = rows.hidden.shape, 528, rows.temperature, rows.targets
    weight, bias = rows.hidden.new_zeros(V, H), torch.zeros(V)
    adapted = projection(weight, bias, softcap=30.0, lora_b=torch.zeros(V, 8), lora_dtype=torch.float32)
    for head in (projection(weight), adapted):
        entries = Entries(rows.hidden.new_zeros(N, H + 8 * head.copies), ones, torch.arange(N), zeros)
        grads = EntryGrads(entries, ops.gathered(entries, head), ones)
        ops.gathered_hidden(grads, head)
        none = Rows(entries.hidden[:0], zeros[:0], ones[:0])
        nothing = Stats(none.temperature, none.temperature)
        ops.gradients(none, head, nothing, TokenGrads(None), Needs(True, True, True, True), entries=grads)
    extra = {"entropy": ones, "sum_sq": ones}
    bounded, stats = replace(rows, border=Border(ones, zeros)), Stats(ones, ones, extra, normaliser=ones)
    for head in (projection(weight), projection(weight, bias, logit_scale=0.5, softcap=30.0)):
        for upstream in (TokenGrads(ones), TokenGrads(ones, ones, ones), TokenGrads(ones, ones, ones, ones)):
            ops.gradients(bounded, head, stats, upstream, Needs(True, True, True))
        if how != "half":
            continue
        block, products = linear_logprobs.RowBlock(rows.hidden, zeros, ones), torch.zeros(N, V)
        for cut in (Cut(zeros, None, None), Cut(None, ones, None), Cut(None, None, ones), Cut(zeros, ones, ones, True)):
            found = truncation.launch_borders(block, head, cut, products)
        truncation.launch_names(block, replace(found, sizes=zeros + 1), products)


def policy_of(surrogate: str, N: int, **options: Any) -> BoundPolicyLoss:
    ones = torch.ones(N)
    sequences = Sequences.of((torch.arange(N) >= 40).long(), 2)
    return PolicyLoss(surrogate, beta=0.1, **options).bind(
        advantages=ones, sequences=sequences, old_logprobs=ones, ref_logprobs=ones, num_sequences=2, num_tokens=N
    )


def pairs_of(name: str, ld_alpha: float | None, ref: torch.Tensor | None, N: int) -> BoundPreferenceLoss:
    sequences = Sequences.of((torch.arange(N) >= 40).long(), 2)
    return PreferenceLoss((name,), ld_alpha=ld_alpha).bind(
        sequences=sequences, ref_logprobs=ref, ref_sums=None, labels=None, kl=None, num_pairs=1, num_tokens=N,
        dtype=torch.float32,
    )  # fmt: skip


def compile_launch(launch: Launch) -> dict[str, Any]:
    functions = {
        f.__name__: f for m in (*KERNEL_FILES, primitives, exact) for f in vars(m).values() if hasattr(f, "arg_names")
    }
    kernel = functions[launch.kernel]
    constants = {
        (kernel.arg_names.index(name),): functions.get(value, value) if isinstance(value, str) else value
        for name, value in launch.constants
    }
    attributes = {(i,): [["tt.divisibility", 16]] for i in launch.aligned}
    source = ASTSource(kernel, dict(launch.signature), constants, attributes)
    target = TARGETS[launch.arch]
    compiled = triton.compile(source, target=target, options=dict(launch.options))
    result: dict[str, Any] = {"name": launch.name, "shared": compiled.metadata.shared}
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        result["registers"] = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
        result["stack"] = int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", text)[1])
        result["local"] = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1])
    else:
        text = compiled.asm["ptx"]
        usage = resource_usage(compiled.asm["cubin"])
        result["registers"], result["stack"], result["local"] = usage["REG"], usage["STACK"], usage["LOCAL"]
    result["tensor_cores"] = TENSOR_CORES[launch.arch] in text
    result["serialized"] = launch.arch == "sm_90" and result["tensor_cores"] and waits_for_each_product(text)
    return result


def tool(name: str) -> str:
    return str(next(Path(triton.__file__).parent.glob(f"backends/nvidia/bin/{name}"), None) or shutil.which(name))


def waits_for_each_product(ptx: str) -> bool:
    """Whether ptxas had to make the asynchronous products of Hopper wait for one another: correct, and much slower."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        newest = "ptxas-blackwell" if Path(tool("ptxas-blackwell")).exists() else "ptxas"
        command = [tool(newest), "-v", "--gpu-name=sm_90a", str(source), "-o", str(Path(folder, "kernel.cubin"))]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
    return "wgmma.mma_async instructions are serialized" in run.stdout + run.stderr


def resource_usage(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        out = subprocess.run(
            [tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", out)}


OLDEST = Path(sys.prefix, "oldest")  # see the Makefile


def compile_few(arch: str, how: str) -> None:
    """Of each kernel the launches with the fewest and the most of what may be None."""
    of_kernel: dict[str, list[Launch]] = {}
    for launch in record(arch, how):
        of_kernel.setdefault(launch.kernel, []).append(launch)
    print(triton.__version__)
    for launches in of_kernel.values():
        launches.sort(key=lambda launch: launch.name.count("_ptr"))
        for launch in {launches[0], launches[-1]}:
            compile_launch(launch)
            print(launch.kernel)


@pytest.mark.slow
def test_the_oldest_triton_compiles_every_kernel() -> None:
    """Which refuses what later ones take, a device function that returns None among it."""
    if not OLDEST.is_dir() and not os.environ.get("CI"):
        pytest.skip(f"the oldest Triton is not in {OLDEST}: make test puts it there")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(OLDEST), os.environ.get("PYTHONPATH", "")])}
    script = "from tests.test_ops_aot import compile_few; compile_few('sm_90', 'half')"
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    version, *kernels = run.stdout.split()
    assert version.startswith("3.6.")
    assert {*kernels} == {name for module in KERNEL_FILES for name in dir(module) if name.endswith("_kernel")}


@pytest.fixture(scope="module")
def compiled() -> Iterator[list[tuple[Launch, dict[str, Any]]]]:
    launches = [launch for arch in TARGETS for how in ("half", "ieee", "tf32") if (arch, how) != ("gfx942", "tf32")
                for launch in record(arch, how)]  # fmt: skip
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
        yield list(zip(launches, pool.map(compile_launch, launches, chunksize=4)))


@pytest.mark.slow
def test_every_launch_compiles_within_its_architecture(compiled: list[tuple[Launch, dict[str, Any]]]) -> None:
    assert {launch.kernel for launch, _ in compiled} == {
        name for module in KERNEL_FILES for name in dir(module) if name.endswith("_kernel")
    }
    for launch, result in compiled:
        assert result["shared"] <= tiles.SHARED_MEMORY[launch.arch], result


@pytest.mark.slow
def test_products_use_tensor_cores(compiled: list[tuple[Launch, dict[str, Any]]]) -> None:
    for launch, result in compiled:
        from_kernel = launch.kernel in GEMM_KERNELS and ("raw_ptr", "constexpr") in launch.signature
        if from_kernel and launch.how != "ieee" and (launch.arch, launch.how) != ("sm_100", "tf32"):
            assert result["tensor_cores"], result
            assert not result["serialized"], result


# Bytes of stack, of launches that are known to need some. This one writes as many once a tile of 128 x 256, and must take the
# tile of the statistics without E, whose bits it has. The others have every upstream and transform at once, in fp32 without
# tensor cores.
_ALL_AT_ONCE = "bias_ptr-h_ptr-square_ptr-flat_ptr-softcap_slope"
KNOWN_SPILLS = {"stats_kernel-sm_90-half-ENTROPY-exps": 32} | {
    f"dlogits_kernel-{arch}-ieee-{_ALL_AT_ONCE}": 8 for arch in ("sm_89", "sm_120")
}


@pytest.mark.slow
def test_nothing_spills_that_is_not_known_to(compiled: list[tuple[Launch, dict[str, Any]]]) -> None:
    for launch, result in compiled:
        if launch.arch != "gfx942":
            assert (result["stack"] <= KNOWN_SPILLS.get(launch.name, 0), result["local"]) == (True, 0), result


@pytest.mark.slow
def test_resource_table(compiled: list[tuple[Launch, dict[str, Any]]], record_property: Any) -> None:
    """The table of registers, stack, spills and shared memory goes into the test report."""
    table = [result for _, result in compiled]
    record_property("resources", json.dumps(table))
    assert all(result["registers"] > 0 for result in table)

"""What a provider is. The providers themselves are in providers/, one file per library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from fused_rlhf.bench import objectives
from fused_rlhf.bench.cases import Case
from fused_rlhf.bench.ops import OPS, Values
from fused_rlhf.words import nearest

if TYPE_CHECKING:
    from torch import Tensor

    from fused_rlhf.bench.inputs import Inputs


class Output(NamedTuple):
    """Of one forward. `backward` defaults to `loss.backward`."""

    loss: Tensor | None = None
    found: Values | None = None
    backward: Callable[[], object] | None = None


Step = Callable[[], "Tensor | Values | Output"]


class Tolerance(NamedTuple):
    """What a provider promises against fp64; beyond it the row is marked wrong."""

    logprob: float  # max abs of log-probs, KL and entropy, nats
    gradient: float  # |error| / |truth|, Frobenius

    def allows(self, found: dict[str, float]) -> bool:
        """Whether every measured error keeps the promise; NaN never does."""
        limits = dict.fromkeys(("logprob_max_abs", "kl_max_abs", "entropy_max_abs", "loss_per_nat"), self.logprob)
        limits |= dict.fromkeys(("dhidden_rel", "dweight_rel"), self.gradient)
        return all(found[key] <= limit for key, limit in limits.items() if key in found)


# Ours: the numerics contract, and a gradient of a few roundings to its dtype. In fp32 those are of the logits: the KL of
# two close distributions has a gradient of the differences of theirs, which are a hundred times smaller.
# tf32 keeps 11 bits of every operand, whoever multiplies.
TF32 = {"tf32": Tolerance(5e-3, 1e-2)}
CONTRACT = {"fp32": Tolerance(5e-5, 5e-4), "bf16": Tolerance(5e-5, 1e-2), **TF32}
# fp32 logits in another library: torch's own log-softmax over 152k columns is off by 1e-4 in fp32.
FP32_LOGITS = {"fp32": Tolerance(5e-4, 1e-3), "bf16": Tolerance(5e-4, 1e-2), **TF32}
# bf16 resolves 0.125 at a logit of 25; a log-prob that far off also carries some tokens across the clip.
ROUNDED = {"fp32": FP32_LOGITS["fp32"], "bf16": Tolerance(0.5, 0.5), **TF32}


def validate(case: Case) -> None:
    """Raises ValueError for an op or objective that there is not, and for numbers that they cannot have."""
    if case.op not in OPS:
        raise ValueError(f"op must be one of {sorted(OPS)}, got {case.op!r}{nearest(case.op, OPS)}")
    if case.objective and case.objective not in (known := objectives.names(case.op)):
        meant = nearest(case.objective, known)
        raise ValueError(f"objective must be one of {known} with {case.op}, got {case.objective!r}{meant}")
    if case.op == "dpo" and case.N // case.T % 2:
        raise ValueError(f"dpo needs an even number of sequences, got N / T = {case.N // case.T}")
    if not OPS[case.op].whole and OPS[case.op].ids > case.V:
        raise ValueError(
            f"V must be at least {OPS[case.op].ids} with {case.op}, which has as many tokens, got {case.V}"
        )
    if case.zero_rows and (case.op in ("dpo", "ppo", "sft") or (case.op == "grpo" and case.beta)):
        raise ValueError(
            f"zero_rows must be 0 where a zero advantage leaves a gradient, got {case.zero_rows} with {case.op}"
        )


@dataclass(frozen=True)
class Provider:
    """`setup(inputs)` imports what it needs and returns the forward: (N,) values, or an `Output` with the loss.

    `memory(case, device)`: the peak in bytes over the inputs, gradients included, that its algorithm implies.
    """

    name: str
    setup: Callable[[Inputs], Step]
    packages: tuple[str, ...] = ("torch",)
    ops: tuple[str, ...] = tuple(OPS)
    where: Callable[[Case], bool] = lambda case: True  # which cases of these ops it has
    tolerance: dict[str, Tolerance] = field(default_factory=lambda: CONTRACT)
    roof: bool = False  # bare matrix products: a yardstick, nothing to check
    memory: Callable[[Case, str], float] | None = None

    def takes(self, case: Case) -> bool:
        """Whether it has this case. Raises ValueError for one that no provider can have."""
        validate(case)
        return case.op in self.ops and self.where(case)

    def step(self, inputs: Inputs) -> Callable[[], Output]:
        if not self.takes(inputs.case):
            raise ValueError(f"{self.name} does not have this case: {inputs.case.label}")
        import torch

        compute, loss = self.setup(inputs), objectives.loss_of(inputs.case)
        device = inputs.hidden.device.type

        def run() -> Output:
            with torch.autocast(device, torch.bfloat16, enabled=inputs.case.masters):
                result = compute()
            if isinstance(result, Output):
                return result
            found = result if isinstance(result, Values) else Values(result)
            return Output(None if loss is None else loss(found, inputs), found)

        return run


PROVIDERS: dict[str, Provider] = {}  # filled by the files of providers/, which registry.py imports: take it from there


def provider(name: str, **fields: object) -> Callable[[Callable[[Inputs], Step]], Callable[[Inputs], Step]]:
    """Registers a setup function; the fields are those of `Provider`."""

    def register(setup: Callable[[Inputs], Step]) -> Callable[[Inputs], Step]:
        PROVIDERS[name] = Provider(name, setup, **fields)  # type: ignore[arg-type]
        return setup

    return register

"""What the presets take: for type checkers and editors as protocols, for `help` and `inspect` from the registries.

A preset needs no protocol: without one its keywords are unchecked before it runs. A test holds each protocol against the
signature that the registries give.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Protocol, TypedDict

from fused_rlhf.objectives.registry import keywords

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fused_rlhf.objectives.policy import PolicyLoss
    from fused_rlhf.objectives.preference import PreferenceLoss

# Fields that a preset fills in by itself.
CHOSEN = {"surrogate", "token_weight", "losses", "weights", "options"}


class Terms(TypedDict, total=False):
    """The fields of `PolicyLoss` that every policy preset takes."""

    kl: str
    beta: float
    entropy_coef: float
    level: str
    use_bias_correction_kl: bool
    off_policy_mask_threshold: float | None
    top_entropy_quantile: float
    importance_sampling: str | None
    importance_sampling_min: float | None
    importance_sampling_max: float | None


class Clipped(Protocol):
    def __call__(
        self,
        *,
        epsilon: float | None = ...,
        epsilon_low: float = ...,
        epsilon_high: float = ...,
        delta: float | None = ...,
        dual_clip: float | None = ...,
        **terms: Unpack[Terms],
    ) -> PolicyLoss: ...


class ClippedOverLength(Protocol):
    def __call__(
        self,
        *,
        epsilon: float | None = ...,
        epsilon_low: float = ...,
        epsilon_high: float = ...,
        delta: float | None = ...,
        dual_clip: float | None = ...,
        max_completion_length: int | None = ...,
        **terms: Unpack[Terms],
    ) -> PolicyLoss: ...


class Cispo(Protocol):
    def __call__(
        self, *, ratio_max: float = ..., ratio_min: float | None = ..., **terms: Unpack[Terms]
    ) -> PolicyLoss: ...


class Sapo(Protocol):
    def __call__(self, *, tau_pos: float = ..., tau_neg: float = ..., **terms: Unpack[Terms]) -> PolicyLoss: ...


class Vespo(Protocol):
    def __call__(
        self,
        *,
        k_pos: float = ...,
        lambda_pos: float = ...,
        k_neg: float = ...,
        lambda_neg: float = ...,
        **terms: Unpack[Terms],
    ) -> PolicyLoss: ...


class Gmpo(Protocol):
    def __call__(
        self,
        *,
        epsilon: float | None = ...,
        epsilon_low: float = ...,
        epsilon_high: float = ...,
        **terms: Unpack[Terms],
    ) -> PolicyLoss: ...


class Plain(Protocol):
    def __call__(self, **terms: Unpack[Terms]) -> PolicyLoss: ...


class ClippedByCovariance(Protocol):
    def __call__(
        self,
        *,
        epsilon: float | None = ...,
        epsilon_low: float = ...,
        epsilon_high: float = ...,
        share: float = ...,
        cov_low: float = ...,
        cov_high: float = ...,
        seed: int = ...,
        **terms: Unpack[Terms],
    ) -> PolicyLoss: ...


class KLByCovariance(Protocol):
    def __call__(self, *, share: float = ..., kl_coef: float = ..., **terms: Unpack[Terms]) -> PolicyLoss: ...


class Preferring(Protocol):
    """`loss_type` may ask for the options of any loss."""

    def __call__(
        self,
        loss_type: str | Sequence[str] = ...,
        loss_weights: Sequence[float] | None = ...,
        *,
        sft_weight: float = ...,
        beta: float = ...,
        f_divergence: str = ...,
        f_alpha: float | None = ...,
        ld_alpha: float | None = ...,
        use_weighting: bool = ...,
        label_smoothing: float = ...,
        discopop_tau: float = ...,
        gamma: float = ...,
        alpha: float = ...,
        desirable_weight: float = ...,
        undesirable_weight: float = ...,
    ) -> PreferenceLoss: ...


def keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def options_of(functions: Iterable[Callable[..., Any]], defaults: Mapping[str, Any]) -> list[inspect.Parameter]:
    """The options of registered functions, with defaults of the preset's own."""
    found: dict[str, inspect.Parameter] = {}
    for function in functions:
        known = keywords(function)
        for name, parameter in inspect.signature(function).parameters.items():
            if name in known:
                found[name] = keyword(name, parameter.annotation, defaults.get(name, parameter.default))
    return list(found.values())


def fields_of(loss: type, defaults: Mapping[str, Any]) -> list[inspect.Parameter]:
    """Those of the fields of a dataclass that a preset leaves open."""
    own = [field for field in fields(loss) if field.name not in CHOSEN]
    return [keyword(field.name, field.type, defaults.get(field.name, field.default)) for field in own]


def arguments_of(loss: type) -> str:
    """What the docstring of a dataclass says of the fields that a preset leaves open, in four spaces."""
    text = (inspect.getdoc(loss) or "").partition("Args:\n")[2].partition("\n\n")[0]
    entries = re.split(r"\n(?=    \S)", text)
    return "\n".join(entry for entry in entries if entry.split(":")[0].strip() not in CHOSEN)


def dress(
    construct: Any, name: str, doc: str, parameters: Sequence[inspect.Parameter], result: type, module: str
) -> None:
    """Name, docstring and signature, as if it had been written out."""
    construct.__name__ = construct.__qualname__ = name
    construct.__module__ = module
    construct.__doc__ = doc
    construct.__signature__ = inspect.Signature(parameters, return_annotation=result)

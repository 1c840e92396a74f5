"""Everything that can be measured: OPS (ops.py), MODELS (cases.py) and PROVIDERS (a file per library in providers/)."""

from __future__ import annotations

from fused_rlhf.bench.cases import MODELS, Case
from fused_rlhf.bench.ops import OPS
from fused_rlhf.bench.provider import PROVIDERS
from fused_rlhf.bench.providers import cce, liger, ours, plain, quack, trl, verl

__all__ = ["MODELS", "OPS", "PROVIDERS", "Case", "cce", "liger", "ours", "plain", "quack", "trl", "verl"]

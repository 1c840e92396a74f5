"""Calls that a type checker must refuse; nothing runs them.

An ignore without an error to ignore is an error itself (`warn_unused_ignores`), so `make lint` fails as soon as some part
of the package is `Any` to the checker, and its silence about the other tests would mean nothing.
"""

import torch

import fused_rlhf as fr
from fused_rlhf.kernels.interface import Needs
from fused_rlhf.trainers import grpo, rewards
from fused_rlhf.trainers.config import TrainConfig


def refused(x: torch.Tensor) -> None:
    fr.linear_logprobs(x, x, x, softcap="5")  # type: ignore[arg-type]
    fr.linear_logprobs(x, x, x, soft_cap=5.0)  # type: ignore[call-arg]
    fr.linear_policy_loss(x, x, x, advantages=x, objective="grpo")  # type: ignore[arg-type]
    fr.lm_head.logprobs("a folder", x)  # type: ignore[arg-type]
    fr.GRPO(epsilom=0.1)  # type: ignore[call-arg]
    fr.GRPO(epsilon="0.1")  # type: ignore[arg-type]
    fr.DrGRPO(max_length=3)  # type: ignore[call-arg]
    fr.CISPO(ratio_max=5.0, beta="0.1")  # type: ignore[arg-type]
    fr.DPO("hinge", label_smooth=0.1)  # type: ignore[call-arg]
    fr.KTO(desirable_weight="1")  # type: ignore[arg-type]
    Needs("yes", True, True)  # type: ignore[arg-type]
    TrainConfig(learning_rate="fast")  # type: ignore[arg-type]
    grpo.train({"steps": 3})  # type: ignore[arg-type]
    rewards.resolve(3)  # type: ignore[arg-type]


def untyped(x):
    fr.linear_kl(x, x, x, kind="forward", softcap="5")  # type: ignore[call-arg, arg-type]
    grpo.train(None, steps=3)  # type: ignore[call-arg]

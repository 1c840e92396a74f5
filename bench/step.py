"""python -m bench.step: time and peak memory of one whole training step, with dense logits and with ours.

A step is the forward of a small Qwen3 body, a clipped objective with KL, the backward and AdamW, on one sequence of T
tokens. Everything is the same on both sides but what follows the hidden states: `model(...).logits` and log_softmax, or
`fr.lm_head.forward` and `fr.linear_policy_loss`. Each side is a process of its own, so that its peak is its own; memory is
counted over what model and optimiser already hold.

    python -m bench.step --tokens 8192 --out bench/results/cpu-2core/step.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_rlhf.bench.checkout import HOME
from fused_rlhf.bench.document import commit, device_info, versions
from fused_rlhf.bench.measure import PeakMemory

SIDES = ("dense", "ours")


@dataclass(frozen=True)
class Shape:
    tokens: int = 8192
    vocabulary: int = 151936
    hidden: int = 64
    layers: int = 2
    device: str = "cpu"
    threads: int = 2


def build(shape: Shape) -> tuple[Any, Any, dict[str, Tensor]]:
    """-> model, optimiser with its state in place, batch of one sequence."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=3 * shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=max(shape.hidden // 2, 8),
        max_position_embeddings=shape.tokens,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config).to(shape.device)  # type: ignore[arg-type]  # as transformers wraps it
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()  # moments and gradients are there before anything is measured
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(shape.vocabulary, (1, shape.tokens), generator=generator)
    noise = -12 + 0.1 * torch.randn(2, 1, shape.tokens - 1, generator=generator)
    batch = {"input_ids": ids, "advantages": torch.ones(1), "old": noise[0], "ref": noise[1]}
    return model, optimizer, {name: tensor.to(shape.device) for name, tensor in batch.items()}


def dense_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    logits = model(batch["input_ids"], use_cache=False).logits[:, :-1]
    targets = batch["input_ids"][:, 1:]
    logprobs = logits.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    ratio, a = (logprobs - batch["old"]).exp(), batch["advantages"][:, None]
    kl = torch.expm1(batch["ref"] - logprobs) - (batch["ref"] - logprobs)
    return (-torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a) + 0.04 * kl).mean()


def our_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    import fused_rlhf as fr

    inputs = fr.lm_head.forward(model, batch["input_ids"])
    loss, _ = fr.linear_policy_loss(
        inputs.hidden[:, :-1],
        inputs.head.weight,
        batch["input_ids"][:, 1:],
        advantages=batch["advantages"],
        old_logprobs=batch["old"],
        ref_logprobs=batch["ref"],
        objective=fr.GRPO(beta=0.04),
        **inputs.head.kwargs(),
    )
    return loss


def measure(side: str, shape: Shape) -> dict[str, Any]:
    torch.set_num_threads(shape.threads)
    model, optimizer, batch = build(shape)
    loss_of = {"dense": dense_loss, "ours": our_loss}[side]
    loss_of(
        model, {**batch, **{k: batch[k][:, :n] for k, n in (("input_ids", 17), ("old", 16), ("ref", 16))}}
    ).backward()
    start = time.perf_counter()
    with PeakMemory(shape.device) as memory:
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
    return {"side": side, "seconds": time.perf_counter() - start, "peak_extra_bytes": memory.extra, "loss": loss.item()}


def main(arguments: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m bench.step", description=(__doc__ or "").split("\n")[0])
    for name, default in asdict(Shape()).items():
        p.add_argument(f"--{name}", type=type(default), default=default)
    p.add_argument("--out", type=Path, help="write the result here as JSON")
    p.add_argument("--side", choices=SIDES, help="measure this side in this process and print it")
    args = p.parse_args(arguments)
    shape = Shape(**{name: getattr(args, name) for name in asdict(Shape())})
    if args.side:
        print(json.dumps(measure(args.side, shape)))
        return 0
    options = [part for name, value in asdict(shape).items() for part in (f"--{name}", str(value))]
    rows = []
    for side in SIDES:
        command = [sys.executable, "-m", "fused_rlhf.bench.step", "--side", side, *options]
        done = subprocess.run(command, cwd=HOME, capture_output=True, text=True)
        last = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or ["killed: out of memory?"]
        rows.append(json.loads(last[-1]) if done.returncode == 0 else {"side": side, "error": last[-1]})
        print(json.dumps(rows[-1]), flush=True)
    result = {
        "command": "python -m bench.step " + " ".join(options),
        "commit": commit(),
        "shape": asdict(shape),
        "device": device_info(shape.device, shape.threads),
        "versions": versions({"torch", "transformers"}),
        "sides": rows,
    }
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

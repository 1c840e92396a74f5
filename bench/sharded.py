"""Memory of a head under FSDP2, streamed and made whole: python -m bench.sharded

Two processes over gloo on one CPU; a small body and a large untied head, each in a group of its own. A step is a forward and
a backward of log-probs whose gradients the weights do not have yet. The peak is of the resident set of each process, over
what it was before the step: with the head's shard, without its gradient.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import fused_rlhf as fr
from fused_rlhf import lm_head
from fused_rlhf.bench import checkout
from fused_rlhf.bench.document import commit
from fused_rlhf.bench.measure import PeakMemory

WAYS = ("whole", "streamed")


def model_of(sizes: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.hidden_size,
        num_hidden_layers=1,
        num_attention_heads=8,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    model.model.embed_tokens.weight = None  # rows come in as they are
    for part in (model.lm_head, *model.model.layers):
        fully_shard(part)
    return fully_shard(model)


def step(model: Any, sizes: argparse.Namespace, way: str) -> dict[str, float]:
    generator = torch.Generator().manual_seed(dist.get_rank())
    rows = torch.randn(1, sizes.tokens, sizes.hidden_size, generator=generator)
    targets = torch.randint(sizes.vocabulary, (1, sizes.tokens), generator=generator)
    model.zero_grad()
    dist.barrier()
    never: Any = mock.patch.object(lm_head, "shards_of", return_value=None)
    begin = time.perf_counter()
    with PeakMemory("cpu") as memory, never if way == "whole" else nullcontext():
        inputs = lm_head.forward(model, inputs_embeds=rows)
        loss = -fr.linear_logprobs(inputs.hidden, inputs.head, targets).logprobs.mean()
        loss.backward()
    seconds = time.perf_counter() - begin
    norm: Any = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return {
        "loss": loss.item(),
        "grad_norm": norm.full_tensor().item(),
        "extra_bytes": memory.extra or 0,
        "seconds": seconds,
    }


def rank(sizes: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model = model_of(sizes)
    step(model, sizes, "streamed")  # what is made once
    found = {way: step(model, sizes, way) for way in WAYS}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    if dist.get_rank() == 0:
        table = 4 * sizes.vocabulary * sizes.hidden_size
        conditions = {"head_bytes": table, "torch": torch.__version__, "commit": commit(), **vars(sizes)}
        print(json.dumps({"conditions": conditions, "ranks": everyone}, indent=1))
    dist.destroy_process_group()


def in_two(module: str, parser: argparse.ArgumentParser, work: Callable[[argparse.Namespace], None]) -> int:
    """`work(arguments)` in two processes, which are this `python -m module` again; -> the exit code."""
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        work(arguments)
        return 0
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    command = [sys.executable, "-m", module, *sys.argv[1:]]
    started = [subprocess.Popen(command, cwd=checkout.HOME, env={**shared, "RANK": str(i)}) for i in range(2)]
    return max(process.wait() for process in started)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--hidden-size", type=int, default=896)
    parser.add_argument("--tokens", type=int, default=256)
    return in_two("fused_rlhf.bench.sharded", parser, rank)


if __name__ == "__main__":
    sys.exit(main())

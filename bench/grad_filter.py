"""How much `grad_filter` skips on a trained model's distribution: python -m bench.grad_filter --data DIR_WITH_GSM8K

Counts, on GSM8K's test text, the (token, vocabulary block) pairs that the filter leaves out at several block widths, the
error it makes of the gradients, and the time of the backward with and without it. Random logits would say nothing: they
are flat, or peaked by chance. The model is the one of `--model`, such as smollm2, or a small Qwen-style one with a BPE
vocabulary that is trained on GSM8K's training text before.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

import fused_rlhf as fr
from fused_rlhf.bench import real
from fused_rlhf.bench.document import commit
from fused_rlhf.kernels.interface import kept_blocks

FILTERS = (1e-5, 1e-4, 1e-3, 1e-2)
WIDTHS = (128, 1024, 4096)


def texts(file: Path) -> list[str]:
    rows = map(json.loads, file.read_text().splitlines())
    return [f"{row['question']}\n{row['answer']}\n" for row in rows]


def tokenizer_of(corpus: list[str], vocabulary: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet))
    return tokenizer


def encode(tokenizer: Tokenizer, corpus: list[str]) -> Tensor:
    return torch.tensor([token for row in tokenizer.encode_batch(corpus) for token in row.ids])


def train(model: Qwen2ForCausalLM, stream: Tensor, steps: int, batch: int, length: int, seed: int) -> float:
    """-> mean loss of the last tenth of the steps."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=steps)
    losses = []
    for _ in range(steps):
        start = torch.randint(len(stream) - length, (batch, 1), generator=generator)
        ids = stream[start + torch.arange(length)].to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            loss = -fr.lm_head.logprobs(model, ids).logprobs.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    return torch.stack(losses[-max(1, steps // 10) :]).mean().item()


@torch.no_grad()
def last_hidden(model: Qwen2ForCausalLM, stream: Tensor, tokens: int, length: int) -> tuple[Tensor, Tensor]:
    """(N, H) hidden states and (N,) targets of test text."""
    device = next(model.parameters()).device
    ids = stream[: tokens // length * length + 1]
    inputs = ids[:-1].view(-1, length).to(device)
    hidden = torch.cat([fr.lm_head.hidden_states(model, part) for part in inputs.split(16)])
    return hidden.flatten(0, 1), ids[1:].to(device)


def gradients(hidden: Tensor, weight: Tensor, targets: Tensor, grad_filter: float) -> tuple[Tensor, Tensor, float]:
    """dX, dW and the seconds of the backward; the upstream is one advantage per token, as in GRPO."""
    x, w = hidden.clone().requires_grad_(), weight.detach().clone().requires_grad_()
    upstream = torch.randn(len(targets), generator=torch.Generator().manual_seed(0)).to(hidden.device)
    total = (fr.linear_logprobs(x, w, targets, grad_filter=grad_filter).logprobs * upstream).sum()
    wait(hidden)
    start = time.perf_counter()
    total.backward()
    wait(hidden)
    assert x.grad is not None
    assert w.grad is not None
    return x.grad, w.grad, time.perf_counter() - start


def wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


@torch.no_grad()
def left_out(hidden: Tensor, weight: Tensor, targets: Tensor, width: int) -> dict[str, float]:
    """Share of the (token, block) pairs that each filter leaves out."""
    shares = dict.fromkeys(FILTERS, 0.0)
    for x, y in zip(hidden.split(1024), targets.split(1024)):
        p = torch.softmax(x.float() @ weight.float().T, -1)
        mass = torch.stack([part.sum(1) for part in p.split(width, dim=1)], dim=1)
        for f in FILTERS:
            shares[f] += (~kept_blocks(mass, f, y, width, None)).float().mean().item() * len(y) / len(targets)
    return {f"{f:g}": share for f, share in shares.items()}


def relative(found: Tensor, truth: Tensor) -> float:
    return ((found.double() - truth.double()).norm() / truth.double().norm()).item()


def rows_of_own(args: argparse.Namespace, device: torch.device) -> tuple[real.Rows, dict[str, Any]]:
    """Of a small model after its training, and how that went. Raises FileNotFoundError where there is no text."""
    corpus = texts(args.data / "train.jsonl")
    tokenizer = tokenizer_of(corpus, args.vocabulary)
    V = tokenizer.get_vocab_size()
    config = Qwen2Config(
        vocab_size=V, hidden_size=args.hidden, intermediate_size=4 * args.hidden, num_hidden_layers=4,
        num_attention_heads=args.hidden // 64, num_key_value_heads=args.hidden // 64, tie_word_embeddings=True,
        max_position_embeddings=args.length,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).to(device)  # type: ignore[arg-type]  # as transformers wraps it
    start = time.perf_counter()
    loss = train(model, encode(tokenizer, corpus), args.steps, args.batch, args.length, args.seed)
    seconds = time.perf_counter() - start
    hidden, targets = last_hidden(model, encode(tokenizer, texts(args.data / "test.jsonl")), args.tokens, args.length)
    weight = model.get_output_embeddings().weight.detach()
    if device.type == "cuda":
        hidden, weight = hidden.bfloat16(), weight.bfloat16()
    about = {"hidden": args.hidden, "layers": 4, "steps": args.steps, "train_loss": loss, "seconds": seconds}
    return real.Rows(hidden, weight, targets), about


def rows_of_model(args: argparse.Namespace, device: torch.device) -> tuple[real.Rows, dict[str, Any]]:
    """Of the model that is named. Raises as `real.rows`."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    found = real.rows(args.model, args.data, args.tokens, dtype, device.type)
    return found, {"name": args.model, "hidden": found.hidden.shape[1]}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    (hidden, weight, targets), about = (rows_of_model if args.model else rows_of_own)(args, device)
    found = fr.linear_logprobs(hidden, weight, targets, outputs=("entropy",))
    assert found.entropy is not None
    rows = []
    gradients(hidden, weight, targets, 0.0)  # warms up
    exact_x, exact_w, exact_seconds = gradients(hidden, weight, targets, 0.0)
    for f in FILTERS:
        gradients(hidden, weight, targets, f)
        dx, dw, filtered = gradients(hidden, weight, targets, f)
        errors = {"dX": relative(dx, exact_x), "dW": relative(dw, exact_w)}
        rows.append({"grad_filter": f, "relative_error": errors, "backward_time_ratio": filtered / exact_seconds})
    return {
        "vocabulary": len(weight),
        "model": about,
        "test": {
            "tokens": len(targets),
            "nll": -found.logprobs.mean().item(),
            "entropy_mean": found.entropy.mean().item(),
            "entropy_quantiles_10_50_90": [found.entropy.quantile(q).item() for q in (0.1, 0.5, 0.9)],
        },
        "left_out_by_block_width": {str(width): left_out(hidden, weight, targets, width) for width in WIDTHS},
        "backward": rows,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu",
        "dtype": str(hidden.dtype),
        "torch": torch.__version__,
        "commit": commit(),
        "threads": torch.get_num_threads(),
        "seed": args.seed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.grad_filter", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with GSM8K's train.jsonl and test.jsonl")
    parser.add_argument("--model", help="a folder, or a name that trainers take; the options of training are not read")
    parser.add_argument("--out", type=Path, help="write the result here as JSON")
    for name, default in {"vocabulary": 32768, "hidden": 256, "steps": 400, "batch": 16, "length": 256}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--tokens", type=int, default=8192, help="test tokens")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        result = measure(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"python -m bench.grad_filter: error: {error}") from None
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

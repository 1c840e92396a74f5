"""Time and error at a shape of one's own: ours beside dense torch. For peers and memory: python -m bench.

python examples/own_shape.py --tokens 2048 --vocabulary 151936 --hidden 896 --dtype bfloat16
"""

import argparse
import statistics
import time

import torch

import fused_rlhf as fr


def ours(hidden, weight, targets):
    return fr.linear_logprobs(hidden, weight, targets).logprobs


def dense(hidden, weight, targets):
    return (hidden @ weight.T).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]


def seconds(function, operands, rounds: int) -> float:
    """Median of forward and backward, after one to warm up."""
    taken = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        function(*operands).sum().backward()
        if operands[0].is_cuda:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
        operands[0].grad = operands[1].grad = None
    return statistics.median(taken[1:])


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 512), ("vocabulary", 32000), ("hidden", 512), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    asked = parser.parse_args(arguments)
    torch.manual_seed(0)
    options = {"device": "cuda" if torch.cuda.is_available() else "cpu", "dtype": getattr(torch, asked.dtype)}
    hidden = torch.randn(asked.tokens, asked.hidden, **options).requires_grad_()
    weight = (torch.randn(asked.vocabulary, asked.hidden, **options) / asked.hidden**0.5 * 5).requires_grad_()
    targets = torch.randint(asked.vocabulary, (asked.tokens,), device=hidden.device)
    truth = dense(hidden[:64].detach().double(), weight.detach().double(), targets[:64])
    found = {}
    for function in (ours, dense):
        error = (function(hidden, weight, targets)[:64] - truth).abs().max().item()
        found[function.__name__] = seconds(function, (hidden, weight, targets), asked.rounds)
        print(f"{function.__name__:6} {found[function.__name__]:.3f} s, largest error {error:.1e} nats")
    return found


if __name__ == "__main__":
    main()

"""One long sequence on little memory: the peak of a GRPO update, fused and over dense logits.

python examples/long_sequence.py [TOKENS]
"""

import resource
import sys

import torch

import fused_rlhf as fr

V, H = 32768, 64


def peak() -> float:
    """The most this process has ever held, in MB: of the allocator on a GPU, else of the resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def fused(hidden, weight, targets, advantages):
    objective, offsets = fr.GRPO(), torch.tensor([0, len(targets)], device=hidden.device)
    options = {"objective": objective, "cu_seqlens": offsets, "mode": "two_phase"}
    return fr.linear_policy_loss(hidden, weight, targets, advantages=advantages, **options)[0]


def dense(hidden, weight, targets, advantages):
    logprobs = (hidden @ weight.T).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    return -((logprobs - logprobs.detach()).exp() * advantages).mean()


def main(tokens: int = 8192) -> dict[str, float]:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden = torch.randn(tokens, H, device=device, requires_grad=True)
    weight = torch.randn(V, H, device=device, requires_grad=True)
    targets, advantages = torch.randint(V, (tokens,), device=device), torch.ones(tokens, device=device)
    taken, before = {}, peak()
    for name, function in (("fused", fused), ("dense", dense)):  # the peak only rises: the smaller one first
        hidden.grad = weight.grad = None
        loss = function(hidden, weight, targets, advantages)
        loss.backward()
        taken[name] = peak() - before
        print(f"{name}: loss {loss:.4f}, {taken[name]:.0f} MB beyond the inputs")
        del loss
    return taken


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

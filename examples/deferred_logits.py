"""A loop that takes logits, as it is: one line keeps them out of memory. `--dense` leaves the line out, for comparison."""

import contextlib
import resource
import sys

import torch
from torch.nn import functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM

import fused_rlhf as fr


def loss_of(logits: torch.Tensor, ids: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """REINFORCE with an entropy bonus, which knows nothing of how logits are made."""
    logits = logits[:, :-1] / 0.9
    logp = F.log_softmax(logits, dim=-1)
    taken = logp.gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    return -(advantages[:, None] * taken + 0.01 * entropy).mean()


def main(deferred: bool = True, vocabulary: int = 151_936, steps: int = 3, B: int = 4, T: int = 256) -> list[float]:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = Qwen2ForCausalLM(config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids, advantages = torch.randint(vocabulary, (B, T)), torch.randn(B)

    losses = []
    with fr.deferred_logits(model) if deferred else contextlib.nullcontext():
        for _ in range(steps):
            loss = loss_of(model(ids).logits, ids, advantages)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            print(f"loss {losses[-1]:+.6f}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"peak {peak / 1e9:.2f} GB; one tensor of logits has {B * T * vocabulary * 4 / 1e9:.2f} GB")
    return losses


if __name__ == "__main__":
    main(deferred="--dense" not in sys.argv)

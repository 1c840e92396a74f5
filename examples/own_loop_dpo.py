"""DPO in a loop of one's own, over a transformers model: reference log-probs once, then updates on pairs."""

import torch

import fused_rlhf as fr
from fused_rlhf.trainers.model import build  # any transformers causal LM and tokenizer will do

PAIRS = [(f"{a}+{b}=", str(a + b), str(a + b + 1)) for a in range(2, 6) for b in range(3, 7)]


def encode(tokenizer, pairs):
    """The chosen sequences, then the rejected ones: ids, attention mask and mask of the completions, (2 P, T) each."""
    texts = [(prompt, chosen) for prompt, chosen, _ in pairs] + [(prompt, rejected) for prompt, _, rejected in pairs]
    rows = [(tokenizer(p).input_ids, [*tokenizer(c).input_ids, tokenizer.eos_token_id]) for p, c in texts]
    longest = max(len(prompt + completion) for prompt, completion in rows)
    ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
    mask, completion_mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for i, (prompt, completion) in enumerate(rows):
        end = len(prompt + completion)
        ids[i, :end] = torch.tensor(prompt + completion)
        mask[i, :end] = 1
        completion_mask[i, len(prompt) : end] = 1
    return ids, mask, completion_mask


def main(steps: int = 20) -> list[dict[str, float]]:
    torch.manual_seed(0)
    model, tokenizer = build(hidden_size=64, num_layers=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids, mask, completion_mask = encode(tokenizer, PAIRS)
    with torch.no_grad():
        reference = fr.lm_head.logprobs(model, ids, mask, completion_mask=completion_mask).logprobs  # (2 P, T - 1)

    history = []
    for step in range(steps):
        inputs = fr.lm_head.forward(model, ids, mask)
        loss, metrics = fr.linear_preference_loss(
            inputs.hidden[:, :-1],
            inputs.head,
            ids[:, 1:],
            completion_mask=completion_mask[:, 1:],
            ref_logprobs=reference,
            objective=fr.DPO(beta=0.1),
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append({"loss": loss.item(), "margin": metrics["rewards/margins"].item()})
        print(f"step {step:2}  loss {history[-1]['loss']:.4f}  margin {history[-1]['margin']:+.4f}")
    return history


if __name__ == "__main__":
    main()

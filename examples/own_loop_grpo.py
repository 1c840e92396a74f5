"""GRPO in a loop of one's own: sample, score, update. A small model learns to write digits, in seconds on a CPU."""

import torch

import fused_rlhf as fr
from fused_rlhf.advantages import group_advantages
from fused_rlhf.trainers.model import build  # any transformers causal LM and tokenizer will do

GROUP, NEW = 16, 8  # completions of a prompt, tokens of a completion


def digits(texts: list[str]) -> torch.Tensor:
    return torch.tensor([sum(c.isdigit() for c in text) / NEW for text in texts])


def main(steps: int = 20) -> list[float]:
    torch.manual_seed(0)
    model, tokenizer = build(hidden_size=64, num_layers=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    prompts = tokenizer(["2+3=", "10-7=", "8*4=", "9+9="], return_tensors="pt", padding=True)
    start, history = prompts.input_ids.shape[1], []
    for step in range(steps):
        with torch.no_grad():
            ids = model.generate(
                **prompts, max_new_tokens=NEW, do_sample=True, top_k=0, num_return_sequences=GROUP, eos_token_id=None
            )
        mask = torch.cat([prompts.attention_mask.repeat_interleave(GROUP, 0), torch.ones(len(ids), NEW).long()], 1)
        rewards = digits(tokenizer.batch_decode(ids[:, start:], skip_special_tokens=True))
        completion = torch.zeros_like(ids, dtype=torch.bool)
        completion[:, start:] = True

        inputs = fr.lm_head.forward(model, ids, mask)  # hidden states and head, no logits
        loss, metrics = fr.linear_policy_loss(
            inputs.hidden[:, :-1],
            inputs.head,
            ids[:, 1:],
            completion_mask=completion[:, 1:],
            advantages=group_advantages(rewards, GROUP),
            objective=fr.GRPO(),  # the only update of this rollout: without old log-probs the ratio is 1
            outputs=("entropy",),
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(rewards.mean().item())
        print(f"step {step:2}  reward {history[-1]:.3f}  entropy {metrics['entropy']:.2f}")
    return history


if __name__ == "__main__":
    main()

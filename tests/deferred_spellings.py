"""How RL and SFT code spells what it wants of logits: ours, after the forms found in public trainers and loops.

Each takes logits (B, T, V), tokens y (B, T) and a second pair of logits, of a teacher or reference, and returns one tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Spelling = Callable[[Tensor, Tensor, Tensor], Tensor]
SPELLINGS: dict[str, Spelling] = {}


def spelling(function: Spelling) -> Spelling:
    SPELLINGS[function.__name__] = function
    return function


# --------------------------------------------------------------------------------------------------- log-probs of a token


@spelling
def log_softmax_gather(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1)


@spelling
def shifted_dpo(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    labels = y[:, 1:].clone()
    return torch.gather(logits[:, :-1, :].log_softmax(-1), dim=2, index=labels.unsqueeze(2)).squeeze(2)


@spelling
def masked_dpo_sum(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    mask = (y % 3 != 0).to(logits.dtype)
    per_token = F.log_softmax(logits.float() if logits.dtype == torch.bfloat16 else logits, dim=-1)
    return (per_token.gather(dim=-1, index=y[..., None])[..., 0] * mask).sum(-1)


@spelling
def temperature_functional(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    logits = logits / 0.7
    return torch.take_along_dim(F.log_softmax(logits, dim=-1), y[..., None], dim=-1)[..., 0]


@spelling
def temperature_in_place(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    logits = logits[:, :-1]
    logits.div_(1.3)
    return logits.log_softmax(dim=-1).gather(-1, y[:, 1:, None]).squeeze(-1)


@spelling
def temperature_augmented(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    flat = logits.view(-1, logits.size(-1)).clone()
    flat /= 0.9
    return flat.log_softmax(-1)[range(y.numel()), y.view(-1)]


@spelling
def temperature_per_row(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    temperature = torch.linspace(0.5, 1.5, y.numel(), dtype=torch.float64).view(*y.shape, 1).to(logits.dtype)
    return (logits / temperature).log_softmax(-1).gather(-1, y[..., None]).squeeze(-1)


@spelling
def inverse_temperature_per_sequence(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    inverse = torch.tensor([2.0, 0.5, 1.0], dtype=logits.dtype)[: len(y), None, None]
    return (logits * inverse).log_softmax(-1).gather(-1, y[..., None]).squeeze(-1)


@spelling
def logits_minus_logsumexp(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    selected = torch.gather(logits, -1, y.unsqueeze(-1)).squeeze(-1)
    return selected - torch.logsumexp(logits, dim=-1)


@spelling
def logsumexp_row_by_row(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    selected = torch.gather(logits, dim=-1, index=y.unsqueeze(-1)).squeeze(-1)
    return selected - torch.stack([torch.logsumexp(row, dim=-1) for row in logits])


@spelling
def log_softmax_row_by_row(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    rows = [F.log_softmax(a, -1).gather(-1, b[:, None]).squeeze(-1) for a, b in zip(logits, y)]
    return torch.stack(rows)


@spelling
def advanced_indexing(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    b, t = torch.arange(y.shape[0])[:, None], torch.arange(y.shape[1])[None]
    return torch.log_softmax(logits, -1)[b, t, y]


@spelling
def cross_entropy_as_logprob(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    return -F.cross_entropy(logits.reshape(-1, logits.shape[-1]), y.reshape(-1), reduction="none").view(y.shape)


@spelling
def cross_entropy_transposed(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    return F.cross_entropy(logits.transpose(1, 2), y, reduction="none")


@spelling
def nll_of_log_softmax(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    logp = F.log_softmax(logits, dim=-1)
    return F.nll_loss(logp.flatten(0, 1), y.flatten(), reduction="none")


@spelling
def nll_transposed(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    return F.nll_loss(logits.log_softmax(-1).permute(0, 2, 1), y, ignore_index=int(y[0, 0]))


@spelling
def log_of_softmax(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    return logits.softmax(-1).log().gather(-1, y[..., None])[..., 0]


@spelling
def probability_of_token(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    return F.softmax(logits, -1).gather(-1, y[..., None]).squeeze(-1)


@spelling
def one_token_at_a_time(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    return torch.stack([logits[:, t].log_softmax(-1).gather(1, y[:, t : t + 1])[:, 0] for t in range(y.shape[1])], 1)


@spelling
def chunks_joined(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    flat, labels = logits.flatten(0, 1), y.flatten()
    parts = [a.log_softmax(-1).gather(-1, b[:, None])[:, 0] for a, b in zip(flat.split(4), labels.split(4))]
    return torch.cat(parts).view(y.shape)


@spelling
def chosen_and_rejected(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    chosen, rejected = logits.chunk(2, dim=0)
    a, b = y.chunk(2, dim=0)
    win = chosen.log_softmax(-1).gather(-1, a[..., None]).sum()
    return win - rejected.log_softmax(-1).gather(-1, b[..., None]).sum()


@spelling
def batches_concatenated(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    again = torch.cat([logits[1:], logits[:1]], dim=0)
    return again.log_softmax(-1).gather(-1, torch.cat([y[1:], y[:1]])[..., None]).squeeze(-1)


@spelling
def real_tokens_only(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    mask = y % 2 == 0
    return logits[mask].log_softmax(-1).gather(-1, y[mask][:, None]).squeeze(-1)


@spelling
def packed_batch_of_one(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    packed, labels = logits.reshape(1, -1, logits.shape[-1]), y.reshape(1, -1)
    rolled = torch.roll(labels, shifts=-1, dims=1).squeeze(0)
    return packed.squeeze(0).log_softmax(-1).gather(dim=-1, index=rolled.unsqueeze(-1)).squeeze(-1)


@spelling
def several_tokens_of_a_row(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    ids = torch.stack([y, (y + 5) % logits.shape[-1], y], -1)
    return logits.log_softmax(-1).gather(-1, ids).logsumexp(-1)


@spelling
def yes_or_no_of_the_last_token(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    return logits[:, -1, [3, 7]].log_softmax(-1)


@spelling
def softcap_by_hand(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    logits = 5.0 * torch.tanh(logits / 5.0)
    return (logits / 0.8).log_softmax(-1).gather(-1, y[..., None]).squeeze(-1)


@spelling
def bias_over_the_vocabulary(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    bias = torch.linspace(-1, 1, logits.shape[-1], dtype=logits.dtype)
    return (logits * 2.0 + bias).log_softmax(-1).gather(-1, y[..., None]).squeeze(-1)


@spelling
def padded_vocabulary_cut(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    return logits[..., : logits.shape[-1] - 3].log_softmax(-1).gather(-1, y[..., None]).squeeze(-1)


@spelling
def safe_softmax_by_hand(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    largest = logits.max(dim=-1, keepdim=True).values.detach()
    total = (logits - largest).exp().sum(-1)
    return (logits - largest).gather(-1, y[..., None]).squeeze(-1) - total.log()


# --------------------------------------------------------------------------------------------------------------- entropies


@spelling
def entropy_of_products(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    logp = F.log_softmax(logits, dim=-1)
    return -(logp.exp() * logp).sum(-1)


@spelling
def entropy_negated_inside(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    p, logp = logits.softmax(-1), logits.log_softmax(-1)
    return torch.sum(-p * logp, dim=-1)


@spelling
def entropy_by_logsumexp(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    p = torch.nn.functional.softmax(logits, dim=-1)
    return torch.logsumexp(logits, dim=-1) - torch.sum(p * logits, dim=-1)


@spelling
def entropy_in_chunks(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    flat, found = logits.reshape(-1, logits.shape[-1]), []
    for chunk in flat.split(5, dim=0):
        logp = F.log_softmax(chunk, dim=-1)
        found.append(-(torch.exp(logp) * logp).sum(-1))
    return torch.cat(found).reshape(logits.shape[:-1])


@spelling
def entropy_of_temperature(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    scaled = logits.div(0.6)
    logp = scaled - scaled.logsumexp(-1, keepdim=True)
    return -(logp.exp() * logp).sum(dim=-1)


@spelling
def entropy_entr(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    return torch.special.entr(logits.softmax(-1)).sum(-1)


@spelling
def categorical_entropy(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    return torch.distributions.Categorical(logits=logits).entropy()


@spelling
def categorical_log_prob(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    return torch.distributions.Categorical(logits=logits / 0.9).log_prob(y)


@spelling
def categorical_both(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    policy = torch.distributions.Categorical(logits=logits[:, :-1])
    return policy.log_prob(y[:, 1:]) + 0.1 * policy.entropy()


@spelling
def logprob_and_entropy_bonus(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    logp = logits.log_softmax(-1)
    taken = logp.gather(-1, y[..., None]).squeeze(-1)
    return taken - 0.01 * (logp.exp() * logp).sum(-1)


# ------------------------------------------------------------------------------------------------- other sums over a row


@spelling
def logsumexp_keepdim(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    return torch.logsumexp(logits, dim=-1, keepdim=True)


@spelling
def z_loss(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    return logits.logsumexp(-1).square().mean()


@spelling
def collision_probability(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    p = logits.softmax(-1)
    return (p * p).sum(-1)


@spelling
def collision_probability_by_pow(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    return logits.softmax(-1).pow(2).sum(dim=-1)


@spelling
def renyi_entropy_by_doubling(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    return 2 * torch.logsumexp(logits, -1) - torch.logsumexp(2 * logits, -1)


@spelling
def mean_logit(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    return logits.mean(-1)


@spelling
def largest_logit(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    return logits.max(-1).values


@spelling
def largest_log_probability(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    return logits.log_softmax(-1).amax(-1)


@spelling
def few_largest(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    return logits.softmax(-1).topk(4, dim=-1).values


@spelling
def teachers_few_largest(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    ids = ref.topk(3, dim=-1).indices
    target = ref.log_softmax(-1).gather(-1, ids).detach()
    return F.kl_div(logits.log_softmax(-1).gather(-1, ids), target, reduction="none", log_target=True).sum(-1)


# ------------------------------------------------------------------------------------------------------------------ losses


@spelling
def sft_mean(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    labels = torch.where(y % 4 == 0, -100, y)
    return F.cross_entropy(logits[..., :-1, :].contiguous().view(-1, logits.size(-1)), labels[..., 1:].reshape(-1))


@spelling
def sft_sum_by_items(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    labels = F.pad(torch.where(y % 4 == 0, -100, y), (0, 1), value=-100)[..., 1:].contiguous()
    flat = logits.view(-1, logits.shape[-1])
    return F.cross_entropy(flat, labels.view(-1), ignore_index=-100, reduction="sum") / 7


@spelling
def sft_module(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    return torch.nn.CrossEntropyLoss(reduction="none", ignore_index=0)(logits.flatten(0, 1), y.flatten())


@spelling
def by_keywords(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    logp = F.log_softmax(input=logits, dim=-1, dtype=logits.dtype)
    taken = torch.gather(input=logp, dim=-1, index=y[..., None])
    flat = torch.cat(tensors=[logits[:, :2], logits[:, 2:]], dim=1).flatten(0, 1)
    return taken.mean() - F.cross_entropy(input=flat, target=y.flatten(), reduction="sum")


@spelling
def label_smoothing(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    labels = torch.where(y % 4 == 0, -100, y)
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1), label_smoothing=0.1)


@spelling
def label_smoothing_by_hand(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    logp = -F.log_softmax(logits, dim=-1)
    nll = logp.gather(dim=-1, index=y.unsqueeze(-1))
    smooth = logp.sum(dim=-1, keepdim=True)
    return (0.9 * nll + 0.1 * smooth / logits.shape[-1]).mean()


@spelling
def simpo(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    mean = logits.log_softmax(-1).gather(-1, y[..., None]).squeeze(-1).mean(-1)
    return -F.logsigmoid(2.0 * (mean[:1] - mean[-1:]) - 0.5)


# -------------------------------------------------------------------------------------------------------------- two heads


@spelling
def distil_batchmean(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    student = F.log_softmax(logits.flatten(0, 1) / 2.0, dim=-1)
    teacher = F.softmax(ref.flatten(0, 1) / 2.0, dim=-1).detach()
    return F.kl_div(student, teacher, reduction="batchmean") * 4.0


@spelling
def distil_log_target(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    kl = F.kl_div(logits.log_softmax(-1), ref.detach().log_softmax(-1), reduction="none", log_target=True)
    return kl.sum(-1)


@spelling
def distil_sum_module(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    return torch.nn.KLDivLoss(reduction="sum")(logits.log_softmax(-1), ref.softmax(-1).detach())


@spelling
def reverse_kl_by_hand(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    logp, logq = logits.log_softmax(-1), ref.log_softmax(-1).detach()
    return (logp.exp() * (logp - logq)).sum(-1)


@spelling
def forward_kl_by_hand(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    logp, q = F.log_softmax(logits, -1), F.softmax(ref, -1)
    return torch.sum(q * (q.log() - logp), dim=-1)


@spelling
def reverse_kl_of_kl_div(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    return F.kl_div(ref.log_softmax(-1), logits.log_softmax(-1), reduction="sum", log_target=True)


@spelling
def soft_cross_entropy(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    teacher = ref.detach().softmax(-1)
    return -(teacher * logits.log_softmax(-1)).sum(-1).mean()


@spelling
def soft_cross_entropy_by_torch(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), ref.flatten(0, 1).softmax(-1))


@spelling
def reference_ratio(logits: Tensor, y: Tensor, ref: Tensor) -> Tensor:
    with torch.no_grad():
        old = ref.log_softmax(-1).gather(-1, y[..., None]).squeeze(-1)
    new = logits.log_softmax(-1).gather(-1, y[..., None]).squeeze(-1)
    return (new - old).exp() + (old - new).exp() + (new - old) - 1


# --------------------------------------------------------------------------------------- decisions: no gradient, no numbers

DECISIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "argmax": lambda z, y: z.argmax(-1),
    "argmax_keepdim": lambda z, y: torch.argmax(z.log_softmax(-1), dim=-1, keepdim=True),
    "accuracy": lambda z, y: (z[:, :-1].argmax(dim=-1) == y[:, 1:]).float().mean(),
    "max_indices": lambda z, y: z.softmax(-1).max(dim=-1)[1],
    "topk_ids": lambda z, y: z.topk(5).indices,
    "token_in_top_5": lambda z, y: (z.topk(5, -1)[1] == y[..., None]).any(-1),
    "batch_size": lambda z, y: torch.tensor([len(z), z.size(0), z.dim(), z.numel()]),
}

# Each would need the whole tensor.
REFUSED: dict[str, Callable[[Any, Tensor], Any]] = {
    "sort": lambda z, y: z.sort(-1, descending=True),
    "cumsum": lambda z, y: z.softmax(-1).cumsum(-1),
    "multinomial": lambda z, y: torch.multinomial(z[:, -1].softmax(-1), 1),
    "masked_fill": lambda z, y: z.masked_fill(torch.zeros(z.shape, dtype=torch.bool), -1e9),
    "where": lambda z, y: torch.where(y[..., None] > 3, z, 0.0),
    "setitem": lambda z, y: z.__setitem__((..., 0), -1e9),
    "matmul": lambda z, y: z @ torch.zeros(z.shape[-1], 2, dtype=z.dtype),
    "relu": lambda z, y: torch.relu(z),
    "sigmoid": lambda z, y: torch.sigmoid(z),
    "softmax_over_time": lambda z, y: z.softmax(1),
    "isnan": lambda z, y: torch.isnan(z).any(),
    "allclose": lambda z, y: torch.allclose(z, z),
    "numpy": lambda z, y: z.numpy(),
    "tolist": lambda z, y: z.tolist(),
    "item": lambda z, y: z.item(),
    "data_ptr": lambda z, y: z.data_ptr(),
    "untyped_storage": lambda z, y: z.untyped_storage(),
    "zeros_like": lambda z, y: torch.zeros_like(z),
    "meta": lambda z, y: z.to("meta"),
    "to_int": lambda z, y: z.long(),
    "pow_3": lambda z, y: z**3,
    "min": lambda z, y: z.min(-1),
    "std": lambda z, y: z.std(-1),
    "log_of_logits": lambda z, y: z.log(),
    "log_with_epsilon": lambda z, y: (z.softmax(-1) + 1e-9).log(),
    "product_of_logits": lambda z, y: z * z,
    "dense_times_logits": lambda z, y: z * torch.ones(z.shape, dtype=z.dtype),
    "vocabulary_chunks": lambda z, y: z.chunk(2, dim=-1),
    "vocabulary_flattened": lambda z, y: z.view(-1),
    "class_weights": lambda z, y: torch.nn.functional.cross_entropy(
        z.flatten(0, 1), y.flatten(), weight=torch.ones(z.shape[-1], dtype=z.dtype)
    ),
    "two_softcaps": lambda z, y: torch.tanh(torch.tanh(z)),
    "requires_grad": lambda z, y: z.requires_grad_(),
    "retain_grad": lambda z, y: z.retain_grad(),
    "js_divergence": lambda z, y: (0.5 * (z.softmax(-1) + z.flip(0).softmax(-1))).log(),
    "einsum": lambda z, y: torch.einsum("btv,btv->bt", z.softmax(-1), z),
    "out": lambda z, y: torch.mul(z, 2.0, out=torch.empty(0)),
}

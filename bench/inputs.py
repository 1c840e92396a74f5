"""The tensors of a case, and their fp64 truth.

The logits of a trained model are peaked on most tokens and flat on some; random hidden states give neither, and flatter
whatever skips small probabilities. Here W has rows of norm about 1 and each hidden state is a combination of candidate
rows of W, so that the candidates' logits are (to within the overlap of random rows) the numbers below:

    60 % peaked      one candidate at 25, seven in [6, 14]
    25 % uncertain   eight candidates in [22, 25]: where rounded logits hurt most
    15 % flat        eight candidates in [8, 12]: the other tokens together hold most of the mass

and, in every row, four more tokens at -25. Targets are drawn from the candidates' softmax. The reference model has the
same head and hidden states that differ by noise which moves every logit by about 0.1. With `outliers` the first channels of
every hidden state are 50 and the last -50, where the head's are about 0.1: partial sums then pass far beyond the logits they
end at. Rows beyond `BASE_ROWS` repeat
earlier ones in random order, so that one fp64 reference serves every N. The entropy is recorded beside the figures.

Tokens that a case gives by their ids: for `kept` distinct ones, the row's target and its likely candidates, the others spread
over the vocabulary from a random one on; for `ids` one half of candidates and one of any tokens, each as often as it comes.

The nucleus of a row ends between two tokens. Where less mass decides which two than rounding moves, a token more or less may
change the log-prob by more than any tolerance. Such rows are not `settled`: they have no upstream gradient, and their values
are not compared.

A case may name a model instead, whose own head, hidden states and targets are taken (real.py); all else is the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fused_rlhf.bench.cases import BASE_ROWS, Case
from fused_rlhf.bench.ops import OPS, TOP_P

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
COLUMNS = 8192  # of W in fp64 at a time
CANDIDATES = 8  # of a row
WHOLE_ROWS = 128  # of logits in fp64 at a time, where whole ones are needed
# By how much rounding in fp32 may move the mass before a token, and what the log-prob may then move by, a little less than
# is tolerated: in sums of a row as ours, and as torch's over 152k columns.
ROUNDING = {3e-6: 4e-5, 2e-5: 4e-4}


class Base(NamedTuple):
    """The operands of the base rows."""

    weight: Tensor  # (V, H)
    hidden: Tensor  # (base, H)
    ref_hidden: Tensor  # (base, H)
    targets: Tensor  # (base,)
    candidates: Tensor | None  # (base, CANDIDATES): likely tokens; of a model's rows where the op asks for ids


class Reference(NamedTuple):
    """fp64 results of the base rows, (base,) each, from the very operands the providers get.

    The last four are of the tokens that the op keeps, which are all where it says nothing else.
    """

    logprobs: Tensor
    lse: Tensor
    entropy: Tensor
    ref_logprobs: Tensor
    ref_lse: Tensor
    kl: Tensor  # of the policy to the reference
    sampled: Tensor  # the values of an op whose `values` are "sampled"; else the log-probs
    kept_lse: Tensor
    floor: Tensor  # the kept logits lie above, but for the target's
    settled: Tensor  # bool: no rounding of fp32 changes what is kept so that it shows


@dataclass
class Inputs:
    """What every provider gets; the vectors are fp32, (N,)."""

    case: Case
    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H), of the reference too
    ref_hidden: Tensor | None  # (N, H), for the ops that compare with a reference's hidden states
    targets: Tensor  # int64
    mask: Tensor  # bool: completion tokens
    advantages: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor | None  # grpo: None when beta is 0
    upstream: Tensor  # of the values, for the ops without an objective
    ids: Tensor | None = None  # (N, K) int64: the tokens that the op is given of each row

    @property
    def beta(self) -> float:
        return self.case.beta

    @property
    def labels(self) -> Tensor:
        """(N,): targets, -100 outside the mask."""
        return self.targets.masked_fill(~self.mask, -100)

    def sequences(self, rows: Tensor) -> Tensor:
        """(N, ...) -> (B, T, ...)"""
        return rows.view(-1, self.case.T, *rows.shape[1:])

    def shorter(self, length: int) -> Inputs:
        """The same head and sequences, of each the first tokens only."""
        count = self.case.N // self.case.T

        def cut(rows: Tensor | None) -> Tensor | None:
            return None if rows is None else self.sequences(rows.detach())[:, :length].flatten(0, 1)

        case = replace(self.case, N=count * length, T=length, lengths=1)
        of_rows = (
            self.targets,
            self.mask,
            self.advantages,
            self.old_logprobs,
            self.ref_logprobs,
            self.upstream,
            self.ids,
        )
        hidden = cut(self.hidden)
        assert hidden is not None
        return Inputs(case, hidden.requires_grad_(), self.weight, cut(self.ref_hidden), *map(cut, of_rows))  # type: ignore[arg-type]


def base_rows(case: Case, device: str) -> Base:
    return model_rows(case, device) if case.inputs else drawn_rows(case, device)


def model_rows(case: Case, device: str) -> Base:
    """Those of a model. Raises ValueError where the case has another head than the model."""
    from fused_rlhf.bench import real  # transformers is slow to import, and drawn rows do without

    dtype = DTYPES[case.dtype]
    hidden, weight, targets = real.rows(case.inputs, case.data, min(case.N, BASE_ROWS), dtype, device)
    if weight.shape != (case.V, case.H):
        raise ValueError(f"V and H must be those of {case.inputs}, {tuple(weight.shape)}, got {(case.V, case.H)}")
    rng = torch.Generator(device).manual_seed(case.seed)
    noise = torch.randn(hidden.shape, generator=rng, device=device) / weight.float().square().sum(1).mean().sqrt()
    candidates = likely_tokens(hidden, weight) if OPS[case.op].ids else None
    return Base(weight, hidden, (hidden + 0.1 * noise).to(dtype), targets, candidates)


def likely_tokens(hidden: Tensor, weight: Tensor) -> Tensor:
    """(base, CANDIDATES)"""
    return torch.cat([(x @ weight.T).topk(CANDIDATES, dim=1).indices for x in hidden.split(WHOLE_ROWS)])


def drawn_rows(case: Case, device: str) -> Base:
    """The recipe of the module docstring."""
    rng = torch.Generator(device).manual_seed(case.seed)
    randn = partial(torch.randn, generator=rng, device=device)
    rand = partial(torch.rand, generator=rng, device=device)
    base = min(case.N, BASE_ROWS)
    weight = randn(case.V, case.H).mul_(case.H**-0.5)

    kind = rand(base, 1)
    peaked, uncertain = kind < 0.60, (kind >= 0.60) & (kind < 0.85)
    u = rand(base, CANDIDATES)
    logits = torch.where(peaked, 6 + 8 * u, torch.where(uncertain, 22 + 3 * u, 8 + 4 * u))
    logits[:, :1] = torch.where(peaked, 25.0, logits[:, :1])
    wanted = torch.cat([logits, torch.full((base, 4), -25.0, device=device)], 1)
    tokens = torch.randint(case.V, wanted.shape, generator=rng, device=device)
    hidden = torch.zeros(base, case.H, device=device)
    for k in range(wanted.shape[1]):  # one candidate at a time: (base, 12, H) would be large
        row = weight[tokens[:, k]]
        hidden += wanted[:, k : k + 1] * row / row.square().sum(1, keepdim=True)
    gumbel = -(-rand(base, CANDIDATES).clamp_min(1e-9).log()).log()
    targets = tokens.gather(1, (logits + gumbel).argmax(1, keepdim=True)).squeeze(1)
    if case.outliers:
        for channels, size in ((slice(case.outliers), 50.0), (slice(-case.outliers, None), -50.0)):
            hidden[:, channels] = size
            weight[:, channels] = 0.1 + 0.01 * randn(case.V, case.outliers)
    reference = hidden + 0.1 * randn(base, case.H)
    dtype = DTYPES[case.dtype]
    return Base(weight.to(dtype), hidden.to(dtype), reference.to(dtype), targets, tokens[:, :CANDIDATES])


def given_ids(case: Case, base: Base) -> Tensor | None:
    """(base, K): as the module docstring has it; None where the op is given none."""
    op, targets, candidates = OPS[case.op], base.targets[:, None], base.candidates
    if not op.ids:
        return None
    assert candidates is not None
    device, count = targets.device, len(targets)
    rng = torch.Generator(device).manual_seed(case.seed + 3)
    if op.whole:
        some = torch.randint(candidates.shape[1], (count, op.ids // 2), generator=rng, device=device)
        others = torch.randint(case.V, (count, op.ids - op.ids // 2), generator=rng, device=device)
        return torch.cat([candidates.gather(1, some), others], 1)
    first = torch.randint(case.V, (count, 1), generator=rng, device=device)
    spread = (first + case.V // op.ids * torch.arange(op.ids, device=device)) % case.V
    named = torch.cat([targets, candidates, spread], 1)
    repeated = (named[:, :, None] == named[:, None, :]).tril(-1).any(2)
    first_ones = repeated.byte().argsort(dim=1, stable=True)[:, : op.ids]
    return named.gather(1, first_ones)


def blocks(weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows in fp64) of W."""
    for start in range(0, len(weight), COLUMNS):
        yield start, weight[start : start + COLUMNS].double()


class _Running:
    """logsumexp, and means under the softmax, over blocks of columns."""

    def __init__(self, like: Tensor) -> None:
        self.peak = torch.full((len(like),), -torch.inf, dtype=torch.float64, device=like.device)
        self.total = torch.zeros_like(self.peak)
        self.sums: dict[str, Tensor] = {}

    def add(self, z: Tensor, **weighted: Tensor) -> None:
        higher = torch.maximum(self.peak, z.amax(1))
        p = (z - higher[:, None]).exp_()
        shrink = (self.peak - higher).exp()
        self.total = self.total * shrink + p.sum(1)
        for name, values in weighted.items():
            self.sums[name] = self.sums.get(name, torch.zeros_like(shrink)) * shrink + (p * values).sum(1)
        self.peak = higher

    @property
    def lse(self) -> Tensor:
        return self.peak + self.total.log()

    def mean(self, name: str) -> Tensor:
        return self.sums[name] / self.total


def _taken(found: Tensor, z: Tensor, tokens: Tensor, start: int) -> Tensor:
    """(base, K) logits found so far of the tokens (base, K), and those in z, whose columns are from `start` on."""
    inside = tokens - start
    here = (inside >= 0) & (inside < z.shape[1])
    return torch.where(here, z.gather(1, inside.clamp(0, z.shape[1] - 1)), found)


def fp64_reference(case: Case, device: str) -> Reference:
    base = base_rows(case, device)
    x, x_ref = base.hidden.double(), base.ref_hidden.double()
    policy, reference = _Running(x), _Running(x)
    targets, ids = base.targets[:, None], given_ids(case, base)
    at_target, ref_at_target = x.new_zeros(targets.shape), x.new_zeros(targets.shape)
    at_ids = None if ids is None else x.new_zeros(ids.shape)
    for start, w in blocks(base.weight):
        z, z_ref = x @ w.T, x_ref @ w.T
        at_target = _taken(at_target, z, targets, start)
        ref_at_target = _taken(ref_at_target, z_ref, targets, start)
        if ids is not None and at_ids is not None:
            at_ids = _taken(at_ids, z, ids, start)
        policy.add(z, logit=z, gap=z - z_ref)
        reference.add(z_ref)
    target, ref_target = at_target.squeeze(1), ref_at_target.squeeze(1)
    lse, ref_lse = policy.lse, reference.lse
    kept = _Kept(lse, torch.full_like(lse, -torch.inf), torch.ones_like(lse, dtype=torch.bool))
    if case.op == "top_p":
        kept = _nuclei(x, base.weight, lse, target)
    elif at_ids is not None and not OPS[case.op].whole:
        kept = kept._replace(lse=at_ids.logsumexp(1))
    sampled = target - kept.lse
    if at_ids is not None and OPS[case.op].whole:
        sampled += at_ids.mean(1) - lse
    return Reference(
        logprobs=target - lse,
        lse=lse,
        entropy=lse - policy.mean("logit"),
        ref_logprobs=ref_target - ref_lse,
        ref_lse=ref_lse,
        kl=policy.mean("gap") - lse + ref_lse,
        sampled=sampled,
        kept_lse=kept.lse,
        floor=kept.floor,
        settled=kept.settled,
    )


class _Kept(NamedTuple):
    """Of some rows, (n,): see `Reference`."""

    lse: Tensor
    floor: Tensor
    settled: Tensor


def _nuclei(x: Tensor, weight: Tensor, lse: Tensor, target: Tensor) -> _Kept:
    """x (base, H) in fp64; lse and the target's logit (base,)."""
    parts = []
    for some in torch.arange(len(x), device=x.device).split(WHOLE_ROWS):
        z = x.new_empty(len(some), len(weight))
        for start, w in blocks(weight):
            z[:, start : start + len(w)] = x[some] @ w.T
        parts.append(_nucleus(z.sort(1, descending=True).values, lse[some], target[some]))
    return _Kept(*map(torch.cat, zip(*parts)))


def _nucleus(z: Tensor, lse: Tensor, target: Tensor) -> _Kept:
    """Of (n, V) logits in descending order: the likeliest tokens, those before which less than TOP_P of the mass lies, and the
    target."""
    upto = (z - lse[:, None]).exp_().cumsum(1)
    before = torch.nn.functional.pad(upto, (1, -1))

    def last(mass: float) -> Tensor:
        return (before < mass).sum(1, keepdim=True) - 1

    end = last(TOP_P)
    dropped = torch.nn.functional.pad(z, (0, 1), value=-torch.inf).gather(1, end + 1)
    floor = ((z.gather(1, end) + dropped) / 2).squeeze(1)
    kept_lse = lse + upto.gather(1, end).squeeze(1).log()
    settled = torch.ones_like(floor, dtype=torch.bool)
    for mass, limit in ROUNDING.items():
        least, most = (upto.gather(1, last(TOP_P + sign * mass)).squeeze(1) for sign in (-1, 1))
        settled &= (most / least).log() < limit
    return _Kept(torch.where(target < floor, torch.logaddexp(kept_lse, target), kept_lse), floor, settled)


def order(case: Case, device: str) -> Tensor:
    """(N,): which base row each row is; the first ones in order, then at random, so that no two sequences are alike."""
    base = min(case.N, BASE_ROWS)
    rng = torch.Generator(device).manual_seed(case.seed + 2)
    rest = torch.randint(base, (case.N - base,), generator=rng, device=device)
    return torch.cat([torch.arange(base, device=device), rest])


def completion_mask(case: Case, device: str) -> Tensor:
    """(N,) bool: sequences between half and one and a half times the mean length, from the first token on."""
    count = case.N // case.T
    longest = min(1.5, 1 / case.density)
    spread = torch.linspace(2 - longest, longest, count) if count > 1 else torch.ones(1)
    lengths = (case.density * case.T * spread).round().clamp(min=1)
    return (torch.arange(case.T) < lengths[:, None]).flatten().to(device)


def build(case: Case, device: str, reference: Reference) -> Inputs:
    """Old log-probs are the exact ones plus noise; so are grpo's of the reference, dpo's come from its hidden states."""
    base = base_rows(case, device)
    index, ids = order(case, device), given_ids(case, base)
    rng = torch.Generator(device).manual_seed(case.seed + 1)
    noise = partial(torch.randn, generator=rng, device=device)
    exact = reference.logprobs[index].float()
    per_sequence = noise(case.N // case.T).repeat_interleave(case.T)
    advantages = noise(case.N) if case.op == "ppo" else per_sequence
    upstream = noise(case.N) / case.N
    silent = torch.randperm(case.N, generator=rng, device=device)[: round(case.zero_rows * case.N)]
    advantages[silent] = upstream[silent] = 0.0
    mask = completion_mask(case, device)
    old_logprobs = exact + 0.1 * noise(case.N)  # off-policy: some of the tokens are clipped
    ref_logprobs = None
    if case.op == "dpo":
        ref_logprobs = reference.ref_logprobs[index].float()
    elif case.op == "grpo" and case.beta:
        ref_logprobs = exact + 0.1 * noise(case.N)
    return Inputs(
        case,
        hidden=base.hidden[index].requires_grad_(),
        weight=(base.weight.float() if case.masters else base.weight).requires_grad_(not case.frozen_head),
        ref_hidden=base.ref_hidden[index] if case.op in ("kl", "dpo") else None,
        targets=base.targets[index],
        mask=mask,
        advantages=advantages,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        upstream=upstream.masked_fill(~mask | ~reference.settled[index], 0.0),
        ids=None if ids is None else ids[index],
    )

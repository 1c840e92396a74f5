"""Any head, any batch, any layout, any objective: what the public functions give is what dense formulas give in fp64.

300 examples of each property, the same ones in every run; HYPOTHESIS_EXAMPLES asks for another number, at random then.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fused_rlhf as fr
from tests import dense_losses
from tests.dense_losses import entropy_of, log_probabilities

EXAMPLES = os.environ.get("HYPOTHESIS_EXAMPLES")
PROPERTY = settings(
    max_examples=int(EXAMPLES or 300),
    derandomize=EXAMPLES is None,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
BACKENDS = st.sampled_from(["chunked", "reference"])
PAIRED = [n for n, loss in fr.preferences.PREFERENCES.items() if loss.paired and not n.startswith("aot")]


class Batch:
    """Sequences of tokens in one of four layouts, a head, and per-token numbers; operands are rounded to `dtype`."""

    def __init__(self, draw: Any, even: bool = False) -> None:
        self.g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        self.dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
        self.layout = draw(st.sampled_from(["padded", "left", "packed", "gaps"]))
        pairs = draw(st.integers(1, 2 if even else 4))
        lengths = [draw(st.integers(0, 5)) for _ in range(2 * pairs if even else pairs)]
        self.H, self.V = draw(st.integers(1, 6)), draw(st.integers(1, 40))
        self.head: dict[str, Any] = {
            "weight": self.randn(self.V, self.H),
            "bias": self.randn(self.V) if draw(st.booleans()) else None,
            "logit_scale": draw(st.sampled_from([1.0, 0.3, -0.7])),
            "softcap": draw(st.sampled_from([None, 2.0, 30.0])),
        }
        width = max([*lengths, 1])
        if self.layout == "packed":
            self.shape: tuple[int, ...] = (sum(lengths),)
            self.offsets: Tensor | None = torch.tensor([0, *lengths]).cumsum(0)
            starts = self.offsets[:-1].tolist()
            self.sequences = [list(range(a, a + n)) for a, n in zip(starts, lengths)]
        else:
            self.shape, self.offsets = (len(lengths), width), None
            shift = [width - n if self.layout == "left" else 0 for n in lengths]
            self.sequences = [
                list(range(i * width + s, i * width + s + n)) for i, (s, n) in enumerate(zip(shift, lengths))
            ]
        if self.layout == "gaps":  # tool tokens between those of the completion
            self.sequences = [[t for t in s if draw(st.integers(0, 3))] for s in self.sequences]
        self.n = int(torch.tensor(self.shape).prod())
        self.hidden = self.randn(*self.shape, self.H)
        self.targets = torch.randint(self.V, self.shape, generator=self.g)
        self.mask = torch.zeros(self.n, dtype=torch.bool)
        self.mask[[t for s in self.sequences for t in s]] = True
        self.mask = self.mask.view(self.shape)
        self.hidden[~self.mask] = torch.nan  # what is left out may hold anything
        self.temperature = draw(st.sampled_from([1.0, 0.7, "per token"]))
        if self.temperature == "per token":
            self.temperature = torch.rand(self.shape, generator=self.g, dtype=torch.float64) + 0.5

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.g, dtype=torch.float64).to(self.dtype)

    def near(self, lp: Tensor, scale: float) -> Tensor:
        """(shape) numbers beside the log-probs, in fp64."""
        return lp.view(self.shape) + scale * torch.randn(self.shape, generator=self.g, dtype=torch.float64)

    def leaves(self, wide: bool) -> dict[str, Any]:
        """hidden, weight and bias that take gradients; in fp64 with NaN-free rows for the dense statement."""
        hidden = self.hidden.double().nan_to_num(0.0) if wide else self.hidden.clone()
        head = {k: v.double() if wide and isinstance(v, Tensor) else v for k, v in self.head.items()}
        found = {"hidden": hidden, **head}
        for name in ("hidden", "weight", "bias"):
            if found[name] is not None:
                found[name] = found[name].clone().requires_grad_()
        return found

    def dense(self, leaves: dict[str, Any]) -> Tensor:
        """(N, V) log-probabilities in fp64."""
        temperature = self.temperature.reshape(-1) if isinstance(self.temperature, Tensor) else self.temperature
        return log_probabilities(leaves, leaves["hidden"].reshape(-1, self.H), temperature)

    def lp(self, log_p: Tensor) -> Tensor:
        return log_p.gather(1, self.targets.reshape(-1, 1))[:, 0]

    @property
    def known(self) -> dict[str, Any]:
        """Keywords of the losses that say the layout."""
        more = {} if self.offsets is None else {"cu_seqlens": self.offsets}
        return {"completion_mask": self.mask, "temperature": self.temperature, **more}


def agree(
    batch: Batch, ours: dict[str, Any], found: Tensor, dense: dict[str, Any], true: Tensor, steep: float = 1.0
) -> None:
    """Value and gradients, to a few roundings of the operands' dtype; `steep`: how much a loss magnifies them."""
    eps = max(torch.finfo(batch.dtype).eps, 1e-12)
    logits = 1e-5 if batch.dtype != torch.float64 else 1e-12
    size = max(1.0, true.detach().abs().max().item() if true.numel() else 1.0)
    assert (found.double() - true).abs().max().item() <= 30 * steep * logits * size if found.numel() else True
    names = [name for name in ("hidden", "weight", "bias") if ours[name] is not None]
    upstream = torch.linspace(1.0, 2.0, max(true.numel(), 1), dtype=torch.float64)[: true.numel()].view(true.shape)
    mine = torch.autograd.grad(found, [ours[n] for n in names], upstream.to(found.dtype), allow_unused=True)
    exact = torch.autograd.grad(true, [dense[n] for n in names], upstream, allow_unused=True)
    for a, b in zip(mine, exact):
        a, b = (torch.zeros(()) if g is None else g.double() for g in (a, b))
        scale = b.abs().max().item() if b.numel() else 0.0
        assert not a.isnan().any()
        assert ((a - b).abs().max().item() if a.numel() else 0.0) <= 40 * steep * eps * scale + 1e-6 * steep


@PROPERTY
@given(st.data())
def test_logprobs(data: st.DataObject) -> None:
    batch, backend = Batch(data.draw), data.draw(BACKENDS)
    outputs = tuple(
        data.draw(st.sets(st.sampled_from(["entropy", "lse", "sum_sq", "mean_logit", "is_top1", "margin"])))
    )
    ours, dense = batch.leaves(False), batch.leaves(True)
    targets = batch.targets.masked_fill(~batch.mask, -100)
    found = fr.linear_logprobs(
        ours["hidden"],
        fr.Head(ours["weight"], ours["bias"], ours["logit_scale"], ours["softcap"]),
        targets,
        temperature=batch.temperature,
        outputs=outputs,
        backend=backend,
    )
    log_p, live = batch.dense(dense), batch.mask.reshape(-1)
    z_lse = {"logprobs": batch.lp(log_p)}
    if "entropy" in outputs:
        z_lse["entropy"] = entropy_of(log_p)
    total, expected = (
        sum(weight * values.reshape(-1)[live].sum() for weight, values in zip((1.0, 0.3), some))
        for some in ((getattr(found, name).double() for name in z_lse), z_lse.values())
    )
    for name in ("logprobs", *outputs):
        value = getattr(found, name)
        assert value.shape == batch.shape
        assert (value.reshape(-1)[~live] == 0).all()
    if "sum_sq" in outputs:
        assert (found.sum_sq.reshape(-1)[live].double() - log_p.exp().square().sum(-1)[live]).abs().le(1e-4).all()
    if "is_top1" in outputs and batch.dtype == torch.float64:
        assert torch.equal(found.is_top1.reshape(-1)[live], (log_p.argmax(-1) == batch.targets.reshape(-1))[live])
    if "margin" in outputs and batch.V > 1:
        top = log_p.topk(2, -1).values
        assert (found.margin.reshape(-1)[live].double() - (top[:, 0] - top[:, 1])[live]).abs().le(1e-3).all()
    agree(batch, ours, total, dense, expected, steep=max(1, int(live.sum())))


SURROGATES = {
    "ppo_clip": st.fixed_dictionaries(
        {},
        optional={
            "epsilon_low": st.sampled_from([0.1, 0.4]),
            "epsilon_high": st.sampled_from([0.1, 0.5]),
            "delta": st.sampled_from([1.05, 2.0]),
            "dual_clip": st.sampled_from([1.5, 3.0]),
        },
    ),
    "cispo": st.fixed_dictionaries({}, optional={"ratio_max": st.sampled_from([1.1, 2.0]), "ratio_min": st.just(0.9)}),
    "sapo": st.fixed_dictionaries({}, optional={"tau_pos": st.just(2.0), "tau_neg": st.just(0.5)}),
    "reinforce": st.just({}),
}


@PROPERTY
@given(st.data())
def test_policies(data: st.DataObject) -> None:
    batch, backend, draw = Batch(data.draw), data.draw(BACKENDS), data.draw
    name = draw(st.sampled_from(sorted(SURROGATES)))
    o: dict[str, Any] = {
        "surrogate": name,
        "options": draw(SURROGATES[name]),
        "token_weight": draw(st.sampled_from(["sequence_mean", "token_mean", "sequence_sum", "fixed_length"])),
        "level": draw(st.sampled_from(["token", "sequence", "sequence_sum", "sequence_token"])),
        "kl": draw(st.sampled_from(["k1", "k2", "k3", "k3+"])),
        "beta": draw(st.sampled_from([0.0, 0.1])),
        "entropy_coef": draw(st.sampled_from([0.0, 0.05])),
    }
    fixed = {"max_completion_length": 7} if o["token_weight"] == "fixed_length" else {}
    objective = fr.PolicyLoss(**{**o, "options": o["options"] | fixed})
    ours, dense = batch.leaves(False), batch.leaves(True)
    log_p = batch.dense(dense)
    lp = batch.lp(log_p)
    old = batch.near(lp.detach(), 0.1) if draw(st.booleans()) else None
    ref = batch.near(lp.detach(), 0.3) if o["beta"] else None
    per_sequence = draw(st.booleans())
    count = len(batch.sequences)
    values = torch.randn(count, generator=batch.g, dtype=torch.float64)
    advantages = torch.zeros(batch.n, dtype=torch.float64)
    for i, s in enumerate(batch.sequences):
        advantages[s] = values[i] if per_sequence else torch.randn(len(s), generator=batch.g, dtype=torch.float64)
    # A vector that could be either is one for each sequence; then they must be.
    assume(per_sequence or batch.shape != (count,))
    loss, _ = fr.linear_policy_loss(
        ours["hidden"],
        fr.Head(ours["weight"], ours["bias"], ours["logit_scale"], ours["softcap"]),
        batch.targets,
        advantages=values if per_sequence else advantages.view(batch.shape),
        objective=objective,
        old_logprobs=old,
        ref_logprobs=ref,
        backend=backend,
        mode=draw(st.sampled_from(["auto", "two_phase"])),
        **batch.known,
    )
    flat_old, flat_ref = (None if t is None else t.reshape(-1) for t in (old, ref))
    true = dense_losses.policy(lp, entropy_of(log_p), batch.sequences, advantages, flat_old, flat_ref, o)
    # At a kink of the clip the two sides may differ by a rounding: values only, unless the operands are fp64.
    steep = 1.0 if batch.dtype == torch.float64 else 1e3 if name == "ppo_clip" else 30.0
    if batch.dtype == torch.float64 or name != "ppo_clip":
        agree(batch, ours, loss, dense, true, steep)
    else:
        assert abs(loss.item() - true.item()) <= 1e-3 * max(1.0, abs(true.item()))


@PROPERTY
@given(st.data())
def test_preferences_over_pairs(data: st.DataObject) -> None:
    batch, backend, draw = Batch(data.draw, even=True), data.draw(BACKENDS), data.draw
    name, beta = draw(st.sampled_from(PAIRED)), draw(st.sampled_from([0.1, 0.5, 2.0]))
    assume(batch.V > 1 or name != "orpo")  # a certain token has infinite odds
    takes = "label_smoothing" in str(fr.preferences.PREFERENCES[name].function.__code__.co_varnames)
    options = {"label_smoothing": 0.1} if takes and draw(st.booleans()) else {}
    ours, dense = batch.leaves(False), batch.leaves(True)
    lp = batch.lp(batch.dense(dense))
    reference = fr.preferences.PREFERENCES[name].reference
    ref = batch.near(lp.detach(), 0.3) if reference else None
    assume(name != "orpo" or all(s for s in batch.sequences))  # the mean of no tokens has no odds
    given_ref = ref
    if ref is not None and draw(st.booleans()):  # summed by the caller, of the live tokens
        flat = ref.reshape(-1)
        given_ref = torch.stack([flat[s].sum() for s in batch.sequences])
    elif ref is not None:
        assume(batch.shape != (len(batch.sequences),))
    loss, _ = fr.linear_preference_loss(
        ours["hidden"],
        fr.Head(ours["weight"], ours["bias"], ours["logit_scale"], ours["softcap"]),
        batch.targets,
        objective=fr.PreferenceLoss((name,), beta=beta, options=options),
        ref_logprobs=given_ref,
        backend=backend,
        **batch.known,
    )
    flat_ref = None if ref is None else ref.reshape(-1)
    true = dense_losses.preference(name, lp, batch.sequences, flat_ref, beta, options)
    smooth = name not in ("hinge",) or batch.dtype == torch.float64
    if smooth:
        agree(batch, ours, loss, dense, true, 1.0 if batch.dtype == torch.float64 else 1e2)
    else:
        assert abs(loss.item() - true.item()) <= 1e-3 * max(1.0, abs(true.item()))


@PROPERTY
@given(st.data())
def test_kto(data: st.DataObject) -> None:
    batch, backend, draw = Batch(data.draw), data.draw(BACKENDS), data.draw
    ours, dense = batch.leaves(False), batch.leaves(True)
    lp = batch.lp(batch.dense(dense))
    assume(batch.shape != (len(batch.sequences),))
    ref = batch.near(lp.detach(), 0.3)
    labels = [draw(st.booleans()) for _ in batch.sequences]
    kl = draw(st.sampled_from([None, 0.0, 0.7]))
    loss, _ = fr.linear_preference_loss(
        ours["hidden"],
        fr.Head(ours["weight"], ours["bias"], ours["logit_scale"], ours["softcap"]),
        batch.targets,
        objective=fr.KTO(beta=0.4),
        labels=torch.tensor(labels),
        kl=None if kl is None else torch.tensor(kl, dtype=torch.float64),
        ref_logprobs=ref,
        backend=backend,
        **batch.known,
    )
    true = dense_losses.kto(lp, batch.sequences, ref.reshape(-1), labels, 0.4, kl or 0.0)
    agree(batch, ours, loss, dense, true, 1.0 if batch.dtype == torch.float64 else 1e2)


@PROPERTY
@given(st.data())
def test_divergences(data: st.DataObject) -> None:
    batch, backend, draw = Batch(data.draw), data.draw(BACKENDS), data.draw
    kind: Any = draw(st.sampled_from(["forward", "reverse", "jsd"]))
    beta = draw(st.sampled_from([0.2, 0.5])) if kind == "jsd" else 0.5
    ours, dense = batch.leaves(False), batch.leaves(True)
    width = draw(st.integers(1, 5))
    ref_hidden, ref_weight = batch.randn(*batch.shape, width), batch.randn(batch.V, width)
    value = fr.linear_kl(
        ours["hidden"],
        fr.Head(ours["weight"], ours["bias"], ours["logit_scale"], ours["softcap"]),
        ref_hidden,
        ref_weight,
        kind,
        mask=batch.mask,
        temperature=batch.temperature,
        beta=beta,
        backend=backend,
    )
    plain = {"weight": ref_weight.double(), "bias": None, "logit_scale": 1.0, "softcap": None}
    temperature = batch.temperature.reshape(-1) if isinstance(batch.temperature, Tensor) else batch.temperature
    log_q = log_probabilities(plain, ref_hidden.double().reshape(-1, width), temperature)
    true = dense_losses.divergence(kind, batch.dense(dense), log_q, beta)
    live = batch.mask.reshape(-1)
    assert (value.reshape(-1)[~live] == 0).all()
    steep = 1.0 if batch.dtype == torch.float64 else 1e2
    agree(batch, ours, value.reshape(-1)[live], dense, true[live], steep)

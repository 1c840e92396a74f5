"""Direct preference optimisation: learning from pairs of completions, one chosen over the other.

A step takes a batch of pairs and one update on an objective of `fused_rlhf.preferences`, by default DPO's
(arXiv:2305.18290),

    loss = -mean over pairs of  log sigmoid(beta (lr_chosen - lr_rejected)),     lr = log pi - log ref of a completion

Chosen and rejected go through the model together. The reference is the model that the steps begin with (with LoRA, the
model without its adapters), another model, or numbers: those in the data, or taken once for all pairs. Policy and
reference log-probs come from one op, which never holds the logits. In Python:
`train(Config(model="Qwen/Qwen3-0.6B", data="pairs.jsonl"))`.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

import fused_rlhf as fr
from fused_rlhf.segments import Sequences
from fused_rlhf.trainers import data, engine, loop, pairs, planning, rollout
from fused_rlhf.trainers import model as models
from fused_rlhf.trainers.bpe import bpe_tokenizer
from fused_rlhf.trainers.config import require
from fused_rlhf.trainers.data import Sample
from fused_rlhf.trainers.dpo_config import SORTED, Config
from fused_rlhf.trainers.engine import Engine, Placed
from fused_rlhf.trainers.inputs import Encoded
from fused_rlhf.trainers.loop import Controller, Metrics, Result, Run, Verbs
from fused_rlhf.trainers.pairs import Batch, Encoder, Pair, Preference, Preferences

__all__ = ["Config", "Result", "State", "fit", "plan", "prepare", "train"]

SHOWN = ("loss", "rewards/margins", "rewards/accuracies", "eval_rewards/margins", "eval_rewards/accuracies")
PLOTTED = (
    "loss",
    "eval_loss",
    "rewards/margins",
    "eval_rewards/margins",
    "rewards/accuracies",
    "eval_rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "grad_norm",
)
SAMPLES = 4
PROBE = 2  # pairs


@dataclass
class State:
    """What the steps of a run share."""

    config: Config
    preferences: Preferences
    train: list[Pair]
    test: list[Pair]
    loaded: models.Loaded
    encoder: Encoder
    engine: Engine
    reference: Placed | None  # None where it is the model itself, numbers, or not needed
    own_reference: bool  # the reference is the model as the steps begin with
    run: Run


@dataclass(frozen=True)
class Totals:
    """Counts over the pairs of all micro-batches and processes, which turn means into shares of one mean."""

    pairs: int
    chosen: int  # tokens of completions
    rejected: int

    @staticmethod
    def of(some: Sequence[Pair]) -> Totals:
        return Totals(len(some), sum(len(pair.chosen) for pair in some), sum(len(pair.rejected) for pair in some))


def train(
    config: Config,
    *,
    rows: Sequence[Sample] | None = None,
    test_rows: Sequence[Sample] = (),
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    ref_model: PreTrainedModel | None = None,
) -> Result:
    """Run DPO as `config` says; rows of pairs, model and tokenizer, and the reference may be given as objects instead.

    Raises ValueError, TypeError or OSError for bad input before the first step (but what images hold is seen when they
    are used); NonFiniteLoss during the run, with a checkpoint left behind. Ctrl-C leaves the model in `<output>/model`,
    says so, and goes on as KeyboardInterrupt.
    """
    return fit(prepare(config, rows, test_rows, model, tokenizer, ref_model))


def prepare(
    config: Config,
    rows: Sequence[Sample] | None = None,
    test_rows: Sequence[Sample] = (),
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    ref_model: PreTrainedModel | None = None,
) -> State:
    """Load and check everything, so that what can be refused is refused before the first step; writes nothing."""
    accelerator = engine.start(config)
    processes, size = accelerator.num_processes, config.batch_size
    require(size % processes == 0, "batch_size", size, f"a multiple of {processes}, the processes")
    even = config.warmup_steps == 0 or config.warmup_batch_size % processes == 0
    require(even, "warmup_batch_size", config.warmup_batch_size, f"a multiple of {processes}, the processes")
    alone = processes == 1 or not SORTED & set(config.loss_type)
    require(alone, "loss_type", config.loss_type, "another in several processes: it compares all pairs of a batch")
    preferences = load(config, rows, test_rows)
    if model is None and config.model is None:
        model, tokenizer = build(config, preferences.train)
    loaded = models.load_for(config, model, tokenizer)
    context = models.max_positions(loaded.model)
    longest = config.max_length
    fits = longest is None or context is None or longest <= context
    require(fits, "max_length", longest, f"at most the model's context of {context}")
    encoder = Encoder(
        loaded.tokenizer, loaded.processor, context, config.chat_template, config.max_length, config.truncate
    )
    train, test = encoder.pairs(preferences.train), encoder.pairs(preferences.test)
    require(len(train) > 0, "data", config.data, "at least one pair to train on")
    device = accelerator.device
    fr.backends.resolve(config.backend, next(loaded.model.parameters()).to(device))
    frozen = reference_model(config, [*train, *test], loaded, ref_model)
    placed = Engine(config, accelerator, loaded.model, config.steps)
    reference = None if frozen is None else placed.frozen(frozen)
    own = ref_model is None and config.ref_model is None
    state = State(config, preferences, train, test, loaded, encoder, placed, reference, own, Run(placed))
    probe(state)
    return state


def load(config: Config, rows: Sequence[Sample] | None, test_rows: Sequence[Sample]) -> Preferences:
    if rows is None:
        require(config.data is not None, "data", None, f"where the pairs of the task {config.task!r} are read from")
        return pairs.load(config.task, str(config.data), config.num_test, config.seed)
    require(config.data is None, "data", config.data, "none where rows are given")
    train, test = pairs.check(rows, "row"), pairs.check(test_rows, "test row")
    return Preferences(train, test) if test else Preferences(*pairs.hold_out(train, config.num_test, config.seed))


def build(config: Config, train: Sequence[Preference]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The small model, by default over characters."""
    texts = (text for p in train for text in (p.prompt, p.chosen, p.rejected) if isinstance(text, str))
    tokenizer = bpe_tokenizer(texts, config.vocab_size) if config.vocab_size else models.char_tokenizer()
    longest = config.max_length or 1024
    return models.small_model(tokenizer, config.hidden_size, config.num_layers, longest), tokenizer


def reference_model(
    config: Config, all_pairs: Sequence[Pair], loaded: models.Loaded, given: PreTrainedModel | None
) -> PreTrainedModel | None:
    """The model to keep as the reference, None where none must be: numbers are known, or the model itself can serve."""
    own = given is None and config.ref_model is None
    unknown = [pair.where for pair in all_pairs if pair.ref is None]
    if len(unknown) < len(all_pairs):
        require(not unknown, pairs.REFERENCE[0], None, f"a number in every row, or in none, but {unknown[:1]} has none")
        given_twice, there = (config.ref_model, config.precompute_ref), f"where rows hold {pairs.REFERENCE}"
        require(own and not config.precompute_ref, "ref_model, precompute_ref", given_twice, f"none {there}")
        require(config.warmup_steps == 0, "warmup_steps", config.warmup_steps, f"0 {there}")
        return None
    if not config.loss().needs_reference:
        return None
    if own:
        return None if config.lora_r or config.precompute_ref else copy.deepcopy(loaded.model)
    dtype = getattr(torch, config.dtype)
    model: Any = models.load(str(config.ref_model), dtype)[0] if given is None else given
    sizes = [m.get_input_embeddings().num_embeddings for m in (model, models.base_of(loaded.model))]
    require(sizes[0] == sizes[1], "ref_model", sizes[0], f"a vocabulary of {sizes[1]} tokens, as the model has")
    models.prepare_body(config, model)
    return model.eval()


@torch.no_grad()
def probe(state: State) -> None:
    """Raises ValueError where the model cannot do what `config` asks of it, by a forward of a few pairs."""
    config, some = state.config, state.train[:PROBE]
    if config.router_aux_loss_coef:
        found = state.engine(forward, config, assemble(state, some)).aux_loss
        require(found is not None, "router_aux_loss_coef", config.router_aux_loss_coef, "0: the model has no experts")
    if config.packing:
        padded, packed = (state.engine(sums, config, assemble(state, some, packing)) for packing in (False, True))
        half = config.mixed_precision != "no" or config.dtype != "float32"
        equal = torch.allclose(padded, packed, rtol=3e-2 if half else 1e-4)
        require(equal, "packing", True, f"false: {type(state.loaded.model).__name__} mixes the sequences of a row")


def plan(state: State) -> str:
    """What the run would do and need, for `--dry-run`."""
    config = state.config
    return planning.describe(
        state.engine,
        state.loaded,
        reference=state.reference is not None,
        sequences=2 * config.batch_size,
        length=max(length(pair) for pair in state.train),
        updates_per_step=1,
        data=f"{len(state.train)} training and {len(state.test)} test pairs; {state.preferences.note}",
    )


def fit(state: State) -> Result:
    """The run itself: warm-up, evaluation, the steps of DPO, evaluation."""
    config, run, n = state.config, state.run, state.config.batch_size
    run.say(
        f"{state.loaded.model.num_parameters():,} parameters; {len(state.train)} training, {len(state.test)} test pairs"
    )
    if state.preferences.note:
        run.say(state.preferences.note)
    controllers: dict[str, Controller] = {}
    if config.precompute_ref:
        controllers["reference"] = Precomputed(state)
    elif config.warmup_steps and state.own_reference and state.reference:
        controllers["reference"] = state.reference
    verbs = Verbs(
        name="DPO",
        step=partial(step, state),
        evaluate=partial(evaluate, state),
        export=partial(models.save, state.engine, state.loaded),
        shown=SHOWN,
        plotted=PLOTTED,
        describe=describe,
        batch=lambda i: f"pairs {(i - 1) * n} to {i * n - 1} of the shuffled training set",
        warm=partial(warm, state) if config.warmup_steps or config.precompute_ref else None,
        controllers=controllers,
    )
    return loop.fit(run, verbs)


def warm(state: State) -> None:
    """What comes before the steps: supervised ones, and the reference as they leave it."""
    if state.config.warmup_steps:
        supervise(state)
        if state.own_reference and state.reference:
            engine.copy_parameters(state.engine.module, state.reference.module)
    if state.config.precompute_ref:
        for some in (state.train, state.test):
            precompute(state, some)
        state.reference = None


def supervise(state: State) -> None:
    """Supervised steps on the completions, the learning rate falling to 0 at their end.

    Chosen and rejected alike: had it seen one side alone, the reference would know one of each training pair by heart.
    """
    config, n = state.config, state.config.warmup_batch_size
    ramp = max(min(50, config.warmup_steps // 4), 1)
    apart = state.engine.apart(
        config.warmup_learning_rate, lambda update: min((update + 1) / ramp, 1 - update / config.warmup_steps)
    )
    for number in state.run.steps(config.warmup_steps, "warm-up"):
        some = data.batch_at(state.train, config.seed, (number - 1) * n, n)
        totals = Totals.of(some)
        metrics = apart.update(
            supervised_loss, [(config, assemble(state, own), totals) for own, _ in rounds(state, some)]
        )
        state.run.log("warmup", number, {"loss": metrics["loss"]}, show=("loss",))


def supervised_loss(model: Any, config: Config, batch: Batch, totals: Totals) -> tuple[Tensor, dict[str, Tensor]]:
    """The share of a micro-batch in minus the mean log-prob of all the tokens counted."""
    return -logprobs(model, config, batch).sum() / (totals.chosen + totals.rejected), {}


class Precomputed:
    """The reference's log-probs of all pairs: a resumed run takes them from its checkpoint."""

    def __init__(self, state: State) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return {"sums": [pair.ref for pair in (*self.state.train, *self.state.test)]}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        for pair, ref in zip((*self.state.train, *self.state.test), saved["sums"], strict=True):
            pair.ref = ref
        self.state.reference = None


def precompute(state: State, some: Sequence[Pair]) -> None:
    for own, _ in rounds(state, some):
        values = reference_sums(state, assemble(state, own)).view(2, -1).T.tolist()
        for pair, (chosen, rejected) in zip(own, values, strict=True):
            pair.ref = chosen, rejected
    everyone = state.engine.gather([pair.ref for pair in state.engine.mine(some)])
    for pair, ref in zip(some, everyone, strict=True):
        pair.ref = ref


def step(state: State, number: int) -> Metrics:
    """One update."""
    config, n = state.config, state.config.batch_size
    some = data.batch_at(state.train, config.seed, (number - 1) * n, n)
    totals = Totals.of(some)
    pieces = [(config, with_reference(state, assemble(state, own)), totals) for own, _ in rounds(state, some)]
    metrics = state.engine.update(preference_loss, pieces)
    metrics["num_tokens"] += next((r["num_tokens"] for r in reversed(state.run.metrics) if "num_tokens" in r), 0)
    if config.sample_steps and (number == 1 or number % config.sample_steps == 0):
        show_samples(state, number)
    return metrics


def rounds(state: State, some: Sequence[Pair]) -> Iterator[tuple[list[Pair], bool]]:
    """This process's share of some pairs by micro-batches, those of a length together.

    As many on every process: False marks one that is there for its calls alone, which all must make.
    """
    own = sorted(state.engine.mine(some), key=length)
    most = math.ceil(len(some) / state.engine.world)
    for rows in rollout.slices(slice(0, most), state.config.micro_batch_size // 2):
        yield own[rows] or list(some[:1]), bool(own[rows])


def length(pair: Pair) -> int:
    return len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))


def assemble(state: State, own: Sequence[Pair], packing: bool | None = None) -> Batch:
    packing = state.config.packing if packing is None else packing
    whole = [state.encoder.with_images(pair) for pair in own]
    return pairs.collate(whole, int(state.loaded.tokenizer.pad_token_id), packing).to(state.engine.device)


def with_reference(state: State, batch: Batch) -> Batch:
    """The batch with the reference's log-probs, unless it has them or they are not needed."""
    if batch.ref_logprobs is not None or not state.config.loss().needs_reference:
        return batch
    return replace(batch, ref_logprobs=reference_sums(state, batch))


@torch.no_grad()
def reference_sums(state: State, batch: Batch) -> Tensor:
    """(S,) summed log-probs of the completions under the reference."""
    adapters = state.config.lora_r > 0 and state.reference is None
    with models.without_adapters(state.loaded.model) if adapters else nullcontext():
        return (state.reference or state.engine)(sums, state.config, batch)


def sums(model: Any, config: Config, batch: Batch) -> Tensor:
    """(S,) log-probs of the completions, summed as the objective does it."""
    values, S = logprobs(model, config, batch), len(batch.lengths)
    sequences = Sequences.of(torch.arange(S, device=values.device).repeat_interleave(batch.lengths), S)
    bound = config.loss().bind(
        sequences=sequences,
        ref_logprobs=values,
        ref_sums=None,
        labels=None,
        kl=None,
        num_pairs=1,
        num_tokens=1,
        dtype=values.dtype,
    )
    assert bound.ref_sums is not None
    return bound.ref_sums


def logprobs(model: Any, config: Config, batch: Batch) -> Tensor:
    """(N,) those of the completions' tokens, one sequence after the other."""
    out = fr.lm_head.logprobs(
        model, batch.input_ids, completion_mask=batch.completion_mask, backend=config.backend, **batch.model_inputs
    )
    return out.logprobs[batch.completion_mask[:, 1:]]


def forward(model: Any, config: Config, batch: Batch) -> fr.lm_head.HeadInputs:
    more: dict[str, Any] = {"output_router_logits": True} if config.router_aux_loss_coef else {}
    return fr.lm_head.forward(model, batch.input_ids, **batch.model_inputs, **more)


def preference_loss(model: Any, config: Config, batch: Batch, totals: Totals) -> tuple[Tensor, dict[str, Tensor]]:
    """The share of a micro-batch in the loss and in the metrics of all the pairs counted."""
    objective, inputs = config.loss(), forward(model, config, batch)
    hidden, targets, mask = inputs.hidden[:, :-1], batch.input_ids[:, 1:], batch.completion_mask[:, 1:]
    if batch.cu_seqlens is not None:
        hidden, targets, mask = hidden[0], targets[0], mask[0]
    loss, means = fr.linear_preference_loss(
        hidden,
        inputs.head.weight,
        targets,
        objective=objective,
        completion_mask=mask,
        ref_logprobs=batch.ref_logprobs if objective.needs_reference else None,
        cu_seqlens=batch.cu_seqlens,
        num_pairs=totals.pairs,
        num_tokens=totals.chosen,
        outputs=("entropy", "mean_logit", "is_top1"),
        backend=config.backend,
        **inputs.head.kwargs(),
    )
    of_pairs = batch.num_pairs / totals.pairs
    if inputs.aux_loss is not None:
        means["aux_loss"] = inputs.aux_loss
        loss = loss + config.router_aux_loss_coef * of_pairs * inputs.aux_loss
    chosen, rejected = (half.sum() for half in batch.lengths.chunk(2))
    of_chosen, of_rejected = chosen / totals.chosen, rejected / totals.rejected
    of_tokens = dict.fromkeys(("nll", "mean_token_accuracy", "logits/chosen"), of_chosen)
    of_tokens |= {"logits/rejected": of_rejected, "entropy": (chosen + rejected) / (totals.chosen + totals.rejected)}
    metrics = {name: value * of_tokens.get(name, of_pairs) for name, value in means.items()}
    return loss, metrics | {"num_tokens": torch.full_like(of_chosen, batch.num_tokens)}


@torch.no_grad()
def evaluate(state: State) -> Metrics:
    """Loss and metrics on the first `eval_samples` test pairs."""
    some = state.test[: state.config.eval_samples or None]
    totals, found = Totals.of(some), defaultdict(list)
    for own, counts in rounds(state, some):
        batch = with_reference(state, assemble(state, own))
        loss, metrics = state.engine(preference_loss, state.config, batch, totals)
        for name, value in (metrics | {"loss": loss}).items():
            found[f"eval_{name}"].append(value * counts)
    found.pop("eval_num_tokens", None)
    values = state.engine.sum(torch.stack([torch.stack(column).sum() for column in found.values()])) if found else ()
    return dict(zip(found, map(float, values), strict=True))


def describe(metrics: Metrics) -> str:
    if not metrics:
        return "no pairs are held out"
    margin, accuracy = metrics["eval_rewards/margins"], metrics["eval_rewards/accuracies"]
    ties = " (a policy that is its own reference prefers none)" if margin == 0 else ""
    return (
        f"held-out reward margin {margin:.4f}, accuracy {100 * accuracy:.1f} %{ties}, loss {metrics['eval_loss']:.4f}"
    )


def show_samples(state: State, number: int) -> None:
    """Greedy completions of a few prompts, beside the pairs' own."""
    tokenizer = state.loaded.tokenizer
    some = [state.encoder.with_images(pair) for pair in (state.test or state.train)[:SAMPLES]]
    room = min((state.encoder.context or math.inf) - len(pair.prompt) for pair in some)
    if room < 1:
        return
    with state.engine.whole():
        found = rollout.generate(
            state.loaded.model,
            tokenizer,
            [Encoded(pair.prompt, pair.extras) for pair in some],
            max_new_tokens=int(min(room, state.config.sample_tokens)),
        )
    chosen, rejected = (
        tokenizer.batch_decode(column, skip_special_tokens=True)
        for column in ([pair.chosen for pair in some], [pair.rejected for pair in some])
    )
    rows = zip((pair.text for pair in some), found.texts, chosen, rejected)
    names = ("prompt", "completion", "chosen", "rejected")
    state.run.samples(number, [dict(zip(names, row)) for row in rows], show=1)

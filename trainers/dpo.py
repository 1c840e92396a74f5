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

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

import fused_rlhf as fr
from fused_rlhf.objectives import reductions
from fused_rlhf.objectives.reductions import Metrics
from fused_rlhf.preferences import PreferenceLoss
from fused_rlhf.trainers import data, engine, pair_rows, pairs, rollout, warmup
from fused_rlhf.trainers import model as models
from fused_rlhf.trainers.bpe import bpe_tokenizer
from fused_rlhf.trainers.collation import ready
from fused_rlhf.trainers.config import require
from fused_rlhf.trainers.data import Sample
from fused_rlhf.trainers.dpo_config import Config
from fused_rlhf.trainers.dpo_reference import Precomputed, logprobs, reference_model, sums
from fused_rlhf.trainers.engine import shared
from fused_rlhf.trainers.inputs import Encoded
from fused_rlhf.trainers.layout import Layout, tokens_in
from fused_rlhf.trainers.layout_trial import check_budget, settled
from fused_rlhf.trainers.minibatches import balanced, counted, split
from fused_rlhf.trainers.pair_rows import Preference
from fused_rlhf.trainers.pairs import Encoder, Pair, PairBatch, Totals
from fused_rlhf.trainers.planning import Workload
from fused_rlhf.trainers.run import Logged, Run
from fused_rlhf.trainers.trainer import Controller, Result, Trainer, fit, place, plan

__all__ = ["Config", "DPOTrainer", "Result", "fit", "plan", "prepare", "train"]

SAMPLES = 4
PROBE = 2  # pairs


@dataclass(kw_only=True)
class DPOTrainer(Trainer):
    """DPO's data and verbs. It keeps no reference where that is numbers, or not needed."""

    config: Config
    train: list[Pair]
    test: list[Pair]
    encoder: Encoder

    name = "DPO"
    shown = ("loss", "rewards/margins", "rewards/accuracies", "eval_rewards/margins", "eval_rewards/accuracies")
    plotted = (
        *("loss", "eval_loss", "rewards/margins", "eval_rewards/margins"),
        *("rewards/accuracies", "eval_rewards/accuracies", "logps/chosen", "logps/rejected", "entropy", "grad_norm"),
    )

    def objective(self) -> PreferenceLoss:
        return self.config.loss()

    def supervise(self) -> None:
        """On the completions, the learning rate falling to 0 at the end.

        Chosen and rejected alike: had it seen one side alone, the reference would know one of each training pair by
        heart.
        """

        def pieces(number: int) -> list[tuple[Any, ...]]:
            some, totals = taken(self, number, self.config.warmup_batch_size)
            return [(self.config, assemble(self, own), totals, live) for own, live in rounds(self, some)]

        warmup.supervise(self.run, completion_loss, pieces, decay=True)

    def warm(self) -> bool:
        warmed = super().warm()
        if self.config.precompute_ref:
            for some in (self.train, self.test):
                precompute(self, some)
            self.reference = None
        return warmed or self.config.precompute_ref

    def controllers(self) -> dict[str, Controller]:
        return {"reference": Precomputed(self)} if self.config.precompute_ref else super().controllers()

    def step(self, number: int) -> Logged:
        """One update."""
        some, totals = taken(self, number, self.config.batch_size)
        pieces = [
            (self.config, with_reference(self, assemble(self, own)), totals, live) for own, live in rounds(self, some)
        ]
        metrics = self.engine.update(preference_loss, pieces)
        metrics["num_tokens"] += next((r["num_tokens"] for r in reversed(self.run.metrics) if "num_tokens" in r), 0)
        if self.samples_due(number):
            show_samples(self, number)
        return metrics

    @torch.no_grad()
    def evaluate(self) -> Logged:
        """Loss and metrics."""
        some, parts = self.test[: self.config.eval_samples or None], []
        totals = Totals.of(some)
        for own, live in rounds(self, some):
            batch = with_reference(self, assemble(self, own))
            loss, metrics = self.engine.measure(preference_loss, self.config, batch, totals, live)
            parts.append(Metrics(metrics.parts | {"loss": reductions.total(loss)}))
        found = self.engine.combine(parts)
        return {f"eval_{name}": value for name, value in found.items() if name != "num_tokens"}

    def describe(self, metrics: Logged) -> str:
        if not metrics:
            return "no pairs are held out"
        margin, accuracy = metrics["eval_rewards/margins"], 100 * metrics["eval_rewards/accuracies"]
        ties = " (a policy that is its own reference prefers none)" if margin == 0 else ""
        return f"held-out reward margin {margin:.4f}, accuracy {accuracy:.1f} %{ties}, loss {metrics['eval_loss']:.4f}"


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
) -> DPOTrainer:
    """Load and check everything, so that what can be refused is refused before the first step; writes nothing."""
    accelerator = engine.start(config)
    processes, size = accelerator.num_processes, config.batch_size
    require(size % processes == 0, "batch_size", size, f"a multiple of {processes}, the processes")
    alone = processes == 1 or not config.compares_pairs
    require(alone, "loss_type", config.loss_type, "another in several processes: it compares all pairs of a batch")
    if rows is not None:
        rows, test_rows = list(rows), list(test_rows)
    preferences = pair_rows.load_for(config, rows, test_rows)
    if model is None and config.model is None:
        models.require_chosen(config)
        sizes = config.hidden_size, config.num_layers
        looks = any(p.images for p in preferences.train)
        model, tokenizer = models.build(*sizes, looks) if looks else build(config, preferences.train)
    loaded = models.load_for(config, model, tokenizer)
    context = models.max_positions(loaded.model)
    limit, template = config.max_length, config.chat_template
    fits = limit is None or context is None or limit <= context
    require(fits, "max_length", limit, f"at most the model's context of {context}")
    encoder = Encoder(loaded.tokenizer, loaded.processor, context, template, limit, config.truncate)
    train, test = encoder.pairs(preferences.train), encoder.pairs(preferences.test)
    require(len(train) > 0, "data", config.data, "at least one pair to train on")
    if config.epochs is not None:
        config = replace(config, steps=math.ceil(config.epochs * len(train) / size), epochs=None)
    splits, length = (len(train), len(test)), max(pair.length for pair in train)
    both = [*preferences.train, *preferences.test]
    found = data.fingerprint([p.prompt, p.chosen, p.rejected, p.images, p.ref] for p in both)
    # The pair that has most tokens where its prompt is there once, in the form of two sequences of the longest.
    prompt = 2 * length - max(tokens_of([pair], Layout("shared")) for pair in train)
    work = Workload("pairs", size, *splits, preferences.note, 2 * size, length, 1, found, 2, prompt)
    frozen = reference_model(config, [*train, *test], loaded, ref_model)
    loaded = settled(config, accelerator.device, loaded, length, [frozen])
    largest = max(tokens_of([pair], loaded.layout) for pair in (*train, *test))
    check_budget(config, largest, "the longest pair's two sequences")
    placed, reference = place(config, accelerator, loaded, work, frozen)
    loaded = ready(placed, loaded, any(pair.images for pair in (*train, *test)))
    trainer = DPOTrainer(
        config=config,
        loaded=loaded,
        engine=placed,
        reference=reference,
        own_reference=ref_model is None and config.ref_model is None,
        workload=work,
        run=Run(placed, work.fingerprint),
        train=train,
        test=test,
        encoder=encoder,
    )
    probe(trainer)
    return trainer


def build(config: Config, train: Sequence[Preference]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The small model, by default over characters."""
    texts = (text for p in train for text in (p.prompt, p.chosen, p.rejected) if isinstance(text, str))
    tokenizer = bpe_tokenizer(texts, config.vocab_size) if config.vocab_size else models.char_tokenizer()
    longest = config.max_length or 1024
    return models.small_model(tokenizer, config.hidden_size, config.num_layers, longest), tokenizer


@torch.no_grad()
def probe(trainer: DPOTrainer) -> None:
    """Raises ValueError where the model cannot do what `config` asks of it, by a forward of a few pairs."""
    config, some = trainer.config, trainer.train[:PROBE]
    if config.router_aux_loss_coef:
        found = trainer.engine(head_inputs, config, assemble(trainer, some)).aux_loss
        require(found is not None, "router_aux_loss_coef", config.router_aux_loss_coef, "0: the model has no experts")


def taken(trainer: DPOTrainer, number: int, size: int) -> tuple[list[Pair], Totals]:
    """The `size` pairs of step `number`, and their counts."""
    some = data.batch_at(trainer.train, trainer.config.seed, (number - 1) * size, size)
    return some, Totals.of(some)


def rounds(trainer: DPOTrainer, some: Sequence[Pair]) -> Iterator[tuple[list[Pair], bool]]:
    """This process's share of some pairs by micro-batches, those of a length together.

    As many on every process: False marks one that is there for its calls alone, which all must make.
    """
    engine, config = trainer.engine, trainer.config

    def tokens(rows: Sequence[int]) -> int:
        return tokens_of([some[i] for i in rows], trainer.loaded.layout)

    if config.micro_batch_tokens:
        shares: Sequence[Sequence[int]] = balanced([tokens([i]) for i in range(len(some))], engine.world)
    else:
        shares = [shared(range(len(some)), rank, engine.world) for rank in range(engine.world)]
    micro = [split(sorted(rows, key=lambda i: some[i].length), tokens, config, each=2) for rows in shares]
    for number in range(max(map(len, micro))):
        own = micro[engine.rank][number] if number < len(micro[engine.rank]) else ()
        yield [some[i] for i in own] or list(some[:1]), bool(own)


def tokens_of(some: Sequence[Pair], layout: Layout) -> int:
    """That a forward of some pairs reads."""
    lengths = [len(pair.prompt) + pair.unloaded + len(ids) for pair in some for ids in (pair.chosen, pair.rejected)]
    prompts = [tuple(pair.prompt) for pair in some for _ in range(2)]
    return tokens_in(lengths, prompts, [len(ids) for ids in prompts], layout)


def assemble(trainer: DPOTrainer, own: Sequence[Pair]) -> PairBatch:
    whole, loaded = [trainer.encoder.with_images(pair) for pair in own], trainer.loaded
    made = pairs.collate(whole, int(loaded.tokenizer.pad_token_id), loaded.collator, loaded.layout)
    return made.to(trainer.engine.device)


def with_reference(trainer: DPOTrainer, batch: PairBatch) -> PairBatch:
    """The batch with the reference's log-probs, unless it has them or they are not needed."""
    if batch.ref_logprobs is not None or not trainer.config.loss().needs_reference:
        return batch
    return replace(batch, ref_logprobs=reference_sums(trainer, batch))


@torch.no_grad()
def reference_sums(trainer: DPOTrainer, batch: PairBatch) -> Tensor:
    """(S,) summed log-probs of the completions under the reference."""
    return trainer.by_reference(sums, trainer.config, batch)


def precompute(trainer: DPOTrainer, some: Sequence[Pair]) -> None:
    """Give each pair the reference's log-probs, on every process."""
    number, found = {id(pair): i for i, pair in enumerate(some)}, []
    for own, live in rounds(trainer, some):
        values = reference_sums(trainer, assemble(trainer, own)).view(2, -1).T.tolist()
        found += [(number[id(pair)], tuple(both)) for pair, both in zip(own, values, strict=True) if live]
    for i, ref in trainer.engine.gather(found):
        some[i].ref = ref


def completion_loss(model: Any, config: Config, batch: PairBatch, totals: Totals, live: bool) -> tuple[Tensor, Metrics]:
    """The share of a micro-batch in minus the mean log-prob of all the tokens counted; none where it is not live."""
    return -logprobs(model, config, batch).sum() / (totals.chosen + totals.rejected) * live, Metrics({})


def head_inputs(model: Any, config: Config, batch: PairBatch) -> fr.lm_head.HeadInputs:
    more: dict[str, Any] = {"output_router_logits": True} if config.router_aux_loss_coef else {}
    return batch.batch().head_inputs(model, **more)


def preference_loss(
    model: Any, config: Config, batch: PairBatch, totals: Totals, live: bool = True
) -> tuple[Tensor, Metrics]:
    """The share of a micro-batch in the loss of all the pairs counted, and its metrics; none where it is not live, and there
    for its calls alone."""
    objective, laid = config.loss(), batch.batch()
    inputs, targets = head_inputs(model, config, batch), laid.targets
    loss, found = fr.linear_preference_loss(
        inputs.hidden,
        inputs.head,
        targets,
        objective=objective,
        ref_logprobs=batch.ref_logprobs if objective.needs_reference else None,
        cu_seqlens=laid.cu_seqlens,
        num_pairs=totals.pairs,
        num_tokens=totals.chosen,
        outputs=("entropy", "mean_logit", "is_top1"),
        backend=config.backend,
    )
    metrics = found.parts | {"num_tokens": reductions.total(targets.new_tensor(batch.num_tokens))}
    if inputs.aux_loss is not None:
        metrics["aux_loss"] = reductions.mean(inputs.aux_loss.detach(), batch.num_pairs)
        loss = loss + config.router_aux_loss_coef * batch.num_pairs / totals.pairs * inputs.aux_loss
    return counted(loss, Metrics(metrics), live)


def show_samples(trainer: DPOTrainer, number: int) -> None:
    """Greedy completions of a few prompts, beside the pairs' own."""
    tokenizer = trainer.loaded.tokenizer
    some = [trainer.encoder.with_images(pair) for pair in (trainer.test or trainer.train)[:SAMPLES]]
    room = min((trainer.encoder.context or math.inf) - len(pair.prompt) for pair in some)
    if room < 1:
        return
    with trainer.engine.whole():
        found = rollout.generate(
            trainer.loaded.model,
            tokenizer,
            [Encoded(pair.prompt, pair.extras) for pair in some],
            max_new_tokens=int(min(room, trainer.config.sample_tokens)),
            collator=trainer.loaded.collator,
        )
    chosen, rejected = (
        tokenizer.batch_decode(column, skip_special_tokens=True)
        for column in ([pair.chosen for pair in some], [pair.rejected for pair in some])
    )
    rows = zip((pair.text for pair in some), found.texts, chosen, rejected)
    names = ("prompt", "completion", "chosen", "rejected")
    trainer.run.samples(number, [dict(zip(names, row)) for row in rows], show=1)

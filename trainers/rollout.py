"""Completions of prompts, as right-padded rows that the losses can use.

`generate` pads prompts on the left; afterwards the padding is at the right end, so that position ids, and with them the
log-probabilities, are what they would be without padding, for every model and without passing them on.

    token = the first v with  sum_{j <= v} p_j > u

Each row draws with uniforms u of its own, made from seed, step and row. What it samples therefore does not depend on
which rows are sampled together, on how many processes there are, or on what was drawn before a run was resumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import fused_rlhf as fr
from fused_rlhf.lm_head import HeadInputs
from fused_rlhf.trainers.collation import Collator
from fused_rlhf.trainers.config import require
from fused_rlhf.trainers.conversation import encode
from fused_rlhf.trainers.data import Sample, Task, fingerprint, where_of
from fused_rlhf.trainers.engine import Placed
from fused_rlhf.trainers.forwards import Batch, Rows
from fused_rlhf.trainers.generation import eos_ids, only, placeholders, rows_together
from fused_rlhf.trainers.inputs import Encoded
from fused_rlhf.trainers.layout import PADDED, Layout
from fused_rlhf.trainers.minibatches import Rows as Numbers
from fused_rlhf.trainers.minibatches import Sizes, chunks
from fused_rlhf.trainers.model import Loaded, max_positions
from fused_rlhf.trainers.planning import Workload
from fused_rlhf.trainers.reported import ReportedSets, TokenSets
from fused_rlhf.trainers.rollout_config import RolloutConfig


@dataclass(frozen=True)
class Completions:
    """B prompts with their completions, T the longest of the two together."""

    input_ids: Tensor  # (B, T) int64, real tokens first
    attention_mask: Tensor  # (B, T) bool, True at prompt and completion
    completion_mask: Tensor  # (B, T) bool, True at the completion's tokens, the EOS that ends it included
    truncated: Tensor  # (B,) bool: max_new_tokens came before an EOS
    texts: list[str]  # completions without special tokens
    prompts: list[Encoded]  # with what their pictures become, on the CPU
    collator: Collator | None = None  # of a model that reads pictures
    sampling_logprobs: Tensor | None = None  # (B, T - 1) fp32, of an external sampler; 0 outside the completion
    layout: Layout = PADDED  # of the forwards
    kept: ReportedSets | None = None  # by an external sampler

    def __getitem__(self, rows: Numbers) -> Completions:
        """Some of the rows, cut to the longest of them."""
        length = int(self.attention_mask[rows].sum(dim=1).max())
        return Completions(
            self.input_ids[rows, :length],
            self.attention_mask[rows, :length],
            self.completion_mask[rows, :length],
            self.truncated[rows],
            [self.texts[row] for row in rows],
            [self.prompts[row] for row in rows],
            self.collator,
            None if self.sampling_logprobs is None else self.sampling_logprobs[rows, : length - 1],
            self.layout,
            None if self.kept is None else self.kept.pick(rows, length - 1),
        )

    def to(self, device: torch.device | str) -> Completions:
        moved: dict[str, Any] = {
            name: x.to(device) for name, x in vars(self).items() if isinstance(x, (Tensor, ReportedSets))
        }
        return replace(self, **moved)

    def without_truncated(self) -> Completions:
        """The same rows, with an empty completion mask where a completion did not end."""
        return replace(self, completion_mask=self.completion_mask & ~self.truncated.unsqueeze(1))

    def whole(self) -> Completions:
        """The same for log-probs of the whole distribution."""
        return replace(self, kept=None)

    def cut(self, truncation: fr.Truncation | None) -> dict[str, Any]:
        """How the op is told what the tokens of `batch` were sampled from: the sets reported, where there are any."""
        if self.kept is not None:
            return {"kept": self.kept.within(self.completion_mask[:, 1:])}
        return {} if truncation is None else {"truncation": truncation}

    def batch(self) -> Batch:
        """For a forward whose states before the completions' tokens are wanted."""
        return Batch(self.rows(), self.completion_mask, self.layout)

    def sizes(self) -> Sizes:
        """What they cost a body."""
        lengths = self.attention_mask.sum(dim=1).tolist()
        prompts = [prompt.ids for prompt in self.prompts]
        return Sizes(lengths, [tuple(ids) for ids in prompts], [len(ids) for ids in prompts], self.layout)

    def rows(self) -> Rows:
        """For a forward of padded ones."""
        prompts = self.prompts
        extras, lengths = [prompt.extras for prompt in prompts], [len(prompt.ids) for prompt in prompts]
        return Rows(self.input_ids, self.attention_mask, extras, lengths, self.collator)


def stop_ids(config: RolloutConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Those that `config` adds to EOS. Raises ValueError where its stop_token is not one token."""
    token = config.stop_token
    if token is None:
        return []
    ids = tokenizer(token, add_special_tokens=False)["input_ids"]
    require(len(ids) == 1 and ids[0] != tokenizer.unk_token_id, "stop_token", token, "one token of the tokenizer")
    return list(ids)


def ends_of(config: RolloutConfig, loaded: Loaded) -> list[int]:
    """Every token that ends a completion of a run. Raises ValueError as `stop_ids`."""
    return eos_ids(loaded.model, loaded.tokenizer, stop_ids(config, loaded.tokenizer))


def uniforms(seed: int, step: int, rows: int, length: int) -> Tensor:
    """(rows, length) fp64 numbers in [0, 1) for the rollout of a step; a row's do not depend on how many there are."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    return torch.rand(rows, length, generator=generator, dtype=torch.float64)


BLOCK = 1 << 22  # numbers of a fp64 array


class _InverseCDF(LogitsProcessor):
    """Leaves the one token that each row's next uniform picks from the (warped) distribution, a block of rows at a time."""

    def __init__(self, uniforms: Tensor, prompt_length: int, warpers: LogitsProcessorList) -> None:
        self.uniforms, self.prompt_length, self.warpers = uniforms, prompt_length, warpers

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        size = max(BLOCK // scores.shape[1], 1)
        uniforms = self.uniforms[:, input_ids.shape[1] - self.prompt_length, None]
        blocks = zip(input_ids.split(size), scores.split(size), uniforms.split(size), strict=True)
        token = torch.cat([self.pick(*block) for block in blocks])
        return scores.fill_(-torch.inf).scatter_(1, token, 0.0)  # nobody reads them again

    def pick(self, input_ids: Any, scores: Tensor, uniforms: Tensor) -> Tensor:
        """(B, 1)."""
        # fp64: the tail of a large vocabulary would drown in an fp32 sum.
        cdf = self.warpers(input_ids, scores.float()).double().softmax(dim=-1).cumsum_(dim=-1)
        return torch.searchsorted(cdf, uniforms * cdf[:, -1:], right=True).clamp(max=scores.shape[1] - 1)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Encoded],
    *,
    max_new_tokens: int,
    uniforms: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    stop: Sequence[int] = (),
    batch_size: int | None = None,
    collator: Collator | None = None,
) -> Completions:
    """One completion for each prompt, `batch_size` prompts at a time (default: all at once).

    Sampled with `uniforms` (len(prompts), max_new_tokens) from the model's distribution at `temperature`, cut by top_k,
    top_p and min_p in this order, as by `fr.Truncation`, and by nothing else, whatever the model's own generation
    configuration says, so that the log-probabilities of the op are those of the sampler. Greedy without `uniforms`,
    which nothing of this changes. Placeholders of images, which would ask for images that are not there, are never
    chosen. The tokens `stop` end a completion as EOS does.
    """
    ends = eos_ids(model, tokenizer, stop)
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    never = placeholders(model)
    warpers = LogitsProcessorList([SuppressTokensLogitsProcessor(never)] if never else [])
    if uniforms is not None:
        warpers += warpers_of(temperature, top_k, top_p, min_p)
    device = model.device
    completions: list[list[int]] = [[]] * len(prompts)
    for rows in batches(prompts, batch_size or len(prompts), collator):
        some = [prompts[row] for row in rows]
        P = max(len(prompt.ids) for prompt in some)
        pad = tokenizer.pad_token_id
        input_ids = torch.tensor([[pad] * (P - len(p.ids)) + p.ids for p in some], device=device)
        mask = torch.tensor([[0] * (P - len(p.ids)) + [1] * len(p.ids) for p in some], device=device)
        lengths = [len(prompt.ids) for prompt in some]
        extras = collator.collate([p.extras for p in some], lengths, P, left=True) if collator else {}
        chosen = warpers if uniforms is None else [_InverseCDF(uniforms[rows].to(device), P, warpers)]
        with torch.no_grad(), only(model, config):
            output = model.generate(  # type: ignore[operator]
                input_ids=input_ids,
                attention_mask=mask,
                generation_config=config,
                logits_processor=LogitsProcessorList(chosen),
                **{name: x.to(device) for name, x in extras.items()},
            )
        for row, tokens in zip(rows, output[:, P:].tolist(), strict=True):
            completions[row] = tokens
    return assemble(prompts, completions, ends, tokenizer, device, collator=collator)


def warpers_of(temperature: float, top_k: int, top_p: float, min_p: float) -> list[LogitsProcessor]:
    """What takes logits to those that are sampled from, in order."""
    found: list[LogitsProcessor] = []
    if temperature != 1:
        found.append(TemperatureLogitsWarper(float(temperature)))
    if top_k:
        found.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        found.append(TopPLogitsWarper(top_p))
    if min_p > 0:
        found.append(MinPLogitsWarper(min_p))
    return found


def batches(prompts: Sequence[Encoded], size: int, collator: Collator | None) -> list[Numbers]:
    """The prompts that are sampled from together, by number."""
    found = chunks(range(len(prompts)), size)
    if collator is None:
        return found
    return [
        [rows[i] for i in group] for rows in found for group in collator.groups([prompts[row].extras for row in rows])
    ]


def assemble(
    prompts: Sequence[Encoded],
    completions: Sequence[Sequence[int]],
    ends: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device | str = "cpu",
    sampling_logprobs: Sequence[Sequence[float]] | None = None,
    collator: Collator | None = None,
    kept: Sequence[TokenSets] | None = None,
) -> Completions:
    """Prompts and the tokens sampled after each, up to its first EOS, as right-padded rows."""
    cut = []
    for tokens in completions:
        end = next((i for i, token in enumerate(tokens) if token in ends), len(tokens) - 1)
        cut.append(list(tokens[: end + 1]))
    B, T = len(prompts), max(len(p.ids) + len(tokens) for p, tokens in zip(prompts, cut, strict=True))
    input_ids = torch.full((B, T), tokenizer.pad_token_id)
    attention_mask = torch.zeros(B, T, dtype=torch.bool)
    completion_mask = torch.zeros(B, T, dtype=torch.bool)
    logprobs = None if sampling_logprobs is None else torch.zeros(B, T - 1)
    for row, (prompt, tokens) in enumerate(zip(prompts, cut, strict=True)):
        start, stop = len(prompt.ids), len(prompt.ids) + len(tokens)
        input_ids[row, :stop] = torch.tensor([*prompt.ids, *tokens])
        attention_mask[row, :stop] = True
        completion_mask[row, start:stop] = True
        if logprobs is not None and sampling_logprobs is not None:
            logprobs[row, start - 1 : stop - 1] = torch.tensor(sampling_logprobs[row][: len(tokens)])
    return Completions(
        input_ids.to(device),
        attention_mask.to(device),
        completion_mask.to(device),
        torch.tensor([not tokens or tokens[-1] not in ends for tokens in cut], device=device),
        tokenizer.batch_decode(cut, skip_special_tokens=True),
        list(prompts),
        collator,
        None if logprobs is None else logprobs.to(device),
        kept=None if kept is None else sets_of(prompts, cut, kept, T).to(device),
    )


def sets_of(
    prompts: Sequence[Encoded], completions: Sequence[Sequence[int]], kept: Sequence[TokenSets], length: int
) -> ReportedSets:
    """Of completions that are maybe shorter than what a sampler said of them."""
    some = [sets.first(len(tokens)) for sets, tokens in zip(kept, completions, strict=True)]
    return ReportedSets.of(some, [len(prompt.ids) for prompt in prompts], length)


def encoded(
    loaded: Loaded, samples: Sequence[Sample], config: RolloutConfig, name: str = "this", load: bool = True
) -> list[Encoded]:
    """The prompts of samples, of the split `name`, as the model takes them; `load`: with their pictures.

    Raises as `conversation.encode`.
    """
    tokenizer, processor, chat = loaded.tokenizer, loaded.processor, config.chat_template
    return [
        encode(tokenizer, processor, sample, chat_template=chat, load=load, where=where_of(sample, name, index))
        for index, sample in enumerate(samples)
    ]


def complete(
    engine: Placed,
    loaded: Loaded,
    prompts: Sequence[Encoded],
    config: RolloutConfig,
    uniforms: Tensor | None = None,
    batch_size: int | None = None,
) -> Completions:
    """What the model in training makes of prompts at the configured length, temperature and truncation: `generate`,
    wherever its parameters are."""
    longest = max((len(prompt.ids) for prompt in prompts), default=0) + config.max_new_tokens
    together = config.rollout_batch_size or rows_together(loaded.model, longest)
    with engine.whole():
        found = generate(
            loaded.model,
            loaded.tokenizer,
            prompts,
            max_new_tokens=config.max_new_tokens,
            uniforms=uniforms,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            min_p=config.min_p,
            stop=stop_ids(config, loaded.tokenizer),
            batch_size=batch_size or together,
            collator=loaded.collator,
        )
    return replace(found, layout=loaded.layout)


def joined(parts: Sequence[Completions]) -> Completions:
    """The rows of all of them, one after the other."""
    length, first = max(part.input_ids.shape[1] for part in parts), parts[0]
    reported = all(part.sampling_logprobs is not None for part in parts)
    kept = [part.kept for part in parts if part.kept is not None]

    def wide(name: str, width: int = length) -> Tensor:
        some = [getattr(part, name) for part in parts]
        return torch.cat([torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in some])

    return replace(
        first,
        input_ids=wide("input_ids"),
        attention_mask=wide("attention_mask"),
        completion_mask=wide("completion_mask"),
        truncated=torch.cat([part.truncated for part in parts]),
        texts=[text for part in parts for text in part.texts],
        prompts=[prompt for part in parts for prompt in part.prompts],
        sampling_logprobs=wide("sampling_logprobs", length - 1) if reported else None,
        kept=ReportedSets.joined(kept) if len(kept) == len(parts) else None,
    )


def everywhere(engine: Placed, some: Completions) -> Completions:
    """The rows of all processes, on each of them. Padding is 0 where it goes beyond a process's own rows."""
    return joined(engine.gather([some.to("cpu")])).to(engine.device)


def completion_logprobs(
    model: Any, some: Completions, temperature: float, backend: str, truncation: fr.Truncation | None = None
) -> Tensor:
    """(B, T - 1) fp32 log-probs of the completions' tokens, 0 elsewhere: of the distribution at `temperature`, over what
    `some.cut(truncation)` keeps of it."""
    batch = some.batch()
    inputs, cut = batch.head_inputs(model), some.cut(truncation)
    return batch.spread(logprobs_of(inputs, batch.targets, temperature, backend, **cut).logprobs)


def logprobs_of(inputs: HeadInputs, targets: Tensor, temperature: float, backend: str, **more: Any) -> fr.LogProbs:
    """`fr.linear_logprobs` of N targets, with `more` of its arguments, from what a forward left for the head."""
    with inputs.autocast():
        head, hidden = inputs.head, inputs.hidden
        return fr.linear_logprobs(hidden, head, targets, temperature=temperature, backend=backend, **more)


def workload(loaded: Loaded, task: Task, config: RolloutConfig, generations: int, passes: int) -> Workload:
    """That of steps with so many completions of each prompt and passes over them. Raises as `longest_prompt`."""
    n, prompt = config.prompts_per_step, longest_prompt(loaded, task, config)
    longest = prompt + config.max_new_tokens
    splits, updates = (len(task.train), len(task.test)), passes * config.num_minibatches
    found = fingerprint([*task.train, *task.test])
    sequences = n * generations
    return Workload("prompts", n, *splits, task.note, sequences, longest, updates, found, generations, prompt)


def longest_prompt(loaded: Loaded, task: Task, config: RolloutConfig) -> int:
    """Tokens of the longest prompt. Raises ValueError as `encoded` and `check_lengths`, for either split."""
    longest = 0
    for name, samples in (("train", task.train), ("test", task.test)):
        prompts = encoded(loaded, samples, config, name, load=False)
        names = [where_of(sample, name, index) for index, sample in enumerate(samples)]
        check_lengths(names, prompts, loaded.model, config.max_new_tokens)
        longest = max([longest, *(prompt.length for prompt in prompts)])
    return longest


def check_lengths(
    names: Sequence[str], prompts: Sequence[Encoded], model: PreTrainedModel, max_new_tokens: int
) -> None:
    """Raises ValueError where a prompt and `max_new_tokens` exceed the model's context, or a prompt has no tokens."""
    limit = max_positions(model)
    for where, prompt in zip(names, prompts, strict=True):
        if not prompt.ids:
            raise ValueError(f"{where}: the prompt has no tokens")
        if limit is not None and prompt.length + max_new_tokens > limit:
            raise ValueError(
                f"{where}: its prompt of {prompt.length} tokens and max_new_tokens={max_new_tokens} "
                f"exceed the model's context of {limit}"
            )

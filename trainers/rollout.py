"""Completions of prompts, as right-padded rows that the losses can use.

`generate` pads prompts on the left; afterwards the padding is at the right end, so that position ids, and with them the
log-probabilities, are what they would be without padding, for every model and without passing them on.

    token = the first v with  sum_{j <= v} p_j > u

Each row draws with uniforms u of its own, made from seed, step and row. What it samples therefore does not depend on
which rows are sampled together, on how many processes there are, or on what was drawn before a run was resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

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
from fused_rlhf.trainers.config import require
from fused_rlhf.trainers.conversation import encode
from fused_rlhf.trainers.data import Sample, Task, fingerprint, where_of
from fused_rlhf.trainers.engine import Placed
from fused_rlhf.trainers.inputs import Encoded, collate
from fused_rlhf.trainers.model import Loaded, base_of, max_positions
from fused_rlhf.trainers.planning import Workload
from fused_rlhf.trainers.rollout_config import RolloutConfig

T = TypeVar("T")

# An external sampler: prompts' ids -> completions' ids, EOS included, and the log-probs it gave them (or None).
Sampler = Callable[[list[list[int]]], tuple[list[list[int]], list[list[float]] | None]]


@dataclass(frozen=True)
class Completions:
    """B prompts with their completions, T the longest of the two together."""

    input_ids: Tensor  # (B, T) int64, real tokens first
    attention_mask: Tensor  # (B, T) bool, True at prompt and completion
    completion_mask: Tensor  # (B, T) bool, True at the completion's tokens, the EOS that ends it included
    truncated: Tensor  # (B,) bool: max_new_tokens came before an EOS
    texts: list[str]  # completions without special tokens
    extras: list[dict[str, Tensor]]  # what each prompt's images become, on the CPU
    sampling_logprobs: Tensor | None = None  # (B, T - 1) fp32, of an external sampler; 0 outside the completion

    def __getitem__(self, rows: slice) -> Completions:
        """Some of the rows, cut to the longest of them."""
        length = int(self.attention_mask[rows].sum(dim=1).max())
        return Completions(
            self.input_ids[rows, :length],
            self.attention_mask[rows, :length],
            self.completion_mask[rows, :length],
            self.truncated[rows],
            self.texts[rows],
            self.extras[rows],
            None if self.sampling_logprobs is None else self.sampling_logprobs[rows, : length - 1],
        )

    def without_truncated(self) -> Completions:
        """The same rows, with an empty completion mask where a completion did not end."""
        return replace(self, completion_mask=self.completion_mask & ~self.truncated.unsqueeze(1))

    def model_inputs(self) -> dict[str, Any]:
        """What the model's forward takes besides ids and mask."""
        length, device = self.input_ids.shape[1], self.input_ids.device
        return {name: value.to(device) for name, value in collate(self.extras, length).items()}


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a completion: the tokenizer's EOS and those of the model's generation configuration."""
    ids = model.generation_config.eos_token_id
    ids = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    return sorted({tokenizer.eos_token_id, *ids})


def end_at(token: str, loaded: Loaded) -> None:
    """Let a token end the model's completions as an EOS does. Raises ValueError where it is not one token."""
    ids = loaded.tokenizer(token, add_special_tokens=False)["input_ids"]
    one = len(ids) == 1 and ids[0] != loaded.tokenizer.unk_token_id
    require(one, "stop_token", token, "one token of the tokenizer")
    loaded.model.generation_config.eos_token_id = [*eos_ids(loaded.model, loaded.tokenizer), ids[0]]


def placeholders(model: PreTrainedModel) -> list[int]:
    """Tokens that stand for an image, a video or a sound, of which a completion has none."""
    own = model.config.to_dict()
    kinds = [f"{kind}_token_{suffix}" for kind in ("image", "video", "audio") for suffix in ("id", "index")]
    return sorted({own[kind] for kind in kinds if own.get(kind) is not None})


def uniforms(seed: int, step: int, rows: int, length: int) -> Tensor:
    """(rows, length) fp64 numbers in [0, 1) for the rollout of a step; a row's do not depend on how many there are."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    return torch.rand(rows, length, generator=generator, dtype=torch.float64)


class _InverseCDF(LogitsProcessor):
    """Leaves the one token that each row's next uniform picks from the (warped) distribution."""

    def __init__(self, uniforms: Tensor, prompt_length: int, warpers: LogitsProcessorList) -> None:
        self.uniforms, self.prompt_length, self.warpers = uniforms, prompt_length, warpers

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        # fp64: the tail of a large vocabulary would drown in an fp32 sum.
        cdf = self.warpers(input_ids, scores.float()).double().softmax(dim=-1).cumsum(dim=-1)
        u = self.uniforms[:, input_ids.shape[1] - self.prompt_length, None] * cdf[:, -1:]
        token = torch.searchsorted(cdf, u, right=True).clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


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
    batch_size: int | None = None,
) -> Completions:
    """One completion for each prompt, `batch_size` prompts at a time (default: all at once).

    Sampled with `uniforms` (len(prompts), max_new_tokens) from the model's distribution at `temperature`, cut by top_k,
    top_p and min_p where given, and by nothing else, whatever the model's own generation configuration says, so that
    the log-probabilities of the op are those of the sampler. Greedy without `uniforms`. Placeholders of images, which
    would ask for images that are not there, are never chosen.
    """
    ends = eos_ids(model, tokenizer)
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    never = placeholders(model)
    warpers = LogitsProcessorList([SuppressTokensLogitsProcessor(never)] if never else [])
    if uniforms is not None and temperature != 1:
        warpers.append(TemperatureLogitsWarper(float(temperature)))
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p > 0:
        warpers.append(MinPLogitsWarper(min_p))
    device = model.device
    completions: list[list[int]] = []
    for rows in slices(slice(0, len(prompts)), batch_size or len(prompts)):
        some = prompts[rows]
        P = max(len(prompt.ids) for prompt in some)
        pad = tokenizer.pad_token_id
        input_ids = torch.tensor([[pad] * (P - len(p.ids)) + p.ids for p in some], device=device)
        mask = torch.tensor([[0] * (P - len(p.ids)) + [1] * len(p.ids) for p in some], device=device)
        extras = {name: x.to(device) for name, x in collate([p.extras for p in some], P, left=True).items()}
        chosen = warpers if uniforms is None else [_InverseCDF(uniforms[rows].to(device), P, warpers)]
        with torch.no_grad(), _generation_config(model, config):
            output = model.generate(  # type: ignore[operator]
                input_ids=input_ids,
                attention_mask=mask,
                generation_config=config,
                logits_processor=LogitsProcessorList(chosen),
                **extras,
            )
        completions += output[:, P:].tolist()
    return assemble(prompts, completions, ends, tokenizer, device)


def assemble(
    prompts: Sequence[Encoded],
    completions: Sequence[Sequence[int]],
    ends: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device | str = "cpu",
    sampling_logprobs: Sequence[Sequence[float]] | None = None,
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
        [prompt.extras for prompt in prompts],
        None if logprobs is None else logprobs.to(device),
    )


@contextmanager
def _generation_config(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Hide the model's own generation configuration, from which `generate` takes whatever `config` leaves unset."""
    holders = {id(m): m for m in (model, base_of(model))}.values()  # peft hands its own on to the model inside
    own = [holder.generation_config for holder in holders]
    for holder in holders:
        holder.generation_config = config
    try:
        yield
    finally:
        for holder, configuration in zip(holders, own, strict=True):
            holder.generation_config = configuration


def encoded(loaded: Loaded, samples: Sequence[Sample], config: RolloutConfig, name: str = "this") -> list[Encoded]:
    """The prompts of samples, of the split `name`, as the model takes them. Raises as `conversation.encode`."""
    tokenizer, processor, chat = loaded.tokenizer, loaded.processor, config.chat_template
    return [
        encode(tokenizer, processor, sample, chat_template=chat, where=where_of(sample, name, index))
        for index, sample in enumerate(samples)
    ]


def complete(
    engine: Placed,
    loaded: Loaded,
    prompts: Sequence[Encoded],
    config: RolloutConfig,
    uniforms: Tensor | None = None,
    batch_size: int | None = None,
    **cut: Any,
) -> Completions:
    """What the model in training makes of prompts at the configured length and temperature: `generate`, wherever its
    parameters are."""
    with engine.whole():
        return generate(
            loaded.model,
            loaded.tokenizer,
            prompts,
            max_new_tokens=config.max_new_tokens,
            uniforms=uniforms,
            temperature=config.temperature,
            batch_size=batch_size or config.rollout_batch_size or None,
            **cut,
        )


def completion_logprobs(model: Any, some: Completions, temperature: float, backend: str) -> Tensor:
    """(B, T - 1) fp32 log-probs of the completions' tokens, 0 elsewhere; of the whole distribution at `temperature`."""
    return fr.lm_head.logprobs(
        model,
        some.input_ids,
        some.attention_mask,
        completion_mask=some.completion_mask,
        temperature=temperature,
        backend=backend,
        **some.model_inputs(),
    ).logprobs


def slices(rows: slice, size: int) -> list[slice]:
    """`rows` cut into pieces of `size`, the last one maybe shorter."""
    return [slice(start, min(start + size, rows.stop)) for start in range(rows.start, rows.stop, size)]


def minibatches(num_rows: int, config: RolloutConfig) -> list[slice]:
    """The rows of each of the updates in a pass over a rollout."""
    return slices(slice(0, num_rows), num_rows // config.num_minibatches)


def microbatches(num_rows: int, config: RolloutConfig) -> list[slice]:
    """The rows of each forward in a pass of updates over a rollout."""
    return [micro for mini in minibatches(num_rows, config) for micro in slices(mini, config.micro_batch_size)]


def own_rows(engine: Placed, count: int, config: RolloutConfig) -> list[int]:
    """Which of the `count` prompts of a step this process takes: its share of each of the mini-batches that they are cut
    into, so that an update of several processes sees what one of a single process would."""
    if engine.world == 1:
        return list(range(count))
    return [i for mini in minibatches(count, config) for i in engine.mine(range(mini.start, mini.stop))]


def everyones(engine: Placed, count: int, config: RolloutConfig, rows: Sequence[T]) -> list[T]:
    """The rows of all processes, as many for each prompt that is one's own, in the order of the prompts."""
    own = own_rows(engine, count, config)
    each = len(rows) // max(len(own), 1)
    tagged = engine.gather([(own[i // each], row) for i, row in enumerate(rows)])
    return [row for _, row in sorted(tagged, key=lambda pair: pair[0])]


def workload(loaded: Loaded, task: Task, config: RolloutConfig, generations: int, passes: int) -> Workload:
    """That of steps with so many completions of each prompt and passes over them. Raises as `longest_prompt`."""
    n, longest = config.prompts_per_step, longest_prompt(loaded, task, config) + config.max_new_tokens
    splits, updates = (len(task.train), len(task.test)), passes * config.num_minibatches
    found = fingerprint([*task.train, *task.test])
    sequences = n * generations
    return Workload("prompts", n, *splits, task.note, sequences, longest, updates, found)


def longest_prompt(loaded: Loaded, task: Task, config: RolloutConfig) -> int:
    """Tokens of the longest prompt. Raises ValueError as `encoded` and `check_lengths`, for either split."""
    longest = 0
    for name, samples in (("train", task.train), ("test", task.test)):
        prompts = encoded(loaded, samples, config, name)
        names = [where_of(sample, name, index) for index, sample in enumerate(samples)]
        check_lengths(names, prompts, loaded.model, config.max_new_tokens)
        longest = max([longest, *(len(prompt.ids) for prompt in prompts)])
    return longest


def check_lengths(
    names: Sequence[str], prompts: Sequence[Encoded], model: PreTrainedModel, max_new_tokens: int
) -> None:
    """Raises ValueError where a prompt and `max_new_tokens` exceed the model's context, or a prompt has no tokens."""
    limit = max_positions(model)
    for where, prompt in zip(names, prompts, strict=True):
        if not prompt.ids:
            raise ValueError(f"{where}: the prompt has no tokens")
        if limit is not None and len(prompt.ids) + max_new_tokens > limit:
            raise ValueError(
                f"{where}: its prompt of {len(prompt.ids)} tokens and max_new_tokens={max_new_tokens} "
                f"exceed the model's context of {limit}"
            )

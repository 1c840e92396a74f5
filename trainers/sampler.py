"""An external sampler, an inference engine say, in the place of the model in rollouts.

sampler(prompts) -> completions, logprobs
sampler(prompts, images=..., texts=...) where it takes these, as it must take images where samples have pictures

prompts      a list of ids for each prompt, all of a picture's included
completions  a list of ids for each prompt, EOS included
logprobs     what the sampler gave each of these tokens, at the run's temperature; None where it reports none
images       a list of PIL images for each prompt, in order
texts        the prompts, with one place for each image, as engines take them with images
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from fused_rlhf.trainers.adapters import base_of
from fused_rlhf.trainers.engine import Placed
from fused_rlhf.trainers.grpo_config import Config
from fused_rlhf.trainers.inputs import Encoded
from fused_rlhf.trainers.model import Loaded
from fused_rlhf.trainers.rollout import Completions, assemble, ends_of

Sampler = Callable[..., tuple[list[list[int]], list[list[float]] | None]]


ROUNDING = 1e-3  # above 0, of a log-prob


class SamplerError(ValueError):
    """A sampler raised, or gave something that is not completions and maybe their log-probs."""


def sampled(
    engine: Placed, loaded: Loaded, sampler: Sampler, prompts: Sequence[Encoded], config: Config
) -> Completions:
    """A sampler's completions of this process's prompts; where one process's fails, all raise SamplerError."""
    completions: list[list[int]] = []
    logprobs, error = None, None
    try:
        vocabulary = base_of(loaded.model).get_input_embeddings().num_embeddings
        completions, logprobs = ask(sampler, prompts, vocabulary)
        if logprobs is None and config.reads_sampler:
            raise SamplerError("the sampler reports no log-probs: expected some, for the objective reads them")
    except SamplerError as found:
        error = found
    engine.agree(error)
    if any(engine.gather([logprobs is None])):  # the updates of all processes are of one kind
        logprobs = None
    ends, collator = ends_of(config, loaded), loaded.collator
    made = assemble(prompts, completions, ends, loaded.tokenizer, engine.device, logprobs, collator)
    return replace(made, layout=loaded.layout)


def ask(
    sampler: Sampler, prompts: Sequence[Encoded], vocabulary: int
) -> tuple[list[list[int]], list[list[float]] | None]:
    """Its completions, and the log-probs of their tokens where it reports them.

    Raises SamplerError naming the completion, what is wrong and what was expected.
    """
    more: dict[str, Any] = {}
    if takes(sampler, "images"):
        more["images"] = [[picture.load() for picture in prompt.pictures] for prompt in prompts]
    if takes(sampler, "texts"):
        more["texts"] = [prompt.text for prompt in prompts]
    try:
        found = sampler([prompt.ids for prompt in prompts], **more)
    except Exception as error:
        raise SamplerError(f"the sampler raised {type(error).__name__}: {error}") from error
    if not isinstance(found, (tuple, list)) or len(found) != 2:
        raise SamplerError(f"the sampler returned a {type(found).__name__}, expected completions and their log-probs")
    completions, logprobs = found
    completions = [_ids(row, i, vocabulary) for i, row in enumerate(_rows(completions, "completions", len(prompts)))]
    if logprobs is None:
        return completions, None
    rows = _rows(logprobs, "lists of log-probs", len(prompts))
    return completions, [_numbers(row, ids, i) for i, (row, ids) in enumerate(zip(rows, completions, strict=True))]


def takes(sampler: Sampler, name: str) -> bool:
    """Whether it has a parameter of that name, or takes any."""
    try:
        parameters = inspect.signature(sampler).parameters
    except (TypeError, ValueError):  # a builtin tells nothing
        return False
    return name in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def _rows(values: Any, what: str, count: int) -> list[Any]:
    try:
        rows = list(values)
    except TypeError:
        raise SamplerError(f"the sampler returned {type(values).__name__}, expected {count} {what}") from None
    if len(rows) != count:
        raise SamplerError(f"the sampler returned {len(rows)} {what}, expected {count}, one for each prompt")
    return rows


def _ids(row: Any, at: int, vocabulary: int) -> list[int]:
    try:
        ids = [int(token) for token in row]
    except (TypeError, ValueError):
        raise SamplerError(f"the sampler's completion {at}: expected a list of ids, got {row!r:.80}") from None
    bad = next((token for token in ids if not 0 <= token < vocabulary), None)
    if bad is not None:
        raise SamplerError(f"the sampler's completion {at}: expected ids below {vocabulary}, got {bad}")
    return ids


def _numbers(row: Any, ids: Sequence[int], at: int) -> list[float]:
    try:
        numbers = [float(value) for value in row]
    except (TypeError, ValueError):
        raise SamplerError(
            f"the sampler's completion {at}: expected one log-prob for each of its {len(ids)} tokens, got {row!r:.80}"
        ) from None
    if len(numbers) != len(ids):
        raise SamplerError(f"the sampler's completion {at}: {len(numbers)} log-probs for its {len(ids)} tokens")
    bad = next((value for value in numbers if not math.isfinite(value) or value > ROUNDING), None)
    if bad is not None:
        raise SamplerError(f"the sampler's completion {at}: expected log-probs of at most 0, got {bad}")
    return numbers

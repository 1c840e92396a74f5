"""An external sampler, an inference engine say, in the place of the model in rollouts.

sampler(prompts) -> completions, logprobs
sampler(prompts) -> completions, logprobs, kept
sampler(prompts, images=..., texts=...) where it takes these, as it must take images where samples have pictures

prompts      a list of ids for each prompt, all of a picture's included
completions  a list of ids for each prompt, EOS included
logprobs     what the sampler gave each of these tokens, at the run's temperature and over what it kept; None where it
             reports none
kept         for each completion a list with the ids that the sampler chose each of its tokens from, in any order, the token
             among them; None where it reports none
images       a list of PIL images for each prompt, in order
texts        the prompts, with one place for each image, as engines take them with images
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy
import torch
from torch import Tensor

from fused_rlhf.trainers.adapters import base_of
from fused_rlhf.trainers.engine import Placed
from fused_rlhf.trainers.grpo_config import Config
from fused_rlhf.trainers.inputs import Encoded
from fused_rlhf.trainers.model import Loaded
from fused_rlhf.trainers.reported import TokenSets
from fused_rlhf.trainers.rollout import Completions, assemble, ends_of

Tokens = list[list[int]]
Logprobs = list[list[float]]
Sampler = Callable[..., tuple[Tokens, Logprobs | None] | tuple[Tokens, Logprobs | None, Sequence[Sequence[Any]] | None]]


ROUNDING = 1e-3  # above 0, of a log-prob


class SamplerError(ValueError):
    """A sampler raised, or gave something that is not completions, maybe their log-probs, and maybe the sets it kept."""


def sampled(
    engine: Placed, loaded: Loaded, sampler: Sampler, prompts: Sequence[Encoded], config: Config
) -> Completions:
    """A sampler's completions of this process's prompts; where one process's fails, all raise SamplerError."""
    completions: Tokens = []
    logprobs, kept, error = None, None, None
    try:
        vocabulary = base_of(loaded.model).get_input_embeddings().num_embeddings
        completions, logprobs, kept = ask(sampler, prompts, vocabulary)
        if logprobs is None and config.reads_sampler:
            raise SamplerError("the sampler reports no log-probs: expected some, for the objective reads them")
    except SamplerError as found:
        error = found
    engine.agree(error)
    # The updates of all processes are of one kind.
    without_logprobs, without_sets = map(any, zip(*engine.gather([(logprobs is None, kept is None)])))
    logprobs, kept = None if without_logprobs else logprobs, None if without_sets else kept
    ends, collator = ends_of(config, loaded), loaded.collator
    made = assemble(prompts, completions, ends, loaded.tokenizer, engine.device, logprobs, collator, kept)
    return replace(made, layout=loaded.layout)


def ask(
    sampler: Sampler, prompts: Sequence[Encoded], vocabulary: int
) -> tuple[Tokens, Logprobs | None, list[TokenSets] | None]:
    """Its completions, and where it reports them the log-probs of their tokens and the sets that these were chosen from.

    Raises SamplerError naming the completion, what is wrong and what was expected.
    """
    more: dict[str, Any] = {}
    if takes(sampler, "images"):
        more["images"] = [[picture.load() for picture in prompt.pictures] for prompt in prompts]
    if takes(sampler, "texts"):
        more["texts"] = [prompt.text for prompt in prompts]
    try:
        found: Any = sampler([prompt.ids for prompt in prompts], **more)
    except Exception as error:
        raise SamplerError(f"the sampler raised {type(error).__name__}: {error}") from error
    if not isinstance(found, (tuple, list)) or len(found) not in (2, 3):
        what = f"a {type(found).__name__}" + (f" of {len(found)}" if isinstance(found, (tuple, list)) else "")
        raise SamplerError(
            f"the sampler returned {what}, expected completions and their log-probs, and maybe kept sets"
        )
    completions, logprobs, kept = (*found, None)[:3]
    completions = [_ids(row, i, vocabulary) for i, row in enumerate(_rows(completions, "completions", len(prompts)))]
    if logprobs is not None:
        rows = _rows(logprobs, "lists of log-probs", len(prompts))
        logprobs = [_numbers(row, ids, i) for i, (row, ids) in enumerate(zip(rows, completions, strict=True))]
    if kept is not None:
        rows = _rows(kept, "lists of kept sets", len(prompts))
        kept = [_sets(row, ids, i, vocabulary) for i, (row, ids) in enumerate(zip(rows, completions, strict=True))]
    return completions, logprobs, kept


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


def _sets(row: Any, ids: Sequence[int], at: int, vocabulary: int) -> TokenSets:
    try:
        sets = list(row)
    except TypeError:
        raise SamplerError(
            f"the sampler's completion {at}: expected one kept set for each of its {len(ids)} tokens, got {row!r:.80}"
        ) from None
    if len(sets) != len(ids):
        raise SamplerError(f"the sampler's completion {at}: {len(sets)} kept sets for its {len(ids)} tokens")
    where = f"the sampler's completion {at}, token"
    parts = [_set(kept, f"{where} {place}") for place, kept in enumerate(sets)]
    counts = torch.tensor([len(part) for part in parts], dtype=torch.int64)
    flat = torch.from_numpy(numpy.concatenate([numpy.empty(0, numpy.int64), *parts]))
    token = torch.repeat_interleave(torch.arange(len(ids)), counts)
    beyond = (flat < 0) | (flat >= vocabulary)
    if beyond.any():
        first = int(beyond.nonzero()[0])
        raise SamplerError(f"{where} {token[first]}: expected kept ids below {vocabulary}, got {flat[first]}")
    own = torch.tensor(ids, dtype=torch.int64)
    lacking = torch.zeros_like(own).index_add_(0, token, (flat == own[token]).long()) == 0
    if lacking.any():
        first = int(lacking.nonzero()[0])
        raise SamplerError(f"{where} {first}: expected its id {ids[first]} among those kept, got {sets[first]!r:.80}")
    return TokenSets(flat.int(), counts)


def _set(kept: Any, where: str) -> numpy.ndarray:
    """(K,) int64, K > 0."""
    try:
        found = numpy.asarray(kept.cpu() if isinstance(kept, Tensor) else kept)
    except (TypeError, ValueError):  # rows of unequal length, a dtype that numpy has not
        found = numpy.empty((0, 0))
    if found.shape == (0,):
        raise SamplerError(f"{where}: expected its id among those kept, got none")
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise SamplerError(f"{where}: expected a list of the ids kept, got {kept!r:.80}")
    return found.astype(numpy.int64)

"""What `bench.step` measures: bodies, shapes of batches, ways to make the update, and what must come out.

    case    a body, and a batch of its: prompts, the completions of each, what of them counts
    row     a way to make the update of a case

Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Trainer = Literal["grpo", "dpo"]
Maker = Literal["ours", "trl", "dense"]


@dataclass(frozen=True)
class Body:
    """A decoder as transformers builds it, of random weights; its head is tied to the embedding."""

    kind: Literal["llama", "qwen3"]
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @property
    def label(self) -> str:
        return f"{self.layers} layers, H={self.hidden} V={self.vocabulary}"

    @property
    def settings(self) -> dict[str, Any]:
        """Of the configuration."""
        return {
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": True,
            "max_position_embeddings": 8192,
        }


BODIES = {
    "smollm2": Body("llama", 576, 1536, 12, 9, 3, 64, 49152),  # SmolLM2-135M, of whose 30 layers there are 12
    "qwen3": Body("qwen3", 1024, 3072, 2, 16, 8, 128, 151936),  # Qwen3-0.6B, of whose 28 layers there are 2
    "qwen3-0.6b": Body("qwen3", 1024, 3072, 28, 16, 8, 128, 151936),
    "tiny": Body("llama", 32, 48, 2, 4, 2, 8, 300),
}


@dataclass(frozen=True)
class Case:
    """A batch of `groups` prompts, each with as many completions as lengths are named; DPO has two of each."""

    body: str = "smollm2"
    trainer: Trainer = "grpo"
    dtype: Literal["fp32", "bf16"] = "fp32"  # of the weights, and of what goes through the body
    prompt: int = 1024  # tokens
    completions: tuple[int, ...] = (128,) * 8  # tokens of each
    groups: int = 1
    dead: int = 0  # of the groups, those whose advantages are 0
    active: float = 1.0  # share of the completions' tokens that count
    micro_batch: int = 8  # sequences

    @property
    def sequences(self) -> int:
        return self.groups * len(self.completions)

    def tokens(self, way: Way) -> int:
        """That the body reads in an update, where every micro-batch holds whole groups."""
        groups = self.groups - self.dead if way.maker == "ours" and way.skips else self.groups
        each, count = sum(self.completions), len(self.completions)
        if way.maker != "ours" or way.layout == "padded":
            return groups * count * (self.prompt + max(self.completions))
        return groups * (each + self.prompt * (count if way.layout == "packed" else 1))

    @property
    def label(self) -> str:
        lengths = sorted(set(self.completions))
        each = f"{lengths[0]}" if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
        parts = [f"{self.trainer.upper()}, {self.groups} x (prompt {self.prompt} + {len(self.completions)} x {each})"]
        parts += [f"{self.dead} of {self.groups} groups dead"] if self.dead else []
        parts += [f"{self.active:.0%} of the tokens count"] if self.active < 1 else []
        parts += [f"micro-batches of {self.micro_batch}"] if self.micro_batch < self.sequences else []
        return f"{', '.join(parts)}; {BODIES[self.body].label} {self.dtype}"


@dataclass(frozen=True)
class Way:
    """How an update is made."""

    maker: Maker
    layout: str = "padded"
    checkpointing: bool = False
    skips: bool = True  # sequences without an advantage never reach the model

    @property
    def name(self) -> str:
        words = [self.maker, *([self.layout] if self.maker == "ours" else [])]
        words += ["all"] if self.maker == "ours" and not self.skips else []
        return "-".join([*words, *(["checkpointed"] if self.checkpointing else [])])


PADDED, PACKED, SHARED = (Way("ours", layout) for layout in ("padded", "packed", "shared"))
TRL, DENSE = Way("trl"), Way("dense")


def checkpointed(*ways: Way) -> list[Way]:
    return [Way(way.maker, way.layout, True, way.skips) for way in ways]


@dataclass(frozen=True)
class Target:
    """`of` of a way, over that of another on the same case, is at least `least`."""

    what: str
    case: str
    slower: Way
    faster: Way
    least: float
    of: Literal["seconds", "peak_bytes"] = "seconds"


@dataclass(frozen=True)
class Plan:
    cases: dict[str, Case]
    ways: Mapping[str, Sequence[Way]]  # of each case, the one that others are compared with first
    targets: Sequence[Target] = field(default=())


ALL = [PADDED, PACKED, SHARED, TRL, DENSE]
DEAD = [Way("ours", layout, skips=skips) for layout in ("padded", "shared") for skips in (False, True)]


def full() -> Plan:
    cases = {
        "prompt-heavy": Case(),
        "balanced": Case(prompt=256, completions=(256,) * 8),
        "completion-heavy": Case(prompt=128, completions=(1024,) * 8),
        "10 % active": Case(prompt=256, completions=(256,) * 8, active=0.1),
        "80 % dead": Case(prompt=256, completions=(64,) * 8, groups=5, dead=4),
        "50 % padding": Case(prompt=64, completions=(448, 192, 96, 32), groups=2),
        "dpo": Case(trainer="dpo", completions=(256, 256), micro_batch=2),
        "qwen3": Case(body="qwen3", prompt=512, completions=(64,) * 4, micro_batch=4),
    }
    ways: dict[str, Sequence[Way]] = dict.fromkeys(cases, ALL)
    ways["80 % dead"] = [*DEAD, TRL]
    ways["qwen3"] = [PADDED, SHARED, TRL, DENSE]
    for name in ("prompt-heavy", "dpo"):
        cases[f"{name} checkpointed"] = cases[name]
        ways[f"{name} checkpointed"] = checkpointed(PADDED, SHARED, TRL, DENSE)
    return Plan(cases, ways, TARGETS)


def on_gpu() -> Plan:
    """And a whole model of 0.6B, which a CPU would take hours for."""
    found, name = full(), "qwen3-0.6b"
    whole = Case(name, dtype="bf16", prompt=512, completions=(256,) * 8)
    return Plan({**found.cases, name: whole}, {**found.ways, name: [PADDED, SHARED, TRL, DENSE]}, TARGETS)


TARGETS = (
    Target("GRPO on long prompts: shared layout against padded rows", "prompt-heavy", PADDED, SHARED, 3.0),
    Target("the same, activations", "prompt-heavy", PADDED, SHARED, 3.4, "peak_bytes"),
    Target("GRPO on long prompts: shared layout against TRL's trainer", "prompt-heavy", TRL, SHARED, 3.0),
    Target("80 % dead groups left out, against computed", "80 % dead", DEAD[2], DEAD[3], 4.0),
    Target("packed against padded rows where half is padding", "50 % padding", PADDED, PACKED, 1.6),
    Target("DPO: shared layout against padded rows", "dpo", PADDED, SHARED, 1.4),
)


def tiny() -> Plan:
    """The same at toy sizes, for tests."""
    cases = {
        "prompt-heavy": Case("tiny", prompt=24, completions=(4,) * 4),
        "10 % active": Case("tiny", prompt=8, completions=(40,) * 2, active=0.1),
        "80 % dead": Case("tiny", prompt=8, completions=(4,) * 2, groups=5, dead=4, micro_batch=2),
        "50 % padding": Case("tiny", prompt=4, completions=(28, 12, 6, 2), groups=2, micro_batch=4),
        "dpo": Case("tiny", "dpo", prompt=24, completions=(6, 9), groups=2, micro_batch=2),
    }
    found = full()
    return Plan(cases, {name: found.ways[name] for name in cases}, TARGETS)

"""What can be chosen about a DPO run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import fused_rlhf as fr
from fused_rlhf.trainers.config import TrainConfig, differs, require, require_at_least, require_positive
from fused_rlhf.words import nearest

Truncate = Literal["prompt_start", "completion_end", "drop"]

OF_LOSS = (
    *("loss_type", "loss_weights", "beta", "rpo_alpha", "label_smoothing", "f_divergence", "f_alpha", "ld_alpha"),
    *("use_weighting", "discopop_tau", "gamma", "alpha"),
)
SORTED = {"aot", "aot_unpaired"}  # they compare all pairs of a call with each other


@dataclass(frozen=True)
class Config(TrainConfig):
    """Options of a DPO run. Raises ValueError or TypeError for values out of range or at odds with each other."""

    # Output
    output: str = "runs/dpo"
    """Folder for metrics, curves, samples, checkpoints and the model."""
    # Model and data
    task: Literal["pairs", "pictures", "gsm8k-solutions"] = "pairs"
    """pairs: your own rows with chosen and rejected, and maybe prompt and images; texts or lists of messages. pictures:
    generated ones, with the colour or the number of their squares over a wrong one. gsm8k-solutions: correct solutions of
    GSM8K's example_model_solutions.jsonl against wrong ones."""
    data: str | None = None
    """A .jsonl or .parquet file, a folder with train and test files, or a hub id; GSM8K's folder."""
    num_test: int = 500
    """Pairs held out for the evaluation where the data has no test split, a fifth of them at most; whole prompts."""

    # Model and data
    vocab_size: int = 0
    """Built model: size of a byte-pair vocabulary learned from the training pairs; 0: one token a character."""
    # Lengths
    max_length: int | None = None
    """Longest prompt with completion, in tokens. None: a pair beyond the model's context is an error."""
    truncate: Truncate = "prompt_start"
    """What goes where a pair is longer: the prompt's beginning (then the completion's end); the completion's end; the
    pair. Pairs with images are never cut."""

    # Warm-up
    warmup_steps: int = 0
    """Supervised steps on the completions, chosen and rejected, before DPO; the reference is the model after them."""
    warmup_batch_size: int = 32
    """Pairs in a supervised step, over all processes."""

    # Reference
    ref_model: str | None = None
    """Folder or hub id of the reference. None: the model as the DPO steps begin with (LoRA: its adapters off)."""
    precompute_ref: bool = False
    """Take the reference's log-probs once, for all pairs, before the steps; it is not kept in memory then."""

    # Loss
    loss_type: tuple[str, ...] = ("sigmoid",)
    """sigmoid (DPO), hinge, ipo, exo_pair, nca_pair, robust, bco_pair, sppo_hard, aot, aot_unpaired, apo_zero, apo_down,
    discopop, sft, sigmoid_norm; without a reference cpo, simpo, orpo. Several are added up."""
    loss_weights: tuple[float, ...] = ()
    """One weight for each loss. Default: 1 each."""
    beta: float = 0.1
    """How hard the policy is held to its reference."""
    rpo_alpha: float = 0.0
    """Weight of the chosen completions' NLL, added to the loss (RPO; with cpo and orpo: the NLL of their papers)."""
    label_smoothing: float | None = None
    """Share of pairs whose labels are wrong, in [0, 0.5). None: the loss's own default."""
    f_divergence: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    """The divergence whose penalty the policy is under (f-DPO)."""
    f_alpha: float | None = None
    """Alpha of the alpha divergence."""
    ld_alpha: float | None = None
    """Weight of the tokens beyond the pair's shorter completion, in [0, 1] (LD-DPO). None: 1."""
    use_weighting: bool = False
    """Weigh each pair by how likely its completions are under the policy (WPO)."""
    discopop_tau: float | None = None
    """Temperature of discopop. None: 0.05."""
    gamma: float | None = None
    """Margin of simpo. None: 0.5."""
    alpha: float | None = None
    """Shape of simpo's reward (AlphaPO). None: 0, the mean log-prob itself."""
    router_aux_loss_coef: float = 0.0
    """Weight of the auxiliary loss of a mixture of experts; 0 leaves it out."""

    # Optimisation
    epochs: float | None = None
    """Passes over the training pairs, in the place of steps."""
    batch_size: int = 32
    """Pairs in an update, over all processes."""
    micro_batch_size: int = 32
    """Sequences, two to a pair, in one forward and backward of one process; leaves the result as it is."""
    # Evaluation, checkpoints, tracking
    sample_tokens: int = 64
    """Longest sample completion, in tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        generated = self.task == "pictures"
        require(
            not (generated and self.data), "data", self.data, f"none for the task {self.task!r}, which is generated"
        )
        require_at_least(self, 1, "batch_size", "warmup_batch_size", "sample_tokens")
        require_at_least(self, 0, "num_test", "rpo_alpha", "router_aux_loss_coef")
        require_positive(self, "beta")
        micro, longest = self.micro_batch_size, self.max_length
        require(micro % 2 == 0, "micro_batch_size", micro, "an even number: chosen and rejected go together")
        require(longest is None or longest >= 2, "max_length", longest, "at least 2, or None")
        built = self.model is None
        require(built or self.vocab_size == 0, "vocab_size", self.vocab_size, f"0 with model={self.model!r}")
        require(self.vocab_size == 0 or self.vocab_size > 258, "vocab_size", self.vocab_size, "0, or more than 258")
        if differs(self, "loss_type"):
            self.check_loss_type()
        count = len(self.loss_weights)
        require(
            count in (0, len(self.loss_type)), "loss_weights", self.loss_weights, f"one for each of {self.loss_type}"
        )
        whole = not SORTED & set(self.loss_type) or micro >= 2 * self.batch_size
        require(
            whole, "micro_batch_size", micro, f"at least 2 x batch_size for {self.loss_type}, which compare all pairs"
        )
        joint = self.compares_pairs and not SORTED & set(self.loss_type)
        whole = not joint or micro >= 2 * self.batch_size
        words = "at least 2 x batch_size for an NLL with use_weighting: the weights of all pairs meet it"
        require(whole, "micro_batch_size", micro, words)
        one = self.micro_batch_tokens == 0 or not self.compares_pairs
        words = f"0 for {self.loss_type}, which compare all pairs"
        require(one, "micro_batch_tokens", self.micro_batch_tokens, words)
        require(self.epochs is None or self.epochs > 0, "epochs", self.epochs, "more than 0, or None")
        both = self.epochs is not None and self.steps != type(self).steps
        require(not both, "steps, epochs", (self.steps, self.epochs), "one of them")
        given = (self.ref_model, self.precompute_ref)
        if given != (None, False) or differs(self, *OF_LOSS):  # the defaults are right, and torch is slow to import
            fits = self.loss().needs_reference or given == (None, False)
            require(fits, "ref_model, precompute_ref", given, f"none for {self.loss_type}: no reference there")

    def check_loss_type(self) -> None:
        paired = [name for name, loss in fr.preferences.PREFERENCES.items() if loss.paired]
        for name in self.loss_type:
            require(name in paired, "loss_type", name, f"one of {paired}{nearest(name, paired)}")

    @property
    def compares_pairs(self) -> bool:
        """Whether the loss of a batch is no sum of its pairs' own."""
        nll = self.rpo_alpha > 0 or "sft" in self.loss_type
        return bool(SORTED & set(self.loss_type)) or (self.use_weighting and nll)

    def loss(self) -> fr.PreferenceLoss:
        given = {name: getattr(self, name) for name in ("label_smoothing", "discopop_tau", "gamma", "alpha")}
        return fr.DPO(
            self.loss_type,
            self.loss_weights or None,
            beta=self.beta,
            sft_weight=self.rpo_alpha,
            f_divergence=self.f_divergence,
            f_alpha=self.f_alpha,
            ld_alpha=self.ld_alpha,
            use_weighting=self.use_weighting,
            **{name: value for name, value in given.items() if value is not None},
        )

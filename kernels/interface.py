"""What every backend is: the functions of `Backend` over flat rows, and what they take and give.

`fused_rlhf.backends.reference`, `fused_rlhf.backends.chunked` and `fused_rlhf.kernels.ops` (Triton) are backends. The rows
they get are real tokens only: arguments are checked, padding is dropped and tensors are contiguous before they are called.

N tokens, H hidden, V vocabulary. What a head does to its products h W^T + b is in `transforms`, what can be said of a row
in `statistics`. Under a low-rank adapter h W^T is h W^T + scale (h A^T) B^T: hidden carries scale (h A^T), the head B.

This file needs torch alone, so that a machine without triton can import it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, cast, get_args

import torch
from torch import Tensor

from fused_rlhf.kernels.statistics import Partials
from fused_rlhf.kernels.transforms import Transform

Maybe = TypeVar("Maybe", bound=Tensor | None)


def pick(tensor: Maybe, rows: slice | Tensor | None) -> Maybe:
    """These rows of a tensor, contiguous; None: all of them."""
    if tensor is None:
        return tensor
    if rows is None:
        return cast(Maybe, tensor.contiguous())
    return cast(Maybe, tensor.index_select(0, rows) if isinstance(rows, Tensor) else tensor[rows])


def indices(mask: Tensor, count: int) -> Tensor:
    """(count,) int64: where an (N,) mask holds. `nonzero` would find the count by itself, and wait for the device."""
    if mask.device.type == "mps":  # which has no nonzero_static
        return mask.nonzero().squeeze(1)
    return torch.nonzero_static(mask, size=count).squeeze(1)


class Border(NamedTuple):
    """Where the kept sets of some rows end.

    Kept are the columns v with z_v > floor, of those with z_v = floor the ones from `first` on, and always the target.
    """

    floor: Tensor  # (N,), as logits are; -inf keeps everything
    first: Tensor  # (N,) int64

    def pick(self, rows: slice | Tensor | None) -> Border:
        return Border(pick(self.floor, rows), pick(self.first, rows))

    @staticmethod
    def joined(parts: Sequence[Border]) -> Border:
        """Of rows one after the other."""
        return Border(torch.cat([part.floor for part in parts]), torch.cat([part.first for part in parts]))


@dataclass(frozen=True)
class Rows:
    """Real tokens, with everything that is a token's own."""

    hidden: Tensor  # (N, H); with an adapter on the head (N, H + copies r)
    targets: Tensor  # (N,) int64, in [0, V)
    temperature: Tensor  # (N,) fp32 (fp64 for fp64 inputs)
    border: Border | None = None  # what is beyond it has no probability; None: the whole vocabulary has

    @property
    def count(self) -> int:
        return self.targets.numel()

    def pick(self, rows: slice | Tensor | None) -> Rows:
        border = None if self.border is None else self.border.pick(rows)
        return Rows(pick(self.hidden, rows), pick(self.targets, rows), pick(self.temperature, rows), border)

    def bounded(self) -> Border:
        """Their border, which keeps everything where there is none."""
        if self.border is not None:
            return self.border
        return Border(torch.full_like(self.temperature, -torch.inf), torch.zeros_like(self.targets))

    @staticmethod
    def joined(parts: Sequence[Rows]) -> Rows:
        """One after the other, each with a border."""
        hidden, targets, temperature = (
            torch.cat([getattr(part, name) for part in parts]) for name in ("hidden", "targets", "temperature")
        )
        return Rows(hidden, targets, temperature, Border.joined([part.bounded() for part in parts]))


@dataclass(frozen=True)
class Entries:
    """Some of the logits of some rows, row by row: a sparse (N, V)."""

    hidden: Tensor  # (N, H), as in `Rows`
    temperature: Tensor  # (N,)
    rows: Tensor  # (E,) int64, ascending
    ids: Tensor  # (E,) int64, in [0, V)

    @property
    def count(self) -> int:
        return self.ids.numel()


@dataclass(frozen=True)
class EntryGrads:
    """Entries on their way back."""

    entries: Entries
    logits: Tensor  # (E,)
    upstream: Tensor  # (E,): dloss / dlogits

    def products(self, head: Projection) -> Tensor:
        """(E,): dloss by the products h W^T + b, in the dtype of the logits."""
        transform, temperature = head.transform, self.entries.temperature[self.entries.rows].to(head.wide)
        slope = transform.slope(self.logits[:, None], temperature)
        by_u = self.upstream.to(head.wide) / temperature * transform.logit_scale
        return by_u if slope is None else by_u * slope[:, 0]


def live_entries(grads: EntryGrads) -> EntryGrads:
    """Without those whose upstream is exactly zero. Waits for the device."""
    live = grads.upstream != 0
    count = int(live.sum())
    if count == len(live):
        return grads
    some = indices(live, count)
    entries = replace(grads.entries, rows=grads.entries.rows[some], ids=grads.entries.ids[some])
    return EntryGrads(entries, grads.logits[some], grads.upstream[some])


@dataclass(frozen=True)
class Cut:
    """How the distributions of N rows are truncated before a token is sampled; vectors are (N,), None: not at all.

    top_k, then top_p of what that left, then min_p; or with `min_p_first` min_p before both. `op.truncation` says what each
    keeps.
    """

    top_k: Tensor | None  # int64; 0: all
    top_p: Tensor | None  # as logits are, in (0, 1]
    min_p: Tensor | None  # likewise, in [0, 1]
    min_p_first: bool = False

    def pick(self, rows: slice | Tensor | None) -> Cut:
        return Cut(pick(self.top_k, rows), pick(self.top_p, rows), pick(self.min_p, rows), self.min_p_first)


@dataclass(frozen=True)
class KeptSets:
    """What a cut leaves of N rows: of most a few tokens, which are named; of some `wide` ones more than NARROW, which are
    told by their border."""

    rows: Tensor  # (E,) int64, ascending: the tokens kept of the rows that are not wide, their targets among them
    ids: Tensor  # (E,) int64, ascending in each row
    wide: Tensor  # (M,) int64: the others, ascending
    border: Border  # theirs
    stats: Stats  # theirs, over what is kept
    added: Tensor  # (N,) bool: the target was not in the set
    whole: Stats | None = None  # (N,) over the whole vocabulary, where that is asked for


NARROW = 512  # tokens of a kept set that are named one by one: what they cost is below what a product over V does


@dataclass(frozen=True)
class Shard:
    """Which columns of a vocabulary-parallel head a rank has."""

    group: str  # its name
    world: int
    start: int  # the first column here
    vocabulary: int  # of all ranks
    sums_hidden: bool  # whether d_hidden is summed over the group
    # Rows of a block, after each of which the ranks exchange what they found; 0: they do so once, of all rows.
    block: int = 0


@dataclass(frozen=True)
class Stream:
    """How a tensor travels that ranks, each with tokens of its own, hold in shards: rank r has the rows from r R on,
    R = ceil(length / world)."""

    group: str  # its name
    world: int
    length: int  # rows of all ranks
    dtype: torch.dtype  # of the rows on their way here
    reduce_dtype: torch.dtype  # of their gradient on its way back
    divisor: float  # of the gradient's sum over all ranks
    replicas: str = ""  # the group of those that hold the same shard

    @property
    def rows(self) -> int:
        """R; the last ranks may have fewer, or none."""
        return -(-self.length // self.world)


@dataclass(frozen=True)
class ShardStats:
    """Of the columns of a shard, for rows whose targets may lie beyond it."""

    partials: Partials
    # As in `Stats`: (N, blocks) shares of this shard's own mass, and its own normaliser in units of ln 2.
    mass: Tensor | None = None
    normaliser: Tensor | None = None


@dataclass(frozen=True)
class Projection:
    """The LM head as the backends multiply by it. Its weight is read by `rows`; the gradient leaves by `sink`."""

    weight: Tensor  # (V, H)
    bias: Tensor | None = None  # (V,)
    transform: Transform = field(default_factory=Transform)
    # Operands of the products are cast to this tile by tile; accumulation and logits are fp32 (fp64 for fp64).
    compute_dtype: torch.dtype = torch.float32
    # Logits may be rounded to compute_dtype before the softmax where that is faster. Off by default: it costs accuracy.
    round_logits: bool = False
    # Share of probability mass per token that the backward may leave out, block by block; 0 is exact.
    grad_filter: float = 0.0
    # (V, r): a low-rank adapter's second factor B. The rows of hidden then end in `copies` blocks of r columns, whose
    # products with those of `rows` add up to t B^T, t = scale (h A^T) in fp32: see `adapter_pairs`.
    lora_b: Tensor | None = None
    lora_dtype: torch.dtype | None = None  # of the adapter's operands, A and B; None: compute_dtype
    shard: Shard | None = None  # weight, bias and lora_b are these rows of a vocabulary-parallel head
    stream: Stream | None = (
        None  # weight is this rank's rows of a streamed head, bias and lora_b are whole; for no backend
    )

    @property
    def vocabulary(self) -> int:
        """Columns here."""
        return self.weight.shape[0] if self.stream is None else self.stream.length

    @property
    def all_columns(self) -> int:
        """Those of all ranks."""
        return self.vocabulary if self.shard is None else self.shard.vocabulary

    @property
    def wide(self) -> torch.dtype:
        """The dtype of logits and sums."""
        return torch.promote_types(self.compute_dtype, torch.float32)

    @property
    def adapter_dtype(self) -> torch.dtype:
        return self.compute_dtype if self.lora_dtype is None else self.lora_dtype

    @property
    def adapter_pairs(self) -> tuple[tuple[int, int], ...]:
        """Which part of t meets which part of B in each block of columns: t = t_0 + t_1 + ..., B = B_0 + B_1 + ...

        Half precision holds an fp32 number in three parts, each what the ones before left. Products of parts whose
        indices add up to 3 or more are below fp32's own rounding. Those with B_0 come first.
        """
        if self.lora_b is None:
            return ()
        if self.compute_dtype.itemsize >= 4:
            return ((0, 0),)
        of_b = 3 if self.adapter_dtype.itemsize >= 4 else 1
        return tuple((i, j) for j in range(of_b) for i in range(3 - j))

    @property
    def t_parts(self) -> int:
        """Parts of an adapter's activations t."""
        return 1 + max((i for i, _ in self.adapter_pairs), default=-1)

    @property
    def copies(self) -> int:
        return len(self.adapter_pairs)

    def parts(self, values: Tensor, count: int) -> list[Tensor]:
        """Tensors of compute_dtype that add up to wider values, as nearly as `count` of them can."""
        found = []
        for _ in range(count):
            found.append(values.to(self.compute_dtype))
            values = values - found[-1].to(values.dtype)
        return found

    def rows(self, columns: slice | Tensor) -> Tensor:
        """(v, H + copies r) rows of [weight, parts of lora_b] in compute_dtype."""
        w = self.weight[columns].to(self.compute_dtype)
        if self.lora_b is None:
            return w
        pairs = self.adapter_pairs
        b = self.parts(self.lora_b[columns].to(self.adapter_dtype), 1 + max(j for _, j in pairs))
        return torch.cat([w, *(b[j] for _, j in pairs)], 1)

    def bias_of(self, columns: slice | Tensor) -> Tensor | None:
        return None if self.bias is None else self.bias[columns]

    def split(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(n, H + copies r) -> the hidden states (n, H), and the parts of the adapter's activations (n, r)."""
        H = self.weight.shape[1]
        if not self.copies:
            return x[:, :H], ()
        blocks = x[:, H:].chunk(self.copies, 1)
        return x[:, :H], tuple(block for block, (_, j) in zip(blocks, self.adapter_pairs) if j == 0)

    def sink(self, needs: Needs, width: int, *, direct: bool | None = None, again: bool = False) -> HeadSink:
        """See `HeadSink`."""
        return HeadSink(self, needs, width, direct=direct, again=again)


class Needs(NamedTuple):
    """Which gradients are wanted; the work and memory of the others must be absent."""

    hidden: bool
    weight: bool
    bias: bool
    lora: bool = False


@dataclass
class BlockGrads:
    """Where the gradient of some columns of a head is summed up; None where it is not needed."""

    columns: slice
    weight: Tensor | None  # (v, H)
    bias: Tensor | None  # (v,) fp32 (fp64)
    lora: Tensor | None  # (v, r) likewise, of lora_b
    fresh: bool  # nothing was added yet: `weight` holds no numbers, the others zeros


class HeadSink:
    """Takes the gradients of a head, block of columns by block: the twin of `Projection.rows`.

    `open` gives what to add to, `close` takes it home. With the vocabulary outermost every block is opened once, and its
    `weight` is the gradient itself where that is `direct`, else scratch of `width` columns in fp32; with the rows
    outermost (`again`) blocks are opened for each block of rows and summed in fp32 throughout.
    """

    def __init__(
        self, head: Projection, needs: Needs, width: int, *, direct: bool | None = None, again: bool = False
    ) -> None:
        wide, weight, bias, lora = head.wide, head.weight, head.bias, head.lora_b
        self.head, self.again = head, again
        self.direct = (weight.dtype == wide) if direct is None else direct
        self.weight = torch.empty_like(weight, dtype=wide if again else None) if needs.weight else None
        self.bias = torch.zeros_like(bias, dtype=wide) if needs.bias and bias is not None else None
        self.lora = torch.zeros_like(lora, dtype=wide) if needs.lora and lora is not None else None
        self.scratch: Tensor | None = None
        if self.weight is not None and not (self.direct or again):
            self.scratch = weight.new_empty((min(width, len(weight)), weight.shape[1]), dtype=wide)
        self.written: set[int] = set()

    def open(self, columns: slice) -> BlockGrads:
        weight = None
        if self.weight is not None:
            weight = self.weight[columns] if self.scratch is None else self.scratch[: columns.stop - columns.start]
        bias, lora = (None if whole is None else whole[columns] for whole in (self.bias, self.lora))
        return BlockGrads(columns, weight, bias, lora, columns.start not in self.written)

    def close(self, block: BlockGrads, scale: Tensor | None = None) -> None:
        """`block` is complete (but for other rows, with `again`); its weight is to be multiplied by `scale` (0-d)."""
        if self.weight is not None and block.weight is not None:
            if block.fresh:
                block.weight.zero_()
            if self.scratch is not None:
                self.weight[block.columns] = block.weight if scale is None else block.weight.mul_(scale)
        self.written.add(block.columns.start)

    def grads(self, hidden: Tensor | None, scale: Tensor | None = None) -> Grads:
        """All of them in the tensors' dtypes; bias and lora multiplied by `scale`."""
        if self.weight is not None and self.again and not self.written:
            self.weight.zero_()
        head = self.head
        bias, lora = (v if v is None or scale is None else v.mul_(scale) for v in (self.bias, self.lora))
        return Grads(hidden, _as(self.weight, head.weight), _as(bias, head.bias), _as(lora, head.lora_b))


def _as(gradient: Tensor | None, like: Tensor | None) -> Tensor | None:
    return None if gradient is None or like is None else gradient.to(like.dtype)


@dataclass(frozen=True)
class Stats:
    """Per-row results, fp32 (fp64 for fp64 inputs), (N,) each."""

    logprobs: Tensor
    lse: Tensor
    extra: Mapping[str, Tensor] = field(default_factory=dict)  # the other statistics that were asked for, by name
    # (N, blocks of filter_columns), only under head.grad_filter > 0: probability mass of each vocabulary block.
    mass: Tensor | None = None
    # What the backward's probabilities are relative to, in units of the backend's own, where that is not lse.
    normaliser: Tensor | None = None

    @staticmethod
    def names(outputs: tuple[str, ...]) -> tuple[str, ...]:
        """Of the values behind the log-probs in `flat`."""
        return tuple(dict.fromkeys(("lse", *outputs)))

    def flat(self, outputs: tuple[str, ...]) -> tuple[Tensor, ...]:
        """As an autograd function returns them."""
        return (self.logprobs, *(self[name] for name in Stats.names(outputs)))

    @staticmethod
    def named(values: Sequence[Tensor], outputs: tuple[str, ...]) -> Stats:
        """The inverse of `flat`."""
        logprobs, *found = values
        return Stats.of(logprobs, dict(zip(Stats.names(outputs), found)))

    @staticmethod
    def of(logprobs: Tensor, statistics: Mapping[str, Tensor], mass: Tensor | None = None) -> Stats:
        """`statistics` holds lse."""
        extra = {name: value for name, value in statistics.items() if name != "lse"}
        return Stats(logprobs, statistics["lse"], extra, mass)

    def __getitem__(self, name: str) -> Tensor:
        return self.lse if name == "lse" else self.extra[name]

    @property
    def entropy(self) -> Tensor | None:
        return self.extra.get("entropy")

    def map(self, function: Callable[[Tensor], Tensor]) -> Stats:
        mass, normaliser = (v if v is None else function(v) for v in (self.mass, self.normaliser))
        extra = {name: function(value) for name, value in self.extra.items()}
        return Stats(function(self.logprobs), function(self.lse), extra, mass, normaliser)

    def pick(self, rows: slice | Tensor | None) -> Stats:
        return self.map(lambda values: pick(values, rows))

    @staticmethod
    def joined(parts: list[Stats]) -> Stats:
        """Of rows one after the other."""
        if len(parts) == 1:
            return parts[0]

        def cat(name: str) -> Tensor | None:
            found = [getattr(part, name) for part in parts]
            return None if found[0] is None else torch.cat(found)

        extra = {name: torch.cat([part.extra[name] for part in parts]) for name in parts[0].extra}
        logprobs, lse = (torch.cat([getattr(part, name) for part in parts]) for name in ("logprobs", "lse"))
        return Stats(logprobs, lse, extra, cat("mass"), cat("normaliser"))


# What a shard found of a block of rows, for these outputs -> their statistics over the shards of all ranks.
Merge = Callable[[ShardStats, slice, tuple[str, ...]], Stats]
# (n, 4), maximum and sum exp(z - maximum) of the policy and of the reference: of a shard -> of all.
MergeTotals = Callable[[Tensor], Tensor]


class TokenGrads(NamedTuple):
    """dloss / d(statistic) per row, (N,); None means zero everywhere. With Q = sum p^2 and V columns in all,

    dloss/dz_v = logprobs (1[v = y] - p_v) + lse p_v - entropy p_v (log p_v + H) + 2 sum_sq p_v (p_v - Q) + mean_logit / V

    What the largest logit adds is one entry of each row (`EntryGrads`), at its first column.
    """

    logprobs: Tensor | None
    entropy: Tensor | None = None
    lse: Tensor | None = None
    sum_sq: Tensor | None = None
    mean_logit: Tensor | None = None

    def live(self, like: Tensor) -> Tensor:
        """(N,) bool, on the device of `like` (N,): the rows where any of them is not exactly zero; a NaN is not."""
        live = torch.zeros_like(like, dtype=torch.bool)
        for vector in self:
            if vector is not None:
                live |= vector != 0
        return live

    def pick(self, rows: slice | Tensor | None) -> TokenGrads:
        return TokenGrads(*(pick(vector, rows) for vector in self))


class Grads(NamedTuple):
    """Gradients in the dtypes of the tensors they belong to; None where not needed."""

    hidden: Tensor | None  # (N, H), or (N, H + copies r) with an adapter
    weight: Tensor | None  # (V, H)
    bias: Tensor | None  # (V,)
    lora: Tensor | None = None  # (V, r), of lora_b

    @staticmethod
    def zeros(hidden: Tensor, head: Projection, needs: Needs) -> Grads:
        """What there is without a row, or without a column."""
        like = (hidden, head.weight, head.bias, head.lora_b)
        return Grads(*(torch.zeros_like(t) if need and t is not None else None for t, need in zip(like, needs)))


def kept_blocks(mass: Tensor, grad_filter: float, targets: Tensor, columns: int, exact: Tensor | None) -> Tensor:
    """(N, blocks) bool: the vocabulary blocks of `columns` columns that each row needs in the backward.

    A row leaves out its lightest blocks as long as their masses sum to at most grad_filter, but never the block of its
    target, and nothing where `exact` (N,) is set. With a loss gradient g for the log-prob, k for the lse and s for the sum of
    squares, what is dropped of dz then has an L1 norm of at most (|k - g| + 2 |s|) grad_filter per row.
    """
    ordered, order = mass.sort(dim=1)
    keep = torch.empty_like(order, dtype=torch.bool).scatter_(1, order, ~(ordered.cumsum(1) <= grad_filter))
    keep.scatter_(1, (targets // columns)[:, None], True)
    return keep if exact is None else keep | exact[:, None]


def rows_of_blocks(keep: Tensor, counts: list[int]) -> tuple[Tensor, ...]:
    """Of `kept_blocks` (N, blocks) the ascending rows that each block keeps, of which there are `counts`."""
    return (indices(keep.T.reshape(-1), sum(counts)) % max(len(keep), 1)).split(counts)


class BoundObjective(Protocol):
    """An objective with everything but the log-probs known, so that the backward can follow at once.

    Calling it with a slice of rows and their statistics gives contributions to the loss, which is their sum, and the
    derivatives of it. Where it is `tokenwise` the contributions are the rows' own; otherwise the rows must be all.
    """

    @property
    def tokenwise(self) -> bool:
        """Whether a token's loss and gradient depend on that token's statistics alone."""
        ...

    @property
    def needs_entropy(self) -> bool: ...

    def __call__(self, rows: slice, logprobs: Tensor, entropy: Tensor | None) -> tuple[Tensor, TokenGrads]:
        """-> contributions to the loss, and its derivatives by the (n,) log-probs and entropies."""
        ...


@dataclass(kw_only=True)
class BoundPolicy:
    """What a twin needs to know of a policy objective. Where `plain`, the loss is

    sum_n token_weights[n] (surrogate[n] + beta kl[n]) - entropy_weight H[n]
    """

    surrogate: str
    kl: str  # "" without a KL term
    old_logprobs: Tensor | None  # (N,) fp32; None: on-policy, the ratio is exactly 1 and keeps its gradient
    ref_logprobs: Tensor | None  # (N,) fp32, present when kl is
    advantages: Tensor  # (N,) fp32
    token_weights: Tensor  # (N,) fp32
    entropy_weight: Tensor | float  # 0.0: no entropy bonus
    beta: float
    options: dict[str, Any]  # the surrogate's own: epsilon_low, epsilon_high, delta ...
    level: str  # whose ratio: "token", or of the sequence: "sequence" (mean of logprob - old), "sequence_sum" ...
    offsets: Tensor  # (S + 1,) int64: where each sequence starts
    plain: bool  # nothing masks or reweights the surrogate or the KL


@dataclass(kw_only=True)
class BoundPreference:
    """What a twin needs to know of a preference objective over P pairs. Where `plain`, the loss is

    sum_p pair_weight sum_k weights[k] losses[k](pair p)

    of the completions' summed log-probs. The first P sequences are the chosen ones, the others the rejected ones.
    """

    losses: tuple[str, ...]
    weights: tuple[float, ...]
    beta: float
    options: dict[str, Any]
    offsets: Tensor  # (2 P + 1,) int64
    ref_sums: Tensor | None  # (2 P,) fp64, weighted as the policy's sums are; None: no reference
    token_weights: Tensor | None  # (N,) fp32: what a token counts in its sum; None: 1
    pair_weight: Tensor | float
    plain: bool  # pairs, reverse KL, no weighting by the policy


Kind = Literal["forward", "reverse", "jsd"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Comparison:
    """A policy's head, the reference's, and which divergence of the two; formulas are in `fused_rlhf.op.divergence`."""

    policy: Projection
    ref: Projection
    kind: Kind
    beta: float  # of jsd

    @property
    def wide(self) -> torch.dtype:
        return torch.promote_types(self.policy.wide, self.ref.wide)


@dataclass(frozen=True)
class RowPairs:
    """The same real tokens in the policy and in the reference."""

    hidden: Tensor  # (N, H)
    ref_hidden: Tensor  # (N, H')
    temperature: Tensor  # (N,)

    @property
    def count(self) -> int:
        return len(self.hidden)

    def pick(self, rows: Tensor | None) -> RowPairs:
        return RowPairs(*(pick(t, rows) for t in (self.hidden, self.ref_hidden, self.temperature)))


class Sums(NamedTuple):
    """What the gradient of a divergence needs of each row, (N,)."""

    lse: Tensor
    ref_lse: Tensor
    shift: Tensor  # lse - ref_lse, more exactly than the two give it
    mean: Tensor  # sum p s; 0 for the forward KL


Route = Literal["forward", "two_phase", "one_pass", "divergence"]


@dataclass(frozen=True)
class Work:
    """A call by its sizes alone, to ask a backend what it would take."""

    route: Route
    rows: int  # N real tokens
    hidden_size: int
    vocabulary: int
    dtype: torch.dtype = torch.float32  # of hidden, weight and products
    needs: Needs = field(default_factory=lambda: Needs(True, True, False))
    needs_entropy: bool = False  # by the objective
    multiprocessors: int = 132  # of a GPU: those of an H100 or H200
    device_bytes: int = 80 << 30  # of a GPU: its memory

    @property
    def gradients(self) -> int:
        """Bytes of the gradients of hidden and weight."""
        rows = (self.rows if self.needs.hidden else 0) + (self.vocabulary if self.needs.weight else 0)
        return 0 if self.route == "forward" else rows * self.hidden_size * self.dtype.itemsize


class Backend(Protocol):
    """The functions of a backend, a module. What it cannot do raises, naming the backend that can."""

    def filter_columns(self, device: torch.device) -> int:
        """Columns of a vocabulary block that head.grad_filter leaves a row or not; 0: it leaves all of them."""
        ...

    def statistics(self, rows: Rows, head: Projection, outputs: tuple[str, ...]) -> Stats: ...

    def partials(self, rows: Rows, head: Projection, outputs: tuple[str, ...]) -> ShardStats:
        """The statistics of a shard, before they are merged with those of the others; no columns at all are a shard, too."""
        ...

    def gradients(
        self,
        rows: Rows,
        head: Projection,
        stats: Stats,
        upstream: TokenGrads,
        needs: Needs,
        filtered: tuple[Tensor, ...] | None = None,
        entries: EntryGrads | None = None,
    ) -> Grads:
        """Two-phase: the logits again. `stats` are those of `statistics`, with entropy and sum_sq where their gradients are.

        filtered: for each vocabulary block of filter_columns the ascending rows that it is computed for; None: all.
        entries: what adds to the gradients of the head, and to those of no row here; there may be no rows at all.
        """
        ...

    def gathered(self, entries: Entries, head: Projection) -> Tensor:
        """(E,) logits of the entries alone; the bits of each do not depend on the others."""
        ...

    def gathered_hidden(self, grads: EntryGrads, head: Projection) -> Tensor:
        """(N, H) gradient of the entries' hidden states."""
        ...

    def truncated(self, rows: Rows, head: Projection, cut: Cut, outputs: tuple[str, ...], whole: bool) -> KeptSets:
        """The kept set of each row, found from its logits; `outputs` are statistics over what is kept."""
        ...

    def logits(self, rows: Rows, head: Projection) -> Tensor:
        """(N, V), as `gradients` compares them with a border."""
        ...

    def truncation_block(self, rows: Rows, head: Projection) -> int:
        """Rows whose logits are held at a time, with several numbers beside each, where the sets of a shard are searched."""
        ...

    def loss(self, objective: BoundObjective, logprobs: Tensor, entropy: Tensor | None) -> tuple[Tensor, TokenGrads]:
        """Contributions to the loss, and its derivatives by the (N,) log-probs and entropies."""
        ...

    def one_pass(
        self,
        rows: Rows,
        head: Projection,
        outputs: tuple[str, ...],
        objective: BoundObjective,
        needs: Needs,
        merge: Merge | None = None,
    ) -> tuple[Stats, Tensor, Grads]:
        """Statistics, contributions to the loss and the gradients of their sum.

        merge: of a shard, whose targets may lie beyond it: called for each of its blocks of rows, or once for all of them.
        """
        ...

    def one_pass_block(self, rows: Rows, head: Projection, needs: Needs) -> int:
        """Rows that one_pass takes at a time."""
        ...

    def divergence(self, rows: RowPairs, of: Comparison, merge: MergeTotals | None = None) -> tuple[Tensor, Sums]:
        """(N,) divergences; with `merge`, called for each block of rows, this shard's terms of their sums."""
        ...

    def divergence_block(self, rows: RowPairs, of: Comparison) -> int:
        """Rows that divergence takes at a time."""
        ...

    def divergence_gradients(self, rows: RowPairs, of: Comparison, sums: Sums, upstream: Tensor, needs: Needs) -> Grads:
        """Of the policy's operands, with upstream (N,)."""
        ...

    def one_pass_pays(self, rows: Rows, head: Projection, needs: Needs) -> bool:
        """Whether "auto" is to take one_pass where it serves: whether it is predicted to be the faster."""
        ...

    def scaled(self, gradient: Tensor, factor: Tensor) -> Tensor:
        """A gradient of one_pass times (), in place and rounded once."""
        ...

    def has_normaliser(self) -> bool:
        """Whether its statistics have a normaliser of their own."""
        ...

    def memory(self, work: Work) -> float:
        """Bytes at the peak beyond the inputs, gradients included."""
        ...

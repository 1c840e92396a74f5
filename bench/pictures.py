"""Every family that reads images, built tiny, random and offline: each form of picture and each trainer.

    python -m bench.pictures                 all of them: bench/results/pictures.json and bench/pictures.md
    python -m bench.pictures gemma3 mllama   these, in the table that is there

`picture_checks` says what is compared, `picture_family` with what.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from importlib.metadata import version
from typing import Any

import torch

from fused_rlhf.bench import checkout
from fused_rlhf.bench import picture_checks as checks
from fused_rlhf.bench.picture_family import Family
from fused_rlhf.bench.picture_rows import MIXED, ONE_EACH

NEAR = 1e-5
SEEN = 1e-4  # nats
HEAD = """# Pictures

`python -m bench.pictures`: {versions}, fp32, CPU. Tiny random models of every family that reads images, with
processors and chat templates of the family, against the family itself.

- prompts, pairs: forms of pictures (PIL, path, data: address, base64 and array in their parts, columns with places and
  without; one and three of them, in an earlier turn, rows with and without) that become what the family's own
  `processor.apply_chat_template` makes of the same messages, ids and all else, of those tried; as GRPO and PPO read them,
  and as DPO does.
- refused: rows of either kind (a place without a picture, one too many, an address of the network, a broken file, a video,
  an image token in a text or a completion) that are refused by row and field, of those tried.
- batch: the largest difference of hidden states of a batch (no picture to three, several sizes and turns) from those of
  each row alone, relative to the largest of them; at most 1e-5.
- seen: nats by which another picture of the same size changes the log-prob of a completion; more than 1e-4.
- DPO: loss and gradient norm of a step on those rows, against the model's own logits of each row alone, fp64 log-softmax
  and autograd; the relative difference, at most 1e-5. The reference is a model with other weights.
- GRPO, PPO: old log-probs, and the reference's, or values of a head and of a model beside it, of completions sampled
  after those rows, against the same; at most 1e-5. *failed* unless each prompt alone is given the same completion by the
  same uniforms, the ratios of the first update are 1 to the bit, its metrics finite, and a reward's `images` the row's.
- adapters: layers that LoRA gives some, all in the language model; a step changes no other weight.
- TRL: its `DPOTrainer` on rows of one picture each, and on the mixed ones, in one batch, against the same (without the
  auxiliary loss of experts).
"""


@dataclass(frozen=True)
class Row:
    """A family's cells: numbers, or words."""

    family: str
    prompts: str = ""
    pairs: str = ""
    refused: str = ""
    batch: float | str = ""
    seen: float | str = ""
    dpo: float | str = ""
    grpo: float | str = ""
    ppo: float | str = ""
    adapters: int | str = ""
    trl: float | str = ""
    trl_mixed: float | str = ""


Check = Callable[[Family], Any]
COLUMNS: dict[str, Check] = {
    "prompts": partial(checks.right, read=checks.through_prompts),
    "pairs": partial(checks.right, read=checks.through_pairs),
    "refused": checks.refused,
    "batch": checks.batch,
    "seen": checks.seen,
    "dpo": partial(checks.dpo_step, chats=MIXED),
    "grpo": checks.grpo_step,
    "ppo": checks.ppo_step,
    "adapters": checks.adapters,
}
TRL: dict[str, Check] = {
    "trl": partial(checks.trl_step, chats=ONE_EACH),
    "trl_mixed": partial(checks.trl_step, chats=MIXED),
}
NAMES = {"dpo": "DPO", "grpo": "GRPO", "ppo": "PPO", "trl": "TRL", "trl_mixed": "TRL, mixed"}


def tried(name: str, trl: bool = True) -> Row:
    """A family's row; a check that raises says so in its cell."""
    family = Family(name)
    cells = {column: attempt(check, family) for column, check in (COLUMNS | (TRL if trl else {})).items()}
    return Row(name, **cells)


def attempt(check: Check, family: Family) -> Any:
    try:
        return check(family)
    except Exception as error:
        return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def wrong(row: Row) -> list[str]:
    """The columns in which a family is not as it must be; TRL's are its own."""
    found = asdict(row)
    near = [name for name in ("batch", "dpo", "grpo", "ppo") if not as_number(found[name]) <= NEAR]
    whole = [name for name in ("prompts", "pairs", "refused") if not is_whole(found[name])]
    others = {"seen": as_number(row.seen) > SEEN, "adapters": as_number(row.adapters) > 0}
    return whole + near + [name for name, right in others.items() if not right]


def as_number(cell: Any) -> float:
    return float("nan") if isinstance(cell, str) else float(cell)


def is_whole(cell: str) -> bool:
    right, _, all_of_them = cell.partition("/")
    return right.isdecimal() and right == all_of_them != "0"


def shown(name: str, cell: Any) -> str:
    if name in TRL and isinstance(cell, float) and cell <= NEAR:
        return "equal"
    text = f"{cell:.2g}" if isinstance(cell, float) else str(cell)
    return f"TRL differs by {text}" if name in TRL and text[:1].isdecimal() else text


def markdown(rows: list[Row], versions: str) -> str:
    names = [field.name for field in fields(Row)]
    lines = [HEAD.format(versions=versions)]
    right = sum(not wrong(row) for row in rows)
    lines += [f"{right} of {len(rows)} families are right in every column.", ""]
    lines += ["| " + " | ".join(NAMES.get(name, name) for name in names) + " |", "|---" * len(names) + "|"]
    for row in rows:
        cells = [shown(name, cell).replace("|", "\\|") for name, cell in asdict(row).items()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(names: list[str]) -> int:
    try:
        here = checkout.needed("python -m bench.pictures") / "bench"
    except ValueError as error:
        raise SystemExit(str(error)) from None
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    import transformers

    from tests.vision_families import FAMILIES

    transformers.logging.set_verbosity_error()
    path = here / "results" / "pictures.json"
    versions = ", ".join(f"{name} {version(name)}" for name in ("transformers", "torch", "trl"))
    rows: dict[str, Any] = json.loads(path.read_text())["rows"] if names and path.exists() else {}
    for name in names or FAMILIES:
        start = time.monotonic()
        row = tried(name)
        rows[name] = asdict(row)
        print(name, f"{time.monotonic() - start:.1f}s", wrong(row) or "right", row, flush=True)
    rows = {name: rows[name] for name in FAMILIES if name in rows}
    path.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")
    found = [Row(**row) for row in rows.values()]
    (here / "pictures.md").write_text(markdown(found, versions))
    return 1 if any(map(wrong, found)) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

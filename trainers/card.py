"""The README.md of a trained model: what it is made from, how, and how well it did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

import fused_rlhf
from fused_rlhf.trainers.config import TrainConfig, to_dict
from fused_rlhf.trainers.sources import PACKAGED


def chosen(config: TrainConfig) -> dict[str, Any]:
    """Options other than the defaults."""
    default = to_dict(type(config)())
    values = to_dict(config).items()
    return {name: value for name, value in values if name not in ("resume", "overwrite") and value != default[name]}


def hub_id(config: TrainConfig) -> str | None:
    """The hub's name for the model that a run began with; it knows no folder of ours."""
    if config.model is None or Path(config.model).expanduser().exists():
        return None
    return PACKAGED[config.model].hub if config.model in PACKAGED else config.model


def model_card(config: TrainConfig, metrics: dict[str, float], adapters: bool = False) -> str:
    """Markdown with the front matter that the hub reads."""
    algorithm = type(config).__module__.rpartition(".")[2].removesuffix("_config")
    name = hub_id(config)
    base = [f"base_model: {name}"] if name else []
    adapters = adapters or config.lora_r > 0
    kind = ["library_name: peft"] if adapters else ["library_name: transformers"]
    head = "\n".join(["---", *base, *kind, f"tags: [fused-rlhf, {algorithm}]", "---"])
    rows = "".join(f"| {name} | {value:.4g} |\n" for name, value in metrics.items())
    loader = "AutoPeftModelForCausalLM" if adapters else "AutoModelForCausalLM"
    package = "peft" if adapters else "transformers"
    options = yaml.safe_dump(chosen(config), sort_keys=False)
    return f"""{head}

# Trained by fused-rlhf: {algorithm}

```python
from {package} import {loader}

model = {loader}.from_pretrained("this folder or its hub id")
```

| evaluation | |
|---|---|
{rows}
Options other than the defaults (`fused-rlhf {algorithm} --config FILE`):

```yaml
{options}```

fused-rlhf {fused_rlhf.__version__}, transformers {transformers.__version__}, torch {torch.__version__}
"""

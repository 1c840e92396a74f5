"""The README.md of a trained model: what it is made from, how, and how well it did."""

from __future__ import annotations

import dataclasses

import torch
import transformers
import yaml

import fused_rlhf
from fused_rlhf.trainers.config import TrainConfig, to_dict


def model_card(config: TrainConfig, metrics: dict[str, float]) -> str:
    """Markdown with the front matter that the hub reads."""
    algorithm = type(config).__module__.rpartition(".")[2].removesuffix("_config")
    base = [f"base_model: {config.model}"] if config.model else []
    kind = ["library_name: peft"] if config.lora_r else ["library_name: transformers"]
    head = "\n".join(["---", *base, *kind, f"tags: [fused-rlhf, {algorithm}]", "---"])
    default = {f.name: f.default for f in dataclasses.fields(config)}
    chosen = {
        name: value for name, value in to_dict(config).items() if value and getattr(config, name) != default[name]
    }
    rows = "".join(f"| {name} | {value:.4g} |\n" for name, value in metrics.items())
    loader = "AutoPeftModelForCausalLM" if config.lora_r else "AutoModelForCausalLM"
    package = "peft" if config.lora_r else "transformers"
    options = yaml.safe_dump(chosen, sort_keys=False)
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

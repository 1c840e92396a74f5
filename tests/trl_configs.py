"""Configurations of TRL's trainers, each run on TRL's own head and on ours: `test_integrations_trl.py`.

A name maps to arguments of the trainer's config class, and two that are the test's own: `model`, the kind of tiny model,
and `peft`, arguments of a `LoraConfig` ("prompt": prompt tuning).
"""

from __future__ import annotations

from typing import Any

LORA = {"target_modules": ["q_proj", "down_proj"]}

DPO: dict[str, dict[str, Any]] = {
    **{
        name: {"loss_type": [name]}
        for name in (
            *("sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
            *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
        )
    },
    "robust": {"loss_type": ["robust"], "label_smoothing": 0.1},
    "exo_pair": {"loss_type": ["exo_pair"], "label_smoothing": 1e-2},
    "aot_label_smoothing": {"loss_type": ["aot"], "label_smoothing": 0.1},
    "mpo": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "ld_alpha": {"ld_alpha": 0.4},
    "wpo": {
        "use_weighting": True,
        "beta": 1.0,
    },  # weights of 1e-2: with a small beta the rewards would be rounding alone
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "js_divergence": {"f_divergence_type": "js_divergence"},
    "alpha_divergence": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
    "precomputed_reference": {"precompute_ref_log_probs": True},
    "precomputed_ld_alpha": {"precompute_ref_log_probs": True, "ld_alpha": 0.4},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "reentrant_checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "gradient_accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 2},
    "lora": {"peft": LORA},
    "lora_precomputed": {"peft": LORA, "precompute_ref_log_probs": True},
    "lora_saved_head": {"peft": {**LORA, "modules_to_save": ["lm_head"]}},
    "prompt_tuning": {"peft": "prompt"},
    "softcap": {"model": "gemma2"},
    "logit_scale": {"model": "cohere"},
    "mixture_of_experts": {"model": "mixtral"},
}

OFF_POLICY = {"num_iterations": 2}
NEARBY = {**OFF_POLICY, "learning_rate": 5e-4}  # so that the ratio of a whole sequence is not clipped everywhere
GRPO: dict[str, dict[str, Any]] = {
    **{
        name: {"loss_type": name, **OFF_POLICY}
        for name in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo")
    },
    "vespo": {"loss_type": "vespo", **NEARBY},
    "on_policy": {},
    "sequence_level": {"importance_sampling_level": "sequence", "loss_type": "grpo", **NEARBY},
    "luspo_sequence_level": {"importance_sampling_level": "sequence", "loss_type": "luspo", **NEARBY},
    "delta": {"delta": 1.5, "epsilon_high": 0.3, **OFF_POLICY},
    "kl": {"beta": 0.2, **OFF_POLICY},
    "kl_uncorrected": {"beta": 0.2, "use_bias_correction_kl": False, "loss_type": "dr_grpo", **OFF_POLICY},
    "entropy_bonus": {"entropy_coef": 0.05, **OFF_POLICY},
    "adaptive_entropy": {
        "use_adaptive_entropy": True,
        "entropy_coef": 0.05,
        "entropy_target": 4.0,
        "entropy_coef_delta": 0.02,
    },
    "entropy_mask": {"top_entropy_quantile": 0.4, **OFF_POLICY},
    "entropy_mask_and_bonus": {"top_entropy_quantile": 0.4, "entropy_coef": 0.05, "loss_type": "grpo", **OFF_POLICY},
    "off_policy_mask": {"off_policy_mask_threshold": 1e-3, **OFF_POLICY},
    "temperature": {"temperature": 0.7, **OFF_POLICY},
    "truncated_masked": {"mask_truncated_completions": True, **NEARBY},
    "fp32_head": {"cast_lm_head_to_fp32": True, **OFF_POLICY},
    "fp32_head_tied": {"cast_lm_head_to_fp32": True, "model": "tied", "beta": 0.2},
    "gradient_checkpointing": {"gradient_checkpointing": True, "beta": 0.2, **OFF_POLICY},
    "gradient_accumulation": {
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 4,
        "beta": 0.2,
        "learning_rate": 2e-3,
    },
    "evaluation": {"eval_strategy": "steps", "eval_steps": 2, "beta": 0.2},
    "lora": {"peft": LORA, "beta": 0.2, "learning_rate": 1e-2, **OFF_POLICY},
    "softcap": {"model": "gemma2", **OFF_POLICY},
    "mixture_of_experts": {"model": "mixtral", **OFF_POLICY},
}

OTHERS: dict[str, dict[str, Any]] = {
    "rloo": {"trainer": "RLOO", "beta": 0.1, **OFF_POLICY},
    "rloo_normalised": {"trainer": "RLOO", "normalize_advantages": True, "temperature": 0.8, **OFF_POLICY},
    "kto": {"trainer": "KTO"},
    "kto_apo": {"trainer": "KTO", "loss_type": "apo_zero_unpaired", "precompute_ref_log_probs": True},
    "kto_lora": {"trainer": "KTO", "peft": LORA},
    "sft": {"trainer": "SFT"},
    "sft_dft": {"trainer": "SFT", "loss_type": "dft", "gradient_accumulation_steps": 2},
    "sft_experts": {"trainer": "SFT", "model": "mixtral"},
    "gmpo": {"trainer": "GMPO", "beta": 0.1, **OFF_POLICY},
    "gmpo_entropy_mask": {"trainer": "GMPO", "top_entropy_quantile": 0.5, **OFF_POLICY},
}

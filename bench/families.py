"""Every transformers family with an LM head, built tiny, random and offline, against its own logits.

    python -m bench.families                 all of them: bench/results/families.json and bench/families.md
    python -m bench.families causal:gpt2     these, in the table that is there

Five columns: no padding, padding on the right, on the left, a vocabulary resized, and what is refused. The truth is the
fp32 log-softmax of the logits of each row alone. A model is causal where its logits of a token do not depend on later
ones; `right` is not given to one that does.
"""

from __future__ import annotations

import functools
import json
import os
import re
import select
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fused_rlhf import lm_head
from fused_rlhf.bench import checkout

SECONDS = 40  # for a family
PARAMETERS = 130_000_000  # beyond them a family counts as one that cannot be built tiny
V = 256
LENGTHS = (9, 5, 7)
KINDS = {  # kind: (auto class, mapping of model types)
    "causal": ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    "seq2seq": ("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
    "masked": ("AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
    "vision": ("AutoModelForImageTextToText", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"),
    "speech": ("AutoModelForSpeechSeq2Seq", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES"),
}
COLUMNS = ("none", "right", "left", "resized")

# Sizes by the name of a config's field; the first pattern that matches the whole name decides.
SIZES: list[tuple[str, int]] = [
    (r"vocab_size|.*_vocab_size|vocab_size_.*", V),
    (r"max_position_embeddings|n_positions|max_sequence_length|n_ctx|max_(source|target)_positions", 128),
    (r"num_key_value_heads|num_kv_heads|n_kv_heads|.*_num_key_value_heads|swa_num_key_value_heads", 2),
    (r"num_attention_heads|n_heads?|num_heads|.*attention_heads|.*_num_heads|num_local_heads", 4),
    (r"(.*_)?head_dim|d_kv|d_head|rotary_dim|.*_head_dim", 8),
    (r"q_lora_rank|kv_lora_rank|o_lora_rank|.*_lora_rank", 16),
    (r"num_experts_per_tok.*|moe_topk|moe_top_k|top_k_experts|num_experts_per_token|moe_k", 2),
    (r"n_group|topk_group|num_expert_groups|n_shared_experts|moe_num_shared_experts", 1),
    (r"num_experts|num_local_experts|n_routed_experts|moe_num_experts|num_routed_experts", 4),
    (r"num_hidden_layers|n_layers?|num_layers|(en|de)coder_layers|num_(en|de)coder_layers|depth|num_blocks", 2),
    (r"first_k_dense_replace|num_dense_layers|num_kv_shared_layers", 1),
    (r"moe_intermediate_size|shared_expert_intermediate_size|.*expert.*_intermediate_size|expert_ffn.*_size", 16),
    (r"intermediate_size.*|ffn_hidden_size|n_inner|d_ff|hidden_dim|.*ffn_dim|.*_intermediate_size|pooler_fc_size", 48),
    (r"hidden_size|d_model|n_embd|dim|embed_dim|word_embed_proj_dim|lru_width|emb_dim|out_hidden_size", 32),
    (r"d_embed|text_embed_dim|.*_hidden_size|projection_dim|text_hidden_size|model_dim|.*proj_dim", 32),
    (r"image_size|input_size", 56),
    (r"patch_size", 14),
]
_SIZES = [(re.compile(name), size) for name, size in SIZES]
# What a config derives from others, and would check against them.
DERIVED = re.compile(
    r"per_layer_config|qk_head_dim|layer_types|mlp_layer_types|transformers_version|architectures|layers_block_type|block_types|attention_layers|"
    r"no_rope_layers|hybrid_layer_ids|.*_layer_types|model_type|layers_types|_name_or_path|dtype|id2label|label2id"
)
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_MROPE = {"text_config": {"rope_parameters": _ROPE | {"mrope_section": [1, 1, 2]}}}
OVERRIDES: dict[str, dict[str, Any]] = {
    "qwen2_vl": _MROPE,
    "qwen2_5_vl": _MROPE,
    "qwen2_5_omni_thinker": _MROPE | {"vision_start_token_id": 250},  # as their checkpoints have
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 250},
    "glm46v": _MROPE,
    "glm4v": _MROPE,
    "glm_ocr": _MROPE,
    "glmga": _MROPE,
    "glm4v_moe": {
        "text_config": {"rope_parameters": _ROPE | {"partial_rotary_factor": 0.5, "mrope_section": [1, 0, 1]}}
    },
    "hunyuan_vl": {"text_config": {"rope_parameters": _ROPE, "head_dim": 8}},
    "hunyuan_v1_dense": {"rope_parameters": _ROPE, "head_dim": 8},
    "hunyuan_v1_moe": {"rope_parameters": _ROPE, "head_dim": 8},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4, "num_key_value_heads": 4},
    "dots1": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 16, "n_groups": 1, "chunk_size": 16},
    "ministral": {"head_dim": 8, "num_key_value_heads": 2, "rope_parameters": _ROPE},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1, "ssm_state_size": 16, "chunk_size": 16},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8},
}
HEADLESS = re.compile(r"(.*_)?head_dim|d_kv|d_head")


def shrunk(config: dict[str, Any], keep: re.Pattern[str] | None, top: bool = True) -> dict[str, Any]:
    """A config's fields with small sizes; the fields that `keep` names stay away, to be derived."""
    small: dict[str, Any] = {}
    layers = config.get("num_hidden_layers")
    spare = iter(range(V - 1, 0, -1))  # ids of tokens beyond the small vocabulary
    for name, value in config.items():
        if DERIVED.fullmatch(name) and not (name == "model_type" and not top):
            continue
        if keep is not None and keep.fullmatch(name):
            continue
        if name in ("rope_parameters", "rope_scaling") and isinstance(value, dict):
            sections = {"mrope_section": [1, 1, 2]} if "mrope_section" in value else {}  # of half a head
            small[name] = value | sections
        elif isinstance(value, dict):
            small[name] = shrunk(value, keep, top=False)
        elif isinstance(value, list) and layers and len(value) == layers:
            small[name] = [size_of(name, it) for it in value[:2]]
        elif isinstance(value, bool) or not isinstance(value, int):
            small[name] = value
        elif re.fullmatch(r".*_(token_)?(id|index)", name):
            small[name] = value if value < V else next(spare)
        else:
            small[name] = size_of(name, value)
    if config.get("num_key_value_heads", 0) == config.get("num_attention_heads"):
        small["num_key_value_heads"] = small["num_attention_heads"]
    return small


def size_of(name: str, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        return value
    return min(value, next((size for pattern, size in _SIZES if pattern.fullmatch(name)), value))


def merged(config: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """`other` over `config`, dicts in dicts, too."""
    both = {
        n: merged(config[n], v) if isinstance(v, dict) and isinstance(config.get(n), dict) else v
        for n, v in other.items()
    }
    return config | both


def composite(model_type: str) -> Any:
    """The families whose config is made of two others."""
    import transformers as hf

    text: dict[str, Any] = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"intermediate_size": 48, "max_position_embeddings": 128}
    sizes: dict[str, Any] = {n: text[n] for n in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    decoder = hf.BertConfig(**text, is_decoder=True, add_cross_attention=True)
    if model_type == "encoder-decoder":
        return hf.EncoderDecoderConfig.from_encoder_decoder_configs(hf.BertConfig(**text), decoder)
    if model_type == "vision-encoder-decoder":
        encoder: Any = hf.ViTConfig(**sizes, image_size=28, patch_size=14)
        return hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    conv: dict[str, Any] = {
        "conv_dim": (32, 32),
        "conv_kernel": (8, 8),
        "conv_stride": (4, 4),
        "num_feat_extract_layers": 2,
    }
    encoder = hf.Wav2Vec2Config(**sizes, **conv, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2)
    return hf.SpeechEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)


def configs(model_type: str) -> Iterator[Callable[[], Any]]:
    """Tries, smallest first."""
    from transformers import CONFIG_MAPPING

    if model_type in ("encoder-decoder", "vision-encoder-decoder", "speech-encoder-decoder"):
        yield lambda: composite(model_type)
        return
    kind = CONFIG_MAPPING[model_type]
    dims = re.compile(HEADLESS.pattern + "|.*_dim|image_size|patch_size|.*_patch_size")
    layers = re.compile(
        "num_hidden_layers|n_layers?|num_layers"
    )  # for patterns of layers: as many as there are by default
    rope = re.compile("rope_parameters|rope_scaling")
    for keep in (None, HEADLESS, dims, rope, layers):
        yield functools.partial(make, kind, model_type, keep)


def make(kind: Any, model_type: str, keep: re.Pattern[str] | None) -> Any:
    return kind(**merged(shrunk(kind().to_dict(), keep), OVERRIDES.get(model_type, {})))


def build(kind: str, model_type: str) -> Any:
    """A tiny random model; raises ValueError, with what each try said, where none could be built."""
    import transformers as hf

    auto, said = getattr(hf, KINDS[kind][0]), []
    for config in configs(model_type):
        try:
            made = config()
            if kind == "causal":
                made.is_decoder = True  # what BERT and its like ask for
            made.use_cache = made.get_text_config(decoder=True).use_cache = False
            made._attn_implementation = "eager"
            for name in ("_experts_implementation",):
                if hasattr(made, name):
                    setattr(made, name, "eager")
            with torch.device("meta"):
                count = sum(p.numel() for p in auto.from_config(made).parameters())
            if count > PARAMETERS:
                raise ValueError(f"{count / 1e6:.0f} million parameters")
            torch.manual_seed(0)
            model = auto.from_config(made, dtype=torch.float32).eval()
            spread(model)
            if not (
                made.is_encoder_decoder or getattr(made.get_text_config(decoder=True), "is_encoder_decoder", False)
            ):
                with torch.no_grad():
                    model(input_ids=torch.arange(3, 8)[None])
            return model
        except Exception as error:
            said.append(" ".join(f"{type(error).__name__}: {error}".split())[:200])
    raise ValueError(" / ".join(dict.fromkeys(said)))


def spread(model: nn.Module) -> None:
    """Products of order one, so that a wrong position or direction is worth more than rounding."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(0.0, module.weight.shape[1] ** -0.5, generator=generator)
            elif isinstance(module, nn.Embedding) and module.weight.requires_grad:  # no sinusoids
                module.weight.normal_(0.0, 0.5, generator=generator)
        head = model.get_output_embeddings()  # type: ignore[operator]
        if isinstance(getattr(head, "weight", None), Tensor):
            head.weight.normal_(0.0, 2 * head.weight.shape[-1] ** -0.5, generator=generator)


class Trial:
    """One model, and ids that mean nothing special to it."""

    def __init__(self, model: Any) -> None:
        self.model, config = model, model.config
        text = config.get_text_config(decoder=True)
        self.encoder_decoder = bool(config.is_encoder_decoder or getattr(text, "is_encoder_decoder", False))
        special = {int(i) for i in re.findall(r'_(?:id|index)": (\d+)', config.to_json_string(use_diff=False))}
        vocabulary = min(V, len(model.get_input_embeddings().weight))
        plain = torch.tensor([i for i in range(3, vocabulary) if i not in special])
        generator = torch.Generator().manual_seed(1)
        self.rows = [plain[torch.randint(len(plain), (1, n), generator=generator)] for n in LENGTHS]
        self.other = next(int(i) for i in plain if i != self.rows[0][0, -1])
        pad = getattr(text, "pad_token_id", None)
        self.pad = pad if isinstance(pad, int) and 0 <= pad < vocabulary else 0
        self.ids, self.mask = ("decoder_input_ids", "decoder_attention_mask")
        self.source: dict[str, Tensor] = {}
        if not self.encoder_decoder:
            self.ids, self.mask = "input_ids", "attention_mask"
        else:
            self.source = self._source(plain[:7][None])

    def _source(self, text: Tensor) -> dict[str, Tensor]:
        """(1, ...) of what this encoder takes."""
        generator, config = torch.Generator().manual_seed(2), self.model.config
        tries: list[dict[str, Tensor]] = [{"input_ids": text}]
        names = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim")
        mels = [*(getattr(config, name) for name in names if hasattr(config, name)), 80]
        for n in mels:
            for shape in ((1, n, 2 * getattr(config, "max_source_positions", 64)), (1, 64, n), (1, n, 64)):
                tries.append({"input_features": torch.randn(shape, generator=generator)})
        tries.append({"input_values": torch.randn(1, 16000, generator=generator)})
        image = getattr(getattr(config, "encoder", None), "image_size", 28)
        tries.append({"pixel_values": torch.randn(1, 3, image, image, generator=generator)})
        said = []
        for source in tries:
            try:
                self._call(source, self.rows[1])
                return source
            except Exception as error:
                said.append(str(error).split("\n")[0])
        raise ValueError(f"no source was found that its encoder takes: {' / '.join(dict.fromkeys(said))[:200]}")

    def _call(self, source: dict[str, Tensor], ids: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model(**source, **{self.ids: ids}).logits

    def logits(self, ids: Tensor) -> Tensor:
        """(T, V) of one row alone."""
        logits = self._call(self.source, ids)
        if logits.shape[:2] != ids.shape:
            raise ValueError(f"its logits {tuple(logits.shape)} are not those of its ids {tuple(ids.shape)}")
        return logits[0].float()

    def is_causal(self) -> bool:
        changed = self.rows[0].clone()
        changed[0, -1] = self.other
        before, after = self.logits(self.rows[0])[:-1], self.logits(changed)[:-1]
        return bool((before - after).abs().max() <= 1e-4 * before.abs().max())

    def truth(self, row: Tensor) -> Tensor:
        return self.logits(row)[:-1].log_softmax(-1).gather(-1, row[0, 1:, None])[:, 0]

    def ours(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        given: dict[str, Any] = {name: value.expand(len(ids), *value.shape[1:]) for name, value in self.source.items()}
        if self.encoder_decoder:
            given |= {self.ids: ids} | ({} if mask is None else {self.mask: mask})
            return lm_head.logprobs(self.model, given.pop("input_ids", None), **given).logprobs
        return lm_head.logprobs(self.model, ids, mask).logprobs

    def error(self, side: str) -> float:
        """Largest difference to the truth, nats."""
        if side in ("none", "resized"):
            return float((self.ours(self.rows[0], None)[0] - self.truth(self.rows[0])).abs().max())
        T = max(LENGTHS)
        ids, mask = torch.full((len(LENGTHS), T), self.pad), torch.zeros(len(LENGTHS), T, dtype=torch.int64)
        starts = [0 if side == "right" else T - n for n in LENGTHS]
        for b, (row, start, n) in enumerate(zip(self.rows, starts, LENGTHS)):
            ids[b, start : start + n], mask[b, start : start + n] = row[0], 1
        found, worst = self.ours(ids, mask), 0.0
        for b, (row, start, n) in enumerate(zip(self.rows, starts, LENGTHS)):
            worst = max(worst, float((found[b, start : start + n - 1] - self.truth(row)).abs().max()))
        return worst


def tried(kind: str, model_type: str) -> dict[str, str]:
    """{column: right | refused | wrong | failed}, with `why`; {"not built": why} where it cannot be."""
    try:
        model = build(kind, model_type)
    except Exception as error:
        return {"not built": str(error)}
    try:
        trial = Trial(model)
        causal = trial.is_causal()
    except Exception as error:
        return {"not run": f"{type(error).__name__}: {error}".split("\n")[0][:160]}
    row, why = {"model": type(model).__name__, "causal": str(causal)}, []
    with torch.no_grad():
        for column in COLUMNS:
            try:
                if column == "resized":
                    model.resize_token_embeddings(V + 7)
                    trial.truth(trial.rows[0])  # a model whose own forward fails then is no case
            except Exception as error:
                row[column] = "failed"
                why.append(f"resized: its own: {type(error).__name__}: {error}".split("\n")[0][:160])
                continue
            try:
                error_ = trial.error(column)
            except (ValueError, TypeError) as error:
                ours = re.search(r"must|unsupported head|no output embeddings", str(error))
                row[column] = "refused" if ours else "failed"
                why.append(f"{column}: {error}".split("\n")[0][:220])
                continue
            except Exception as error:
                row[column] = "failed"
                why.append(f"{column}: {type(error).__name__}: {error}".split("\n")[0][:220])
                continue
            right = error_ <= 2e-4 and causal
            row[column] = "right" if right else "wrong"
            if not right:
                why.append(f"{column}: {error_:.2g} nats off" if causal else f"{column}: taken, and not causal")
    told: dict[str, list[str]] = {}
    for column, _, reason in (it.partition(": ") for it in why):
        told.setdefault(reason, []).append(column)
    return row | {"why": "; ".join(f"{', '.join(columns)}: {reason}" for reason, columns in told.items())}


def in_a_child(kind: str, model_type: str) -> dict[str, str]:
    """`tried` in a fork, which can be stopped and whose memory is given back."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            os.write(writer, json.dumps(tried(kind, model_type)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    ready, _, _ = select.select([reader], [], [], SECONDS)
    data = os.read(reader, 1 << 16) if ready else b""
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reader)
    if data:
        return json.loads(data)
    return {"not run": "died" if ready else f"took more than {SECONDS} s"}


def all_families() -> list[tuple[str, str]]:
    from transformers.models.auto import modeling_auto

    return [(kind, name) for kind, (_, mapping) in KINDS.items() for name in sorted(getattr(modeling_auto, mapping))]


def verdict(row: dict[str, str]) -> str:
    """One word for a family: the worst of its columns, and right where only a side or a resize is refused."""
    for word in ("not built", "not run"):
        if word in row:
            return word
    found = [row[column] for column in COLUMNS]
    if "wrong" in found:
        return "wrong"
    return found[0] if found[0] != "right" else "right" if set(found) == {"right"} else "right, but"


def markdown(rows: dict[str, dict[str, str]], versions: str) -> str:
    lines = [
        "# Families",
        "",
        f"`python -m bench.families`: {versions}, fp32, CPU. `lm_head.logprobs` of tiny random models against the log-softmax",
        "of their own logits for each row alone, within 2e-4 nats: without padding, padded on the right, on the left, and",
        "with a resized vocabulary. *refused*: a clear error, the reason beside it. *failed*: the model's own error. Families",
        "that this script cannot build are listed with what they said; they are not known to be right or wrong.",
        "",
    ]
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    for name, row in rows.items():
        counts[name.split(":")[0]][verdict(row)] += 1
    words = ["right", "right, but", "refused", "failed", "wrong", "not run", "not built"]
    lines += ["| kind | " + " | ".join(words) + " |", "|---" * (len(words) + 1) + "|"]
    lines += [f"| {kind} | " + " | ".join(str(count[w]) for w in words) + " |" for kind, count in counts.items()]
    lines += ["", "| family | model | none | right | left | resized | why |", "|---|---|---|---|---|---|---|"]
    for name, row in rows.items():
        out = next((f"{word}: {row[word]}" for word in ("not built", "not run") if word in row), "")
        cells = [row.get("model", ""), *(row.get(c, "") for c in COLUMNS), out or row.get("why", "")]
        lines.append(f"| {name} | " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main(names: list[str]) -> int:
    try:
        here = checkout.needed("python -m bench.families") / "bench"
    except ValueError as error:
        raise SystemExit(str(error)) from None
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    import transformers

    transformers.logging.set_verbosity_error()
    tried("causal", "llama")  # imports what every child would import again
    path, versions = (
        here / "results" / "families.json",
        f"transformers {transformers.__version__}, torch {torch.__version__}",
    )
    rows: dict[str, dict[str, str]] = {}
    if names and path.exists():
        rows = json.loads(path.read_text())["rows"]
    for kind, name in all_families():
        if names and f"{kind}:{name}" not in names:
            continue
        start = time.monotonic()
        rows[f"{kind}:{name}"] = row = in_a_child(kind, name)
        print(f"{kind}:{name}", f"{time.monotonic() - start:.1f}s", verdict(row), row, flush=True)
        path.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")
    (here / "families.md").write_text(markdown(rows, versions))
    print(Counter(verdict(row) for row in rows.values()))
    return 1 if any(verdict(row) == "wrong" for row in rows.values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

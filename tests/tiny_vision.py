"""A random Qwen2.5-VL of the smallest size with its processor, for tests of image inputs."""

from __future__ import annotations

from typing import Any

from PIL import Image
from transformers import (
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
)

from fused_rlhf.trainers import model as models

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
SPECIAL = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


class Processor(Qwen2_5_VLProcessor):
    """Qwen2.5-VL's own without videos, whose processor needs torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **kwargs: Any) -> None:
        self.image_token, self.video_token = SPECIAL[2:]
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids(SPECIAL[2:])
        ProcessorMixin.__init__(self, image_processor, tokenizer, **kwargs)


def build(hidden_size: int = 32) -> tuple[Qwen2_5_VLForConditionalGeneration, Processor]:
    tokenizer = models.char_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    ids: dict[str, Any] = {
        name: tokenizer.convert_tokens_to_ids(token) for name, token in zip(("start", "end", "image", "video"), SPECIAL)
    }
    images = Qwen2VLImageProcessor(patch_size=4, merge_size=2, temporal_patch_size=1, min_pixels=64, max_pixels=256)
    processor = Processor(image_processor=images, tokenizer=tokenizer, chat_template=TEMPLATE)
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {
        "depth": 1,
        "hidden_size": hidden_size,
        "intermediate_size": hidden_size,
        "num_heads": 2,
        "patch_size": 4,
        "temporal_patch_size": 1,
        "spatial_merge_size": 2,
        "out_hidden_size": hidden_size,
        "fullatt_block_indexes": [0],
        "window_size": 16,
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["image"],
        video_token_id=ids["video"],
        vision_start_token_id=ids["start"],
        vision_end_token_id=ids["end"],
        tie_word_embeddings=False,
        **{"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id},
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval(), processor


def picture(shade: int, width: int = 16, height: int = 8) -> Image.Image:
    return Image.new("RGB", (width, height), (shade, 255 - shade, 128))


def samples(count: int) -> list[dict[str, Any]]:
    """Prompts with a picture of its own each, of two sizes; the last has none."""
    rows: list[dict[str, Any]] = [
        {"prompt": f"{i}?", "answer": "7", "images": [picture(40 * i, 8 * (1 + i % 2))]} for i in range(count)
    ]
    rows[-1]["images"] = []
    return rows

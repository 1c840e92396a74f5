"""Random models of the smallest size with their processors: twenty families that read images, each in its own way.

Processors and templates are those of the family, for characters and pictures of a few pixels. A turn is written as the
family writes it: `{role}` and `{content}` stand for the message's, whose pictures become the family's placeholder.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from PIL import Image
from transformers import PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

from fused_rlhf.trainers import model as models

hf: Any = transformers
Family = Callable[[], tuple[PreTrainedModel, ProcessorMixin]]
FAMILIES: dict[str, Family] = {}


def family(name: str) -> Callable[[Family], Family]:
    return lambda build: FAMILIES.setdefault(name, build)


# ---- the parts that families share


def tokenizer(*special: str, pad: str, eos: str, bos: str | None = None, **named: Any) -> PreTrainedTokenizerFast:
    """One token per character and the family's own; `named` may hold image_token and others, or add_bos_token."""
    tokens = {"pad_token": pad, "eos_token": eos, "bos_token": bos, "unk_token": "<unk>"} | named
    tokens = {name: token for name, token in tokens.items() if token is not None}
    return PreTrainedTokenizerFast(
        tokenizer_object=models.char_tokenizer().backend_tokenizer,
        extra_special_tokens=list(special),
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **tokens,
    )


def id_of(tokens: PreTrainedTokenizerFast, token: str) -> Any:
    return tokens.convert_tokens_to_ids(token)


def ids(tokens: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {f"{kind}_token_id": getattr(tokens, f"{kind}_token_id") for kind in ("pad", "eos", "bos")}


def text(tokens: PreTrainedTokenizerFast, **changes: Any) -> dict[str, Any]:
    """The configuration of a decoder over `tokens`; weights large enough for images to show in the logits."""
    sizes = {
        "vocab_size": len(tokens),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
    }
    return sizes | ids(tokens) | changes


def vision(**changes: Any) -> dict[str, Any]:
    """The configuration of an encoder of 16 x 16 pixels in patches of 8 x 8."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
        "initializer_range": 0.2,
    }
    return sizes | changes


SQUARE = {"height": 16, "width": 16}


def built(kind: Any, config: Any, tokens: PreTrainedTokenizerFast, *more_eos: str) -> PreTrainedModel:
    """The model, whose weights that start at zero, as some gates of pictures do, are as open as the others."""
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if not weight.any() and (weight.ndim > 1 or weight.numel() == 1):
                weight.normal_()
    ends = [tokens.eos_token_id, *(id_of(tokens, token) for token in more_eos)]
    model.generation_config.update(**ids(tokens) | {"eos_token_id": ends if more_eos else ends[0]})
    return model


def without_videos(kind: Any) -> Any:
    """A processor's class without its video processor, which needs torchvision."""
    names = [name for name in kind.get_attributes() if name != "video_processor"]
    return type(kind.__name__, (kind,), {"get_attributes": classmethod(lambda cls: names)})


def template(image: str, turn: str, opening: str, start: str = "", roles: dict[str, str] | None = None) -> str:
    """`turn` of every message after `start`, then, if asked for, the `opening` of the assistant's."""
    content = (
        "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
        f"{{% if part.type == 'image' %}}{image}{{% else %}}{{{{ part.text }}}}{{% endif %}}"
        "{% endfor %}{% endif %}"
    )
    role = f"{{{{ {roles or {}}.get(m.role, m.role) }}}}"
    body = turn.replace("{role}", role).replace("{content}", content)
    return f"{start}{{% for m in messages %}}{body}{{% endfor %}}{{% if add_generation_prompt %}}{opening}{{% endif %}}"


def chatml(image: str) -> str:
    return template(image, "<|im_start|>{role}\n{content}<|im_end|>\n", "<|im_start|>assistant\n")


def picture(shade: int, width: int = 16, height: int = 8) -> Image.Image:
    """Unlike those of other shades not in its colour alone, which a norm might take away."""
    gradient = Image.linear_gradient("L").resize((width, height)).rotate(shade)
    return Image.merge("RGB", [gradient, Image.new("L", (width, height), shade), gradient.point(lambda x: 255 - x)])


# ---- Qwen


QWEN = ("<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    return tokenizer(*QWEN, pad="<|endoftext|>", eos="<|im_end|>")


def qwen(prefix: str, processor: Any, text_changes: dict[str, Any], vision_config: dict[str, Any]) -> Any:
    """A model of patches of 4 x 4 pixels, of which 2 x 2 become one token."""
    tokens = qwen_tokenizer()
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    config = getattr(hf, f"{prefix}Config")(
        text_config=text(tokens, **text_changes),
        vision_config={"patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2, **vision_config},
        **{name: id_of(tokens, token) for name, token in zip(names, QWEN[1:])},
        **ids(tokens),
    )
    images = hf.Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=512)
    chat = chatml("<|vision_start|><|image_pad|><|vision_end|>")
    made = without_videos(processor)(image_processor=images, tokenizer=tokens, chat_template=chat)
    return built(getattr(hf, f"{prefix}ForConditionalGeneration"), config, tokens), made


@family("qwen2.5-vl")
def qwen2_5_vl() -> Any:
    sizes = vision(depth=1, num_heads=2, out_hidden_size=32, fullatt_block_indexes=[0], window_size=16)
    rope = {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    return qwen("Qwen2_5_VL", hf.Qwen2_5_VLProcessor, rope, sizes | {"patch_size": 4})


# ---- LLaVA


@family("llava-next")
def llava_next() -> Any:
    tokens = tokenizer("<image>", pad="<pad>", eos="</s>", bos="<s>", add_bos_token=True)
    pinpoints = [[16, 32], [32, 16], [32, 32]]
    config = hf.LlavaNextConfig(
        text_config={"model_type": "mistral", **text(tokens)},
        vision_config={"model_type": "clip_vision_model", **vision()},
        image_token_index=id_of(tokens, "<image>"),
        image_grid_pinpoints=pinpoints,
        **ids(tokens),
    )
    images = hf.LlavaNextImageProcessorPil(size={"shortest_edge": 16}, crop_size=SQUARE, image_grid_pinpoints=pinpoints)
    turn = (
        "{% if m.role == 'user' %}[INST] {content} [/INST]{% elif m.role == 'system' %}<<SYS>>\n{content}\n<</SYS>>\n\n"
        "{% else %} {content}</s>{% endif %}"
    )
    processor = hf.LlavaNextProcessor(
        images,
        tokens,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>\n", turn, ""),
    )
    return built(hf.LlavaNextForConditionalGeneration, config, tokens), processor


# ---- Gemma


SIGLIP = {"model_type": "siglip_vision_model"}


def gemma_tokenizer(**named: str) -> PreTrainedTokenizerFast:
    turns = ("<start_of_turn>", "<end_of_turn>")
    return tokenizer(*turns, pad="<pad>", eos="<eos>", bos="<bos>", add_bos_token=True, **named)


def gemma_template(image: str) -> str:
    """The system's text begins the first turn, which is the user's."""
    turn = (
        "{% if not (loop.index0 == 1 and messages[0].role == 'system') %}<start_of_turn>{role}\n{% endif %}"
        "{content}{% if m.role == 'system' %}\n\n{% else %}<end_of_turn>\n{% endif %}"
    )
    roles = {"assistant": "model", "system": "user"}
    return template(image, turn, "<start_of_turn>model\n", start="{{ bos_token }}", roles=roles)


@family("gemma3")
def gemma3() -> Any:
    named = {"boi_token": "<start_of_image>", "image_token": "<image_soft_token>", "eoi_token": "<end_of_image>"}
    tokens = gemma_tokenizer(**named)
    config = hf.Gemma3Config(
        text_config=text(tokens, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=16),
        vision_config={**SIGLIP, **vision(patch_size=4)},
        mm_tokens_per_image=4,
        **{f"{name}_index": id_of(tokens, token) for name, token in named.items()},
        **ids(tokens),
    )
    images = hf.Gemma3ImageProcessorPil(size=SQUARE)
    processor = hf.Gemma3Processor(images, tokens, gemma_template("<start_of_image>"), image_seq_length=4)
    return built(hf.Gemma3ForConditionalGeneration, config, tokens, "<end_of_turn>"), processor


@family("paligemma")
def paligemma() -> Any:
    tokens = tokenizer(pad="<pad>", eos="<eos>", bos="<bos>", image_token="<image>", add_bos_token=True)
    images = hf.SiglipImageProcessorPil(size=SQUARE)
    images.image_seq_length = 4
    # It has no chats: the picture and what is asked of it.
    chat = template("<image>", "{content}", "")
    processor = hf.PaliGemmaProcessor(images, tokens, chat)  # adds tokens of its own for places and segments
    config = hf.PaliGemmaConfig(
        text_config={"model_type": "gemma", **text(tokens)},
        vision_config={**SIGLIP, **vision(vision_use_head=False)},
        image_token_index=id_of(tokens, "<image>"),
        projection_dim=32,
        hidden_size=32,
        vocab_size=len(tokens),
        **ids(tokens),
    )
    return built(hf.PaliGemmaForConditionalGeneration, config, tokens), processor


# ---- Idefics


def idefics_template(image: str, start: str = "") -> str:
    turn = (
        "{role}{% if m.content is not string and m.content[0].type == 'image' %}:{% else %}: {% endif %}"
        "{content}<end_of_utterance>\n"
    )
    roles = {"user": "User", "assistant": "Assistant", "system": "System"}
    return template(image, turn, "Assistant:", start, roles)


TILES = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))


@family("idefics3")
def idefics3() -> Any:
    """A picture of more than 16 pixels becomes tiles of 16 x 16 and a whole, of 4 tokens each."""
    special = ("<fake_token_around_image>", "<image>", "<global-img>", *TILES)
    eos = "<end_of_utterance>"
    tokens = tokenizer(*special, pad="<|pad|>", eos=eos, bos="<|begin_of_text|>", add_bos_token=True)
    config = hf.Idefics3Config(
        text_config={"model_type": "llama", **text(tokens)},
        vision_config=vision(patch_size=4),
        image_token_id=id_of(tokens, "<image>"),
        scale_factor=2,
        **ids(tokens),
    )
    images = hf.Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    chat = idefics_template("<image>", start="<|begin_of_text|>")
    processor = hf.Idefics3Processor(images, tokens, image_seq_len=4, chat_template=chat)
    return built(hf.Idefics3ForConditionalGeneration, config, tokens), processor


# ---- Llama


@family("mllama")
def mllama() -> Any:
    """Reads a picture beside the text, in layers of their own; the placeholder has an embedding and no logit."""
    special = ("<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>", "<|image|>")
    tokens = tokenizer(
        *special, pad="<|finetune_right_pad_id|>", eos="<|eot_id|>", bos="<|begin_of_text|>", add_bos_token=True
    )
    assert id_of(tokens, "<|image|>") == len(tokens) - 1
    sizes = {"attention_heads": 2, "num_global_layers": 1, "intermediate_layers_indices": [0], "vision_output_dim": 64}
    config = hf.MllamaConfig(
        text_config=text(tokens, vocab_size=len(tokens) - 1, num_hidden_layers=3, cross_attention_layers=[1]),
        vision_config=vision(**sizes),
        image_token_index=id_of(tokens, "<|image|>"),
        **ids(tokens),
    )
    header = "<|start_header_id|>{role}<|end_header_id|>\n\n"
    chat = template(
        "<|image|>", header + "{content}<|eot_id|>", header.format(role="assistant"), start="{{ bos_token }}"
    )
    processor = hf.MllamaProcessor(hf.MllamaImageProcessorPil(size=SQUARE), tokens, chat)
    return built(hf.MllamaForConditionalGeneration, config, tokens), processor

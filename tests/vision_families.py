"""Random models of the smallest size with their processors: twenty families that read images, each in its own way.

Processors and chat templates are those of the family, for characters and pictures of a few pixels. A turn is written as
the family writes it: `{role}` and `{content}` stand for the message's, whose pictures become the family's placeholder.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin
from transformers.image_utils import SizeDict
from transformers.models.smolvlm import processing_smolvlm
from transformers.processing_utils import ImagesKwargs

from fused_rlhf.trainers import model as models

hf: Any = transformers
Family = Callable[[], tuple[PreTrainedModel, ProcessorMixin]]
FAMILIES: dict[str, Family] = {}


def family(name: str) -> Callable[[Family], Family]:
    return lambda build: FAMILIES.setdefault(name, build)


# ---- Tokens


def tokenizer(*special: str, pad: str, eos: str, bos: str | None = None, **named: Any) -> PreTrainedTokenizerFast:
    """One token per character and the family's own; `named` may hold image_token and others, or add_bos_token."""
    named |= {"pad_token": pad, "eos_token": eos, "unk_token": "<unk>"} | ({"bos_token": bos} if bos else {})
    return PreTrainedTokenizerFast(
        tokenizer_object=models.char_tokenizer().backend_tokenizer,
        extra_special_tokens=list(special),
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **named,
    )


def llama_tokenizer(*special: str) -> PreTrainedTokenizerFast:
    return tokenizer(*special, pad="<pad>", eos="</s>", bos="<s>", add_bos_token=True)


def id_of(tokens: PreTrainedTokenizerFast, token: str) -> Any:
    return tokens.convert_tokens_to_ids(token)


def ids(tokens: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {f"{kind}_token_id": getattr(tokens, f"{kind}_token_id") for kind in ("pad", "eos", "bos")}


# ---- Models


# The range is large enough for pictures to show in the logits.
WIDTH: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.2}
SQUARE = {"height": 16, "width": 16}


def text(tokens: PreTrainedTokenizerFast, kind: str = "", **changes: Any) -> dict[str, Any]:
    """The configuration of a decoder over `tokens`; `kind` where the family has none of its own."""
    sizes = {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512}
    return WIDTH | sizes | {"vocab_size": len(tokens)} | ids(tokens) | typed(kind) | changes


def vision(kind: str = "", **changes: Any) -> dict[str, Any]:
    """The configuration of an encoder of 16 x 16 pixels in patches of 8 x 8."""
    return WIDTH | {"intermediate_size": 32, "image_size": 16, "patch_size": 8} | typed(kind) | changes


def siglip(patch_size: int) -> dict[str, Any]:
    return vision("siglip_vision_model", patch_size=patch_size, vision_use_head=False)


def typed(kind: str) -> dict[str, Any]:
    return {"model_type": kind} if kind else {}


def build(
    prefix: str,
    tokens: PreTrainedTokenizerFast,
    image: str,
    decoder: dict[str, Any],
    encoder: dict[str, Any],
    more_eos: str = "",
    **config: Any,
) -> Any:
    """A model whose weights that start at zero, as some gates of pictures do, are as open as the others."""
    torch.manual_seed(0)
    config |= {"text_config": decoder, "vision_config": encoder, "image_token_id": id_of(tokens, image)}
    model = getattr(hf, f"{prefix}ForConditionalGeneration")(getattr(hf, f"{prefix}Config")(**config, **ids(tokens)))
    with torch.no_grad():
        for weight in model.parameters():
            if not weight.any() and (weight.ndim > 1 or weight.numel() == 1):
                weight.normal_()
    ends = [tokens.eos_token_id, id_of(tokens, more_eos)] if more_eos else tokens.eos_token_id
    model.generation_config.update(**ids(tokens) | {"eos_token_id": ends})
    return model.eval()


def without_videos(prefix: str) -> Any:
    """A processor's class without its video processor, which needs torchvision."""
    kind = getattr(hf, f"{prefix}Processor")
    changes = {
        "get_attributes": classmethod(
            lambda cls: [name for name in kind.get_attributes() if name != "video_processor"]
        ),
        "video_processor": SimpleNamespace(num_frames=None, fps=None),  # SmolVLM reads them for any chat
    }
    return type(kind.__name__, (kind,), changes)


# ---- Chat templates


def template(
    turn: str, image: str, opening: str, start: str = "", roles: dict[str, str] | None = None, strings: bool = True
) -> str:
    """`turn` of every message after `start`, then, if asked for, the `opening` of the assistant's.

    As the family's own does, it may read contents in parts only (not `strings`), and write nothing of others.
    """
    content = (
        f"{{% for part in m.content %}}{{% if part.type == 'image' %}}{image}"
        "{% elif part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
    )
    if strings:
        content = f"{{% if m.content is string %}}{{{{ m.content }}}}{{% else %}}{content}{{% endif %}}"
    body = turn.replace("{role}", f"{{{{ {roles or {}}.get(m.role, m.role) }}}}").replace("{content}", content)
    opened = f"{{% if add_generation_prompt %}}{opening}{{% endif %}}"
    # Written out: behind a tag, Jinja drops the end of a line.
    return f"{start}{{% for m in messages %}}{body}{{% endfor %}}{opened}".replace("\n", r"{{ '\n' }}")


def chatml(image: str, start: str = "", system: str = "") -> str:
    """`system` is what the system says where the messages say nothing of it."""
    turn = "<|im_start|>{role}\n{content}<|im_end|>\n"
    if system:
        unsaid = f"<|im_start|>system\n{system}<|im_end|>\n"
        turn = f"{{% if loop.first and m.role != 'system' %}}{unsaid}{{% endif %}}{turn}"
    return template(turn, image, "<|im_start|>assistant\n", start)


BOS = "{{ bos_token }}"
# Of a user's turn that the system's text has not begun already.
BEGINS = "{% if not (loop.index0 == 1 and messages[0].role == 'system') %}"


# ---- Qwen and GLM: patches of 4 x 4 pixels, of which 2 x 2 become one token


PATCHES: dict[str, Any] = {
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_heads": 2,
    "depth": 2,
}
MROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
QWEN = ("<|im_start|>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>")
QWEN2 = {"rope_parameters": MROPE}, "You are a helpful assistant."
QWEN3 = {"rope_parameters": MROPE | {"mrope_section": [4, 2, 2], "mrope_interleaved": True}}
QWEN3_SIZES: dict[str, Any] = {"out_hidden_size": 32, "num_position_embeddings": 64}
DEEP = QWEN3_SIZES | {"deepstack_visual_indexes": [0]}


def qwen(prefix: str, processor: str, changes: dict[str, Any], system: str = "", **sizes: Any) -> Any:
    tokens = tokenizer(*QWEN, pad="<|endoftext|>", eos="<|im_end|>")
    names = ("vision_start_token_id", "vision_end_token_id", "video_token_id")
    config = {name: id_of(tokens, token) for name, token in zip(names, QWEN[2:])}
    model = build(prefix, tokens, QWEN[1], text(tokens, **changes), vision(**PATCHES | sizes), **config)
    images = hf.Qwen2VLImageProcessorPil(patch_size=4, size={"shortest_edge": 64, "longest_edge": 512})
    chat = chatml("<|vision_start|><|image_pad|><|vision_end|>", system=system)
    return model, without_videos(processor)(images, tokens, chat_template=chat)


EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
LINEAR: dict[str, Any] = {f"linear_{of}": 2 for of in ("num_key_heads", "num_value_heads")}
LINEAR |= {f"linear_{of}": 16 for of in ("key_head_dim", "value_head_dim")}
LINEAR |= {"layer_types": ["linear_attention", "full_attention"], "partial_rotary_factor": 1.0}
WINDOW: dict[str, Any] = {"out_hidden_size": 32, "fullatt_block_indexes": [1], "window_size": 16}

family("qwen2-vl")(functools.partial(qwen, "Qwen2VL", "Qwen2VL", *QWEN2, embed_dim=32, mlp_ratio=2))
family("qwen2.5-vl")(functools.partial(qwen, "Qwen2_5_VL", "Qwen2_5_VL", *QWEN2, **WINDOW))
family("qwen3-vl")(functools.partial(qwen, "Qwen3VL", "Qwen3VL", QWEN3, **DEEP))
family("qwen3-vl-moe")(functools.partial(qwen, "Qwen3VLMoe", "Qwen3VL", QWEN3 | EXPERTS, **DEEP))
family("qwen3.5")(functools.partial(qwen, "Qwen3_5", "Qwen3VL", QWEN3 | LINEAR, **QWEN3_SIZES))


@family("glm4v")
def glm4v() -> Any:
    """Nothing ends a turn but the beginning of the next."""
    special = ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|image|>", "<|video|>")
    marks = {f"{kind}_{place}": f"<|{place}_of_{kind}|>" for kind in ("image", "video") for place in ("begin", "end")}
    tokens = tokenizer(*special, *marks.values(), pad="<|endoftext|>", eos="<|endoftext|>")
    names = {f"{name.replace('begin', 'start')}_token_id": token for name, token in marks.items()}
    config = {name: id_of(tokens, token) for name, token in (names | {"video_token_id": "<|video|>"}).items()}
    decoder = text(tokens, rope_parameters=MROPE | {"partial_rotary_factor": 1.0})
    encoder = vision(out_hidden_size=32, **PATCHES)
    image = "<|begin_of_image|><|image|><|end_of_image|>"
    chat = template("<|{role}|>\n{content}", image, "<|assistant|>\n", start="[gMASK]<sop>")
    images = hf.Glm4vImageProcessorPil(patch_size=4, size={"shortest_edge": 64, "longest_edge": 1024})
    model = build("Glm4v", tokens, "<|image|>", decoder, encoder, "<|user|>", **config)
    return model, without_videos("Glm4v")(images, tokens, chat_template=chat)


# ---- LLaVA and its kin: an encoder, a projection, a decoder


PINPOINTS = [[16, 16], [16, 32], [32, 16], [32, 32]]


@family("llava")
def llava() -> Any:
    tokens = llama_tokenizer("<image>")
    turn = "{% if m.role == 'system' %}{content} {% else %}{role}: {content} {% endif %}"
    roles = {"user": "USER", "assistant": "ASSISTANT"}
    processor = hf.LlavaProcessor(
        hf.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=SQUARE),
        tokens,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template(turn, "<image>\n", "ASSISTANT:", roles=roles, strings=False),
    )
    return build("Llava", tokens, "<image>", text(tokens, "llama"), vision("clip_vision_model")), processor


@family("llava-next")
def llava_next() -> Any:
    """Tiles of 16 x 16 pixels and a whole, with a token at the end of each line of the tiles."""
    tokens = llama_tokenizer("<image>")
    turn = (
        "{% if m.role == 'system' %}<<SYS>>\n{content}\n<</SYS>>\n\n"
        "{% elif m.role == 'user' %}[INST] {content} [/INST]{% else %} {content}</s> {% endif %}"
    )
    processor = hf.LlavaNextProcessor(
        hf.LlavaNextImageProcessorPil(size={"shortest_edge": 16}, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS),
        tokens,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template(turn, "<image>\n", "", strings=False),
    )
    configs = text(tokens, "mistral"), vision("clip_vision_model")
    return build("LlavaNext", tokens, "<image>", *configs, image_grid_pinpoints=PINPOINTS), processor


@family("llava-onevision")
def llava_onevision() -> Any:
    """Tiles where a text has one picture, none where it has several. A turn is not begun as it is opened."""
    tokens = tokenizer("<|im_start|>", "<image>", "<video>", pad="<|endoftext|>", eos="<|im_end|>")
    chat = template("<|im_start|>{role} {content}<|im_end|>", "<image>", "<|im_start|>assistant\n", strings=False)
    processor = without_videos("LlavaOnevision")(
        hf.LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=PINPOINTS),
        tokens,
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=chat.replace("{{ part.text }}", r"{{ '\n' + part.text }}"),
    )
    config = {"video_token_id": id_of(tokens, "<video>"), "image_grid_pinpoints": PINPOINTS}
    return build("LlavaOnevision", tokens, "<image>", text(tokens, "qwen2"), siglip(8), **config), processor


def tiles() -> Any:
    """Up to four tiles of 16 x 16 pixels and a whole."""
    return hf.GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=4)


@family("internvl")
def internvl() -> Any:
    named = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    tokens = tokenizer("<|im_start|>", pad="<|endoftext|>", eos="<|im_end|>", video_token="<video>", **named)
    kind = without_videos("InternVL")
    processor = kind(tiles(), tokens, image_seq_length=4, chat_template=chatml("<IMG_CONTEXT>\n"))
    configs = text(tokens, "qwen2"), vision(image_size=[16, 16], patch_size=[4, 4])
    return build("InternVL", tokens, "<IMG_CONTEXT>", *configs, image_seq_length=4), processor


@family("aya-vision")
def aya_vision() -> Any:
    roles = {"user": "<|USER_TOKEN|>", "assistant": "<|CHATBOT_TOKEN|>", "system": "<|SYSTEM_TOKEN|>"}
    turns = ("<|START_OF_TURN_TOKEN|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>", *roles.values())
    images = ("<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "TILE_GLOBAL", "TILE_1", "TILE_2")
    special = (*turns, *images, "TILE_3", "TILE_4")
    tokens = tokenizer(*special, pad="<PAD>", eos="<|END_OF_TURN_TOKEN|>", bos="<BOS_TOKEN>", add_bos_token=True)
    response = "{% if m.role == 'assistant' %}<|START_RESPONSE|>{content}<|END_RESPONSE|>{% else %}{content}{% endif %}"
    turn = f"<|START_OF_TURN_TOKEN|>{{role}}{response}<|END_OF_TURN_TOKEN|>"
    opening = "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>"
    chat = template(turn, "<image>", opening, start=BOS, roles=roles)
    sizes = {"patch_size": 4, "img_size": 16, "downsample_factor": 2}
    processor = hf.AyaVisionProcessor(tiles(), tokens, chat_template=chat, **sizes)
    decoder = text(tokens, "cohere2", logit_scale=1.0)
    return build("AyaVision", tokens, "<|IMG_PATCH|>", decoder, siglip(4), downsample_factor=2), processor


class OneTileKwargs(ImagesKwargs, total=False):
    patch_size: int
    max_num_patches: int
    return_row_col_info: bool


class OneTile(hf.Siglip2ImageProcessorPil):
    """For LFM2-VL, whose own needs torchvision: never cut, at most 64 patches of 4 x 4 pixels."""

    valid_kwargs = OneTileKwargs
    tile_size, downsample_factor, encoder_patch_size, use_thumbnail = 32, 2, 4, True

    def _preprocess(self, images: Any, return_tensors: Any = None, **kwargs: Any) -> Any:
        sizes = [[8 * max(1, min(4, round(side / 8))) for side in image.shape[-2:]] for image in images]
        resized = [self.resize(x, SizeDict(height=h, width=w)) for x, (h, w) in zip(images, sizes)]
        made = super()._preprocess(resized, return_tensors=return_tensors, **kwargs | {"do_resize": False})
        ones = [1] * len(sizes)
        return hf.BatchFeature({**made, "image_rows": ones, "image_cols": ones, "image_sizes": sizes})


@family("lfm2-vl")
def lfm2_vl() -> Any:
    special = ("<|im_start|>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>")
    tokens = tokenizer(*special, pad="<|pad|>", eos="<|im_end|>", bos="<|startoftext|>", image_token="<image>")
    chat = chatml("<image>", start=BOS)
    processor = hf.Lfm2VlProcessor(OneTile(patch_size=4, max_num_patches=64), tokens, chat_template=chat)
    decoder = text(tokens, "lfm2", layer_types=["conv", "full_attention"])
    encoder = vision("siglip2_vision_model", patch_size=4, num_patches=64)
    return build("Lfm2Vl", tokens, "<image>", decoder, encoder, projector_hidden_size=32), processor


# ---- Mistral: a picture keeps its shape, of up to 32 pixels; a token ends each line of patches


MISTRAL = ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]", "[IMG_BREAK]", "[IMG_END]")


@functools.cache
def pixtral_processor() -> Any:
    """The class, which imports a function from beside what needs torchvision; it stands beside the other one too."""
    folder = "transformers.models.pixtral"
    pil = importlib.import_module(f"{folder}.image_processing_pil_pixtral")
    with mock.patch.dict(sys.modules, {f"{folder}.image_processing_pixtral": pil}):
        return importlib.import_module(f"{folder}.processing_pixtral").PixtralProcessor


def mistral(prefix: str, patch_size: int, merge_size: int, turns: str, **config: Any) -> Any:
    tokens = llama_tokenizer(*MISTRAL)
    images = hf.PixtralImageProcessorPil(size={"longest_edge": 32}, patch_size=patch_size)
    chat = template(turns + "{% else %}{content}</s>{% endif %}", "[IMG]", "", start=BOS)
    sizes = {"patch_size": patch_size, "spatial_merge_size": merge_size}
    processor = pixtral_processor()(images, tokens, chat_template=chat, **sizes)
    encoder = vision("pixtral", image_size=32, patch_size=patch_size)
    return build(prefix, tokens, "[IMG]", text(tokens, "mistral"), encoder, **config), processor


@family("pixtral")
def pixtral() -> Any:
    turns = "{% if m.role == 'system' %}[INST]{content}\n\n{% elif m.role == 'user' %}"
    turns += BEGINS + "[INST]{% endif %}{content}[/INST]"
    return mistral("Llava", 8, 1, turns, vision_feature_select_strategy="full", vision_feature_layer=-1)


@family("mistral3")
def mistral3() -> Any:
    turns = "{% if m.role == 'system' %}[SYSTEM_PROMPT]{content}[/SYSTEM_PROMPT]"
    return mistral("Mistral3", 4, 2, turns + "{% elif m.role == 'user' %}[INST]{content}[/INST]", spatial_merge_size=2)


# ---- Gemma


@family("gemma3")
def gemma3() -> Any:
    named = {"boi_token": "<start_of_image>", "image_token": "<image_soft_token>", "eoi_token": "<end_of_image>"}
    turns = ("<start_of_turn>", "<end_of_turn>")
    tokens = tokenizer(*turns, pad="<pad>", eos="<eos>", bos="<bos>", add_bos_token=True, **named)
    ends = "{% if m.role == 'system' %}\n\n{% else %}<end_of_turn>\n{% endif %}"
    turn = BEGINS + "<start_of_turn>{role}\n{% endif %}{content}" + ends
    roles = {"assistant": "model", "system": "user"}
    chat = template(turn, named["boi_token"], "<start_of_turn>model\n", start=BOS, roles=roles)
    processor = hf.Gemma3Processor(hf.Gemma3ImageProcessorPil(size=SQUARE), tokens, chat, image_seq_length=4)
    decoder = text(tokens, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=16)
    config = {f"{name}_id": id_of(tokens, named[name]) for name in ("boi_token", "eoi_token")}
    configs = decoder, siglip(4), "<end_of_turn>"
    return build("Gemma3", tokens, named["image_token"], *configs, mm_tokens_per_image=4, **config), processor


@family("paligemma")
def paligemma() -> Any:
    """It has no chats: pictures, then what is asked of them. Its processor adds tokens for places and segments."""
    tokens = tokenizer(pad="<pad>", eos="<eos>", bos="<bos>", image_token="<image>", add_bos_token=True)
    images = hf.SiglipImageProcessorPil(size=SQUARE)
    images.image_seq_length = 4
    first = "{% for m in messages if m.content is not string %}{% for part in m.content if part.type == 'image' %}"
    chat = template("{content}", "", "", start=first + "<image>{% endfor %}{% endfor %}")
    processor = hf.PaliGemmaProcessor(images, tokens, chat)
    configs = text(tokens, "gemma"), siglip(8)
    return build("PaliGemma", tokens, "<image>", *configs, projection_dim=32, hidden_size=32), processor


# ---- Idefics


IDEFICS = ("<fake_token_around_image>", "<image>")
TILES = ("<global-img>", *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)))


def idefics_template(start: str = "") -> str:
    turn = "{role}:{% if m.content[0].type != 'image' %} {% endif %}{content}<end_of_utterance>\n"
    roles = {"user": "User", "assistant": "Assistant", "system": "System"}
    return template(turn, "<image>", "Assistant:", start, roles, strings=False)


@family("idefics2")
def idefics2() -> Any:
    """A picture becomes its four quarters and a whole, of 4 tokens each; all keep their shape."""
    tokens = llama_tokenizer(*IDEFICS, "<end_of_utterance>")
    images = hf.Idefics2ImageProcessorPil(size={"shortest_edge": 16, "longest_edge": 32}, do_image_splitting=True)
    processor = hf.Idefics2Processor(images, tokens, image_seq_len=4, chat_template=idefics_template())
    sampler = {"resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2, "resampler_head_dim": 16}
    sampler |= WIDTH | {"num_key_value_heads": 2}
    configs = text(tokens, "mistral"), vision(image_size=32), "<end_of_utterance>"
    return build("Idefics2", tokens, "<image>", *configs, perceiver_config=sampler), processor


def idefics(prefix: str, kind: Any, tokens: PreTrainedTokenizerFast) -> Any:
    """A picture of more than 16 pixels becomes tiles of 16 x 16 and a whole, of 4 tokens each."""
    sizes = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
    images = getattr(hf, f"{prefix}ImageProcessorPil")(**sizes)
    processor = kind(images, tokens, image_seq_len=4, chat_template=idefics_template(start=str(tokens.bos_token)))
    return build(prefix, tokens, "<image>", text(tokens, "llama"), vision(patch_size=4), scale_factor=2), processor


@family("idefics3")
def idefics3() -> Any:
    ends = {"pad": "<|pad|>", "eos": "<end_of_utterance>", "bos": "<|begin_of_text|>"}
    return idefics("Idefics3", hf.Idefics3Processor, tokenizer(*IDEFICS, *TILES, add_bos_token=True, **ends))


@family("smolvlm")
def smolvlm() -> Any:
    processing_smolvlm.num2words = str  # of videos' lengths; it asks for a package
    tokens = tokenizer(*IDEFICS, *TILES, "<video>", pad="<|pad|>", eos="<end_of_utterance>", bos="<|im_start|>")
    return idefics("SmolVLM", functools.partial(without_videos("SmolVLM"), video_processor=None), tokens)


# ---- Llama


@family("mllama")
def mllama() -> Any:
    """Reads a picture beside the text, in layers of their own; the placeholder has an embedding and no logit."""
    special = ("<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>", "<|image|>")
    ends = {"pad": "<|finetune_right_pad_id|>", "eos": "<|eot_id|>", "bos": "<|begin_of_text|>"}
    tokens = tokenizer(*special, add_bos_token=True, **ends)
    assert id_of(tokens, "<|image|>") == len(tokens) - 1
    header = "<|start_header_id|>{role}<|end_header_id|>\n\n"
    opening = header.replace("{role}", "assistant")
    chat = template(header + "{content}<|eot_id|>", "<|image|>", opening, start=BOS)
    processor = hf.MllamaProcessor(hf.MllamaImageProcessorPil(size=SQUARE), tokens, chat)
    decoder = text(tokens, vocab_size=len(tokens) - 1, num_hidden_layers=3, cross_attention_layers=[1])
    encoder = vision(num_global_layers=1, intermediate_layers_indices=[0], vision_output_dim=64)
    return build("Mllama", tokens, "<|image|>", decoder, encoder), processor

"""Chat templates in the shapes of the families in most use, with tokenizers learned here.

Each shape has what makes its family awkward: what opens an answer, what a turn ends with, what is trimmed, refused, or
rendered otherwise in earlier turns. Nothing of a family's own file is in it.
"""

# ruff: noqa: E501 (a template's line breaks are its own)

from __future__ import annotations

import functools
from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "system user assistant model tool human The answer is 42. What is 6*7? Be brief.\n\nSay it twice.",
    "You are a helpful assistant. Weather in Rome? It is sunny, 21 degrees.\n\n\n  two  spaces",
    "[INST] [/INST] <<SYS>>\n<</SYS>>\n\n<|user|>\n<|assistant|>\n<|system|>\n<think>\n</think>\n\n",
    '{"name": "weather", "arguments": {"city": "Rome"}} <tool_call>\n</tool_call> None null',
] * 4


@dataclass(frozen=True)
class Family:
    name: str
    template: str
    special: tuple[str, ...]  # tokens of their own; bos, eos first where there are any
    eos: str
    bos: str | None = None
    system: bool = True
    tools: bool = False
    spaces: bool = False  # a tokenizer that marks spaces and puts one before a text, as sentencepiece does
    starts: tuple[str, ...] = ()  # what the tokenizer adds before a text, if it is one that adds


CALLS = (
    "{%- for c in m.tool_calls or [] %}{%- set f = c.function %}"
    "{{ '\n<tool_call>\n{\"name\": \"' ~ f.name ~ '\", \"arguments\": ' ~ (f.arguments | tojson) ~ '}\n</tool_call>' }}{%- endfor %}"
)
SCHEMAS = "{%- if tools %}{{ '\n\n# Tools' }}{%- for t in tools %}{{ '\n' ~ (t | tojson) }}{%- endfor %}{%- endif %}"
IM = ("<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>")

CHATML = (
    "{%- if messages[0].role == 'system' %}{{ '<|im_start|>system\n' ~ messages[0].content }}"
    "{%- else %}{{ '<|im_start|>system\nYou are a helpful assistant.' }}{%- endif %}" + SCHEMAS + "{{ '<|im_end|>\n' }}"
    "{%- for m in messages %}{%- if m.role != 'system' or not loop.first %}"
    "{%- if m.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}"
    "{%- else %}{{ '<|im_start|>' + m.role + '\n' }}{%- if m.content %}{{ m.content }}{%- endif %}"
    + CALLS
    + "{{ '<|im_end|>\n' }}"
    "{%- endif %}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}OPEN{%- endif %}"
)
# Naive: contents are added up, so that a missing one stops it.
PLAIN_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINKING = (
    "{%- set ns = namespace(last=0) %}{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}"
    "{%- endfor %}{%- if tools %}{{ '<|im_start|>system' }}" + SCHEMAS + "{{ '<|im_end|>\n' }}{%- endif %}"
    "{%- for m in messages %}{%- set content = m.content if m.content is string else '' %}"
    "{%- if m.role == 'assistant' %}{%- set thought = m.reasoning_content or '' %}"
    "{%- if '</think>' in content %}{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{{ '<|im_start|>assistant\n' }}{%- if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{ '<think>\n' + thought + '\n</think>\n\n' }}{%- endif %}{{ content }}" + CALLS + "{{ '<|im_end|>\n' }}"
    "{%- elif m.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>\n' ~ content ~ '\n</tool_response><|im_end|>\n' }}"
    "{%- else %}{{ '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}{% for m in rest %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if loop.index0 == 0 and system %}{% set text = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m['content'] %}"
    "{% else %}{% set text = m['content'] %}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + text.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{- bos_token }}{%- if tools %}{{ '<|start_header_id|>system<|end_header_id|>' }}"
    + SCHEMAS
    + "{{ '<|eot_id|>' }}{%- endif %}"
    "{%- for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    '{%- if m.tool_calls %}{{ \'{"name": "\' + m.tool_calls[0].function.name + \'", "parameters": \' }}'
    "{{- m.tool_calls[0].function.arguments | tojson }}{{ '}' }}{%- else %}{{ m['content'] | trim }}{%- endif %}"
    "{{ '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
MISTRAL_SYSTEM = (
    "{{- bos_token }}{%- set ns = namespace(last=0) %}{%- for m in messages %}{%- if m.role == 'user' %}"
    "{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}{%- for m in messages %}"
    "{%- if m.role == 'system' %}{{ '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}"
    "{%- elif m.role == 'user' %}{%- if tools and loop.index0 == ns.last %}{{ '[AVAILABLE_TOOLS]' }}{{- tools | tojson }}"
    "{{- '[/AVAILABLE_TOOLS]' }}{%- endif %}{{ '[INST]' + m.content + '[/INST]' }}"
    "{%- elif m.role == 'tool' %}{{ '[TOOL_RESULTS]' + m.content + '[/TOOL_RESULTS]' }}"
    "{%- elif m.tool_calls %}{{ '[TOOL_CALLS]' }}{{- m.tool_calls | tojson }}{{- eos_token }}"
    "{%- else %}{{ m.content + eos_token }}{%- endif %}{%- endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{%- for m in messages %}{%- if m.role == 'system' %}{{ m.content }}{%- elif m.role == 'user' %}"
    "{{ '<|User|>' + m.content }}{%- elif m.role == 'tool' %}{{ '<|tool|>' + m.content }}"
    "{%- else %}{{ '<|Assistant|>' }}{%- if m.tool_calls %}"
    + CALLS
    + "{%- else %}{{ m.content.split('</think>')[-1] }}{%- endif %}"
    "{{ eos_token }}{%- endif %}{%- endfor %}{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
COMMAND = (
    "{{ bos_token }}{% for m in messages %}{{ '<|START|><|' + m['role'] | upper + '|>' + m['content'].strip() + '<|END|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|START|><|ASSISTANT|>' }}{% endif %}"
)
GLM = (
    "{{ '[gMASK]<sop>' }}{%- if tools %}{{ '<|system|>' }}" + SCHEMAS + "{%- endif %}{%- for m in messages %}"
    "{{ '<|' ~ ('observation' if m.role == 'tool' else m.role) ~ '|>\n' }}"
    "{%- if m.role == 'assistant' and loop.last %}{{ '<think></think>\n' }}{%- endif %}{{ m.content or '' }}"
    + CALLS
    + "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|assistant|>' }}{%- endif %}"
)

FAMILIES = {
    family.name: family
    for family in (
        Family("chatml", CHATML.replace("OPEN", ""), IM, "<|im_end|>", tools=True),
        Family("chatml-bos", CHATML.replace("OPEN", ""), IM, "<|im_end|>", "<|im_start|>", tools=True),
        Family("chatml-opens", CHATML.replace("OPEN", "{{ '<think>\n' }}"), IM, "<|im_end|>", tools=True),
        Family("chatml-plain", PLAIN_CHATML, IM[:2], "<|im_end|>"),
        Family("thinking", THINKING, IM, "<|im_end|>", tools=True),
        Family("llama2", LLAMA2, ("<s>", "</s>"), "</s>", "<s>", spaces=True),
        Family("llama3", LLAMA3, ("<bot>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"), "<|eot_id|>", "<bot>",
               tools=True),
        Family("mistral", MISTRAL, ("<s>", "</s>", "[INST]", "[/INST]"), "</s>", "<s>", system=False, spaces=True),
        Family("mistral-system", MISTRAL_SYSTEM,
               ("<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CALLS]"), "</s>", "<s>",
               tools=True),
        Family("gemma", GEMMA, ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<eos>", "<bos>", system=False,
               spaces=True),
        Family("phi3", PHI3, ("<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"), "<|endoftext|>"),
        Family("deepseek", DEEPSEEK, ("<|begin|>", "<|end|>", "<|User|>", "<|Assistant|>", "<think>", "</think>", "<tool_call>"),
               "<|end|>", "<|begin|>", tools=True),
        Family("zephyr", ZEPHYR, ("<s>", "</s>"), "</s>", "<s>", spaces=True),
        Family("command", COMMAND, ("<BOS>", "<|END|>", "<|START|>", "<|USER|>", "<|ASSISTANT|>", "<|SYSTEM|>"), "<|END|>", "<BOS>"),
        Family("glm", GLM, ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|endoftext|>", "<|system|>", "<think>", "</think>"),
               "<|endoftext|>", tools=True, starts=("[gMASK]", "<sop>")),
    )
}  # fmt: skip


@functools.cache
def tokenizer(name: str, adds: str = "") -> PreTrainedTokenizerFast:
    """A family's, which adds what begins a text ("b") or EOS ("e") to texts by itself, or both, or nothing."""
    family = FAMILIES[name]
    raw = Tokenizer(models.BPE(unk_token=None))
    if family.spaces:
        raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        raw.decoder = decoders.Metaspace(prepend_scheme="first")
        alphabet = [chr(i) for i in range(33, 127)] + ["\n", "▁"]
    else:
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        raw.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(TEXTS, trainer)
    raw.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in family.special])
    starts = family.starts or ((family.bos,) if family.bos else ())
    around = [*(starts if "b" in adds else ()), "$A", *([family.eos] if "e" in adds else ())]
    ids = [(token, raw.token_to_id(token)) for token in around if token != "$A"]
    raw.post_processor = processors.TemplateProcessing(" ".join(around), special_tokens=ids)
    names = {"pad_token": "<pad>", "eos_token": family.eos} | ({"bos_token": family.bos} if family.bos else {})
    made = PreTrainedTokenizerFast(tokenizer_object=raw, **names)
    made.chat_template = family.template
    return made

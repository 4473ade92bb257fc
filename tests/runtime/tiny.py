"""Tiny tokenizers of the two common kinds, and chat templates as publishers write them."""

from __future__ import annotations

import json

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

SPECIAL = ["<s>", "</s>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
TEXT = ["hello world, the quick brown fox jumps over the lazy dog", "the dog and the fox say hello"] * 5


def byte_level() -> Tokenizer:
    """As GPT-2, Llama 3 and Phi-4: bytes as letters, spaces belong to the word after them."""
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    found.train_from_iterator(TEXT, trainer)
    return found


def llama_style() -> Tokenizer:
    """As Llama 2 and Phi-3: "\u2581" for spaces, one put in front, unknown characters as bytes."""
    letters = sorted({c for text in TEXT for c in text} - {" "} | {"\u2581"})
    words = ["\u2581t", "\u2581th", "\u2581the", "\u2581h"]
    tokens = ["<unk>", *SPECIAL, *(f"<0x{b:02X}>" for b in range(256)), *letters, *words]
    merges = [("\u2581", "t"), ("\u2581t", "h"), ("\u2581th", "e"), ("\u2581", "h")]
    found = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=merges,
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    found.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    found.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    found.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    return found


def save(folder, tokenizer: Tokenizer, **config) -> None:
    """Write the files that Tokenizer.open reads."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


TEMPLATES = {
    "phi-3-mini": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}"
        "{{'<|system|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}"
        "{{'<|user|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'assistant' %}"
        "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    "phi-3.5-mini": (
        "{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}"
        "{{'<|system|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}"
        "{{'<|user|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'assistant' %}"
        "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    "phi-4-mini": (
        "{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message and "
        "message['tools'] is not none %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|tool|>' + "
        "message['tools'] + '<|/tool|>' + '<|end|>' }}{% else %}{{ '<|' + message['role'] + '|>' + "
        "message['content'] + '<|end|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    "llama-3": (
        "{{- bos_token }}\n{%- if not date_string is defined %}\n    {%- set date_string = "
        "\"26 Jul 2024\" %}\n{%- endif %}\n\n{#- A comment #}\n{%- if messages[0]['role'] == 'system' %}\n"
        "    {%- set system_message = messages[0]['content']|trim %}\n    {%- set messages = "
        "messages[1:] %}\n"
        '{%- else %}\n    {%- set system_message = "" %}\n{%- endif %}\n'
        '{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}\n'
        '{{- "Today Date: " + date_string + "\n\n" }}\n'
        "{%- if tools is not none %}\n    {%- for t in tools %}\n        {{- t | tojson(indent=4) }}\n"
        '        {{- "\n\n" }}\n    {%- endfor %}\n{%- endif %}\n{{- system_message }}\n{{- "<|eot_id|>" }}\n'
        "{%- for message in messages %}\n    {%- if message.role == 'tool' %}\n        {%- continue %}\n"
        "    {%- endif %}\n    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ "
        "message['content'] | trim + '<|eot_id|>' }}\n{%- endfor %}\n{%- if add_generation_prompt %}\n"
        "    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}\n{%- endif %}\n"
    ),
    "chatml": (
        "{% if messages[0]['role'] == 'tool' %}{{ raise_exception('tool cannot begin') }}{% endif %}"
        "{% for message in messages %}\n  {% if message.role == 'assistant' %}\n"
        "{% generation %}{% set x = 1 %}{{ '<|im_start|>assistant\n' + message.content + '<|im_end|>\n' }}"
        "{% endgeneration %}\n  {% else %}\n{{ '<|im_start|>' + message.role + '\n' + message.content + "
        "'<|im_end|>\n' }}\n  {% endif %}\n{% endfor %}{% if x is defined %}leaked{% endif %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}

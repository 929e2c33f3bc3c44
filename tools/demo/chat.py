"""The demo model's special tokens and chat format, once as Python and once as a Jinja template."""

from __future__ import annotations

from collections.abc import Sequence

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
SPECIAL_TOKENS = [PAD, BOS, EOS, *ROLES.values()]

Message = tuple[str, str]  # role, content

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}<|system|>{{ message['content'] | trim }}"
    "{% elif message['role'] == 'user' %}<|user|>{{ message['content'] | trim }}"
    "{% elif message['role'] == 'assistant' %}"
    "<|assistant|>{{ message['content'] | trim }}{{ eos_token }}"
    "{% else %}{{ raise_exception('unknown role: ' + message['role']) }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def render(messages: Sequence[Message]) -> str:
    """A conversation as text, without the leading BOS and the last EOS (the packer adds both)."""
    parts = []
    for role, content in messages:
        parts.append(ROLES[role] + content.strip() + (EOS if role == "assistant" else ""))
    return "".join(parts).removesuffix(EOS)

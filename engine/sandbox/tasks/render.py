"""Renders one chat template of a stranger, again and again, as transformers does.

The descriptor `socket` brings frames of JSON, each after its length in 4 bytes: first {"template": ...}, then
the arguments of `rendered` and "max_characters" for each conversation. Each is answered with one frame: {"text": ...},
or {"refused": the reason}. An empty frame says that the process is ready. A conversation may take CPU_S of processor
time; then the process dies of SIGXCPU.
"""

from __future__ import annotations

import math
import resource
import socket
import time
from collections.abc import Mapping
from typing import Any

import msgspec

CPU_S = 2
MAX_REASON = 300  # characters of a refusal
LENGTH_BYTES = 4


def prepare() -> None:
    import jinja2.sandbox  # noqa: F401
    from transformers.utils import chat_template_utils  # noqa: F401


def run(descriptors: dict[str, int], arguments: dict[str, Any]) -> dict[str, Any]:
    with socket.socket(fileno=descriptors["socket"]) as wire, wire.makefile("rwb") as file:
        _write(file, b"")
        template = msgspec.json.decode(_read(file))["template"]
        while data := _read(file):
            _allow_cpu()
            _write(file, _answer(template, data))
    return {}


def rendered(template: str, asked: Mapping[str, Any]) -> str:
    """The prompt of one conversation. `asked`: "messages", "tools", "documents", "add_generation_prompt" and
    "continue_final_message" as transformers takes them, "specials" (name -> special token) and more "variables".

    Raises whatever the template raises.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, _ = render_jinja_template(
        conversations=[asked["messages"]],
        tools=asked["tools"],
        documents=asked["documents"],
        chat_template=template,
        continue_final_message=asked["continue_final_message"],
        add_generation_prompt=asked["add_generation_prompt"],
        **{**asked["specials"], **asked["variables"]},
    )
    return str(texts[0])


def _answer(template: str, data: bytes) -> bytes:
    """A task boundary: a template may raise anything."""
    asked = msgspec.json.decode(data)
    try:
        text = rendered(template, asked)
        if len(text) > asked["max_characters"]:
            return _refusal(f"the result has more than {asked['max_characters']} characters")
        return msgspec.json.encode({"text": text})
    except MemoryError:
        return _refusal("it needs too much memory")
    except Exception as error:
        return _refusal(str(error) or type(error).__name__)


def _refusal(reason: str) -> bytes:
    printable = reason[:MAX_REASON].encode("ascii", "backslashreplace").decode()
    return msgspec.json.encode({"refused": printable})


def _allow_cpu() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    limit = math.ceil(time.process_time()) + CPU_S
    resource.setrlimit(resource.RLIMIT_CPU, (limit, most))


def _read(file: Any) -> bytes:
    """The next frame; nothing at the end."""
    length = file.read(LENGTH_BYTES)
    return bytes(file.read(int.from_bytes(length, "big")))


def _write(file: Any, data: bytes) -> None:
    file.write(len(data).to_bytes(LENGTH_BYTES, "big") + data)
    file.flush()

"""OpenAI's API: the response formats of chat completions and completions; the list of models in `routes`.

`model` names the base model or an adapter.
"""

from __future__ import annotations

from engine.server.formats import Format
from engine.server.openai.format import error_body, status_of
from engine.server.openai.parse import parse_chat, parse_completion

__all__ = ["CHAT_COMPLETIONS", "COMPLETIONS", "error_body", "status_of"]

CHAT_COMPLETIONS = Format(parse_chat, error_body, status_of)
COMPLETIONS = Format(parse_completion, error_body, status_of)

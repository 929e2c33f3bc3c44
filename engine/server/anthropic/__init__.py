"""Anthropic's API: the response format of messages; the count of their tokens in `routes`.

`model` names the base model or an adapter.
"""

from __future__ import annotations

from engine.server.anthropic.format import error_body
from engine.server.anthropic.parse import parse_messages
from engine.server.anthropic.schemas import MessagesBody
from engine.server.formats import Format
from engine.server.openai.format import status_of

__all__ = ["MESSAGES", "error_body"]

MESSAGES = Format(parse_messages, MessagesBody, error_body, status_of)

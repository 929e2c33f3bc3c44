"""OpenAI's API: the response formats of chat completions, completions and responses; the list of models in `routes`.

`model` names the base model or an adapter.
"""

from __future__ import annotations

from engine.server.formats import Format
from engine.server.openai.format import error_body, status_of
from engine.server.openai.parse import parse_chat, parse_completion
from engine.server.openai.responses.format import responses_error_body
from engine.server.openai.responses.parse import parse_responses
from engine.server.openai.responses.schemas import ResponsesBody
from engine.server.openai.schemas import ChatBody, CompletionBody

__all__ = ["CHAT_COMPLETIONS", "COMPLETIONS", "RESPONSES", "error_body", "status_of"]

CHAT_COMPLETIONS = Format(parse_chat, ChatBody, error_body, status_of)
COMPLETIONS = Format(parse_completion, CompletionBody, error_body, status_of)
RESPONSES = Format(parse_responses, ResponsesBody, responses_error_body, status_of)

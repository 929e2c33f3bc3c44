"""Other protocols become chat completions; errors keep the names of their own fields."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from engine.errors import InvalidRequest
from engine.server.conversation import Conversation
from engine.server.formats import Context
from engine.server.openai.messages import conversation
from engine.server.openai.parse import chat_parameters
from engine.server.openai.schemas import ChatBody
from engine.server.parameters import Parameters


@contextmanager
def named(*rules: tuple[str, str]) -> Iterator[None]:
    """Errors about fields of chat completions get the names of another protocol's: pattern -> replacement."""
    try:
        yield
    except InvalidRequest as error:
        field = error.field or ""
        for pattern, name in rules:
            field = re.sub(pattern, name, field)
        message = error.message.replace(f"`{error.field}`", f"`{field}`")
        raise InvalidRequest(message, field=field or None, hint=error.hint) from None


def translated(
    chat: ChatBody, context: Context, names: Mapping[str, str], *rules: tuple[str, str]
) -> tuple[Parameters, Conversation]:
    """The parameters and the prompt of a chat completion that another protocol means.

    `names`: parameter -> its name in that protocol; `rules`: see `named`. Raises InvalidRequest.
    """
    with named(*rules):
        return replace(chat_parameters(chat, context), names=names), conversation(chat)

"""A conversation as a client sent it, and what else a chat template is given; all bounded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from engine.server.bounds import check_size
from engine.server.parameters import invalid
from engine.server.tools.definitions import ToolUse

MAX_VARIABLES = 32
MAX_VARIABLES_BYTES = 16 << 10
MAX_DOCUMENTS = 128
MAX_DOCUMENTS_BYTES = 1 << 20
MAX_NAME = 64
MAX_CALLS = 128  # in one message
MAX_ARGUMENTS_BYTES = 1 << 20  # of one call
# Variables that conversations set themselves, and parameters of transformers' function that renders.
RESERVED = (
    *("messages", "tools", "documents", "chat_template", "tokenize", "self", "args"),
    *("add_generation_prompt", "continue_final_message", "return_assistant_tokens_mask"),
    *("conversation", "conversations"),
)

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in the form that chat templates take, and the variables next to them."""

    messages: Sequence[Message]
    tools: Sequence[dict[str, Any]] | None = None
    documents: Sequence[dict[str, Any]] | None = None
    template: str | None = (
        None  # name of one of the model's templates; None: as transformers chooses
    )
    variables: Mapping[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    use: ToolUse | None = None  # how the answer may call tools

    @property
    def characters(self) -> int:
        """Characters of the messages' contents, without those that the template adds."""
        return sum(len(str(message.get("content") or "")) for message in self.messages)

    @property
    def size(self) -> int:
        """Bytes of everything that a template is given, roughly."""
        data = (self.messages, self.tools, self.documents, self.variables)
        return len(msgspec.json.encode(data))


def variables_of(given: Mapping[str, Any] | None, name: str = "chat_template_kwargs") -> Message:
    """Variables for the template from a request. Raises InvalidRequest."""
    if not given:
        return {}
    if len(given) > MAX_VARIABLES:
        raise invalid(name, f"has {len(given)} names, the limit is {MAX_VARIABLES}", "send fewer")
    for key in given:
        if key in RESERVED:
            raise invalid(name, f"cannot set {key!r}", "use the request's own fields for it")
        if not (key.isidentifier() and key[0] != "_" and len(key) <= MAX_NAME):
            raise invalid(
                name,
                "has a name that is not an identifier",
                f"use letters, digits and _, at most {MAX_NAME} characters, not _ first",
            )
    check_size(given, name, MAX_VARIABLES_BYTES)
    return dict(given)


def documents_of(given: Sequence[Message] | None) -> Sequence[Message] | None:
    """Documents for the template from a request. Raises InvalidRequest."""
    if given is not None and len(given) > MAX_DOCUMENTS:
        raise invalid(
            "documents", f"has {len(given)} entries, the limit is {MAX_DOCUMENTS}", "send fewer"
        )
    check_size(given, "documents", MAX_DOCUMENTS_BYTES)
    return given


def check_calls(calls: Sequence[Any], name: str) -> None:
    """Raises InvalidRequest for too many calls in one message."""
    if len(calls) > MAX_CALLS:
        raise invalid(name, f"has {len(calls)} calls, the limit is {MAX_CALLS}", "send fewer")


def arguments_of(given: str | Mapping[str, Any], name: str) -> Message:
    """The arguments of a call in a message, as templates take them. Raises InvalidRequest."""
    try:
        found = msgspec.json.decode(given or "{}") if isinstance(given, str) else given
    except (msgspec.DecodeError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise invalid(
            name, "is not the JSON of an object", "send the arguments as the call had them"
        )
    check_size(found, name, MAX_ARGUMENTS_BYTES)
    return found

"""The seam of a response format: how a body becomes a generation, and how that becomes an answer.

A *parser* turns the bytes of a body into a `GenerationRequest`: prompts, parameters, adapter. A *formatter* turns
events into the bytes of a stream, or the finished choices into one answer. Neither knows HTTP.
`engine.server.inference` does the rest for every format: it reads, admits, generates, writes and counts. The table in
`engine.server.routes` says at which paths a format is served.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Protocol

from msgspec import Struct

from engine.adapters.ref import AdapterRef
from engine.config import EngineConfig
from engine.errors import InvalidRequest, LoraxError
from engine.lora.recipe import FIELD
from engine.server.events import Event, FinishedChoice
from engine.server.generation import Generation
from engine.server.keys import Keys
from engine.server.merged import MergedAdapters
from engine.server.parameters import BASE_NAMES, Parameters, invalid, resolve_adapter
from engine.server.prompts import Prompt
from engine.server.static import not_served
from engine.server.text import Text

NO_TOKENS = ("", "EMPTY", "NONE")  # OpenAI clients send these where they need a key and have none


@dataclass(frozen=True, slots=True)
class Context:
    """What a parser may use besides the body."""

    authorization: str  # the header; empty if there is none, or if it has a key of the server
    model_id: str  # the base model
    config: EngineConfig
    adapter_token: str = ""  # the header x-adapter-token
    keys: Keys | None = None  # the server's; None: not known here

    def adapter(
        self,
        name: str | None,
        source: str | None,
        merged: MergedAdapters | None = None,
        field: str = "adapter_id",
    ) -> AdapterRef | None:
        """The adapter of that name, or the merge; None for the base model. Raises InvalidRequest, and AdapterNotFound
        for `base` if an adapter is merged into the base model.

        `field`: the name of the name in the body.
        """
        adapters = self.config.adapters
        if name in BASE_NAMES and adapters.merge_adapter_weights:
            raise not_served(name, adapters.adapter_id or "", field)
        if merged is None:
            return resolve_adapter(name, source, self.model_id, self.config)
        if name and resolve_adapter(name, source, self.model_id, self.config) is not None:
            raise invalid(
                FIELD,
                f"cannot be combined with `{field}`",
                f"leave `{field}` out, or name the base model in it",
            )
        return merged.ref(source)

    def token(self, in_body: str | None) -> str | None:
        """The client's token for private adapters: from the body, else from a header. Raises InvalidRequest for other
        characters than printable ASCII, and for a key of the server, which no source may see."""
        places = {
            "api_token": in_body,
            "x-adapter-token": self.adapter_token.strip(),
            "Authorization": bearer(self.authorization),
        }
        field, given = next(((at, token) for at, token in places.items() if token), ("", ""))
        if not (given.isascii() and given.isprintable()):
            raise InvalidRequest(
                "the API token has characters other than printable ASCII",
                field=field,
                hint="send the token exactly as you received it, or leave it out",
            )
        if self.keys is not None and self.keys.tenant_of(given) is not None:
            raise InvalidRequest(
                "the token for private adapters is an API key of this server",
                field=field,
                hint="send the token of the adapter's source, or leave it out",
            )
        return None if given.upper() in NO_TOKENS else given


def bearer(authorization: str) -> str:
    """The token of a header `Authorization: Bearer`; empty for every other header."""
    scheme, _, token = authorization.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer that is not streamed."""

    body: Any  # encoded as JSON
    headers: Mapping[str, str] = field(default_factory=dict)


class Formatter(Protocol):
    """Formats the answer to one request: either a stream (`events`, then `end` or `failure`) or one `answer`."""

    def events(self, events: list[Event]) -> bytes:
        """The bytes that `events` add to the stream. May be empty."""
        ...

    def end(self) -> bytes:
        """The last bytes of a stream, once the generation has finished."""
        ...

    def failure(self, error: LoraxError) -> bytes:
        """The last bytes of a stream whose generation failed after its first bytes were sent."""
        ...

    def answer(self, choices: Sequence[FinishedChoice]) -> Answer:
        """The answer, with all choices in order."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """What a client asked for, parsed. The generation checks prompts and parameters against the server's limits."""

    prompts: Sequence[Prompt]
    parameters: Parameters  # the adapter included
    formatter: Callable[[Generation, Text], Formatter]  # called when the generation has started
    stream: bool
    id: str | None = None  # of the generation; drawn if None
    headers: Mapping[str, str] = field(default_factory=dict)  # added to the answer's


class Parser(Protocol):
    def __call__(self, body: bytes | bytearray, context: Context, /) -> GenerationRequest:
        """Parses a whole body, without waiting. Raises MalformedRequest and InvalidRequest."""
        ...


@dataclass(frozen=True, slots=True)
class Format:
    """One response format."""

    parse: Parser
    body: (
        type[Struct] | None
    )  # of a body; names the fields that the parser ignores. None: it ignores none
    error_body: Callable[[LoraxError], Any]  # of an error without a stream; encoded as JSON
    status_of: Callable[[LoraxError], int] = attrgetter("status")  # of such an error

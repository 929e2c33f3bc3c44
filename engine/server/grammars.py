"""What clients ask of the form of an output, as a grammar: response_format, and the extensions of vLLM."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct

from engine.adapters.versions import Lru
from engine.errors import InvalidRequest
from engine.grammar import check, digest_of, of_json_schema, of_lark, of_regex
from engine.server.parameters import invalid

MAX_CHOICES = 1024
MAX_CHECKED = 512  # grammars whose check is remembered
THREADS = 2  # checks at the same time

Schema = dict[str, Any] | bool


class StructuredOutputs(Struct, frozen=True):
    """vLLM's `structured_outputs`: exactly one of them."""

    json: Schema | str | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None  # Lark


class ResponseFormat(Struct, frozen=True):
    """OpenAI's and LoRAX's `response_format`, ours (`regex`, `choice`, `lark`), and TGI's (a type and its `value`)."""

    type: str
    schema: Schema | str | None = None
    json_schema: dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    value: Any = None


def grammar_of(
    response_format: ResponseFormat | None,
    structured: StructuredOutputs | None = None,
    *,
    name: str = "response_format",
) -> str | None:
    """The grammar of a request's output; None: it is free. `name`: of the format's field. Raises InvalidRequest."""
    if structured is not None:
        if response_format is not None and response_format.type != "text":
            raise invalid(
                "structured_outputs", "cannot be combined with `response_format`", "leave one out"
            )
        return _of_structured(structured)
    return None if response_format is None else _of_format(response_format, name)


def _of_format(given: ResponseFormat, name: str) -> str | None:
    where = f"{name}.{given.type}"
    kind = given.type
    if kind == "text":
        return None
    if kind in ("json_object", "json"):
        schemas: tuple[Any, ...] = (given.schema, given.value, {"type": "object"})
        return _json(next(one for one in schemas if one is not None), f"{name}.schema")
    if kind == "json_schema":
        named = given.value if given.json_schema is None else given.json_schema
        schema = named.get("schema") if isinstance(named, dict) else given.schema
        if schema is None:
            raise invalid(f"{where}.schema", "is required", "send a JSON schema")
        return _json(schema, f"{where}.schema")
    if kind == "regex":
        return _regex(given.value if given.regex is None else given.regex, where)
    if kind == "choice":
        return _choice(given.choice, where)
    if kind in ("lark", "grammar"):
        return _lark(given.grammar, f"{name}.grammar")
    raise invalid(
        f"{name}.type",
        f"{kind[:100]!r} is not supported by this server",
        "use text, json_object, json_schema, regex, choice or lark",
    )


def _of_structured(given: StructuredOutputs) -> str:
    makers: dict[str, Callable[[Any, str], str]] = {
        "json": _json,
        "regex": _regex,
        "choice": _choice,
        "grammar": _lark,
        "json_object": lambda wanted, where: _json({"type": "object"}, where),
    }
    chosen = [name for name in makers if getattr(given, name) not in (None, False)]
    if len(chosen) != 1:
        raise invalid(
            "structured_outputs",
            f"needs exactly one of {', '.join(makers)}, and has {len(chosen)}",
            "give one of them",
        )
    (name,) = chosen
    return makers[name](getattr(given, name), f"structured_outputs.{name}")


def _json(schema: Any, where: str) -> str:
    if isinstance(schema, str):
        try:
            schema = msgspec.json.decode(
                schema
            )  # json.loads takes NaN and half of a surrogate pair
        except (msgspec.DecodeError, RecursionError) as error:
            raise invalid(where, f"is not JSON: {error}", "send the schema as an object") from None
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    if not isinstance(schema, dict):
        raise invalid(where, "must be an object", "send a JSON schema")
    try:
        return of_json_schema(schema)
    except ValueError as error:
        raise invalid(where, f"cannot be served: {str(error)[:200]}", "correct it") from None


def _regex(regex: Any, where: str) -> str:
    if not regex or not isinstance(regex, str):
        raise invalid(where, "is required", "give a regular expression in `regex`")
    return of_regex(regex)


def _choice(choice: list[str] | None, where: str) -> str:
    if not choice or not all(choice) or len(choice) > MAX_CHOICES:
        raise invalid(where, f"must be a list of 1 to {MAX_CHOICES} texts that are not empty")
    return of_lark("start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in choice))


def _lark(grammar: str | None, where: str) -> str:
    if not grammar:
        raise invalid(where, "is required", "give a Lark grammar with a rule `start`")
    return of_lark(grammar)


def guided(
    structured: StructuredOutputs | None,
    json: Schema | str | None,
    regex: str | None,
    choice: list[str] | None,
    grammar: str | None,
) -> StructuredOutputs | None:
    """vLLM's older fields `guided_json` and so on, as `structured_outputs`. Raises InvalidRequest."""
    if all(one is None for one in (json, regex, choice, grammar)):
        return structured
    if structured is not None:
        raise invalid("structured_outputs", "cannot be combined with `guided_*`", "leave one out")
    return StructuredOutputs(json=json, regex=regex, choice=choice, grammar=grammar)


class Checks:
    """Checks grammars in threads and remembers the results. Belongs to one event loop."""

    def __init__(self) -> None:
        self._known: Lru[tuple[bytes, str], _Verdict] = Lru(MAX_CHECKED)
        self._turns = asyncio.Semaphore(THREADS)

    async def check(self, grammar: str, field: str) -> None:
        """Raises InvalidRequest for a grammar that cannot be served."""
        key = digest_of(grammar), field  # messages name the field
        verdict = self._known.get(key)
        if verdict is None:
            async with self._turns:
                verdict = await asyncio.to_thread(_verdict, grammar, field)
            self._known.put(key, verdict)
        if verdict.problem is not None:
            raise InvalidRequest(verdict.problem, field=field, hint=verdict.hint)


class _Verdict(NamedTuple):
    """`problem` None: the grammar can be served."""

    problem: str | None = None
    hint: str | None = None


def _verdict(grammar: str, field: str) -> _Verdict:
    try:
        check(grammar, field)
    except InvalidRequest as error:
        return _Verdict(error.message, error.hint)
    return _Verdict()

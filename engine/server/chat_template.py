"""Chat templates with transformers' semantics: which of several is used, and the prompt that it makes.

The base model's templates are rendered here, those of adapters in confined processes (`engine.server.templates`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from engine.errors import ConfigError, InvalidRequest
from engine.sandbox.tasks.render import rendered
from engine.server.conversation import Conversation, Message
from engine.server.parameters import invalid

CHECK_MESSAGES = "check the roles and their order, and that every message has text"
DEFAULT, TOOL_USE = "default", "tool_use"
# A template that joins the arguments of a call to other text takes them as JSON text.
_JOINS_ARGUMENTS = re.compile(r"""arguments(?:['"]\])?\s*[+~]""")

Render = Callable[[str, dict[str, Any]], Awaitable[str]]  # template and `asked` -> prompt


class ChatTemplate:
    """The templates of one model or adapter, by name. `render`: renders an adapter's; None: the base model's."""

    def __init__(
        self,
        named: str | Mapping[str, str] | None,
        specials: Mapping[str, Any],
        render: Render | None = None,
    ) -> None:
        self._named = {DEFAULT: named} if isinstance(named, str) else dict(named or {})
        self._specials = specials
        self.is_own = render is not None
        self._render = render

    def __bool__(self) -> bool:
        return bool(self._named)

    @property
    def named(self) -> Mapping[str, str]:
        return self._named

    def with_specials(self, specials: Mapping[str, Any]) -> ChatTemplate:
        return ChatTemplate(self._named, {**self._specials, **specials}, self._render)

    def choose(self, conversation: Conversation) -> str:
        """The template's text. Raises InvalidRequest."""
        named, name = self._named, conversation.template
        if not named:
            raise InvalidRequest(
                "the model has no chat template",
                field="messages",
                hint="use /v1/completions or /generate, or start the server with --tokenizer-config-path",
            )
        if name is not None and name not in named:
            raise invalid(
                "chat_template",
                f"must name a template of the model: {', '.join(sorted(named))}",
                "leave it out; the server renders no templates of requests."
                " --tokenizer-config-path replaces the model's",
            )
        if name is None:
            name = TOOL_USE if conversation.tools is not None and TOOL_USE in named else DEFAULT
        if name not in named:
            raise invalid(
                "chat_template",
                "is required: the model has several templates and no default",
                f"name one of {', '.join(sorted(named))}",
            )
        return named[name]

    def asked(self, conversation: Conversation, template: str) -> dict[str, Any]:
        """The variables of the template."""
        roles = {} if "developer" in template else {"developer": "system"}
        as_text = _JOINS_ARGUMENTS.search(template) is not None
        return {
            "messages": [_prepared(one, roles, as_text) for one in conversation.messages],
            "tools": conversation.tools,
            "documents": conversation.documents,
            "variables": conversation.variables,
            "add_generation_prompt": conversation.add_generation_prompt,
            "continue_final_message": conversation.continue_final_message,
            "specials": self._specials,
        }

    async def render_own(self, conversation: Conversation, max_characters: int) -> str:
        """The prompt of an adapter's template. Raises InvalidRequest."""
        assert self._render is not None, "it is an adapter's"
        template = self.choose(conversation)
        asked = self.asked(conversation, template) | {"max_characters": max_characters}
        return await self._render(template, asked)

    def render(self, conversation: Conversation) -> str:
        """The prompt of the base model's template. Raises InvalidRequest."""
        import jinja2

        template = self.choose(conversation)
        try:
            return rendered(template, self.asked(conversation, template))
        except (
            jinja2.TemplateError,
            ArithmeticError,
            AttributeError,
            LookupError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:
            raise InvalidRequest(
                f"the model's chat template refused the messages: {error}",
                field="messages",
                hint=CHECK_MESSAGES,
            ) from None


def _prepared(message: Message, roles: Mapping[str, str], as_text: bool) -> Message:
    """A message without null fields, with a role that the template knows, and arguments as it takes them."""
    made = {key: value for key, value in message.items() if value is not None}
    if "role" in made:
        made["role"] = roles.get(made["role"], made["role"])
    if as_text and "tool_calls" in made:
        made["tool_calls"] = [_with_text(call) for call in made["tool_calls"]]
    return made


def _with_text(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return call | {"function": function | {"arguments": arguments}}


def read_chat_template(path: Path) -> str | dict[str, str]:
    """The chat template in a tokenizer_config.json or a Jinja file, or several by name; raises ConfigError."""
    try:
        text = path.read_text()
        if path.suffix != ".json":
            return text
        found = json.loads(text).get("chat_template")
        if isinstance(found, list):
            found = {entry["name"]: entry["template"] for entry in found}
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        raise ConfigError(
            f"cannot read the chat template in {path}: {error}", field="tokenizer_config_path"
        ) from None
    if isinstance(found, dict) and found and all(isinstance(one, str) for one in found.values()):
        return found
    if not isinstance(found, str):
        raise ConfigError(f"{path} has no chat_template", field="tokenizer_config_path")
    return found

"""The server that the SDKs talk to, and the same requests without an SDK, to compare answers with."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

PROMPT = "My friend is in the castle."
MESSAGES = [{"role": "user", "content": PROMPT}]
ADAPTERS = ("pirate", "math", "json")

CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Lyon", "Paris", "Rome"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
CLOCK = {
    "type": "object",
    "properties": {"zone": {"type": "string", "enum": ["UTC", "CET"]}},
    "required": ["zone"],
    "additionalProperties": False,
}


def function(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """A tool in the form of chat completions."""
    described = {"name": name, "description": f"Tells the {name}.", "parameters": parameters}
    return {"type": "function", "function": described}


TOOLS = [function("weather", CITY), function("clock", CLOCK)]
ONE_CALL = (
    r'<tool_call>\{"name": "weather", "arguments": \{"city": "(Lyon|Rome)", "days": [1-9]\}\}'
    r"</tool_call>"
)
TWO_CALLS = (
    rf'{ONE_CALL}<tool_call>\{{"name": "clock", "arguments": \{{"zone": "UTC"\}}\}}</tool_call>'
)


def calling(regex: str) -> dict[str, Any]:
    """Makes the model answer with calls although `tool_choice` is `auto`: a small model rarely calls by itself."""
    return {"structured_outputs": {"regex": regex}}


def is_weather(arguments: str | dict[str, Any]) -> bool:
    """Whether these are arguments that `CITY` allows."""
    given = json.loads(arguments) if isinstance(arguments, str) else arguments
    return (
        sorted(given) == ["city", "days"]
        and given["city"] in CITY["properties"]["city"]["enum"]
        and given["days"] in range(1, 10)
    )


@dataclass(frozen=True)
class Server:
    """Where the server listens, and its API key."""

    url: str
    key: str

    @property
    def v1(self) -> str:
        return f"{self.url}/v1"

    def send(self, path: str, body: Any = None, key: str | None = None) -> tuple[int, bytes]:
        """Status and body of an answer: of a POST if there is a `body`."""
        headers = {"Authorization": f"Bearer {self.key if key is None else key}"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def ask(self, path: str, body: Any = None) -> Any:
        """The JSON of an answer that must be 200."""
        status, answer = self.send(path, body)
        assert status == 200, answer
        return json.loads(answer)

    def chat(self, model: str = "base", **given: Any) -> Any:
        """A chat completion, greedy unless told otherwise."""
        body = {"model": model, "messages": MESSAGES, "temperature": 0, "max_tokens": 24} | given
        return self.ask("/v1/chat/completions", body)

    def says(self, model: str = "base", **given: Any) -> str:
        """The text of a chat completion."""
        text: str = self.chat(model, **given)["choices"][0]["message"]["content"]
        return text

    def completes(self, model: str = "base", **given: Any) -> str:
        """The text of a completion of PROMPT."""
        body = {"model": model, "prompt": PROMPT, "temperature": 0, "max_tokens": 24} | given
        text: str = self.ask("/v1/completions", body)["choices"][0]["text"]
        return text

    def generates(self, adapter: str | None = None, **given: Any) -> Any:
        """An answer of LoRAX's own route."""
        parameters = {"max_new_tokens": 24, "details": True} | given
        if adapter is not None:
            parameters["adapter_id"] = adapter
        return self.ask("/generate", {"inputs": PROMPT, "parameters": parameters})

    def count(self, text: str) -> int:
        """Tokens of a text, special ones included."""
        return len(self.ask("/tokenize", {"inputs": text}))

    def running(self) -> int:
        """Requests that generate now."""
        number: int = self.ask("/info")["running"]
        return number

    def cancelled(self) -> int:
        """Requests so far whose client closed the connection."""
        _, page = self.send("/metrics")
        lines = [line for line in page.decode().splitlines() if 'err="dropped"' in line]
        return int(sum(float(line.split()[-1]) for line in lines if "_created" not in line))

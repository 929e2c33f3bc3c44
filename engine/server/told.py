"""Limits of request fields that their types do not say, in the words of JSON schema, for the OpenAPI document.

Only limits that hold on every server. `tests/server/test_openapi.py` sends both sides of each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.adapters.ref import MAX_ID_LENGTH
from engine.lora.recipe import MAX_MERGED, MAX_WEIGHT, SIGN_METHODS, STRATEGIES
from engine.server.conversation import MAX_DOCUMENTS
from engine.server.grammars import MAX_CHOICES
from engine.server.parameters import LOWEST_PRIORITY, MAX_CACHE_SALT, MAX_SEED, MAX_TOP_K
from engine.server.token_rules import MAX_BIASES, MAX_STOP_TOKENS, MOST_BIAS
from engine.server.tools.definitions import MAX_TOOLS

Keywords = Mapping[str, Any]

_FRACTION = {"exclusiveMinimum": 0, "maximum": 1}
_PENALTY = {"minimum": -2, "maximum": 2}
_COUNT = {"minimum": 1}
_NO_FEWER = {"minimum": 0}
_NOT_EMPTY = {"minLength": 1}
_NO_EMPTY_TEXTS = {"items": {"type": "string", "minLength": 1}}

_SAMPLING: dict[str, Keywords] = {
    "temperature": _NO_FEWER,
    "top_k": {"minimum": -1, "maximum": MAX_TOP_K},
    "top_p": _FRACTION,
    "typical_p": _FRACTION,
    "min_p": {"minimum": 0, "maximum": 1},
    "repetition_penalty": {"exclusiveMinimum": 0},
    "frequency_penalty": _PENALTY,
    "presence_penalty": _PENALTY,
    "cache_salt": {"minLength": 1, "maxLength": MAX_CACHE_SALT},
    "priority": {"minimum": LOWEST_PRIORITY},
}
_OPENAI: dict[str, Keywords] = _SAMPLING | {
    "n": _COUNT,
    "min_tokens": _NO_FEWER,
    "seed": {"minimum": -(2**63), "maximum": MAX_SEED},
    "logit_bias": {
        "maxProperties": MAX_BIASES,
        "propertyNames": {"pattern": "^[0-9]{1,10}$"},
        "additionalProperties": {"type": "number", "minimum": -MOST_BIAS, "maximum": MOST_BIAS},
    },
    "stop_token_ids": {
        "maxItems": MAX_STOP_TOKENS,
        "items": {"type": "integer", "minimum": 0},
    },
}

# Struct -> field -> keywords.
LIMITS: dict[str, dict[str, Keywords]] = {
    "GenerateBody": {"inputs": _NOT_EMPTY},
    "GenerateParameters": _SAMPLING
    | {
        "best_of": _COUNT,
        "max_new_tokens": _COUNT,
        "min_new_tokens": _NO_FEWER,
        "truncate": _COUNT,
        "return_k_alternatives": _COUNT,
        "seed": {"minimum": 0, "maximum": MAX_SEED},
        "stop": _NO_EMPTY_TEXTS,
    },
    "ChatBody": _OPENAI
    | {
        "messages": {"minItems": 1},
        "max_completion_tokens": _COUNT,
        "top_logprobs": _NO_FEWER,
        "tools": {"maxItems": MAX_TOOLS},
        "documents": {"maxItems": MAX_DOCUMENTS},
    },
    "CompletionBody": _OPENAI
    | {"prompt": {"minItems": 1}, "logprobs": _NO_FEWER, "best_of": _COUNT},
    "ResponsesBody": {
        name: _OPENAI[name]
        for name in ("temperature", "top_p", "top_k", "seed", "cache_salt", "priority")
    }
    | {"input": {"minLength": 1, "minItems": 1}, "max_output_tokens": _COUNT},
    "MessagesBody": {
        name: _OPENAI[name] for name in ("temperature", "top_p", "top_k", "cache_salt", "priority")
    }
    | {"messages": {"minItems": 1}, "max_tokens": _COUNT, "stop_sequences": _NO_EMPTY_TEXTS},
    "CountBody": {"messages": {"minItems": 1}},
    "InMessage": {"role": {"enum": ["user", "assistant"]}},
    "MergedAdapters": {
        "ids": {"minItems": 1, "maxItems": MAX_MERGED},
        "weights": {
            "items": {"type": "number", "minimum": -MAX_WEIGHT, "maximum": MAX_WEIGHT},
        },
        "merge_strategy": {"enum": [*STRATEGIES, "", None]},
        "majority_sign_method": {"enum": [*SIGN_METHODS, "", None]},
        "seed": {"minimum": 0, "maximum": 2**63 - 1},
    },
    "ResponseFormat": {
        "type": {
            "enum": ["text", "json_object", "json_schema", "regex", "choice", "lark", "grammar"]
        },
        "choice": {"maxItems": MAX_CHOICES},
    },
    "AdapterBody": {"adapter_id": {"minLength": 1, "maxLength": MAX_ID_LENGTH}},
    "PinBody": {"adapter_id": {"minLength": 1, "maxLength": MAX_ID_LENGTH}},
    "LoadLoraBody": {"lora_name": _NOT_EMPTY, "lora_path": _NOT_EMPTY},
    "UnloadLoraBody": {"lora_name": _NOT_EMPTY},
}
# Fields that a struct has a default for only to answer in another server's words.
REQUIRED: dict[str, list[str]] = {
    "LoadLoraBody": ["lora_name", "lora_path"],
    "UnloadLoraBody": ["lora_name"],
}


def tell(components: dict[str, Any]) -> None:
    """Adds the limits to the schemas of structs."""
    for struct, fields in LIMITS.items():
        properties = components[struct]["properties"]
        for name, keywords in fields.items():
            properties[name] = _limited(properties[name], keywords)
    for struct, names in REQUIRED.items():
        components[struct]["required"] = names
        for name in names:
            components[struct]["properties"][name].pop("default", None)


def _limited(schema: dict[str, Any], keywords: Keywords) -> dict[str, Any]:
    """A schema of a field with keywords, those of a choice of types at the type that they are about."""
    if "anyOf" not in schema or "enum" in keywords:
        return schema | dict(keywords)
    return schema | {"anyOf": [one | _about(one, keywords) for one in schema["anyOf"]]}


_ABOUT = {
    "string": ("minLength", "maxLength"),
    "array": ("minItems", "maxItems", "items"),
    "object": ("maxProperties", "propertyNames", "additionalProperties"),
    "integer": ("minimum", "maximum", "exclusiveMinimum"),
    "number": ("minimum", "maximum", "exclusiveMinimum"),
}


def _about(schema: Mapping[str, Any], keywords: Keywords) -> dict[str, Any]:
    names = _ABOUT.get(str(schema.get("type")), ())
    return {name: keywords[name] for name in names if name in keywords}

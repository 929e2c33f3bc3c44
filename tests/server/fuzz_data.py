"""What fuzzed bodies are made of: valid bodies of the routes, and values that should not be in them."""

from __future__ import annotations

import json
from typing import Any

Json = Any

_TOOL = {
    "name": "look_up",
    "description": "x",
    "parameters": {"type": "object", "properties": {"key": {"type": "string"}}},
}
_CALL = {"id": "c1", "type": "function", "function": {"name": "look_up", "arguments": "{}"}}
_SHORT = {"max_tokens": 3, "temperature": 0}
_SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
_TALK = [{"role": "user", "content": "Hello"}]
_MERGED = {"ids": ["a", "b"], "weights": [1, 0.5], "merge_strategy": "ties", "density": 0.5}

_GENERATE: list[Json] = [
    {"inputs": "Hello", "parameters": {"max_new_tokens": 3, "details": True, "seed": 1}},
    {
        "inputs": "Grüße 🎉",
        "stream": True,
        "parameters": {
            "max_new_tokens": 3,
            "do_sample": True,
            "temperature": 0.5,
            "top_k": 5,
            "top_p": 0.9,
            "stop": ["x"],
            "adapter_id": "a",
            "return_k_alternatives": 1,
        },
    },
    {
        "inputs": "Hello",
        "parameters": {
            "max_new_tokens": 9,
            "response_format": {"type": "json_object", "schema": _SCHEMA},
        },
    },
    {"inputs": "Hello", "parameters": {"max_new_tokens": 2, "merged_adapters": _MERGED}},
]
_CHAT: list[Json] = [
    _SHORT | {"messages": _TALK, "logprobs": True, "top_logprobs": 1, "model": "a"},
    _SHORT | {"messages": _TALK, "stream": True, "stream_options": {"include_usage": True}},
    _SHORT
    | {
        "messages": [
            *_TALK,
            {"role": "assistant", "content": None, "tool_calls": [_CALL]},
            {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "x"}]},
        ],
        "tools": [{"type": "function", "function": _TOOL}],
        "tool_choice": "required",
    },
    _SHORT | {"messages": _TALK, "structured_outputs": {"regex": "[a-c]{2}"}, "n": 2},
    _SHORT | {"messages": _TALK, "guided_json": json.dumps(_SCHEMA), "documents": [{"text": "x"}]},
    _SHORT
    | {
        "messages": _TALK,
        "response_format": {"type": "json_schema", "json_schema": {"schema": _SCHEMA}},
        "chat_template_kwargs": {"x": [1]},
    },
]
_COMPLETION: list[Json] = [
    _SHORT | {"prompt": "Hello", "echo": True, "logprobs": 1, "logit_bias": {"5": 1.5}},
    _SHORT | {"prompt": ["Hello", "world"], "n": 2, "best_of": 2, "stop": "x", "seed": 3},
    _SHORT | {"prompt": [5, 6, 7], "stream": True, "min_tokens": 1, "stop_token_ids": [9]},
    _SHORT | {"prompt": [[5, 6], [7]], "merged_adapters": _MERGED},
    _SHORT | {"prompt": "x", "guided_choice": ["a", "b"], "cache_salt": "s", "priority": -1},
    _SHORT | {"prompt": "x", "guided_grammar": 'start: "a" | "b"'},
]
_RESPONSES: list[Json] = [
    {"input": "Hello", "max_output_tokens": 3, "temperature": 0, "metadata": {"a": "b"}},
    {
        "input": [
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "x"}]},
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "x"}]},
            {"type": "function_call", "call_id": "c", "name": "look_up", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "1"},
        ],
        "tools": [{"type": "function", **_TOOL}],
        "tool_choice": {"type": "function", "name": "look_up"},
        "max_output_tokens": 3,
        "stream": True,
        "reasoning": {"effort": "low"},
    },
    {
        "input": "x",
        "max_output_tokens": 9,
        "text": {"format": {"type": "json_schema", "name": "n", "schema": _SCHEMA}},
    },
]
_MESSAGES: list[Json] = [
    {"messages": _TALK, "max_tokens": 3, "system": "Be brief.", "temperature": 0, "stream": True},
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "x"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "x", "signature": ""},
                    {"type": "tool_use", "id": "t", "name": "look_up", "input": {"key": "x"}},
                ],
            },
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": "t", "content": "1"}],
            },
        ],
        "tools": [{"name": "look_up", "input_schema": _TOOL["parameters"]}],
        "tool_choice": {"type": "any"},
        "thinking": {"type": "enabled", "budget_tokens": 5},
        "output_config": {"effort": "low"},
        "max_tokens": 3,
        "stop_sequences": ["x"],
    },
]
_ADAPTER: list[Json] = [{"adapter_id": "a"}, {"adapter_id": "b@v1", "adapter_source": "local"}]

# Path -> valid bodies.
VALID: dict[str, list[Json]] = {
    "/": _GENERATE,
    "/invocations": _GENERATE,
    "/generate": _GENERATE,
    "/generate_stream": _GENERATE,
    "/tokenize": [{"inputs": "Grüße 🎉", "add_special_tokens": False}],
    "/v1/chat/completions": _CHAT,
    "/v1/completions": _COMPLETION,
    "/v1/responses": _RESPONSES,
    "/v1/messages": _MESSAGES,
    "/v1/messages/count_tokens": _MESSAGES,
    "/v1/load_lora_adapter": [{"lora_name": "n", "lora_path": "a", "load_inplace": True}],
    "/v1/unload_lora_adapter": [{"lora_name": "n"}],
    "/adapters/load": _ADAPTER,
    "/adapters/prefetch": _ADAPTER,
    "/adapters/unload": _ADAPTER,
    "/adapters/pin": [{"adapter_id": "a"}, {"adapter_id": "a", "pinned": False}],
    "/adapters/aliases/{name}": _ADAPTER,
}
NAMES = ("prod", "a", "base", "x%2Fy", "%00", "%F0%9F%8E%89", "%ff", "a@b", "." * 300)  # in paths

NUMBERS = (
    *("0", "-0", "-0.0", "1", "-1", "1.0", "1.5", "2", "3", "100", "1e400", "-1e400", "1e308"),
    *("5e-324", "1e-400", "NaN", "Infinity", "-Infinity", "01", "1.", "+1", "0x10", "1_0"),
    *(
        str(sign * 2**power + by)
        for power in (31, 53, 63, 64, 70)
        for sign in (1, -1)
        for by in (-1, 0)
    ),
    *("9" * 400, "9" * 5000, "0." + "1" * 5000),
)
TEXTS = (
    *('""', '" "', '"x"', '"a"', '"base"', '"\\u0000"', '"a\\u0000b"', '"\\ud800"', '"\\udc00x"'),
    *('"\\ud83d\\ude00"', '"\\ud83d"', '"\\q"', '"\\u12"', '"a\\r\\nx-evil: 1"', '"\\u202e\\u2028"'),
    *('"../../etc/passwd"', '"org/x@main"', '"https://127.0.0.1/x"', '"%00"', '"１２"', '"NaN"'),
    *('"auto"', '"text"', '"regex"', '"json_object"', '"function"', '"{}"', '"[\\"\\\\ud800\\"]"'),
    *('"{\\"enum\\": [\\"\\\\ud800\\"]}"', '"{\\"minimum\\": NaN}"', '"(?=x)"', '"(((((a{99}){99}){99}"'),
    *('"{{ 1 }}"', '"<s>"', '"</s><|im_start|>"', '"' + "\U0001f389" * 50 + '"'),
)  # fmt: skip
WRONG = (
    *("null", "true", "false", "[]", "{}", "[null]", "[[]]", "[{}]", '{"": null}', '[1, "a"]'),
    *('{"type": "function"}', '{"type": 1}', '["a", "a"]', "[[1], [2]]", '{"0": 1, "x": "y"}', "[1e400]"),
    *('{"type": ["object"]}', '{"$ref": "#"}', '{"$ref": "http://127.0.0.1/"}', '{"enum": []}'),
    *('{"pattern": "("}', '{"allOf": [{"$ref": "#/x"}]}', '{"type": "text", "text": "x"}'),
)  # fmt: skip
BYTES = (
    *(b'"\xff\xfe"', b'"\xed\xa0\x80"', b'"\xc3"', b'"\x00"', b"\x00", b'"\n"', b"'x'", b"", b","),
    *(b'"\xf4\x90\x80\x80"', b"// x", b"/**/1", b"nul", b"undefined", b'"x', b"]", b"}", b"\xef\xbb\xbf1"),
)  # fmt: skip
WHOLE = (
    *(b"", b" ", b"{", b"}", b"[", b"[]", b"null", b"0", b'"x"', b"{}", b"{}{}", b"{} x", b'{"a"}'),
    *(b'{"a":}', b"{,}", b'{"a":1,}', b"\xef\xbb\xbf{}", b"\x00", b"{}\x00", b"\xff\xfe{\x00}\x00"),
    *(b"inputs=x&stream=true", b"<xml/>", b"--x\r\n\r\n{}\r\n--x--", b"true", b"-", b"1e400", b"{1: 2}"),
)  # fmt: skip

"""The routes between text and tokens: LoRAX's `/tokenize`, and vLLM's bodies of `/tokenize` and `/detokenize`."""

from __future__ import annotations

from aiohttp import web

from engine.server.access import context_of
from engine.server.conversation import Conversation
from engine.server.decoding import decode
from engine.server.front import FRONT
from engine.server.native.schemas import DetokenizeBody, Detokenized, TokenizeBody, Tokenized
from engine.server.openai.messages import conversation
from engine.server.openai.schemas import ChatBody
from engine.server.parameters import Parameters, invalid
from engine.server.request_text import text_of
from engine.server.responses import json_response

MAX_TOKENIZED = 1 << 20  # characters, or tokens; they take about 200 MB


async def tokenize(request: web.Request) -> web.StreamResponse:
    """POST /tokenize. `inputs` gives LoRAX's answer, `prompt` or `messages` vLLM's."""
    front, context = request.app[FRONT], context_of(request)
    async with front.bodies.read(request) as raw:
        body = decode(raw, TokenizeBody)
        prompt = _prompt(body, raw)
    if body.inputs is not None:
        special = body.add_special_tokens is not False
        return json_response(await front.text.tokenize(body.inputs, special=special))
    parameters = Parameters(
        adapter=context.adapter(body.model, None, field="model"),
        api_token=context.token(None),
    )
    async with text_of(request, parameters) as (text, _):
        if isinstance(prompt, Conversation):
            tokens = await text.encode_chat(prompt)
        else:
            tokens = await text.encode(prompt, special=body.add_special_tokens is not False)
        names = [text.token_text(token) for token in tokens] if body.return_token_strs else None
    most = front.backend.info.max_total_tokens
    return json_response(Tokenized(len(tokens), most, tokens, names))


async def detokenize(request: web.Request) -> web.StreamResponse:
    """POST /detokenize: the text of tokens, special ones included."""
    front, context = request.app[FRONT], context_of(request)
    async with front.bodies.read(request) as raw:
        body = decode(raw, DetokenizeBody)
    tokens = body.tokens
    if len(tokens) > MAX_TOKENIZED:
        raise invalid("tokens", f"has more than {MAX_TOKENIZED} tokens", "send them in parts")
    parameters = Parameters(
        adapter=context.adapter(body.model, None, field="model"), api_token=context.token(None)
    )
    async with text_of(request, parameters) as (text, vocab_size):
        if tokens and not 0 <= min(tokens) <= max(tokens) < vocab_size:
            raise invalid("tokens", f"has a token outside of 0 to {vocab_size - 1}")
        return json_response(Detokenized(await text.in_thread(lambda: text.written(tokens))))


def _prompt(body: TokenizeBody, raw: bytes | bytearray) -> str | Conversation:
    """What is to be tokenized; `inputs` where it is given. Raises InvalidRequest."""
    name, text = ("inputs", body.inputs) if body.inputs is not None else ("prompt", body.prompt)
    if text is None and body.messages is None:
        raise invalid("inputs", "is required", "send `inputs`, `prompt` or `messages`")
    if text is None:
        return conversation(decode(raw, ChatBody))
    if name == "prompt" and body.messages is not None:
        raise invalid("prompt", "cannot be combined with `messages`", "leave one out")
    if len(text) > MAX_TOKENIZED:
        raise invalid(name, f"has more than {MAX_TOKENIZED} characters", "send the text in parts")
    return text


def routes() -> list[web.RouteDef]:
    return [web.post("/tokenize", tokenize), web.post("/detokenize", detokenize)]

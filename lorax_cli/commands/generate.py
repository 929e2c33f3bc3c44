"""`lorax generate`: one prompt, in this process or on a server."""

from __future__ import annotations

import time
from contextlib import AbstractAsyncContextManager
from typing import Annotated, Any

import typer

from engine.config import EngineConfig
from lorax_cli.client import Client
from lorax_cli.options import UrlOption, changed, with_config
from lorax_cli.output import JsonFlag, Output, QuietFlag, examples, warn


async def stream_answer(
    client: Client, prompt: str, parameters: dict[str, Any], out: Output
) -> None:
    """Prints the answer as it arrives, then its timing."""
    start = time.perf_counter()
    first: float | None = None
    text, details, num_tokens = "", {}, 0
    async for event in client.stream(prompt, {**parameters, "details": True}):
        first = first or time.perf_counter() - start
        num_tokens += 1
        if not event.special:
            out.stream(event.text)
            text += event.text
        if event.generated_text is not None:
            text, details = event.generated_text, dict(event.details or {})
    seconds = time.perf_counter() - start
    out.stream("\n")
    answer = {
        "generated_text": text,
        "details": details,
        "time_to_first_token_s": first,
        "total_s": seconds,
    }
    if out.mode == "json":
        out.result(answer, view=lambda: text)
    out.note(
        f"[dim]{num_tokens} tokens, first after {(first or seconds) * 1000:.0f} ms, "
        f"{num_tokens / seconds:.1f} tokens/s[/dim]"
    )


def parameters_of(config: EngineConfig, given: dict[str, Any]) -> dict[str, Any]:
    """The `parameters` of a request: the given ones, and the adapter."""
    parameters = {name: value for name, value in given.items() if value is not None and value != []}
    parameters["do_sample"] = any(given.get(name) for name in ("temperature", "top_p", "top_k"))
    if config.adapters.adapter_id:
        parameters["adapter_id"] = config.adapters.adapter_id
        if config.adapters.adapter_source != "hub":  # else the server's default source applies
            parameters["adapter_source"] = config.adapters.adapter_source
    return parameters


def client_of(
    config: EngineConfig, url: str | None, api_token: str | None, api_key: str | None
) -> AbstractAsyncContextManager[Client]:
    """A client of the server at `url`, or of an engine in this process."""
    if url:
        return Client(url, api_token, api_key=api_key)
    from lorax_cli.serving import local_client

    return local_client(config)


@with_config("model", "adapters", "scheduler", "memory")
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue.", show_default=False)],
    config: EngineConfig,
    url: Annotated[
        str | None,
        UrlOption(help="Use the server at this address. Unset: start an engine in this process."),
    ] = None,
    api_token: Annotated[
        str | None,
        typer.Option(help="Token for private adapters, sent to the server of --url."),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(help="API key of the server of --url, if it has keys."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum tokens to generate.")] = 64,
    temperature: Annotated[
        float | None, typer.Option(help="Sampling temperature. Higher: more random. Unset: greedy.")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Keep the most likely tokens up to this total probability."),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Keep this number of most likely tokens.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed for sampling.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Stop after this text. Repeat for more.")
    ] = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Generate text from one prompt, with or without an adapter.

    Without --url, the model runs inside this command. No port is opened and no process remains.
    """
    out = Output.of(as_json, quiet)
    given: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "stop": stop,
    }
    parameters = parameters_of(config, given)
    if url and (unused := changed(config, "model", "scheduler", "memory")):
        warn(f"{', '.join(unused)}: ignored, because --url uses the server's settings")

    async def ask() -> None:
        async with client_of(config, url, api_token, api_key) as client:
            await stream_answer(client, prompt, parameters, out)

    import asyncio

    asyncio.run(ask())


def register(app: typer.Typer) -> None:
    app.command(
        epilog=examples(
            'lorax generate "Once upon a time"',
            'lorax generate --model-id ./model --adapter-id ./adapters/sql "List all users"',
            'lorax generate --url http://localhost:3000 --adapter-id pirate "Hello" --json',
        )
    )(generate)

"""Command-line options, made from the fields of `engine.config` and `engine.bench_options`.

A command names the concerns that it needs, `@with_config("model", "adapters")`, and receives a resolved `EngineConfig`.
A setting without a flag comes from the environment, the file of `--config`, or the default, in this order
(`engine.settings.resolve`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_type_hints
from urllib.parse import urlsplit

import typer
from typer.core import TyperCommand

from engine.bench_options import BenchOption, bench_options
from engine.config import EngineConfig, flag_of
from engine.errors import ConfigError
from engine.settings import Setting, resolve, settings
from lorax_cli.client import Server
from lorax_cli.legacy import LEGACY, REFUSED_VALUES, check_environment, check_flags
from lorax_cli.output import warn

CONFIG_FILE = "config_file"
_METAVARS: dict[Any, str | None] = {bool: None, int: "INT", float: "NUMBER"}


def address(text: str) -> str:
    """The base URL of a server. The default scheme is http. Raises ConfigError."""
    url = text if "://" in text else f"http://{text}"
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a bad port or bracket
        valid = False
    if not valid:
        raise ConfigError(
            f"--url {text!r} is not a valid server URL",
            field="url",
            hint="use a URL such as http://localhost:3000",
        )
    return url


UrlOption = functools.partial(typer.Option, parser=address, metavar="URL")
DEFAULT_URL = "http://127.0.0.1:3000"


def describe(setting: Setting) -> str:
    """The brackets at the end of a help: choices, further environment variables, default."""
    parts = [" | ".join(setting.choices)] if setting.choices else []
    if further := [name for name in setting.environment if name != setting.name.upper()]:
        parts.append(f"env {', '.join(further)}")
    if default := setting.default_text:
        parts.append(f"default {default}")
    return f" ({'; '.join(parts)})" if parts else ""


def concern_titles() -> dict[str, str]:
    """Attribute of `EngineConfig` -> heading."""
    hints = get_type_hints(EngineConfig)
    return {name: (cls.__doc__ or name).splitlines()[0].rstrip(".") for name, cls in hints.items()}


def changed(config: EngineConfig, *concerns: str) -> list[str]:
    """Flags of the settings that differ from their default, also if set in the environment or file."""
    wanted = (setting for setting in settings() if setting.concern in concerns)
    return [
        one.flag for one in wanted if getattr(getattr(config, one.concern), one.name) != one.default
    ]


def _option(name: str, annotation: Any, flag: str, **fields: Any) -> inspect.Parameter:
    """An option that is None if it is not given."""
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=typer.Option(None, flag, show_default=False, **fields),
        annotation=annotation | None,
    )


def _switch(flag: str) -> str:
    return f"{flag}/--no-{flag.removeprefix('--')}"


def _adapter_sources() -> list[str]:
    from engine.adapters.registry import make_sources, selectable

    return selectable(make_sources(EngineConfig()))


# Completions of settings whose values `engine.config` does not know.
_COMPLETIONS = {"adapter_source": _adapter_sources, "default_adapter_source": _adapter_sources}


def _setting_option(setting: Setting, panel: str) -> inspect.Parameter:
    annotation: Any = setting.type
    complete: Callable[[], list[str]] | None = _COMPLETIONS.get(setting.name)
    if setting.repeated:
        annotation = list[str]
    elif setting.type in (int, float):
        annotation = str  # `engine.settings` parses numbers, so that errors are the same everywhere
    elif setting.name in REFUSED_VALUES:
        annotation = str  # so that `lorax_cli.legacy` sees refused values and gives the reason
        complete = lambda: list(setting.choices)  # noqa: E731
    return _option(
        setting.name,
        annotation,
        _switch(setting.flag) if setting.type is bool else setting.flag,
        help=f"{setting.option.help}{describe(setting)}",
        rich_help_panel=panel,
        metavar=_METAVARS.get(setting.type, "CHOICE" if setting.choices else "TEXT"),
        autocompletion=complete,
    )


def _config_file() -> inspect.Parameter:
    return _option(
        CONFIG_FILE,
        Path,
        "--config",
        help="YAML file of settings. Flags override environment variables, which override the file. "
        "Environment variables are the flag in capitals unless listed.",
        dir_okay=False,
    )


def _legacy_options() -> Iterator[inspect.Parameter]:
    for flag in LEGACY:
        if flag.takes_value:
            yield _option(flag.name, str, flag.flag, hidden=True)
        else:
            yield _option(flag.name, bool, _switch(flag.flag), hidden=True)


class LaunchCommand(TyperCommand):
    """Also accepts `true` and `false` after a switch, as LoRAX's launcher does: `--prefix-caching true`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        switches = {setting.flag for setting in settings() if setting.type is bool}
        switches |= {flag.flag for flag in LEGACY if not flag.takes_value}
        words: list[str] = []
        for word in args:
            if words and words[-1] in switches and word.lower() in ("true", "false"):
                if word.lower() == "false":
                    words[-1] = f"--no-{words[-1][2:]}"
            else:
                words.append(word)
        return super().parse_args(ctx, words)


def _with_options(
    name: str, options: Sequence[inspect.Parameter], value_of: Callable[[dict[str, Any]], Any]
) -> Callable[..., Callable[..., None]]:
    """Replaces the parameter `name` of a command by `options`, and passes `value_of` their values for it."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**given: Any) -> None:
            values = {option.name: given.pop(option.name) for option in options}
            command(**given, **{name: value_of(values)})

        own = inspect.signature(command, eval_str=True).parameters.values()
        kept = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in own if one.name != name]
        run.__signature__ = inspect.Signature([*kept, *options])  # type: ignore[attr-defined]
        run.__annotations__ = {}
        return run

    return decorate


def with_config(*concerns: str, legacy: bool = False) -> Callable[..., Callable[..., None]]:
    """Adds the options of `concerns` to a command, which receives `config: EngineConfig`.

    `legacy` also accepts the launcher flags of LoRAX that do not exist here (`lorax_cli.legacy`).
    """
    titles = concern_titles()
    wanted = [setting for setting in settings() if setting.concern in concerns]
    options = [_config_file(), *(_setting_option(one, titles[one.concern]) for one in wanted)]
    if legacy:
        options += _legacy_options()

    def config_of(values: dict[str, Any]) -> EngineConfig:
        file = values.pop(CONFIG_FILE)
        if legacy:
            for warning in [*check_flags(values), *check_environment()]:
                warn(warning)
        chosen = {setting.name: values[setting.name] for setting in wanted}
        return resolve(chosen, file=file)

    return _with_options("config", options, config_of)


def with_server(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options of a command that asks a running server, and passes their values as `server: Server`."""

    def option(name: str, *flags: str, **fields: Any) -> inspect.Parameter:
        made = typer.Option(None, *flags, show_default=False, show_envvar=False, **fields)
        kind = inspect.Parameter.KEYWORD_ONLY
        return inspect.Parameter(name, kind, default=made, annotation=str | None)

    options = [
        option(
            "url",
            "--url",
            envvar="LORAX_URL",
            parser=address,
            metavar="URL",
            help=f"Address of the server. (env LORAX_URL; default {DEFAULT_URL})",
        ),
        option("api_key", "--api-key", help="API key of the server, if it has keys."),
        option("token", "--token", help="Token for private adapters."),
    ]

    def server_of(values: dict[str, str | None]) -> Server:
        return Server(values["url"] or DEFAULT_URL, values["token"], values["api_key"])

    return _with_options("server", options, server_of)(command)


def with_bench_options(*panels: tuple[str, type[Any]]) -> Callable[..., Callable[..., None]]:
    """Adds the fields of dataclasses of `engine.bench_options` as options, each under its heading.

    The command receives `given`: field -> text. A field of several dataclasses is one option, with the help of the
    first.
    """
    found: dict[str, tuple[BenchOption, str]] = {}
    for title, cls in panels:
        for name, option in bench_options(cls):
            shared = name in found
            found[name] = (found[name][0], "With and without --url") if shared else (option, title)
    options = [
        _option(
            name,
            list[str] if option.repeated else str,
            flag_of(name),
            help=f"{option.help} (default {option.default})",
            rich_help_panel=panel,
            metavar="TEXT",
        )
        for name, (option, panel) in found.items()
    ]
    return _with_options(
        "given",
        options,
        lambda values: {name: text for name, text in values.items() if text not in (None, [])},
    )

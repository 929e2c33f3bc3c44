"""Command-line options made from the fields of `engine.config`; no command declares a setting by hand.

A command asks for the concerns that it needs, `@with_config("model", "adapters")`, and receives a resolved
`EngineConfig`. Every setting is optional on the command line: what is not given comes from the environment, the
file of `--config`, or the default, in that order (`engine.config.resolve`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, get_type_hints
from urllib.parse import urlsplit

import typer
from typer.core import TyperCommand

from engine.bench.options import Ask, asks
from engine.config import EngineConfig, Setting, flag_of, resolve, settings
from engine.errors import ConfigError
from lorax_cli.legacy import LEGACY, REFUSED_VALUES, check_environment, check_flags
from lorax_cli.output import warn

CONFIG_FILE = "config_file"
_METAVARS: dict[Any, str | None] = {bool: None, int: "INT", float: "NUMBER"}


def address(text: str) -> str:
    """The base URL of a server; without a scheme it is http. Raises ConfigError."""
    url = text if "://" in text else f"http://{text}"
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # of a port or a bracket
        known = None
    if not known:
        raise ConfigError(
            f"--url {text!r} is not the address of a server",
            field="url",
            hint="such as http://localhost:3000",
        )
    return url


UrlOption = functools.partial(typer.Option, parser=address, metavar="URL")


def describe(setting: Setting) -> str:
    """The choices, the environment names beside the setting's own, and the default: the brackets that end a help."""
    default = setting.default
    if default is None or default == ():
        shown = ""
    elif setting.repeated:
        shown = ",".join(default)
    elif setting.type is bool:
        shown = "on" if default else "off"
    else:
        shown = str(default)
    parts = [" | ".join(setting.choices)] if setting.choices else []
    if further := [name for name in setting.environment if name != setting.name.upper()]:
        parts.append(f"env {', '.join(further)}")
    if shown:
        parts.append(f"default {shown}")
    return f" ({'; '.join(parts)})" if parts else ""


def concern_titles() -> dict[str, str]:
    """Attribute of `EngineConfig` -> what the concern is, for headings."""
    hints = get_type_hints(EngineConfig)
    return {name: (cls.__doc__ or name).splitlines()[0].rstrip(".") for name, cls in hints.items()}


def changed(config: EngineConfig, *concerns: str) -> list[str]:
    """Flags of the settings that are not as they are by default, wherever they were given."""
    wanted = (setting for setting in settings() if setting.concern in concerns)
    return [
        one.flag for one in wanted if getattr(getattr(config, one.concern), one.name) != one.default
    ]


def _option(setting: Setting, panel: str) -> inspect.Parameter:
    flags = setting.flag
    annotation: Any = setting.type
    complete: Callable[[], list[str]] | None = None
    if setting.type is bool:
        flags = f"{setting.flag}/--no-{setting.flag.removeprefix('--')}"
    elif setting.repeated:
        annotation = list[str]
    elif setting.type in _METAVARS:
        annotation = str  # `engine.config` reads numbers, and says the same wherever they come from
    elif setting.name in REFUSED_VALUES:
        annotation = (
            str  # so that a value of LoRAX reaches `lorax_cli.legacy`, which says why it is refused
        )
        complete = lambda: list(setting.choices)  # noqa: E731
    return inspect.Parameter(
        setting.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=typer.Option(
            None,
            flags,
            help=f"{setting.option.help}{describe(setting)}",
            rich_help_panel=panel,
            show_default=False,
            metavar=_METAVARS.get(setting.type, "CHOICE" if setting.choices else "TEXT"),
            autocompletion=complete,
        ),
        annotation=annotation | None,
    )


def _config_file() -> inspect.Parameter:
    return inspect.Parameter(
        CONFIG_FILE,
        inspect.Parameter.KEYWORD_ONLY,
        default=typer.Option(
            None,
            "--config",
            help="YAML file of settings. Flags come first, then the environment: --dtype is DTYPE, "
            "where no other name is told.",
            dir_okay=False,
            show_default=False,
        ),
        annotation=Path | None,
    )


def _legacy_options() -> Iterable[inspect.Parameter]:
    for flag in LEGACY:
        annotation: Any = str if flag.takes_value else bool
        names = flag.flag if flag.takes_value else f"{flag.flag}/--no-{flag.flag[2:]}"
        yield inspect.Parameter(
            flag.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=typer.Option(None, names, hidden=True, show_default=False),
            annotation=annotation | None,
        )


class LaunchCommand(TyperCommand):
    """Also takes the value that LoRAX's launcher gives to a yes-or-no flag: `--prefix-caching true`."""

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


def with_config(*concerns: str, legacy: bool = False) -> Callable[..., Callable[..., None]]:
    """Adds the options of `concerns` to a command, which receives `config: EngineConfig` in their place.

    `legacy` also accepts the launcher flags of LoRAX that mean nothing here (`lorax_cli.legacy`).
    """
    titles = concern_titles()
    wanted = [setting for setting in settings() if setting.concern in concerns]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**given: Any) -> None:
            file = given.pop(CONFIG_FILE)
            chosen = {setting.name: given.pop(setting.name) for setting in wanted}
            if legacy:
                flags = {flag.name: given.pop(flag.name) for flag in LEGACY}
                for warning in [*check_flags(flags | chosen), *check_environment()]:
                    warn(warning)
            command(**given, config=resolve(chosen, file=file))

        own = inspect.signature(command, eval_str=True).parameters.values()
        parameters = [parameter for parameter in own if parameter.name != "config"]
        parameters += [_config_file(), *(_option(one, titles[one.concern]) for one in wanted)]
        if legacy:
            parameters += _legacy_options()
        run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in parameters]
        )
        run.__annotations__ = {}
        return run

    return decorate


def with_asks(*panels: tuple[str, type[Any]]) -> Callable[..., Callable[..., None]]:
    """Adds the fields of dataclasses of `engine.bench.options` as options, each under its heading.

    The command receives `given`: the texts that were given, by field. A field that several dataclasses share is one
    option, described by the first.
    """
    found: dict[str, tuple[Ask, str]] = {}
    for title, cls in panels:
        for name, ask in asks(cls):
            shared = name in found
            found[name] = (found[name][0], "Both ways") if shared else (ask, title)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**arguments: Any) -> None:
            taken = {name: arguments.pop(name) for name in found}
            given = {name: value for name, value in taken.items() if value not in (None, [])}
            command(**arguments, given=given)

        own = inspect.signature(command, eval_str=True).parameters.values()
        parameters = [parameter for parameter in own if parameter.name != "given"]
        parameters += [_asked(name, *entry) for name, entry in found.items()]
        run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in parameters]
        )
        run.__annotations__ = {}
        return run

    return decorate


def _asked(name: str, ask: Ask, panel: str) -> inspect.Parameter:
    annotation: Any = list[str] if ask.repeated else str
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=typer.Option(
            None,
            flag_of(name),
            help=f"{ask.help} (default {ask.default})",
            rich_help_panel=panel,
            show_default=False,
            metavar="TEXT",
        ),
        annotation=annotation | None,
    )

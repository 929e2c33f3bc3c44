"""Settings from flags, environment variables, a YAML file and defaults: derived from the fields of `engine.config`.

Nothing else in the project reads settings from the environment.
"""

from __future__ import annotations

import dataclasses
import math
import os
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from engine.config import EngineConfig, Option, flag_of
from engine.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Setting:
    """One field: the source of flag, environment variables, YAML key and docs."""

    concern: str  # attribute of EngineConfig
    name: str  # max_total_tokens
    type: Any  # without Annotated and None
    default: Any
    option: Option

    @property
    def flag(self) -> str:
        return flag_of(self.name)

    @property
    def environment(self) -> tuple[str, ...]:
        return (self.option.env_name or self.name.upper(), *self.option.env)

    @property
    def choices(self) -> tuple[str, ...]:
        return get_args(self.type) if get_origin(self.type) is Literal else ()

    @property
    def repeated(self) -> bool:
        return get_origin(self.type) is tuple

    @property
    def default_text(self) -> str:
        """The default, for help and docs; empty if there is none or it is secret."""
        if self.option.secret or self.default is None:
            return ""
        if self.type is bool:
            return "on" if self.default else "off"
        return ",".join(self.default) if self.repeated else str(self.default)


def _bare(annotation: Any) -> tuple[Any, Option]:
    bare, option = get_args(annotation)[:2]
    if get_origin(bare) in (Union, types.UnionType):
        (bare,) = (arg for arg in get_args(bare) if arg is not type(None))
    return bare, option


def settings() -> Iterator[Setting]:
    """Every setting in the order of the concerns and their fields."""
    concerns = get_type_hints(EngineConfig)
    for concern, cls in concerns.items():
        hints = get_type_hints(cls, include_extras=True)
        for entry in dataclasses.fields(cls):
            bare, option = _bare(hints[entry.name])
            yield Setting(concern, entry.name, bare, entry.default, option)


def _parse(setting: Setting, value: Any, where: str) -> Any:
    """`value`, a text or a YAML value, as the setting's type. Raises ConfigError that starts with `where`."""
    try:
        if value is None:
            return setting.default
        if setting.repeated:
            items = value.split(",") if isinstance(value, str) else list(value)
            if setting.option.secret and not all(map(str, items)):  # an unset variable in a flag
                raise ConfigError(f"{where} is empty", field=setting.name, hint="leave it out")
            return tuple(str(item) for item in items if str(item))
        if setting.choices:
            if str(value) not in setting.choices:
                raise ValueError(f"must be one of {', '.join(setting.choices)}")
            return str(value)
        if setting.type is bool:
            words = {"1": True, "true": True, "yes": True, "on": True}
            words |= {"0": False, "false": False, "no": False, "off": False}
            return words[str(value).lower()]
        found = setting.type(value)
        if setting.type in (int, float):
            _check_range(setting, found, where)
        return found
    except (KeyError, OverflowError, TypeError, ValueError) as error:
        message = str(error) if setting.choices else f"is not a valid {setting.type.__name__}"
        raise ConfigError(
            f"{where}: {_shown(setting, value)} {message}", field=setting.name
        ) from None


def _shown(setting: Setting, value: Any) -> str:
    """The value for an error message."""
    return "the value" if setting.option.secret else repr(value)


def _check_range(setting: Setting, value: float, where: str) -> None:
    least, most = setting.option.least, setting.option.most
    if (
        math.isfinite(value)
        and (least is None or value >= least)
        and (most is None or value <= most)
    ):
        return
    wanted = " and ".join(
        f"at {kind} {bound:g}"
        for kind, bound in (("least", least), ("most", most))
        if bound is not None
    )
    raise ConfigError(
        f"{where} is {_shown(setting, value)}, not {wanted or 'a number'}", field=setting.name
    )


def _read(file: Path) -> dict[str, Any]:
    """The settings in a YAML file. Errors do not quote the file, which may hold secrets."""
    try:
        found = yaml.safe_load(file.read_text()) or {}
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"cannot read {file}{line}: {error.problem}", field="config") from None
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {file}: {error}", field="config") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{file} is not a mapping of settings", field="config")
    return {str(key).replace("-", "_"): value for key, value in found.items()}


def resolve(
    given: Mapping[str, Any],
    environment: Mapping[str, str] | None = None,
    file: Path | None = None,
) -> EngineConfig:
    """Merges the settings: flags in `given` override the environment, then the YAML file, then the defaults.

    A flag of None is not given. Raises ConfigError that names the flag, the variable or the key.
    """
    environment = os.environ if environment is None else environment
    by_name = {setting.name: setting for setting in settings()}
    in_file = {} if file is None else _read(file)
    if unknown := sorted(in_file.keys() - by_name.keys()):
        raise ConfigError(f"{file}: unknown setting {unknown[0]!r}", field=unknown[0])
    values: dict[str, dict[str, Any]] = {}
    for name, setting in by_name.items():
        found = next((key for key in setting.environment if environment.get(key)), None)
        if given.get(name) is not None:
            value = _parse(setting, given[name], setting.flag)
        elif found:
            value = _parse(setting, environment[found], found)
        elif name in in_file:
            value = _parse(setting, in_file[name], f"{file}: {name}")
        else:
            continue
        values.setdefault(setting.concern, {})[name] = value
    hints = get_type_hints(EngineConfig)
    return EngineConfig(**{concern: hints[concern](**kept) for concern, kept in values.items()})

"""Every setting from every source: flags override the environment, then YAML, then the default."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import typer
import yaml
from typer.testing import CliRunner

from engine.config import EngineConfig, Option
from engine.errors import ConfigError
from engine.settings import Setting, resolve, settings
from lorax_cli import legacy
from lorax_cli.app import ErrorTable
from lorax_cli.options import LaunchCommand, describe, with_config

SETTINGS = list(settings())
every_setting = pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)


@pytest.fixture(scope="module")
def kept() -> list[EngineConfig]:
    return []


@pytest.fixture(autouse=True)
def seen(kept: list[EngineConfig], monkeypatch: pytest.MonkeyPatch) -> list[EngineConfig]:
    """The configs that this test's commands receive. The environment has no settings."""
    kept.clear()
    for setting in SETTINGS:
        for name in setting.environment:
            monkeypatch.delenv(name, raising=False)
    for flag in legacy.LEGACY:
        monkeypatch.delenv(flag.name.upper(), raising=False)
    return kept


@pytest.fixture(scope="module")
def app(kept: list[EngineConfig]) -> typer.Typer:
    """A command with every setting, which keeps its config."""
    app = typer.Typer(cls=ErrorTable)
    app.callback()(lambda: None)

    @app.command(cls=LaunchCommand)
    @with_config(*dict.fromkeys(setting.concern for setting in SETTINGS), legacy=True)
    def take(config: EngineConfig) -> None:
        kept.append(config)

    return app


def run(app: typer.Typer, *arguments: str, env: dict[str, str] | None = None) -> Any:
    return CliRunner().invoke(app, ["take", *arguments], env=env)


def values_of(setting: Setting) -> tuple[Any, Any, Any]:
    """Three values, different from each other and from the default, except for choices and bools."""
    if setting.choices:
        others = [one for one in setting.choices if one != setting.default]
        return others[0], others[-1], setting.choices[0]
    if setting.type is bool:
        return not setting.default, setting.default, not setting.default
    if setting.repeated:
        return ("a", "b"), ("c",), ("d", "e")
    return {int: (7, 8, 9), float: (0.25, 0.5, 0.75), str: ("a", "b", "c")}[setting.type]


def as_flags(setting: Setting, value: Any) -> list[str]:
    if setting.type is bool:
        return [setting.flag if value else f"--no-{setting.flag[2:]}"]
    if setting.repeated:
        return [part for item in value for part in (setting.flag, item)]
    return [setting.flag, str(value)]


def as_text(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value).lower()


def value_in(config: EngineConfig, setting: Setting) -> Any:
    return getattr(getattr(config, setting.concern), setting.name)


@every_setting
def test_precedence(
    app: typer.Typer, seen: list[EngineConfig], setting: Setting, tmp_path: Path
) -> None:
    by_flag, by_environment, by_file = values_of(setting)
    file = tmp_path / "lorax.yaml"
    in_yaml = list(by_file) if setting.repeated else by_file
    file.write_text(yaml.safe_dump({setting.flag[2:]: in_yaml}))
    env = {setting.environment[0]: as_text(by_environment)}
    config = ["--config", str(file)]
    for arguments, variables, expected in (
        ([*config, *as_flags(setting, by_flag)], env, by_flag),
        (config, env, by_environment),
        (config, {}, by_file),
        ([], {}, setting.default),
    ):
        result = run(app, *arguments, env=variables)
        assert result.exit_code == 0, result.output
        assert value_in(seen[-1], setting) == expected


@every_setting
def test_further_environment_names(
    app: typer.Typer, seen: list[EngineConfig], setting: Setting
) -> None:
    value = values_of(setting)[0]
    for name in setting.environment:
        assert run(app, env={name: as_text(value)}).exit_code == 0
        assert value_in(seen[-1], setting) == value


numbers = [setting for setting in SETTINGS if setting.type in (int, float, bool)]
choosers = [setting for setting in SETTINGS if setting.choices]


@pytest.mark.parametrize("setting", numbers + choosers, ids=lambda setting: setting.name)
def test_bad_values_are_named(app: typer.Typer, setting: Setting, tmp_path: Path) -> None:
    bad = run(app, env={setting.environment[0]: "nonsense"})
    assert bad.exit_code == 2
    assert f"{setting.environment[0]}: 'nonsense'" in bad.stderr
    file = tmp_path / "lorax.yaml"
    file.write_text(f"{setting.name}: nonsense\n")
    bad = run(app, "--config", str(file))
    assert bad.exit_code == 2
    assert f"{setting.name}: 'nonsense'" in bad.stderr
    if setting.type is not bool:
        bad = run(app, setting.flag, "nonsense")
        assert bad.exit_code == 2
        assert setting.flag in bad.stderr and "nonsense" in bad.stderr


def test_hostname_of_a_container_is_not_the_address(
    app: typer.Typer, seen: list[EngineConfig]
) -> None:
    run(app, env={"HOSTNAME": "3f2a9c"})
    assert seen[-1].server.hostname == "0.0.0.0"
    run(app, env={"HOSTNAME": "3f2a9c", "LORAX_HOSTNAME": "127.0.0.1"})
    assert seen[-1].server.hostname == "127.0.0.1"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_tokens: 5", "unknown setting 'max_tokens'"),
        ("- a", "not a mapping"),
        ("a: [", "cannot read"),
    ],
)
def test_bad_files_are_named(app: typer.Typer, text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "lorax.yaml"
    file.write_text(text)
    result = run(app, "--config", str(file))
    assert result.exit_code == 2
    assert words in result.stderr and str(file) in result.stderr


@pytest.mark.parametrize(
    "flag", [one for one in legacy.LEGACY if not one.refused], ids=lambda flag: flag.name
)
def test_legacy_flag_without_effect(
    app: typer.Typer, seen: list[EngineConfig], flag: legacy.LegacyFlag
) -> None:
    result = run(app, flag.flag, *(["1"] if flag.takes_value else []))
    assert result.exit_code == 0
    assert seen[-1] == EngineConfig()
    assert result.stderr == f"warning: {flag.flag} has no effect: {flag.why}\n"


@pytest.mark.parametrize(
    "flag", [one for one in legacy.LEGACY if one.refused], ids=lambda flag: flag.name
)
def test_legacy_flag_that_is_refused(
    app: typer.Typer, seen: list[EngineConfig], flag: legacy.LegacyFlag
) -> None:
    result = run(app, flag.flag, *(["3"] if flag.takes_value else []))
    assert result.exit_code == ConfigError.exit_code
    assert result.stderr.startswith(f"error: {flag.flag}: {flag.why}\n")
    assert seen == []
    for value in filter(None, flag.harmless):
        assert run(app, flag.flag, value).exit_code == 0
    if not flag.takes_value:
        assert run(app, f"--no-{flag.flag[2:]}").exit_code == 0


@pytest.mark.parametrize("value", legacy.REFUSED_VALUES["quantize"])
def test_legacy_value_that_is_refused(
    app: typer.Typer, seen: list[EngineConfig], value: str
) -> None:
    why = legacy.REFUSED_VALUES["quantize"][value]
    by_flag, by_environment = run(app, "--quantize", value), run(app, env={"QUANTIZE": value})
    assert by_flag.exit_code == by_environment.exit_code == ConfigError.exit_code
    assert by_flag.stderr.startswith(f"error: --quantize {value}: {why}\nhint: use bitsandbytes,")
    assert by_environment.stderr.startswith(f"error: QUANTIZE {value}: {why}\n")
    assert seen == []


def test_refused_values_are_not_those_that_are_served() -> None:
    served = {setting.name: set(setting.choices) for setting in SETTINGS}
    for name, values in legacy.REFUSED_VALUES.items():
        assert served[name] and not served[name] & values.keys()


def test_legacy_environment(app: typer.Typer) -> None:
    result = run(app, env={"QUANTIZE": "awq"})
    assert result.exit_code == 2 and "QUANTIZE" in result.stderr
    assert (
        run(app, env={"NUM_SHARD": "1", "SHARDED": "false", "TRUST_REMOTE_CODE": "0"}).exit_code
        == 0
    )
    assert run(app, env={"TRUST_REMOTE_CODE": "true"}).exit_code == 2


def test_values_of_switches(app: typer.Typer, seen: list[EngineConfig]) -> None:
    """LoRAX's launcher accepts `--prefix-caching true`; other words are errors."""
    assert run(app, "--prefix-caching", "false", "--json-output", "true").exit_code == 0
    assert not seen[-1].scheduler.prefix_caching and seen[-1].server.json_output
    assert run(app, "--eager", "false").exit_code == 0 and not seen[-1].memory.eager
    assert run(app, "--eager", "true").exit_code == 0 and seen[-1].memory.eager
    assert run(app, "--prefix-caching", "maybe").exit_code == 2


def test_legacy_names_are_free() -> None:
    assert not {flag.name for flag in legacy.LEGACY} & {setting.name for setting in SETTINGS}


@pytest.mark.parametrize(
    "setting", [one for one in SETTINGS if one.type in (int, float)], ids=lambda one: one.name
)
def test_numbers_out_of_range(
    app: typer.Typer, setting: Setting, seen: list[EngineConfig], tmp_path: Path
) -> None:
    """By flag, environment and file: the bounds are valid, values beyond them are refused."""
    least, most = setting.option.least, setting.option.most
    beyond = [] if least is None else [least - 1]
    beyond += [] if most is None else [most + 1]
    beyond += [float("nan"), float("inf")] if setting.type is float else []
    for value in beyond:
        text = f"{value:g}"
        file = tmp_path / "settings.yaml"
        file.write_text(yaml.safe_dump({setting.name: value}))
        for arguments, env, named in (
            ([f"{setting.flag}={text}"], {}, setting.flag),
            ([], {setting.environment[0]: text}, setting.environment[0]),
            (["--config", str(file)], {}, setting.name),
        ):
            bad = run(app, *arguments, env=env)
            assert bad.exit_code == 2, bad.output
            assert f"{named} is {setting.type(value)}, not" in " ".join(bad.stderr.split())
    for bound in (least, most):
        if bound is not None:
            result = run(app, f"{setting.flag}={bound:g}")
            assert result.exit_code == 0, result.output
            assert getattr(getattr(seen[-1], setting.concern), setting.name) == bound


secrets = [setting for setting in SETTINGS if setting.option.secret]
TOKEN = "hf_0123456789"


@pytest.mark.parametrize("setting", secrets, ids=lambda setting: setting.name)
def test_secrets_are_not_in_a_config_that_is_printed(setting: Setting) -> None:
    """A config in a log, a traceback or an assertion."""
    config = resolve({setting.name: TOKEN}, environment={})
    assert value_in(config, setting) == ((TOKEN,) if setting.repeated else TOKEN)
    for shown in (repr(config), str(config), f"{getattr(config, setting.concern)}"):
        assert TOKEN not in shown


def test_the_hub_token_is_a_secret() -> None:
    assert "hub_token" in {setting.name for setting in secrets}


def test_secrets_are_not_in_help_and_docs() -> None:
    for option in (Option("A token.", secret=True), Option("No secret.")):
        setting = Setting("model", "token", str, TOKEN, option)
        shown = describe(setting) + setting.default_text
        assert (TOKEN in shown) is not option.secret


@pytest.mark.parametrize("kind", [int, float, bool, Literal["a", "b"]])
@pytest.mark.parametrize("secret", [True, False])
def test_secrets_are_not_in_errors(
    monkeypatch: pytest.MonkeyPatch, kind: Any, secret: bool
) -> None:
    """Of a value that is not valid, or out of range; the flag or the variable is named."""
    option = Option("", secret=secret, least=5)
    setting = Setting("model", "pin", kind, None, option)
    monkeypatch.setattr("engine.settings.settings", lambda: iter([setting]))
    for value in (TOKEN, "4") if kind in (int, float) else (TOKEN,):
        with pytest.raises(ConfigError, match="PIN") as raised:
            resolve({}, environment={"PIN": value})
        assert (value in str(raised.value).replace("at least 5", "")) is not secret


def test_secrets_in_a_broken_file_are_not_printed(app: typer.Typer, tmp_path: Path) -> None:
    file = tmp_path / "lorax.yaml"
    file.write_text(f'port: 3000\nhub_token: "{TOKEN}\n')
    result = run(app, "--config", str(file))
    assert result.exit_code == 2 and f"cannot read {file}, line 3: " in result.stderr
    assert TOKEN not in result.output


@pytest.mark.parametrize(
    ("given", "environment"),
    [
        ({"api_key": [""]}, {}),
        ({"api_key": ["a", ""]}, {}),
        ({}, {"LORAX_API_KEY": "a,"}),
    ],
)
def test_a_secret_that_is_empty(given: dict[str, Any], environment: dict[str, str]) -> None:
    """As from a variable that is not set; without the key the server would be open."""
    with pytest.raises(ConfigError, match="is empty"):
        resolve(given, environment=environment)

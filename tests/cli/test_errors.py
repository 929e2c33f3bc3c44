"""Every error ends the command with its documented code, and is on stderr with its remedy."""

import pytest
import typer
from typer.testing import CliRunner

from engine.errors import LoraxError, error_classes
from lorax_cli.app import ErrorTable, app


def failing(error: BaseException) -> typer.Typer:
    broken = typer.Typer(cls=ErrorTable)
    broken.callback()(lambda: None)

    @broken.command()
    def run() -> None:
        raise error

    return broken


@pytest.mark.parametrize("cls", error_classes().values(), ids=lambda cls: cls.__name__)
def test_error_becomes_exit_code(cls: type[LoraxError]) -> None:
    result = CliRunner().invoke(failing(cls("it broke", hint="mend it")), ["run"])
    assert result.exit_code == cls.exit_code
    assert result.stdout == ""
    assert result.stderr == "error: it broke\nhint: mend it\n"


def test_interrupt() -> None:
    assert CliRunner().invoke(failing(KeyboardInterrupt()), ["run"]).exit_code == 130


def test_no_error_is_success_and_families_differ() -> None:
    codes = {name: cls.exit_code for name, cls in error_classes().items()}
    assert 0 not in codes.values()
    same = ("ConfigError", "InvalidRequest", "MalformedRequest")  # the user's own input
    rest = [code for name, code in codes.items() if name not in same]
    assert len(rest) == len(set(rest))


def test_unknown_command_and_version() -> None:
    assert CliRunner().invoke(app, ["nonsense"]).exit_code == 2
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0 and result.stdout.startswith("lorax ")

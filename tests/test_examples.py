"""The examples of README and docs that ask a server run as they stand, but for its address, on the demo model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.test_docs import PAGES
from tools.launched import DEMO, ROOT, launched

ADDRESS = re.compile(r"(?:localhost|127\.0\.0\.1):3000")
CODE = re.compile(r"^```\w*\n(?:.*\n)*?```$|(?:^ {4}.*\n)+", re.MULTILINE)
ASKS = re.compile(
    r"^(?: {4}|\$ )?(?:curl|(?:from|import) (?:openai|lorax|anthropic))\b", re.MULTILINE
)
LIMIT_S = 100

NOT_RUN = {
    "from anthropic import": "the package anthropic is not among those of the tests",
}


@dataclass(frozen=True)
class Example:
    """Code in a page. Shell, if it is not Python."""

    page: str
    line: int
    code: str
    is_python: bool

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def asks(self) -> int:
        """How many clients it has."""
        return len(ASKS.findall(self.code))

    @property
    def why_not(self) -> str | None:
        """Why it is not run."""
        return next((why for part, why in NOT_RUN.items() if part in self.code), None)


def examples() -> Iterator[Example]:
    for page in PAGES:
        text = page.read_text()
        for found in CODE.finditer(text):
            first, _, rest = found[0].partition("\n")
            fenced = first.startswith("```")
            code = rest.removesuffix("```") if fenced else textwrap.dedent(found[0])
            line = text.count("\n", 0, found.start()) + 1
            example = Example(str(page.relative_to(ROOT)), line, code, first == "```python")
            if example.asks:
                yield example


EXAMPLES = list(examples())


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Host and port of the demo."""
    log = tmp_path_factory.mktemp("demo") / "server.log"
    with launched(log, *DEMO, "--cpu-memory-gb", "0.5", "--num-threads", "1") as (found, _):
        yield found.removeprefix("http://")


def run(example: Example, address: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs it in a process. `curl` fails if the status is an error."""
    code, count = ADDRESS.subn(address, example.code)
    assert count, "it asks the server that `make demo` starts"
    (folder / ".curlrc").write_text("fail-with-body\nsilent\nshow-error\n")
    environment = os.environ | {
        "CURL_HOME": str(folder),
        "PYTHONPATH": str(ROOT / "clients/python"),
    }
    shell = ["bash", "-euo", "pipefail", "-c"]
    command = [sys.executable, "-c", code] if example.is_python else [*shell, code]
    return subprocess.run(
        command, env=environment, cwd=folder, text=True, capture_output=True, timeout=LIMIT_S
    )


@pytest.mark.slow
@pytest.mark.parametrize("example", [one for one in EXAMPLES if not one.why_not], ids=str)
def test_it_runs(example: Example, address: str, tmp_path: Path) -> None:
    done = run(example, address, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and done.stdout.strip()
    assert not re.search(r'"error": ?[^n ]', done.stdout), done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "is_python"),
    [
        ("curl localhost:3000/nowhere; curl localhost:3000/health", False),
        ("curl localhost:3000/generate -d '{}' | cat", False),
        ("import urllib.request; urllib.request.urlopen('http://localhost:3000/nowhere')", True),
    ],
)
def test_a_wrong_one_fails(code: str, is_python: bool, address: str, tmp_path: Path) -> None:
    assert run(Example("", 0, code, is_python), address, tmp_path).returncode != 0


def test_none_is_lost() -> None:
    """Every line of a page that asks a server is in an example, and every exception has its examples."""
    for page in PAGES:
        name = str(page.relative_to(ROOT))
        found = sum(one.asks for one in EXAMPLES if one.page == name)
        lines = re.findall(
            r"^\W*(?:curl|(?:from|import) (?:openai|lorax|anthropic))\b.*", page.read_text(), re.M
        )
        assert found == len(lines), f"{name}: {lines}"
    assert sum(one.is_python for one in EXAMPLES) >= 17
    assert sum(not one.is_python for one in EXAMPLES) >= 12
    for part in NOT_RUN:
        assert any(part in one.code for one in EXAMPLES), f"no example has {part!r}"

"""`make conformance`: published SDKs against a real server.

Every SDK runs its tests of `tests/conformance` in a virtual environment with pinned versions, against one server with
the demo's model and adapters. Prints a table of the checks; exits with 1 if one failed, or if there were too few.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests" / "conformance"
ENVIRONMENTS = ROOT / ".venv-conformance"
API_KEY = "sk-conformance"
START_S = 120.0
STOP_S = 30.0
MIN_CHECKS = 120
OPENAI = (
    "test_openai_chat.py",
    "test_openai_completions.py",
    "test_openai_formats.py",
    "test_openai_responses.py",
    "test_openai_tools.py",
)


@dataclass(frozen=True, slots=True)
class Suite:
    """The modules of one SDK. `environment`: a file of requirements. `path`: of an SDK that is not installed there."""

    package: str
    environment: str
    modules: Sequence[str]
    path: str = ""

    @property
    def python(self) -> Path:
        return ENVIRONMENTS / self.environment / "bin" / "python"


SUITES = (
    Suite("lorax-client", "lorax-client", ("test_lorax_client.py",)),
    Suite("clients/python", "sdks", ("test_lorax_client.py",), path="clients/python"),
    Suite("openai", "sdks", OPENAI),
    Suite("huggingface_hub", "sdks", ("test_huggingface.py",)),
    Suite("anthropic", "sdks", ("test_anthropic.py",)),
    Suite("openai (2)", "frameworks", OPENAI),
    Suite("litellm", "frameworks", ("test_litellm.py",)),
    Suite("instructor", "frameworks", ("test_instructor.py",)),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a suite came to. `broken`: it did not end as a run of tests does."""

    suite: Suite
    version: str
    passed: int
    failed: int
    seconds: float
    broken: bool = False

    @property
    def good(self) -> bool:
        return bool(self.passed) and not self.failed and not self.broken


@contextmanager
def serving() -> Iterator[str]:
    """A server with an API key, the demo's model and a chat template with tools; yields its address.

    Raises RuntimeError if it does not start.
    """
    with tempfile.TemporaryDirectory(prefix="lorax-conformance-") as folder:
        template = (TESTS / "chat_template.jinja").read_text()
        path = Path(folder) / "tokenizer_config.json"
        path.write_text(json.dumps({"chat_template": template}))
        flags = {
            "--model-id": "demo",
            "--tokenizer-config-path": path,
            "--api-key": API_KEY,
            "--device": "cpu",
            "--cpu-memory-gb": 0.5,
            "--num-threads": 1,  # the SDKs take the others
            "--host-cache-gb": 0.1,
            "--hostname": "127.0.0.1",
            "--port": 0,
        }
        given = [str(part) for pair in flags.items() for part in pair]
        environment = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": folder}
        with subprocess.Popen(
            [sys.executable, "-m", "lorax_cli", "launch", *given],
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                yield _address(process)
            finally:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(STOP_S)
                except subprocess.TimeoutExpired:
                    process.kill()


def _address(process: subprocess.Popen[str]) -> str:
    """Reads the log until it has the address; the rest is read and dropped."""
    log, told = process.stderr, ""
    assert log is not None
    late = threading.Timer(START_S, process.kill)
    late.start()
    try:
        while (found := re.search(r"listening on (http://\S+)", told)) is None:
            if not (line := log.readline()):
                raise RuntimeError(f"the server does not start:\n{told[-3000:]}")
            told += line
    finally:
        late.cancel()
    threading.Thread(target=log.read, daemon=True).start()
    return found[1]


def prepare(name: str) -> None:
    """Makes a virtual environment, unless it has what the file of requirements says."""
    requirements = TESTS / "requirements" / f"{name}.txt"
    folder = ENVIRONMENTS / name
    wanted = hashlib.sha256(requirements.read_bytes() + sys.version.encode()).hexdigest()
    mark = folder / "installed"
    if mark.exists() and mark.read_text() == wanted:
        return
    print(f"installing {requirements.relative_to(ROOT)}", flush=True)
    python = folder / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-r", requirements], check=True)
    mark.write_text(wanted)


def environment_of(suite: Suite, url: str, given: Mapping[str, str]) -> dict[str, str]:
    """Variables of a run: none of `given` that point an SDK elsewhere, or that make it look for a network."""
    foreign = ("OPENAI_", "ANTHROPIC_", "HF_", "HUGGING", "LITELLM_", "PYTHONPATH", "PYTEST_")
    kept = {key: value for key, value in given.items() if not key.startswith(foreign)}
    own = {
        "LORAX_CONFORMANCE_URL": url,
        "LORAX_CONFORMANCE_KEY": API_KEY,
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_TELEMETRY": "False",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    return kept | own | ({"PYTHONPATH": str(ROOT / suite.path)} if suite.path else {})


def run(suite: Suite, url: str) -> Outcome:
    """Runs the tests of a suite; their output goes to this program's."""
    print(f"\n{suite.package}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        flags = ["-q", "-c", TESTS / "pytest.ini", "--disable-warnings", f"--junitxml={report}"]
        modules = [TESTS / module for module in suite.modules]
        start = time.monotonic()
        done = subprocess.run(
            [suite.python, "-m", "pytest", *flags, *modules],
            cwd=ROOT,
            env=environment_of(suite, url, os.environ),
            check=False,
        )
        seconds = time.monotonic() - start
        passed, failed = counts(report.read_text()) if report.exists() else (0, 0)
    return Outcome(suite, version_of(suite), passed, failed, seconds, done.returncode != 0)


def counts(report: str) -> tuple[int, int]:
    """Checks that passed and that failed, of a report in JUnit's form. One that was left out is neither."""
    passed = failed = 0
    for case in ElementTree.fromstring(report).iter("testcase"):
        kinds = {child.tag for child in case}
        failed += bool(kinds & {"failure", "error"})
        passed += not kinds & {"failure", "error", "skipped"}
    return passed, failed


def version_of(suite: Suite) -> str:
    """The version of the SDK under test."""
    if suite.path:
        text = (ROOT / suite.path / "lorax" / "__init__.py").read_text()
        return re.findall(r'__version__ = "(.+)"', text)[0]
    name = suite.package.partition(" ")[0]
    pinned = (TESTS / "requirements" / f"{suite.environment}.txt").read_text()
    return re.findall(rf"^{name}==(.+)$", pinned, re.MULTILINE)[0]


def table_of(outcomes: Sequence[Outcome]) -> Table:
    table = Table("SDK", "version", "checks", "failed", "seconds")
    for column in table.columns[2:]:
        column.justify = "right"
    for one in outcomes:
        failed = "broken" if one.broken and not one.failed else str(one.failed)
        seconds = f"{one.seconds:.0f}"
        table.add_row(one.suite.package, one.version, str(one.passed), failed, seconds)
    return table


def verdict(outcomes: Sequence[Outcome], least: int) -> str | None:
    """Why the run is no success; None: it is one."""
    if bad := [one.suite.package for one in outcomes if not one.good]:
        return f"failed: {', '.join(bad)}"
    total = sum(one.passed for one in outcomes)
    return None if total >= least else f"{total} checks are too few, at least {least} are needed"


def stale(outcomes: Sequence[Outcome], page: str) -> str | None:
    """Why the table of docs/api.md does not have these numbers; None: it has."""
    for one in outcomes:
        name = one.suite.package.partition(" ")[0]
        told = re.search(rf"^\| `{name}` \| [^|]* \| (\d+)", page, re.MULTILINE)
        if told is None or int(told[1]) != one.passed:
            return f"docs/api.md does not say that {name} has {one.passed} checks"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(prog="make conformance", description=__doc__)
    parser.add_argument("--only", help="packages, separated by commas")
    chosen = parser.parse_args().only
    names = [suite.package for suite in SUITES] if chosen is None else chosen.split(",")
    suites = [suite for suite in SUITES if suite.package in names]
    if len(suites) != len(names):
        parser.error(f"--only takes {', '.join(suite.package for suite in SUITES)}")
    for name in dict.fromkeys(suite.environment for suite in suites):
        prepare(name)
    with serving() as url:
        outcomes = [run(suite, url) for suite in suites]
    Console().print(table_of(outcomes))
    print(f"{sum(one.passed for one in outcomes)} checks passed")
    problem = verdict(outcomes, MIN_CHECKS if chosen is None else 1)
    problem = problem or stale(outcomes, (ROOT / "docs" / "api.md").read_text())
    if problem is not None:
        print(problem, file=sys.stderr)
    return problem is not None


if __name__ == "__main__":
    sys.exit(main())

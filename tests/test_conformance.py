"""`make conformance`: what counts as a check, and when a run is no success. The checks are in tests/conformance."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools import conformance
from tools.conformance import SUITES, Outcome, Suite

REPORT = """<testsuites><testsuite>
<testcase name="a"/><testcase name="b"><system-out>x</system-out></testcase>
<testcase name="c"><failure/></testcase><testcase name="d"><error/></testcase>
<testcase name="e"><skipped/></testcase><testcase name="f"><failure/><error/></testcase>
</testsuite></testsuites>"""


def outcome(passed: int, failed: int = 0, broken: bool = False) -> Outcome:
    return Outcome(SUITES[0], "1", passed, failed, 1.0, broken)


def test_checks_that_are_left_out_do_not_count() -> None:
    assert conformance.counts(REPORT) == (2, 3)


@pytest.mark.parametrize(
    ("outcomes", "problem"),
    [
        ([outcome(70), outcome(50)], None),
        ([outcome(70), outcome(49)], "119 checks are too few"),
        ([outcome(200), outcome(50, failed=1)], "failed"),
        ([outcome(200), outcome(50, broken=True)], "failed"),
        ([outcome(200), outcome(0)], "failed"),
    ],
)
def test_verdict(outcomes: list[Outcome], problem: str | None) -> None:
    found = conformance.verdict(outcomes, 120)
    assert (found is None) == (problem is None) and (problem or "") in (found or "")


def test_numbers_of_the_page_are_those_of_the_run() -> None:
    page = "| `lorax-client` | 1 | 70: all |\n| `openai` | 2 | 3 |\n"
    assert conformance.stale([outcome(70)], page) is None
    assert conformance.stale([outcome(71)], page) is not None
    assert conformance.stale([outcome(70)], "") is not None


def test_every_module_is_in_a_suite_and_every_version_pinned() -> None:
    modules = {path.name for path in conformance.TESTS.glob("test_*.py")}
    assert modules == {module for suite in SUITES for module in suite.modules}
    for suite in SUITES:
        assert re.fullmatch(r"\d+\.\d+\.\d+", conformance.version_of(suite)), suite.package


def test_an_environment_knows_only_this_server() -> None:
    given = {"PATH": "/bin", "OPENAI_API_KEY": "x", "HF_TOKEN": "x", "PYTHONPATH": "/x"}
    plain = conformance.environment_of(Suite("a", "b", ()), "http://x", given)
    assert plain["PATH"] == "/bin" and plain["LORAX_CONFORMANCE_URL"] == "http://x"
    assert not plain.keys() & (given.keys() - {"PATH"})
    ours = conformance.environment_of(Suite("a", "b", (), "clients/python"), "http://x", given)
    assert Path(ours["PYTHONPATH"]) == conformance.ROOT / "clients/python"


def test_the_page_names_the_pinned_versions() -> None:
    page = (conformance.ROOT / "docs" / "api.md").read_text()
    rows = re.findall(r"^\| `([\w/-]+)` \| ([\d., ]+) \|", page, re.MULTILINE)
    told = {name: versions.split(", ") for name, versions in rows if versions.strip()}
    for suite in SUITES:
        name = suite.package.partition(" ")[0]
        assert conformance.version_of(suite) in told[name], name

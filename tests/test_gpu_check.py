"""The script for GPU machines, as far as this machine can run it."""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

import pytest

from tools import gpu_check
from tools.gpu_check import ROOT, SECTIONS, Section, parse, run, table
from tools.profile_step import busy, report


def section(code: str) -> Section:
    return Section("try", 60, lambda out: [sys.executable, "-c", code])


def test_a_section_passes_or_fails_with_its_last_line(tmp_path: Path) -> None:
    passed = run(section("import tools; print('first'); print('last')"), tmp_path, 60)
    assert (passed.state, passed.last) == ("passed", "last")
    assert "first" in (tmp_path / "try.log").read_text()
    failed = run(section("raise SystemExit('no such thing')"), tmp_path, 60)
    assert failed.state == "failed (1)" and failed.last == "no such thing"
    skipped = run(Section("none", 1, lambda out: "there is none"), tmp_path, 1)
    assert (skipped.state, skipped.last) == ("skipped", "there is none")
    assert [line.split()[0] for line in table([passed, failed, skipped])] == ["try", "try", "none"]


def test_a_section_that_takes_too_long_is_ended_with_its_children(tmp_path: Path) -> None:
    child = tmp_path / "child"
    late = f"import time; time.sleep(3); open({str(child)!r}, 'w')"
    code = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', {late!r}])\n"
        "time.sleep(60)"
    )
    started = time.monotonic()
    assert run(section(code), tmp_path, 1.0).state == "too long"
    assert time.monotonic() - started < 30
    time.sleep(3)
    assert not child.exists()


def test_sections_and_limits_are_chosen() -> None:
    out, sections, limits = parse(["--out", "x", "--sections", "tests,build", "--limit", "tests=7"])
    assert out == Path("x") and [one.name for one in sections] == ["build", "tests"]
    assert limits["tests"] == 7 and limits["build"] == SECTIONS[0].limit
    for wrong in (["--sections", "all"], ["--limit", "tests"], ["--limit", "tea=5"]):
        with pytest.raises(SystemExit):
            parse(wrong)


def test_every_file_with_a_test_of_a_gpu_is_run(tmp_path: Path) -> None:
    named = {argument for argument in gpu_check.tests(tmp_path) if argument.endswith(".py")}
    assert {f"tests/engine/test_gpu_{name}.py" for name in ("text", "half", "graphs")} <= named
    assert all((ROOT / name).exists() for name in named)
    assert "tests/test_house.py" not in named


def test_busy_is_the_length_of_the_union() -> None:
    chooser = random.Random(0)
    for _ in range(50):
        intervals = [
            (a, a + chooser.randrange(6)) for a in (chooser.randrange(40) for _ in "." * 9)
        ]
        covered = {point for begin, end in intervals for point in range(begin, end)}
        assert busy(intervals) == len(covered)


def test_report_of_a_trace() -> None:
    def kernel(name: str, begin: float, length: float) -> dict[str, object]:
        return {"cat": "kernel", "name": name, "ts": begin, "dur": length}

    copy = {"cat": "gpu_memcpy", "name": "copy", "ts": 0.0, "dur": 500.0}
    lines = report([kernel("a", 100, 30), kernel("b", 120, 30), kernel("a", 180, 20), copy], 2)
    assert "profiled step 0.050 ms" in lines[0] and "gap 30.00%" in lines[0]
    assert [line.split()[-1] for line in lines[1:]] == ["a", "b"]
    assert report([copy], 1) == ["the profiler saw no kernels"]

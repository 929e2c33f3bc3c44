"""Everything that a GPU must show, in one run: build, tests, memory and race checks, profiles, copies, figures.

    python -m tools.gpu_check --out gpu-check [--sections build,tests] [--limit tests=600]

Needs Python, torch, nvcc and what the tests import; the project itself need not be installed. Each section is a process
with a time limit of its own and a log in the folder; a failing one stops none of the others. The table comes last, with
the goals of an H100 that figures were measured for (`tools.gpu_goals`), and the exit status is the number of sections
that did not pass.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tools import gpu_goals as goals

ROOT = Path(__file__).resolve().parents[1]
# For a machine without the plugin that pyproject.toml's settings of pytest name.
PLAIN_SETTINGS = """\
[pytest]
markers =
    gpu: needs a CUDA device
    slow: takes more than ten seconds
    asyncio: a coroutine
"""
SANITIZERS = ("/usr/local/cuda/bin/compute-sanitizer",)  # where it is not on the path
FILTERS = (
    "--kernel-name",
    "--kernel-regex",
    "--filter",
)  # names that versions gave the same option
BENCH = (
    *("bench", "--shape", "mistral-7b", "--input-tokens", "128", "--output-tokens", "256"),
    *("--no-prefix-caching", "--batch"),
)
GRACE_S = 5.0  # between asking a section to end and killing it


@dataclass(frozen=True, slots=True)
class Section:
    """`command` is asked for when its turn comes, when what it needs may have been built; a text says why not."""

    name: str
    limit: float  # seconds
    command: Callable[[Path], list[str] | str]


@dataclass(frozen=True, slots=True)
class Outcome:
    name: str
    state: str  # passed | failed | too long | skipped
    seconds: float
    last: str  # line of its log


def build(out: Path) -> list[str]:
    """For this machine's GPU. An install goes on without the library; here it is a failure."""
    library = ROOT / "engine" / "ops" / "_lorax_cuda.so"
    library.unlink(missing_ok=True)
    steps = f"{shlex.quote(sys.executable)} setup.py build_ext --inplace && test -e {shlex.quote(str(library))}"
    return ["env", "-u", "LORAX_CUDA_ARCHS", "sh", "-c", steps]


def tests(out: Path) -> list[str]:
    """pytest over the files that hold tests of a GPU."""
    files = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if "pytest.mark.gpu" in path.read_text()
    ]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rA", "--durations=15"]
    if importlib.util.find_spec("pytest_asyncio") is None:
        settings = out / "pytest.ini"
        settings.write_text(PLAIN_SETTINGS)
        command += ["-c", str(settings), f"--rootdir={ROOT}", "--import-mode=importlib"]
    return [*command, *files]


def sanitizer(tool: str) -> Callable[[Path], list[str] | str]:
    """compute-sanitizer over a small eager run; our own kernels only, where its version can tell."""

    def command(out: Path) -> list[str] | str:
        found = shutil.which("compute-sanitizer")
        program = found or next((path for path in SANITIZERS if Path(path).exists()), None)
        if program is None:
            return "there is no compute-sanitizer"
        known = subprocess.run([program, "--help"], capture_output=True, text=True).stdout
        flags = [f"--tool={tool}", "--error-exitcode=9"]
        flags += next(([name, "kns=lorax"] for name in FILTERS if name in known), [])
        products = ["--own-products"] if tool == "racecheck" else []
        return [program, *flags, sys.executable, "-m", "tools.sanitize_ops", *products]

    return command


def module(name: str, *arguments: str) -> Callable[[Path], list[str]]:
    return lambda out: [sys.executable, "-m", name, *arguments]


def figures(name: str, module: str, *arguments: str) -> Section:
    """A benchmark whose JSON lies in the folder, for tools.gpu_goals."""

    def command(out: Path) -> list[str]:
        return [sys.executable, "-m", module, *arguments, "--json", str(out / f"{name}.json")]

    return Section(name, 300, command)


SECTIONS = (
    Section("build", 600, build),
    Section("tests", 900, tests),
    Section("memcheck", 300, sanitizer("memcheck")),
    Section("racecheck", 300, sanitizer("racecheck")),
    Section("profile", 180, module("tools.profile_step", "--modes", "prefill,decode,mixed")),
    Section(
        "profile-lora",
        180,
        module("tools.profile_step", "--adapters", "64", "--modes", "prefill,decode,mixed"),
    ),
    Section("copies", 180, module("tools.bench_copy")),
    figures(
        *("step", "lorax_cli", *BENCH, "64", "--cases", "base,enabled,adapters"),
        *("--adapters", "64", "--ranks", "16", "--ranks", "8,16,32,64"),
        *("--max-batch-prefill-tokens", "8192"),
    ),
    figures(
        *("single", "lorax_cli", *BENCH, "1", "--cases", "base,adapters"),
        *("--adapters", "1", "--ranks", "16"),
    ),
    figures("long", "lorax_cli", *BENCH, "64", "--cases", "base,long", "--long-context", "32768"),
    figures(
        *("server", "tools.bench_http", "--duration", "8", "--alone", "2", "--warm-up", "1"),
        *("--repeat", "1"),
    ),
)


def run(section: Section, out: Path, limit: float) -> Outcome:
    """Runs one section, its output in `out`/name.log."""
    started = time.monotonic()
    command = section.command(out)
    if isinstance(command, str):
        return Outcome(section.name, "skipped", 0.0, command)
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    )
    if section.name.endswith(
        "check"
    ):  # every tensor an allocation, so that a step beyond it is seen
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        environment["LORAX_UNCHAINED"] = "1"  # the sanitizer's own work does not overlap
    log = out / f"{section.name}.log"
    with log.open("w") as file:
        print(" ".join(command), file=file, flush=True)
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            state = "passed" if process.wait(limit) == 0 else f"failed ({process.returncode})"
        except subprocess.TimeoutExpired:
            state = "too long"
            end(process)
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return Outcome(section.name, state, time.monotonic() - started, lines[-1])


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends the session that a section leads: first asked, then killed."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(GRACE_S)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def table(outcomes: list[Outcome]) -> list[str]:
    return [
        f"{one.name:13s} {one.state:12s} {one.seconds:6.0f} s  {one.last[:100]}" for one in outcomes
    ]


def parse(arguments: list[str] | None = None) -> tuple[Path, list[Section], dict[str, float]]:
    names = [section.name for section in SECTIONS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-check"))
    parser.add_argument("--sections", default=",".join(names), help=f"of {', '.join(names)}")
    parser.add_argument("--limit", action="append", default=[], metavar="SECTION=SECONDS")
    given = parser.parse_args(arguments)
    wanted = given.sections.split(",")
    limits = {section.name: section.limit for section in SECTIONS}
    for text in given.limit:
        name, _, seconds = text.partition("=")
        wanted_number = seconds.replace(".", "", 1).isdigit()
        if name not in limits or not wanted_number:
            parser.error(f"--limit {text}: not SECTION=SECONDS")
        limits[name] = float(seconds)
    if unknown := set(wanted) - set(names):
        parser.error(f"--sections: no {', '.join(sorted(unknown))}")
    return given.out, [section for section in SECTIONS if section.name in wanted], limits


def main() -> None:
    out, sections, limits = parse()
    out.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for section in sections:
        print(f"{section.name} ...", flush=True)
        outcomes.append(run(section, out.resolve(), limits[section.name]))
        print(table(outcomes[-1:])[0], flush=True)
    lines = table(outcomes)
    if any((out / f"{section.name}.json").exists() for section in sections):
        lines += goals.lines(goals.Figures(out))[0]
    (out / "table.txt").write_text("\n".join(lines) + "\n")
    print("\n" + "\n".join(lines))
    sys.exit(sum(one.state not in ("passed", "skipped") for one in outcomes))


if __name__ == "__main__":
    main()

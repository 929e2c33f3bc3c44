"""Runs the published schemathesis over the OpenAPI document of a real server, which serves the demo model.

    python -m tools.schemathesis_run [--examples 40] [--seed 1] [--url URL]

schemathesis has an environment of its own (.conformance/schemathesis), because its versions are not ours. Its settings
are tests/conformance/schemathesis.toml. Exits with 1 if a check failed, fewer than 2,000 cases ran, an operation was
left out, the server ended, or its log has an error.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

from engine.server.openapi import OPERATIONS
from tools.demo_server import ROOT, demo_server

HOME = ROOT / ".conformance" / "schemathesis"
CONFORMANCE = ROOT / "tests" / "conformance"
REQUIREMENTS = CONFORMANCE / "requirements" / "schemathesis.txt"
LEAST_CASES = 2000
ADAPTERS = {"0": "pirate", "00": "math"}  # names that schemathesis begins with
SHORT = {"--max-total-tokens": "64"}  # so that an answer without a limit takes little time


def installed() -> Path:
    """The program, installed anew when its requirements have changed."""
    stamp, program = HOME / "installed.txt", HOME / "bin" / "schemathesis"
    if not stamp.exists() or stamp.read_text() != REQUIREMENTS.read_text():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(HOME)], check=True)
        pip = [str(HOME / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "--quiet", "-r", str(REQUIREMENTS)], check=True)
        stamp.write_text(REQUIREMENTS.read_text())
    return program


def problems(url: str, examples: int, seed: int) -> list[str]:
    """Runs schemathesis, which prints what it finds; what is wrong with the run."""
    with urllib.request.urlopen(f"{url}/openapi.json") as response:
        document = HOME / "openapi.json"  # given its address, schemathesis leaves that route out
        document.write_bytes(response.read())
    command = [installed(), "--config-file", CONFORMANCE / "schemathesis.toml", "run", document]
    command += ["--url", url, "--no-color", "--max-examples", examples, "--seed", seed]
    environment = os.environ | {"PYTHONPATH": str(CONFORMANCE)}
    process = subprocess.Popen(
        list(map(str, command)), cwd=HOME, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    found = [] if process.wait() == 0 else [f"schemathesis ended with {process.returncode}"]
    return found + shortfalls("".join(lines))


def shortfalls(output: str) -> list[str]:
    """What the summary of a run says that it did not do."""
    tested = re.search(r"Tested: (\d+)", output)
    cases = re.search(r"(\d+) generated", output)
    found = []
    if tested is None or int(tested[1]) != len(OPERATIONS):
        found.append(f"of {len(OPERATIONS)} operations {tested[1] if tested else 0} were tested")
    if cases is None or int(cases[1]) < LEAST_CASES:
        found.append(f"{cases[1] if cases else 0} cases ran; {LEAST_CASES} are the least")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--examples", type=int, default=40, help="most of each operation")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--url", help="of a running server")
    args = parser.parse_args()
    installed()
    if args.url:
        found = problems(args.url, args.examples, args.seed)
    else:
        with demo_server(ADAPTERS, SHORT) as running:
            found = problems(running.url, args.examples, args.seed)
            found += [f"in the server's log: {line}" for line in running.complaints]
            if not running.alive:
                found.append(f"the server ended with {running.process.returncode}")
    print("\n".join(found) or "all is as the document says")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())

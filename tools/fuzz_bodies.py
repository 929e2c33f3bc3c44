"""Sends fuzzed bodies (tests/server/fuzzed.py) to a server as a process of its own.

    python -m tools.fuzz_bodies [--count 10000] [--seed 1] [--only NUMBER] [--url URL]

Without --url it starts a server of the demo model. `--only` sends one body and shows the answer. Exits with 1 if an
answer was wrong, the server ended, its log has an error, or something was left open.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tests.server.fuzzed import Case, case, cases
from tests.server.fuzzing import Round
from tools.demo_server import demo_server

ADAPTERS = {"a": "pirate", "b": "math"}  # the names in the bodies
SHOWN = 20


async def send(url: str, given: list[Case]) -> Round:
    ran = Round(url)
    await ran.send(given)
    return ran


@contextmanager
def server(url: str | None, faults: list[str]) -> Iterator[str]:
    """The address of the server. Adds what a server of ours did wrong to `faults`."""
    if url is not None:
        yield url
        return
    with demo_server(ADAPTERS) as running:
        try:
            yield running.url
        finally:
            faults += [f"in the log: {line}" for line in running.complaints]
            if not running.alive:
                faults.append(f"the server ended with {running.process.returncode}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, help="the number of one body")
    parser.add_argument("--url", help="of a running server")
    args = parser.parse_args()
    given = list(cases(args.seed, args.count))
    if args.only is not None:
        given = [case(args.seed, args.only)]
        print(given[0])
    start, faults = time.monotonic(), list[str]()
    with server(args.url, faults) as url:
        ran = asyncio.run(send(url, given))
    faults = ran.faults + faults
    print("\n\n".join(faults[:SHOWN]))
    statuses = ", ".join(f"{count} x {status}" for status, count in sorted(ran.statuses.items()))
    print(f"{len(given)} bodies in {time.monotonic() - start:.0f} s: {statuses}")
    for kind, count in sorted(ran.kinds.items()):
        print(f"{count:7} {kind}")
    print(f"{len(faults)} faults")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())

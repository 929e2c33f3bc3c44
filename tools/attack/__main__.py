"""No input, file or client may end or block the server for others: the soak that holds the program to it.

    python -m tools.attack [--quick] [--only adapters,connections,faults,term] [--seconds 600] [--json FILE]

A black box: `lorax launch` runs as a process of its own on a tiny random model, with a folder of local adapters and a
hub of this program's own. Endless streams and probes run all the time. Beside them come hostile adapters, slow and
broken connections, and then kills and freezes of the exchange's process; afterwards short runs are ended by SIGTERM
in every state. Prints a table of checks; exits with 1 if one of them failed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tools.attack import adapters, connections, faults, report, term
from tools.attack.load import RESIDENT, ROTATING, Probes, Streams, ask, body_of, session_of
from tools.attack.report import Check
from tools.attack.server import ROOT, Server, Watch, drain_s, levels

PARTS = ("adapters", "connections", "faults", "term")
SETTLE_S = 60.0
WARM_UP_S = 2.0

FULL = {
    "seconds": 600.0,
    "adapters": 200,
    "connections": 2000,
    "kills": 10,
    "freezes": 5,
    "streams": 64,
    "adapter_streams": 16,
    "max_concurrent_requests": 1024,
    "spacing_s": 20.0,
    "hold_s": 12.0,
    "limit_s": 2.0,
    "states": ",".join(term.STATES),
}
QUICK = FULL | {
    "seconds": 0.0,
    "adapters": 77,  # one of each kind
    "connections": 300,
    "kills": 2,
    "freezes": 1,
    "streams": 16,
    "adapter_streams": 4,
    "max_concurrent_requests": 160,
    "spacing_s": 2.0,
    "hold_s": 7.0,
    "states": "exchange frozen",
}


@contextmanager
def hub(folder: Path) -> Iterator[str]:
    """The hostile hub in a process of its own; its address."""
    command = [
        sys.executable,
        "-m",
        "tools.attack.hub",
        str(folder / "adapters" / adapters.HOSTILE),
    ]
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


async def warm_up(server: Server) -> None:
    """Asks once for everything that is good, so that what comes later is compared with a server in use."""
    async with session_of(server) as session:
        for name in (None, *RESIDENT, *ROTATING):
            status, why = await ask(session, body_of("word1", name, max_new_tokens=8))
            if status != 200:
                raise RuntimeError(f"{name or 'base'} is not served: {status} {why}")
        for source in ("local", "hub"):
            await ask(session, body_of("word1", "files/nothing", source, max_new_tokens=1))
    await asyncio.sleep(1)


async def attack(server: Server, args: argparse.Namespace) -> list[Check]:
    """The parts of the run with one server; its checks."""
    outcome, seen, struck = adapters.Outcome(), connections.Seen(), faults.Faults()
    end = time.monotonic() + args.seconds
    hostile = args.adapters if "adapters" in args.only else 0
    clients = args.connections if "connections" in args.only else 0
    seed = args.seed
    while True:
        await asyncio.gather(
            adapters.ask_all(server, hostile, seed, args.answer_s, outcome),
            connections.rounds(server.where, clients, seed, seen, args.hold_s),
        )
        if "faults" in args.only and not struck.done and server.alive:
            await faults.strike_all(server, args.kills, args.freezes, args.spacing_s, struck)
        seed += 1
        if time.monotonic() > end or not server.alive or outcome.hopeless:
            break
        await asyncio.sleep(1)
    checks = []
    if hostile:
        checks += report.of_adapters(outcome, args.answer_s)
    if clients:
        checks += report.of_connections(seen)
    if "faults" in args.only:
        checks += report.of_faults(struck)
    return checks


async def settled(server: Server, before: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    """The levels once they are as before, or after a minute."""
    deadline = time.monotonic() + SETTLE_S
    while report.left_over(before, found := levels(server)) and time.monotonic() < deadline:
        await asyncio.sleep(0.5)
    return found


async def long_run(server: Server, args: argparse.Namespace) -> list[Check]:
    """One server under everything but SIGTERM."""
    await server.start()
    try:
        await warm_up(server)
        before = levels(server)
        streams, probes = Streams(server), Probes(server)
        with Watch(server) as watch:
            streams.begin(args.streams, args.adapter_streams)
            probes.begin()
            await asyncio.sleep(WARM_UP_S)
            checks = await attack(server, args)
            await probes.close()
            await streams.close()
            alive, code = server.alive, server.process.returncode
            checks = [*report.of_load(streams, probes, args.limit_s), *checks]
            checks += report.of_memory(watch)
        checks.append(Check("the server lives", alive, f"exit code {code}", "yes"))
        if alive:
            checks += report.of_levels(before, await settled(server, before))
            limit = drain_s() + term.SPARE_S
            checks.append(
                await ended(server, "SIGTERM after it all", server.end(limit + term.SPARE_S))
            )
        return checks + report.of_log(server)
    finally:
        server.kill()


async def ended(server: Server, name: str, ending: Awaitable[float]) -> Check:
    """Whether the server ended in time, and of the signal rather than before it."""
    took, limit = await ending, drain_s() + term.SPARE_S
    code = server.process.returncode
    found = f"{took:.1f} s, exit code {code}"
    return Check(name, took <= limit and code == 0, found, f"<= {limit:g} s, code 0")


async def term_runs(folder: Path, address: str, args: argparse.Namespace) -> list[Check]:
    """A short run for each state."""
    checks: list[Check] = []
    sizes = term.Sizes(args.connections, args.streams, args.adapter_streams)
    for state in args.states.split(","):
        server = Server(
            folder, address, args.max_concurrent_requests, f"term-{state.replace(' ', '-')}"
        )
        checks.append(await ended(server, f"SIGTERM: {state}", term.end_in(server, state, sizes)))
        checks += [one for one in report.of_log(server) if not one.ok]
    return checks


async def run(folder: Path, args: argparse.Namespace) -> list[Check]:
    (folder / "adapters" / adapters.HOSTILE).mkdir(parents=True)
    adapters.write_all(folder)
    checks: list[Check] = []
    with hub(folder) as address:
        if set(args.only) - {"term"}:
            server = Server(folder, address, args.max_concurrent_requests)
            checks += await long_run(server, args)
        if "term" in args.only:
            checks += await term_runs(folder, address, args)
    return checks


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument(
        "--quick", action="store_true", help="the part that takes a minute and a half"
    )
    for name, value in FULL.items():
        flag = "--" + name.replace("_", "-")
        shown = f"default {value}; --quick: {QUICK[name]}"
        parser.add_argument(flag, type=type(value), metavar=name.upper(), help=shown)
    parser.add_argument("--answer-s", type=float, default=60.0, help="limit for a hostile adapter")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", type=Path, help="an empty folder for models, adapters and logs")
    args = parser.parse_args(given)
    for name, value in (QUICK if args.quick else FULL).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.only = args.only.split(",")
    for what, known in ((args.only, PARTS), (args.states.split(","), term.STATES)):
        if unknown := set(what) - set(known):
            parser.error(f"{', '.join(sorted(unknown))}: not one of {', '.join(known)}")
    return args


def main(given: list[str] | None = None) -> int:
    args = arguments(given)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="attack-", ignore_cleanup_errors=True) as name:
        checks = asyncio.run(run(args.keep or Path(name), args))
    print(report.show(checks))
    failed = sum(not one.ok for one in checks)
    print(f"{failed} of {len(checks)} checks failed in {time.monotonic() - start:.0f} s")
    if args.json:
        args.json.write_text(json.dumps(report.as_json(checks), indent=2))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

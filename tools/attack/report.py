"""What a run found, as a table of checks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tools.attack.adapters import Outcome
from tools.attack.connections import SECRET, Seen
from tools.attack.faults import Faults
from tools.attack.load import ANSWER_S, PROBES, Probes, Streams
from tools.attack.server import Server, Watch

MAX_LOG_BYTES = 5_000_000
MAX_ABOVE_S = 30.0  # one load
MIB = 1 << 20
SHOWN = 5  # cases of one check that are listed

# What may be more than before: threads of pools that grow with the work and are kept, and connections to the hub.
SPARE_THREADS = 40
SPARE_FILES = {"front": 2, "lorax-exchange": 20}


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the table."""

    name: str
    ok: bool
    found: str
    wanted: str
    cases: tuple[str, ...] = ()


def check(name: str, wrong: list[str], found: str = "", wanted: str = "none") -> Check:
    return Check(name, not wrong, found or f"{len(wrong)}", wanted, tuple(wrong[:SHOWN]))


def quantile(values: list[float], share: float) -> float:
    if len(values) < 2:
        return max(values, default=math.nan)
    return statistics.quantiles(values, n=1000, method="inclusive")[round(share * 1000) - 1]


def of_load(streams: Streams, probes: Probes, limit_s: float) -> list[Check]:
    mib = streams.bytes / MIB
    found = f"{len(streams.ended)}; {streams.reopened} reopened, {mib:.0f} MiB"
    checks = [check("streams that ended", streams.ended, found)]
    for kind in PROBES:
        values = probes.seconds[kind]
        limit = ANSWER_S if kind == "adapter to load" else limit_s
        failed = [why for why in probes.failed if why.startswith(f"{kind} at")]
        late = sum(value > limit for value in values)
        text = f"{len(values)}: p50 {quantile(values, 0.5):.3f} s, p99 {quantile(values, 0.99):.3f} s, "
        text += f"max {max(values, default=math.nan):.2f} s; {late} late, {len(failed)} failed"
        if kind == "adapter to load":
            text += f", {probes.refused} typed errors"
        ok = bool(values) and not late and not failed
        checks.append(Check(f"probe: {kind}", ok, text, f"<= {limit:g} s", tuple(failed[:SHOWN])))
    checks.append(Check("this program late by", True, f"{probes.lag:.2f} s", "for information"))
    return checks


def of_adapters(outcome: Outcome, limit_s: float) -> list[Check]:
    types = ", ".join(f"{name} {count}" for name, count in outcome.types.most_common())
    total, kinds = outcome.asked.total(), len(outcome.asked)
    slow = sorted(outcome.slowest.items(), key=lambda item: -item[1])[:3]
    slowest = ", ".join(f"{kind} {seconds:.1f} s" for kind, seconds in slow)
    found = f"{len(outcome.wrong)} of {total}, {kinds} kinds: {types}"
    return [
        check("hostile adapters without a typed error", outcome.wrong, found),
        Check("hostile adapters, slowest", True, slowest, f"<= {limit_s:g} s, checked above"),
        Check("code of adapters run", not outcome.ran_code, str(outcome.ran_code), "0"),
    ]


def of_connections(seen: Seen) -> list[Check]:
    wrong = [
        f"{kind}: {status} ({count})"
        for (kind, status), count in seen.answers.items()
        if status.startswith("5")
    ]
    opened = seen.opened.total()
    held = sum(count for (_, status), count in seen.answers.items() if status == "open")
    found = f"{len(wrong)} kinds; {opened} opened, {held} held or closed silently"
    return [
        check("broken connections answered with 5xx", wrong, found),
        Check("connections not accepted", not seen.refused, str(seen.refused), "0"),
    ]


def of_faults(faults: Faults) -> list[Check]:
    slowest, answered = (
        max(faults.recovered, default=math.nan),
        max(faults.answered, default=math.nan),
    )
    found = f"{faults.done} struck, {len(faults.recovered)} recovered in <= {slowest:.1f} s, "
    return [
        check("exchange killed or frozen", faults.wrong, f"{found}answers in <= {answered:.1f} s")
    ]


def of_memory(watch: Watch) -> list[Check]:
    checks = []
    for role, peak in sorted(watch.peaks.items()):
        found = f"peak {peak.peak / MIB:.0f} MiB, {peak.longest_above_s:.1f} s above the limit"
        limit = f"{peak.limit / MIB:.0f} MiB"
        ok = peak.longest_above_s <= MAX_ABOVE_S
        checks.append(Check(f"memory: {role}", ok, found, f"{limit} but for {MAX_ABOVE_S:g} s"))
    return checks


def left_over(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What is more than before, and more than pools may have grown."""
    wrong = []
    for what, counts in after.items():
        for role, count in counts.items():
            spare = {"threads": SPARE_THREADS, "descriptors": SPARE_FILES.get(role, 0)}.get(what, 0)
            had = before[what].get(role, 0)
            if count > had + spare:
                wrong.append(f"{what} of {role}: {had} before, {count} after")
    return wrong


def of_levels(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Check]:
    found = "; ".join(f"{what} {sum(after[what].values())}" for what in after)
    wanted = "; ".join(f"{what} {sum(before[what].values())}" for what in before)
    return [check("left over when idle", left_over(before, after), found, f"as before: {wanted}")]


def of_log(server: Server) -> list[Check]:
    text = server.log.read_bytes()
    size, traces = len(text), text.count(b"Traceback (most recent call last)")
    tokens = text.count(SECRET.encode())
    name = f"log of {server.name}"
    return [
        Check(f"{name}: tracebacks", not traces, str(traces), "0"),
        Check(f"{name}: tokens", not tokens, str(tokens), "0"),
        Check(f"{name}: size", size < MAX_LOG_BYTES, f"{size / 1e6:.2f} MB", "< 5 MB"),
    ]


def show(checks: list[Check]) -> str:
    """The table, failed checks with their first cases."""
    width = max(len(one.name) for one in checks)
    lines = []
    for one in checks:
        mark = "ok    " if one.ok else "FAILED"
        lines.append(f"{mark}  {one.name:{width}}  {one.found}  [{one.wanted}]")
        lines += [f"        - {' '.join(case.split())[:400]}" for case in one.cases if not one.ok]
    return "\n".join(lines)


def as_json(checks: list[Check]) -> list[dict[str, Any]]:
    return [asdict(one) for one in checks]

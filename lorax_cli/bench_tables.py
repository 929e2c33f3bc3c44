"""The tables of `lorax bench`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from engine.bench.engine_report import EngineReport
    from engine.bench.load.load_report import LoadReport
    from engine.bench.quantiles import Times
    from engine.bench.simulate.report import SimulationReport


def engine_table(report: EngineReport) -> RenderableType:
    """One row per case, then the times of copying and loading adapters."""
    workload = report.workload
    title = (
        f"{report.model_id}, {report.dtype} on {report.machine.device}: {workload.batch} x "
        f"({workload.input_tokens} + {workload.output_tokens}) tokens"
    )
    fraction = (
        f"; --adapter-memory-fraction {report.adapter_memory_fraction:.4f}, "
        f"needed {report.needed_memory_fraction:.4f}"
    )
    caption = f"copy bandwidth: {report.copy_bytes_per_s / 1e9:.1f} GB/s, read plus written"
    table = _table(
        "case",
        "step\nms",
        "model\nms",
        "limit\nms",
        "of\nlimit",
        "vs\nfirst",
        "tokens\n/s",
        "prefill\ntokens/s",
        "read\nMB",
    )
    table.title, table.caption = title, caption + (fraction if report.adapter_bytes else "")
    for one in report.measurements:
        table.add_row(
            one.case,
            f"{one.step_ms:.2f}",
            "-" if one.forward_ms is None else f"{one.forward_ms:.2f}",
            f"{one.limit_ms:.2f}",
            f"{one.share:.0%}",
            f"{one.ratio:.2f}",
            f"{one.tokens_per_s:.0f}",
            f"{one.prefill_tokens_per_s:.0f}",
            f"{one.decode.num_bytes / 1e6:.1f}",
        )
    parts: list[RenderableType] = [table]
    if placed := report.placed:
        parts.append(
            f"{placed.adapters} adapters ({placed.num_bytes / 1e6:.1f} MB) from host memory to the device: "
            f"{placed.adapters_per_s:.1f}/s, {placed.bytes_per_s / 1e9:.2f} GB/s"
        )
    if loaded := report.loaded:
        parts.append(
            f"{loaded.adapters} adapters of {loaded.bytes_each / 1e6:.1f} MB from files: first token after "
            f"{loaded.first_token_ms:.1f} ms ({loaded.warm_first_token_ms:.1f} ms if on the device), "
            f"{loaded.bytes_per_s / 1e9:.2f} GB/s to host memory"
        )
    return Group(*parts)


def engine_lines(report: EngineReport) -> str:
    """One line per case: name, tab, step in milliseconds."""
    return "\n".join(f"{one.case}\t{one.step_ms:.3f}" for one in report.measurements)


def load_table(report: LoadReport) -> RenderableType:
    """The times, rates and errors of a server."""
    table = _table("milliseconds", "count", "mean", "p50", "p90", "p99", "max")
    table.title = f"{report.model} at {report.url}"
    rows: list[tuple[str, Times | None]] = [("first token", report.ttft)]
    if report.ttft_cold:
        rows += [("  warm", report.ttft_warm), ("  cold", report.ttft_cold)]
    rows += [("between tokens", report.itl), ("last token", report.latency)]
    if background := report.background:
        rows += [
            ("background, alone", background.alone),
            ("  no cold adapter loads", background.outside),
            ("  a cold adapter loads", background.inside),
        ]
    rows.append(("lag of this client", report.client_lag))
    _add_times(table, *rows)
    lines = [
        f"{report.completed} of {report.sent} requests in {report.seconds:.1f} s: "
        f"{report.requests_per_s:.2f} requests/s, {report.tokens_per_s:.1f} tokens/s"
    ]
    if background:
        lines.append(
            f"{background.streams} background streams: {background.tokens_per_s:.1f} tokens/s; "
            f"cold adapters were loading for {background.inside_s:.1f} s"
        )
    lines.append(f"this client used {report.client_cpu:.0%} of a core")
    for kind, number in report.errors.items():
        reason = report.reasons.get(kind)
        lines.append(escape(f"{number} x {kind}" + (f"; the first: {reason}" if reason else "")))
    return Group(table, *lines)


def load_lines(report: LoadReport) -> str:
    """One line per figure: name, tab, number."""
    return _lines(
        {"requests/s": report.requests_per_s, "tokens/s": report.tokens_per_s},
        ("first token", report.ttft),
        ("between tokens", report.itl),
        ("last token", report.latency),
    )


def simulation_table(report: SimulationReport) -> RenderableType:
    """The times of a simulation, then hits, moves and shares."""
    table = _table("milliseconds", "count", "mean", "p50", "p90", "p99", "max")
    found, server = report.acquisitions, report.options.server
    table.title = (
        f"{report.options.traffic.adapters} adapters, arena {server.arena_gb:g} GiB, "
        f"host cache {server.host_cache_gb:g} GiB"
    )
    _add_times(
        table,
        ("first token", report.ttft),
        ("  adapter on the device", report.ttft_device),
        ("  in host memory", report.ttft_host),
        ("  to be loaded", report.ttft_source),
        ("between tokens", report.itl),
        ("last token", report.latency),
    )
    shares = ", ".join(
        f"{found.share(count):.1%} {where}"
        for count, where in (
            (found.device, "on the device"),
            (found.host, "in host memory"),
            (found.source, "to be loaded"),
        )
    )
    lines = [
        f"{report.completed} of {report.sent} requests in {report.seconds:.1f} s, {report.refused} refused: "
        f"{report.requests_per_s:.2f} requests/s, {report.tokens_per_s:.1f} tokens/s",
        f"adapters at arrival: {shares}; loaded although on the device: {found.reloaded}",
        f"{report.loads} loads, {report.host_evictions} evictions from host memory; "
        f"{report.placements} placements, {report.device_evictions} evictions from the device",
        f"{report.steps} steps of {report.step_tokens:.1f} tokens, {report.preemptions} preemptions",
    ]
    if fair := report.fairness:
        lines.append(
            f"received of wanted tokens per {fair.window_s:g} s, {fair.adapters} adapters: lowest {fair.lowest:.2f}, "
            f"p10 {fair.p10:.2f}, p50 {fair.p50:.2f}; Jain's index {fair.jain:.3f}; "
            f"longest wait {fair.longest_wait_s:.2f} s"
        )
    if len(report.tenants) > 1:
        ratios = ", ".join(f"{one.ratio:.1%} (weight {one.weight:g})" for one in report.tenants)
        lines.append(f"tokens that each tenant received of its share: {ratios}")
    return Group(table, *lines)


def simulation_lines(report: SimulationReport) -> str:
    """One line per figure: name, tab, number."""
    found = report.acquisitions
    figures = {
        "requests/s": report.requests_per_s,
        "tokens/s": report.tokens_per_s,
        "hits on the device": found.share(found.device),
        "hits in host memory": found.share(found.host),
    }
    if report.fairness is not None:
        figures["Jain's index"] = report.fairness.jain
    return _lines(
        figures,
        ("first token", report.ttft),
        ("between tokens", report.itl),
        ("last token", report.latency),
    )


def _add_times(table: Table, *rows: tuple[str, Times | None]) -> None:
    for name, times in rows:
        if times is not None:
            values = (times.mean, times.p50, times.p90, times.p99, times.max)
            table.add_row(name, str(times.count), *(f"{value:.2f}" for value in values))


def _lines(figures: dict[str, float], *rows: tuple[str, Times | None]) -> str:
    for name, times in rows:
        if times is not None:
            figures |= {f"{name}, p50, ms": times.p50, f"{name}, p99, ms": times.p99}
    return "\n".join(f"{name}\t{value:.3f}" for name, value in figures.items())


def _table(first: str, *figures: str) -> Table:
    """A table that never cuts figures: in a narrow terminal, the first column wraps."""
    table = Table(first, box=SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    for head in figures:
        table.add_column(head, justify="right", no_wrap=True)
    return table

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
    for name, times in rows:
        if times is not None:
            values = (times.mean, times.p50, times.p90, times.p99, times.max)
            table.add_row(name, str(times.count), *(f"{value:.2f}" for value in values))
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
    figures = {"requests/s": report.requests_per_s, "tokens/s": report.tokens_per_s}
    for name, times in (
        ("first token", report.ttft),
        ("between tokens", report.itl),
        ("last token", report.latency),
    ):
        if times is not None:
            figures |= {f"{name}, p50, ms": times.p50, f"{name}, p99, ms": times.p99}
    return "\n".join(f"{name}\t{value:.3f}" for name, value in figures.items())


def _table(first: str, *figures: str) -> Table:
    """A table that never cuts figures: in a narrow terminal, the first column wraps."""
    table = Table(first, box=SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    for head in figures:
        table.add_column(head, justify="right", no_wrap=True)
    return table

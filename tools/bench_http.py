"""A server under load over HTTP, and what cold adapters do to the streams of others.

    python -m tools.bench_http [--shape mistral-7b] [--streams 64] [--rate 20] [--json FILE] [-- launch flags]

Writes a model of the shape without weights, a tokenizer and random adapters of one rank on every linear, as PEFT
folders. Then:

1. offline: `lorax bench` of `--streams` requests on the warm adapters, for the step and the tokens a second;
2. starts `lorax launch` in a process of its own and waits for its first token;
3. sends `--streams` requests at once over HTTP, several times: their tokens a second beside the offline figure;
4. keeps `--streams` streams running while requests arrive as a Poisson process, every second of them for an adapter
   that nobody has asked for before, and tells the gaps between the streams' tokens inside and outside of the times in
   which such an adapter loads. A stream begins anew after as many tokens as the requests of 1. and 3. have, so that its
   step is theirs; with `--stream-tokens` beyond what the run takes, contexts grow and no stream brings a prompt.

Most cold adapters share their values on disk by hard links and differ in their scale, so each is read, placed and
kept as an adapter of its own. What follows `--` goes to `lorax launch`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.bench.adapters import Folders
from engine.bench.engine_report import Measurement, engine_report_from
from engine.bench.load.load_report import LoadReport, report_of
from engine.bench.load.run import drive
from engine.bench.plot import check_plot, draw
from engine.bench.shapes import SHAPES, write_model
from engine.bench_options import Load, Span
from engine.config import ModelConfig
from engine.models import adapter_layout
from lorax_cli.bench_tables import load_table
from lorax_cli.output import Output
from tools.launched import launched, lorax
from tools.waits import Probe, Watch


@dataclass(frozen=True, slots=True)
class Folder:
    """What was written."""

    root: Path
    model: Path
    warm: tuple[str, ...]
    cold: tuple[str, ...]
    adapter_bytes: int


def write(root: Path, args: argparse.Namespace) -> Folder:
    changes = {"num_hidden_layers": args.layers} if args.layers else {}
    model = write_model(root / "model", args.shape, **changes)
    config = ModelConfig(model_id=str(model), load_format="dummy", dtype=args.dtype)
    device = "cuda" if args.dtype == "bfloat16" else "cpu"
    layout, _, _ = adapter_layout(config, device)
    folders = Folders(layout, args.rank)
    warm = tuple(f"warm{i}" for i in range(args.warm))
    number = args.cold or round(1.5 * args.rate * (args.duration + args.warm_up) / 2) + 1
    cold = tuple(f"cold{i}" for i in range(number))
    for index, name in enumerate((*warm, *cold)):
        if index < args.warm + args.written:
            folders.write(root / name, index)
        else:
            source = cold[(index - args.warm) % args.written]
            folders.link(root / name, root / source, index)
    return Folder(root, model, warm, cold, folders.num_bytes)


def offline(folder: Folder, args: argparse.Namespace, memory: list[str]) -> Measurement:
    """The same batch without HTTP; the case with as many adapters as are warm."""
    file = folder.root / "offline.json"
    command = lorax(
        *("bench", "--model-id", str(folder.model), "--load-format", "dummy"),
        *("--dtype", args.dtype, "--batch", str(args.streams), "--adapters", str(args.warm)),
        *("--input-tokens", str(args.input), "--output-tokens", str(args.output)),
        *("--ranks", str(args.rank), "--cases", "adapters", "--json", str(file), *memory),
    )
    subprocess.run(command, check=True)
    found = engine_report_from(json.loads(file.read_text())).measurements
    return max(found, key=lambda one: one.adapters)


@contextmanager
def serving(
    folder: Folder, args: argparse.Namespace, launch: list[str]
) -> Iterator[tuple[str, int, float]]:
    """(address, process id, seconds from the start of the program to its first token)."""
    started = time.perf_counter()
    with launched(
        folder.root / "launch.log",
        *("--model-id", str(folder.model), "--load-format", "dummy", "--dtype", args.dtype),
        *("--adapter-root", str(folder.root), "--adapter-source", "local", *launch),
    ) as (address, pid):
        yield address, pid, time.perf_counter() - started


def run(url: str, load: Load) -> LoadReport:
    out = Output()
    outcome = asyncio.run(drive(url, load, "local", lambda text: out.note(f"[dim]{text}[/dim]")))
    report = report_of(outcome, load)
    out.console().print(load_table(report))
    return report


def load_of(folder: Folder, args: argparse.Namespace, answer: int) -> Load:
    """Requests on the warm adapters in turn, of `answer` tokens."""
    return Load(
        input_tokens=Span(args.input, args.input),
        output_tokens=Span(answer, answer),
        adapters=folder.warm,
        popularity="distinct",
        api=args.api,
    )


def at_once(url: str, folder: Folder, args: argparse.Namespace) -> list[LoadReport]:
    """`--streams` requests at once; the first time does not count."""
    load = replace(
        load_of(folder, args, args.output),
        concurrency=args.streams,
        requests=args.streams,
        warm_up=0.0,
    )
    return [run(url, load) for _ in range(args.repeat + 1)][1:]


def arrivals(url: str, folder: Folder, args: argparse.Namespace) -> LoadReport:
    load = replace(
        load_of(folder, args, args.answer),
        cold=folder.cold,
        rate=args.rate,
        duration=args.duration,
        warm_up=args.warm_up,
        background=args.streams,
        background_tokens=args.stream_tokens or args.output,
        alone=args.alone,
    )
    return run(url, load)


def summary(found: dict[str, Any]) -> None:
    print()
    for name, value in found.items():
        print(
            f"{name:58} {value:10.3f}" if isinstance(value, float) else f"{name:58} {value!s:>10}"
        )


def arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="mistral-7b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--warm", type=int, default=8, help="adapters of the streams")
    parser.add_argument("--cold", type=int, help="cold adapters; unset: more than are asked for")
    parser.add_argument("--written", type=int, default=24, help="of them, with values of their own")
    parser.add_argument("--input", type=int, default=128)
    parser.add_argument("--output", type=int, default=256)
    parser.add_argument("--stream-tokens", type=int, help="of each stream; unset: --output")
    parser.add_argument("--answer", type=int, default=64, help="tokens of each arriving request")
    parser.add_argument("--rate", type=float, default=20.0)
    parser.add_argument("--duration", type=float, default=30.0)
    parser.add_argument("--warm-up", type=float, default=3.0)
    parser.add_argument("--alone", type=float, default=5.0, help="seconds of the streams alone")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--api", choices=("openai", "native"), default="openai")
    parser.add_argument("--memory", default="", help="memory flags of both, in one word")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help=".html or .png of the arrivals")
    given = sys.argv[1:]
    cut = given.index("--") if "--" in given else len(given)
    return parser.parse_args(given[:cut]), given[cut + 1 :]


def main() -> None:
    args, launch = arguments()
    if args.plot:
        check_plot(args.plot)
    memory = args.memory.split()
    with tempfile.TemporaryDirectory(prefix="lorax-bench-") as name:
        started = time.perf_counter()
        folder = write(Path(name), args)
        written_s = time.perf_counter() - started
        reference = offline(folder, args, memory)
        with serving(folder, args, memory + launch) as (url, pid, start_s):
            batches = at_once(url, folder, args)
            watch, probe = Watch(pid), Probe()
            loaded = arrivals(url, folder, args)
            waits = watch.report() | probe.report()
    rate = statistics.median(one.tokens_per_s for one in batches)
    found: dict[str, Any] = {
        "adapter, MB": folder.adapter_bytes / 1e6,
        "files written in, s": written_s,
        "start to first token, s": start_s,
        "offline step, ms": reference.step_ms,
        "offline tokens/s": reference.tokens_per_s,
        "HTTP tokens/s, all at once": rate,
        "HTTP / offline": rate / reference.tokens_per_s,
    }
    beside = loaded.background
    assert beside is not None
    for when, times in (
        ("alone", beside.alone),
        ("outside", beside.outside),
        ("inside", beside.inside),
    ):
        if times is not None:
            found[f"streams, p50 gap {when}, ms"] = times.p50
            found[f"streams, p99 gap {when}, ms"] = times.p99
            found[f"streams, p99 gap {when} / offline step"] = times.p99 / reference.step_ms
    for what, times in (("warm", loaded.ttft_warm), ("cold", loaded.ttft_cold)):
        if times is not None:
            found[f"first token, {what}, p50, ms"] = times.p50
            found[f"first token, {what}, p99, ms"] = times.p99
    found |= waits
    found["errors"] = sum(loaded.errors.values())
    summary(found)
    if args.plot:
        draw(loaded, args.plot)
    if args.json:
        every = [one.to_json() for one in batches]
        value = {"summary": found, "at_once": every, "arrivals": loaded.to_json()}
        args.json.write_text(json.dumps(value, indent=2) + "\n")


if __name__ == "__main__":
    main()

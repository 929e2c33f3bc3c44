"""`lorax bench simulate`: the scheduler with thousands of adapters, on a device that is only arithmetic."""

from __future__ import annotations

import time

from engine.bench_options import Pace, SimulatedServer, Simulation, Tenancy, Traffic
from lorax_cli.bench_files import Given, JsonFile, PlotFile, output_of, write
from lorax_cli.options import with_bench_options
from lorax_cli.output import QuietFlag


@with_bench_options(
    ("Requests", Traffic), ("Server", SimulatedServer), ("Times", Pace), ("Tenants", Tenancy)
)
def simulate(
    given: Given, json_file: JsonFile = None, plot: PlotFile = None, quiet: QuietFlag = False
) -> None:
    """Simulate a server with thousands of adapters, to size it and to choose its settings.

    The scheduler, the arena and the host cache are the server's own. Steps, copies and loads only take time: by default
    that of one H200 with a model of 7B parameters. Time is virtual. The same options give the same report on any
    machine.

    The report has the hits of each tier, the times to the first token and between tokens, how even the adapters' shares
    are, and what each tenant received of its share by weight.
    """
    options = Simulation.of(given)
    options.check()
    out = output_of(json_file, plot, quiet)
    from engine.bench.simulate.run import simulate as run
    from lorax_cli.bench_tables import simulation_lines, simulation_table

    start = time.process_time()
    report = run(options)
    seconds = time.process_time() - start
    out.note(f"[dim]simulated {report.seconds:.1f} s in {seconds:.1f} s of processor time[/dim]")
    write(report, out, simulation_table, simulation_lines, json_file, plot)

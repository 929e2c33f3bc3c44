"""Benchmarks: of engines in this process (`offline`), of a running server over HTTP (`load`), and of the scheduler on a
device that is only arithmetic (`simulate`).

Their options are in `engine.bench_options`. The result of each is one report that goes to JSON and back
(`engine_report`, `load.load_report`, `simulate.report`), and `plot` draws them. `load`, `simulate`, the reports and
`plot` import no torch.
"""

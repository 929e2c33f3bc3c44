"""Benchmarks: of engines in this process (`offline`), and of a running server over HTTP (`load`).

The options of both are in `engine.bench_options`. The result of either is one report that goes to JSON and back
(`engine_report`, `load.load_report`), and `plot` draws both. `load`, the reports and `plot` import no torch.
"""

"""Benchmarks: of an engine in this process (`offline`), and of a running server over HTTP (`load`).

What either is asked for is one dataclass (`workload.Workload`, `load.workload.Load`), what it found one report that
goes to JSON and back (`report`), and `plot` draws either. Everything that a command needs before it measures imports
no torch.
"""

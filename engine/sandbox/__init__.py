"""Processes untrusted files in a child process, with limits of time and memory.

`run` starts a confined child and returns its answer, or raises an error that names the limit it reached. `Converter`
converts the pickles of torch.save to safetensors in such a child. The parent's side never imports torch.
"""

from engine.sandbox.call import Limits
from engine.sandbox.convert import Converter, is_pickle
from engine.sandbox.parent import CannotRun, Crashed, LimitReached, SandboxError, run

__all__ = [
    "CannotRun",
    "Converter",
    "Crashed",
    "LimitReached",
    "Limits",
    "SandboxError",
    "is_pickle",
    "run",
]

"""Work on what strangers wrote that may take any time and memory: in a child process that is thrown away.

`run` starts the child, confines it, and returns its answer or says which limit it reached. `Converter` turns the
pickles of torch.save into safetensors there. Nothing on the parent's side imports torch.
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

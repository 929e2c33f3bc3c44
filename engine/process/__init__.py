"""Where the engine and the exchange run: in processes of their own, or in this one.

`start` gives a `ProcessBackend`; `LocalBackend.start` gives the same without processes.
"""

from engine.process.backend import ProcessBackend
from engine.process.local import LocalBackend
from engine.process.parts import Parts

start = ProcessBackend.start

__all__ = ["LocalBackend", "Parts", "ProcessBackend", "start"]

"""The conditions of a measurement: device, date, versions."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import engine


@dataclass(frozen=True, slots=True)
class Machine:
    device: str
    date: str  # ISO 8601, UTC
    versions: dict[str, str]  # lorax, python, system, torch, cuda, driver


def machine(device: str) -> Machine:
    """This machine. `device` is the name of the compute device. Versions of torch are there if torch was imported."""
    versions = {
        "lorax": engine.__version__,
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
    }
    return Machine(
        device, datetime.now(UTC).isoformat(timespec="seconds"), versions | _torch_versions()
    )


def _torch_versions() -> dict[str, str]:
    torch = sys.modules.get("torch")
    if torch is None:
        return {}
    found = {"torch": str(torch.__version__)}
    if torch.version.cuda:
        found["cuda"] = str(torch.version.cuda)
        if driver := _driver():
            found["driver"] = driver
    return found


def _driver() -> str:
    """Version of NVIDIA's kernel driver; empty if unknown."""
    about = Path("/proc/driver/nvidia/version")
    if about.exists() and (found := re.search(r"\s(\d+\.\d+[.\d]*)\s", about.read_text())):
        return found[1]
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.split("\n", 1)[0].strip()

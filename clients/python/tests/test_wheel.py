"""The wheel has every module and its types, and needs nothing else of this repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import lorax

FOLDER = Path(__file__).parents[1]


def test_the_wheel(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(FOLDER, source, ignore=shutil.ignore_patterns("build", "*.egg-info", "tests"))
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(tmp_path)]
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", *options, str(source)], check=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"lorax_client-{lorax.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    packed = {path.name for path in (tmp_path / "installed" / "lorax").iterdir()}
    here = {path.name for path in (FOLDER / "lorax").iterdir() if path.is_file()}
    assert packed == here and "py.typed" in packed
    program = "import sys, lorax; print(lorax.__file__, 'engine' in sys.modules)"
    printed = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert printed.split() == [str(tmp_path / "installed" / "lorax" / "__init__.py"), "False"]

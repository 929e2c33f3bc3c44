"""Loading the compiled ops, and running without them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.errors import ConfigError
from engine.ops import extension
from engine.ops.schemas import SCHEMAS

ROOT = Path(__file__).resolve().parents[2]


def test_status_names_what_serves() -> None:
    status = extension.load()
    assert extension.load() is status
    by_torch = {op for op in SCHEMAS if (op, "cpu") in extension.BY_TORCH}
    if status.path is None:
        assert status.reason and not status.ops and status.isa is None
    else:
        assert (
            status.path.exists()
            and status.isa in ("generic", "avx2", "avx512", "avx512_bf16")
            and status.reason is None
        )
        assert status.ops == SCHEMAS.keys() - by_torch
    for op, served in extension.backends().items():
        without = "torch" if op in by_torch else "reference"
        assert served["cpu"] == ("extension" if op in status.ops else without)


def test_a_reference_on_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What every test marked `gpu` asks for, and every engine on a GPU."""
    on_gpu = set(SCHEMAS) - {"linear"}  # torch's own is fast
    monkeypatch.setattr(extension, "_registered", lambda op, key: op in on_gpu)
    extension.require_cuda()
    for op in sorted(on_gpu):
        monkeypatch.setattr(extension, "_registered", lambda name, key, op=op: name != op)
        assert extension.backends()[op]["cuda"] == "reference"
        with pytest.raises(ConfigError):
            extension.require_cuda()


def test_a_missing_or_broken_library_has_a_reason(tmp_path: Path) -> None:
    missing = extension.load(tmp_path / "_lorax_cpu.so")
    assert missing.path is None and "was not built" in (missing.reason or "")
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    assert "does not load" in (extension.load(broken).reason or "")


@pytest.mark.parametrize(
    ("archs", "capability", "fits"),
    [
        ("80;90a", (9, 0), True),
        ("80;90a", (8, 6), True),
        ("86", (8, 0), False),
        ("90a", (9, 1), False),
        ("80;86;89;90a", (10, 0), False),
        ("100", (10, 3), True),
        ("100f", (10, 3), True),
        ("100f", (9, 0), False),
    ],
)
def test_a_library_for_other_gpus_is_not_loaded(
    archs: str,
    capability: tuple[int, int],
    fits: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that fits goes on to be loaded, which this one cannot be."""
    library = tmp_path / "_lorax_cuda.so"
    library.write_bytes(b"\x7fELF..lorax_cuda_archs=" + archs.encode() + b"\0..")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(extension, "capability", lambda: capability)
    status = extension.load_cuda(library)
    assert status.path is None and status.reason is not None
    assert ("does not load" in status.reason) == fits
    assert (f"{capability[0]}.{capability[1]}" in status.reason) != fits


def test_an_unknown_instruction_set_is_refused() -> None:
    if extension.load().path is None:
        pytest.skip("not built")
    assert not extension.use_isa("avx1024")


def build(
    tmp_path: Path, *flags: str, root: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "setup.py",
        "build_ext",
        f"--build-lib={tmp_path}/lib",
        f"--build-temp={tmp_path}/temp",
        *flags,
    ]
    return subprocess.run(
        command, cwd=root, env={**os.environ, **environment}, capture_output=True, text=True
    )


def source_tree(tmp_path: Path) -> Path:
    """A copy of what a build reads."""
    tree = tmp_path / "tree"
    (tree / "engine" / "ops").mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    shutil.copytree(ROOT / "engine" / "csrc", tree / "engine" / "csrc")
    shutil.copy(ROOT / "engine" / "__init__.py", tree / "engine")
    return tree


def test_installing_without_a_compiler_warns_and_succeeds(tmp_path: Path) -> None:
    earlier = tmp_path / "lib" / "engine" / "ops" / "_lorax_cpu.so"
    earlier.parent.mkdir(parents=True)
    earlier.touch()
    result = build(tmp_path, CXX="no-such-compiler")
    assert result.returncode == 0, result.stderr
    assert "_lorax_cpu was not built" in result.stdout + result.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_an_install_in_place_leaves_no_earlier_library(tmp_path: Path) -> None:
    tree = source_tree(tmp_path)
    earlier = [tree / "engine" / "ops" / f"_lorax_{kind}.so" for kind in ("cpu", "cuda")]
    for library in earlier:
        library.touch()
    result = build(tmp_path, "--inplace", root=tree, CXX="no-such-compiler", LORAX_CUDA_ARCHS="")
    assert result.returncode == 0, result.stderr
    assert not any(library.exists() for library in earlier)


def test_building_can_be_switched_off(tmp_path: Path) -> None:
    result = build(tmp_path, LORAX_BUILD_EXTENSIONS="0", CXX="no-such-compiler")
    assert result.returncode == 0, result.stderr
    assert "was not built" not in result.stdout + result.stderr


def test_the_library_needs_nothing_newer_than_the_oldest_torch() -> None:
    """No Python symbols, and from torch only its C interface."""
    status = extension.load()
    if status.path is None or sys.platform != "linux":
        pytest.skip("not built")
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", status.path], capture_output=True, text=True
    )
    names = [line.split()[-1].split("@")[0] for line in symbols.stdout.splitlines()]
    assert names and not [
        name for name in names if name.startswith(("Py", "_Py", "_ZN2at", "_ZN3c10", "_ZN5torch"))
    ]


COMPILER = """#!/bin/sh
if [ "$1" = --version ]; then echo "c++ {version}"; exit; fi
echo "$@" >> {log}
for last; do :; done
touch "$last"
"""


@pytest.fixture
def compiled(tmp_path: Path) -> Callable[..., int]:
    """Builds with a compiler of the given version and returns how many files it compiled."""
    compiler, log = tmp_path / "compiler", tmp_path / "log"

    def run(version: str, root: Path) -> int:
        compiler.write_text(COMPILER.format(version=version, log=log))
        compiler.chmod(0o755)
        log.write_text("")
        flags = {"CXX": str(compiler), "CUDACXX": "no-such-compiler", "LORAX_CUDA_ARCHS": ""}
        result = build(tmp_path, root=root, **flags)
        assert result.returncode == 0, result.stderr
        return sum(" -c " in line for line in log.read_text().splitlines())

    return run


def test_objects_are_made_anew_where_they_must(
    tmp_path: Path, compiled: Callable[..., int]
) -> None:
    """After a change of a shared header, and by a compiler at the same path that says another version."""
    tree = source_tree(tmp_path)
    whole = compiled("1", tree)
    assert whole > 10
    assert compiled("1", tree) == 0
    (tree / "engine" / "csrc" / "common" / "dtype.h").touch()
    assert compiled("1", tree) == whole
    assert compiled("2", tree) == whole


@pytest.mark.parametrize(("given", "built"), [("80;90;100", "80;90a;100"), ("90a", "90a")])
def test_hopper_gets_all_of_its_instructions(tmp_path: Path, given: str, built: str) -> None:
    """Code for plain 90 lacks those of the linear."""
    nvcc, log = tmp_path / "nvcc", tmp_path / "log"
    nvcc.write_text(COMPILER.format(version="1", log=log))
    nvcc.chmod(0o755)
    result = build(tmp_path, CXX=str(nvcc), CUDACXX=str(nvcc), LORAX_CUDA_ARCHS=given)
    assert result.returncode == 0, result.stderr
    (linear,) = (line for line in log.read_text().splitlines() if "cuda/linear.cu" in line)
    assert re.findall(r"-gencode=arch=compute_(\w+),code=sm_\1 ", linear) == built.split(";")
    (archs,) = (line for line in log.read_text().splitlines() if "cuda/archs.cpp" in line)
    assert f'LORAX_CUDA_ARCHS="{built}"' in archs

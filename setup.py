"""Builds the extensions; everything else about the package is in pyproject.toml.

An extension is a plain shared library without Python symbols, written against torch's stable ABI: one file serves
torch 2.11 and later under every Python. A missing compiler or a failing build is a warning, never a failed install:
the engine then runs on its reference ops and says so.

    LORAX_BUILD_EXTENSIONS=0   build nothing
    CXX                        the compiler (default: c++)
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

TORCH_TARGET = "0x020B000000000000"  # the stable ABI of torch 2.11
CPU_SOURCES = Path("engine/csrc/cpu")
CPU_FLAGS = [
    *(
        "-std=c++17",
        "-O3",
        "-g0",
        "-fPIC",
        "-fvisibility=hidden",
        "-ffp-contract=off",
        "-fno-math-errno",
    ),
    *("-fno-trapping-math", "-Wall", "-Wextra", "-Wno-ignored-attributes", "-Wno-psabi"),
    *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),  # GCC 12 in its own intrinsics
]
# Lowest first, also in the link: where two objects hold the same inline function, the linker keeps the first, which
# every machine can run.
ISA_FLAGS: dict[str, list[str]] = {"generic": []}
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISA_FLAGS["avx512"] = [
        *ISA_FLAGS["avx2"],
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
    ]
    ISA_FLAGS["avx512"] += ["-mprefer-vector-width=512"]


class BuildExtensions(build_ext):
    """`<name>.so` beside the package's modules, for each extension that this machine can build."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        builders = {
            "engine.ops._lorax_cpu": self.build_cpu
        }  # CUDA: engine/csrc/*.cu, with nvcc, goes here
        try:
            builders[ext.name]()
        except (ImportError, OSError, subprocess.CalledProcessError) as error:
            self.warn(
                f"{ext.name} was not built ({error}); the engine will run on its reference ops"
            )

    def build_cpu(self) -> None:
        """Compiles each kernel once per instruction set and the bindings once, then links."""
        import torch

        root = Path(torch.__file__).parent
        compiler = shlex.split(os.environ.get("CXX", "c++"))
        target = Path(self.get_ext_fullpath("engine.ops._lorax_cpu"))
        headers = max(path.stat().st_mtime for path in [*CPU_SOURCES.glob("*.h"), Path(__file__)])
        objects = Path(self.build_temp) / "cpu"
        objects.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)

        def compile_one(job: tuple[Path, str, list[str]]) -> str:
            source, name, flags = job
            output = objects / f"{name}.o"
            if not output.exists() or output.stat().st_mtime <= max(
                headers, source.stat().st_mtime
            ):
                subprocess.run(
                    [*compiler, *CPU_FLAGS, *flags, "-c", str(source), "-o", str(output)],
                    check=True,
                )
            return str(output)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            files = list(pool.map(compile_one, self.cpu_jobs(root / "include")))
        fresh = objects / target.name
        link = ["-shared", "-o", str(fresh), *files, f"-L{root / 'lib'}", "-ltorch_cpu"]
        if sys.platform == "linux":
            link += ["-Wl,-z,defs", "-Wl,--as-needed", "-Wl,-s"]
        subprocess.run([*compiler, *link], check=True)
        shutil.copy(fresh, f"{target}.new")
        os.replace(f"{target}.new", target)  # a process that runs the old library keeps it

    @staticmethod
    def cpu_jobs(include: Path) -> Iterator[tuple[Path, str, list[str]]]:
        """(source, object name, flags), in the order of the link."""
        sources = sorted(CPU_SOURCES.glob("*.cpp"))
        once = [
            path for path in sources if path.name.startswith("bind_") or path.stem == "dispatch"
        ]
        for path in once:
            yield (
                path,
                path.stem,
                [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", "-O2", f"-isystem{include}"],
            )
        for isa, flags in ISA_FLAGS.items():
            for path in sources:
                if path not in once:
                    yield path, f"{path.stem}-{isa}", [f"-DLORAX_ISA={isa}", *flags]


class AnyPythonWheel(bdist_wheel):
    """The library has no Python symbols, so one wheel serves every Python 3 of a platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def extensions() -> list[Extension]:
    if os.environ.get("LORAX_BUILD_EXTENSIONS") == "0" or sys.platform not in ("linux", "darwin"):
        return []
    return [Extension("engine.ops._lorax_cpu", sources=[], optional=True)]


setup(
    ext_modules=extensions(), cmdclass={"build_ext": BuildExtensions, "bdist_wheel": AnyPythonWheel}
)

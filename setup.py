"""Builds the extensions; everything else about the package is in pyproject.toml.

An extension is a plain shared library without Python symbols, written against torch's stable ABI: one file serves
torch 2.11 and later under every Python. A missing compiler or a failing build is a warning, never a failed install:
the engine then runs on its reference ops and says so. A library of an earlier build does not stay, for it may lack
what these sources call.

    LORAX_BUILD_EXTENSIONS=0   build nothing
    CXX                        the C++ compiler (default: c++)
    CUDACXX                    the CUDA compiler (default: nvcc)
    LORAX_CUDA_ARCHS           GPUs to build for, as in 80;90a (default: the one of this machine; without one, all)
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
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

TORCH_TARGET = "0x020B000000000000"  # the stable ABI of torch 2.11
COMMON_SOURCES = Path("engine/csrc/common")  # headers of both extensions
CPU_SOURCES = Path("engine/csrc/cpu")
CPU_FLAGS = [
    *(
        "-std=c++17",
        "-O3",
        "-falign-functions=64",  # hot loops run at the same speed wherever the linker puts them
        "-falign-loops=64",
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
CUDA_SOURCES = Path("engine/csrc/cuda")
CUDA_ARCHS = ("80", "86", "89", "90", "100", "120")
# the linear is made of instructions that only this kind of code for Hopper has
EXACT = {"90": "90a"}
CUDA_FLAGS = [
    "-std=c++17",
    "-O3",
    "--expt-relaxed-constexpr",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
]


def cuda_headers(nvcc: str) -> Path:
    """Where cuda_runtime.h lies: beside the compiler, or, where that is only a wrapper, in the usual place."""
    beside = Path(nvcc).resolve().parent.parent / "include"
    return beside if (beside / "cuda_runtime.h").exists() else Path("/usr/local/cuda/include")


def version_of(compiler: str) -> str:
    """What a compiler says of itself."""
    asked = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    return asked.stdout


class Job(NamedTuple):
    """One file to compile."""

    source: Path
    name: str  # of the object file
    command: list[str]  # the compiler and its flags


class BuildExtensions(build_ext):
    """`<name>.so` beside the package's modules, for each extension that this machine can build."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        builders = {
            "engine.ops._lorax_cpu": self.build_cpu,
            "engine.ops._lorax_cuda": self.build_cuda,
        }
        Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
        try:
            builders[ext.name]()
        except (ImportError, OSError, subprocess.CalledProcessError) as error:
            self.warn(
                f"{ext.name} was not built ({error}); the engine will run on its reference ops"
            )

    def copy_extensions_to_source(self) -> None:
        """Of an install in place. What was not built now is not left there from before."""
        super().copy_extensions_to_source()
        packages = self.get_finalized_command("build_py")
        for ext in self.extensions:
            here, built = map(Path, self._get_inplace_equivalent(packages, ext))
            if not built.exists():
                here.unlink(missing_ok=True)

    def build_cpu(self) -> None:
        """Compiles each kernel once per instruction set and the bindings once, then links."""
        import torch

        root = Path(torch.__file__).parent
        compiler = shlex.split(os.environ.get("CXX", "c++"))
        jobs = [
            Job(source, name, [*compiler, *CPU_FLAGS, *flags])
            for source, name, flags in self.cpu_jobs(root / "include")
        ]
        files = self.compile(CPU_SOURCES, jobs)
        link = [*compiler, "-shared", *files, f"-L{root / 'lib'}", "-ltorch_cpu"]
        if sys.platform == "linux":
            link += ["-Wl,-z,defs", "-Wl,--as-needed", "-Wl,-s"]
        self.link("engine.ops._lorax_cpu", link)

    def build_cuda(self) -> None:
        """Compiles each kernel for the wanted GPUs and the bindings once, then links with a static CUDA runtime.

        Needs no GPU and no CUDA build of torch, but without either builds only what LORAX_CUDA_ARCHS asks for.
        """
        import torch

        given = os.environ.get("LORAX_CUDA_ARCHS")
        if not given and torch.version.cuda is None:
            return
        archs = given.split(";") if given else CUDA_ARCHS
        if not given and torch.cuda.is_available():
            major, minor = torch.cuda.get_device_capability()
            archs = (f"{major}{minor}",)
        archs = [EXACT.get(arch, arch) for arch in archs]
        root = Path(torch.__file__).parent
        nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
        headers = cuda_headers(nvcc)
        flags = [*CUDA_FLAGS, *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs)]
        bind = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", "-DUSE_CUDA", "-O2"]
        bind += [f'-DLORAX_CUDA_ARCHS="{";".join(archs)}"']
        bind += [f"-isystem{root / 'include'}", f"-isystem{headers}"]
        compiler = [*shlex.split(os.environ.get("CXX", "c++")), *CPU_FLAGS]
        jobs = [Job(p, p.stem, [nvcc, *flags]) for p in sorted(CUDA_SOURCES.glob("*.cu"))]
        jobs += [
            Job(p, f"{p.stem}-host", [*compiler, *bind]) for p in sorted(CUDA_SOURCES.glob("*.cpp"))
        ]
        files = self.compile(CUDA_SOURCES, jobs)
        link = [nvcc, "-shared", "-cudart=static", *files, f"-L{root / 'lib'}", "-ltorch_cpu"]
        self.link("engine.ops._lorax_cuda", link)

    def compile(self, sources: Path, jobs: list[Job]) -> list[str]:
        """Object files of the jobs, side by side; anew where a source, a header, the command or the compiler is new."""
        headers = [path for folder in (COMMON_SOURCES, sources) for path in folder.glob("*.*h")]
        headers.append(Path(__file__))
        newest = max(path.stat().st_mtime for path in headers)
        objects = Path(self.build_temp) / sources.name
        objects.mkdir(parents=True, exist_ok=True)
        versions = {compiler: version_of(compiler) for compiler in {job.command[0] for job in jobs}}

        def compile_one(job: Job) -> str:
            output, note = objects / f"{job.name}.o", objects / f"{job.name}.command"
            command = [*job.command, "-c", str(job.source), "-o", str(output)]
            made_by = f"{shlex.join(command)}\n{versions[command[0]]}"
            current = (
                output.exists()
                and output.stat().st_mtime > max(newest, job.source.stat().st_mtime)
                and note.exists()
                and note.read_text() == made_by
            )
            if not current:
                note.unlink(missing_ok=True)
                subprocess.run(command, check=True)
                note.write_text(made_by)
            return str(output)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(compile_one, jobs))

    def link(self, name: str, command: list[str]) -> None:
        """Puts the library in its place at once: a process that runs the old one keeps it."""
        target = Path(self.get_ext_fullpath(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(self.build_temp) / target.name
        subprocess.run([*command, "-o", str(fresh)], check=True)
        shutil.copy(fresh, f"{target}.new")
        os.replace(f"{target}.new", target)

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
    names = ["engine.ops._lorax_cpu"]
    if sys.platform == "linux":
        names.append("engine.ops._lorax_cuda")
    return [Extension(name, sources=[], optional=True) for name in names]


setup(
    ext_modules=extensions(), cmdclass={"build_ext": BuildExtensions, "bdist_wheel": AnyPythonWheel}
)

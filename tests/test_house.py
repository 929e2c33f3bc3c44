"""Rules of the house: who may import whom, what is imported when, how long files and functions may be."""

from __future__ import annotations

import ast
import resource
import subprocess
import sys
from collections.abc import Container, Iterator
from pathlib import Path

import pytest

from engine.errors import error_classes

ROOT = Path(__file__).resolve().parent.parent

# docs/architecture.md, "Who may import whom": a module imports its own package and those of lower levels; siblings
# never import each other, but at the bottom.
LEVELS: tuple[tuple[str, ...], ...] = (
    (
        "engine.bench_options",
        "engine.checkpoint",
        "engine.config",
        "engine.errors",
        "engine.files",
        "engine.grammar",
        "engine.kinds",
        "engine.logs",
        "engine.messages",
        "engine.metrics",
        "engine.names",
        "engine.platform",
        "engine.safetensors",
        "engine.sandbox",
        "engine.settings",
    ),
    ("engine.ops",),
    ("engine.layers",),
    ("engine.models",),
    ("engine.scheduler", "engine.runner", "engine.lora"),
    ("engine.adapters",),
    ("engine.build", "engine.backend", "engine.step_counts", "engine.structured"),
    ("engine.engine",),
    ("engine.server", "engine.process", "engine.bench"),
    ("lorax_cli",),
)
LEVEL_OF = {package: level for level, packages in enumerate(LEVELS) for package in packages}


TORCH_FREE = (
    "lorax_cli.app",
    "engine.backend",
    "engine.bench.simulate",
    "engine.bench_options",
    "engine.checkpoint",
    "engine.config",
    "engine.errors",
    "engine.files",
    "engine.kinds",
    "engine.messages",
    "engine.safetensors",
    "engine.sandbox",
    "engine.scheduler",
    "engine.settings",
    "engine.adapters",
)
# What an adapter's files become is torch's business.
WITH_TORCH = tuple(
    f"engine.adapters.{name}" for name in ("exchange", "loader", "refusals", "static")
)

# What is longer than the rule says, and why.
LONG_FILES = {
    "tools/demo/base_text.py": "text that the demo's base model is trained on",
    "tools/demo/task_math.py": "text that a demo adapter is trained on",
}
LONG_FUNCTIONS = {
    "clients/python/lorax/calls.py:generate": "every argument of lorax-client, by name",
    "clients/python/lorax/calls.py:generate_stream": "every argument of lorax-client, by name",
}
CLIENT = "clients/python/lorax"  # a package of its own, installed without the rest
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


def sources(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package_of(module: str) -> str | None:
    """The package of `LEVELS` that a module belongs to."""
    parts = module.split(".")
    return next(
        (name for size in (2, 1) if (name := ".".join(parts[:size])) in LEVEL_OF),
        None,
    )


def imports_of(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, module) of every import of ours, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.lineno, node.module
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def violations(module: str, tree: ast.Module) -> Iterator[str]:
    own = package_of(module)
    for line, imported in imports_of(tree):
        other = package_of(imported)
        if own is None or other is None or other == own:
            continue
        if LEVEL_OF[other] > LEVEL_OF[own] or LEVEL_OF[other] == LEVEL_OF[own] > 0:
            yield f"{module}:{line} imports {imported}"


@pytest.mark.parametrize("path", list(sources("engine", "lorax_cli")), ids=module_of)
def test_import_rule(path: Path) -> None:
    assert not list(violations(module_of(path), ast.parse(path.read_text())))


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("engine.scheduler.blocks", "from engine.adapters.ref import AdapterRef"),
        ("engine.lora.formats", "import engine.runner.placement"),
        ("engine.config", "import engine.ops"),
        ("engine.ops.schemas", "from engine import layers"),
        ("engine.engine", "def f():\n    import engine.process"),
        ("engine.server.app", "from engine.process import start"),
        ("engine.backend", "from engine.server.front import Front"),
        ("engine.runner.rows", "from lorax_cli import app"),
    ],
)
def test_import_rule_sees_violations(module: str, line: str) -> None:
    assert list(violations(module, ast.parse(line)))


def test_every_package_has_a_level() -> None:
    unknown = {
        module_of(path) for path in sources("engine", "lorax_cli") if module_of(path) != "engine"
    }
    assert not sorted(module for module in unknown if package_of(module) is None)


def test_the_client_stands_alone() -> None:
    """It imports its dependencies and the standard library, and nothing here imports it."""
    allowed = {"lorax", "httpx", "pydantic", "pydantic_core", *sys.stdlib_module_names}
    for path in sources(CLIENT):
        found = {name.split(".")[0] for _, name in imports_of(ast.parse(path.read_text()))}
        assert found <= allowed, path.name
    for path in sources("engine", "lorax_cli"):
        found = {name.split(".")[0] for _, name in imports_of(ast.parse(path.read_text()))}
        assert "lorax" not in found, path.name


def checked_for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def runtime_imports(tree: ast.Module, modules: Container[str]) -> set[str]:
    """Which of `modules` a module imports when it runs, inside functions too."""
    skipped: set[int] = set()
    found: set[str] = set()
    for node in ast.walk(tree):
        if checked_for_types_only(node):
            skipped |= {id(inner) for inner in ast.walk(node)}
        elif id(node) in skipped:
            continue
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:  # `from package import module` needs the module
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in modules else node.module)
    return {name for name in found if name in modules}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one circle of imports; empty: there is none."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        if module in done:
            return []
        for other in sorted(graph.get(module, ())):
            if found := visit(other, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(graph) if (found := visit(module, []))), [])


def test_no_import_circle() -> None:
    trees = {
        module_of(path): ast.parse(path.read_text())
        for path in sources("engine", "lorax_cli", "tools")
    }
    graph = {module: runtime_imports(tree, trees) - {module} for module, tree in trees.items()}
    assert circle(graph) == []
    assert sum(map(len, graph.values())) > 300, "imports were not found"
    graph["engine.messages"].add("engine.engine")
    assert {"engine.messages", "engine.engine"} <= set(circle(graph))
    text = "def f():\n    import engine.engine\nif TYPE_CHECKING:\n    import engine.build"
    assert runtime_imports(ast.parse(text), trees) == {"engine.engine"}


def run_python(program: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, text=True, check=True, capture_output=True
    ).stdout


def test_torch_free_packages_do_not_import_torch() -> None:
    """Every module of them in one process, so that the order of imports cannot hide one."""
    modules = [
        module_of(path)
        for path in sources("engine", "lorax_cli")
        if module_of(path).startswith(tuple(name.removesuffix(".app") for name in TORCH_FREE))
        and module_of(path) not in WITH_TORCH
    ]
    program = f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
    program += "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    assert run_python(program).strip() == "[]"


def test_help_does_not_import_the_benchmark() -> None:
    program = "import sys; import lorax_cli.app; print('engine.bench' in sys.modules)"
    assert run_python(program).strip() == "False"


HELP = "import sys; sys.argv = ['lorax', '--help']; from lorax_cli.app import main; main()"
LIBRARIES = "import msgspec, rich.markdown, typer.rich_utils, yaml; print('Usage')"


def test_help_is_quick() -> None:
    """The processor's time is at most 2.5 times that of importing the libraries that draw it."""

    def busy(program: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert "Usage" in run_python(program)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    times = [(busy(HELP), busy(LIBRARIES)) for _ in range(4)]
    assert min(one for one, _ in times) <= 2.5 * min(other for _, other in times)


@pytest.mark.parametrize(
    "path",
    list(sources("engine", "lorax_cli", "tools", CLIENT)),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_size(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    text = path.read_text()
    if name in LONG_FILES:
        return
    assert len(text.splitlines()) <= MAX_FILE_LINES, "split it, or name the reason in LONG_FILES"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if f"{name}:{node.name}" not in LONG_FUNCTIONS:
                assert length <= MAX_FUNCTION_LINES, f"{node.name}, line {node.lineno}"


def test_size_exceptions_are_needed() -> None:
    for name in LONG_FILES:
        assert len((ROOT / name).read_text().splitlines()) > MAX_FILE_LINES, f"{name} is short now"
    for name in LONG_FUNCTIONS:
        path, _, function = name.partition(":")
        nodes = ast.walk(ast.parse((ROOT / path).read_text()))
        (node,) = [one for one in nodes if getattr(one, "name", None) == function]
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        assert (node.end_lineno or 0) - node.lineno + 1 > MAX_FUNCTION_LINES, f"{name} is short now"


FORBIDDEN = ("TO" + "DO", "FIX" + "ME", "X" * 3 + ":", "break" + "point(")


def test_no_forbidden_words() -> None:
    """Work that is not done belongs in the tracker."""
    found = []
    for path in sources("engine", "lorax_cli", "tools", "tests", "clients"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            found += [
                f"{path.relative_to(ROOT)}:{number}: {word}" for word in FORBIDDEN if word in line
            ]
    assert not found


def without_remedy(tree: ast.AST) -> Iterator[int]:
    """Lines that make an error of an adapter, or Overloaded, without the argument `hint`."""
    kinds = {name for name in error_classes() if name.startswith("Adapter")} | {"Overloaded"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in kinds:
            given = {keyword.arg for keyword in node.keywords}
            if "hint" not in given:
                yield node.lineno


@pytest.mark.parametrize("path", list(sources("engine", "lorax_cli")), ids=module_of)
def test_errors_of_adapters_have_a_remedy(path: Path) -> None:
    assert not list(without_remedy(ast.parse(path.read_text())))

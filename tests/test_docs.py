"""The generated pages and completions are those that the code of today makes."""

import ast
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from engine.settings import settings
from tools import terminal_pictures
from tools.docs import ROOT, generated

FILES = generated("pages", "completions")
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "clients/python/README.md"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_generated_file_is_fresh(path: Path) -> None:
    assert path.read_text() == FILES[path](), "run: make docs completions"


def test_every_setting_has_a_row() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    for setting in settings():
        assert f"| `{setting.flag}` | `{setting.environment[0]}`" in page


def test_architecture_is_short() -> None:
    assert len((ROOT / "docs" / "architecture.md").read_text().splitlines()) < 80


def test_architecture_names_what_exists() -> None:
    """Every file and function in its tables, and at most 25 nouns."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    named = re.findall(r"`(engine/[\w/]+\.py)` `([\w.]+)`", page)
    assert len(named) == 12
    for path, name in named:
        body: list[ast.stmt] = ast.parse((ROOT / path).read_text()).body
        for part in name.split("."):
            found = [node for node in body if getattr(node, "name", None) == part]
            assert found, f"{path} has no {name}"
            body = found[0].body  # type: ignore[attr-defined]
        assert isinstance(found[0], ast.FunctionDef | ast.AsyncFunctionDef), f"{path}: {name}"
    for table in ("make_sources", "METHODS", "FAMILIES", "KINDS", "FORMATS"):
        assert f"`{table}`" in page
        sources = "".join(path.read_text() for path in (ROOT / "engine").rglob("*.py"))
        assert re.search(rf"^(def )?{table}\b", sources, re.MULTILINE), f"there is no {table}"
    words = re.findall(r"\*\*(\w+)\*\* ", page.split("## Words")[1].split("##")[0])
    assert 20 <= len(words) == len(set(words)) <= 25


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Links between our own files; addresses elsewhere are not looked at."""
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if "://" not in target:
            name, _, anchor = target.partition("#")
            path = (page.parent / name).resolve() if name else page
            assert path.exists(), f"{page.name}: {target}"
            if anchor:
                assert anchor in headings(path), f"{page.name}: {target}"


def test_pictures_are_shown_and_need_no_network() -> None:
    """`python -m tools.terminal_pictures` draws them anew."""
    page = (ROOT / "README.md").read_text()
    shown = [ROOT / name for name in re.findall(r"\]\((docs/pictures/[^)]+)\)", page)]
    assert sorted(shown) == sorted(terminal_pictures.FOLDER.iterdir())
    assert [path.stem for path in shown] == list(terminal_pictures.PICTURES)
    for path in shown:
        text = path.read_text()
        root = ElementTree.fromstring(text)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert text.count("://") == 1 and "@font-face" not in text, "the name of SVG itself"
        words = "".join(root.itertext()).replace("\xa0", " ")
        assert f"$ lorax {' '.join(terminal_pictures.PICTURES[path.stem])}" in words


def headings(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    kept = (re.sub(r"[^\w\- ]", "", title.lower()) for title in titles)
    return {title.replace(" ", "-") for title in kept}

"""The documentation says what the code does: pages made from code are in date, examples run, links lead somewhere."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

import api_pages
import make_benchmarks
import make_catalogue
import make_plots
import make_reference
import nextoken
from nextoken.app import cli
from nextoken.model import bundled_names

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(language: str, page: Path) -> list[str]:
    """The code blocks of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.M | re.S)


# --- pages made from code ------------------------------------------------------------------------------------------


def test_the_catalogue_of_methods_is_in_date() -> None:
    made = (DOCS / "methods.md").read_text(encoding="utf-8")
    assert made == make_catalogue.catalogue(), "run: python tools/make_catalogue.py"
    assert all(f"| {entry.name} |" in made for entry in nextoken.all_methods())


@pytest.mark.parametrize("name", ["cli.md", "columns.md"])
def test_the_reference_is_in_date(name: str) -> None:
    assert (DOCS / name).read_text(encoding="utf-8") == make_reference.pages()[name], (
        "run: python tools/make_reference.py"
    )


def test_the_reference_names_every_command_and_option() -> None:
    page = make_reference.pages()["cli.md"]
    for name, command in commands().items():
        assert f"## nextoken {name}\n" in page
        for parameter in command.params:
            if parameter.param_type_name == "option" and parameter.name != "help":
                assert all(re.search(rf"`{option}[ `]", page) for option in parameter.opts)


def test_the_benchmarks_are_those_measured() -> None:
    made = make_benchmarks.benchmarks(ROOT / "bench" / "results")
    assert (DOCS / "benchmarks.md").read_text(encoding="utf-8") == made, "run: python tools/make_benchmarks.py"


def test_the_plots_are_of_what_was_measured() -> None:
    figures = json.loads((ROOT / "bench" / "results" / "watermark.json").read_text(encoding="utf-8"))["figures"]
    drawn = (DOCS / "images" / "watermark-power.svg").read_text(encoding="utf-8")
    assert drawn == make_plots.watermark_power(figures), "run: python tools/make_plots.py"


def test_figures_of_every_shape_become_tables() -> None:
    records = {"a": {"time_s": 1.5, "memory": {"peak": 2_000_000}}, "b": {"time_s": 0.00012345}}
    assert make_benchmarks.tables(records) == [
        "|  | time s | memory: peak |",
        "| --- | ---: | ---: |",
        "| a | 1.5 | 2,000,000 |",
        "| b | 0.0001234 |  |",
    ]
    mixed = {"speedup": 3.25, "rows": [{"N": 512, "route": "ours | theirs"}]}
    assert make_benchmarks.tables(mixed) == [
        "|  | value |",
        "| --- | ---: |",
        "| speedup | 3.25 |",
        "",
        "**rows**",
        "",
        "| N | route |",
        "| ---: | --- |",
        "| 512 | ours \\| theirs |",
    ]


# --- examples --------------------------------------------------------------------------------------------------------


def commands() -> dict[str, Any]:
    return dict(get_command(cli.app).commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks("python", page)], ids=named)
def test_python_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the page, each after those before it, as a reader would type them."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "example"}
    for code in blocks("python", page):
        if "tiny" not in bundled_names():
            code = code.replace('"tiny"', '"nano"')
        exec(compile(code, named(page), "exec"), names)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks("sh", page)], ids=named)
def test_command_lines_are_ones_the_commands_take(page: Path) -> None:
    for line in "".join(blocks("sh", page)).splitlines():
        for is_operator, part in groupby(shlex.split(line, comments=True), key=lambda word: word in {"&&", "|", "&"}):
            words = list(part)
            if not is_operator and words[0].rpartition("/")[2] == "nextoken" and not words[1].startswith("-"):
                commands()[words[1]].make_context(words[1], words[2:])


def test_commands_in_the_table_of_readme_exist() -> None:
    rows = re.findall(r"^\| `nextoken (\w+)", (ROOT / "README.md").read_text(), flags=re.M)
    assert set(rows) == commands().keys()


def test_ci_runs_the_two_commands_of_readme() -> None:
    """`.ci/run` takes them from README by how they begin; each must be there once."""
    begins = re.search(r"^for beginning in (.+); do$", (ROOT / ".ci" / "run").read_text(), flags=re.M)
    assert begins is not None
    readme = (ROOT / "README.md").read_text()
    for beginning in shlex.split(begins[1].replace("\\[", "[").replace("\\]", "]")):
        (line,) = (line for line in readme.splitlines() if line.startswith(beginning))
        assert f"```sh\n{line}\n```" in readme
    assert "-m pytest" in line


# --- links and facts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{named(page)} links to {target}"


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    listed = set(re.findall(r"[\w/]+\.md", text))
    assert listed == {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")} | api_pages.pages().keys()


def test_versions_agree() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == nextoken.__version__
    assert nextoken.__version__ in (ROOT / "CHANGELOG.md").read_text()


def test_every_extra_is_explained() -> None:
    page = (DOCS / "install.md").read_text()
    assert set(re.findall(r"nextoken\[(\w+)\]", page)) == PROJECT["optional-dependencies"].keys()


def test_the_module_is_the_command() -> None:
    program = [sys.executable, "-m", "nextoken", "--version"]
    finished = subprocess.run(program, capture_output=True, text=True, check=True)
    assert finished.stdout == f"nextoken {nextoken.__version__}\n"

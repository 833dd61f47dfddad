"""A hook of mkdocs: one page per room with everything public in it, made while the site is built.

So a new module is in the reference without a line written for it. A room with public modules shows each of them; one
whose modules are all private shows what it re-exports.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "nextoken"
FACE = """# nextoken

The names of the public face are imported from their rooms when they are first used.

::: nextoken
    options:
      members: []

::: nextoken.errors
"""


def pages() -> dict[str, str]:
    """The Markdown of each page, by its place in docs/."""
    made = {"api/nextoken.md": FACE}
    for path in sorted(PACKAGE.iterdir()):
        if path.name == "app" or path.name.startswith("_") or path.stem == "errors":
            continue
        if (path / "__init__.py").is_file():
            modules = [module.stem for module in sorted(path.glob("*.py")) if not module.stem.startswith("_")]
            shown = [f"nextoken.{path.name}.{module}" for module in modules] or [f"nextoken.{path.name}"]
        elif path.suffix == ".py":
            shown = [f"nextoken.{path.stem}"]
        else:
            continue
        made[f"api/{path.stem}.md"] = "\n".join([f"# nextoken.{path.stem}", "", *(f"::: {name}" for name in shown), ""])
    return made


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages to those read from docs/."""
    from mkdocs.structure.files import File  # here, so that a test can ask for pages() without mkdocs

    for place, text in pages().items():
        files.append(File.generated(config, place, content=text))
    return files

"""Hook of mkdocs: a page for every method, made of its card, and no links that leave the documentation."""

from __future__ import annotations

import re
from typing import Any

from mkdocs.structure.files import File, Files

from visiontok import catalogue, recipes

_OUTSIDE = re.compile(r"\[([^\]]+)\]\((\.\./[^)]+)\)")


def on_config(config: Any) -> Any:
    for entry in config.nav:
        if "Methods" in entry:
            pages = [{card.name: f"methods/{card.name}.md"} for card in recipes.methods()]
            entry["Methods"] = [{"All methods": "methods.md"}, *pages]
    return config


def on_files(files: Files, config: Any) -> Files:
    for card in recipes.methods():
        files.append(File.generated(config, f"methods/{card.name}.md", content=catalogue.page(card)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Files of the repository have no address here: their path is named."""
    if page.file.src_path == "methods.md":
        links = (f"* [{card.name}](methods/{card.name}.md): {card.title}" for card in recipes.methods())
        markdown += "\n\n" + "\n".join(links) + "\n"
    return _OUTSIDE.sub(_named, markdown)


def _named(link: re.Match[str]) -> str:
    path = link[2].removeprefix("../").split("#")[0]
    return link[1] if link[1].endswith(path.rsplit("/", 1)[-1]) else f"{link[1]} (`{path}`)"

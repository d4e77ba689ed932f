"""Templates, assets and data files of the pages."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

HERE = Path(__file__).parent
TEMPLATES, ASSETS = HERE / "templates", HERE / "assets"


def package_version(name: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def page(template: str, **values: Any) -> str:
    """Return a page as HTML. All values are escaped, because prompts and names may contain anything."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals["asset"] = lambda name: Markup((ASSETS / name).read_text(encoding="utf-8"))
    return environment.get_template(template).render(**values)


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")


def write_data(path: Path, function: str, value: Any) -> None:
    """Write a script that calls a function with the value. Pages opened from disk may run scripts, but not read other files."""
    write_text(path, f"{function}({json.dumps(value, ensure_ascii=False, separators=(',', ':'))});\n")

"""Which repository files a stage really is: the files its command imports, with a hash of each.

Rules carry the result as a parameter, so editing a file re-runs the stages that import it and nothing else, and
Snakemake's reason names the file. Comments and formatting do not count: the hash is of the syntax tree.
"""

from __future__ import annotations

import ast
import hashlib
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@cache
def _parsed(path: Path) -> tuple[str, tuple[str, ...]]:
    """The hash of a file's syntax tree (docstrings left in) and the modules it imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:8], tuple(names)


def _file(module: str) -> Path | None:
    base = ROOT.joinpath(*module.split("."))
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path
    return None


def code(*modules: str) -> list[str]:
    """`["stages/common/seeds.py@cabd520c", ...]` for the modules and everything of this repository they import.

    Families are chosen at run time (`stages.families.open_family`); name the family's module beside the stage's.
    Raises FileNotFoundError on a module that is not in the repository.
    """
    waiting, found = list(modules), {}
    for module in modules:
        if _file(module) is None:
            raise FileNotFoundError(f"no module {module} under {ROOT}")
    while waiting:
        path = _file(waiting.pop())
        if path is None or path in found:
            continue
        found[path], imported = _parsed(path)
        waiting += [name for name in imported if name.split(".")[0] in ("stages", "speed")]
    return sorted(f"{path.relative_to(ROOT)}@{digest}" for path, digest in found.items())

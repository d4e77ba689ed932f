"""Generate the JSON schema and docs/configuration.md from the configuration's pydantic models.

python -m stages.tools.schema
"""

from __future__ import annotations

import argparse
import inspect
import json
import types
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from stages.common.config import Arm, AuditedModel, Benchmark, Config
from stages.common.files import whole_file
from stages.common.settings import Section
from stages.families import FAMILIES, describe
from stages.judges import JUDGES, judge_kind
from stages.suites import SUITES, open_suite
from stages.understanding import UNDERSTANDING, understanding_kind

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = ROOT / "workflow" / "schemas" / "config.schema.json"
PAGE = ROOT / "docs" / "configuration.md"

HEAD = """\
# The configuration

This page is generated from the configuration's models by `python -m stages.tools.schema`.

A configuration is a YAML file. `snakemake --configfile A.yaml B.yaml` lays B over A key by key, so a file of your own only
needs what differs from a preset:

    snakemake --cores 8 --configfile configs/janus-pro-7b.yaml mine.yaml

Lists are replaced as a whole, mappings are merged. Null removes a preset's benchmark, judge, scorer, understanding benchmark,
arm, baseline or audited model. Where a preset's prompts have keys that your `source` does not know, set these to null as well:
for training prompts of your own, `folder`, `split` and `exclude`. Without `--configfile`, [config.yaml](../config.yaml) is
used. A key that is not known is an error that names the nearest known key. The merged configuration is written to
`results/<run>/run_config.yaml`.
"""


def json_schema() -> str:
    """Return the JSON schema of the configuration."""
    return json.dumps(Config.model_json_schema(), indent=2) + "\n"


def type_name(annotation: Any) -> str:
    """Return a field's type in words."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return type_name(arguments[0])
    if origin is typing.Literal:
        return " or ".join(f"`{argument}`" for argument in arguments)
    if origin in (typing.Union, types.UnionType):
        names = dict.fromkeys(type_name(argument) for argument in arguments if argument is not type(None))
        return " or ".join(names) + (" or empty" if type(None) in arguments else "")
    if origin is list:
        return f"list of {type_name(arguments[0])}"
    if origin is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return {str: "text", int: "whole number", float: "number", bool: "true or false"}.get(annotation, "any")


def default(field: Any) -> str:
    """Return a field's default as in YAML, or an empty text for a section."""
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, BaseModel) or value in ({}, []):
        return ""
    if value is None:
        return "empty"
    text = value if isinstance(value, str) else json.dumps(value)
    return f"`{text}`" if text else ""


def table(section: type[BaseModel], without: tuple[str, ...] = ()) -> str:
    """Return the keys of a section as a Markdown table."""
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in section.model_fields.items():
        if name not in without:
            meaning = (field.description or "").replace("|", "\\|")
            lines.append(f"| `{name}` | {type_name(field.annotation)} | {default(field)} | {meaning} |")
    return "\n".join(lines)


def page() -> str:
    """Return docs/configuration.md."""
    parts = [HEAD, "## The whole\n", table(Config)]
    for name, field in Config.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            parts += [f"\n## {name}\n", f"{inspect.getdoc(kind)}\n", table(kind)]
        if name == "audit":
            parts.append(f"\n### audit.models.NAME\n\n{inspect.getdoc(AuditedModel)}\n\n{table(AuditedModel)}")
        if name == "prompts":
            parts += [
                "\n## prompts\n",
                "The training prompts, and in the same form the prompts of each benchmark. `source` names a suite, and each "
                "suite has its own keys.",
            ]
            parts += [f"\n### source: {suite}\n\n{table(open_suite(suite).settings, ('source',))}" for suite in SUITES]
        if name == "benchmarks":
            parts += [f"\n## benchmarks\n\n### benchmarks.NAME\n\n{inspect.getdoc(Benchmark)}\n", table(Benchmark)]
        if name == "judges":
            parts += [
                "\n## judges\n",
                "External judges by name. `kind` names the kind of judge, and each kind has its own keys. A kind whose keys "
                "all have defaults can be used as a judge without an entry here.",
            ]
            for judge in JUDGES:
                settings = judge_kind(judge).settings
                own = [key for key in settings.model_fields if key != "kind"]
                parts.append(f"\n### kind: {judge}\n\n{table(settings, ('kind',)) if own else 'It has no keys.'}")
        if name == "understanding":
            parts += [
                "\n## understanding\n",
                "Understanding benchmarks by name. `kind` names the kind of benchmark, and each kind has its own keys.",
            ]
            parts += [f"\n### kind: {kind}\n\n{table(understanding_kind(kind).settings, ('kind',))}" for kind in UNDERSTANDING]
        if name == "arms":
            parts += [f"\n## arms\n\n### arms.NAME\n\n{inspect.getdoc(Arm)}\n", table(Arm)]
        if name == "generate":
            for family in FAMILIES:
                parts.append(f"\n### generate.sampling of {family}\n\n{table(describe(family).sampling)}")
    return "\n".join(parts) + "\n"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for path, text in ((SCHEMA, json_schema()), (PAGE, page())):
        with whole_file(path) as temporary:
            temporary.write_text(text)
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()

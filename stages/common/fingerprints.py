"""Fingerprints of the code that can change what a stage writes: one hash for each repository file that the stage reaches.

Rules carry the hashes as a parameter, so an edit re-runs the stages whose results it can change, and Snakemake names the file
as the reason. The files are parsed, never imported. Each definition is considered separately:

- The block under `if __name__ == "__main__"` is reached, and so is every function, class, constant and import that reached
  code names. `manifests.read` reaches only that function. A module that is used as a value reaches all its definitions, and
  so does a string such as "stages.x"; a string such as "stages.x:Name" reaches only that definition.
- Importing a module runs it and the packages that contain it. Top-level statements that do more than define something
  therefore always count, and so do definitions with a decorator that may register them somewhere.
- A method or constant of a reached class, or a dataclass field with a default, counts when reached code contains its name as
  an attribute, a keyword or a string. Special methods and other fields always count. If the class has a base class from
  outside the repository, all its members count, because that base class may call them.
- Fields and validators of pydantic classes never count, because the values that a stage reads are parameters of its rule.
- An entry of a table in REGISTRIES counts when its key occurs as a string in reached code. An entry that is an import path
  ("stages.x:Name") is chosen by the configuration: it counts when `mentioned` names it, as in "FAMILIES[janus]".
- Prose (see stages.common.syntax) and the modules in NEVER never count.

If there is doubt, code counts. Changes to the following are not detected; run Snakemake with --forcerun after such a change:

- code that is found by a computed name (`getattr(x, "p_" + name)`) or by iterating over a registry
- attributes that other code replaces
- classes that a base class or a metaclass registers
- annotations and docstrings that code reads
- default values of settings that code does not take from the configuration
- side effects of evaluating the value of an assignment whose name is never used
"""

from __future__ import annotations

import ast
import hashlib
import symtable
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from stages.common import syntax
from stages.common.syntax import Dotted, Module, Reader, Unit

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("stages", "speed")
REGISTRIES = {"FAMILIES", "JUDGES", "SCHEMAS", "SUITES", "UNDERSTANDING"}  # of these, a run uses only the entries that it names
SETTINGS = ("pydantic.", "stages.common.settings.", "stages.common.config.")  # where base classes of settings come from
# The configuration supplies settings, and rules pass those as parameters. The fingerprints themselves change no result.
NEVER = {__name__, "stages.common.syntax", "stages.common.config", "stages.common.settings"}


@cache
def _module(name: str) -> Module | None:
    """Return the module of that name, or None if this repository has no such module or the module never counts."""
    base = ROOT.joinpath(*name.split("."))
    paths = (base.with_suffix(".py"), base / "__init__.py") if name.split(".")[0] in PACKAGES and name not in NEVER else ()
    return next((Module(name, path) for path in paths if path.is_file()), None)


def _innermost(path: Dotted) -> tuple[Module | None, Dotted]:
    """Return the module named by the longest possible beginning of a dotted path, and the rest of the path."""
    for end in range(len(path), 0, -1):
        if module := _module(".".join(path[:end])):
            return module, path[end:]
    return None, path


def _follow(path: Dotted) -> list[Unit]:
    """Return the units that an absolute dotted path refers to; the list is empty for a path outside this repository."""
    module, rest = _innermost(path)
    if module is None:
        return []
    return [module.whole] if rest in ((), ("*",)) else [module.start, *_lookup(module, rest)]


def _lookup(module: Module, path: Dotted) -> list[Unit]:
    """Return the units that a dotted name refers to when a module uses it. Imports are followed."""
    units, itself = module.units.get(path[0], []), (*module.name.split("."), path[0])
    origins = [unit.origin for unit in units if unit.origin not in ((), itself)]
    return [*units, *(found for origin in origins for found in _follow(origin + path[1:]))]


@cache
def _lineage(unit: Unit) -> tuple[list[Unit], set[str]]:
    """Return a class with all its base classes in this repository, and the dotted names of its other base classes."""
    classes: list[Unit] = [unit]
    outside: set[str] = set()
    for base in unit.node.bases:
        path = syntax.dotted(base.value if isinstance(base, ast.Subscript) else base)
        found = _lookup(unit.module, path)
        parents = [parent for parent in found if isinstance(parent.node, ast.ClassDef)]
        for more, others in map(_lineage, parents):
            classes, outside = classes + more, outside | others
        if not parents and path != ("object",):
            outside.add(".".join((*found[0].origin, *path[1:]) if found and found[0].origin else path))
    return classes, outside


def _holds_settings(unit: Unit) -> bool:
    """Return whether a class is a pydantic class."""
    return any(base.startswith(SETTINGS) for base in _lineage(unit)[1])


@cache
def _members(unit: Unit) -> dict[str, list[Unit]]:
    """Return the statements in a class body by the name that they define.

    The name is empty for fields that always count and for statements that do not define exactly one name.
    """
    members: dict[str, list[Unit]] = defaultdict(list)
    for node in unit.node.body:
        if not syntax.is_prose(node) and not (_holds_settings(unit) and syntax.is_setting(node)):
            field_only = isinstance(node, ast.AnnAssign) and not (node.value and "dataclass" in syntax.decorators(unit.node))
            names = [] if field_only else syntax.defined(node)
            name = names[0] if len(names) == 1 else ""
            members[name].append(Unit(unit.module, node, f"{unit.name}.{name}", owner=unit))
    return members


def _field_classes(module: Module, declaration: Any) -> list[Unit]:
    """Return this repository's classes that the type or default of a field names, directly or through a type alias.

    Their instances are values of the configuration, so a stage may call their methods without naming the class.
    """
    reader = Reader()
    reader.read(declaration)
    found = [unit for path in reader.names for unit in _lookup(module, path)]
    aliases = [unit for unit in found if isinstance(unit.node, (ast.Assign, ast.AnnAssign))]
    classes = [unit for unit in found if isinstance(unit.node, ast.ClassDef)]
    return classes + [unit for alias in aliases for unit in _field_classes(alias.module, alias.node.value)]


@dataclass
class Facts:
    """The content of a unit and the units that it leads to.

    digest: a hash of the unit's code; empty if it has no code of its own. mentions: see `syntax.Reader`.
    targets: the units that are reached with it. parts: the units that are reached with it once reached code mentions their key.
    registry: whether the parts are the entries of a registry.
    """

    digest: bytes = b""
    mentions: set[str] = field(default_factory=set)
    targets: list[Unit] = field(default_factory=list)
    parts: dict[str, list[Unit]] = field(default_factory=dict)
    registry: bool = False


@cache
def _facts(unit: Unit) -> Facts:
    """Return what a unit contains and where it leads."""
    module, node, reader, facts = unit.module, unit.node, Reader(), Facts(targets=[unit.module.start])
    if unit is module.start:
        facts.targets = [*module.effects]
        reader.imports = [("", path) for path in (*module.imports, tuple(module.name.split(".")[:-1]))]
    elif unit is module.whole:  # imports are parts, reached by a string or, in a package, also by an attribute
        facts.targets += [found for units in module.units.values() for found in units if not found.origin]
        quoted = repr if module.path.name != "__init__.py" else str
        facts.parts = {quoted(name): _lookup(module, (name,)) for name in module.units}
    elif unit.origin:
        reader.text = [".".join(unit.origin)]
    elif entries := syntax.entries(node, REGISTRIES):
        reader.text, facts.registry = syntax.defined(node), True
        for key, entry in entries.items():
            place = f"{reader.text[0]}[{key[1:-1]}]"
            facts.parts[place if syntax.is_place(entry, PACKAGES) else key] = [Unit(module, entry, place)]
    elif isinstance(node, ast.ClassDef) and not unit.owner:
        reader.read([node.bases, node.keywords, node.decorator_list])
        _class(unit, reader, facts)
    else:
        reader.read(node)
    facts.targets += _named(unit, reader)
    facts.mentions = reader.mentions
    facts.digest = hashlib.sha256(" ".join([unit.name, *reader.text]).encode()).digest() if reader.text else b""
    return facts


def _named(unit: Unit, reader: Reader) -> Iterator[Unit]:
    """Yield the units that a unit's code names: by its own imports, by names from the enclosing scopes, and by strings."""
    module, bindings = unit.module, defaultdict(list)
    for name, origin in reader.imports:
        bindings[name].append(origin)
        if inner := _innermost(origin)[0]:
            yield inner.start
    for path in (*reader.names, *reader.calls, ("*",)):
        for origin in bindings[path[0]]:
            yield from _follow(origin + path[1:])
    scope = module.scopes.get((getattr(unit.node, "name", ""), getattr(unit.node, "lineno", 0)))
    outer = syntax.outer_names(unit.node, scope) if isinstance(scope, symtable.Function) else None
    for path in reader.names | reader.calls:
        if outer is None or path[0] in outer:
            yield from (found for found in _lookup(module, path) if path in reader.names or not found.origin)
            yield from _members(unit.owner).get(path[0], ()) if unit.owner else ()
    for text in reader.mentions:
        if text.startswith(PACKAGES) and text.replace(":", ".").replace(".", "_").isidentifier() and text != module.name:
            yield from _follow(tuple(text.replace(":", ".").split(".")))


def _class(unit: Unit, reader: Reader, facts: Facts) -> None:
    """Record the members of a class that always count and those that count once they are mentioned.

    A pydantic class also leads to the classes of its fields.
    """
    node, (lineage, outside) = unit.node, _lineage(unit)
    settings = _holds_settings(unit)
    others = [base for base in outside if not base.startswith(SETTINGS)]
    foreign = bool(others or node.keywords or syntax.registers(node))  # code from outside may call any member
    for owner in lineage if foreign else [unit]:
        for name, members in _members(owner).items():
            used = foreign or not name or name.startswith(("__", "model_") if settings else "__")
            facts.targets += [member for member in members if used or syntax.registers(member.node)]
            facts.parts[name] = members
    if settings:  # its methods count, but the existence of the class does not
        reader.text = []
        fields = [statement for statement in node.body if isinstance(statement, ast.AnnAssign)]
        facts.targets += [found for field in fields for found in _field_classes(unit.module, [field.annotation, field.value])]


def _reached(modules: Iterable[str], mentioned: Iterable[str] | None) -> tuple[set[Unit], set[str]]:
    """Return all units that the named modules reach, and all names and strings that these units mention."""
    known = {text for name in mentioned or () for text in (name, repr(name))}
    found: set[Unit] = set()
    ahead: list[Unit] = []
    waiting: dict[str, list[Unit]] = defaultdict(list)
    for place, (name, _, wanted) in enumerate(text.partition(":") for text in modules):
        module = _module(name)
        if module is None:
            raise FileNotFoundError(f"no module {name} under {ROOT}")
        units = [module.main if module.main and not place else module.whole]
        if wanted:
            units = _lookup(module, tuple(wanted.split(".")))
        if not units:
            raise LookupError(f"no {wanted} in module {name}")
        ahead += units
    while ahead:
        unit = ahead.pop()
        if unit not in found:
            found.add(unit)
            facts = _facts(unit)
            ahead += facts.targets
            for name in facts.mentions - known:
                ahead += waiting.pop(name, ())
            known |= facts.mentions
            for name, parts in facts.parts.items():
                (ahead if name in known else waiting[name]).extend(parts)
        if not ahead and mentioned is None:  # the run may use any entry, as the caller did not name those it uses
            tables = [[*chain(*_facts(unit).parts.values())] for unit in found if _facts(unit).registry]
            ahead += [entry for entries in tables if found.isdisjoint(entries) for entry in entries]
    return found, known


def code(*modules: str, mentioned: Iterable[str] | None = None) -> list[str]:
    """Return the files that a stage reaches, each with a hash of the code reached in it.

    The form is `["stages/common/seeds.py@cabd520c", ...]`.

    modules: the first one is run as a command. All definitions of every further module are reached, or a single definition if
    it is given as `module:Name`; this also holds for a first module that is not a command. Methods count by name, as always.
    mentioned: the registry entries that the configuration chooses, such as "FAMILIES[janus]". If it is omitted, a registry
    counts with all its entries unless reached code contains one of its keys.

    Raises FileNotFoundError if a module is not in the repository, LookupError if a name is not in its module.
    """
    files = defaultdict(list)
    for unit in sorted(_reached(modules, mentioned)[0], key=lambda unit: (unit.place(), _facts(unit).digest)):
        files[unit.module.path].append(_facts(unit).digest)
    hashes = {path: hashlib.sha256(b"".join(digests)).hexdigest()[:8] for path, digests in files.items() if any(digests)}
    return sorted(f"{path.relative_to(ROOT)}@{digest}" for path, digest in hashes.items())


def read_settings(section: Any, *modules: str, mentioned: Iterable[str] | None = None) -> dict[str, Any]:
    """Return the fields of a configuration section that the code of a stage mentions by name, with their values.

    As a parameter of the stage's rule, they re-run it when a setting that it reads changes, and not when the configuration
    gains a key that the stage does not read. A field counts if reached code contains its name anywhere as an attribute, a
    keyword or a string, even if that name refers to a field of another section. Code that takes a whole section, by
    `model_dump()` or `repr`, mentions none of its fields, so the rule of such a stage must pass the whole section.
    """
    _, names = _reached(modules, mentioned)
    return {name: value for name, value in section.model_dump().items() if name in names}

"""Analysis of Python code without its prose, for stages.common.fingerprints: its content, and the names it uses and defines.

Prose is everything that cannot change a result: comments, formatting, docstrings, annotations, descriptions of settings and
of command-line arguments, messages of exceptions and assertions, and statements that only print, warn or log. Names that occur
only in prose are ignored, except for the functions that a printing statement calls, because they may do the work whose result
is printed.
"""

from __future__ import annotations

import ast
import symtable
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

IGNORED = {"annotation", "returns", "msg", "ctx", "kind", "simple", "type_comment", "type_params"}  # fields of AST nodes
DESCRIBED = {"Field", "ArgumentParser", "add_argument", "add_argument_group", "add_parser", "add_subparsers"}
DESCRIPTIONS = {"description", "epilog", "examples", "help", "metavar", "title"}  # keywords of those calls
LEVELS = ("debug", "info", "warning", "error", "exception", "critical")
TALK = {("print",), ("warnings", "warn"), *((name, level) for name in ("logger", "logging") for level in LEVELS)}
WRAPPERS = {  # decorators that only wrap a function or complete a class
    *("abstractmethod", "cache", "cached_property", "classmethod", "contextmanager", "dataclass", "enable_grad", "getter"),
    *("inference_mode", "lru_cache", "no_grad", "overload", "override", "property", "runtime_checkable", "setter"),
    *("staticmethod", "total_ordering", "wraps"),
}
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
Dotted = tuple[str, ...]  # ("a", "b") for a.b


def dotted(node: ast.AST | None) -> Dotted:
    """Return the names in an expression such as `a.b.c`. The first is empty if the expression does not begin with a name."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return (node.id if isinstance(node, ast.Name) else "", *reversed(names))


def imports(node: ast.AST) -> Iterator[tuple[str, Dotted]]:
    """Yield the names that an import statement binds, each with its path. `import a.b` gives `a`, and "" for `a.b`."""
    for alias in node.names if isinstance(node, (ast.Import, ast.ImportFrom)) else ():
        path = tuple(alias.name.split("."))
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: a relative import is not followed, write the module's whole name"
            yield alias.asname or alias.name, (*str(node.module).split("."), *path)
        elif alias.asname or len(path) == 1:
            yield alias.asname or alias.name, path
        else:
            yield from ((path[0], path[:1]), ("", path))


def defined(statement: ast.AST) -> list[str]:
    """Return the names that a statement defines; the list is empty if the statement does anything else as well."""
    if isinstance(statement, DEFINITIONS):
        return [statement.name]
    if not isinstance(statement, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
        return []
    targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
    nodes = [node for target in targets for node in ast.walk(target) if isinstance(node, ast.expr)]
    plain = all(isinstance(node, (ast.Name, ast.Tuple, ast.List, ast.Starred)) for node in nodes)
    return [node.id for node in nodes if isinstance(node, ast.Name)] if plain else []


def decorators(node: ast.AST) -> set[str]:
    """Return the last component of the name of each decorator of a definition."""
    found = getattr(node, "decorator_list", ())
    return {dotted(item.func if isinstance(item, ast.Call) else item)[-1] for item in found}


def registers(node: ast.AST) -> bool:
    """Return whether a decorator may do more with a definition than wrap it."""
    return not decorators(node) <= WRAPPERS


def is_setting(node: ast.AST) -> bool:
    """Return whether a statement in the body of a pydantic class declares a field or restricts the values of fields."""
    if isinstance(node, ast.AnnAssign):
        return not dotted(node.target)[0].startswith("_") and "ClassVar" not in ast.dump(node.annotation)
    return defined(node) == ["model_config"] or any(name.endswith("validator") for name in decorators(node))


def is_place(entry: ast.expr, packages: tuple[str, ...]) -> bool:
    """Return whether a registry entry is the import path of a definition, "package.module:Name", imported at run time."""
    text = entry.value if isinstance(entry, ast.Constant) else None
    return isinstance(text, str) and text.startswith(packages) and ":" in text


def entries(statement: ast.AST, registries: set[str]) -> dict[str, ast.expr]:
    """Return the entries of a registry by their keys in quotes; empty if the statement does not define a registry."""
    known = isinstance(statement, (ast.Assign, ast.AnnAssign)) and registries & {*defined(statement)}
    table = getattr(statement, "value", None) if known else None
    if not isinstance(table, ast.Dict) or not all(isinstance(getattr(key, "value", None), str) for key in table.keys):
        return {}
    return {ast.unparse(key): value for key, value in zip(table.keys, table.values, strict=True) if key}


def is_prose(node: ast.AST) -> bool:
    """Return whether a statement is a docstring or a block for type checkers, or only prints, warns or logs."""
    if isinstance(node, ast.If):
        return dotted(node.test)[-1] == "TYPE_CHECKING" and not node.orelse
    if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Call):
        return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    streams = [dotted(keyword.value) for keyword in node.value.keywords if keyword.arg == "file"]
    return dotted(node.value.func) in TALK and all(stream[0] == "sys" for stream in streams)


def _is_message(node: Any) -> bool:
    """Return whether an expression begins with a string literal, as one that formats, joins or concatenates strings does."""
    while inner := getattr(node, "left", getattr(node, "func", node.value if isinstance(node, ast.Attribute) else None)):
        node = inner
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


@dataclass
class Reader:
    """Traverses code once and records its content and the names in it.

    text: the content of the code; equal for pieces of code that differ only in prose.
    names: the dotted names that the code uses, including local ones. calls: the names that it calls only to print the result.
    mentions: its attributes, keywords and strings; each string occurs a second time in quotes.
    imports: the names bound by its import statements.
    """

    text: list[str] = field(default_factory=list)
    names: set[Dotted] = field(default_factory=set)
    calls: set[Dotted] = field(default_factory=set)
    mentions: set[str] = field(default_factory=set)
    imports: list[tuple[str, Dotted]] = field(default_factory=list)

    def read(self, node: Any) -> None:
        match node:
            case list():
                for item in node:
                    if not is_prose(item):
                        self.read(item)
                        self.text.append(",")
                    elif isinstance(item, ast.Expr):
                        called = [dotted(call.func) for call in ast.walk(item) if isinstance(call, ast.Call)]
                        self.calls.update(called)
                        self.mentions.update(name for path in called for name in path[1:])
                return
            case ast.Name() | ast.Attribute() if (path := dotted(node))[0]:
                self.names.add(path)
                self.mentions.update(path[1:])
                self.text.append(".".join(path))
                return
            case ast.Attribute(attr=name) | ast.keyword(arg=str(name)):
                self.mentions.add(name)
            case ast.Constant(value=str(text)):
                self.mentions.update((text, repr(text), *text.split(".")))
            case ast.MatchClass(kwd_attrs=names):
                self.mentions.update(names)
            case ast.Import() | ast.ImportFrom():
                self.imports += imports(node)
            case ast.Raise(exc=ast.Call() as call) | (ast.Call(func=ast.Attribute(value=ast.Name("sys"), attr="exit")) as call):
                call.args = [argument for argument in call.args if not _is_message(argument)]
            case ast.Call(func=ast.Name(name) | ast.Attribute(attr=name)) if name in DESCRIBED:
                node.keywords = [keyword for keyword in node.keywords if keyword.arg not in DESCRIPTIONS]
        if not isinstance(node, ast.AST):
            self.text.append(repr(node))
            return
        self.text.append(f"{type(node).__name__}(")
        for name in node._fields:
            value = getattr(node, name, None)
            if value is not None and value != [] and name not in IGNORED:
                self.text.append(f"{name}=")
                self.read(value)
        self.text.append(")")


def outer_names(function: Any, scope: symtable.SymbolTable) -> set[str]:
    """Return the names that a function takes from its module or class, in decorators and defaults or as globals in its body."""

    def of(scope: symtable.SymbolTable) -> set[str]:
        names = {symbol.get_name() for symbol in scope.get_symbols() if symbol.is_global()}
        return names.union(*map(of, scope.get_children()))

    head = Reader()
    head.read([function.decorator_list, function.args.defaults, function.args.kw_defaults])
    return of(scope) | {path[0] for path in head.names}


@dataclass(eq=False)
class Unit:
    """A piece of a module that counts as a whole or not at all.

    It is a statement, a member of a class, an entry of a registry, or an imported name. The order of named units in a file does
    not matter; the order of the others does.
    """

    module: Module
    node: Any = None
    name: str = ""
    origin: Dotted = ()  # for an imported name: the path it refers to
    owner: Unit | None = None  # for a member of a class: the class

    def place(self) -> tuple[str, int, int]:
        return self.name, getattr(self.node, "lineno", 0), getattr(self.node, "col_offset", 0)


class Module:
    """A parsed file, split into units.

    start: represents importing the module. whole: represents all its definitions. main: the block that runs only as a command.
    units: the units by the names that they define. effects: the units that count whenever the module is imported.
    scopes: the symbol tables of functions and methods, by name and line.
    """

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path = name, path
        self.start, self.whole = Unit(self), Unit(self)
        self.main: Unit | None = None
        self.units: dict[str, list[Unit]] = defaultdict(list)
        self.effects: list[Unit] = []
        self.imports: list[Dotted] = []
        source = path.read_text(encoding="utf-8")
        tables = symtable.symtable(source, str(path), "exec").get_children()
        inner = [scope for table in tables for scope in (table, *table.get_children())]
        self.scopes = {(scope.get_name(), scope.get_lineno()): scope for scope in inner}
        for statement in ast.parse(source, str(path)).body:
            self._add(statement)

    def _add(self, statement: ast.stmt) -> None:
        unit, names = Unit(self, statement), defined(statement)
        if isinstance(statement, DEFINITIONS):
            unit.name = statement.name
            self.effects += [unit] if unit.name.startswith("__") or registers(statement) else []
        elif isinstance(statement, ast.If) and "'__main__'" in ast.dump(statement.test) and not statement.orelse:
            self.main = unit
        elif is_prose(statement):
            self.effects.append(Unit(self, [statement]))  # has no content, but may call something
        elif not names:
            bindings = [binding for node in ast.walk(statement) for binding in imports(node)]
            self.imports += [origin for _, origin in bindings]
            for name, origin in bindings:
                self.units[name] += [Unit(self, statement, name, origin)] if name else []
            if not isinstance(statement, (ast.Import, ast.ImportFrom)) or bindings[0][0] == "*":
                self.effects.append(unit)
                names = [str(getattr(node, "id", getattr(node, "name", ""))) for node in ast.walk(statement)]
        for name in filter(None, names):
            self.units[name].append(unit)

"""A stage's fingerprint changes when code changes that can affect its result, and only then.

Most tests edit a small repository of their own: `stages.draw` uses most of it, `stages.sort` next to nothing, and neither is
ever run. The last ones edit a copy of this repository.
"""

import ast
import shutil
from pathlib import Path

import pytest
from pydantic import BaseModel

from stages.common import fingerprints
from stages.common.fingerprints import code, read_settings

REPOSITORY = fingerprints.ROOT

FILES = {
    "stages/__init__.py": "",
    "stages/common/__init__.py": "",
    "stages/common/settings.py": '''
"""The configuration."""

from typing import Annotated, ClassVar

import pydantic
from pydantic import BaseModel, ConfigDict, Field, computed_field, field_validator

from stages.common.helpers import check

Positive = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Ink(pydantic.BaseModel):
    name: str = "black"

    def mixed(self):
        return self.name + "ish"


Inks = list[Ink]


class Draw(Section):
    """How to draw."""

    LIMIT: ClassVar[int] = 9
    size: Positive = Field(default=4, description="how large")
    colour: str = "red"
    inks: Inks = []

    @field_validator("colour")
    @classmethod
    def _known(cls, value):
        return check(value)

    def shape(self):
        return self.size, self.LIMIT

    def spare(self):
        return 1

    @computed_field
    @property
    def area(self) -> int:
        return self.size * self.size


class Config(Section):
    draw: Draw = Draw()

    @property
    def double(self):
        return 2 * self.draw.size


def load(path):
    return Config()
''',
    "stages/common/helpers.py": """
import math as m

from stages.common.deep import dig

FACTOR = 3
SPARE = 4
LEFT, RIGHT = 1, 2
LEFT += 1


def half(x, by=2):
    return dig(x) / by * FACTOR + LEFT


def root(x):
    return m.sqrt(x)


def check(value):
    return value


def twice(x):
    return x * 2


def spare(x):
    return SPARE + x


def local(text, spare):
    return [spare + line for line in text]


class Base:
    kind = "base"

    def start(self):
        return self.kind


class Tool(Base):
    weight = 5
    idle = 6

    def __init__(self):
        self.on = True

    def use(self, size=weight):
        return size

    def rest(self):
        return None

    def by_string(self):
        return "by"

    def by_keyword(self):
        return "by"
""",
    "stages/common/deep.py": '''
"""Two modules away."""
import os

os.environ.setdefault("DEEP", "1")


def dig(x: int) -> int:
    """Deeper."""
    return x - 1


def spare(x):
    return x
''',
    "stages/common/table.py": """
from stages.common import deep

SCHEMAS = {"ink": {"a": 1}, "paper": {"b": deep.dig(2)}, "wax": {"c": 3}}
LEVELS = {"easy": 1, "hard": 2}


def schema(kind):
    return SCHEMAS[kind]


def level(tag):
    return LEVELS.get(tag)
""",
    "stages/common/frames.py": """
import framework
from collections import namedtuple
from dataclasses import dataclass


class Mixin:
    def before(self):
        return 1


class Hooks(Mixin, framework.Callback):
    def on_step(self):
        return 2


@dataclass
class Point:
    x: int
    y: int = 0

    def norm(self):
        return self.x


class Pair(namedtuple("Pair", "a b")):
    def total(self):
        return 3
""",
    "stages/common/odd.py": """
import sys

from stages.registry import register

if sys.version_info >= (3, 12):
    def batched(x):
        return x
else:
    def batched(x):
        return [x]

try:
    import fast
except ImportError:
    import slow as fast


@register
def plugin():
    return 1


def outer(x):
    def inner(y):
        return y + 1

    return inner(x)


def counted():
    global TOTAL
    TOTAL = TOTAL + 1


TOTAL = 0


def matched(x):
    match x:
        case Shape(corners=3):
            return 1


class Shape:
    @property
    def corners(self):
        return 3  # corners

    @property
    def sides(self):
        return 3  # sides
""",
    "stages/registry.py": "def register(f):\n    return f\n",
    "stages/whole.py": """
from stages.common.deep import spare as renamed

VALUE = 1


def anything():
    return 2
""",
    "stages/families/__init__.py": """
from importlib import import_module

FAMILIES = {
    "alpha": "stages.families.alpha:Alpha",
    "beta": "stages.families.beta:Beta",
}


def open_family(name):
    module, _, name = FAMILIES[name].partition(":")
    return getattr(import_module(module), name)
""",
    "stages/families/alpha.py": """
print("alpha")
STARTED = []
STARTED.append("alpha")


class Alpha:
    def generate(self):
        return paint(self)

    def learn(self):
        return teach(self)


def paint(x):
    return x


def teach(x):
    return x
""",
    "stages/families/beta.py": "class Beta:\n    def generate(self):\n        return 1\n",
    "stages/draw.py": '''
"""Draw.

python -m stages.draw
"""
from __future__ import annotations

import argparse
import json
import sys
import warnings
from typing import TYPE_CHECKING

import numpy as np

from stages.common import deep, helpers, table
from stages.common.frames import Hooks, Pair, Point
from stages.common.settings import load

if TYPE_CHECKING:
    from stages.common.helpers import spare

PRECISION = 2


def shown(x: spare) -> spare:
    """Shown."""
    y: int = x
    return y


def main() -> None:
    parser = argparse.ArgumentParser(description=f"draws {helpers.SPARE}")
    parser.add_argument("--size", type=int, help="how large", default=3)
    arguments = parser.parse_args()
    config = load("config.yaml")
    if arguments.size > 9:
        raise ValueError(f"too large by {helpers.SPARE}")
    if arguments.size == 8:
        raise SystemExit(75)
    if arguments.size == 7:
        sys.exit("seven is not drawn")
    assert config, "no configuration"
    print("drawing", helpers.SPARE, helpers.twice(2))
    warnings.warn("drawn")
    from stages.common.odd import batched, counted, matched, outer
    from stages.families import open_family
    import stages.whole as whole

    tool = helpers.Tool()
    tool.use()
    getattr(tool, "by_string")()
    tool.update(by_keyword=1)
    with open("out", "w") as file:
        print("result", file=file)
    result = [config.draw.shape(), [ink.mixed() for ink in config.draw.inks], config.double]
    values = [helpers.half(np.mean(result)), helpers.root(2), helpers.local("a", 1), round(1.5, PRECISION)]
    values += [table.schema("ink"), table.level("easy"), Hooks(), Point(1), Pair(1, 2), shown(1), tool.start()]
    values += [batched(1), counted(), matched(1), outer(1), (lambda module: module)(whole), "stages.draw"]
    open_family(arguments.family)().generate()


if __name__ == "__main__":
    main()
''',
    "stages/learn.py": """
from stages.families import open_family


def main():
    open_family("alpha")().learn()


if __name__ == "__main__":
    main()
""",
    "stages/sort.py": """
from stages.common.helpers import FACTOR
from stages.common.settings import load


def main():
    return sorted([load("x"), FACTOR])


if __name__ == "__main__":
    main()
""",
}
ALPHAS = ["FAMILIES[alpha]"]
STAGES: dict[str, list[str]] = {"draw": ALPHAS, "learn": ALPHAS, "sort": []}


def forget() -> None:
    """Clear the caches, because files have changed. Only tests change files while they run."""
    for function in ("_module", "_lineage", "_members", "_facts"):
        getattr(fingerprints, function).cache_clear()


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Write files to a small repository and return the fingerprint of each stage."""
    monkeypatch.setattr(fingerprints, "ROOT", tmp_path)
    monkeypatch.setattr(fingerprints, "NEVER", {fingerprints.__name__})  # these tests include settings

    def write(files: dict[str, str]) -> None:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        forget()

    write(FILES)
    yield write
    forget()


def prints() -> dict[str, list[str]]:
    return {stage: code(f"stages.{stage}", mentioned=mentioned) for stage, mentioned in STAGES.items()}


SETTINGS, HELPERS, DEEP, TABLE = (f"stages/common/{name}.py" for name in ("settings", "helpers", "deep", "table"))
FRAMES, ODD, FAMILIES, ALPHA = (
    "stages/common/frames.py",
    "stages/common/odd.py",
    "stages/families/__init__.py",
    "stages/families/alpha.py",
)
DRAW = "stages/draw.py"

EDITS = {
    # prose
    "docstring of a module": (DRAW, '"""Draw.', '"""Draws.', ""),
    "docstring of a function": (DRAW, '"""Shown."""', '"""Shown, more or less."""', ""),
    "docstring taken away": (DRAW, '    """Shown."""\n', "", ""),
    "comment": (DRAW, "PRECISION = 2", "PRECISION = 2  # digits", ""),
    "formatting": (
        HELPERS,
        "    return dig(x) / by * FACTOR + LEFT",
        "    return (\n        dig(x) / by * FACTOR\n        + LEFT\n    )",
        "",
    ),
    "annotation of an argument": (DEEP, "x: int", "x: float", ""),
    "annotation of a result": (DEEP, "-> int", "-> float", ""),
    "annotation of a variable": (DRAW, "y: int = x", "y: float = x", ""),
    "value of an annotated variable": (DRAW, "y: int = x", "y: int = x + 1", "draw"),
    "what an annotation names": (HELPERS, "return SPARE + x", "return SPARE - x", ""),
    "what a message names": (HELPERS, "SPARE = 4", "SPARE = 5", ""),
    "description of a setting": (SETTINGS, "how large", "how wide", ""),
    "help of an argument": (DRAW, "how large", "how wide", ""),
    "description of a command": (DRAW, "draws {", "paints {", ""),
    "default of an argument": (DRAW, "default=3", "default=4", "draw"),
    "message of an exception": (DRAW, "too large by", "larger by", ""),
    "kind of an exception": (DRAW, "raise ValueError", "raise TypeError", "draw"),
    "exit code": (DRAW, "SystemExit(75)", "SystemExit(76)", "draw"),
    "last words": (DRAW, "seven is not drawn", "not seven", ""),
    "message of an assertion": (DRAW, "no configuration", "nothing", ""),
    "assertion": (DRAW, "assert config,", "assert not config,", "draw"),
    "what is printed": (DRAW, '"drawing"', '"painting"', ""),
    "another print": (DRAW, "    assert config", "    print(1)\n    assert config", ""),
    "what is called to be printed": (HELPERS, "return x * 2", "return x * 3", "draw"),
    "a print that calls a library": (DRAW, "    assert config", "    print(json.dumps(1))\n    assert config", ""),
    "what is warned of": (DRAW, '("drawn")', '("painted")', ""),
    "what is printed into a file": (DRAW, '"result"', '"results"', "draw"),
    "import for type checkers": (DRAW, "import spare\n", "import spare, check\n", ""),
    # definitions
    "new function": (HELPERS, "def root(x)", "def more(x):\n    return dig(x)\n\n\ndef root(x)", ""),
    "new constant": (HELPERS, "SPARE = 4", "SPARE = 4\nEDITED = 1", ""),
    "function that nothing calls": (DEEP, "def spare(x):\n    return x", "def spare(x):\n    return -x", ""),
    "functions in another order": (
        HELPERS,
        "def root(x):\n    return m.sqrt(x)\n\n\ndef check(value):\n    return value",
        "def check(value):\n    return value\n\n\ndef root(x):\n    return m.sqrt(x)",
        "",
    ),
    "helper two modules away": (DEEP, "return x - 1", "return x - 2", "draw"),
    "default of a parameter": (HELPERS, "by=2", "by=3", "draw"),
    "constant of both": (HELPERS, "FACTOR = 3", "FACTOR = 4", "draw sort"),
    "constant bound with others": (HELPERS, "LEFT, RIGHT = 1, 2", "LEFT, RIGHT = 3, 2", "draw"),
    "constant added to": (HELPERS, "LEFT += 1", "LEFT += 2", "draw"),
    "constant that nothing uses": (HELPERS, "SPARE = 4", "SPARE = 5", ""),
    "constant of a command": (DRAW, "PRECISION = 2", "PRECISION = 3", "draw"),
    "decorator": (HELPERS, "def half", "@cache\ndef half", "draw"),
    "decorator that may register what it decorates": (HELPERS, "def half", "@plugin\ndef half", "draw sort"),
    "nested function": (ODD, "return y + 1", "return y + 2", "draw"),
    "global variable": (ODD, "TOTAL = 0", "TOTAL = 1", "draw"),
    "main": ("stages/sort.py", "    main()", "    main(1)", "sort"),
    # imports
    "external module under an old name": (DRAW, "import numpy as np", "import jax.numpy as np", "draw"),
    "external name that nothing uses": (DEEP, "import os", "import os\nimport json", ""),
    "other external module": (HELPERS, "import math as m", "import cmath as m", "draw"),
    "other helper under an old name": (HELPERS, "import dig", "import spare as dig", "draw"),
    "effect of an import": (DEEP, '"1")', '"2")', "draw sort"),
    "new effect": ("stages/common/__init__.py", "", "import os\n\nos.umask(0)\n", "draw sort"),
    "effect of a family's import": (ALPHA, 'append("alpha")', 'append("a")', "draw learn"),
    "print on import": (ALPHA, 'print("alpha")', 'print("a")', ""),
    "new import of a module with effects": (
        "stages/learn.py",
        "from stages",
        "from stages.common import deep\nfrom stages",
        "learn",
    ),
    "whole module": ("stages/whole.py", "return 2", "return 3", "draw"),
    "constant of a whole module": ("stages/whole.py", "VALUE = 1", "VALUE = 2", "draw"),
    "definition by version": (ODD, "return [x]", "return [x, x]", "draw"),
    "import that may fail": (ODD, "import slow as fast", "fast = None", "draw"),
    "definition that registers itself": (ODD, "def plugin():\n    return 1", "def plugin():\n    return 2", "draw"),
    # classes
    "method that is called": (HELPERS, "return size", "return size + 1", "draw"),
    "method that is not called": (HELPERS, "return None", "return 0", ""),
    "method called by a string": (
        HELPERS,
        'def by_string(self):\n        return "by"',
        "def by_string(self):\n        return 2",
        "draw",
    ),
    "method named by a keyword": (
        HELPERS,
        'def by_keyword(self):\n        return "by"',
        "def by_keyword(self):\n        return 2",
        "draw",
    ),
    "special method": (HELPERS, "self.on = True", "self.on = False", "draw"),
    "method of a base class": (HELPERS, "return self.kind", "return [self.kind]", "draw"),
    "constant of a base class": (HELPERS, 'kind = "base"', 'kind = "bass"', "draw"),
    "constant of a class in a default": (HELPERS, "weight = 5", "weight = 6", "draw"),
    "constant of a class that nothing uses": (HELPERS, "idle = 6", "idle = 7", ""),
    "new method": (HELPERS, "    def rest", "    def more(self):\n        return 1\n\n    def rest", ""),
    "base class": (HELPERS, "class Tool(Base)", "class Tool(dict)", "draw"),
    "method that a framework calls": (FRAMES, "return 2", "return 3", "draw"),
    "method of a mixin that a framework calls": (FRAMES, "return 1", "return 2", "draw"),
    "method of a class made by a call": (FRAMES, "return 3", "return 4", "draw"),
    "default of a dataclass field that nothing mentions": (FRAMES, "y: int = 0", "y: int = 1", ""),
    "new dataclass field with a default": (FRAMES, "y: int = 0", "y: int = 0\n    z: int = 1", ""),
    "default of a dataclass field that is mentioned": (FRAMES, "y: int = 0", "y: int = 0\n    size: int = 1", "draw"),
    "new field of a dataclass": (FRAMES, "x: int\n", "x: int\n    z: int\n", "draw"),
    "type of a dataclass field": (FRAMES, "x: int\n", "x: float\n", ""),
    "method of a dataclass that nothing calls": (FRAMES, "return self.x", "return self.y", ""),
    "attribute in a pattern": (ODD, "return 3  # corners", "return 4", "draw"),
    "attribute that is in no pattern": (ODD, "return 3  # sides", "return 4", ""),
    # settings
    "new setting": (SETTINGS, '    colour: str = "red"', '    colour: str = "red"\n    width: int = 3', ""),
    "default of a setting": (SETTINGS, '"red"', '"blue"', ""),
    "limit of a setting": (SETTINGS, "ge=1", "ge=2", ""),
    "validator": (SETTINGS, "return check(value)", "return check(value).lower()", ""),
    "what a validator calls": (HELPERS, "def check(value):\n    return value", "def check(value):\n    return None", ""),
    "new section": (
        SETTINGS,
        "class Config(Section):",
        "class New(Section):\n    key: int = 1\n\n\nclass Config(Section):\n    new: New = New()",
        "",
    ),
    "what pydantic is told": (SETTINGS, 'extra="forbid"', 'extra="allow"', ""),
    "method of settings that is used": (SETTINGS, "return self.size, self.LIMIT", "return self.LIMIT, self.size", "draw"),
    "method of settings that is not used": (
        SETTINGS,
        "def spare(self):\n        return 1",
        "def spare(self):\n        return 2",
        "",
    ),
    "property of settings that is used": (SETTINGS, "return 2 *", "return 3 *", "draw"),
    "constant of settings": (SETTINGS, "ClassVar[int] = 9", "ClassVar[int] = 8", "draw sort"),
    "method of settings behind a name for a type": (SETTINGS, '"ish"', '"er"', "draw"),
    "computed field": (SETTINGS, "self.size * self.size", "self.size**2", "draw sort"),
    # registries and strings
    "new family": (FAMILIES, "FAMILIES = {", 'FAMILIES = {\n    "gamma": "stages.families.beta:Beta",', ""),
    "name of another family's class": (FAMILIES, "beta:Beta", "beta:Better", ""),
    "family": (FAMILIES, "alpha:Alpha", "beta:Beta", "draw learn"),
    "another family": ("stages/families/beta.py", "return 1", "return 2", ""),
    "method of a family": (ALPHA, "return paint(self)", "return paint(1)", "draw"),
    "what a method of a family calls": (ALPHA, "def teach(x):\n    return x", "def teach(x):\n    return 1", "learn"),
    "new kind": (TABLE, "SCHEMAS = {", 'SCHEMAS = {"glue": {},', ""),
    "kind": (TABLE, '"a": 1', '"a": 2', "draw"),
    "another kind": (TABLE, '"c": 3', '"c": 4', ""),
    "table that is no registry": (TABLE, '"hard": 2', '"hard": 3', "draw"),
}


@pytest.mark.parametrize(("path", "old", "new", "changed"), EDITS.values(), ids=EDITS)
def test_an_edit_changes_the_fingerprints_of_what_it_can_change(repository, path, old, new, changed):
    before = prints()
    text = FILES[path]
    assert text.count(old) == 1 or not old, f"{old!r} occurs {text.count(old)} times"
    repository({path: text.replace(old, new) if old else new})
    after = prints()
    assert {stage for stage in STAGES if before[stage] != after[stage]} == set(changed.split())


def test_only_files_with_something_reached_are_listed(repository):
    names = [line.split("@")[0] for line in code("stages.sort")]
    assert names == ["stages/common/deep.py", "stages/common/helpers.py", "stages/common/settings.py", "stages/sort.py"]


def test_two_imports_that_change_places_change_the_fingerprint(repository):
    text = "from stages.common.deep import dig as a, spare as b\n\nif __name__ == '__main__':\n    a(b(1))\n"
    repository({"stages/swap.py": text})
    before = code("stages.swap")
    repository({"stages/swap.py": text.replace("dig as a, spare as b", "spare as a, dig as b")})
    assert [line.split("@")[0] for line in before] == [line.split("@")[0] for line in code("stages.swap")]
    assert before != code("stages.swap")


WAYS = {
    "import": "import stages.common.deep\nstages.common.deep.dig(1)",
    "import as": "import stages.common.deep as deep\ndeep.dig(1)",
    "from": "from stages.common.deep import dig\ndig(1)",
    "from a package": "from stages.common import deep\ndeep.dig(1)",
    "through another module's import": "from stages.common.helpers import dig\ndig(1)",
    "star": "from stages.common.deep import *\ndig(1)",
    "string": "use('stages.common.deep')",
    "string with a name": "NAME = 'stages.common.deep:dig'\nuse(NAME)",
    "value": "import stages.common.deep as deep\nuse([deep])",
    "default": "from stages.common.deep import dig\n\n\ndef use(dig=dig):\n    return dig(1)\n\n\nuse()",
    "own iterable": "from stages.common.deep import dig\n\nuse([dig for dig in dig(1)])",
    "conditional": "try:\n    from stages.common.deep import dig\nexcept ImportError:\n    dig = None\n\nuse(dig)",
    "conditional in a function": """
def use():
    try:
        from stages.common.deep import dig
    except ImportError:
        dig = None
    return dig(1)


use()
""",
    "nested function": """
from stages.common.deep import dig


def use():
    def inner(x):
        return [lambda: dig(y) for y in x]

    return inner


use()
""",
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_every_way_to_a_helper_reaches_it(repository, way):
    repository({"stages/way.py": way + "\n\nif __name__ == '__main__':\n    pass\n"})
    before = code("stages.way")
    repository({DEEP: FILES[DEEP].replace("return x - 1", "return x - 2")})
    assert code("stages.way") != before


def changed_by_beta(repository, *modules, **choice) -> bool:
    before = code(*modules, **choice)
    repository({"stages/families/beta.py": "class Beta:\n    def generate(self):\n        return 2\n"})
    after = code(*modules, **choice)
    repository(FILES)
    return before != after


def test_a_registry_of_which_no_key_is_known_counts_whole(repository):
    assert changed_by_beta(repository, "stages.draw")
    assert changed_by_beta(repository, "stages.draw", mentioned=["FAMILIES[beta]"])
    assert not changed_by_beta(repository, "stages.draw", mentioned=ALPHAS)
    assert not changed_by_beta(repository, "stages.draw", mentioned=[])
    assert not changed_by_beta(repository, "stages.learn", mentioned=ALPHAS)


def test_further_modules_and_names_count(repository):
    assert changed_by_beta(repository, "stages.draw", "stages.families.beta", mentioned=[])
    assert changed_by_beta(repository, "stages.draw", "stages.families.beta:Beta", mentioned=[])
    assert not changed_by_beta(repository, "stages.draw", "stages.families.alpha:Alpha", mentioned=[])
    assert not changed_by_beta(repository, "stages.sort", "stages.families.beta:Beta")  # nothing mentions `generate`
    assert "stages/draw.py" in [line.split("@")[0] for line in code("stages.sort", "stages.draw:shown")]


def test_what_does_not_exist_is_an_error(repository):
    with pytest.raises(FileNotFoundError, match=r"stages\.nothing"):
        code("stages.nothing")
    with pytest.raises(FileNotFoundError, match=r"stages\.nothing"):
        code("stages.nothing:Name")
    with pytest.raises(LookupError, match=r"Nobody.*stages\.families\.beta"):
        code("stages.draw", "stages.families.beta:Nobody")
    repository({"stages/broken.py": "from stages.broken import gone\n\nprint(gone)\nuse(gone)\n"})
    assert len(code("stages.broken")) == 1  # running the stage reports the error
    repository({"stages/relative.py": "from . import common\n"})
    with pytest.raises(AssertionError, match="relative"):
        code("stages.relative")


class Section(BaseModel):
    size: int = 4
    colour: str = "red"
    by_keyword: int = 1
    ink: int = 2
    unread: int = 3


def test_read_settings_are_those_that_the_stage_mentions(repository):
    assert read_settings(Section(size=5), "stages.draw", mentioned=ALPHAS) == {"size": 5, "by_keyword": 1, "ink": 2}
    assert read_settings(Section(), "stages.sort") == {"size": 4}  # through the computed field


# This repository


STEPS = (
    *("prompts", "generate", "score", "judge", "pairs", "replay", "reference", "schedule", "train"),
    *("evaluate", "report", "contact_sheet", "judge_report"),
)


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """Insert a statement into a function of a copy of this repository, and return the stages whose fingerprints change."""
    for package in fingerprints.PACKAGES:
        shutil.copytree(REPOSITORY / package, tmp_path / package, ignore=lambda _, names: [n for n in names if "pycache" in n])
    monkeypatch.setattr(fingerprints, "ROOT", tmp_path)

    def all_prints() -> dict[str, list[str]]:
        forget()
        return {stage: code(f"stages.{stage}", mentioned=["FAMILIES[janus]"]) for stage in STEPS}

    def changed(name: str, function: str) -> set[str]:
        path: Path = tmp_path / name
        before, text = all_prints(), path.read_text()
        places = [node.body[-1] for node in ast.walk(ast.parse(text)) if getattr(node, "name", "") == function]
        lines = text.splitlines()
        lines.insert(places[0].lineno - 1, " " * places[0].col_offset + "edited = 1")
        path.write_text("\n".join(lines))
        after = all_prints()
        return {stage for stage in STEPS if before[stage] != after[stage]}

    yield changed
    forget()


def test_how_a_family_trains_does_not_change_how_it_draws(copy):
    changed = copy("stages/families/janus/family.py", "training_view")
    assert "train" in changed and not {"generate", "score", "reference"} & changed


def test_how_a_family_samples_changes_drawing(copy):
    changed = copy("stages/families/janus/decode.py", "sample")
    assert "generate" in changed and not {"train", "score"} & changed


def test_the_trainer_changes_training_alone(copy):
    assert copy("stages/training/trainer.py", "make_trainer") == {"train"}


@pytest.mark.parametrize("function", ["_epochs", "arm_pairs", "load", "validate"])
def test_the_configuration_changes_nothing_because_rules_pass_its_values(copy, function):
    assert copy("stages/common/config.py", function) == set()


def test_this_module_and_light_stages_stay_out(copy):
    assert copy("stages/common/fingerprints.py", "code") == set()
    assert not any("families" in line or "training" in line for line in code("stages.pairs"))

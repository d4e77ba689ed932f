"""The registered suites, by the name used in `source` of a set of prompts.

To add a suite, write its module and add a line here: see docs/extending.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.common.registry import resolve

if TYPE_CHECKING:
    from stages.suites.base import Suite

SUITES = {
    "shapes": "stages.suites.shapes:SHAPES",
    "text": "stages.suites.text:TEXT",
    "geneval": "stages.suites.geneval:GENEVAL",
    "geneval-subtasks": "stages.suites.geneval_subtasks:GENEVAL_SUBTASKS",
    "t2i-compbench": "stages.suites.t2i_compbench:T2I_COMPBENCH",
    "science-t2i": "stages.suites.science_t2i:SCIENCE_T2I",
}


def open_suite(source: str) -> Suite:
    """Return a registered suite."""
    return resolve(SUITES[source])

"""The registered kinds of understanding benchmarks, by the name used in `kind` of the section `understanding`.

To add a kind, write its module and add a line here: see docs/extending.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.common.registry import resolve

if TYPE_CHECKING:
    from stages.understanding.base import UnderstandingKind

UNDERSTANDING = {
    "shapes": "stages.understanding.shapes:SHAPES",
    "lmms-eval": "stages.understanding.lmms:LMMS_EVAL",
}


def understanding_kind(kind: str) -> UnderstandingKind:
    """Return a registered kind of understanding benchmark."""
    return resolve(UNDERSTANDING[kind])

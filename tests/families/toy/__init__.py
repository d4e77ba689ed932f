"""A toy family that is not autoregressive and has no codes: a small flow on pixels, trained from the stored images.

It tests that the stages assume nothing that only Janus has. Its checkpoint consists of two folders without a config.json.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from stages.common.errors import UserError
from stages.common.settings import Positive, Section
from stages.families.base import Description, Role

WEIGHTS = {"draw": "flow/weights.safetensors", "judge": "judge/weights.safetensors", "train": "flow/weights.safetensors"}


class ToySampling(Section):
    steps: Positive = Field(default=4, description="Euler steps from noise to image.")
    guidance_scale: Annotated[float, Field(ge=0)] = Field(default=1.0, description="Velocity guidance; 1 is none.")


def files(checkpoint: Path, role: Role) -> list[Path]:
    path = checkpoint / WEIGHTS[role]
    if not path.is_file():
        raise UserError(f"{path}: not found; a toy checkpoint has {' and '.join(sorted(set(WEIGHTS.values())))}")
    return [path]


TOY = Description(
    name="toy",
    loader="stages.families.toy.family:Toy",
    roles=frozenset({"draw", "judge", "train"}),
    sampling=ToySampling,
    question="Does this image show {prompt}?",
    answer_prefix="",
    candidate="pixels",
    likelihood="estimate",
    groups=("llm",),
    files=files,
    trained_file="flow/weights.safetensors",
)

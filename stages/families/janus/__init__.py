"""Janus and Janus-Pro: what the configuration and the workflow need to know without loading torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from stages.common.settings import Section
from stages.families.base import Description, Role
from stages.families.tools.checkpoints import require_model_type


class JanusSampling(Section):
    """How Janus draws. The defaults are those of deepseek-ai/Janus, generation_inference.py."""

    guidance_scale: Annotated[float, Field(ge=0)] = Field(
        default=5.0,
        description="Classifier-free guidance s: unconditional + s (conditional - unconditional) logits. 1 is no guidance.",
    )
    temperature: Annotated[float, Field(gt=0)] = Field(default=1.0, description="Logits are divided by this before sampling.")


def files(checkpoint: Path, role: Role) -> list[Path]:
    """Return config.json and every safetensors file. The three roles use the same weights."""
    require_model_type(checkpoint, "janus", "upstream's own layout is converted by python -m stages.families.janus.convert")
    return [checkpoint / "config.json", *sorted(checkpoint.glob("*.safetensors"))]


JANUS = Description(
    name="janus",
    loader="stages.families.janus.family:Janus",
    roles=frozenset({"draw", "judge", "train"}),
    sampling=JanusSampling,
    question=(
        "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
        "provides, and assist the user with a variety of tasks using natural language. Does this original image "
        "describe {prompt}? If it describes the scene, score 1; if it does not fully describe, score 0. Please answer "
        "in the following format: The score is {your score}."
    ),
    # Digits are tokens of their own in Janus-Pro's tokenizer, so the space before the score belongs to what comes before.
    answer_prefix=" The score is ",
    candidate="tokens",
    likelihood="exact",
    groups=("llm", "text", "projector", "vision"),
    files=files,
    trained_file="model.safetensors",
)

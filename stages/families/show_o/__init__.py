"""Show-o (arXiv 2408.12528): what the configuration and the workflow need to know without loading torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from stages.common.errors import UserError
from stages.common.settings import Positive, Section
from stages.families.base import Description, Role
from stages.families.tools.checkpoints import read_config, require_model_type

REMEDY = "upstream's files are converted by python -m stages.families.show_o.convert"
WEIGHTS, PICTURES, TRAINING = "model.safetensors", "vq.safetensors", "training.json"


class ShowOSampling(Section):
    """How Show-o draws. The defaults are those of showlab/Show-o for 512 pixels; for 256 pixels it uses 1.75 and 18."""

    guidance_scale: Annotated[float, Field(ge=0)] = Field(
        default=5.0,
        description="Classifier-free guidance g: (1 + g) conditional - g unconditional logits. 0 is no guidance.",
    )
    steps: Positive = Field(default=50, description="Steps in which all image tokens are filled in.")
    temperature: Annotated[float, Field(ge=0)] = Field(
        default=1.0,
        description="Scale of the noise on confidences, by which tokens are masked again. It falls with every step and does "
        "not concern the choice of codes.",
    )


def files(checkpoint: Path, role: Role) -> list[Path]:
    """Return config.json and the safetensors files; for training also training.json, which neither draws nor judges."""
    require_model_type(checkpoint, "show_o", REMEDY)
    names = ["config.json", *sorted(path.name for path in checkpoint.glob("*.safetensors"))]
    for name in (PICTURES, TRAINING):
        if not (checkpoint / name).is_file():
            raise UserError(f"{checkpoint / name}: not found; convert or copy the checkpoint again, with all its files")
    return [checkpoint / name for name in [*names, *([TRAINING] if role == "train" else [])]]


def drawing_flops(checkpoint: Path, sampling: ShowOSampling) -> float:
    """Return the floating-point operations of one image: each step sends all image tokens through the transformer.

    Under guidance, each does so twice. Text is not counted, because it is computed once, and neither is MAGVIT-v2.
    """
    fields = read_config(checkpoint)
    text, tokens = fields["text_config"], fields["image_tokens"] + 2
    hidden, layers = text["hidden_size"], text["num_hidden_layers"]
    weights = layers * hidden * (4 * hidden + 2 * text["intermediate_size"])
    attention = 4 * tokens**2 * hidden * layers
    return sampling.steps * (2 if sampling.guidance_scale > 0 else 1) * (2 * tokens * weights + attention)


SHOW_O = Description(
    name="show_o",
    loader="stages.families.show_o.family:ShowO",
    roles=frozenset({"draw", "judge", "train"}),
    sampling=ShowOSampling,
    question=(
        "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
        "provides, and assist the user with a variety of tasks using natural language. Does this original image "
        "describe {prompt}? If it describes the scene, score 1; if it does not fully describe, score 0. Please answer "
        "in the following format: The score is {your score}."
    ),
    answer_prefix="",  # Show-o ignores the format that is asked for and begins with "Yes" or "No"
    candidate="tokens",
    likelihood="estimate",
    groups=("llm", "projector", "vision"),
    files=files,
    trained_file=WEIGHTS,
    drawing_flops=drawing_flops,
)

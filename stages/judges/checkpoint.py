"""What judges with a checkpoint of transformers share: settings, files, and loading that refuses wrong weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from stages.common.errors import UserError
from stages.common.settings import Positive, Share
from stages.judges.base import JudgeSettings, Verdict

if TYPE_CHECKING:
    import numpy as np
    import torch

# The mean and standard deviation of CLIP's training images, which BLIP uses as well.
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class CheckpointJudge(JudgeSettings):
    """The settings of a judge that loads a checkpoint. A kind adds its own."""

    checkpoint: str = Field(description="The checkpoint's folder in Hugging Face layout. Only safetensors are read.")
    threshold: Share | None = Field(
        default=None,
        description="An image matches at this score or above. Empty: the judge only grades, which suffices for Gen.",
    )
    device: str = Field(
        default="auto", description="auto, cpu, or one device such as cuda:0. auto takes a GPU if there is one."
    )
    workers: Positive | None = Field(
        default=None, description="How many processes share the batches, one GPU each. Empty: one for each visible GPU."
    )
    batch_size: Positive = Field(default=16, description="Images that are judged together. It changes no result.")

    def outcome(self) -> dict[str, Any]:
        return self.model_dump(exclude={"checkpoint", "device", "workers", "batch_size"})

    def verdict(self, score: float, answer: str) -> Verdict:
        """Return a verdict with this score, and with a yes or no where there is a threshold."""
        return Verdict(None if self.threshold is None else score >= self.threshold, score, answer)


def workers(settings: CheckpointJudge) -> int:
    """Return how many processes share the batches: `workers`, or the number of visible GPUs."""
    import torch

    if settings.workers is not None:
        return settings.workers
    return max(1, torch.cuda.device_count()) if settings.device == "auto" else 1


def checkpoint_files(folder: str) -> list[str]:
    """Return the files of a checkpoint that a judge's verdicts depend on."""
    found = [str(path) for path in Path(folder).glob("*") if path.suffix in (".json", ".txt", ".safetensors")]
    return sorted(found) or [str(Path(folder) / "config.json")]


def device_of(name: str) -> str:
    """Return the device that `device` names, with auto resolved."""
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def load_model(kind: str, folder: str, device: str, classes: Any, model_types: Sequence[str] = ()) -> Any:
    """Load a whole model in float32 for inference.

    kind: the judge's kind, for messages. classes: the class of transformers that loads it. model_types: the accepted model_type
    of config.json; empty accepts whatever the class accepts. Raises UserError on a folder without such a checkpoint, and where
    weights are missing, which transformers would draw at random.
    """
    import torch

    config = Path(folder) / "config.json"
    try:
        found = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        raise UserError(
            f"{config}: not a readable model configuration; set checkpoint of the judge {kind} to its folder"
        ) from None
    if model_types and found not in model_types:
        wanted = " or ".join(model_types)
        raise UserError(f"{config}: model_type is {found!r}, but the judge {kind} needs {wanted}; set its checkpoint")
    if not any(Path(folder).glob("*.safetensors")):
        raise UserError(f"{folder}: no safetensors; convert the weights with save_pretrained where you trust them")
    try:
        model, report = classes.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{folder}: not a checkpoint that the judge {kind} can load ({reason}); set its checkpoint") from None
    if report["missing_keys"]:
        first = min(report["missing_keys"])
        raise UserError(
            f"{folder}: weights are missing ({first}), so it is no checkpoint for the judge {kind}; set its checkpoint"
        )
    return model.to(device_of(device)).eval().requires_grad_(False)


def load_tokenizer(kind: str, folder: str) -> Any:
    """Load a checkpoint's tokenizer. Raises UserError where it is missing."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{folder}: no tokenizer for the judge {kind} ({reason}); fetch the whole checkpoint again") from None


def normalised(
    images: Sequence[np.ndarray], mean: Sequence[float] = MEAN, deviation: Sequence[float] = DEVIATION
) -> torch.Tensor:
    """Return images (uint8 `[height, width, 3]`, all of one size) as float32 `[images, 3, height, width]`, normalised."""
    import numpy as np
    import torch

    values = np.stack(images).astype(np.float32) / 255
    values = (values - np.asarray(mean, np.float32)) / np.asarray(deviation, np.float32)
    return torch.from_numpy(values).permute(0, 3, 1, 2).contiguous()

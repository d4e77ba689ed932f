"""What judges with checkpoints of transformers share: settings, files, and loading that refuses wrong weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from stages.common.errors import UserError
from stages.common.settings import Device, Model, Positive, Share
from stages.families import resolved
from stages.families.tools.checkpoints import require_safetensors
from stages.judges.base import JudgeSettings, Verdict

if TYPE_CHECKING:
    import numpy as np
    import torch

# The mean and standard deviation of CLIP's training images, which BLIP uses as well.
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PROCESSOR = "preprocessor_config.json"
TOKENIZERS = (("tokenizer.json",), ("vocab.txt",), ("vocab.json", "merges.txt"))  # the files of a tokenizer, one of these


class CheckpointJudge(JudgeSettings):
    """The settings of a judge that loads a checkpoint. A kind adds its own."""

    checkpoint: str = Field(description="The checkpoint's folder in Hugging Face layout. Only safetensors are read.")
    threshold: Share | None = Field(
        default=None,
        description="An image matches at this score or above. Empty: the judge only grades, which suffices for Gen.",
    )
    device: Device = Field(
        default="auto", description="auto, cpu, cuda, or one device such as cuda:0. auto takes a GPU where there is one."
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


def runs_on(settings: Any) -> Model:
    """Return the device, the workers and the type of a judge's settings. A judge without the setting `dtype` is in float32."""
    return Model(device=settings.device, workers=settings.workers, dtype=getattr(settings, "dtype", "float32"))


def device_of(name: str) -> str:
    """Return the device that `device` names, with auto resolved. Raises UserError where there is no GPU that is asked for."""
    return resolved(Model(device=name), "device").device


# Its files


def remedy_of(kind: str) -> str:
    """Return what a user should do about a wrong folder in the setting `checkpoint` of a judge of this kind."""
    return f"set checkpoint of the judge {kind} to the folder of another one"


def checkpoint_files(
    folder: str, remedy: str, model_types: Sequence[str] = (), *, tokenizer: bool = False, processor: bool = False
) -> list[str]:
    """Return the files of a checkpoint that a judge's verdicts depend on. Neither torch nor the weights are loaded.

    remedy: what the user should do, which ends every message. model_types: the accepted model_type of config.json; empty
    accepts all. tokenizer, processor: whether the judge reads the checkpoint's tokenizer and its image processor. Raises
    UserError on a folder without such a checkpoint.
    """
    place = Path(folder)
    try:
        found = json.loads((place / "config.json").read_text(encoding="utf-8")).get("model_type")
    except OSError:
        raise UserError(f"{place}/config.json: not found; {remedy}") from None
    except (ValueError, AttributeError):
        raise UserError(f"{place}/config.json: not a model configuration; {remedy}") from None
    if model_types and found not in model_types:
        raise UserError(f"{place}/config.json: model_type is {found!r}, not {' or '.join(map(repr, model_types))}; {remedy}")
    require_safetensors(place, remedy)
    if tokenizer and not any(all((place / name).is_file() for name in names) for names in TOKENIZERS):
        raise UserError(f"{place}: no tokenizer ({', or '.join(' and '.join(names) for names in TOKENIZERS)}); {remedy}")
    if processor and not (place / PROCESSOR).is_file():
        raise UserError(f"{place / PROCESSOR}: not found; {remedy}")
    return sorted(str(path) for path in place.glob("*") if path.suffix in (".json", ".txt", ".safetensors"))


# What is loaded from it


def load(what: str, folder: str, remedy: str, classes: Any, **options: Any) -> Any:
    """Return what `from_pretrained` of a class of transformers makes of a folder. Raises UserError where it makes nothing."""
    from safetensors import SafetensorError
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of loading weights; stages have their own
    try:
        return classes.from_pretrained(folder, local_files_only=True, **options)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{folder}: its {what} does not load ({reason}); {remedy}") from None


def load_model(
    folder: str, remedy: str, device: str, classes: Any, model_types: Sequence[str] = (), dtype: str = "float32"
) -> Any:
    """Load a whole model for inference.

    device: auto, cpu or a device of torch. classes: the class of transformers that loads it. model_types, remedy: see
    `checkpoint_files`. Raises UserError on a folder without such a checkpoint, and where weights are missing, which
    transformers would draw at random. Buffers may be missing, except for the statistics of normalisation: they are tables that
    the class computes.
    """
    import torch

    checkpoint_files(folder, remedy, model_types)
    options = {"dtype": getattr(torch, dtype), "use_safetensors": True, "output_loading_info": True}
    model, report = load("model", folder, remedy, classes, **options)
    statistics = {name for name, _ in model.named_buffers() if name.endswith(("running_mean", "running_var"))}
    if lost := sorted(set(report["missing_keys"]) & {*statistics, *(name for name, _ in model.named_parameters())}):
        raise UserError(f"{folder}: {len(lost)} weights are missing, such as {lost[0]}; {remedy}")
    return model.to(device_of(device)).eval().requires_grad_(False)


def load_tokenizer(folder: str, remedy: str, classes: Any = None) -> Any:
    """Load a checkpoint's tokenizer, of any class unless one is given. Raises UserError where it is missing or broken."""
    from transformers import AutoTokenizer

    checkpoint_files(folder, remedy, tokenizer=True)  # without its files transformers would make up an empty one
    return load("tokenizer", folder, remedy, classes or AutoTokenizer)


def load_processor(folder: str, remedy: str, classes: Any) -> Any:
    """Load a checkpoint's image processor. Raises UserError where it is missing or broken."""
    checkpoint_files(folder, remedy, processor=True)
    return load("image processor", folder, remedy, classes)


def normalised(
    images: Sequence[np.ndarray], mean: Sequence[float] = MEAN, deviation: Sequence[float] = DEVIATION
) -> torch.Tensor:
    """Return images (uint8 `[height, width, 3]`, all of one size) as float32 `[images, 3, height, width]`, normalised."""
    import numpy as np
    import torch

    values = np.stack(images).astype(np.float32) / 255
    values = (values - np.asarray(mean, np.float32)) / np.asarray(deviation, np.float32)
    return torch.from_numpy(values).permute(0, 3, 1, 2).contiguous()

"""The registered model families, by the name used in `model.family`."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stages.common.config import Model
    from stages.families.base import Family

FAMILIES = {"janus": ("stages.families.janus.family", "Janus")}


def workers(model: Model) -> int:
    """How many processes share a stage's batches, one GPU each: `model.workers`; where empty, as many as GPUs are seen."""
    import torch

    if model.workers is not None:
        return model.workers
    return max(1, torch.cuda.device_count()) if model.device in ("auto", "cuda") else 1


def open_family(model: Model, checkpoint: Path | None = None) -> Family:
    """Load the configured model, or another checkpoint of its family; torch is imported here and not before."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of loading weights; stages have their own
    device = model.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = model.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    module, name = FAMILIES[model.family]
    return getattr(import_module(module), name).load(checkpoint or Path(model.checkpoint), device, dtype)

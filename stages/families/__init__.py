"""The registered model families, by the name used in `model.family`.

To add a family, write its package and add a line here: see docs/extending.md.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.common.errors import UserError
from stages.common.processes import helping
from stages.common.registry import resolve

if TYPE_CHECKING:
    from stages.common.config import Model
    from stages.families.base import Description, Family, Role

FAMILIES = {
    "janus": "stages.families.janus:JANUS",
    "show_o": "stages.families.show_o:SHOW_O",
}


def describe(family: str) -> Description:
    """Return a family's description. Neither torch nor the weights are loaded."""
    return resolve(FAMILIES[family])


def checkpoint_hash(family: str, checkpoint: Path, role: Role) -> str:
    """Return the identity of a checkpoint in one role: a hash over the files that the family says belong to it."""
    from stages.families.tools.checkpoints import files_hash

    return files_hash(checkpoint, describe(family).files(checkpoint, role))


def preprocessing_hash(checkpoint: Path) -> str:
    """Return a hash over the files of a checkpoint's tokenizer and image processor."""
    from stages.families.tools.checkpoints import files_hash, preprocessing_files

    return files_hash(checkpoint, preprocessing_files(checkpoint))


def model_facts(model: Model, checkpoint: Path) -> tuple[str, str]:
    """Return what a model's results depend on besides its weights, for the keys of kept batches: tokenizer and image processor
    as a hash, and the type of its numbers, since `auto` is another one on another machine."""
    return preprocessing_hash(checkpoint), resolved(model).dtype


def workers(model: Model) -> int:
    """Return how many processes share a stage's batches, one GPU each: `model.workers`, or the number of visible GPUs.

    Raises UserError when there are fewer GPUs.
    """
    import torch

    if model.workers is not None:
        if helping() is None:  # a process that helps sees its own GPU alone
            require_gpus(model, model.workers, "workers of the section model or of the judge")
        return model.workers
    return max(1, torch.cuda.device_count()) if model.device in ("auto", "cuda") else 1


def require_gpus(model: Model, count: int, setting: str) -> None:
    """Raise UserError where `count` processes of this machine need a GPU each and there are fewer, or one is named for all.

    A process without one would use the CPU, or fail with an error of torch's that names no setting.
    """
    import torch

    if model.device.startswith("cuda:") and count > 1:
        raise UserError(f"{setting}: {count} processes need a GPU each, but device is {model.device}; set device to cuda")
    seen = torch.cuda.device_count()
    if model.device in ("auto", "cuda") and 0 < seen < count:
        raise UserError(
            f"{setting}: {count} processes need a GPU each, but torch sees {seen} on {socket.gethostname()}; lower it, or give "
            "the job more GPUs"
        )


def resolved(model: Model, setting: str = "model.device") -> Model:
    """Return the settings of a model without `auto`: the device is a GPU where there is one, and the dtype is bfloat16 on a GPU
    and float32 on a CPU. Raises UserError, with the name of the setting, when a GPU is asked for and there is none."""
    device = model.device
    if device != "cpu":
        import torch

        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        elif not torch.cuda.is_available():
            raise UserError(
                f"{setting}: {device}, but torch sees no GPU on {socket.gethostname()}; check the driver and torch's build, "
                "or set it to cpu"
            )
    dtype = model.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    return model.model_copy(update={"device": device, "dtype": dtype})


def open_family(model: Model, checkpoint: Path | None, role: Role) -> Family:
    """Load the configured model, or another checkpoint of its family, for one role. torch is imported here and not before.

    Raises UserError when the checkpoint does not load or does not fit into the memory of the GPU.
    """
    import torch
    from transformers.utils.logging import disable_progress_bar

    from stages.families.tools.allocation import keep_freed_memory

    disable_progress_bar()  # of loading weights; stages have their own
    model = resolved(model)
    if model.device == "cpu":
        keep_freed_memory()
    loader: Any = resolve(describe(model.family).loader)
    folder = checkpoint or Path(model.checkpoint)
    try:
        return loader.load(folder, model.device, model.dtype, role)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{folder}: the weights do not fit into the free memory of {model.device} on {socket.gethostname()} ({error}); end "
            "what else uses this GPU, or take a larger one"
        ) from None

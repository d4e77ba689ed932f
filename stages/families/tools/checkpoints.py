"""Checks on a checkpoint folder that need neither torch nor transformers, and its identity."""

from __future__ import annotations

import hashlib
import json
import socket
from pathlib import Path

from stages.common.runtime import UserError

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def model_type(checkpoint: Path) -> str:
    """`model_type` of the folder's config.json; UserError where the folder is no checkpoint."""
    config = checkpoint / "config.json"
    if not checkpoint.is_dir():
        raise UserError(
            f"{checkpoint}: no such checkpoint folder on {socket.gethostname()}; "
            "set model.checkpoint to a local folder (on a cluster, to one that every node sees)"
        )
    try:
        fields = json.loads(config.read_text(encoding="utf-8"))
        return str(fields["model_type"])
    except FileNotFoundError:
        raise UserError(f"{config}: not found; model.checkpoint must be a folder in Hugging Face layout") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{config}: not a model configuration with a model_type; fetch the checkpoint again") from None


def require_model_type(checkpoint: Path, expected: str) -> None:
    """UserError unless the folder holds safetensors of the expected family."""
    found = model_type(checkpoint)
    if found != expected:
        raise UserError(
            f"{checkpoint}/config.json: model_type is {found!r}, but model.family needs {expected!r}; "
            "set model.family or model.checkpoint"
        )
    if not any(checkpoint.glob("*.safetensors")):
        pickles = sorted(path.name for pattern in PICKLES for path in checkpoint.glob(pattern))
        what = f"only pickled weights ({pickles[0]})" if pickles else "no weights"
        raise UserError(
            f"{checkpoint}: {what}; pickles are not loaded, convert them with transformers' save_pretrained "
            "(safetensors) on a machine you trust them on, upstream's Janus-Pro with python -m stages.families.janus.convert"
        )


def checkpoint_hash(checkpoint: Path) -> str:
    """16 hex digits over config.json and every safetensors file: the same weights, the same hash, wherever they lie."""
    model_type(checkpoint)  # is it a checkpoint?
    digest = hashlib.sha256()
    for path in [checkpoint / "config.json", *sorted(checkpoint.glob("*.safetensors"))]:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()[:16]

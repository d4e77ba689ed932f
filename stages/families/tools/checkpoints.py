"""Checks on checkpoint folders that need neither torch nor transformers, and a checkpoint's identity."""

from __future__ import annotations

import hashlib
import json
import socket
from pathlib import Path
from typing import Any

from stages.common.errors import UserError

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# Of transformers' tokenizers and image processors.
PREPROCESSING = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "processor_config.json", "preprocessor_config.json",
)  # fmt: skip


def require_folder(checkpoint: Path) -> None:
    """Raise UserError unless the checkpoint is a folder that this machine can access."""
    if not checkpoint.is_dir():
        raise UserError(
            f"{checkpoint}: no such checkpoint folder on {socket.gethostname()}; "
            "set model.checkpoint to a local folder (on a cluster, to one that every node sees)"
        )


def read_config(checkpoint: Path) -> dict[str, Any]:
    """Return the fields of a folder's config.json. Raises UserError when the folder or the file is missing or invalid."""
    require_folder(checkpoint)
    config = checkpoint / "config.json"
    try:
        fields = json.loads(config.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{config}: not found; model.checkpoint must be a folder in Hugging Face layout") from None
    except ValueError:
        raise UserError(f"{config}: not JSON; fetch the checkpoint again") from None
    if not isinstance(fields, dict):
        raise UserError(f"{config}: not a model configuration; fetch the checkpoint again")
    return fields


def require_safetensors(checkpoint: Path, remedy: str = "") -> None:
    """Raise UserError unless the folder holds safetensors files. remedy is appended to the message."""
    if not any(checkpoint.glob("*.safetensors")):
        pickles = sorted(path.name for pattern in PICKLES for path in checkpoint.glob(pattern))
        what = f"only pickled weights ({pickles[0]})" if pickles else "no weights"
        raise UserError(
            f"{checkpoint}: {what}; pickles are not loaded. Convert them with transformers' save_pretrained (safetensors) on "
            f"a machine where you trust them{'; ' + remedy if remedy else ''}"
        )


def require_model_type(checkpoint: Path, expected: str, remedy: str = "") -> None:
    """Raise UserError unless config.json names the expected model_type and the folder holds safetensors files."""
    found = read_config(checkpoint).get("model_type")
    if found is None:
        raise UserError(f"{checkpoint}/config.json: not a model configuration with a model_type; fetch the checkpoint again")
    if found != expected:
        raise UserError(
            f"{checkpoint}/config.json: model_type is {found!r}, but model.family needs {expected!r}; "
            "set model.family or model.checkpoint"
        )
    require_safetensors(checkpoint, remedy)


def preprocessing_files(checkpoint: Path) -> list[Path]:
    """Return the files that say how this checkpoint's prompts become tokens and its images become pixels.

    Results depend on them. Candidate ids do not, since these follow from the identity of the weights (`checkpoint_hash`).
    """
    return [path for name in PREPROCESSING if (path := checkpoint / name).is_file()]


def files_hash(checkpoint: Path, files: list[Path]) -> str:
    """Return the first 16 hexadecimal digits of a SHA-256 hash over the files' relative paths and contents.

    Paths are relative to the checkpoint folder, so the same weights have the same hash wherever that folder is.
    """
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.relative_to(checkpoint).as_posix().encode())
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()[:16]

"""What the converters share: reading checkpoints in the layout of a model's authors, and the operations of their check."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file

from stages.common.errors import UserError

Weights = dict[str, torch.Tensor]


class Operations:
    """Layers by the names of upstream's tensors, as plain functions. A converter checks its model against what they compute.

    weights: float32 tensors by name. The residual block is that of VQGAN, which both tokenizers of images use.
    """

    weights: Weights

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weights[name + ".weight"], self.weights.get(name + ".bias"))

    def conv(self, name: str, x: torch.Tensor, **keywords: Any) -> torch.Tensor:
        return F.conv2d(x, self.weights[name + ".weight"], self.weights.get(name + ".bias"), **keywords)

    def group(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.group_norm(x, 32, self.weights[name + ".weight"], self.weights[name + ".bias"], 1e-6)

    def residual(self, name: str, x: torch.Tensor) -> torch.Tensor:
        h = self.conv(f"{name}.conv1", F.silu(self.group(f"{name}.norm1", x)), padding=1)
        h = self.conv(f"{name}.conv2", F.silu(self.group(f"{name}.norm2", h)), padding=1)
        shortcut = f"{name}.nin_shortcut"
        return h + (self.conv(shortcut, x) if f"{shortcut}.weight" in self.weights else x)


def read_json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not found; give the folder of upstream's checkpoint, with all its files") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); fetch it again") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path}: not a JSON object; fetch it again")
    return fields


def look_up(fields: dict[str, Any], dotted: str) -> Any:
    """Return a field by its path, or None if it or a section on the way is absent."""
    found: Any = fields
    for name in dotted.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return found


def read_file(path: Path) -> Weights:
    """Return the tensors of one file by name, memory-mapped. Raises UserError if the file is cut or has no tensors."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (SafetensorError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{path}: cannot be read ({reason}); fetch it again") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise UserError(f"{path}: not a dictionary of tensors; give the folder of upstream's checkpoint")
    return tensors


def read_weights(folder: Path, allow_pickle: bool) -> tuple[Weights, dict[str, str]]:
    """Return upstream's tensors by name, and the name of each one's file. If there is an index, only what it names is read.

    Raises UserError if a file or tensor of the index is missing, or if there are only pickles and they are not allowed.
    """
    safe, pickled = sorted(folder.glob("*.safetensors")), sorted(folder.glob("pytorch_model*.bin"))
    if not safe and not pickled:
        raise UserError(f"{folder}: neither *.safetensors nor pytorch_model*.bin; give the folder of upstream's checkpoint")
    if not safe and not allow_pickle:
        raise UserError(f"{folder}: {pickled[0].name} is a pickle; add --allow-pickle if you trust where it comes from")
    index = folder / ("model.safetensors.index.json" if safe else "pytorch_model.bin.index.json")
    place: dict[str, str] = {}
    if index.is_file():
        place = look_up(read_json(index), "weight_map")
        if not isinstance(place, dict) or not place or not all(isinstance(name, str) for name in place.values()):
            raise UserError(f"{index}: weight_map is not a table from tensors to files; fetch it again")
    names = sorted(set(place.values())) or [path.name for path in safe or pickled]
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise UserError(f"{folder / absent[0]}: not found, but {index.name} names it; fetch it")
    weights: Weights = {}
    files: dict[str, str] = {}
    for name in names:
        tensors = read_file(folder / name)
        weights |= tensors
        files |= dict.fromkeys(tensors, name)
    for tensor, name in place.items():
        if files.get(tensor) != name:
            raise UserError(f"{folder / name}: has no tensor {tensor}, but {index.name} places it there; fetch both again")
    return weights, files

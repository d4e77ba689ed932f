"""Reading checkpoints in the layout of a model's authors, for the converters."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from stages.common.errors import UserError

Weights = dict[str, torch.Tensor]


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
    """A field by its path, None where it or a section on the way is absent."""
    found: Any = fields
    for name in dotted.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return found


def read_file(path: Path) -> Weights:
    """The tensors of one file by name, memory-mapped. UserError where the file is cut or no file of tensors."""
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
    """Upstream's tensors by name, and the name of each one's file. Where there is an index, exactly what it names is read.

    UserError where a file or tensor of the index is missing, or there are only pickles and they are not allowed.
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

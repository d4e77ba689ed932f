"""The saves of a training, and which of them a training may continue. This module needs neither torch nor transformers.

Saves are in work/<steps>-<key>/checkpoint-<step>/. The key is a hash of everything that the weights depend on: code, settings,
precision, seed, base model, and the schedule's first <steps> steps with the prompts and pictures of their rows.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from stages.common.config import Train
from stages.common.errors import UserError
from stages.common.seeds import hash_seed

PREFIX = "checkpoint-"
Row = dict[str, Any]


def step_of(save: Path) -> int:
    return int(save.name.removeprefix(PREFIX))


def saves(folder: Path) -> list[Path]:
    """Return a training's saves, oldest first. Each save is complete, because it was renamed into place."""
    return sorted(folder.glob(PREFIX + "*"), key=step_of)


def keyed(work: Path, schedule: list[Row], steps: int, identity: tuple[object, ...]) -> Path:
    """Return the folder in `work` for a training over the first `steps` steps of the schedule.

    schedule: rows of the schedule manifest, with everything that training reads of what they refer to.
    """
    rows = [tuple(row.values()) for row in schedule if row["step"] < steps]
    return work / f"{steps}-{hash_seed(*identity, rows):016x}"


def latest(works: list[Path], schedule: list[Row], identity: tuple[object, ...]) -> Path | None:
    """Return the save with the most steps among the trainings in `works` whose schedule is a prefix of this one, or None."""
    found: list[Path] = []
    for work in works:
        counts = {int(path.name.split("-")[0]) for path in work.glob("*-*") if path.is_dir()}
        found += [save for count in counts for save in saves(keyed(work, schedule, count, identity))]
    return max(found, key=step_of, default=None)


def discard(work: Path, *kept: Path) -> None:
    """Delete the saves of all trainings in `work` except those in the folders `kept`."""
    for stale in work.glob("*-*"):
        if stale not in kept:
            shutil.rmtree(stale)


def layout(settings: Train) -> dict[str, int]:
    """Return how a save is divided among processes: their number and the ZeRO stage (0 without DeepSpeed)."""
    return {"processes": settings.gpus * settings.nodes, "zero_stage": settings.zero_stage if settings.deepspeed else 0}


def write_layout(save: Path, settings: Train) -> None:
    (save / "layout.json").write_text(json.dumps(layout(settings)))


def require_layout(save: Path, settings: Train) -> None:
    """Raise UserError unless the save was written by the same number of processes and at the same ZeRO stage."""
    then, now = json.loads((save / "layout.json").read_text()), layout(settings)
    if then != now:
        raise UserError(
            f"{save}: saved by {then['processes']} processes at ZeRO stage {then['zero_stage']}, and now there are "
            f"{now['processes']} at stage {now['zero_stage']}; set train.gpus, train.nodes and train.zero_stage as they were, "
            f"or delete {save.parent} to start from the base model"
        )

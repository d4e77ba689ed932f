"""A training's saves: which may be continued, and by whom. Needs neither torch nor transformers.

work/<steps>-<key>/checkpoint-<step>/    the key stands for all that the weights depend on: code, settings, seed, base model,
                                         and the schedule's first <steps> steps
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from stages.common.config import Train
from stages.common.runtime import UserError
from stages.common.seeds import hash_seed

PREFIX = "checkpoint-"
Row = dict[str, Any]


def step_of(save: Path) -> int:
    return int(save.name.removeprefix(PREFIX))


def saves(folder: Path) -> list[Path]:
    """A training's saves, oldest first; each is whole, since it is renamed into place."""
    return sorted(folder.glob(PREFIX + "*"), key=step_of)


def keyed(work: Path, schedule: list[Row], steps: int, identity: tuple[object, ...]) -> Path:
    """The folder in `work` for a training over the schedule's first `steps` steps."""
    rows = [tuple(row.values()) for row in schedule if row["step"] < steps]
    return work / f"{steps}-{hash_seed(*identity, rows):016x}"


def latest(works: list[Path], schedule: list[Row], identity: tuple[object, ...]) -> Path | None:
    """The save that got furthest, of the trainings in `works` whose schedule is this one or its beginning."""
    found: list[Path] = []
    for work in works:
        counts = {int(path.name.split("-")[0]) for path in work.glob("*-*") if path.is_dir()}
        found += [save for count in counts for save in saves(keyed(work, schedule, count, identity))]
    return max(found, key=step_of, default=None)


def discard(work: Path, *kept: Path) -> None:
    """Delete the saves of other trainings."""
    for stale in work.glob("*-*"):
        if stale not in kept:
            shutil.rmtree(stale)


def layout(settings: Train) -> dict[str, int]:
    """How a save is cut up among processes."""
    return {"processes": settings.gpus * settings.nodes, "zero_stage": settings.zero_stage if settings.deepspeed else 0}


def write_layout(save: Path, settings: Train) -> None:
    (save / "layout.json").write_text(json.dumps(layout(settings)))


def require_layout(save: Path, settings: Train) -> None:
    """UserError unless as many processes wrote the save as would read it, and at the same ZeRO stage."""
    then, now = json.loads((save / "layout.json").read_text()), layout(settings)
    if then != now:
        raise UserError(
            f"{save}: saved by {then['processes']} processes at ZeRO stage {then['zero_stage']}, and now there are "
            f"{now['processes']} at stage {now['zero_stage']}; set train.gpus, train.nodes and train.zero_stage as they were, "
            f"or delete {save.parent} to start at the base model"
        )

"""A run of measurements within a budget of time: what was measured and what was left out, printed and written as it comes.

The JSON holds the device, versions, type and budget, and

results     one entry a line of the table: geometry, work (draw, pixels, judge, sft, dpo), way, batch, images_per_second and
            seconds_per_1000_images (of images; of samples in training), fraction_of_floor (null where the device is not in
            stages/families/tools/devices.py), peak_memory_bytes (null on a CPU), the floor's bytes_per_image and
            flops_per_image, the goal where there is one for the device, and what else belongs to that work.
left_out    name and why.
"""

from __future__ import annotations

import gc
import re
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch

from speed import bench, cost
from speed.records import write
from stages.common.errors import UserError

Result = TypeVar("Result")
SHARE = 1 / 6  # of the time that is left, for one measurement at most


class TimeUp(Exception):
    """There is no time left for a measurement; the message says how much it would take."""


@dataclass
class Session:
    device: str
    minutes: float
    out: Path
    facts: dict[str, Any]
    results: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[dict[str, str]] = field(default_factory=list)
    failed: bool = False

    def left(self) -> float:
        """Seconds from now to the end of the budget, which began with the process."""
        return psutil.Process().create_time() + 60 * self.minutes - time.time()

    def limit(self) -> float:
        """Seconds that a measurement may take."""
        return SHARE * self.left()

    def timed(self, work: Callable[[], Any]) -> tuple[float, int | None]:
        return bench.timed(self.device, work)

    def free(self) -> None:
        """Let go of what the last measurement held."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def add(
        self,
        name: tuple[str, str, str, int],
        images: int,
        seconds: float,
        peak: int | None,
        least: cost.Cost,
        goal: cost.Goal | None,
        **details: Any,
    ) -> None:
        """A measurement that took `seconds` for `images`. name: geometry, work, way and batch."""
        row: dict[str, Any] = dict(zip(("geometry", "work", "way", "batch"), name, strict=True))
        row |= bench.result("{} {}, {}, batch {}".format(*name), images, seconds, peak, least, self.device) | details
        shown = ""
        if goal and cost.GOAL_DEVICE in self.facts["device"]:
            row["goal"] = {goal.key: goal.value}
            shown = f"   goal: {goal}"
        self.results.append(row)
        unit = "samples" if row["work"] in ("sft", "dpo") else "images"
        print(bench.line(row, 64, unit) + shown, flush=True)
        self.write()

    def leave_out(self, name: str, why: str) -> None:
        self.left_out.append({"name": name, "why": why})
        print(f"{name:<64} left out: {why}", flush=True)
        self.write()

    def attempt(self, name: str, work: Callable[[], Result]) -> Result | None:
        """What `work` returns; None, and a line that says why, where it lacks memory, time or a package, or fails."""

        def ring(*_: object) -> None:
            raise TimeUp("the time was over before it ended")

        why = f"the {self.minutes:g} minutes were over"
        if self.left() > 0:
            signal.signal(signal.SIGALRM, ring)
            signal.setitimer(signal.ITIMER_REAL, self.left())  # an estimate may be wrong, the budget is kept
            try:
                return work()
            except torch.OutOfMemoryError as error:
                tried = re.search(r"ried to allocate ([\d.]+ \w+)", str(error))
                why = "it does not fit into the memory" + (f", {tried[1]} more were wanted" if tried else "")
            except ImportError as error:
                why = f"{error.name or error} is not installed"
            except (TimeUp, UserError) as error:
                why = str(error)
            except Exception as error:  # a fault; the measurements after it are still worth having
                traceback.print_exc()
                why, self.failed = f"it failed, {type(error).__name__}: {error}".splitlines()[0], True
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        self.leave_out(name, why)
        self.free()
        return None

    def write(self) -> None:
        write(self.out, self.facts | {"minutes": self.minutes, "results": self.results, "left_out": self.left_out})

"""How many images a device processes at once: a function of the geometry, reduced only when memory runs out.

The shape of a matrix product determines how it is rounded, and in bfloat16 on a GPU a rounding difference can change a sampled
code. The size of the pieces therefore never depends on the memory that happens to be free: a batch is split in the same way on
every device of a class.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

import torch

from stages.common.errors import UserError

Result = TypeVar("Result")
GIBIBYTE = 1 << 30
CLASS = 4 * GIBIBYTE  # GPUs of the same model report memory sizes that differ by less than this
USED = 0.8  # fraction of the memory beside the weights; the rest is for activations and fragmentation
ON_CPU = 8 * GIBIBYTE  # a constant, because other work shares the memory and larger pieces are hardly faster on a CPU


class Memory:
    """The memory of a device beside a model's weights, in bytes. A GPU's total is rounded down to a multiple of CLASS."""

    def __init__(self, device: torch.device, weights: int) -> None:
        self.device = device
        self.room = ON_CPU
        if device.type == "cuda":
            total = torch.cuda.get_device_properties(device).total_memory // CLASS * CLASS
            self.room = int(USED * (total - weights))
        self.most: dict[str, int] = {}  # by task: the largest piece to try after one did not fit

    def fit(self, bytes_each: int) -> int:
        """Return how many images of that many bytes fit at once, but at least 1, because the number of bytes is an estimate."""
        return max(1, self.room // bytes_each)

    def pieces(self, task: str, count: int, at_once: int, work: Callable[[slice], Result]) -> list[Result]:
        """Return the results of `work` on consecutive slices of `range(count)`.

        There are as few slices as `at_once` allows, of nearly equal sizes. A slice that runs out of memory is halved and run
        again, and later slices of the same task are no larger. A message says so, because smaller slices may round
        differently. Raises UserError when a single image does not fit.
        """
        results, start = [], 0
        while start < count:
            left, most = count - start, min(at_once, self.most.get(task, at_once))
            size = -(-left // -(-left // most))  # both divisions round up
            try:
                results.append(work(slice(start, start + size)))
                start += size
                continue
            except torch.OutOfMemoryError as error:
                if size == 1:
                    raise UserError(
                        f"{self.device}: out of memory while {task} one image ({error}); "
                        "use a larger GPU or model.dtype bfloat16"
                    ) from None
            self.most[task] = size // 2
            print(
                f"{task} {size} images at once did not fit on {self.device}; going on with at most {size // 2}, "
                "which may round differently",
                file=sys.stderr,
            )
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # after the except clause, because its exception holds the tensors
        return results

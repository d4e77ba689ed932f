"""How many images fit on a device at once: chosen from its free memory, made smaller where that was too many."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

import psutil
import torch

from stages.common.runtime import UserError

Result = TypeVar("Result")
USED = 0.8  # share of the free memory; the rest is for activations and fragmentation


class Memory:
    """The memory of one device. A piece that did not fit is split and done again, and later pieces stay as small."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.most: int | None = None  # bytes of the largest piece that may be tried

    def free(self) -> int:
        """Bytes that can be allocated now; on a GPU with what torch has reserved and does not use."""
        if self.device.type != "cuda":
            return int(psutil.virtual_memory().available)
        unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return torch.cuda.mem_get_info(self.device)[0] + unused

    def pieces(self, count: int, bytes_each: int, work: Callable[[slice], Result]) -> list[Result]:
        """`work` on consecutive slices of `range(count)`, as few as fit. UserError where not even one image does."""
        results, start = [], 0
        room = int(USED * self.free())
        while start < count:
            fit = max(1, min(room, self.most or room) // bytes_each)
            stop = min(count, start + fit)
            tried = stop - start
            try:
                results.append(work(slice(start, stop)))
                start = stop
                continue
            except torch.OutOfMemoryError as error:
                if tried == 1:
                    raise UserError(
                        f"{self.device}: out of memory with one image ({error}); use a larger GPU or model.dtype bfloat16"
                    ) from None
            self.most = tried // 2 * bytes_each
            print(f"{tried} images at once did not fit on {self.device}; going on with {tried // 2}", file=sys.stderr)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # only here, past the except clause, has the failed attempt let go of its tensors
        return results

"""Whether this machine has a GPU, told without torch, whose import takes seconds."""

from __future__ import annotations

import os
from pathlib import Path

DEVICES = (Path("/dev/nvidiactl"), Path("/dev/kfd"), Path("/dev/dxg"))  # of NVIDIA, of AMD, and of Windows' Linux subsystem


def gpu_is_here() -> bool:
    """Return whether a driver of GPUs is loaded and CUDA_VISIBLE_DEVICES does not hide all of them."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "all") not in ("", "-1") and any(path.exists() for path in DEVICES)

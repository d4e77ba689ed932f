"""Peak performance of GPUs, from which utilisation is computed."""

from __future__ import annotations

# Memory bandwidth in bytes/s from the data sheets, and dense bfloat16 FLOP/s as the best dense kernels reach them.
DEVICES = {"H100": (3.35e12, 8.0e14), "H200": (4.8e12, 8.0e14), "A100": (2.04e12, 3.0e14)}


def peak_flops(device: str) -> float | None:
    """Return the dense bfloat16 FLOP/s of the device of that name, or None if it is not in the table."""
    return next((compute for name, (_, compute) in DEVICES.items() if name in device), None)

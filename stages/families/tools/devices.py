"""What devices can do, for figures as a fraction of it."""

from __future__ import annotations

# memory bandwidth in bytes/s, dense bfloat16 FLOP/s; data sheets, FLOP/s at what dense kernels reach on them
DEVICES = {"H100": (3.35e12, 8.0e14), "H200": (4.8e12, 8.0e14), "A100": (2.04e12, 3.0e14)}


def peak_flops(device: str) -> float | None:
    """Dense bfloat16 FLOP/s of the device of that name; None where it is not known."""
    return next((compute for name, (_, compute) in DEVICES.items() if name in device), None)

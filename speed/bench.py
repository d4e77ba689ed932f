"""What the benchmarks share: clocks, versions, the table and the JSON."""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from speed.models import NAMES


def parser(description: str | None) -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--config", choices=NAMES, required=True, help="geometry; random weights but for tiny-janus")
    result.add_argument("--prompts", type=int, default=4)
    result.add_argument("--candidates", type=int, default=10)
    result.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    result.add_argument("--dtype", help="default: bfloat16 on a GPU, else float32")
    result.add_argument("--only", nargs="+", help="of the results, these alone")
    result.add_argument("--out", type=Path, help="JSON")
    return result


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    found = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return f"{found[0] if found else platform.processor()}, {torch.get_num_threads()} threads"


def timed(device: str, work: Callable[[], Any]) -> tuple[float, int]:
    """Seconds, and peak bytes: allocated on a GPU; on a CPU the highest this process has ever held."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        return time.perf_counter() - start, torch.cuda.max_memory_allocated()
    return time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def report(name: str, arguments: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    """Print the table; write the JSON where --out is given."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    facts = {
        "benchmark": name,
        "config": arguments.config,
        "prompts": arguments.prompts,
        "candidates": arguments.candidates,
        "device": device_name(arguments.device),
        "dtype": arguments.dtype,
        "versions": {package: version(package) for package in ("torch", "transformers")},
        "commit": commit,
        "results": results,
    }
    print(f"{name}, {arguments.config}, {arguments.prompts} x {arguments.candidates}, {facts['device']}, {arguments.dtype}")
    for row in results:
        floor = row["fraction_of_floor"]
        share = "" if floor is None else f"{100 * floor:8.1f} % of the floor"
        print(
            f"{row['name']:<26} {row['images_per_second']:9.2f} images/s {row['seconds_per_1000_images']:10.1f} s/1000"
            f"{row['peak_memory_bytes'] / 2**30:8.2f} GiB{share}"
        )
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(facts, indent=2) + "\n")

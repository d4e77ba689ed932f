"""What the benchmarks share: clocks, versions, the table and the JSON."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from speed.cost import Cost
from speed.models import NAMES
from speed.records import commit, processor, write


def parser(description: str | None) -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--config", choices=NAMES, required=True, help="geometry; random weights but for tiny-janus")
    result.add_argument("--prompts", type=int, default=4)
    result.add_argument("--candidates", type=int, default=10)
    result.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    result.add_argument("--dtype", help="default: bfloat16 on a GPU, else float32")
    result.add_argument("--no-warm-up", action="store_true", help="time the first call; for runs of many minutes")
    result.add_argument("--only", nargs="+", help="of the results, these alone")
    result.add_argument("--out", type=Path, help="JSON")
    return result


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{processor()}, {torch.get_num_threads()} threads"


def timed(device: str, work: Callable[[], Any]) -> tuple[float, int | None]:
    """Seconds, and peak bytes allocated on a GPU; None on a CPU, where the process's own peak never falls again."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        return time.perf_counter() - start, torch.cuda.max_memory_allocated()
    return time.perf_counter() - start, None


def result(
    name: str, images: int, seconds: float, peak: int | None, least: Cost, device: str, devices: int = 1
) -> dict[str, Any]:
    """A way's row of the table and the JSON; the floor is that of `devices` of its device, and of no cost there is none."""
    floor = least.floor_seconds(device_name(device)) or None
    return {
        "name": name,
        "images_per_second": images / seconds,
        "seconds_per_1000_images": 1000 * seconds / images,
        "fraction_of_floor": None if floor is None else floor * images / seconds / devices,
        "peak_memory_bytes": peak,
        "bytes_per_image": least.bytes,
        "flops_per_image": least.flops,
    }


def compare(
    arguments: argparse.Namespace, ways: Mapping[str, Callable[[], Any]], images: int, least: Cost
) -> list[dict[str, Any]]:
    """One result for each way of making or judging `images` images: run once to warm up, then once on the clock."""
    results: list[dict[str, Any]] = []
    for name, way in ways.items():
        if arguments.only and name not in arguments.only:
            continue
        if not arguments.no_warm_up:
            way()
        seconds, peak = timed(arguments.device, way)
        results.append(result(name, images, seconds, peak, least, arguments.device))
        print(f"{name}: {seconds:.1f} s", flush=True)
    return results


def facts(name: str, device: str, dtype: str) -> dict[str, Any]:
    """What a JSON says of the run beside its results."""
    return {
        "benchmark": name,
        "device": device_name(device),
        "dtype": dtype,
        "versions": {package: version(package) for package in ("torch", "transformers")},
        "commit": commit(),
    }


def line(row: dict[str, Any], width: int = 26, unit: str = "images") -> str:
    """A result as a line of the table, with `width` letters for its name."""
    floor = row["fraction_of_floor"]
    share = "" if floor is None else f"{100 * floor:8.1f} % of the floor"
    memory = "" if row["peak_memory_bytes"] is None else f"{row['peak_memory_bytes'] / 2**30:8.2f} GiB"
    return (
        f"{row['name']:<{width}} {row['images_per_second']:9.2f} {unit}/s {row['seconds_per_1000_images']:10.1f} s/1000"
        f"{memory}{share}"
    )


def report(name: str, arguments: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    """Print the table; write the JSON where --out is given."""
    told = facts(name, arguments.device, arguments.dtype)
    told |= {key: getattr(arguments, key) for key in ("config", "prompts", "candidates")} | {"results": results}
    print(f"{name}, {arguments.config}, {arguments.prompts} x {arguments.candidates}, {told['device']}, {arguments.dtype}")
    for row in results:
        print(line(row))
    if arguments.out:
        write(arguments.out, told)

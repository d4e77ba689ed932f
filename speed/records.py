"""What every benchmark's JSON says, and how it is written. Imports nothing heavy."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def commit() -> str:
    """What `git describe` calls the sources; empty where they are no clone, or git is not installed."""
    if not shutil.which("git"):
        return ""
    described = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(described, capture_output=True, text=True).stdout.strip()


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    found = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return found[0] if found else platform.processor()


def write(path: Path, facts: dict[str, Any]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_name(path.name + ".partial")
    whole.write_text(json.dumps(facts, indent=2) + "\n")
    whole.replace(path)

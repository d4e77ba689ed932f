"""Several processes that share the batches of one stage, each on a GPU of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from stages.common.errors import UserError

PROCESS = "SELFGAP_PROCESS"  # "k/n" in the environment of the k-th of n processes that share a stage's batches


def command() -> list[str]:
    """Return what follows `python` in this process's own command line."""
    stage = sys.modules["__main__"].__spec__
    assert stage is not None, "a stage runs as python -m stages.<name>"
    return ["-m", stage.name, *sys.argv[1:]]


def helping() -> tuple[int, int] | None:
    """Return (k, n) in a process that `helpers` has started, None in one that the user has started."""
    if PROCESS not in os.environ:
        return None
    number, count = os.environ[PROCESS].split("/")
    return int(number), int(count)


@contextmanager
def helpers(count: int) -> Iterator[None]:
    """Run this process's command as `count` - 1 further processes, each on a GPU of its own, and wait for them at the end.

    `stages.families.require_gpus` says whether there are as many. Raises UserError when one of the processes fails.
    """
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = [name for name in (listed or "").split(",") if name not in ("", "-1")]
    started = []
    for number in range(1, count):
        environment = os.environ | {PROCESS: f"{number}/{count}"}
        if listed is None:
            environment["CUDA_VISIBLE_DEVICES"] = str(number)
        elif number < len(visible):  # fewer are listed only where the processes use the CPU
            environment["CUDA_VISIBLE_DEVICES"] = visible[number]
        started.append(subprocess.Popen([sys.executable, *command()], env=environment))
    try:
        yield
        failed = sum(process.wait() != 0 for process in started)
    finally:
        for process in started:
            process.terminate()
    if failed:
        raise UserError(f"{failed} of {count} processes failed, see above; finished batches are kept, so run it again")

"""Files that are whole or absent, and one writer at a time."""

from __future__ import annotations

import csv
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from stages.common.errors import UserError

DAY = 86_400  # seconds


def process_lives(number: int) -> bool:
    """Whether this machine runs a process with that number. A killed process that nobody has waited for yet counts as dead."""
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    return False


def aside(path: Path) -> Path:
    """A temporary name beside `path`. It contains the machine and the process, so two writers never share it.

    Leftovers of killed writers are removed: those of this machine at once, those of other machines after a day without a
    change, because their writers may still be alive.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    here = socket.gethostname()
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        machine, _, number = left.name.removeprefix(f".{path.name}.").removesuffix(".tmp").rpartition(".")
        with suppress(FileNotFoundError):
            if not process_lives(int(number)) if machine == here else time.time() - left.stat().st_mtime > DAY:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
    return path.with_name(f".{path.name}.{here}.{os.getpid()}.tmp")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`. On success it is synced and renamed, so a file that exists is complete."""
    temporary = aside(path)
    temporary.touch()
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # pyarrow's and write's name no file
            raise OSError(error.errno, os.strerror(error.errno) if error.errno else str(error), str(path)) from error
        raise


def claim(path: Path) -> Callable[[], None]:
    """Record in `path` that this process is the writer. The returned function raises UserError once another process is.

    A cluster may start a job again while its first process is still alive on a node that the cluster has lost contact with.
    The later process takes over, and the earlier one stops before it overwrites or removes anything.
    """
    writer = f"{socket.gethostname()}, process {os.getpid()}, since {time.strftime('%F %T')}, claim {uuid.uuid4()}"
    with whole_file(path) as temporary:
        temporary.write_text(writer)

    def held() -> None:
        now = path.read_text() if path.exists() else "a writer that has finished"
        if now != writer:
            raise UserError(f"{path.parent}: taken over by {now}; this process ({writer}) stops")

    return held


def sync(path: Path) -> None:
    """Call fsync on a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a table with these columns. Numbers are rounded to three decimal places, and what a row lacks is left empty."""
    with whole_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for row in rows:
            known = {column: row.get(column) for column in columns}
            writer.writerow({k: round(v, 3) if isinstance(v, float) else v for k, v in known.items()})

"""How a stage meets the outside: clear errors, whole files, progress."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

DAY = 86_400  # seconds


class UserError(Exception):
    """Something the user can mend: the message names the file, the field and the remedy."""


def run_stage(main: Callable[[], None]) -> None:
    """Run a stage's main; a UserError, a failing disk or a missing package becomes one line on stderr and exit code 1.

    SIGTERM (a cluster's time limit, preemption or scancel) unwinds the stage, so that temporary files and helpers go.
    """

    def ended(*_: object) -> None:
        sys.exit("error: ended by SIGTERM (cancelled, preempted or out of time); what was finished is kept, run again")

    signal.signal(signal.SIGTERM, ended)
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error} on {socket.gethostname()}; this machine needs the environment of `make setup` ({sys.prefix})")
    except BrokenPipeError:
        sys.exit(1)
    except OSError as error:
        where = error.filename or "output"
        sys.exit(f"error: {where}: {error.strerror or error}; check the path, its permissions and the free space")


def process_lives(number: int) -> bool:
    """Whether this machine runs a process of that number; one that was killed and not yet waited for is dead."""
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
    """A name beside `path` for what is being written; machine and process are in it, so that two writers do not meet.

    What killed writers left is removed: of this machine's at once, of another machine's after a day without a change.
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
    """A temporary path beside `path`; on success it is synced and renamed, so a file that exists is whole."""
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
    """Write into `path` that this process is the writer now; the function returned raises UserError when another one is.

    A cluster may start a job again while its first process lives on, on a node that it has lost sight of: the later one
    takes over, the earlier one ends before it overwrites or removes anything.
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
    """fsync of a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""How a stage meets the outside: clear errors, whole files, progress."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """Something the user can mend: the message names the file, the field and the remedy."""


def run_stage(main: Callable[[], None]) -> None:
    """Run a stage's main; a UserError or a failing disk becomes one line on stderr and exit code 1."""
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except BrokenPipeError:
        sys.exit(1)
    except OSError as error:
        where = error.filename or "output"
        sys.exit(f"error: {where}: {error.strerror or error}; check the path, its permissions and the free space")


def process_lives(number: int) -> bool:
    """Whether this machine runs a process of that number."""
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; on success it is synced and renamed, so a file that exists is whole.

    Its name holds machine and process: two writers do not meet, and what a killed one left is removed here.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}.{socket.gethostname()}."
    for left in path.parent.glob(f"{prefix}*.tmp"):
        if not process_lives(int(left.name.removeprefix(prefix).removesuffix(".tmp"))):
            left.unlink(missing_ok=True)
    temporary = path.with_name(f"{prefix}{os.getpid()}.tmp")
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


def sync(path: Path) -> None:
    """fsync of a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

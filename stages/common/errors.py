"""Errors that the user can correct, and how a stage's command ends when one occurs."""

from __future__ import annotations

import signal
import socket
import sys
from collections.abc import Callable


class UserError(Exception):
    """A problem that the user can correct. The message names the file, the field and the remedy."""


def run_stage(main: Callable[[], None]) -> None:
    """Run a stage's main function and turn expected failures into one line on stderr and exit code 1.

    Expected failures are UserError, a failing disk and a missing package. SIGTERM (sent by a cluster at the time limit, on
    preemption and on cancellation) unwinds the stage, so that its temporary files and helper processes are removed.
    """

    def ended(*_: object) -> None:
        sys.exit("error: ended by SIGTERM (cancelled, preempted or out of time); finished work is kept, so run it again")

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

"""Run a stage as several processes that work together: one for each GPU of a node, on one node or on many.

torchrun starts and watches the processes. On several nodes one launcher runs on each, and all meet at the first node:

- in a SLURM allocation the first launcher starts the others with `srun`, one a node, and takes the meeting point from the
  allocation (`SLURM_JOB_ID`: of its variables the one that Snakemake's plugin leaves to the job's processes);
- elsewhere the same command is started once on each node, with `MASTER_ADDR` and `MASTER_PORT` (the first node, the same
  everywhere) and `NODE_RANK` (0 on the first node) in its environment.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

from stages.common.runtime import UserError

STOPPED = 75  # exit code of a stage that a signal stopped after it had saved: run it again (EX_TEMPFAIL of sysexits.h)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
PATIENCE = 600  # seconds that processes have to save after a stop signal before they are killed


def rank() -> int:
    """This process's number among all; 0 where there is one."""
    return int(os.environ.get("RANK", 0))


def local_rank() -> int | None:
    """This process's number on its node, and so its GPU; None in a process that works alone."""
    return int(os.environ["LOCAL_RANK"]) if "LOCAL_RANK" in os.environ else None


def launched(processes: int, nodes: int) -> None:
    """Return in a process that a launcher has started; else start them all with this process's own command line, wait, and
    exit as they did. Raises UserError where the nodes cannot meet."""
    if local_rank() is not None:
        if int(os.environ["WORLD_SIZE"]) != processes * nodes:
            raise UserError(
                f"{os.environ['WORLD_SIZE']} processes run, but train.gpus x train.nodes is {processes} x {nodes}; "
                "start the stage itself, it starts its processes"
            )
        return
    if nodes == 1 or "MASTER_ADDR" in os.environ:
        sys.exit(on_this_node(processes, nodes))
    if "SLURM_JOB_ID" in os.environ:
        sys.exit(on_every_node(nodes))
    raise UserError(f"train.nodes is {nodes}: run in a SLURM allocation, or set MASTER_ADDR, MASTER_PORT and NODE_RANK")


def command() -> list[str]:
    """What follows `python` in this process's command line."""
    stage = sys.modules["__main__"].__spec__
    assert stage is not None, "a stage runs as python -m stages.<name>"
    return ["-m", stage.name, *sys.argv[1:]]


def asked(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def on_every_node(nodes: int) -> int:
    """Start this command once on each node of the allocation; --overlap, since this process holds a step of it already."""
    job = os.environ["SLURM_JOB_ID"]
    names = asked("squeue", "--noheader", "--format=%N", "--job", job).strip()
    first = asked("scontrol", "show", "hostnames", names).split()[0]
    address = re.search(r"\bNodeAddr=(\S+)", asked("scontrol", "show", "node", first))
    port = 20000 + int(job) % 10000
    tasks = [f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--cpu-bind=none", "--kill-on-bad-exit=1"]
    started = subprocess.Popen(
        ["srun", "--overlap", *tasks, sys.executable, *command()],
        env=os.environ | {"MASTER_ADDR": address.group(1) if address else first, "MASTER_PORT": str(port)},
    )
    for number in STOP_SIGNALS:  # srun passes SIGUSR1 on; SIGTERM makes it kill its tasks
        signal.signal(number, lambda *_: started.send_signal(signal.SIGUSR1))
    return abs(started.wait())


def on_this_node(processes: int, nodes: int) -> int:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    where = ["--standalone"]
    if nodes > 1:
        number = os.environ.get("NODE_RANK", os.environ.get("SLURM_NODEID", "0"))
        where = [f"--nnodes={nodes}", f"--node-rank={number}", "--rdzv-backend=static"]
        where += [f"--master-addr={os.environ['MASTER_ADDR']}", f"--master-port={os.environ['MASTER_PORT']}"]
    handled = ",".join(["SIGINT", "SIGHUP", "SIGQUIT", *(number.name for number in STOP_SIGNALS)])
    options = [f"--nproc-per-node={processes}", f"--signals-to-handle={handled}", f"--shutdown-timeout={PATIENCE}"]
    try:
        run(parse_args([*where, *options, *command()]))
    except SignalException as stop:
        return STOPPED if stop.sigval in STOP_SIGNALS else 128 + stop.sigval
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code  # killed by a signal: as a shell reports it
    return 0

"""Run a stage as several cooperating processes: one for each GPU, on one node or on several.

torchrun starts and watches the processes. With several nodes, one launcher runs on each node, and they rendezvous at the first:

- In a SLURM allocation, the first launcher starts one launcher on each node with `srun` and derives address and port from the
  allocation. It recognises an allocation by `SLURM_JOB_ID`, the only SLURM variable that Snakemake's plugin leaves to the
  processes of a job.
- Elsewhere, the user starts the same command once on each node. Its environment contains `MASTER_ADDR` and `MASTER_PORT`, which
  name the first node and are the same everywhere, and `NODE_RANK`, which is 0 on the first node.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

from stages.common.errors import UserError
from stages.common.processes import command

STOPPED = 75  # exit code of a stage that saved and stopped on a signal; run it again (EX_TEMPFAIL of sysexits.h)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
PATIENCE = 600  # seconds in which processes may save after a stop signal before they are killed


def rank() -> int:
    """Return the number of this process among all processes; 0 if there is only one."""
    return int(os.environ.get("RANK", 0))


def local_rank() -> int | None:
    """Return the number of this process (and its GPU) on its node; None if no launcher started it."""
    return int(os.environ["LOCAL_RANK"]) if "LOCAL_RANK" in os.environ else None


def launched(processes: int, nodes: int) -> None:
    """Return at once in a process that a launcher has started; otherwise start all processes, wait, and exit.

    The processes run this process's own command line, and their exit code becomes its own. Raises UserError when there is no
    way to reach the other nodes.
    """
    if local_rank() is not None:
        if int(os.environ["WORLD_SIZE"]) != processes * nodes:
            raise UserError(
                f"{os.environ['WORLD_SIZE']} processes run, but train.gpus x train.nodes is {processes} x {nodes}; "
                "run the stage without torchrun, because it starts its own processes"
            )
        return
    if nodes == 1 or "MASTER_ADDR" in os.environ:
        sys.exit(on_this_node(processes, nodes))
    if "SLURM_JOB_ID" in os.environ:
        sys.exit(on_every_node(nodes))
    raise UserError(f"train.nodes is {nodes}: run in a SLURM allocation, or set MASTER_ADDR, MASTER_PORT and NODE_RANK")


def asked(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def on_every_node(nodes: int) -> int:
    """Start this command once on each node of the allocation and return its exit code.

    --overlap is needed because this process already occupies a step of the allocation.
    """
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
    for number in STOP_SIGNALS:  # srun forwards SIGUSR1 to its tasks, but kills them on SIGTERM
        signal.signal(number, lambda *_: started.send_signal(signal.SIGUSR1))
    return abs(started.wait())


def on_this_node(processes: int, nodes: int) -> int:
    """Start this node's processes with torchrun and return their exit code."""
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
        return code if code > 0 else 128 - code  # killed by a signal: reported as a shell does
    return 0

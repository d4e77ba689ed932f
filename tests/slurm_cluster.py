"""A real SLURM on one machine: a controller and three nodes, two of which have two GPUs each (device files, no hardware).

    python -m tests.slurm_cluster start [--accounting]    also installs missing packages with apt-get, as root
    python -m tests.slurm_cluster stop

It needs root, but neither systemd nor cgroups; without cgroups SLURM itself monitors the memory of jobs. The nodes may declare
more cores and memory than the machine has, because these tests do not measure speed. SLURM's commands and Snakemake's jobs find
the cluster through /etc/slurm/slurm.conf, which becomes a symbolic link. An existing file of another cluster is left unchanged.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge", "slurmdbd", "mariadb-server")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "slurmdbd", "mariadbd")
FOLDER = Path("/var/tmp/selfgap-slurm")
SYSTEM = Path("/etc/slurm")
NODES = ("node1", "node2", "node3")

SLURM = """\
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort=26817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=10
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdSpoolDir={folder}/spool/%n
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/log/%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=20
KillWait=5
MinJobAge=3600
JobRequeue=0
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill,UsePss
{accounting}
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port=27001 CPUs=4 RealMemory=32000
NodeName=node[2-3] NodeHostname={host} NodeAddr=127.0.0.1 Port=[27002-27003] CPUs=4 RealMemory=32000 Gres=gpu:2
PartitionName=cpu Nodes=node1 Default=YES OverTimeLimit=0
PartitionName=gpu Nodes=node[2-3] OverTimeLimit=0
"""
GRES = """\
AutoDetect=off
NodeName=node[2-3] Name=gpu File={folder}/dev/gpu[0-1]
"""
ACCOUNTING = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePort=26819
AccountingStorageTRES=gres/gpu"""
SLURMDBD = """\
AuthType=auth/munge
DbdHost=localhost
DbdPort=26819
SlurmUser=root
PidFile={folder}/slurmdbd.pid
LogFile={folder}/log/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm
"""


def run(*command: object) -> str:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(str(part) for part in command)}: {result.stderr or result.stdout}")
    return result.stdout


def missing() -> str:
    """Return the reason why no cluster can be started here, or an empty text if one can."""
    if os.geteuid():
        return "the cluster's daemons need root"
    lacking = [program for program in PROGRAMS if not shutil.which(program)]
    if lacking:
        return f"{', '.join(lacking)} not found; on Debian or Ubuntu: apt-get install {' '.join(PACKAGES)}"
    if (SYSTEM / "slurm.conf").exists() and (SYSTEM / "slurm.conf").resolve().parent != FOLDER:
        return f"{SYSTEM}/slurm.conf belongs to another cluster"
    return ""


def install() -> None:
    if any(not shutil.which(program) for program in PROGRAMS) and not os.geteuid() and shutil.which("apt-get"):
        print(f"installing {' '.join(PACKAGES)}", flush=True)
        run("apt-get", "update", "-qq")
        run("env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "install", "-qq", "--no-install-recommends", *PACKAGES)


def wait_for(what: str, condition, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            sys.exit(f"{what}: not within {seconds:.0f} s, see {FOLDER}/log")
        time.sleep(0.1)


def process(name: str) -> int | None:
    """Return the process id of a daemon, or None if it is not running."""
    try:
        number = int((FOLDER / f"{name}.pid").read_text())
        os.kill(number, 0)
        return number
    except (FileNotFoundError, ValueError, ProcessLookupError):
        return None


def end(name: str, how: signal.Signals = signal.SIGTERM) -> None:
    """Stop a daemon: munged, mariadbd, slurmdbd, slurmctld, or a node's slurmd by the node's name."""
    number = process(name)
    if number:
        os.kill(number, how)
        wait_for(f"{name} to end", lambda: process(name) is None)


def start_controller() -> None:
    run("slurmctld")
    wait_for("slurmctld", lambda: subprocess.run(["scontrol", "ping"], capture_output=True).returncode == 0)


def start_node(name: str, without: Path | None = None) -> None:
    """Start a node's slurmd. On that node the folder `without` is empty, as if its file system were not mounted."""
    if without:
        run("unshare", "--mount", "sh", "-c", 'mount -t tmpfs tmpfs "$0" && exec slurmd -N "$1"', without, name)
    else:
        run("slurmd", "-N", name)
    wait_for(f"slurmd of {name}", lambda: process(name))


def nodes_up() -> bool:
    states = run("sinfo", "--noheader", "--Node", "--format=%N %t").splitlines()
    return {line.split()[0] for line in states if line.split()[1] in ("idle", "mix", "alloc")} == set(NODES)


def start_database() -> None:
    data, door = FOLDER / "database", FOLDER / "database.socket"
    os.environ["MYSQL_UNIX_PORT"] = str(door)
    run("mariadb-install-db", "--no-defaults", f"--datadir={data}", "--user=root", "--auth-root-authentication-method=socket")
    log = (FOLDER / "log" / "mariadbd.log").open("w")
    options = [f"--datadir={data}", f"--socket={door}", f"--pid-file={FOLDER}/mariadbd.pid", "--user=root"]
    command = ["mariadbd", "--no-defaults", "--skip-networking", *options]
    subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    wait_for("mariadbd", lambda: process("mariadbd") and door.exists())
    run("slurmdbd")
    ready = ["sacctmgr", "--immediate", "--quiet", "add", "cluster", "loopback"]
    wait_for("slurmdbd", lambda: subprocess.run(ready, capture_output=True).returncode == 0)


def start(accounting: bool) -> None:
    """Start a new cluster without jobs."""
    install()
    if reason := missing():
        sys.exit(f"no SLURM here: {reason}")
    stop()
    for part in ("state", "log", "dev", *(f"spool/{node}" for node in NODES)):
        (FOLDER / part).mkdir(parents=True)
    for number in (0, 1):  # fake GPUs: the same device numbers as /dev/null
        os.mknod(FOLDER / f"dev/gpu{number}", 0o600 | 0o020000, os.makedev(1, 3))
    known = {"folder": FOLDER, "host": socket.gethostname().split(".")[0], "accounting": ACCOUNTING if accounting else ""}
    SYSTEM.mkdir(exist_ok=True)
    for name, text in (("slurm.conf", SLURM), ("gres.conf", GRES), ("slurmdbd.conf", SLURMDBD)):
        (FOLDER / name).write_text(text.format(**known))
        (FOLDER / name).chmod(0o600 if name == "slurmdbd.conf" else 0o644)
        (SYSTEM / name).unlink(missing_ok=True)
        (SYSTEM / name).symlink_to(FOLDER / name)
    key = FOLDER / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    Path("/run/munge").mkdir(exist_ok=True)
    run("munged", "--force", f"--key-file={key}", f"--pid-file={FOLDER}/munged.pid", f"--seed-file={FOLDER}/munge.seed",
        f"--log-file={FOLDER}/log/munged.log")  # fmt: skip
    if accounting:
        start_database()
    start_controller()
    for node in NODES:
        start_node(node)
    wait_for("nodes", nodes_up)


def stop() -> None:
    """End all jobs and daemons and remove all files of the cluster."""
    if process("slurmctld"):
        subprocess.run(["scancel", "--user", "root"], capture_output=True, timeout=20)
        queue = ["squeue", "--noheader", "--states=running,completing"]
        wait_for("jobs to end", lambda: not subprocess.run(queue, capture_output=True).stdout)
    for name in (*NODES, "slurmctld", "slurmdbd", "mariadbd", "munged"):
        end(name)
    for name in ("slurm.conf", "gres.conf", "slurmdbd.conf"):
        if (SYSTEM / name).is_symlink():
            (SYSTEM / name).unlink()
    shutil.rmtree(FOLDER, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("start", "stop"))
    parser.add_argument("--accounting", action="store_true", help="start slurmdbd with its own database")
    arguments = parser.parse_args()
    if arguments.action == "stop":
        return stop()
    start(arguments.accounting)
    print(run("sinfo", "--Node", "--format=%N %P %c %m %G %t"), end="")
    return None


if __name__ == "__main__":
    main()

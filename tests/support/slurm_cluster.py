"""A real Slurm cluster of emulated nodes on this machine, without root.

munged, slurmctld and one slurmd per node run as the current user. Key, sockets, configuration, state and
logs are in one folder; nothing under /etc or /var is read or written. To start a cluster interactively
until Ctrl-C: ``python -m tests.support.slurm_cluster FOLDER [NODES]``.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from .commands import ROOT

DAEMONS = ("munged", "slurmctld", "slurmd")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"  # folders of the daemons
needs_slurm = pytest.mark.skipif(
    not all(shutil.which(name, path=PATH) for name in DAEMONS),
    reason="no slurmctld, slurmd or munged: install Slurm (docs/slurm.md)",
)

_COMMAND_TIMEOUT_S = 60
_POLL_S = 0.5

# preempt_send_user_signal sends the signal of sbatch --signal to the batch script of a preempted job at
# once. The job then has GraceTime to save. Jobs choose ports by their ids, so two clusters on one machine
# must not use the same ids. cred_expire is also the time that a requeued job has to wait. The GPUs of the
# nodes are arbitrary device files.
_SLURM_CONF = """
ClusterName=emulated
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
FirstJobId={first_job}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SlurmdParameters=config_overrides
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,sched_min_interval=0,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
KillWait=60
MinJobAge=3600
SlurmctldTimeout=30
SlurmdTimeout=30
MessageTimeout=30
NodeName=DEFAULT CPUs=4 Boards=1 SocketsPerBoard=1 CoresPerSocket=4 ThreadsPerCore=1 RealMemory=4096 \
Gres=gpu:8
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=60 PriorityTier=1 PreemptMode=REQUEUE GraceTime=120
PartitionName=high Nodes=ALL MaxTime=60 PriorityTier=10 PreemptMode=OFF
"""


class SlurmCluster:
    """Running cluster; ``stop`` ends it with all its jobs.

    If this process dies without calling ``stop``, the daemons die too.

    Args:
        folder: new folder with a short name, because it contains sockets.
        num_nodes: number of nodes, which are called node1, node2, ...

    Raises:
        RuntimeError: the cluster did not start; the message contains the end of the daemons' logs.
    """

    def __init__(self, folder: Path, num_nodes: int = 2) -> None:
        self.folder = folder.absolute()
        self.nodes = [f"node{i}" for i in range(1, num_nodes + 1)]
        self.env = {**os.environ, "PATH": PATH, "SLURM_CONF": str(self.folder / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._write_configuration()
        try:
            socket_file = self.folder / "munge.sock"
            files = [f"--{name}-file={self.folder / name}" for name in ("key", "pid", "log", "seed")]
            self._start_daemon(
                "munged", "munged", "--foreground", "--force", f"--socket={socket_file}", *files
            )
            self.until(socket_file.is_socket, 20)
            self._start_daemon("slurmctld", "slurmctld", "-D")
            for node in self.nodes:
                self.start_node(node)
            self.until(
                lambda: (
                    set(self.nodes)
                    <= set(self.run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N", check=False).split())
                ),
                60,
            )
        except BaseException:
            self.stop()
            raise

    def run(self, *command: object, check: bool = True, **options: Any) -> str:
        """Run a Slurm command; return its stdout and stderr without the last line feed."""
        done = subprocess.run(
            list(map(str, command)),
            env=self.env | options.pop("env", {}),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_COMMAND_TIMEOUT_S,
            **options,
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))}: {done.stdout}")
        return done.stdout.rstrip("\n")

    def job(self, job: int) -> dict[str, str]:
        """Return the fields of ``scontrol show job``, e.g. JobState, Restarts, ExitCode, Reason."""
        return dict(
            re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "show", "job", "-o", job).splitlines()[0])
        )

    def state(self, job: int) -> str:
        return self.job(job)["JobState"]

    def wait(self, job: int, states: Collection[str], timeout_s: float) -> dict[str, str]:
        """Wait until the job is in one of the states and return its fields.

        Raises:
            RuntimeError: the job did not reach one of the states within the timeout.
        """
        self.until(
            lambda: self.state(job) in states,
            timeout_s,
            lambda: f"job {job} is {self.job(job)}, not {' or '.join(states)}",
        )
        return self.job(job)

    def start_node(self, node: str) -> None:
        """Start the node's slurmd; if it ran before, Slurm then knows that no job survived on the node."""
        self._start_daemon(node, "slurmd", "-D", "-b", "-N", node)

    def kill_node(self, node: str) -> None:
        """Simulate a power failure: kill all processes of the node at once, its slurmd first."""
        self._daemons[node].kill()
        self._daemons[node].wait()
        # Repeat for processes that were just being forked.
        while tasks := self.processes(node):
            keepers = {
                parent
                for task in tasks
                for parent in task.parents()
                if parent.name().startswith("slurmstepd")
            }
            # In this order, no stepd reports the end of its tasks.
            for process in [*keepers, *tasks]:
                _kill(process)

    def processes(self, node: str | None = None, job: int | None = None) -> list[psutil.Process]:
        """Return the processes that jobs have started, optionally only those of one node or of one job."""
        found = []
        for process in psutil.process_iter():
            try:
                env = process.environ()
            except psutil.Error:
                continue
            ours = env.get("SLURM_CONF") == self.env["SLURM_CONF"] and env.get("SLURMD_NODENAME", "") in (
                [node] if node else self.nodes
            )
            if ours and (job is None or env.get("SLURM_JOB_ID") == str(job)):
                found.append(process)
        return found

    def stop(self) -> None:
        for daemon in self._daemons.values():
            daemon.kill()
        for daemon in self._daemons.values():
            daemon.wait()
        for process in self.processes():
            _kill(process)

    def _start_daemon(self, key: str, *command: str) -> None:
        with (self.folder / f"{key}.out").open("ab") as out:
            # processes() recognises the steps of this cluster by SLURM_CONF in the environment of their
            # slurmd
            self._daemons[key] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )

    def until(
        self, holds: Callable[[], bool], timeout_s: float, problem: Callable[[], str] | None = None
    ) -> None:
        """Poll until ``holds()`` is true.

        Raises:
            RuntimeError: the timeout has passed. The message is ``problem()`` or the end of the daemons'
                logs.
        """
        deadline = time.monotonic() + timeout_s
        while not holds():
            if time.monotonic() > deadline:
                raise RuntimeError(
                    problem()
                    if problem
                    else f"not within {timeout_s:g} s; the daemons say:\n{self._last_words()}"
                )
            time.sleep(_POLL_S)

    def _last_words(self) -> str:
        logs = [*self.folder.glob("*.out"), *self.folder.glob("*.log"), self.folder / "log"]
        return "\n".join(
            f"{log.name}: {log.read_text(errors='replace')[-1500:]}" for log in logs if log.is_file()
        )

    def _write_configuration(self) -> None:
        host = socket.gethostname().split(".")[0]
        ports = _free_ports(1 + len(self.nodes))
        user = psutil.Process().username()
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port}"
            for node, port in zip(self.nodes, ports[1:], strict=True)
        )
        (self.folder / "state").mkdir(parents=True)
        for node in self.nodes:
            (self.folder / f"spool.{node}").mkdir()
        key = self.folder / "key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(1024))
        conf = _SLURM_CONF.format(
            host=host,
            port=ports[0],
            first_job=1 + secrets.randbelow(60_000),
            user=user,
            folder=self.folder,
            nodes=nodes,
        )
        (self.folder / "slurm.conf").write_text(conf)
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        gpus = f"NodeName={','.join(self.nodes)} Name=gpu File=/dev/tty[0-7]\n"
        (self.folder / "gres.conf").write_text(gpus)


def _kill(process: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        process.kill()


def _free_ports(count: int) -> list[int]:
    """Return ports on which nobody listens now, below the range for outgoing connections."""
    ports: list[int] = []
    while len(ports) < count:
        port = 6000 + secrets.randbelow(4000)
        with socket.socket() as probe:
            if port not in ports and probe.connect_ex(("127.0.0.1", port)):
                ports.append(port)
    return ports


if __name__ == "__main__":
    cluster = SlurmCluster(Path(sys.argv[1]), int(sys.argv[2]) if sys.argv[2:] else 2)
    print(f"export SLURM_CONF={cluster.env['SLURM_CONF']}", flush=True)
    try:
        time.sleep(10**9)
    except KeyboardInterrupt:
        cluster.stop()

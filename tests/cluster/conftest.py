"""A real SLURM cluster on this one machine: munge, the controller and two nodes."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "sinfo")
CONFIGURATION = """\
ClusterName=tiny
SlurmctldHost=localhost
SlurmctldPort={controller}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
KillWait=15
MinJobAge=3600
SlurmdTimeout=25
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=1,bf_interval=1
GresTypes=gpu
NodeName=node1 NodeHostname=localhost Port={node1} CPUs=4 Gres=gpu:1
NodeName=node2 NodeHostname=localhost Port={node2} CPUs=4 Gres=gpu:2
PartitionName=all Nodes=node[1-2] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=node[1-2] MaxTime=INFINITE State=UP PriorityTier=9
"""
# GPUs only by name; one node has one, the other two.
GPUS = """\
NodeName=node1 Name=gpu File=/dev/null
NodeName=node2 Name=gpu File=/dev/null
NodeName=node2 Name=gpu File=/dev/zero
"""


@dataclass
class Cluster:
    """Two nodes of 4 cores, with one GPU and two, as far as SLURM knows.

    Attributes:
        folder: configuration, state and logs of the daemons.
        environment: what SLURM's commands need to find this cluster.
    """

    folder: Path
    environment: dict[str, str]
    daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, *command: str | Path) -> None:
        """Start a daemon that stays in the foreground."""
        with (self.folder / f"{Path(command[0]).name}.out").open("ab") as out:
            self.daemons.append(
                subprocess.Popen(command, env=self.environment, stdout=out, stderr=out)
            )

    def start_node(self, name: str) -> None:
        """Start a node's daemon."""
        self.start("slurmd", "-D", "-N", name)

    def kill_node(self, name: str) -> None:
        """Kill a node's daemon and all that runs on the node, as when its power fails."""
        daemon = next(d for d in self.daemons if d.args == ("slurmd", "-D", "-N", name))
        self.daemons.remove(daemon)  # its end is no surprise
        # Another test's cluster may have nodes of the same names.
        place = (self.environment["SLURM_CONF"], name)
        doomed = [process for process in psutil.process_iter() if _place_of(process) == place]
        # Children of init, named alike on all nodes: told apart by what they have started.
        keepers = [parent for process in doomed if (parent := process.parent()) is not None]
        daemon.kill()
        for process in (*(k for k in keepers if k.name().startswith("slurmstepd")), *doomed):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        daemon.wait()

    def submit(self, *arguments: str | Path, cwd: Path, **variables: str) -> str:
        """Submit a batch job; returns its id."""
        done = subprocess.run(
            ["sbatch", "--parsable", *map(str, arguments)],
            cwd=cwd,
            env={**self.environment, **variables},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def release(self, job: str) -> None:
        """Let a requeued job start soon; SLURM puts it off for two minutes.

        Not at once: within the second of its end a node takes it for the job that it has just
        ended, and refuses it ("Job credential revoked").
        """
        self.command("scontrol", "update", f"JobId={job}", "StartTime=now+3")

    def command(self, *command: str, **variables: str) -> str:
        """Run a command, which has to succeed; returns what it prints."""
        done = subprocess.run(
            command,
            env={**self.environment, **variables},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def jobs(self) -> dict[str, str]:
        """State of every job and array task that is not long gone, such as {"4_1": "RUNNING"}."""
        # An array's pending tasks share a line unless -r asks for one each.
        lines = self.command("squeue", "-h", "-r", "-t", "all", "-o", "%i %T").splitlines()
        return dict(line.split() for line in lines)

    def wait_until(self, what: str, condition: Callable[[], bool], seconds: float = 60) -> None:
        """Wait for a condition; on failure say what the daemons logged."""
        deadline = time.monotonic() + seconds
        while not condition():
            ended = [daemon.args for daemon in self.daemons if daemon.poll() is not None]
            if ended or time.monotonic() > deadline:
                logs = [*self.folder.glob("*.log"), *self.folder.glob("*.out")]
                tails = [f"--- {log}\n{log.read_text()[-2000:]}" for log in sorted(logs)]
                pytest.fail("\n".join((f"no {what}; ended: {ended}; {self.jobs()}", *tails)))
            time.sleep(0.2)

    def stop(self) -> None:
        """End all jobs, then the daemons, the last one started first."""
        if shutil.which("scancel"):
            subprocess.run(["scancel", "--me"], env=self.environment, timeout=20, check=False)
            deadline = time.monotonic() + 10
            alive = ("RUNNING", "COMPLETING", "PENDING")
            while time.monotonic() < deadline and set(self.jobs().values()) & set(alive):
                time.sleep(0.2)
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _place_of(process: psutil.Process) -> tuple[str, str]:
    """The cluster and the node that a process runs on, as SLURM has told it."""
    try:
        environment = process.environ()
    except psutil.Error:
        return "", ""
    return environment.get("SLURM_CONF", ""), environment.get("SLURMD_NODENAME", "")


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on; all are held open until the last one is found."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for opened in sockets:
            opened.bind(("127.0.0.1", 0))
        return [opened.getsockname()[1] for opened in sockets]
    finally:
        for opened in sockets:
            opened.close()


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A running cluster with both nodes idle; all of it is gone afterwards.

    With TPP_REQUIRE_SLURM=1, as CI sets it, a machine without SLURM is a failure, not a skip.
    """
    search = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    missing = [name for name in PROGRAMS if shutil.which(name, path=search["PATH"]) is None]
    reason = f"needs {', '.join(missing)} (Debian: slurm-wlm and munge)" if missing else ""
    if os.geteuid() != 0:
        reason = "needs root, as SLURM's daemons run as root here"
    if reason:
        if os.environ.get("TPP_REQUIRE_SLURM") == "1":
            pytest.fail(reason)
        pytest.skip(reason)

    folder = tmp_path_factory.mktemp("slurm")
    controller, node1, node2 = free_ports(3)
    text = CONFIGURATION.format(folder=folder, controller=controller, node1=node1, node2=node2)
    (folder / "slurm.conf").write_text(text)
    (folder / "gres.conf").write_text(GPUS)
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o600)
    cluster = Cluster(folder, {**search, "SLURM_CONF": str(folder / "slurm.conf")})
    try:
        cluster.start(
            "munged",
            "--foreground",
            "--force",  # the socket's folder is a private one below /tmp
            f"--key-file={folder}/munge.key",
            f"--socket={folder}/munge.socket",
            f"--pid-file={folder}/munged.pid",
            f"--log-file={folder}/munged.log",
            f"--seed-file={folder}/munged.seed",
        )
        cluster.wait_until("socket of munge", (folder / "munge.socket").exists, 20)
        cluster.start("slurmctld", "-D", "-c")
        for node in ("node1", "node2"):
            cluster.start_node(node)
        cluster.wait_until("idle nodes", lambda: idle_nodes(cluster) == 2, 40)
        yield cluster
    finally:
        cluster.stop()


def idle_nodes(cluster: Cluster) -> int:
    """How many nodes have nothing to do; none while the controller does not answer."""
    done = subprocess.run(
        ["sinfo", "-h", "-N", "-t", "idle", "-o", "%N"],
        env=cluster.environment,
        capture_output=True,
        text=True,
    )
    # Each partition has a line of its own for a node.
    return len(set(done.stdout.split())) if done.returncode == 0 else 0

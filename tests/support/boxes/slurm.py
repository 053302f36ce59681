"""A real Slurm on loopback: munged, slurmctld and two slurmd, each a virtual node, in a folder of their own."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from support.processes import kill

NODES = ("n1", "n2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol", "srun")
MARK = "SAGSAE_VIRTUAL_NODE"
"""The variable that says to which virtual node a daemon and its helpers belong."""
CONF = """\
ClusterName=virtual
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[slurmctld]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# a requeued job waits until the old credential is certainly over: two minutes without cred_expire
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
# neither cgroups nor systemd
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,batch_sched_delay=0
# a node that is silent for 6 s is down; one that comes back is used again
SlurmdTimeout=6
ReturnToService=2
KillWait=20
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str:
    """Why no Slurm can be started here; empty where one can."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"needs Slurm and munge (apt-get install slurmctld slurmd munge): no {', '.join(missing)}" if missing else ""


def free_ports(count: int) -> list[int]:
    """Free ports of the loopback address."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@dataclass
class SlurmCluster:
    """The daemons and where they are. `environment` makes Slurm's commands talk to them."""

    folder: Path
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def conf(self) -> Path:
        return self.folder / "slurm.conf"

    @property
    def environment(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.conf)}

    def start(self) -> None:
        """Starts everything and waits until both nodes are idle."""
        for name in ("state", *(f"spool.{node}" for node in NODES)):
            (self.folder / name).mkdir()
        ports = dict(zip(("slurmctld", *NODES), free_ports(3), strict=True))
        host = socket.gethostname().split(".")[0]
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[node]} CPUs=2 State=UNKNOWN"
            for node in NODES
        )
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        self.conf.write_text(CONF.format(folder=self.folder, host=host, ports=ports, user=user, nodes=nodes))
        self.start_munged()
        self.daemon("slurmctld", ["slurmctld", "-D", "-f", str(self.conf)])
        for node in NODES:
            self.start_node(node)
        self.wait("idle")

    def start_munged(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        places = {"key-file": key, "socket": self.folder / "munge.socket", "pid-file": self.folder / "munge.pid",
                  "log-file": self.folder / "munge.log", "seed-file": self.folder / "munge.seed"}  # fmt: skip
        options = [f"--{name}={path}" for name, path in places.items()]
        self.daemon("munged", ["munged", "--foreground", "--force", "--num-threads=2", *options])  # --force: in /tmp
        patience = time.monotonic() + 20
        while not places["socket"].exists():
            assert time.monotonic() < patience, (self.folder / "munged.out").read_text()
            time.sleep(0.05)

    def start_node(self, node: str) -> None:
        self.daemon(node, ["slurmd", "-D", "-N", node, "-f", str(self.conf)], {MARK: node})

    def daemon(self, name: str, command: list[str], more: Mapping[str, str] | None = None) -> None:
        """`-f` is absolute: with a relative path slurmd starts, and then fails without a word."""
        environment = {**os.environ, **self.environment, **(more or {})}
        path = shutil.which(command[0])
        assert path is not None
        with (self.folder / f"{name}.out").open("ab") as out:
            self.daemons[name] = subprocess.Popen(
                [path, *command[1:]], env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )

    def run(self, *command: str) -> str:
        """The output of one of Slurm's commands."""
        environment = {**os.environ, **self.environment}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    def node_states(self) -> dict[str, str]:
        """By node: idle, mixed, allocated, down*, …"""
        words = self.run("sinfo", "--noheader", "--Node", "--format=%N %T").split()
        return dict(zip(words[::2], words[1::2], strict=True))

    def wait(self, state: str, nodes: tuple[str, ...] = NODES, seconds: float = 60) -> None:
        """Waits until so many nodes are in a state."""
        patience, seen = time.monotonic() + seconds, {}
        while time.monotonic() < patience:
            with contextlib.suppress(AssertionError):  # slurmctld is not there yet
                seen = self.node_states()
            if all(seen.get(node, "").rstrip("*") == state for node in nodes):
                return
            time.sleep(0.2)
        logs = {path.name: path.read_text(errors="replace")[-2000:] for path in self.folder.glob("*.log")}
        raise AssertionError(f"{nodes} are not {state}: {seen}\n{logs}")

    def job_node(self, job: int) -> str:
        """The node that a running job is on."""
        return self.run("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%N").strip()

    def processes(self, node: str | None = None) -> list[int]:
        """Ids of the daemons, their helpers and the jobs; of one node only, where it is named."""
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                words = set(path.read_bytes().split(b"\0"))
            except OSError:
                continue
            marks = {f"{MARK}={node}".encode(), f"SLURMD_NODENAME={node}".encode()}
            mine = f"SLURM_CONF={self.conf}".encode() in words and int(path.parent.name) != os.getpid()
            if mine and (node is None or words & marks):
                found.append(int(path.parent.name))
        return found

    def node_fails(self, node: str) -> None:
        """Kills a node's daemon, its helpers and its jobs, as a power cut does."""
        patience = time.monotonic() + 20
        while left := self.processes(node):
            for pid in left:
                kill(pid)
            self.daemons[node].poll()
            assert time.monotonic() < patience, left
            time.sleep(0.02)
        self.daemons[node].wait(10)

    def end(self) -> None:
        """Ends every job and daemon of this cluster, and nothing else."""
        for name in ("slurmctld", *NODES, "munged"):
            if name in self.daemons and self.daemons[name].poll() is None:
                self.daemons[name].send_signal(signal.SIGTERM)
        patience = time.monotonic() + 20
        while (left := self.processes()) and time.monotonic() < patience:
            for daemon in self.daemons.values():
                daemon.poll()
            if time.monotonic() > patience - 17:
                for pid in left:
                    kill(pid)
            time.sleep(0.05)
        assert not left, left
        for daemon in self.daemons.values():
            daemon.wait(10)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """Two idle nodes. A test that kills one starts it again."""
    if reason := why_not():
        pytest.skip(reason)
    cluster = SlurmCluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.end()

"""A real Slurm on such hosts: its own munged, slurmctld on the host with the bridge, a slurmd on each compute host."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Self

from cluster_disk import SharedFolder
from cluster_hosts import BRIDGE_HOST, Hosts, NoClusterError, end

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "munged")
PACKAGES = ("slurm-wlm", "munge")
START_SECONDS = 60.0
CORES, MEGABYTES = 8, 30000
"""Of each host, as Slurm is told; nothing is enforced."""

CONFIGURATION = """\
ClusterName=cbn
SlurmctldHost={controller}({address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={requeue_delay}
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MinJobAge=3600
ReturnToService=2
KillWait=5
SlurmdTimeout={slurmd_timeout}
SlurmctldTimeout=60
MessageTimeout=20
InactiveLimit=0
SchedulerParameters=sched_interval=2,batch_sched_delay=0
SlurmdParameters=config_overrides
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdSpoolDir={folder}/spool.%n
StateSaveLocation={folder}/state
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName={partition} Nodes=ALL Default=YES MaxTime=60 State=UP PriorityTier=1
PartitionName={urgent} Nodes=ALL MaxTime=60 State=UP PriorityTier=10 PreemptMode=OFF
"""
PARTITION, URGENT = "cbn", "urgent"
"""The usual partition, and the one whose jobs preempt those of the usual one, which are requeued."""
REQUEUE_DELAY = 20
"""Seconds after which a requeued job may begin again, which Slurm couples to the life of its credentials; usually 120."""


def install() -> None:
    """Have Slurm installed from the distribution's packages if it is missing. Raises NoClusterError if it is not there then."""
    if all(map(shutil.which, PROGRAMS)):
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise NoClusterError("Slurm is not installed, and only root with apt can install it here")
    command = f"apt-get update -qq; apt-get install -y -qq --no-install-recommends {' '.join(PACKAGES)}"
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}  # the packages' services are not started
    try:
        done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False, env=environment, timeout=240)
    except subprocess.TimeoutExpired as error:
        raise NoClusterError(f"Slurm cannot be installed here: {error}") from error
    if not all(map(shutil.which, PROGRAMS)):
        raise NoClusterError(f"Slurm cannot be installed here: {done.stderr.strip()[-300:]}")


class Slurm:
    """A cluster of `count` compute hosts, up while the context lasts; `folder` holds its state and logs."""

    def __init__(self, folder: Path, count: int = 3, *, slurmd_timeout: int = 300) -> None:
        self.folder, self._timeout = folder, slurmd_timeout
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._controller: subprocess.Popen[bytes] | None = None
        self.disks = SharedFolder(folder / "disks")
        etc = folder / "etc"
        etc.mkdir(parents=True)
        (folder / "state").mkdir()
        self.hosts = Hosts(count, {"slurm": etc})
        (etc / "slurm.conf").write_text(self._configuration())

    def _configuration(self) -> str:
        nodes = [f"NodeName={name} NodeAddr={self.hosts.address(name)} CPUs={CORES} RealMemory={MEGABYTES}" for name in self.hosts.names]
        return CONFIGURATION.format(
            controller=BRIDGE_HOST,
            address=self.hosts.address(BRIDGE_HOST),
            folder=self.folder,
            slurmd_timeout=self._timeout,
            requeue_delay=REQUEUE_DELAY,
            partition=PARTITION,
            urgent=URGENT,
            nodes="\n".join(nodes),
        )

    def __enter__(self) -> Self:
        """Raises NoClusterError, with nothing left behind."""
        self.hosts.__enter__()
        try:
            self.disks.__enter__()
            self._start_munge()
            self.start_controller()
            for name in self.hosts.names:
                self._daemons.append(self.hosts.popen(name, "slurmd", "-D", "-N", name, log=self.folder / f"slurmd-{name}.out"))
            self._await_idle(START_SECONDS, told=self._check_daemons)
            self._check()
        except (AssertionError, OSError, subprocess.TimeoutExpired) as error:
            self.__exit__()
            raise NoClusterError(f"Slurm does not come up: {error}") from error
        except BaseException:
            self.__exit__()
            raise
        return self

    def _check_daemons(self) -> None:
        names = ["slurmctld", *(f"slurmd-{name}" for name in self.hosts.names)]
        for name, daemon in zip(names, [self._controller, *self._daemons[1:]], strict=True):
            ended = daemon is not None and daemon.poll() is not None
            assert not ended, f"{name} ended: {_end_of(self.folder / f'{name}.out')}"

    def _check(self) -> None:
        """That a job runs to its end on all hosts."""
        done = self.login("srun", "--nodes", str(len(self.hosts.names)), "hostname", seconds=START_SECONDS)
        assert sorted(done.stdout.split()) == sorted(self.hosts.names), f"a first job said {(done.stderr or done.stdout).strip()[-300:]!r}"

    def __exit__(self, *_: object) -> None:
        if self._controller and self._controller.poll() is None:  # without one, scancel asks again and again
            with suppress(subprocess.TimeoutExpired):
                self.hosts.run(BRIDGE_HOST, "scancel", "--user=root")
        daemons = [*self._daemons, *([self._controller] if self._controller else [])]
        end(daemon.pid for daemon in daemons if daemon.poll() is None)
        self.hosts.__exit__()
        for daemon in daemons:
            daemon.wait()
        self.disks.__exit__()

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        self.folder.chmod(0o755)
        options = {"key-file": key, "socket": self.folder / "munge.socket", "pid-file": self.folder / "munge.pid",
                   "log-file": self.folder / "munge.log", "seed-file": self.folder / "munge.seed"}  # fmt: skip
        command = ["munged", "--foreground", "--force", *(f"--{name}={path}" for name, path in options.items())]
        with (self.folder / "munged.out").open("ab") as log:
            munged = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        self._daemons.append(munged)

        def listens() -> bool:
            assert munged.poll() is None, f"munged ended with {munged.returncode}: {_end_of(self.folder / 'munged.out')}"
            return (self.folder / "munge.socket").exists()

        _wait_for(listens, START_SECONDS, "munged did not start")

    def start_controller(self) -> None:
        """Start slurmctld, which goes on from its saved state."""
        self._controller = self.hosts.popen(BRIDGE_HOST, "slurmctld", "-D", log=self.folder / "slurmctld.out")

    def stop_controller(self) -> None:
        """End slurmctld; jobs go on."""
        assert self._controller is not None
        end([self._controller.pid], patience=60.0)  # it saves its state first
        self._controller.wait()

    def login(self, *command: str, seconds: float = 60.0, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command on the login node, which is where slurmctld runs."""
        return self.hosts.run(BRIDGE_HOST, *command, seconds=seconds, env=env)

    def jobs(self, states: str = "PENDING,RUNNING,COMPLETING") -> list[str]:
        """Jobs in one of these states."""
        return self.login("squeue", "-h", "-t", states, "-o", "%i").stdout.split()

    def set_preemption(self, mode: str) -> None:
        """What becomes of jobs of the usual partition that are preempted: REQUEUE, CANCEL."""
        done = self.login("scontrol", "update", f"PartitionName={PARTITION}", f"PreemptMode={mode}")
        assert done.returncode == 0, done.stderr

    def await_quiet(self, seconds: float) -> None:
        """Wait until no job runs and every node is idle."""
        _wait_for(lambda: not self.jobs(), seconds, "jobs are left")
        self._await_idle(seconds)

    def _await_idle(self, seconds: float, told: Callable[[], None] | None = None) -> None:
        def idle() -> bool:
            if told:
                told()
            try:
                states = self.login("sinfo", "-h", "-N", "-p", PARTITION, "-o", "%N %t", seconds=5).stdout.split()
            except subprocess.TimeoutExpired:
                return False
            return states == [word for name in self.hosts.names for word in (name, "idle")]

        _wait_for(idle, seconds, "nodes are not idle", self.folder / "slurmctld.log")


def _wait_for(condition: Callable[[], bool], seconds: float, problem: str, log: Path | None = None) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{problem} after {seconds:g} s; {_end_of(log)}")
        time.sleep(0.3)


def _end_of(log: Path | None) -> str:
    """The last lines of a log, in one line."""
    lines = log.read_text(errors="replace").splitlines() if log and log.exists() else []
    return " | ".join(lines[-3:])[-400:]

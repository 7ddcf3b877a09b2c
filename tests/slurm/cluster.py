"""A real SLURM of two nodes on this machine, below one folder and on loopback ports of its own; it ends with
the process that asked for it.

`python -m tests.slurm.cluster FOLDER` runs one by hand: it prints what to export, and stays until
interrupted.

The nodes claim more CPUs than the machine has, so that jobs wait for each other only where a test wants it.
There is no accounting (hence no sacct), and memory is not tracked. Everything that could take minutes is set
to take seconds; what remains is that a requeued job waits for its old credential to run out (about half a
minute with `cred_expire=5`).
"""

import getpass
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

NODES = ("n1", "n2")
CPUS_PER_NODE = 64
START_SECONDS = 60.0
MAX_SOCKET_PATH = 90  # bytes; the kernel's limit is 107, and slurmd appends a node, a job and a step
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo")

# `main` is never preempted. A job in `high` takes CPUs from jobs in `low` at once, and from jobs in `grace`
# after GraceTime, for which SLURM sends SIGCONT and SIGTERM first. Shutdown and requeue delays: see the
# module's docstring.
CONFIG = """\
ClusterName=wordless
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmctldPort={controller_port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool.%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,batch_sched_delay=0,sched_min_interval=0,bf_interval=2
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=20
KillWait=10
MinJobAge=3600
FirstJobId={first_job}
InactiveLimit=0
NodeName=DEFAULT CPUs={cpus} RealMemory=1000000 State=UNKNOWN
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={n1_port}
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={n2_port}
PartitionName=DEFAULT Nodes=n1,n2 MaxTime=UNLIMITED State=UP
PartitionName=main Default=YES PriorityTier=5 PreemptMode=OFF
PartitionName=low PriorityTier=1 PreemptMode=REQUEUE
PartitionName=grace PriorityTier=1 PreemptMode=REQUEUE GraceTime=40
PartitionName=high PriorityTier=10 PreemptMode=OFF
"""


class Unavailable(Exception):
    """Why there can be no cluster here."""


@dataclass
class Cluster:
    """A running cluster; `environment` is what its users' processes need: SLURM_CONF, and where SLURM's
    programs are."""

    folder: Path
    environment: dict[str, str]
    daemons: "dict[str, subprocess.Popen[bytes]]" = field(default_factory=dict)

    def command(self, *argv: str, check: bool = True) -> str:
        """What a program of SLURM's prints; RuntimeError with its complaint where it fails and `check`."""
        done = subprocess.run(
            argv,
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(argv)}: exit status {done.returncode}: {done.stderr}{done.stdout}")
        return done.stdout

    def job(self, job_id: str) -> dict[str, str]:
        """SLURM's own record of a job (of an array: of its first element), by `scontrol show job`'s names."""
        words = self.command("scontrol", "--oneliner", "show", "job", job_id).splitlines()[0].split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, job_id: str) -> str:
        return self.job(job_id)["JobState"]

    def queue(self) -> list[str]:
        """The ids of every job (of arrays: each element's) that is not over."""
        return self.command("squeue", "--noheader", "--array", "--format=%i").split()

    def start_node(self, name: str) -> None:
        """Start the slurmd of a node; what it was doing before it was killed is lost."""
        self._start(name, "slurmd", "-D", "-N", name)

    def kill_node(self, name: str) -> None:
        """SIGKILL the slurmd of a node and everything that runs on it, as if the machine had lost its
        power."""
        daemon = self.daemons.pop(name)
        daemon.kill()
        daemon.wait()
        for _ in range(3):  # again for those that were just being started
            for pid in processes(self.folder):
                if f"SLURMD_NODENAME={name}" in _environment(pid):
                    for doomed in (
                        _parent(pid),
                        pid,
                    ):  # the step's slurmstepd does not say which node it is of
                        if doomed == pid or _arguments(doomed)[0].startswith("slurmstepd"):
                            with suppress(ProcessLookupError):
                                os.kill(doomed, signal.SIGKILL)
            time.sleep(0.1)

    def wait_until_idle(self, *names: str, seconds: float = START_SECONDS) -> None:
        """Wait until nodes (all of them if none is named) are up and without jobs; RuntimeError with the
        daemons' last words."""
        deadline = time.monotonic() + seconds
        while True:
            lines = self.command("sinfo", "--noheader", "--Node", "--format=%N %T", check=False).splitlines()
            states = dict(line.split() for line in lines)
            if all(states.get(name) == "idle" for name in names or NODES):
                return
            dead = [name for name, daemon in self.daemons.items() if daemon.poll() is not None]
            if dead or time.monotonic() > deadline:
                raise RuntimeError(f"nodes: {states}, daemons that ended: {dead}\n{self.last_words()}")
            time.sleep(0.1)

    def last_words(self) -> str:
        """The ends of the daemons' logs."""
        logs = sorted([*self.folder.glob("*.log"), *self.folder.glob("*.out")])
        return "\n".join(
            f"{log.name}:\n" + "\n".join(log.read_text(errors="replace").splitlines()[-15:]) for log in logs
        )

    def _start(self, name: str, *argv: str) -> None:
        with open(self.folder / f"{name}.out", "ab") as out:
            self.daemons[name] = subprocess.Popen(
                argv,
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[Cluster]:
    """A cluster that lives in `folder` (new or empty, with a short path) while the context lasts.

    Raises Unavailable with the reason where it cannot run, ValueError where `folder` holds something. However
    the asking process ends, a watchdog stops all the cluster's processes and jobs.
    """
    # Debian's daemons are not on a user's PATH
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    absent = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if absent:
        raise Unavailable(
            f"no {', '.join(absent)} here; Debian and Ubuntu have them in the packages slurm-wlm and munge"
        )
    if os.getuid() != 0:
        raise Unavailable("a slurmd that starts jobs must be root")
    folder = folder.resolve()
    if len(os.fsencode(folder)) > MAX_SOCKET_PATH:
        raise Unavailable(f"{folder}: too long a path for sockets")
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(
            f"{folder}: is not empty; a cluster in the folder of another would take up that one's jobs"
        )
    (folder / "state").mkdir(exist_ok=True)
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    ports = _free_ports(3)
    # jobs of two clusters at a time must not meet at one rendezvous
    text = CONFIG.format(
        host=socket.gethostname().split(".")[0],
        user=getpass.getuser(),
        folder=folder,
        cpus=CPUS_PER_NODE,
        first_job=random.SystemRandom().randrange(1, 12000),
        controller_port=ports[0],
        n1_port=ports[1],
        n2_port=ports[2],
    )
    (folder / "slurm.conf").write_text(text)
    cluster = Cluster(folder, {"SLURM_CONF": f"{folder}/slurm.conf", "PATH": path})
    with _watchdog(folder):
        munge = [f"--{name}={folder}/munge.{end}" for name, end in _MUNGE_FILES.items()]
        cluster._start("munged", "munged", "--foreground", "--force", "--num-threads=4", *munge)
        deadline = time.monotonic() + START_SECONDS
        while not (folder / "munge.socket").exists():
            if cluster.daemons["munged"].poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(cluster.last_words())
            time.sleep(0.05)
        cluster._start("slurmctld", "slurmctld", "-D")
        for name in NODES:
            cluster.start_node(name)
        cluster.wait_until_idle()
        yield cluster


_MUNGE_FILES = {
    "socket": "socket",
    "key-file": "key",
    "log-file": "log",
    "pid-file": "pid",
    "seed-file": "seed",
}


@contextmanager
def _watchdog(folder: Path) -> Iterator[None]:
    """A process that sweeps the cluster away as soon as its stdin closes: at the context's end, or with the
    death of this process."""
    argv = [sys.executable, str(Path(__file__).resolve()), "--watch", str(folder)]
    watchdog = subprocess.Popen(argv, stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield
    finally:
        watchdog.communicate()


def _sweep(folder: Path) -> None:
    """SIGKILL every process of the cluster in `folder`: daemons, the steps of jobs, and what those have
    started."""
    for _ in range(100):
        pids = processes(folder)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not pids:
            return
        time.sleep(0.05)


def processes(folder: Path) -> list[int]:
    """The cluster's daemons and what runs in its jobs, zombies aside; a user's shell that has its SLURM_CONF
    is not among them."""
    found = []
    for pid in (int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()):
        variables = _environment(pid)
        if f"SLURM_CONF={folder}/slurm.conf" in variables:
            in_job = any(variable.startswith("SLURM_JOB_ID=") for variable in variables)
            if in_job or _arguments(pid)[0].startswith(("munged", "slurm", ": slurmscriptd")):
                found.append(pid)
    return found


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:  # it has ended
        return pid


def _environment(pid: int) -> list[str]:
    return _null_separated(pid, "environ")


def _arguments(pid: int) -> list[str]:
    return _null_separated(pid, "cmdline")


def _null_separated(pid: int, name: str) -> list[str]:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes().decode(errors="replace").split("\0")
    except OSError:  # it has ended
        return [""]


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, below 32768 so that the kernel gives none of them away before they are
    used."""
    found: list[int] = []
    while len(found) < count:
        # 20000 to 32000 are the rendezvous ports of jobs
        port = random.SystemRandom().randrange(15000, 20000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            if port not in found:
                found.append(port)
    return found


def _watch(folder: Path) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.read()
    _sweep(folder)


def main(folder: Path) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with slurm_cluster(folder) as cluster:
        for name, value in cluster.environment.items():
            print(f"export {name}={value}", flush=True)
        with suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    if sys.argv[1] == "--watch":
        _watch(Path(sys.argv[2]))
    else:
        main(Path(sys.argv[1]))

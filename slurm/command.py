"""What runs inside a job: the command, told where its tasks meet, and what becomes of it at a requeue.

A preempted or timed-out job is requeued by submitit's SIGUSR2 handler, which must stay in place. The command then runs again
with the same arguments and resumes from what it finds on disk.
"""

import importlib
import os
import shlex
import socket
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from submitit import JobEnvironment
    from submitit.helpers import DelayedSubmission

TARGET = "wordless:main"


class CommandFailed(Exception):
    """The command ended with a nonzero exit status."""


@dataclass
class Command:
    """What a job runs, in each of its tasks: `target` ("module:function") on `argv`, verb first.

    The function returns an exit status (None is 0); a nonzero one fails the job with `CommandFailed`.
    """

    argv: list[str]
    target: str = TARGET
    requeued: bool = field(default=False, init=False, compare=False)

    def __str__(self) -> str:
        """The command line, on one line whatever the arguments hold."""
        return " ".join(shlex.join(["wordless", *self.argv]).split())

    def __call__(self) -> int:
        from submitit import JobEnvironment

        self.requeued = False
        environment = JobEnvironment()
        _remove_leftovers(environment)
        _export_rendezvous(environment)
        module, _, function = self.target.partition(":")
        try:
            status = getattr(importlib.import_module(module), function)(list(self.argv))
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) or stop.code is None else 1
        if self.requeued:  # the status is that of submitit's handler, and asks for the requeue
            sys.exit(status)
        if status:
            sys.tracebacklimit = 0  # the command has said what is wrong; our frames add nothing
            raise CommandFailed(f"exit status {status} of {self}")
        return 0

    def checkpoint(self, *args: Any, **kwargs: Any) -> "DelayedSubmission":
        """What the requeued job runs. Called by submitit on preemption or timeout, in rank 0."""
        from submitit.helpers import DelayedSubmission

        self.requeued = True
        return DelayedSubmission(self, *args, **kwargs)


def _remove_leftovers(environment: "JobEnvironment") -> None:
    """Remove this task's result of an attempt before a requeue, and half-written files, which submitit stumbles over."""
    paths = environment.paths
    half_written = [paths.submitted_pickle] if environment.global_rank == 0 else []
    for path in [*half_written, paths.result_pickle]:
        path.with_suffix(path.suffix + ".save_tmp").unlink(missing_ok=True)
    paths.result_pickle.unlink(missing_ok=True)


def _export_rendezvous(environment: "JobEnvironment") -> None:
    """Set the variables of torch.distributed's env:// in a job of several tasks; a job of one task gets none.

    Every task must arrive at the same port by itself, hence from the job id; below 32768 the kernel gives none away.
    A `MASTER_PORT` that `setup` exports has precedence.
    """
    if environment.num_tasks == 1:
        return
    address = "127.0.0.1"
    if environment.num_nodes > 1:
        address = environment.hostnames[0]
        try:
            socket.getaddrinfo(address, None)
        except OSError:  # a node's name need not be a host's; the first node is where the batch script calls srun
            address = os.environ.get("SLURM_LAUNCH_NODE_IPADDR", address)
    os.environ.update(
        RANK=str(environment.global_rank),
        LOCAL_RANK=str(environment.local_rank),
        WORLD_SIZE=str(environment.num_tasks),
        LOCAL_WORLD_SIZE=str(environment.num_tasks // environment.num_nodes),
        MASTER_ADDR=address,
    )
    os.environ.setdefault("MASTER_PORT", str(20000 + int(environment.raw_job_id) % 12000))

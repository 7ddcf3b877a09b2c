"""Prepares a task of a job: its folder, and the variables by which torch.distributed's ranks meet."""

import os
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from submitit import JobEnvironment


def remove_leftovers(environment: "JobEnvironment") -> None:
    """Remove this task's result of an attempt before a requeue, and half-written files, which submitit
    stumbles over."""
    paths = environment.paths
    half_written = [paths.submitted_pickle] if environment.global_rank == 0 else []
    for path in [*half_written, paths.result_pickle]:
        path.with_suffix(path.suffix + ".save_tmp").unlink(missing_ok=True)
    paths.result_pickle.unlink(missing_ok=True)


def export_rendezvous(environment: "JobEnvironment") -> None:
    """Set the variables of torch.distributed's env:// in a job of several tasks; a job of one task gets none.

    Every task must arrive at the same port by itself, hence from the job id (of an array each element has its
    own); below 32768 the kernel gives none away. A `MASTER_PORT` that `setup` exports has precedence.
    """
    if environment.num_tasks == 1:
        return
    address = "127.0.0.1"
    if environment.num_nodes > 1:
        address = environment.hostnames[0]
        try:
            socket.getaddrinfo(address, None)
        except OSError:
            # A node's name need not be a host's; the batch script calls srun on the first node.
            address = os.environ.get("SLURM_LAUNCH_NODE_IPADDR", address)
    os.environ.update(
        RANK=str(environment.global_rank),
        LOCAL_RANK=str(environment.local_rank),
        WORLD_SIZE=str(environment.num_tasks),
        LOCAL_WORLD_SIZE=str(environment.num_tasks // environment.num_nodes),
        MASTER_ADDR=address,
    )
    os.environ.setdefault("MASTER_PORT", str(20000 + int(environment.raw_job_id) % 12000))

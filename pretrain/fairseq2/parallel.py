"""Our processes and models as fairseq2 sees them: its gangs, DDP and FSDP2, and the errors of what they do
together."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from fairseq2.checkpoint import CheckpointError, CheckpointNotFoundError
from fairseq2.error import OperationalError
from fairseq2.gang import (
    FakeGang,
    GangError,
    Gangs,
    ProcessGroupGang,
    create_fsdp_gangs,
    create_parallel_gangs,
)
from fairseq2.nn.ddp import to_ddp
from fairseq2.nn.fsdp import to_fsdp2
from torch import nn

from pretrain.fairseq2.checkpoints import checkpoint_folder
from pretrain.training.parallel import World, is_loss_of_a_rank
from pretrain.training.task import Task


class _OpenGang(ProcessGroupGang):  # type: ignore[misc]
    """The process group of a World, which ends it itself."""

    def close(self) -> None: ...


def gangs_of(world: World, sharded: bool) -> Gangs:
    """fairseq2's gangs over the processes of `world`. A ValueError for a device that fairseq2 does not
    know."""
    if world.device.type not in ("cpu", "cuda"):
        raise ValueError(
            f'training.device: {world.device.type!r} is none that training.engine = "fairseq2" knows; "cpu" '
            'and "cuda" are'
        )
    if world.size == 1:
        return create_parallel_gangs(FakeGang(world.device))
    gangs = create_parallel_gangs(_OpenGang(dist.group.WORLD, world.device))
    return create_fsdp_gangs(gangs) if sharded else gangs


def wrapped(task: Task, gangs: Gangs, sharded: bool, phases: bool, last_phase: int) -> nn.Module:
    """The model on its device, within DDP or split by FSDP2 where there are several processes.

    DDP must know of all parameters that ever learn, and of `phases` in which some do not.
    """
    if sharded:

        def split(model: nn.Module, wrap: Callable[..., nn.Module]) -> nn.Module:
            for block in task.blocks():
                wrap(block)
            return model

        model: nn.Module = to_fsdp2(task.model, gangs, split)  # which moves it, one unit after another
        return model
    task.model.to(gangs.device)
    if gangs.dp.size == 1:
        return task.model
    task.enter_phase(last_phase)
    if not any(p.requires_grad for p in task.model.parameters()):
        return task.model
    replicas: nn.Module = to_ddp(task.model, gangs, find_unused_parameters=phases)
    return replicas


@contextmanager
def causes_told(folder: Path) -> Iterator[None]:
    """fairseq2 wraps what went wrong: give the cause where it is one that others know how to tell."""
    try:
        yield
    except (CheckpointError, CheckpointNotFoundError) as error:
        path = checkpoint_folder(folder, error.step_nr)
        raise ValueError(
            f"{path}: its {error.kind} cannot be read ({error}); it is damaged. Remove that folder to go on "
            "from the one before it"
        ) from None
    except (OperationalError, GangError) as error:
        cause: BaseException | None = error
        while (
            cause is not None
            and not isinstance(cause, OSError)
            and not (isinstance(cause, RuntimeError) and is_loss_of_a_rank(cause))
        ):
            cause = cause.__cause__
        if cause is None:
            raise
        raise cause from None

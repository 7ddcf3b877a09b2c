"""One model on several processes: the group, DistributedDataParallel, FSDP2, and activation checkpointing.

`sharding = "none"`: every rank holds the model, DDP averages the gradients. `"full"`: FSDP2 (`fully_shard`)
splits parameters, gradients and AdamW's moments over the ranks, a unit for each transformer block and one for
the rest; a unit is gathered for as long as it computes, and its gradient is reduced after every micro-batch,
so that no rank ever holds a whole one. Sharded parameters are DTensors. Lower precision is the engine's
autocast in both: what is gathered is float32, norms and losses stay float32, and the losses are DDP's.
(FSDP2's MixedPrecisionPolicy would halve that traffic and change the numbers.)
"""

import gc
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

_groups_joined = itertools.count()


@contextmanager
def greetings_on_stderr() -> Iterator[None]:
    """For where a group is made: torch 2.9's Gloo tells on stdout, which is for results, how many peers it
    has met."""
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


def resolve_device(name: str, key: str = "device") -> torch.device:
    """The device that a config's `key` names; "auto" is the GPU where torch has one. ValueError for one that
    is not here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    there = ["cpu"]
    if accelerator is not None:
        there += [
            accelerator.type,
            *(f"{accelerator.type}:{number}" for number in range(torch.accelerator.device_count())),
        ]
    if name not in there:
        raise ValueError(
            f'{key}: {name!r} is not here; torch {torch.__version__} has {", ".join(there)}. "auto" is a '
            "GPU if there is one"
        )
    return torch.device(name)


class World(NamedTuple):
    """This process among its peers."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def join(cls, device: str, timeout_seconds: float = 600.0) -> "World":
        """Read RANK, LOCAL_RANK and WORLD_SIZE and, with more than one process, join the group (nccl on GPUs,
        else gloo).

        `timeout_seconds` is how long a rank waits for the others, here (ConnectionError) and in everything
        they do together.
        """
        rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        chosen = resolve_device(device, "training.device")
        if chosen.type == "cuda":
            chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", chosen.index or 0)))
            torch.cuda.set_device(chosen)
        if size > 1 and not dist.is_initialized():
            # Under a name of its own: the launcher's store still holds the addresses of a group this process
            # left before.
            timeout = timedelta(seconds=timeout_seconds)
            try:
                store, rank, size = next(dist.rendezvous("env://", timeout=timeout))  # type: ignore[attr-defined]  # public, but its stub exports it not
                store = dist.PrefixStore(f"run{next(_groups_joined)}", store)  # type: ignore[attr-defined]
                backend = "nccl" if chosen.type == "cuda" else "gloo"
                with greetings_on_stderr():
                    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
            except RuntimeError as error:
                if not is_loss_of_a_rank(error):
                    raise
                meeting = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
                raise ConnectionError(
                    f"rank {rank} of {size} did not meet the others at {meeting} within {timeout_seconds:g} "
                    "s (training.collective_timeout_seconds); did one of them fail before? "
                    f"({' '.join(str(error).split())[:300]})"
                ) from None
        return cls(rank, size, chosen)

    def sum(self, tensor: Tensor) -> Tensor:
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's tensor, of the same shape everywhere."""
        if self.size == 1:
            return [tensor]
        tensors = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(tensors, tensor)
        return tensors

    def from_first(self, value: Any) -> Any:
        """What the first rank has (JSON), on every rank: whatever is decided by it is decided alike."""
        if self.size == 1:
            return value
        text = bytearray(json.dumps(value).encode()) if self.rank == 0 else bytearray()
        length = int(self.sum(torch.tensor(len(text), device=self.device)))
        content = torch.frombuffer(text if self.rank == 0 else bytearray(length), dtype=torch.uint8).to(
            self.device
        )
        dist.broadcast(content, 0)
        return json.loads(bytes(content.tolist()))

    def leave(self) -> None:
        """Wait for the others and leave the group: a process that exits with one open may abort after its
        work is done.

        No DistributedDataParallel may be in use any more. One that holds the group's last reference would end
        it while holding the interpreter's lock, which gloo's threads may be waiting for: the process would
        hang.
        """
        if self.size > 1:
            dist.barrier()
            gc.collect()
            dist.destroy_process_group()

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def is_loss_of_a_rank(error: RuntimeError) -> bool:
    """Whether a communication library says that a rank died or did not answer: gloo's own errors name its
    source files."""
    return isinstance(error, dist.DistError) or "gloo/" in str(error)


def recompute_in_backward(blocks: list[nn.Module]) -> None:
    """Activation checkpointing: each block keeps its input alone and runs again in backward, with the same
    random numbers.

    Set on the instances, inside the hooks of FSDP2 and without a wrapper module, so that no parameter changes
    its name.
    """
    for block in blocks:
        block.forward = _recomputed(block.forward)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments, **named)
        return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=True, **named)

    return run


def compile_in_place(model: nn.Module, blocks: list[nn.Module]) -> None:
    """torch.compile, once for all blocks (they share their code), or the whole model where it names none."""
    for module in blocks or [model]:
        module.forward = torch.compile(module.forward, dynamic=True)


def shard(model: nn.Module, blocks: list[nn.Module], world: World) -> None:
    """FSDP2 in place, on the world's device: every rank must hold the same values before. Parameters become
    DTensors."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    for module in [*blocks, model]:
        fully_shard(module, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    """Whether the model's parameters are DTensors."""
    return any(hasattr(parameter, "placements") for parameter in model.parameters())


def replicate(model: nn.Module, world: World) -> nn.Module:
    """What to call in training: the model itself, or within DDP where several processes hold whole copies of
    it."""
    if world.size == 1 or is_sharded(model) or not any(p.requires_grad for p in model.parameters()):
        return model
    return DistributedDataParallel(model, device_ids=[world.device] if world.device.type == "cuda" else None)


def without_reduction(model: nn.Module, skip: bool) -> AbstractContextManager[None]:
    """While a further micro-batch follows (`skip`), DDP keeps its gradients to itself."""
    return model.no_sync() if skip and isinstance(model, DistributedDataParallel) else nullcontext()


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Within, a sharded model's own parameters are whole (its blocks gather theirs when they run); on leaving
    all are shards again.

    For whatever does not go through a training step: the model's forward alone would leave its parameters
    gathered.
    """
    if not is_sharded(model):
        yield
        return
    from torch.distributed.fsdp import FSDPModule

    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    assert units[0] is model
    units[0].unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a shard, which every rank must ask for; any other tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def placed_like(tensor: Tensor, target: Tensor) -> Tensor:
    """A whole `tensor`, the same on every rank, on the device of `target` and split as it is."""
    tensor = tensor.to(target.device)
    if not hasattr(target, "placements"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, target.device_mesh, target.placements, src_data_rank=None)  # type: ignore[attr-defined]


def scale_and_clip(model: nn.Module, scale: Tensor, clip_norm: float) -> Tensor:
    """Multiply all gradients by `scale`, then clip their global norm; returns the norm before clipping. No
    host sync.

    Every parameter that learns must have its gradient, in every mode: AdamW would pass over one without, DDP
    wait for it.
    """
    unused = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.grad is None
    ]
    assert not unused, (
        f"the loss does not depend on {', '.join(unused)}; a task must freeze what it does not use "
        "(enter_phase)"
    )
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = whole(torch.nn.utils.get_total_norm(gradients)) * scale
    if clip_norm > 0:
        scale = scale * (clip_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([g.to_local() if hasattr(g, "to_local") else g for g in gradients], scale)
    return norm.detach()

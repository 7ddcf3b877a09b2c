"""fairseq2's checkpoint manager over files that hold tensors and plain values alone: torch.save as fairseq2
writes it, read by `weights_only`.

fairseq2 itself reads the state of trainer and optimiser by unrestricted unpickling. Model files can be read
by either.
"""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from fairseq2.checkpoint import StandardCheckpointManager
from fairseq2.file_system import GlobalFileSystem
from fairseq2.gang import Gangs
from fairseq2.io import (
    CorruptFileError,
    TensorFileDumper,
    TensorFileDumpOptions,
    TensorFileLoader,
    TensorFileLoadOptions,
)
from fairseq2.utils.rng import RngBag
from fairseq2.utils.threading import ThreadPool

from pretrain.store.disk import telling_full_disk


class Dumper(TensorFileDumper):  # type: ignore[misc]
    """torch.save, flushed to the disk, in the pickle protocol that `weights_only` reads."""

    def dump(
        self, data: Mapping[str, object], file: Path, options: TensorFileDumpOptions | None = None
    ) -> None:
        with telling_full_disk(file, 0), open(file, "wb") as stream:
            torch.save(data, stream, pickle_protocol=2)
            stream.flush()
            os.fsync(stream.fileno())


class Loader(TensorFileLoader):  # type: ignore[misc]
    """torch.load by `weights_only`. A rank that was not there when a checkpoint was written reads the first
    one's state, which differs in sums for the log alone: runs may go on with another number of processes. So
    they may on another `device`, which has another number of generators; of these the present state is read,
    since every step seeds them anew."""

    def __init__(self, device: torch.device):
        self._device = device

    def load(self, file: Path, options: TensorFileLoadOptions | None = None) -> dict[str, object]:
        if file.parent.name in ("trainer", "data_reader") and not file.exists():
            file = file.with_name(f"{file.stem.rpartition('_')[0]}_00.pt")
        try:
            state: dict[str, object] = torch.load(file, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise
        except Exception as error:  # torch raises what the damage makes it raise
            raise CorruptFileError(file) from error
        if file.parent.name == "trainer":
            state["_rng_bag"] = RngBag.from_device_defaults(torch.device("cpu"), self._device).state_dict()
        return state


class Pool(ThreadPool):  # type: ignore[misc]
    """One thread: at most one checkpoint is being written."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1)

    def queue(self, callback: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
        return self._executor.submit(callback, *args, **kwargs)


def checkpoint_manager(folder: Path, gangs: Gangs) -> StandardCheckpointManager:
    """The manager of the checkpoints in `folder/checkpoints`."""
    return StandardCheckpointManager(
        folder, gangs, GlobalFileSystem(), Loader(gangs.device), Dumper(), Pool()
    )


def last_step(folder: Path) -> int | None:
    """The newest step of which `folder/checkpoints` holds a whole checkpoint, as the manager would find
    it."""
    steps = [
        int(path.parent.name[5:])
        for path in folder.glob("checkpoints/step_*/trainer")
        if path.parent.name[5:].isdigit()
    ]
    return max(steps, default=None)


def checkpoint_folder(folder: Path, step: int) -> Path:
    """Where the manager of `folder` keeps a step's checkpoint."""
    return folder / "checkpoints" / f"step_{step}"


def newest_checkpoint(folder: Path) -> Path | None:
    """The folder of `last_step`."""
    step = last_step(folder)
    return None if step is None else checkpoint_folder(folder, step)


def require_fitting_shards(folder: Path, step: int, shards: int) -> None:
    """A ValueError where the model of `step` was split over another number of processes: fairseq2 does not
    bring them together."""
    path = checkpoint_folder(folder, step)
    found = len(list(path.glob("model/pp_00/tp_00/sdp_*.pt")))
    if found != shards:
        raise ValueError(
            f"{path}: holds the model in {found} {'shards' if found > 1 else 'piece'} (training.sharding), "
            f"and this run wants {shards}; fairseq2 does not split it anew. Go on with as many processes and "
            "the same sharding"
        )

"""Checkpoints: `step_00001000/` with model and optimiser tensors, the position in training and the SHA-256 of
each file.

`model.safetensors`      the model's state dict, float32
`optimizer.safetensors`  AdamW's moments and step counts, as `exp_avg.NAME`, `exp_avg_sq.NAME`, `step.NAME`
`state.json`             step, epoch and batch of the next step, the best validation so far and the number of
                         those after it, the resolved config, `sha256` of both files and of this one

There is no stored generator state: every draw is a function of (seed, epoch, rank, step). A checkpoint is
written under a temporary name, fsynced and renamed, so a visible one is complete. One whose hashes do not
match is skipped with a warning. No checkpoint is removed before the next one is complete. Sharded training
(FSDP2) writes the same whole tensors, and reads its shards out of them: neither sharding nor the number of
ranks changes a checkpoint.
"""

import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pretrain.store.artefact import read_meta
from pretrain.store.disk import make_folder, sync_folder, telling_full_disk
from pretrain.store.hashes import sha256_file
from pretrain.store.schemes import plugin, split_scheme
from pretrain.training.parallel import World, placed_like, whole

TENSOR_FILES = ("model.safetensors", "optimizer.safetensors")


def checkpoint_path(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run / _name(step)


def _name(step: int) -> str:
    return f"step_{step:08d}"


def save_checkpoint(
    run: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    *,
    write: bool = True,
) -> Path:
    """Write `run/step_XXXXXXXX` atomically and return it. `state` must be JSON-able and is given back by
    `load_checkpoint`.

    Every rank must call this where the model is sharded, for its shards; one of them writes. A full disk is a
    `DiskFull`.
    """
    final = checkpoint_path(run, step)
    weights, moments = (
        _gather(model.state_dict(), write),
        _gather(_optimizer_tensors(model, optimizer), write),
    )
    if not write:
        return final
    temporary = run / f".{_name(step)}.{os.getpid()}.tmp"
    # of a killed process with this one's id, as happens in containers
    shutil.rmtree(temporary, ignore_errors=True)
    make_folder(temporary)
    tensors = dict(zip(TENSOR_FILES, (weights, moments), strict=True))
    num_bytes = sum(tensor.nbytes for group in tensors.values() for tensor in group.values())
    try:
        with telling_full_disk(final, num_bytes, temporary):
            for name, group in tensors.items():
                save_file(group, temporary / name)
            state = {
                "step": step,
                **state,
                "sha256": {name: sha256_file(temporary / name) for name in tensors},
            }
            state["sha256"]["state.json"] = _state_hash(state)
            (temporary / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
            for path in temporary.iterdir():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
            _put_in_place(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def _put_in_place(temporary: Path, final: Path) -> None:
    """Give a complete checkpoint its name, at one stroke. What has that name already may be a valid
    checkpoint of the same step (a run saves where it is told to stop): then the tensors are the same, and its
    state alone is replaced. Anything else of that name is damaged and was passed over; it goes aside, not
    away: a removal takes long, and killed within it would leave neither."""
    sync_folder(temporary)
    if final.exists():
        hashes = [
            _read_state(folder)["sha256"] for folder in (temporary, final) if not checkpoint_damage(folder)
        ]
        tensors = [{name: value for name, value in found.items() if name != "state.json"} for found in hashes]
        if len(tensors) == 2 and tensors[0] == tensors[1]:
            os.replace(temporary / "state.json", final / "state.json")
            sync_folder(final)
            return
        os.replace(final, temporary.with_name(f".{final.name}.{os.getpid()}.aside.tmp"))
    os.replace(temporary, final)
    sync_folder(final.parent)
    shutil.rmtree(temporary.with_name(f".{final.name}.{os.getpid()}.aside.tmp"), ignore_errors=True)


def _read_state(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
    return state


def _state_hash(state: dict[str, Any]) -> str:
    """SHA-256 of all that a state says but this hash itself, however it is laid out."""
    rest = {
        **state,
        "sha256": {name: value for name, value in state["sha256"].items() if name != "state.json"},
    }
    return hashlib.sha256(json.dumps(rest).encode()).hexdigest()


def remove_old_checkpoints(run: Path, keep: int, best: int | None = None, last: int | None = None) -> None:
    """Remove all but the `keep` newest checkpoints up to step `last` and that of step `best`, and what killed
    processes left half written.

    Whatever lies beyond `last`, the step just saved, was passed over at resume: it is damaged.
    """
    steps = sorted(run.glob("step_*"))
    standing = [path for path in steps if last is None or path.name <= _name(last)]
    kept = {path.name for path in standing[-keep:]} | ({_name(best)} if best is not None else set())
    for path in [*(path for path in steps if path.name not in kept), *run.glob(".step_*.tmp")]:
        shutil.rmtree(path)


def latest_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint whose files match their hashes, or None. Damaged ones are named on stderr."""
    for path in sorted(run.glob("step_*"), reverse=True):
        damaged = checkpoint_damage(path)
        if not damaged:
            return path
        print(f"{path}: damaged ({damaged}); using the one before it", file=sys.stderr)
    return None


def checkpoint_damage(path: Path) -> str:
    """What of a checkpoint is not as it was written; empty where all is."""
    try:
        state = _read_state(path)
        expected = dict(state["sha256"])
        own = expected.pop("state.json", None)  # those of older versions have none
        damaged = [
            name
            for name in dict.fromkeys((*TENSOR_FILES, *expected))
            if sha256_file(path / name) != expected[name]
        ]
        damaged += ["state.json"] if own not in (None, _state_hash(state)) else []
        return ", ".join(damaged)
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
    ) as error:  # no JSON, or not that of a state
        return f"{type(error).__name__}: {error}"


class Best:
    """The best validation of a run so far, and how many there have been since.

    Lower is better. Where the first of the `monitor`ed metrics is equal the next decides: the word error rate
    of a recogniser that does not write anything yet stays at 1 while its loss falls. What is not finite is
    never best.
    """

    def __init__(self, monitor: Sequence[str]):
        self.monitor = tuple(monitor)
        self.step: int | None = None
        self.values: list[float] = []
        self.stale = 0

    def judge(self, step: int, values: list[float], *, counts: bool = True) -> bool:
        """Whether the `values` of a validation after `step` are the best; if they are not it is one more
        without (if it `counts`)."""
        better = all(map(math.isfinite, values)) and (self.step is None or values < self.values)
        if better:
            self.step, self.values = step, values
        self.stale = 0 if better else self.stale + counts
        return better

    def to_state(self) -> dict[str, Any]:
        """What a checkpoint's state keeps of it."""
        found = None if self.step is None else {"step": self.step, **self.summary}
        return {"best": found, "stale": self.stale}

    def resume(self, run: Path, state: dict[str, Any], world: World) -> None:
        """Go on from a checkpoint's state. Where the best checkpoint is damaged, or gone since a better one
        followed that this run has lost, the next validation is judged as the first, and the patience starts
        anew. The first rank reads it, for all."""
        found, damage = state.get("best"), ""
        # else it has just been read
        if world.rank == 0 and found is not None and found["step"] != state["step"]:
            damage = checkpoint_damage(checkpoint_path(run, found["step"]))
            if damage:
                print(
                    f"{run}: the best checkpoint, of step {found['step']}, is damaged ({damage}); judged "
                    "anew",
                    file=sys.stderr,
                )
        if found is None:
            self.stale = state.get("stale", 0)
        elif not world.from_first(damage):
            self.step, self.values = found["step"], [found[f"best_{name}"] for name in self.monitor]
            self.stale = state["stale"]

    @property
    def summary(self) -> dict[str, float]:
        """The values of the best validation by name."""
        return (
            {f"best_{name}": value for name, value in zip(self.monitor, self.values, strict=True)}
            if self.values
            else {}
        )


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore model and optimiser in place, each tensor split as the model's is; returns the stored state."""
    own = model.state_dict()
    weights = load_file(path / "model.safetensors")
    model.load_state_dict(
        {name: placed_like(tensor, own[name]) if name in own else tensor for name, tensor in weights.items()}
    )
    stored = load_file(path / "optimizer.safetensors")
    for name, parameter in model.named_parameters():
        if f"step.{name}" in stored:
            optimizer.state[parameter] = {
                # AdamW keeps its step count on the CPU unless the fused GPU kernel runs; the optimiser moves
                # it where it wants it.
                "step": stored[f"step.{name}"].to(parameter.device if parameter.is_cuda else "cpu"),
                "exp_avg": placed_like(stored[f"exp_avg.{name}"], parameter),
                "exp_avg_sq": placed_like(stored[f"exp_avg_sq.{name}"], parameter),
            }
    return _read_state(path)


def load_weights(run: str | Path, *, best: bool = True) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """Weights, meta data and weights' fingerprint of a run, or of a model of another library, `scheme:NAME`.

    They are those of the best checkpoint if one was kept (`keep_best`) and `best` is wanted, else of the
    newest valid one. `meta["config"]` is the resolved config. The meta data of an unfinished run come from
    the checkpoint. The fingerprint is the first 16 hex digits of the SHA-256 of `model.safetensors`. Raises
    ValueError if the best checkpoint is damaged; if it is missing, a note on stderr names the one used.
    """
    if (named := split_scheme(run)) is not None:
        scheme, name = named
        return plugin(scheme).load_asset(name)
    run = Path(run)
    path = latest_checkpoint(run) if run.is_dir() else None
    if path is None and any(run.glob("fairseq2/checkpoints/step_*")):
        raise ValueError(
            f'{run}: is not finished, and was begun with training.engine = "fairseq2", whose checkpoints are '
            "fairseq2's own until the end (of a "
            "keep_best run, until its first validation); give its command again, which goes on from them"
        )
    if path is None:
        raise ValueError(f"{run}: holds no checkpoint; give the folder of a training run")
    state = _read_state(path)
    if best and state.get("best") is not None and state["best"]["step"] != state["step"]:
        chosen = checkpoint_path(run, state["best"]["step"])
        if not chosen.is_dir():
            print(f"{chosen}: the best checkpoint is gone; using {path.name}", file=sys.stderr)
        elif damage := checkpoint_damage(chosen):
            raise ValueError(
                f"{chosen}: the best checkpoint is damaged ({damage}); remove that folder to use the last, "
                f"{path.name}"
            )
        else:
            path, state = chosen, _read_state(chosen)
    meta = (
        read_meta(run)
        if (run / "meta.json").is_file()
        else {"kind": state["kind"], "config": state["config"], **state["extra"]}
    )
    try:
        weights = load_file(path / "model.safetensors")
    except SafetensorError as error:
        raise ValueError(f"{path}/model.safetensors: {error}") from None
    return weights, meta, state["sha256"]["model.safetensors"][:16]


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{key}.{name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _gather(tensors: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Whole tensors on the CPU, one after another; where they are not kept, this rank's part in gathering
    them."""
    gathered = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if keep:
            gathered[name] = full.cpu().contiguous()
    return gathered

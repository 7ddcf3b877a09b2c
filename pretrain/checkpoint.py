"""Checkpoints: `step_00001000/` with model and optimiser tensors, the position in training and the SHA-256 of each file.

`model.safetensors`      the model's state dict, float32
`optimizer.safetensors`  AdamW's moments and step counts, keyed `exp_avg.NAME`, `exp_avg_sq.NAME`, `step.NAME`
`state.json`             step, epoch and batch of the next step, the resolved config, `sha256` of the two files above

There is no stored generator state: every draw is a function of (seed, epoch, rank, step). A checkpoint is written under a
temporary name, fsynced and renamed, so a visible one is complete; one whose hashes do not match is passed over with a warning.
Sharded training (FSDP2) writes the same whole tensors and reads its shards out of them: neither sharding nor the number of
ranks shows in a checkpoint.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pretrain.artefact import read_meta, sha256_file, sync_folder
from pretrain.parallel import placed_like, whole


def save_checkpoint(
    run: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], *, write: bool = True
) -> Path:
    """Write `run/step_XXXXXXXX` atomically and return it. `state` must be JSON-able and is given back by `load_checkpoint`.

    Every rank must call this where the model is sharded, for its shards; one of them writes.
    """
    final = run / f"step_{step:08d}"
    weights, moments = _gather(model.state_dict(), write), _gather(_optimizer_tensors(model, optimizer), write)
    if not write:
        return final
    temporary = run / f".step_{step:08d}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed process with this one's id, as happens in containers
    temporary.mkdir(parents=True)
    try:
        save_file(weights, temporary / "model.safetensors")
        save_file(moments, temporary / "optimizer.safetensors")
        hashes = {name: sha256_file(temporary / name) for name in ("model.safetensors", "optimizer.safetensors")}
        (temporary / "state.json").write_text(json.dumps({"step": step, **state, "sha256": hashes}, indent=1))
        for path in temporary.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        if final.exists():  # an invalid leftover of the same step
            shutil.rmtree(final)
        os.replace(temporary, final)
        sync_folder(run)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def remove_old_checkpoints(run: Path, keep: int) -> None:
    """Remove all but the `keep` newest checkpoints, and what killed processes left half written."""
    for path in [*sorted(run.glob("step_*"))[:-keep], *run.glob(".step_*.tmp")]:
        shutil.rmtree(path)


def latest_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint whose files match their hashes, or None. Damaged ones are named on stderr."""
    for path in sorted(run.glob("step_*"), reverse=True):
        try:
            state = json.loads((path / "state.json").read_text())
            damaged = [name for name, expected in state["sha256"].items() if sha256_file(path / name) != expected]
        except (OSError, json.JSONDecodeError, KeyError) as error:
            damaged = [str(error)]
        if not damaged:
            return path
        print(f"{path}: damaged ({', '.join(damaged)}); using the one before it", file=sys.stderr)
    return None


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore model and optimiser in place, each tensor split as the model's is; returns the stored state."""
    own = model.state_dict()
    weights = load_file(path / "model.safetensors")
    model.load_state_dict({name: placed_like(tensor, own[name]) if name in own else tensor for name, tensor in weights.items()})
    stored = load_file(path / "optimizer.safetensors")
    for name, parameter in model.named_parameters():
        if f"step.{name}" in stored:
            optimizer.state[parameter] = {
                # AdamW keeps its step count on the CPU unless the fused GPU kernel runs; the optimiser moves it where it wants it.
                "step": stored[f"step.{name}"].to(parameter.device if parameter.is_cuda else "cpu"),
                "exp_avg": placed_like(stored[f"exp_avg.{name}"], parameter),
                "exp_avg_sq": placed_like(stored[f"exp_avg_sq.{name}"], parameter),
            }
    state: dict[str, Any] = json.loads((path / "state.json").read_text())
    return state


def load_weights(run: str | Path) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """Weights, meta data and weights' fingerprint of a run's newest valid checkpoint.

    `meta["config"]` is the resolved config. A run that is not finished can be used; its meta data then come from the checkpoint.
    The fingerprint is the first 16 hex digits of the SHA-256 of `model.safetensors`.
    """
    run = Path(run)
    path = latest_checkpoint(run) if run.is_dir() else None
    if path is None:
        raise ValueError(f"{run}: holds no checkpoint; give the folder of a training run")
    state = json.loads((path / "state.json").read_text())
    meta = read_meta(run) if (run / "meta.json").is_file() else {"kind": state["kind"], "config": state["config"], **state["extra"]}
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
    """Whole tensors on the CPU, one after another; where they are not kept, this rank's part in gathering them."""
    gathered = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if keep:
            gathered[name] = full.cpu().contiguous()
    return gathered

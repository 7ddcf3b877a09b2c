import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from pretrain.store.artefact import commit
from pretrain.training import checkpoint
from pretrain.training.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    load_weights,
    remove_old_checkpoints,
    save_checkpoint,
)

STATE = {
    "epoch": 2,
    "batch": 5,
    "seconds": 1.5,
    "kind": "encoder",
    "extra": {"codebook": "c0de"},
    "config": {"lr": 0.1},
}


def model_and_optimizer(
    seed: int = 0, steps: int = 3, frozen: bool = False
) -> tuple[nn.Module, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    if frozen:
        model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("frozen", [False, True])
def test_model_and_optimizer_come_back_bit_for_bit_and_go_on_alike(tmp_path: Path, frozen: bool) -> None:
    model, optimizer = model_and_optimizer(frozen=frozen)
    path = save_checkpoint(tmp_path, 7, model, optimizer, STATE)
    again, restored = model_and_optimizer(seed=1, steps=0, frozen=frozen)
    assert load_checkpoint(path, again, restored) == {
        "step": 7,
        **STATE,
        "sha256": json.loads((path / "state.json").read_text())["sha256"],
    }
    for _ in range(3):
        for mine, theirs in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
            assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)
        for mine, theirs in zip(model.parameters(), again.parameters(), strict=True):
            assert optimizer.state[mine].keys() == restored.state[theirs].keys()
            for key, value in optimizer.state[mine].items():
                assert value.dtype == restored.state[theirs][key].dtype and torch.equal(
                    value, restored.state[theirs][key]
                )
        x = torch.randn(5, 4)
        for net, adamw in ((model, optimizer), (again, restored)):
            adamw.zero_grad()
            net(x).square().sum().backward()
            adamw.step()


def test_only_safetensors_and_json_are_written(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, *model_and_optimizer(), STATE)
    assert sorted(os.listdir(path)) == ["model.safetensors", "optimizer.safetensors", "state.json"]
    assert path.name == "step_00000001"


@pytest.mark.parametrize("broken", ["sha256_file", "sync_folder"])
def test_an_interrupted_save_leaves_the_old_checkpoint_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    model, optimizer = model_and_optimizer()
    save_checkpoint(tmp_path, 1, model, optimizer, STATE)
    with monkeypatch.context() as patched:
        patched.setattr(
            os if broken == "sync_folder" else checkpoint,
            "replace" if broken == "sync_folder" else broken,
            interrupt,
        )
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, 2, model, optimizer, STATE)
    assert os.listdir(tmp_path) == ["step_00000001"]
    assert latest_checkpoint(tmp_path) == tmp_path / "step_00000001"


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_what_a_killed_process_left_behind_is_no_obstacle_and_is_cleared(tmp_path: Path) -> None:
    # In a container process ids come again, so the leftover may have this very process's name.
    for name in (f".step_00000002.{os.getpid()}.tmp", ".step_00000001.1.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    model, optimizer = model_and_optimizer()
    save_checkpoint(tmp_path, 2, model, optimizer, STATE)
    remove_old_checkpoints(tmp_path, keep=2)
    assert os.listdir(tmp_path) == ["step_00000002"]


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json", "gone"])
def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    model, optimizer = model_and_optimizer()
    first = save_checkpoint(tmp_path, 9, model, optimizer, STATE)
    second = save_checkpoint(tmp_path, 10, model, optimizer, STATE)
    assert latest_checkpoint(tmp_path) == second and capsys.readouterr().err == ""
    if file == "gone":
        (second / "model.safetensors").unlink()
    elif file == "state.json":
        (second / file).write_text("{")
    else:
        damage(second / file)
    assert latest_checkpoint(tmp_path) == first
    message = capsys.readouterr().err
    assert "step_00000010: damaged (" in message and "using the one before it" in message
    # written again, whole
    assert save_checkpoint(tmp_path, 10, model, optimizer, STATE) == latest_checkpoint(tmp_path)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    model, optimizer = model_and_optimizer()
    for step in (1, 2, 30):
        save_checkpoint(tmp_path, step, model, optimizer, STATE)
    remove_old_checkpoints(tmp_path, keep=2)
    assert sorted(os.listdir(tmp_path)) == ["step_00000002", "step_00000030"]


def test_weights_of_a_running_and_of_a_finished_run_can_be_used(tmp_path: Path) -> None:
    model, optimizer = model_and_optimizer()
    for nothing in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ValueError, match="holds no checkpoint; give the folder of a training run"):
            load_weights(nothing)
    save_checkpoint(tmp_path, 1, model, optimizer, STATE)
    weights, meta, fingerprint = load_weights(tmp_path)
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert (meta["kind"], meta["config"], meta["codebook"]) == ("encoder", {"lr": 0.1}, "c0de")
    commit(
        tmp_path,
        "encoder",
        {"lr": 0.1},
        {"manifest": "f"},
        ["step_00000001/model.safetensors"],
        codebook="c0de",
    )
    again, finished, same = load_weights(tmp_path)
    assert same == fingerprint and len(same) == 16 and again.keys() == weights.keys()
    assert (finished["kind"], finished["config"], finished["codebook"]) == ("encoder", {"lr": 0.1}, "c0de")

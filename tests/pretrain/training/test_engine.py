import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pretrain.config import read_toml
from pretrain.store.artefact import is_complete, read_meta
from pretrain.training.checkpoint import latest_checkpoint, load_weights
from pretrain.training.runlog import Board
from pretrain.training.task import OptimizerConfig, TrainingConfig
from tests.pretrain.linear_task import LinearTask, ScoredTask, run_linear
from tests.pretrain.runs import assert_same_run, curve, lines

ROOT = Path(__file__).parents[3]


def weights(run: Path) -> dict[str, torch.Tensor]:
    path = latest_checkpoint(run)
    assert path is not None
    return load_file(path / "model.safetensors")


def fail_at(step: int) -> Callable[[int], None]:
    def on_step(now: int) -> None:
        if now == step:
            raise RuntimeError("power cut")

    return on_step


def test_a_run_learns_and_tells_what_it_did(tmp_path: Path) -> None:
    summary = run_linear(tmp_path / "run", training={"max_steps": 60, "log_every": 7, "checkpoint_every": 25})
    assert summary["steps"] == summary["steps_this_time"] == 60
    assert (
        summary["loss_first"] == lines(tmp_path / "run")[0]["loss"]
        and summary["loss_last"] == lines(tmp_path / "run")[-1]["loss"]
    )
    assert summary["loss_last"] < 0.3 * summary["loss_first"]
    assert {
        "absolute_error",
        "share_positive",
        "gradient_norm",
        "item_per_second",
        "seconds",
    } <= summary.keys()
    assert "_histogram" not in summary
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
    assert [line["step"] for line in lines(tmp_path / "run")] == [7, 14, 21, 25, 28, 35, 42, 49, 50, 56, 60]
    assert sorted(path.name for path in (tmp_path / "run").glob("step_*")) == [
        "step_00000050",
        "step_00000060",
    ]
    assert any((tmp_path / "run" / "tensorboard").iterdir())
    meta = read_meta(tmp_path / "run", "test")
    assert (
        meta["objective"] == "regression"
        and meta["parents"] == {"data": "0"}
        and meta["config"]["optimizer"]["lr"] == 0.05
    )
    written = read_toml(tmp_path / "run" / "config.toml")
    assert written["optimizer"] == meta["config"]["optimizer"] and "nothing" not in written


def test_logged_numbers_are_sums_over_counts_since_the_last_line(tmp_path: Path) -> None:
    """With a learning rate of nearly nothing the model stays, so every logged loss can be computed
    afterwards."""
    task = LinearTask(batch=5)
    run_linear(
        tmp_path / "run",
        task,
        training={"max_steps": 7, "log_every": 2, "checkpoint_every": 5},
        lr=1e-12,
        weight_decay=0.0,
    )
    batches = [(epoch, items) for epoch in range(2) for items in task.plan(epoch)]
    for line, steps in zip(lines(tmp_path / "run"), ([0, 1], [2, 3], [4], [5], [6]), strict=True):
        with torch.no_grad():
            losses = [task.model(task.collate(batches[step][1], batches[step][0])) for step in steps]
        count = sum(len(batches[step][1]) for step in steps)
        # float32 forward passes of other batch shapes
        assert line["loss"] == pytest.approx(sum(loss.total.item() for loss in losses) / count, rel=1e-5)
        assert line["absolute_error"] == pytest.approx(
            sum(loss.metrics["absolute_error"][0].item() for loss in losses) / count, rel=1e-5
        )


def test_one_step_is_adamw_on_the_mean_gradient(tmp_path: Path) -> None:
    task, reference = LinearTask(), LinearTask()
    options = {
        "lr": 0.01,
        "weight_decay": 0.1,
        "eps": 1e-8,
        "betas": (0.9, 0.95),
        "schedule": "constant",
        "warmup_steps": 0,
    }
    run_linear(tmp_path / "run", task, training={"max_steps": 3}, clip_norm=0.5, **options)
    groups = [
        {"params": [reference.model.body.weight, reference.model.head.weight], "weight_decay": 0.1},
        {"params": [reference.model.body.bias, reference.model.head.bias], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=0.01, eps=1e-8, betas=(0.9, 0.95))
    norms = []
    for items in reference.plan(0)[:3]:
        adamw.zero_grad()
        loss = reference.model(reference.collate(items, 0))
        (loss.total / loss.count).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(reference.model.parameters(), 0.5)))
        adamw.step()
    for name, weight in weights(tmp_path / "run").items():
        # fused and plain AdamW round apart
        torch.testing.assert_close(weight, reference.model.state_dict()[name], rtol=0, atol=1e-6)
    assert norms[0] > 0.5  # it did clip
    logged = [line["gradient_norm"] for line in lines(tmp_path / "run")]
    assert logged == pytest.approx([np.mean(norms[:2]), norms[2]], rel=1e-5)


@pytest.mark.parametrize("accumulate", [2, 5, 7])
def test_accumulation_does_not_change_the_run(tmp_path: Path, accumulate: int) -> None:
    """Micro-batches are other batch shapes (also of no item, beyond the batch's five), so sums round apart:
    float32, 12 steps."""
    run_linear(tmp_path / "one", LinearTask(num_valid=2), clip_norm=0.7)
    run_linear(tmp_path / "two", LinearTask(num_valid=2), {"accumulate": accumulate}, clip_norm=0.7)
    for one, two in zip(curve(tmp_path / "one"), curve(tmp_path / "two"), strict=True):
        assert one == pytest.approx(two, rel=1e-4)
    for name, weight in weights(tmp_path / "one").items():
        torch.testing.assert_close(weight, weights(tmp_path / "two")[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("step", [1, 4, 7, 11])
def test_resume_matches_an_uninterrupted_run(tmp_path: Path, step: int) -> None:
    run_linear(tmp_path / "whole", LinearTask(dropout=0.3, num_valid=2), {"accumulate": 2})
    with pytest.raises(RuntimeError, match="power cut"):
        run_linear(
            tmp_path / "cut", LinearTask(dropout=0.3, num_valid=2, on_step=fail_at(step)), {"accumulate": 2}
        )
    assert not is_complete(tmp_path / "cut")
    task = LinearTask(dropout=0.3, num_valid=2)
    summary = run_linear(tmp_path / "cut", task, {"accumulate": 2})
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    assert summary["steps"] == 12 and summary["steps_this_time"] == 12 - step // 4 * 4
    fingerprints = [read_meta(tmp_path / name)["fingerprint"] for name in ("whole", "cut")]
    assert fingerprints[0] == fingerprints[1]


def test_resume_across_a_change_of_phase_matches(tmp_path: Path) -> None:
    run_linear(tmp_path / "whole", LinearTask(dropout=0.3, freeze_steps=6))
    for step in (5, 9):
        with pytest.raises(RuntimeError):
            run_linear(tmp_path / "cut", LinearTask(dropout=0.3, freeze_steps=6, on_step=fail_at(step)))
    run_linear(tmp_path / "cut", LinearTask(dropout=0.3, freeze_steps=6))
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_process_killed_inside_a_save_resumes_to_the_same_run(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tests" / "pretrain" / "linear_task.py"), str(tmp_path / "cut")]
    died = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False, capture_output=True, timeout=120
    )
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert any((tmp_path / "cut").glob(".step_00000008.*.tmp/model.safetensors"))
    assert latest_checkpoint(tmp_path / "cut") == tmp_path / "cut" / "step_00000004"
    run_linear(tmp_path / "cut", LinearTask(dropout=0.3))
    run_linear(tmp_path / "whole", LinearTask(dropout=0.3))
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    assert not list((tmp_path / "cut").glob(".*"))


def test_a_run_killed_after_its_last_step_only_has_to_be_declared_finished(tmp_path: Path) -> None:
    first = run_linear(tmp_path / "run")
    for name in ("meta.json", "summary.json"):
        (tmp_path / "run" / name).unlink()
    again = run_linear(tmp_path / "run")
    assert (
        again["steps_this_time"] == 0
        and again["loss_last"] == first["loss_last"]
        and is_complete(tmp_path / "run")
    )


def test_a_torn_line_of_metrics_is_dropped_at_resume(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        run_linear(tmp_path / "cut", LinearTask(on_step=fail_at(7)))
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "lo')
    run_linear(tmp_path / "cut")
    assert [line["step"] for line in lines(tmp_path / "cut")] == [2, 4, 6, 8, 10, 12]


def test_a_finished_run_is_refused(tmp_path: Path) -> None:
    run_linear(tmp_path / "run")
    with pytest.raises(ValueError, match="run: already holds a finished artefact"):
        run_linear(tmp_path / "run")


def test_resuming_with_other_settings_is_refused_and_the_changed_keys_named(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        run_linear(tmp_path / "run", LinearTask(on_step=fail_at(5)))
    with pytest.raises(ValueError, match="unfinished work begun with other settings") as caught:
        run_linear(tmp_path / "run", LinearTask(), {"seed": 1}, lr=0.1)
    assert "optimizer.lr: 0.05, now 0.1" in str(caught.value) and "training.seed: 0, now 1" in str(
        caught.value
    )
    assert "betas" not in str(caught.value)
    run_linear(tmp_path / "run")  # with the old ones it goes on


def test_how_a_step_is_computed_may_change_between_sessions(tmp_path: Path) -> None:
    run_linear(tmp_path / "whole")
    with pytest.raises(RuntimeError):
        run_linear(tmp_path / "cut", LinearTask(on_step=fail_at(5)))
    how = {
        "accumulate": 2,
        "sharding": "full",
        "activation_checkpointing": True,
        "loader_threads": 1,
        "keep_checkpoints": 1,
    }
    how["collective_timeout_seconds"] = 60.0
    run_linear(tmp_path / "cut", LinearTask(), how)
    for one, two in zip(curve(tmp_path / "whole"), curve(tmp_path / "cut"), strict=True):
        assert one == pytest.approx(two, rel=1e-5)  # other sums in float32
    assert read_toml(tmp_path / "cut" / "config.toml")["training"]["accumulate"] == 2


def test_settings_may_change_while_there_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        run_linear(tmp_path / "run", LinearTask(on_step=fail_at(2)))
    run_linear(tmp_path / "run", lr=0.1)
    assert read_toml(tmp_path / "run" / "config.toml")["optimizer"]["lr"] == 0.1
    assert [line["step"] for line in lines(tmp_path / "run")] == [2, 4, 6, 8, 10, 12]


def test_nan_stops_the_run_and_the_last_good_checkpoint_stays(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="stopped at step 6: loss and gradient_norm not finite.*lower optimizer.lr"
    ) as caught:
        run_linear(tmp_path / "run", LinearTask(nan_from=1), {"log_every": 3})  # epoch 1 begins at step 5
    kept = tmp_path / "run" / "step_00000004"
    assert str(kept) in str(caught.value) and latest_checkpoint(tmp_path / "run") == kept
    assert all(tensor.isfinite().all() for tensor in load_file(kept / "model.safetensors").values())
    assert not is_complete(tmp_path / "run")
    assert "first in step 6" in str(
        caught.value
    ) and "optimizer.clip_norm (now 0: nothing is clipped)" in str(caught.value)
    with pytest.raises(ValueError, match="none yet"):
        run_linear(tmp_path / "other", LinearTask(nan_from=0))
    assert latest_checkpoint(tmp_path / "other") is None


def test_nan_between_log_lines_never_reaches_a_checkpoint_and_its_step_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stopped at step 8.*first in step 6"):
        run_linear(tmp_path / "run", LinearTask(nan_from=1), {"log_every": 1000})
    assert [path.name for path in (tmp_path / "run").glob("step_*")] == ["step_00000004"]


def test_an_alarm_stops_the_run_with_its_message(tmp_path: Path) -> None:
    class Alarmed(LinearTask):
        def alarm(self, metrics: dict[str, float], step: int) -> str | None:
            return f"collapsed: share_positive {metrics['share_positive']:.1f}" if step > 5 else None

    with pytest.raises(
        ValueError, match=r"stopped at step 6: collapsed: share_positive 0\.\d.*step_00000004"
    ):
        run_linear(tmp_path / "run", Alarmed())


def test_a_phase_freezes_its_parameters_to_the_bit(tmp_path: Path) -> None:
    fresh = LinearTask(freeze_steps=4).model.state_dict()
    task = LinearTask(freeze_steps=4)
    run_linear(tmp_path / "run", task, {"keep_checkpoints": 9}, weight_decay=0.5)
    assert task.phases == [0, 1]
    frozen, free = (load_file(tmp_path / "run" / f"step_{step:08d}" / "model.safetensors") for step in (4, 8))
    assert torch.equal(frozen["body.weight"], fresh["body.weight"]) and not torch.equal(
        frozen["head.weight"], fresh["head.weight"]
    )
    assert not torch.equal(free["body.weight"], fresh["body.weight"])


def test_validation_is_over_all_items_without_dropout_and_repeats_itself(tmp_path: Path) -> None:
    task = LinearTask(dropout=0.5, num_valid=3)
    summary = run_linear(tmp_path / "run", task, {"validate_every": 5})
    assert [line["step"] for line in lines(tmp_path / "run") if "valid_loss" in line] == [5, 10, 12]
    task.model.eval()
    with torch.no_grad():
        losses = [task.model(task.collate_validation(items)) for items in task.plan_validation()]
    mean = sum(loss.total.item() for loss in losses) / 6
    assert summary["valid_loss"] == pytest.approx(mean, rel=1e-5)  # float32 sums
    assert summary["valid_absolute_error"] > 0 and "valid_gradient_norm" not in summary


def test_a_task_is_called_after_every_update_with_the_new_parameters(tmp_path: Path) -> None:
    class Averaged(LinearTask):
        def __init__(self) -> None:
            super().__init__()
            self.steps: list[int] = []
            self.average = torch.zeros(())

        def after_step(self, step: int) -> None:
            self.steps.append(step)
            self.average = next(self.model.parameters()).detach().clone()

    task = Averaged()
    run_linear(tmp_path / "run", task, {"max_steps": 6})
    assert task.steps == list(range(6))
    assert torch.equal(task.average, next(task.model.parameters()))


def test_what_a_task_evaluates_is_logged_with_the_validation(tmp_path: Path) -> None:
    class Judged(LinearTask):
        def evaluate(self) -> dict[str, float]:
            assert not self.model.training and not torch.is_grad_enabled()
            return {"score": 0.25}

    run_linear(tmp_path / "run", Judged(num_valid=1), {"validate_every": 5})
    assert [line.get("valid_score") for line in lines(tmp_path / "run") if "valid_loss" in line] == [0.25] * 3


def test_a_parameter_without_a_gradient_is_a_fault_whatever_the_mode(tmp_path: Path) -> None:
    """DDP would wait for it, AdamW pass over it: one process and several would train differently."""
    task = LinearTask()
    task.model.register_parameter("spare", torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(AssertionError, match="does not depend on spare"):
        run_linear(tmp_path / "run", task)


def test_recomputed_blocks_give_the_same_run(tmp_path: Path) -> None:
    task = LinearTask(dropout=0.3)
    calls = []
    task.model.body.forward = lambda x, forward=task.model.body.forward: (calls.append(1), forward(x))[1]
    run_linear(tmp_path / "kept", LinearTask(dropout=0.3))
    run_linear(tmp_path / "recomputed", task, {"activation_checkpointing": True})
    assert len(calls) == 2 * 12  # in the forward and the backward pass of each step
    assert_same_run(tmp_path / "kept", tmp_path / "recomputed")


def test_recomputing_a_model_without_blocks_is_refused(tmp_path: Path) -> None:
    class Plain(LinearTask):
        def blocks(self) -> list[torch.nn.Module]:
            return []

    with pytest.raises(ValueError, match="activation_checkpointing: this model has no blocks"):
        run_linear(tmp_path / "run", Plain(), {"activation_checkpointing": True})


def test_every_item_is_served_once_an_epoch_in_the_planned_batches(tmp_path: Path) -> None:
    task = LinearTask()
    run_linear(tmp_path / "run", task, {"max_steps": 10, "accumulate": 2, "loader_threads": 3})
    for epoch in (0, 1):
        served = [items for number, items in task.served if number == epoch]
        assert sorted(item for items in served for item in items) == list(range(23))


def test_max_epochs_ends_a_run_before_max_steps(tmp_path: Path) -> None:
    summary = run_linear(tmp_path / "two", training={"max_steps": 100, "max_epochs": 2.0})
    assert summary["steps"] == 10  # 23 items in batches of 5 are 5 steps an epoch
    assert run_linear(tmp_path / "short", training={"max_steps": 4, "max_epochs": 2.0})["steps"] == 4


def test_an_empty_plan_is_a_message(tmp_path: Path) -> None:
    class Empty(LinearTask):
        def plan(self, epoch: int) -> list[np.ndarray]:
            return []

    with pytest.raises(ValueError, match="no batch"):
        run_linear(tmp_path / "run", Empty())


def test_a_fault_in_a_loader_thread_reaches_the_user(tmp_path: Path) -> None:
    class Unreadable(LinearTask):
        def collate(self, items: np.ndarray, epoch: int) -> None:  # type: ignore[override]
            raise ValueError("a.wav: is empty")

    with pytest.raises(ValueError, match=r"a\.wav: is empty"):
        run_linear(tmp_path / "run", Unreadable())


def factors(max_steps: int, **options: object) -> list[float]:
    config = OptimizerConfig(**options)  # type: ignore[arg-type]
    return [config.factor(step, max_steps) for step in range(max_steps)]


def test_schedules_follow_their_formulas() -> None:
    warmup = [(step + 1) / 4 for step in range(4)]
    left = [1 - step / 16 for step in range(16)]
    assert factors(20, schedule="constant", warmup_steps=4) == warmup + [1.0] * 16
    assert factors(20, schedule="linear", warmup_steps=4) == pytest.approx(warmup + left)
    assert factors(20, schedule="linear", warmup_steps=4, final_lr_ratio=0.1) == pytest.approx(
        warmup + [0.1 + 0.9 * x for x in left]
    )
    assert factors(20, schedule="polynomial", warmup_steps=4, power=2.0) == pytest.approx(
        warmup + [x**2 for x in left]
    )
    cosine = [0.5 * (1 + math.cos(math.pi * step / 16)) for step in range(16)]
    assert factors(20, schedule="cosine", warmup_steps=4) == pytest.approx(warmup + cosine)
    assert factors(3, schedule="linear", warmup_steps=10) == pytest.approx([0.1, 0.2, 0.3])


@pytest.mark.parametrize(("ratio", "floor"), [(0.0, 0.05), (0.01, 0.01), (0.2, 0.2)])
def test_tri_stage_warms_up_holds_and_decays_exponentially(ratio: float, floor: float) -> None:
    """fairseq's tri_stage: from 0.01 of the rate to all of it, hold, then exp(-k log(1/floor) / decay steps);
    floor 0.05."""
    expected = (
        [0.01 + 0.99 * step / 10 for step in range(10)]
        + [1.0] * 40
        + [floor ** (step / 50) for step in range(50)]
    )
    assert factors(100, schedule="tri_stage", final_lr_ratio=ratio) == pytest.approx(expected)
    short = factors(100, schedule="tri_stage", tri_stage=(0.0, 0.0, 0.5))
    assert short[0] == 1.0 and short[50:] == pytest.approx([0.05] * 50)


def test_the_logged_learning_rate_is_the_schedules(tmp_path: Path) -> None:
    run_linear(tmp_path / "run", training={"log_every": 1}, lr=0.02, schedule="linear", warmup_steps=3)
    expected = [0.02 * x for x in factors(12, schedule="linear", warmup_steps=3)]
    assert [line["lr"] for line in lines(tmp_path / "run")] == pytest.approx(expected)


def test_a_group_can_have_its_own_rate(tmp_path: Path) -> None:
    class Slow(LinearTask):
        def parameter_groups(self) -> list[dict]:
            head, body = self.model.head.parameters(), self.model.body.parameters()
            return [{"params": list(head)}, {"params": list(body), "lr_scale": 0.0}]

    fresh = Slow().model.state_dict()
    run_linear(tmp_path / "run", Slow())
    assert torch.equal(weights(tmp_path / "run")["body.weight"], fresh["body.weight"])
    assert not torch.equal(weights(tmp_path / "run")["head.weight"], fresh["head.weight"])


def test_bfloat16_autocast_keeps_float32_weights(tmp_path: Path) -> None:
    summary = run_linear(tmp_path / "run", training={"precision": "bfloat16"})
    assert math.isfinite(summary["loss_last"])
    assert all(tensor.dtype == torch.float32 for tensor in weights(tmp_path / "run").values())


# The best validation, and patience

NAN = math.nan


def scored(
    out: Path, scores: list[float], on_step: Callable[[int], None] = lambda step: None, **training: object
) -> dict:
    """Twelve steps, a validation after every second one, with dropout."""
    settings = {"keep_best": True, "validate_every": 2, "keep_checkpoints": 1, **training}
    return run_linear(
        out, ScoredTask(scores, dropout=0.3, on_step=on_step), settings, monitor=("valid_score",)
    )


def steps_of(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in run.glob("step_*"))


def best_of(run: Path) -> dict[str, torch.Tensor]:
    return load_weights(run)[0]


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([5, 4, 3, 4, 4, 4], 6),
        ([5, 4, 3, 2, 1, 0], 12),
        ([1, 2, 3, 4, 5, 6], 2),
        ([3, 2, 2, 2, 3, 2], 4),  # of equals the first
        ([NAN, 3, NAN, 4, math.inf, NAN], 4),
        ([math.inf] * 6, None),
    ],
)
def test_the_checkpoint_of_the_best_validation_is_kept_beside_the_last(
    tmp_path: Path, scores: list[float], best: int | None
) -> None:
    run_linear(
        tmp_path / "every", ScoredTask(scores, dropout=0.3), {"checkpoint_every": 2, "keep_checkpoints": 9}
    )
    summary = scored(tmp_path / "run", scores)
    assert (summary.get("best_step"), summary["steps"]) == (best, 12)
    assert steps_of(tmp_path / "run") == sorted({12, best or 12})
    last = load_file(tmp_path / "every" / "step_00000012" / "model.safetensors")
    chosen = (
        last if best is None else load_file(tmp_path / "every" / f"step_{best:08d}" / "model.safetensors")
    )
    assert same(best_of(tmp_path / "run"), chosen) and same(
        load_weights(tmp_path / "run", best=False)[0], last
    )
    if best is not None:
        assert summary["best_valid_score"] == min(score for score in scores if not math.isnan(score))
    files = {f"step_{step:08d}/model.safetensors" for step in {12, best or 12}}
    assert read_meta(tmp_path / "run")["files"].keys() == files
    (tmp_path / "run" / "meta.json").unlink()  # as a run that is not finished
    assert same(best_of(tmp_path / "run"), chosen)


def test_keeping_the_best_changes_nothing_of_the_run_itself(tmp_path: Path) -> None:
    run_linear(tmp_path / "off", ScoredTask([3, 2, 4, 4, 4, 4], dropout=0.3), {"validate_every": 2})
    scored(tmp_path / "on", [3, 2, 4, 4, 4, 4], keep_checkpoints=2)
    assert_same_run(tmp_path / "off", tmp_path / "on")
    assert "best_step" not in read_toml(tmp_path / "off" / "config.toml") and steps_of(tmp_path / "off") == [
        8,
        12,
    ]
    # where none was kept the best known is the last
    assert same(best_of(tmp_path / "off"), weights(tmp_path / "off"))


@pytest.mark.parametrize(
    ("scores", "patience", "end"),
    [
        ([3, 4, 4, 1, 1, 1], 2, 6),
        ([3, 4, 2, 4, 4, 1], 2, 10),
        ([3, 4, 4, 4, 4, 4], 5, 12),
        ([NAN] * 6, 3, 6),
        ([2, 2, 2, 0, 0, 0], 2, 6),
    ],
)
def test_patience_ends_a_run_after_so_many_validations_without_a_better_one(
    tmp_path: Path, scores: list[float], patience: int, end: int
) -> None:
    summary = scored(tmp_path / "run", scores, patience=patience)
    assert summary["steps"] == lines(tmp_path / "run")[-1]["step"] == max(steps_of(tmp_path / "run")) == end
    assert summary["stopped_early"] == (end < 12)


def test_of_equal_validations_the_next_metric_decides(tmp_path: Path) -> None:
    """A recogniser that writes nothing yet has a word error rate of 1 while its loss falls: that is no reason
    to stop."""
    monitor = ("valid_score", "valid_loss")
    settings = {"keep_best": True, "validate_every": 2, "patience": 3, "max_steps": 30}
    summary = run_linear(tmp_path / "run", ScoredTask([1.0] * 15), settings, monitor=monitor)
    losses = {line["step"]: line["valid_loss"] for line in lines(tmp_path / "run") if "valid_loss" in line}
    assert len(losses) > 4 and summary["best_step"] == min(losses, key=lambda step: losses[step])
    assert summary["best_valid_loss"] == min(losses.values()) and summary["best_valid_score"] == 1.0


def test_patience_waits_for_what_is_frozen(tmp_path: Path) -> None:
    settings = {"keep_best": True, "validate_every": 2, "patience": 2}
    summary = run_linear(
        tmp_path / "run", ScoredTask([1, 2, 2, 2, 2, 2], freeze_steps=6), settings, monitor=("valid_score",)
    )
    assert summary["steps"] == 10  # the validations of steps 8 and 10


@pytest.mark.parametrize("scores", [[3, 2, 4, 5, 5, 5], [5, 4, 3, 3, 2, 3]])
@pytest.mark.parametrize("step", [1, 4, 5, 7, 9, 11])
def test_resume_with_patience_matches_an_uninterrupted_run(
    tmp_path: Path, scores: list[float], step: int
) -> None:
    for options in ({"patience": 3}, {"patience": 3, "keep_checkpoints": 2}):
        one, two = (tmp_path / f"{name}{len(options)}" for name in ("whole", "cut"))
        whole = scored(one, scores, **options)
        try:
            scored(two, scores, fail_at(step), **options)
        except RuntimeError:
            again = scored(two, scores, **options)
            assert {key: again[key] for key in ("best_step", "steps", "stopped_early")} == {
                key: whole[key] for key in ("best_step", "steps", "stopped_early")
            }
        assert_same_run(one, two)
        assert read_meta(one)["fingerprint"] == read_meta(two)["fingerprint"] and same(
            best_of(one), best_of(two)
        )


def test_a_run_killed_between_its_early_stop_and_its_end_only_has_to_be_declared_finished(
    tmp_path: Path,
) -> None:
    first = scored(tmp_path / "run", [3, 4, 4, 1, 1, 1], patience=2)
    for name in ("meta.json", "summary.json"):
        (tmp_path / "run" / name).unlink()
    again = scored(tmp_path / "run", [3, 4, 4, 1, 1, 1], patience=2)
    assert (
        again["steps_this_time"] == 0
        and again["steps"] == 6
        and again["best_step"] == first["best_step"] == 2
    )
    assert is_complete(tmp_path / "run")


def damage(run: Path, step: int) -> None:
    path = run / f"step_{step:08d}" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("damaged", [[10], [4], [10, 4], [8, 10], [4, 8, 10]])
def test_a_run_resumed_over_damaged_checkpoints_ends_as_it_would_have(
    tmp_path: Path, damaged: list[int], keep: int
) -> None:
    """Best at step 4, then at 10. Where the newest is damaged the one before leads there again, without the
    best before it."""
    scores = [3, 2, 4, 4, 1, 4]
    scored(tmp_path / "whole", scores, keep_checkpoints=keep)
    with pytest.raises(RuntimeError):
        scored(tmp_path / "cut", scores, fail_at(11), keep_checkpoints=keep)
    for step in damaged:
        if step in steps_of(tmp_path / "cut"):
            damage(tmp_path / "cut", step)
    summary = scored(tmp_path / "cut", scores, keep_checkpoints=keep)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    assert summary["best_step"] == 10 and same(best_of(tmp_path / "whole"), best_of(tmp_path / "cut"))
    with pytest.raises(
        ValueError, match="step_00000010: the best checkpoint is damaged.*remove that folder .* step_00000012"
    ):
        damage(tmp_path / "cut", 10)
        best_of(tmp_path / "cut")


def test_without_the_folder_of_the_best_checkpoint_the_last_is_used_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scored(tmp_path / "run", [3, 2, 4, 4, 4, 4])
    assert (
        not same(best_of(tmp_path / "run"), weights(tmp_path / "run"))
        and capsys.readouterr().err.count("is gone") == 0
    )
    shutil.rmtree(tmp_path / "run" / "step_00000004")
    assert same(best_of(tmp_path / "run"), weights(tmp_path / "run"))
    assert "step_00000004: the best checkpoint is gone; using step_00000012" in capsys.readouterr().err


def test_what_is_saved_after_a_return_to_an_earlier_step_outlives_the_damaged_ones_beyond_it(
    tmp_path: Path,
) -> None:
    for step, found in ((9, [8]), (6, [4])):
        with pytest.raises(RuntimeError):
            run_linear(tmp_path / "run", LinearTask(on_step=fail_at(step)), {"keep_checkpoints": 1})
        assert steps_of(tmp_path / "run") == found
        if step == 9:
            damage(tmp_path / "run", 8)


def test_a_damaged_best_is_told_and_the_rest_of_the_run_judged_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RuntimeError):
        scored(tmp_path / "run", [3, 1, 4, 5, 3, 3], fail_at(9), checkpoint_every=8)
    assert steps_of(tmp_path / "run") == [4, 8]
    damage(tmp_path / "run", 4)
    summary = scored(tmp_path / "run", [3, 1, 4, 5, 3, 3], checkpoint_every=8)
    assert (
        "best checkpoint, of step 4, is damaged (model.safetensors); judged anew" in capsys.readouterr().err
    )
    assert summary["best_step"] == 10 and steps_of(tmp_path / "run") == [10, 12]


def test_what_is_kept_may_change_between_sessions(tmp_path: Path) -> None:
    scores = [3, 1, 4, 5, 3, 3]
    with pytest.raises(RuntimeError):
        scored(tmp_path / "run", scores, fail_at(7), keep_checkpoints=3)
    with pytest.raises(RuntimeError):
        scored(tmp_path / "run", scores, fail_at(9), keep_checkpoints=1)
    assert steps_of(tmp_path / "run") == [4, 8]  # of step 4 as the best
    assert scored(tmp_path / "run", scores, keep_checkpoints=2)["best_step"] == 4 and steps_of(
        tmp_path / "run"
    ) == [4, 8, 12]
    with pytest.raises(RuntimeError):
        scored(tmp_path / "late", scores, fail_at(5), keep_best=False)
    assert scored(tmp_path / "late", scores)["best_step"] == 10  # of those judged since


def test_patience_without_validations_is_a_message(tmp_path: Path) -> None:
    for given in ({"patience": 2}, {"patience": 2, "validate_every": 5}, {"patience": 2, "keep_best": True}):
        with pytest.raises(ValueError, match="set validate_every above 0 and keep_best = true"):
            TrainingConfig.model_validate({"max_steps": 10, **given})
    with pytest.raises(ValueError, match="training.patience needs a validation set"):
        run_linear(tmp_path / "run", LinearTask(), {"patience": 1, "keep_best": True, "validate_every": 2})
    summary = run_linear(tmp_path / "run", LinearTask(), {"keep_best": True, "validate_every": 2})
    assert "best_step" not in summary and same(best_of(tmp_path / "run"), weights(tmp_path / "run"))


def test_the_event_files_of_sessions_within_a_second_are_named_in_their_order(tmp_path: Path) -> None:
    opened: list[str] = []
    for _ in range(12):
        Board(tmp_path, None).close()
        opened += [path.name for path in tmp_path.iterdir() if path.name not in opened]
    assert len(opened) == 12 and sorted(opened) == opened

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks import engine
from benchmarks.measure import Measurement

TINY = (
    "--architecture tiny --batch-seconds 4 --total-seconds 30 --rounds 1 --warmup 0 --steps 20 --threads 1 "
    "--json".split()
)


def test_the_clock_counts_from_the_end_of_the_tenth_update_to_that_of_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times = iter([100.0, 107.0])
    # asked twice, and no more
    monkeypatch.setattr("benchmarks.engine_tasks.time.perf_counter", lambda: next(times))
    clock = engine.Clock(20, "cpu")
    hook: Callable[[], None] = register_optimizer_step_post_hook(clock).remove
    weight = torch.nn.Parameter(torch.zeros(1))
    adamw = torch.optim.AdamW([weight])
    for _ in range(20):
        weight.grad = torch.ones(1)
        adamw.step()
    hook()
    assert clock.done == 20 and clock.seconds == 7.0


def test_a_pair_of_engines_is_reported_in_milliseconds_and_with_the_largest_rank() -> None:
    parts = {"loss": 2.0, "run_seconds": 9.0, "largest_rank_gb": 0.5}
    ours, peer = Measurement([100.0], 0.4, {}, parts), Measurement([50.0], 0.6, {}, {**parts, "loss": 3.0})
    found = engine.figures(ours, peer)
    assert (found["ours_ms_per_step"], found["peer_ms_per_step"], found["ratio"]) == (10, 20, 2)
    assert (found["ours_peak_gb"], found["peer_peak_gb"], found["peer_loss"]) == (0.5, 0.6, 3.0)
    assert engine.figures(ours, None)["peer_ms_per_step"] is None
    shown = engine.show({"tasks": {"lm 2": found, "lm 1": engine.figures(ours, None)}})
    assert (
        "lm                 2        10.00        20.00    2.00" in shown
        and "10.00            -       -" in shown
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--steps", "10"], "--steps 10"),
        (["--steps", "25"], "--steps 25"),
        (["--processes", "0"], "--processes"),
    ],
)
def test_a_mistake_ends_with_status_2(
    given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert engine.main(given) == 2
    assert message in capsys.readouterr().err


def test_ports_for_the_ranks_differ_from_round_to_round() -> None:
    assert len(set(engine.free_ports(5))) == 5


@pytest.mark.slow
def test_our_engine_alone_runs_every_task(capsys: pytest.CaptureFixture[str]) -> None:
    assert engine.main([*TINY, "--peer", "none", "--processes", "1"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result["tasks"]) == {f"{task} 1" for task in engine.TASKS}
    assert all(found["ours"] > 0 and np.isfinite(found["ours_loss"]) for found in result["tasks"].values())
    assert result["peer_name"] is None and "--processes 1 --steps 20" in result["command"]


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["1", "2"])
def test_both_engines_have_the_same_loss(processes: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("fairseq2")
    assert engine.main([*TINY, "--tasks", "idle", "lm", "--processes", processes]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    for found in result["tasks"].values():
        assert found["ratio"] == found["ours"] / found["peer"] > 0
        # what tests/fairseq2/test_engine.py allows
        assert found["peer_loss"] == pytest.approx(found["ours_loss"], rel=1e-5)

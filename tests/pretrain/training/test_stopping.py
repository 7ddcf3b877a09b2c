"""A stopped run goes on to what it would have been, in weights, optimiser, log and sample ids; and the signal
arrives."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import wordless.cli
import wordless.running
from pretrain.store.artefact import is_complete, read_meta
from pretrain.training import run as run_module
from pretrain.training import stopping
from pretrain.training.checkpoint import latest_checkpoint
from pretrain.training.parallel import World
from pretrain.training.runlog import Window
from pretrain.training.stopping import STOPPING, Stop, lost_ranks_told
from tests.pretrain import runs
from tests.pretrain.linear_task import LinearTask, Pairs, run_linear
from tests.pretrain.runs import curve
from tests.pretrain.stopping_worker import (
    MONITOR,
    PATIENT,
    SCORES,
    Validated,
    broken_off,
    elastic,
    once_at,
    one_session,
    stop_self,
    until_finished,
)

ROOT = Path(__file__).parents[3]
WORKER = ROOT / "tests" / "pretrain" / "stopping_worker.py"
ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def _nothing_is_left_for_the_next_run() -> Iterator[None]:
    before = [signal.getsignal(number) for number in STOPPING]
    yield
    stopping._unanswered = 0
    for number, handler in zip(STOPPING, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def received() -> list[int]:
    """Signals that reach the handlers of this process, in order."""
    numbers: list[int] = []
    for number in STOPPING:
        signal.signal(number, lambda number, frame: numbers.append(number))
    return numbers


def assert_same_run(one: Path, two: Path) -> None:
    """And what the checkpoints say of the position, and the finished runs."""
    runs.assert_same_run(one, two)
    assert read_meta(one)["fingerprint"] == read_meta(two)["fingerprint"]
    states = [state_of(run) for run in (one, two)]
    for state in states:
        del state["seconds"], state["sha256"]  # one of state.json itself may be among them
    assert states[0] == states[1]


def state_of(run: Path) -> dict[str, Any]:
    path = latest_checkpoint(run)
    assert path is not None
    state: dict[str, Any] = json.loads((path / "state.json").read_text())
    return state


# One process


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_stops_after_the_step_saves_says_so_and_is_passed_on(
    tmp_path: Path, received: list[int], capsys: pytest.CaptureFixture[str], number: int
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_linear(tmp_path / "run", LinearTask(on_step=once_at(6, number=number)))
    assert stopped.value.code == 128 + number and received == [number]
    name = signal.Signals(number).name
    assert (
        f"run: stopped by {name} after step 7, saved; the same command goes on from there"
        in capsys.readouterr().err
    )
    assert state_of(tmp_path / "run")["step"] == 7 and not is_complete(tmp_path / "run")
    assert [line["step"] for line in curve(tmp_path / "run")] == [2, 4, 6]  # no line of its own


@pytest.mark.parametrize("seed", range(3))
def test_a_run_stopped_at_random_steps_becomes_the_run_that_was_not(tmp_path: Path, seed: int) -> None:
    options: dict[str, Any] = {"dropout": 0.3, "freeze_steps": 9, "num_valid": 2}
    settings = {"max_steps": 24, "log_every": 5, "accumulate": 2, "validate_every": 7}
    run_linear(tmp_path / "whole", LinearTask(**options), settings)
    points = np.random.default_rng(seed).choice(23, 4, replace=False)
    on_step = once_at(*map(int, points))
    _, stops = until_finished(
        lambda: run_linear(tmp_path / "cut", LinearTask(on_step=on_step, **options), settings)
    )
    assert stops == 4
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("at", [{0}, {2}, {3, 4, 5}, {6, 9, 13}])
def test_a_stop_within_a_validation_costs_one_batch_and_changes_neither_best_nor_patience(
    tmp_path: Path, at: set[int]
) -> None:
    """Every validation has three batches: a stop noted before one is acted on after that batch, or after the
    third at the end."""
    summary = run_linear(tmp_path / "whole", Validated(SCORES, dropout=0.3), PATIENT, MONITOR)
    assert summary["steps"] == 10 and summary["best_step"] == 6
    again, stops = until_finished(broken_off(tmp_path / "cut", at, **PATIENT))
    assert stops == len(at)
    assert {key: again[key] for key in ("steps", "best_step", "stopped_early", "best_valid_score")} == {
        key: summary[key] for key in ("steps", "best_step", "stopped_early", "best_valid_score")
    }
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_validation_that_was_broken_off_is_the_first_thing_done(
    tmp_path: Path, received: list[int]
) -> None:
    task = Validated(SCORES, {3}, dropout=0.3)
    with pytest.raises(SystemExit):
        run_linear(tmp_path / "run", task, PATIENT, MONITOR)
    assert task.validated == 4  # the first validation and one batch of the second
    assert state_of(tmp_path / "run")["step"] == 4 and [line["step"] for line in curve(tmp_path / "run")] == [
        2
    ]
    seen: list[tuple[int, int]] = []
    task = Validated(SCORES, dropout=0.3, on_step=lambda step: seen.append((step, task.validated)))
    run_linear(tmp_path / "run", task, PATIENT, MONITOR)
    assert seen[:2] == [(3, 0), (4, 3)]


def test_a_stop_of_the_first_batch_of_the_last_validation_leaves_only_that_to_do(
    tmp_path: Path, received: list[int]
) -> None:
    with pytest.raises(SystemExit):
        run_linear(tmp_path / "run", Validated(SCORES, {0}, dropout=0.3), {"keep_best": True}, MONITOR)
    assert state_of(tmp_path / "run")["step"] == 12 and not is_complete(tmp_path / "run")
    task = Validated(SCORES, dropout=0.3)
    summary = run_linear(tmp_path / "run", task, {"keep_best": True}, MONITOR)
    assert summary["steps"] == 12 and summary["steps_this_time"] == 0 and task.served[-1][0] == -1
    run_linear(tmp_path / "whole", Validated(SCORES, dropout=0.3), {"keep_best": True}, MONITOR)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_signal_during_the_evaluation_stops_after_it_and_keeps_it(
    tmp_path: Path, received: list[int]
) -> None:
    with pytest.raises(SystemExit):
        run_linear(tmp_path / "run", Validated(SCORES, in_evaluate={1}, dropout=0.3), PATIENT, MONITOR)
    assert state_of(tmp_path / "run")["step"] == 4 and [line["step"] for line in curve(tmp_path / "run")] == [
        2,
        4,
    ]
    assert "unseen" not in state_of(tmp_path / "run")


def test_a_signal_when_the_run_is_as_good_as_finished_lets_it_and_stops_the_next(
    tmp_path: Path, received: list[int]
) -> None:
    summary = run_linear(tmp_path / "run", LinearTask(on_step=once_at(11)))
    assert summary["steps"] == 12 and is_complete(tmp_path / "run") and received == []
    task = LinearTask()
    with pytest.raises(SystemExit):
        run_linear(tmp_path / "next", task)
    assert received == [signal.SIGUSR2] and latest_checkpoint(tmp_path / "next") is None
    assert run_linear(tmp_path / "next")["steps"] == 12  # answered: it goes no further


def test_what_else_a_process_does_does_not_wait_for_a_training_to_hear_a_late_signal(
    received: list[int],
) -> None:
    stopping.answer_late()
    assert not received
    stopping._unanswered = signal.SIGTERM
    with pytest.raises(SystemExit) as stop:
        stopping.answer_late()
    assert received == [signal.SIGTERM] and stop.value.code == 143
    stopping.answer_late()  # once


def test_a_rank_lost_after_the_run_is_finished_is_told_and_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = World(0, 2, torch.device("cpu"))
    with (
        pytest.raises(ConnectionError, match="lost another one"),
        stopping.lost_ranks_told(tmp_path, world, lambda: None),
    ):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    (tmp_path / "meta.json").write_text("{}")
    with stopping.lost_ranks_told(tmp_path, world, lambda: None):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    assert "finished, but rank 0 lost another one" in capsys.readouterr().err


def test_a_kill_after_a_late_validation_is_logged_does_not_log_it_twice(
    tmp_path: Path, received: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_linear(tmp_path / "whole", Validated(SCORES, dropout=0.3), PATIENT, MONITOR)
    with pytest.raises(SystemExit):
        run_linear(tmp_path / "cut", Validated(SCORES, {4}, dropout=0.3), PATIENT, MONITOR)

    def fail(*arguments: object, **named: object) -> None:
        raise OSError("power cut")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="power cut"):
        patched.setattr(run_module, "save_checkpoint", fail)
        run_linear(tmp_path / "cut", Validated(SCORES, dropout=0.3), PATIENT, MONITOR)
    assert [line["step"] for line in curve(tmp_path / "cut")] == [2, 4]
    run_linear(tmp_path / "cut", Validated(SCORES, dropout=0.3), PATIENT, MONITOR)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_stop_never_saves_what_is_not_finite(tmp_path: Path, received: list[int]) -> None:
    task = LinearTask(nan_from=1, on_step=once_at(6))  # epoch 1 begins at step 5
    with pytest.raises(
        ValueError, match="stopped at step 7: loss and gradient_norm not finite, first in step 6"
    ):
        run_linear(tmp_path / "run", task, {"log_every": 1000})
    assert state_of(tmp_path / "run")["step"] == 4


def test_a_signal_while_waiting_for_batches_stops_at_the_next_boundary(
    tmp_path: Path, received: list[int]
) -> None:
    class Slow(LinearTask):
        """Its seventh batch takes as long as the signal, which comes while the loop waits for it."""

        def collate(self, items: np.ndarray, epoch: int) -> Pairs:
            batch = super().collate(items, epoch)
            if len(self.served) == 7:
                time.sleep(0.3)
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.1)
            return batch

    with pytest.raises(SystemExit):
        run_linear(tmp_path / "run", Slow(), {"loader_threads": 1, "checkpoint_every": 100})
    assert received == [signal.SIGTERM] and state_of(tmp_path / "run")["step"] == 7


def test_handlers_are_put_back_on_every_way_out(tmp_path: Path, received: list[int]) -> None:
    before = [signal.getsignal(number) for number in STOPPING]
    during: list[Any] = []
    run_linear(
        tmp_path / "finished",
        LinearTask(on_step=lambda step: during.append(signal.getsignal(signal.SIGTERM))),
    )
    assert len(during) == 12 and before[0] not in during
    assert [signal.getsignal(number) for number in STOPPING] == before

    def fail(step: int) -> None:
        raise RuntimeError("fault")

    with pytest.raises(RuntimeError, match="fault"):
        run_linear(tmp_path / "failed", LinearTask(on_step=fail))
    assert [signal.getsignal(number) for number in STOPPING] == before
    with pytest.raises(SystemExit):
        run_linear(tmp_path / "stopped", LinearTask(on_step=once_at(3)))
    assert [signal.getsignal(number) for number in STOPPING] == before


def test_an_ignored_signal_stays_ignored(tmp_path: Path) -> None:
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    assert run_linear(tmp_path / "run", LinearTask(on_step=once_at(3)))["steps"] == 12


def test_another_thread_trains_without_handlers(tmp_path: Path, received: list[int]) -> None:
    seen = []
    task = LinearTask(on_step=lambda step: seen.append(signal.getsignal(signal.SIGTERM)))
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=run_linear, args=(tmp_path / "run", task))
    thread.start()
    thread.join()
    assert is_complete(tmp_path / "run") and set(seen) == {before}


def test_of_several_signals_the_greatest_counts_and_a_stop_asked_once_stays(received: list[int]) -> None:
    with Stop(ALONE) as stop:
        assert not stop.check()
        stop_self(signal.SIGTERM)
        stop_self(signal.SIGUSR2)
        assert stop.check() and stop.signal == signal.SIGTERM
        assert stop.check()
    assert received == []


def test_a_window_shared_out_among_other_ranks_keeps_its_sums() -> None:
    window = Window()
    window._add("loss", torch.tensor(3.0).double(), torch.tensor(2.0).double())
    window._add("_codes", torch.arange(6.0).double().view(2, 3), torch.tensor(4.0).double())
    window.amount = 7.0
    state = window.to_state(ALONE)
    state["ranks"] = [
        state["ranks"][0],
        [2 * value for value in state["ranks"][0]],
        state["ranks"][0],
    ]  # as of three ranks
    state = json.loads(json.dumps(state))
    for size in (1, 2, 3, 5):
        windows = [Window.from_state(state, World(rank, size, torch.device("cpu"))) for rank in range(size)]
        for name, (total, count) in window.sums.items():
            torch.testing.assert_close(sum(part.sums[name][0] for part in windows), 4 * total, rtol=0, atol=0)
            torch.testing.assert_close(sum(part.sums[name][1] for part in windows), 4 * count, rtol=0, atol=0)
        assert all(part.amount == 7.0 for part in windows)
    assert Window().to_state(ALONE) == {} and Window.from_state({}, ALONE).sums == {}


def test_a_rank_whose_others_never_come_says_where_it_waited_and_how_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.socket() as silent:
        # and kept, without listening, so that nobody else takes the port and answers
        silent.bind(("127.0.0.1", 0))
        port = str(silent.getsockname()[1])
        for name, value in {
            "RANK": "1",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(
            ConnectionError,
            match=rf"rank 1 of 2 did not meet the others at 127\.0\.0\.1:{port} within 0\.5 s",
        ):
            World.join("cpu", 0.5)


def test_the_command_tells_of_a_lost_rank_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def lost(*arguments: object) -> None:
        with lost_ranks_told(tmp_path / "run", World(1, 4, torch.device("cpu")), lambda: None):
            raise RuntimeError("[gloo/transport/tcp/pair.cc:537] Connection closed by peer")

    monkeypatch.setattr(wordless.running, "run_verb", lost)
    (tmp_path / "config.toml").write_text("")
    assert wordless.cli.main(["pretrain", str(tmp_path / "config.toml")]) == 1
    error = capsys.readouterr().err
    assert (
        error.startswith("wordless: ")
        and "rank 1 of 4 lost another one" in error
        and "checkpoint: none yet" in error
    )
    assert "pair.cc:537" in error and "Traceback" not in error
    with (
        pytest.raises(RuntimeError, match="shapes"),
        lost_ranks_told(tmp_path / "run", World(1, 4, torch.device("cpu")), lambda: None),
    ):
        raise RuntimeError("shapes do not fit")  # its own mistake stays what it is


# Processes


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if (run / "metrics.jsonl").is_file() and len(
            (run / "metrics.jsonl").read_text().splitlines()
        ) >= step:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    raise AssertionError(f"{run} did not come to step {step}")


@pytest.mark.slow
def test_sigterm_ends_the_command_with_that_signal_and_the_same_command_finishes_the_run(
    tmp_path: Path, make_corpus: Callable[..., Any], make_labels: Callable[..., Path]
) -> None:
    rng = np.random.default_rng(0)
    manifest = make_corpus(
        tmp_path / "corpus",
        [0.1 * rng.standard_normal(16000) for _ in range(6)],
        splits=["train"] * 5 + ["dev"],
    )
    make_labels(tmp_path / "corpus" / "labels", dict.fromkeys(manifest.ids, 49))
    (tmp_path / "config.toml").write_text(
        f"""
        manifest = "{tmp_path}/corpus/manifest"
        objective = "hubert"
        labels = "{tmp_path}/corpus/labels"
        [encoder]
        architecture = "tiny"
        [batches]
        batch_seconds = 2.0
        [alarm]
        after_steps = 1000
        [training]
        max_steps = 60
        log_every = 1
        validate_every = 20
        device = "cpu"
        """
    )

    def start(out: str) -> subprocess.Popen[str]:
        command = [
            sys.executable,
            "-m",
            "wordless",
            "pretrain",
            str(tmp_path / "config.toml"),
            f"out={tmp_path / out}",
        ]
        return subprocess.Popen(
            command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    whole, cut = start("whole"), start("cut")
    wait_for_step(tmp_path / "cut", 3, cut)
    cut.send_signal(signal.SIGTERM)
    _, error = cut.communicate(timeout=180)
    assert (
        cut.returncode == -signal.SIGTERM
        and "stopped by SIGTERM after step" in error
        and "Traceback" not in error
    ), error
    assert 3 <= state_of(tmp_path / "cut")["step"] < 60
    again = start("cut")
    for process in (again, whole):
        _, error = process.communicate(timeout=180)
        assert process.returncode == 0, error
    assert curve(tmp_path / "whole") == curve(tmp_path / "cut")
    for name in ("model.safetensors", "optimizer.safetensors"):
        one, two = (tmp_path / run / "step_00000060" / name for run in ("whole", "cut"))
        assert one.read_bytes() == two.read_bytes()


def torchrun_command(*arguments: str | Path) -> list[str]:
    """After the interpreter."""
    return ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *map(str, arguments)]


def torchrun(*arguments: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *torchrun_command(WORKER, *arguments)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["slow", "slow_full"])
def test_sigterm_to_torchrun_stops_both_processes_after_the_same_step(tmp_path: Path, scenario: str) -> None:
    process = torchrun(scenario, tmp_path / "run")
    try:
        wait_for_step(tmp_path / "run", 2, process)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=180)
    finally:
        process.kill()
    assert process.returncode != 0 and "stopped by SIGTERM after step" in output, output
    state = state_of(tmp_path / "run")
    assert 2 <= state["step"] < 100 and f"after step {state['step']}, saved" in output
    # what one process makes of the rest is what it makes of the whole, but for the dropout that ranks draw
    # apart
    run_linear(tmp_path / "run", LinearTask(dropout=0.3), {"max_steps": 100, "checkpoint_every": 50})
    assert is_complete(tmp_path / "run") and [line["step"] for line in curve(tmp_path / "run")] == list(
        range(2, 101, 2)
    )


@pytest.mark.slow
@pytest.mark.parametrize("how", ["hangs", "dies"])
@pytest.mark.parametrize(("when", "last"), [("before", "none yet"), ("within", "step_00000004")])
def test_a_rank_that_dies_or_hangs_ends_the_others_with_a_message_that_says_how_to_go_on(
    tmp_path: Path, how: str, when: str, last: str
) -> None:
    """By hand, not under torchrun, which would end the others itself."""
    port = str(20000 + os.getpid() % 10000)
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), "lose", str(tmp_path / "run"), how, when],
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **shared),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        if when == "within":
            wait_for_step(tmp_path / "run", 2, processes[0])
        began = time.monotonic()
        _, error = processes[0].communicate(timeout=180)
        # two seconds or none, and the begin and end of a process on a busy machine
        assert time.monotonic() - began < 120
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert processes[0].returncode == 1
    assert "ConnectionError: " in error and "rank 0 of 2 lost another one" in error, error
    assert f"{last}; the same command goes on from there" in error, error
    run_linear(tmp_path / "run")
    run_linear(tmp_path / "whole")
    for one, two in zip(curve(tmp_path / "run"), curve(tmp_path / "whole"), strict=True):
        assert one == pytest.approx(two, rel=1e-5)  # two ranks to step 4: other sums in float32


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, two_processes: Callable[..., Any]) -> Path:
    """What stopping_worker's `everything` leaves, by two processes; and the elastic run to its end."""
    folder = tmp_path_factory.mktemp("stopping")
    with two_processes(WORKER, "everything", folder / "two", logs=folder / "logs", timeout=240):
        pass
    assert state_of(folder / "two" / "elastic")["step"] == 11
    one_session(lambda: elastic(folder / "two" / "elastic", "b", accumulate=2, on_step=once_at(17)))
    assert state_of(folder / "two" / "elastic")["step"] == 18
    with two_processes(WORKER, "elastic", folder / "two", logs=folder / "logs", timeout=120):
        elastic(folder / "one" / "elastic", "straight")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("how", ["none", "full"])
@pytest.mark.parametrize(("run", "reference"), [("stopped", "straight"), ("broken_off", "patient")])
def test_two_processes_stopped_by_a_signal_to_one_become_the_run_that_was_not_stopped(
    two: Path, run: str, reference: str, how: str
) -> None:
    assert_same_run(two / "two" / f"{reference}_{how}", two / "two" / f"{run}_{how}")


def ids(folder: Path) -> dict[int, list[list[int]]]:
    """The items of every step, over all sessions and ranks: [epoch, item], sorted."""
    steps: dict[int, list[list[int]]] = {}
    for path in sorted(folder.iterdir()):
        for line in map(json.loads, path.read_text().splitlines()):
            epoch, items = line["items"]
            steps.setdefault(line["step"], []).extend([epoch, item] for item in items)
    return {step: sorted(items) for step, items in steps.items()}


@pytest.mark.slow
def test_two_ranks_then_one_then_two_see_the_samples_of_a_straight_run_and_learn_the_same(two: Path) -> None:
    """Two ranks to step 11, one with accumulate = 2 to step 18, two to step 24, against one rank without a
    stop."""
    straight, resumed = two / "one" / "elastic", two / "two" / "elastic"
    assert sorted(path.name for path in (resumed.with_suffix(".ids")).iterdir()) == [
        "a_0.jsonl",
        "a_1.jsonl",
        "b_0.jsonl",
        "c_0.jsonl",
        "c_1.jsonl",
    ]
    plan = [(epoch, items) for epoch in range(5) for items in LinearTask().plan(epoch)]
    expected = {
        step: sorted([epoch, int(item)] for item in items) for step, (epoch, items) in enumerate(plan[:24])
    }
    assert ids(straight.with_suffix(".ids")) == ids(resumed.with_suffix(".ids")) == expected
    for one, other in zip(curve(straight), curve(resumed), strict=True):
        # The same sums in another order in float32, at most 24 updates long (see test_distributed: measured
        # 4e-7).
        assert other == pytest.approx(one, rel=1e-5, abs=1e-7), f"step {one['step']}"
    first, second = (load_file(run / "step_00000024" / "model.safetensors") for run in (straight, resumed))
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, rtol=1e-4, atol=1e-5)

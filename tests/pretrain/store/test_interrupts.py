"""Ctrl-C: a training saves and goes on bit for bit, everything else ends in a line, a second one ends at
once, no process is left."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import wordless.cli
from pretrain.store.artefact import is_complete
from pretrain.store.interrupts import second_interrupt_ends
from pretrain.training import stopping
from pretrain.training.checkpoint import latest_checkpoint
from tests.pretrain.linear_task import LinearTask, run_linear
from tests.pretrain.runs import assert_same_run
from tests.pretrain.stopping_worker import MONITOR, PATIENT, SCORES, Validated, once_at
from tests.pretrain.training.test_stopping import state_of, torchrun_command, wait_for_step

ROOT = Path(__file__).parents[3]
WORKER = ROOT / "tests" / "pretrain" / "interrupt_worker.py"
INTERRUPT = signal.SIGINT


@pytest.fixture(autouse=True)
def _nothing_is_left_for_the_next_run() -> Iterator[None]:
    before = signal.signal(INTERRUPT, signal.default_int_handler)
    yield
    stopping._unanswered = 0
    signal.signal(INTERRUPT, before)


# In this process


def test_ctrl_c_finishes_the_step_saves_and_tells_how_to_go_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(KeyboardInterrupt, match="run: stopped after step 7"):
        run_linear(tmp_path / "run", LinearTask(on_step=once_at(6, number=INTERRUPT)))
    told = capfd.readouterr().err.splitlines()
    assert told[0] == "Ctrl-C: stops after this step and saves; once more, and it ends at once"
    assert told[1].endswith(
        "run: stopped by Ctrl-C after step 7, saved; run the same command again to go on from step 7"
    )
    assert state_of(tmp_path / "run")["step"] == 7 and not is_complete(tmp_path / "run")
    assert signal.getsignal(INTERRUPT) is signal.default_int_handler


def test_a_run_interrupted_at_random_steps_becomes_the_run_that_was_not(tmp_path: Path) -> None:
    options: dict[str, Any] = {"dropout": 0.3, "freeze_steps": 9, "num_valid": 2}
    settings = {"max_steps": 24, "log_every": 5, "accumulate": 2, "validate_every": 7}
    run_linear(tmp_path / "whole", LinearTask(**options), settings)
    steps = np.random.default_rng(0).choice(23, 4, replace=False)
    on_step, interrupts = once_at(*map(int, steps), number=INTERRUPT), 0
    while not is_complete(tmp_path / "cut"):
        try:
            run_linear(tmp_path / "cut", LinearTask(on_step=on_step, **options), settings)
        except KeyboardInterrupt:
            interrupts += 1
    assert interrupts == 4
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_ctrl_c_within_a_validation_changes_neither_best_nor_patience(tmp_path: Path) -> None:
    run_linear(tmp_path / "whole", Validated(SCORES, dropout=0.3), PATIENT, MONITOR)

    class Interrupted(Validated):
        def collate_validation(self, items: np.ndarray) -> Any:
            if self.validated == 3:
                os.kill(os.getpid(), INTERRUPT)
            return super().collate_validation(items)

    with pytest.raises(KeyboardInterrupt):
        run_linear(tmp_path / "cut", Interrupted(SCORES, dropout=0.3), PATIENT, MONITOR)
    assert state_of(tmp_path / "cut")["step"] == 4
    run_linear(tmp_path / "cut", Validated(SCORES, dropout=0.3), PATIENT, MONITOR)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_ctrl_c_in_the_last_step_lets_the_run_finish_and_stops_what_follows(tmp_path: Path) -> None:
    assert run_linear(tmp_path / "run", LinearTask(on_step=once_at(11, number=INTERRUPT)))["steps"] == 12
    with pytest.raises(KeyboardInterrupt):
        stopping.answer_late()
    stopping.answer_late()  # once


def test_an_ignored_ctrl_c_stays_ignored(tmp_path: Path) -> None:
    """As in the background of a script."""
    signal.signal(INTERRUPT, signal.SIG_IGN)
    with second_interrupt_ends():
        assert (
            run_linear(tmp_path / "run", LinearTask(on_step=once_at(3, 4, number=INTERRUPT)))["steps"] == 12
        )


def test_where_others_watch_signals_a_second_ctrl_c_is_python_s_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a notebook, whose loop has the wakeup descriptor."""
    monkeypatch.setattr(stopping, "together_seconds", lambda: -1.0)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)

    def twice(step: int) -> None:
        if step == 6:
            os.kill(os.getpid(), INTERRUPT)
            os.kill(os.getpid(), INTERRUPT)

    try:
        with pytest.raises(KeyboardInterrupt) as ended:
            run_linear(tmp_path / "run", LinearTask(on_step=twice))
        assert not ended.value.args and state_of(tmp_path / "run")["step"] == 4  # the last checkpoint
        assert signal.set_wakeup_fd(-1) == writer
    finally:
        signal.set_wakeup_fd(-1)
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize(
    ("verb", "end"), [("encode", "to go on from what is done"), ("measure", "to begin anew")]
)
def test_ctrl_c_in_a_verb_ends_with_130_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], verb: str, end: str
) -> None:
    module = {"encode": "quantize.encoding", "measure": "quantize.measuring"}[verb]

    def interrupted(config: object) -> None:
        os.kill(os.getpid(), INTERRUPT)
        time.sleep(10)

    monkeypatch.setattr(f"{module}.{verb}", interrupted)
    required = {"encode": "codebook = 'c'", "measure": "labels = 'l'"}[verb]
    (tmp_path / "c.toml").write_text(f"out = '{tmp_path}/out'\nmanifest = 'm'\n{required}\n")
    assert wordless.cli.main([verb, str(tmp_path / "c.toml")]) == 130
    captured = capfd.readouterr()
    assert (
        captured.err == f"{tmp_path}/out: stopped by Ctrl-C; run the same command again {end}\n"
        and captured.out == ""
    )
    assert [path.name for path in tmp_path.iterdir()] == ["c.toml"]


# Processes


@contextmanager
def started(command: list[str | Path], **more: str) -> Iterator["subprocess.Popen[str]"]:
    """In a group of its own, as a terminal starts a command."""
    code = [
        sys.executable,
        "-c",
        "import os, signal, sys; signal.signal(2, signal.default_int_handler); os.execv(sys.argv[1], "
        "sys.argv[1:])",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}
    process = subprocess.Popen(
        [*code, sys.executable, *map(str, command)],
        env=environment,
        start_new_session=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def ctrl_c(process: "subprocess.Popen[str]") -> None:
    os.killpg(process.pid, INTERRUPT)


def wait_for(condition: Any, process: "subprocess.Popen[str]", seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def config(folder: Path, **keys: Any) -> Path:
    path = folder / "config.toml"
    path.write_text(
        "".join(f"{key} = {value!r}\n" for key, value in {"out": str(folder / "run"), **keys}.items())
    )
    return path


def test_ctrl_c_of_a_command_saves_ends_with_130_and_the_same_command_finishes_the_run(
    tmp_path: Path,
) -> None:
    """Two stages: the second is not begun. Two signals at once, as under a launcher, are one."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f"run = '{tmp_path}/units'\n[one]\nverb = 'pretrain'\n[two]\nverb = 'pretrain'\nseconds = 0.0\n"
    )
    with started([WORKER, "run", recipe]) as process:
        wait_for_step(tmp_path / "units" / "one", 3, process)
        ctrl_c(process)
        time.sleep(0.01)
        ctrl_c(process)
        out, error = process.communicate(timeout=60)
    assert process.returncode == 130 and out == "" and "Traceback" not in error, error
    step = state_of(tmp_path / "units" / "one")["step"]
    assert (
        3 <= step < 100
        and f"after step {step}, saved; run the same command again to go on from step {step}\n" in error
    )
    assert error.count("stopped by Ctrl-C") == 1
    assert not (tmp_path / "units" / "two").exists() and not list(tmp_path.rglob(".*"))
    with started([WORKER, "run", recipe]) as process:
        _, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    assert_same_run(tmp_path / "units" / "two", tmp_path / "units" / "one")  # the same training, in one go


def test_a_second_ctrl_c_ends_at_once_even_where_no_handler_of_python_s_runs(tmp_path: Path) -> None:
    with started([WORKER, "pretrain", config(tmp_path, how="stuck")]) as process:
        wait_for((tmp_path / "run" / "stuck").exists, process)
        ctrl_c(process)
        time.sleep(1.2)
        assert process.poll() is None
        ctrl_c(process)
        _, error = process.communicate(timeout=5)
    assert process.returncode == 130 and "Ctrl-C: ended at once; what was saved before is there" in error, (
        error
    )
    assert latest_checkpoint(tmp_path / "run") is None


def test_ctrl_c_ends_processes_that_work_for_the_command_and_leaves_nothing(tmp_path: Path) -> None:
    def pids() -> list[int]:
        return [int(path.name) for path in (tmp_path / "run").glob("[0-9]*")]

    with started([WORKER, "pretrain", config(tmp_path, how="pool")]) as process:
        wait_for(lambda: len(pids()) == 2, process)
        ctrl_c(process)
        _, error = process.communicate(timeout=30)
        assert process.returncode == 130, error
        assert (
            error
            == f"{tmp_path}/run: stopped by Ctrl-C; run the same command again to go on from what is done\n"
        )
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids())
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.slow
def test_ctrl_c_under_torchrun_stops_both_processes_after_the_same_step(tmp_path: Path) -> None:
    """Each has it from the terminal, and again from torchrun."""
    command = torchrun_command(WORKER, "pretrain", config(tmp_path))
    with started(command) as process:
        wait_for_step(tmp_path / "run", 3, process)
        ctrl_c(process)
        _, error = process.communicate(timeout=90)
    assert process.returncode != 0
    step = state_of(tmp_path / "run")["step"]
    assert f"after step {step}, saved; run the same command again to go on from step {step}" in error, error
    with started(command) as process:
        _, error = process.communicate(timeout=90)
    assert process.returncode == 0 and is_complete(tmp_path / "run"), error


@pytest.mark.slow
def test_ctrl_c_of_a_local_job_waits_until_it_has_saved(tmp_path: Path) -> None:
    """The launcher, the controller and the task each have it from the terminal."""
    code = f"""
from pathlib import Path
from slurm.launch import Resources, launch
argv, jobs = ["pretrain", {str(config(tmp_path))!r}], Path({str(tmp_path / "jobs")!r})
launch(argv, "local", Resources(), jobs, wait=True, target="tests.pretrain.interrupt_worker:main")
"""
    with started(["-c", code]) as process:
        wait_for_step(tmp_path / "run", 3, process)
        ctrl_c(process)
        _, error = process.communicate(timeout=60)
    step = state_of(tmp_path / "run")["step"]
    assert (
        process.returncode != 0 and f"after step {step}, saved" in error and not list(tmp_path.glob(".*"))
    ), error
    with started([WORKER, "pretrain", tmp_path / "config.toml"]) as process:
        _, error = process.communicate(timeout=60)
    assert process.returncode == 0 and is_complete(tmp_path / "run"), error

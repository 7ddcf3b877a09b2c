"""What a task of a job says of itself, and what it does when a signal comes: each case as SLURM or a local
job brings it about."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from submitit import JobEnvironment
from submitit.core.utils import DelayedSubmission

from slurm.command import MAX_TIMEOUTS, SIGNAL_AT, Attempt, Command, CommandFailed
from slurm.submission import Heartbeat, TaskStatus, read_status, write_json

RUNNING = (
    "JobId=41 JobState=RUNNING RunTime=00:03:00 TimeLimit=00:10:00 PreemptEligibleTime=X PreemptTime=None "
    "Comment=a JobState=X"
)
SCONTROL = """#!/bin/bash
echo "$@" >>"$FAKE/asked"
[ "$1" = show ] && cat "$FAKE/shown"
[ "$1" = requeue ] && exit "$(cat "$FAKE/requeue_status")"
"""
SET_BY_A_TASK = [
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "WORDLESS_PROGRESS",
    "WORDLESS_ATTEMPT",
]
NEVER = "out of time 21 times"


class Job:
    """A task of a job as submitit starts it, in this process: its folder, and a scontrol that says what we
    tell it to."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder, self.monkeypatch = folder, monkeypatch
        (folder / "scontrol").write_text(SCONTROL)
        (folder / "scontrol").chmod(0o755)
        self.shows(RUNNING)
        (folder / "requeue_status").write_text("0")
        for name, value in {
            "FAKE": str(folder),
            "PATH": f"{folder}:{os.environ['PATH']}",
            "SUBMITIT_FOLDER": str(folder),
        }.items():
            monkeypatch.setenv(name, value)

    def shows(self, text: str) -> None:
        (self.folder / "shown").write_text(text)

    def attempt(
        self, place: str, *, rank: int = 0, num_tasks: int = 1, countdown: int = MAX_TIMEOUTS
    ) -> Attempt:
        variables = {
            "JOB_ID": 41,
            "NTASKS": num_tasks,
            "JOB_NUM_NODES": 1,
            "NODEID": 0,
            "PROCID": rank,
            "LOCALID": rank,
        }
        if place == "local":
            variables["GLOBALID"] = variables.pop("PROCID")
        self.monkeypatch.setenv("SUBMITIT_EXECUTOR", place)
        for name, value in variables.items():
            self.monkeypatch.setenv(
                f"SUBMITIT_LOCAL_{name}" if place == "local" else f"SLURM_{name}", str(value)
            )
        submission = DelayedSubmission(Command(["x"], "nowhere:main"))
        submission.set_timeout(10, countdown)
        submission.dump(self.folder / "41_submitted.pkl")
        return Attempt(submission.function, JobEnvironment())

    def status(self, rank: int = 0) -> TaskStatus:
        status = read_status(self.folder / f"41_{rank}_status.json")
        assert status is not None
        return status

    def requeues(self) -> int:
        asked = self.folder / "asked"
        return asked.read_text().splitlines().count("requeue 41") if asked.exists() else 0

    def countdown(self) -> int:
        return DelayedSubmission.load(self.folder / "41_submitted.pkl")._timeout_countdown


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Job]:
    for name in SET_BY_A_TASK:  # so that they are taken back
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "tracebacklimit", 1000, raising=False)
    handlers = {
        number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGCONT)
    }
    yield Job(tmp_path, monkeypatch)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def leaves(attempt: Attempt, number: int) -> object:
    """With which exit status a signal ends the task."""
    with pytest.raises(SystemExit) as stop:
        attempt.on_signal(number, None)
    assert stop.value.code == attempt.exit_code
    return stop.value.code


def test_preemption_is_no_timeout_even_of_a_job_of_ten_minutes(job: Job) -> None:
    for number in (signal.SIGUSR2, signal.SIGTERM):
        assert leaves(job.attempt("slurm"), number) == 255
        assert (job.status().state, job.status().timeouts, job.countdown()) == ("requeued", 0, MAX_TIMEOUTS)
    assert job.requeues() == 2 and job.status().attempt == 2


@pytest.mark.parametrize(("run_time", "charged"), [("00:07:29", 0), ("00:07:30", 1), ("1-00:00:00", 1)])
def test_a_timeout_is_one_from_when_slurm_may_send_its_signal(job: Job, run_time: str, charged: int) -> None:
    # 10 minutes less the 90 s of the signal less the 60 s it may be early
    job.shows(RUNNING.replace("00:03:00", run_time))
    leaves(job.attempt("slurm"), signal.SIGUSR2)
    assert (job.status().timeouts, job.countdown()) == (charged, MAX_TIMEOUTS - charged)
    assert job.status().reason == ("timeout" if charged else "SIGUSR2")


def test_only_timeouts_in_a_row_without_getting_further_end_a_job(job: Job) -> None:
    job.shows(RUNNING.replace("00:03:00", "00:09:00"))
    counted, left = [], MAX_TIMEOUTS
    for done in (10, 10, 10, 30, 30):  # where the progress bar is when the time is up
        attempt = job.attempt("slurm", countdown=left)
        (job.folder / "41_progress.json").write_text(json.dumps({"what": "train", "done": done}))
        leaves(attempt, signal.SIGUSR2)
        counted.append(job.status().timeouts)
        left = job.countdown()
    assert counted == [1, 2, 3, 1, 2]
    attempt = job.attempt("slurm", countdown=left)
    # other work, perhaps done again
    (job.folder / "41_progress.json").write_text(json.dumps({"what": "validate", "done": 99}))
    leaves(attempt, signal.SIGUSR2)
    assert job.status().timeouts == 3


def test_preemption_when_the_time_is_almost_up_is_no_timeout_where_slurm_says_that_it_preempts(
    job: Job,
) -> None:
    job.shows(
        RUNNING.replace("00:03:00", "00:09:00").replace("PreemptTime=None", "PreemptTime=2026-11-21T12:00:00")
    )
    leaves(job.attempt("slurm"), signal.SIGUSR2)
    assert (job.status().reason, job.countdown()) == ("preempted", MAX_TIMEOUTS)


def test_a_time_limit_that_was_changed_since_counts(job: Job) -> None:
    job.shows(RUNNING.replace("00:03:00", "00:09:00").replace("TimeLimit=00:10:00", "TimeLimit=01:00:00"))
    leaves(job.attempt("slurm"), signal.SIGUSR2)
    assert job.countdown() == MAX_TIMEOUTS


def test_without_an_answer_the_clock_of_the_task_decides(job: Job) -> None:
    job.shows("")
    attempt = job.attempt("slurm")
    leaves(attempt, signal.SIGUSR2)
    assert job.countdown() == MAX_TIMEOUTS
    attempt = job.attempt("slurm")
    attempt.say(began=time.time() - 451)
    leaves(attempt, signal.SIGUSR2)
    assert job.countdown() == MAX_TIMEOUTS - 1


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "PENDING", "TIMEOUT", ""])
def test_a_sigterm_of_what_slurm_has_decided_already_requeues_nothing(job: Job, state: str) -> None:
    job.shows(RUNNING.replace("RUNNING", state) if state else "")
    assert leaves(job.attempt("slurm"), signal.SIGTERM) == 143
    status = job.status()
    assert (status.state, status.status, status.reason, job.requeues()) == ("stopped", 143, "SIGTERM", 0)
    assert status.ended is not None


def test_a_sigterm_of_a_job_that_slurm_requeues_is_told_as_such_and_left_to_slurm(job: Job) -> None:
    job.monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    for restarts, state, status in ((2, "stopped", 143), (3, "requeued", None)):
        job.shows(RUNNING.replace("RUNNING", "COMPLETING") + f" Restarts={restarts}")
        assert leaves(job.attempt("slurm"), signal.SIGTERM) == 143
        assert (job.status().state, job.status().status, job.requeues()) == (state, status, 0)


def test_a_sigterm_ends_a_local_job(job: Job) -> None:
    assert leaves(job.attempt("local"), signal.SIGTERM) == 143
    assert (job.status().state, job.status().status) == ("stopped", 143)


@pytest.mark.parametrize(("late", "charged"), [(-100.0, 0), (0.0, 1)])
def test_a_local_job_knows_exactly_when_its_time_is_up(job: Job, late: float, charged: int) -> None:
    job.monkeypatch.setenv(SIGNAL_AT, str(time.monotonic() - late))
    assert leaves(job.attempt("local"), signal.SIGUSR2) == 144  # what the controller starts again
    assert job.countdown() == MAX_TIMEOUTS - charged


def test_a_job_that_runs_out_of_time_again_and_again_ends(job: Job) -> None:
    job.shows(RUNNING.replace("00:03:00", "00:09:00"))
    attempt = job.attempt("slurm", countdown=1)
    leaves(attempt, signal.SIGUSR2)
    assert job.requeues() == 1
    attempt = job.attempt("slurm", countdown=0)
    assert leaves(attempt, signal.SIGUSR2) == 1
    with pytest.raises(CommandFailed, match=NEVER):
        attempt.end(1, None)
    assert job.status().state == "failed" and job.requeues() == 1 and NEVER in str(job.status().reason)


def test_a_requeue_that_slurm_refuses_is_a_failure(job: Job) -> None:
    (job.folder / "requeue_status").write_text("1")
    assert leaves(job.attempt("slurm"), signal.SIGUSR2) == 1
    assert job.status().state == "failed" and "could not be requeued" in str(job.status().reason)


def test_the_other_tasks_note_a_signal_and_end_quietly_once_the_command_has_saved(job: Job) -> None:
    attempt = job.attempt("slurm", rank=1, num_tasks=2)
    attempt.on_signal(signal.SIGUSR2, None)
    assert job.status(1).state == "running"
    # any other exit status would have srun kill the first task
    assert attempt.end(128 + signal.SIGUSR2, None) == 0
    assert (job.status(1).state, job.status(1).status, job.status(1).reason) == ("stopped", 140, "SIGUSR2")
    assert job.requeues() == 0
    attempt = job.attempt("slurm", rank=1, num_tasks=2)
    attempt.on_signal(signal.SIGUSR2, None)
    with pytest.raises(CommandFailed):
        attempt.end(1, None)
    assert job.status(1).state == "failed"


def test_a_sigterm_after_a_partner_has_failed_is_srun_clearing_up(job: Job) -> None:
    other = job.attempt("slurm", rank=1, num_tasks=2)
    first = job.attempt("slurm", num_tasks=2)
    with pytest.raises(CommandFailed):
        other.end(3, None)
    assert leaves(first, signal.SIGTERM) == 143
    assert (job.status().state, job.status().reason, job.requeues()) == ("stopped", "task 1 failed", 0)


def test_a_sigterm_that_a_killed_partner_may_have_caused_is_counted(job: Job) -> None:
    leaves(job.attempt("slurm", num_tasks=2), signal.SIGTERM)
    assert (job.requeues(), job.countdown()) == (1, MAX_TIMEOUTS - 1)
    job.shows(RUNNING.replace("PreemptTime=None", "PreemptTime=2026-11-21T12:00:00"))
    leaves(job.attempt("slurm", num_tasks=2), signal.SIGTERM)
    assert (job.requeues(), job.countdown()) == (2, MAX_TIMEOUTS)


def test_the_failure_of_an_attempt_before_does_not_hold_up_a_requeue(job: Job) -> None:
    with pytest.raises(CommandFailed):
        job.attempt("slurm", rank=1, num_tasks=2).end(3, None)
    time.sleep(0.01)
    leaves(job.attempt("slurm", num_tasks=2), signal.SIGTERM)
    assert job.requeues() == 1


def test_only_the_first_signal_counts_and_none_after_the_end(job: Job) -> None:
    attempt = job.attempt("slurm")
    leaves(attempt, signal.SIGUSR2)
    attempt.on_signal(signal.SIGTERM, None)  # SLURM's, for the requeue
    attempt.on_signal(signal.SIGUSR2, None)
    assert job.requeues() == 1 and job.status().state == "requeued"
    done = job.attempt("slurm")
    assert done.end(0, None) == 0
    done.on_signal(signal.SIGUSR2, None)
    assert job.status().state == "finished" and job.requeues() == 1


def test_a_forked_child_requeues_nothing_and_can_be_terminated(job: Job) -> None:
    attempt = job.attempt("slurm")
    attempt.take_signals()
    code = 0
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), signal.SIGUSR2)
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    assert job.requeues() == 0 and job.status().state == "running"


def test_a_full_disk_costs_neither_the_work_nor_the_requeue(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = job.attempt("slurm")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("slurm.command.write_json", full)
    monkeypatch.setattr(DelayedSubmission, "dump", full)
    assert leaves(attempt, signal.SIGUSR2) == 255
    assert job.requeues() == 1 and job.countdown() == MAX_TIMEOUTS  # the pickle that lies there still loads


def test_attempts_are_counted_and_a_killed_one_stays_running(job: Job) -> None:
    assert job.attempt("slurm").status.attempt == 1
    (job.folder / "41_0_status.json.tmp").write_text("{")  # killed while it wrote
    assert job.attempt("slurm").status.attempt == 2
    assert job.status().state == "running" and job.status().ended is None and job.status().pid == os.getpid()
    (job.folder / "41_0_status.json").write_text("{")
    assert job.attempt("slurm").status.attempt == 1


def run(job: Job, function: Callable[[list[str]], object], rank: int = 0) -> int:
    """Run a command that calls `function`, as submitit does."""
    job.attempt("local", rank=rank)
    module = type(sys)("nowhere")
    module.main = function  # type: ignore[attr-defined]
    job.monkeypatch.setitem(sys.modules, "nowhere", module)
    return Command(["a", "b"], "nowhere:main")()


def test_a_command_is_told_where_to_keep_its_progress_and_says_how_it_ended(job: Job) -> None:
    seen: list[object] = []
    for rank in (0, 1):
        assert (
            run(
                job,
                lambda argv: seen.append(
                    (argv, os.environ.get("WORDLESS_PROGRESS"), os.environ["WORDLESS_ATTEMPT"])
                ),
                rank,
            )
            == 0
        )
        assert (job.status(rank).state, job.status(rank).status) == ("finished", 0)
    assert seen == [(["a", "b"], str(job.folder / "41_progress.json"), "2"), (["a", "b"], None, "2")]


@pytest.mark.parametrize(
    ("error", "state", "status", "reason"),
    [
        (SystemExit(3), "failed", 3, "exit status 3"),
        (SystemExit("no"), "failed", 1, "exit status 1"),
        (KeyError("a bug"), "failed", 1, "KeyError: 'a bug'"),
        (KeyboardInterrupt(), "stopped", 130, "KeyboardInterrupt:"),
    ],
)
def test_how_a_command_fails_is_said(
    job: Job, error: BaseException, state: str, status: int, reason: str
) -> None:
    def fail(argv: list[str]) -> int:
        raise error

    with pytest.raises(CommandFailed if isinstance(error, SystemExit) else type(error)):
        run(job, fail)
    assert (job.status().state, job.status().status, job.status().reason) == (state, status, reason)


def test_a_command_that_catches_our_exit_still_ends_as_the_signal_has_it(job: Job) -> None:
    def swallow(argv: list[str]) -> int:
        with suppress(SystemExit):
            signal.raise_signal(signal.SIGUSR2)
        return 0

    with pytest.raises(SystemExit, match="144"):
        run(job, swallow)
    assert job.status().state == "requeued"


def test_a_requeued_task_leaves_no_result_of_its_earlier_attempt(job: Job) -> None:
    for name in ("41_1_result.pkl", "41_1_result.pkl.save_tmp", "41_0_result.pkl"):
        (job.folder / name).touch()
    assert run(job, lambda argv: 0, rank=1) == 0
    assert {path.name for path in job.folder.glob("41_*.pkl*")} == {
        "41_0_result.pkl",
        "41_submitted.pkl",
    }  # those are not its own


def test_a_snapshot_that_is_not_what_runs_is_an_error(job: Job, tmp_path: Path) -> None:
    code = tmp_path / "code-1"
    (code / "slurm").mkdir(parents=True)
    job.attempt("local")
    with pytest.raises(ImportError, match=r"slurm\.command comes from .*, not from the snapshot"):
        Command(["a"], "json:dumps", code=str(code))()


def test_a_checkpoint_is_a_submission_of_the_same_command() -> None:
    command = Command(
        ["pretrain", "base.toml"], "somewhere:main", code="/code", commit="abc+", signal_seconds=7
    )
    delayed = pickle.loads(pickle.dumps(command.checkpoint()))
    assert delayed.function == command and delayed.args == () and delayed.kwargs == {}
    assert type(delayed).__name__ == "DelayedSubmission"
    assert command.checkpoint("a", b=1).args == ("a",) and command.checkpoint("a", b=1).kwargs == {"b": 1}


def test_the_elements_of_an_array_meet_at_ports_of_their_own(job: Job) -> None:
    ports = []
    for raw, element in ((43, 0), (44, 1)):  # each element has a job id of its own, beside the array's
        job.monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "43")
        job.monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(element))
        job.monkeypatch.delenv("MASTER_PORT", raising=False)
        submission = DelayedSubmission(Command(["x"]))
        submission.dump(job.folder / f"43_{element}_submitted.pkl")
        for name, value in {
            "JOB_ID": raw,
            "NTASKS": 2,
            "JOB_NUM_NODES": 1,
            "PROCID": 0,
            "LOCALID": 0,
        }.items():
            job.monkeypatch.setenv(f"SLURM_{name}", str(value))
        job.monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
        attempt = Attempt(submission.function, JobEnvironment())
        attempt.prepare()
        ports.append(os.environ["MASTER_PORT"])
        assert attempt.path.name == f"43_{element}_0_status.json"
        assert os.environ["WORDLESS_PROGRESS"].endswith(f"43_{element}_progress.json")
    assert len(set(ports)) == 2


def test_the_heart_beats_until_the_end_and_survives_a_file_server_that_does_not_answer(
    tmp_path: Path,
) -> None:
    path = tmp_path / "status.json"
    with Heartbeat(path, seconds=0.01):
        time.sleep(0.05)  # no such file
        write_json(path, {})
        os.utime(path, (0, 0))
        deadline = time.monotonic() + 60
        while path.stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    time.sleep(0.05)
    os.utime(path, (0, 0))
    time.sleep(0.05)
    assert path.stat().st_mtime == 0
    assert json.loads(path.read_text()) == {}


def test_the_heart_keeps_no_process_alive(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from slurm.submission import Heartbeat; "
        f"Heartbeat(Path({str(tmp_path)!r})).__enter__()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

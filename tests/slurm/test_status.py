"""What `status` and `logs` tell of jobs, from files written by hand, with a squeue that answers, that does
not, and that is not there."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import slurm.logs
from slurm.jobs import SILENT_SECONDS, Queue, latest_jobs
from slurm.resources import Resources
from slurm.status import as_table, duration, read_rows, tail, write_recipe
from slurm.submission import Submission, progress_path, status_path, write_json
from wordless.cli import main

NOW = 0.0


@pytest.fixture(autouse=True)
def set_the_clock() -> None:
    """NOW is when the test begins."""
    global NOW
    NOW = time.time()


class Run:
    """A recipe's run of the stages a -> b -> c, and what was submitted of it."""

    def __init__(self, folder: Path):
        self.folder = folder
        stages = [
            {"name": name, "verb": "pretrain", "out": str(folder / name), "left_out": False} for name in "abc"
        ]
        write_recipe(folder, ["run", "my recipe.toml", "--on", "slurm"], stages, given=NOW - 4000)

    def submit(
        self, name: str, job_id: str, *, after: tuple[str, ...] = (), ago: float = 3600.0, **changes: Any
    ) -> Path:
        folder = self.folder / "jobs" / name / f"2026-{job_id}"
        folder.mkdir(parents=True)
        resources = Resources(tasks_per_node=changes.pop("tasks", 1)).model_dump(mode="json")
        fields = Submission(
            name,
            job_id,
            "slurm",
            ["pretrain", "x.toml"],
            None,
            list(after),
            str(self.folder / name),
            resources,
            NOW - ago,
            "login1",
        )
        write_json(folder / "submission.json", vars(fields) | changes)
        return folder

    def row(self, name: str) -> Any:
        return next(row for row in read_rows(self.folder, Queue()) if row.stage == name)

    def make(self, name: str, ago: float = 0.0) -> None:
        path = self.folder / name / "meta.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
        os.utime(path, (NOW - ago, NOW - ago))


def say(folder: Path, job_id: str, state: str, rank: int = 0, heard_ago: float = 0.0, **changes: Any) -> None:
    """A task's status file."""
    ended = None if state == "running" else NOW - 60
    task = {
        "state": state,
        "status": {"finished": 0, "failed": 2}.get(state),
        "attempt": 1,
        "timeouts": 0,
        "host": "n1",
        "pid": 1,
        "began": NOW - 600,
        "ended": ended,
        "reason": None,
    }
    write_json(status_path(folder, job_id, rank), task | changes)
    os.utime(status_path(folder, job_id, rank), (NOW - heard_ago, NOW - heard_ago))


def progress(folder: Path, job_id: str, done: float, **changes: Any) -> None:
    told = {
        "what": "train a",
        "done": done,
        "total": 400.0,
        "unit": "step",
        "rate": 3.0,
        "seconds_left": 90.0,
        "note": "loss 3.1",
        "time": NOW,
    }
    write_json(progress_path(folder, job_id), told | changes)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Where there is no squeue, unless `squeue` puts one there."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv(
        "PATH",
        f"{tmp_path / 'bin'}:/usr/bin:/bin"
        if not Path("/usr/bin/squeue").exists()
        else str(tmp_path / "bin"),
    )
    return Run(tmp_path / "run")


def squeue(run: Run, *lines: str, body: str | None = None) -> None:
    path = run.folder.parent / "bin" / "squeue"
    path.write_text("#!/bin/sh\n" + (body or "".join(f"echo '{line}'\n" for line in lines) + "exit 0\n"))
    path.chmod(0o755)


# A job's state


@pytest.mark.parametrize(
    ("told", "queue", "state", "note"),
    [
        (None, "41|PENDING|Priority", "queued", "Priority"),
        (None, "41|PENDING|None", "queued", ""),
        (None, "41|PENDING|Dependency", "waiting", ""),
        (None, "41|PENDING|DependencyNeverSatisfied", "waiting", "DependencyNeverSatisfied"),
        (None, "41|CONFIGURING|None", "running", "starting"),
        (None, "", "lost", "never began, and is no longer in the queue"),
        (None, None, "queued", "squeue does not answer"),
        (("running", 1), "41|RUNNING|None", "running", ""),
        (("running", 500), "41|RUNNING|None", "running", "no sign of life since"),
        (("running", 1), "", "lost", "ended without a word"),
        (("running", 1), None, "running", ""),
        (("running", SILENT_SECONDS + 5), None, "lost", "no sign of life since"),
        (("running", 500), "41|PENDING|BeginTime", "requeued", "BeginTime"),
        (("requeued", 1), "41|PENDING|BeginTime", "requeued", "preempted"),
        (("requeued", 1), None, "requeued", "preempted"),
        (("requeued", 1), "", "lost", "was to be requeued"),
        (("stopped", 1), "", "stopped", "SIGTERM"),
        (("failed", 1), "41|COMPLETING|None", "failed", "exit status 2"),
        (("failed", 1), None, "failed", "exit status 2"),
        (("finished", 1), None, "done", ""),
    ],
)
def test_files_tell_how_a_job_fares_and_squeue_where_it_is(
    run: Run, told: tuple[str, float] | None, queue: str | None, state: str, note: str
) -> None:
    folder = run.submit("a", "41")
    run.make("a", ago=7200)
    if told is not None:
        reason = {"requeued": "preempted", "stopped": "SIGTERM"}.get(told[0])
        say(folder, "41", told[0], heard_ago=told[1], reason=reason)
    if queue is not None:
        squeue(run, *[queue] * bool(queue))
    row = run.row("a")
    assert (row.state, row.job) == (state, "41")
    assert row.note.startswith(note) and bool(row.note) == bool(note)


def test_a_squeue_that_fails_or_hangs_is_as_good_as_none(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    say(run.submit("a", "41"), "41", "running")
    squeue(run, body="exit 1\n")
    assert run.row("a").state == "running" and not Queue().answered
    monkeypatch.setattr("slurm.jobs.SQUEUE_SECONDS", 0.2)
    squeue(run, body="exec sleep 60\n" if Path("/bin/sleep").exists() else "while :; do :; done\n")
    began = time.monotonic()
    # a tenth of a second where nothing else runs
    assert run.row("a").state == "running" and time.monotonic() - began < 30


def test_squeue_is_not_asked_of_jobs_that_said_how_they_ended(run: Run) -> None:
    say(run.submit("a", "41"), "41", "finished")
    say(run.submit("b", "42"), "42", "failed")
    squeue(run, body=f": > {run.folder}/asked\n")
    assert [row.state for row in read_rows(run.folder, Queue())] == [
        "not submitted",
        "failed",
        "not submitted",
    ]
    assert not (run.folder / "asked").exists()


def test_one_failed_task_of_several_is_enough_and_one_that_finished_is_not(run: Run) -> None:
    folder = run.submit("a", "41", tasks=2)
    squeue(run, "41|RUNNING|None")
    say(folder, "41", "finished")
    assert run.row("a").state == "running"
    say(folder, "41", "failed", rank=1)
    row = run.row("a")
    assert row.state == "failed" and row.log == str(folder / "41_1_log.err")


def test_a_new_attempt_makes_void_what_a_task_said_of_the_one_before(run: Run) -> None:
    folder = run.submit("a", "41", tasks=2)
    squeue(run, "41|RUNNING|None")
    say(folder, "41", "failed", rank=1, ended=NOW - 900, began=NOW - 950)
    say(folder, "41", "running", attempt=2)
    assert run.row("a").state == "running" and run.row("a").attempt == 2
    say(folder, "41", "finished", attempt=2)
    say(folder, "41", "finished", rank=1, attempt=1)  # it was killed once before it could count
    run.make("a")
    assert run.row("a").state == "done"


def test_what_waited_for_a_failed_stage_is_told_with_the_first_cause(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the morning finds it: a failed, and SLURM has dropped the others."""
    folder = run.submit("a", "41")
    run.submit("b", "42", after=("41",), ago=3599)
    run.submit("c", "43", after=("42",), ago=3598)
    for answer in (None, ()):
        say(folder, "41", "running")
        if answer is not None:
            squeue(run, "41|RUNNING|None", "42|PENDING|Dependency", "43|PENDING|Dependency")
        states = [(row.state, row.note) for row in read_rows(run.folder, Queue())]
        quiet = "" if answer is not None else " (squeue does not answer)"
        assert states == [("running", ""), ("waiting", f"for a{quiet}"), ("waiting", f"for b{quiet}")]
        say(folder, "41", "failed")
        if answer is not None:
            squeue(run)
        states = [(row.state, row.note) for row in read_rows(run.folder, Queue())]
        assert states == [("failed", "exit status 2"), *[("stopped", "never began: a failed")] * 2]
    (folder / "41_0_log.err").write_text(
        "much before\n" * 50 + "wordless: x.toml: \x1b[31mno such\tfile\x1b[0m\nsrun: error: n1\n"
    )
    assert main(["status", str(run.folder)]) == 1
    told = capsys.readouterr().out
    assert "a failed (job 41): exit status 2\n" in told
    # eight lines, no escape codes
    assert "  | wordless: x.toml: [31mno such\tfile[0m\n" in told and told.count("much before") == 7
    assert f"wordless logs {run.folder} a" in told and str(folder / "41_0_log.err") in told
    assert told.endswith(
        "to go on from there, once the cause is gone:\n  wordless run 'my recipe.toml' --on slurm\n"
    )


def test_a_cancelled_job_is_stopped_whatever_squeue_says(run: Run) -> None:
    folder = run.submit("a", "41")
    write_json(folder / "cancelled.json", {"time": NOW})
    assert (run.row("a").state, run.row("a").note) == ("stopped", "cancelled")
    squeue(run)
    assert (run.row("a").state, run.row("a").note) == ("stopped", "cancelled")


# Progress


def test_progress_rate_time_left_and_the_last_metric_are_shown(run: Run) -> None:
    folder = run.submit("a", "41")
    squeue(run, "41|RUNNING|None")
    say(folder, "41", "running")
    assert run.row("a").share is None
    progress(folder, "41", 100.0, time=NOW - 30)
    row = run.row("a")
    assert (row.share, row.rate, row.unit, row.note) == (0.25, 3.0, "step", "loss 3.1")
    assert row.seconds_left == pytest.approx(60, abs=10) and row.elapsed_seconds == pytest.approx(600, abs=10)
    progress(folder, "41", 100.0, time=NOW - 700)  # of the attempt before
    assert run.row("a").share is None


def test_an_array_counts_its_elements_and_sums_their_rates(run: Run) -> None:
    folder = run.submit("a", "41", array=4)
    squeue(run, "41_1|RUNNING|None", "41_2|RUNNING|None", "41_3|PENDING|JobArrayTaskLimit")
    say(folder, "41_0", "finished")
    for element, done in (("41_1", 100.0), ("41_2", 300.0)):
        say(folder, element, "running")
        progress(folder, element, done)
    row = run.row("a")
    assert (row.state, row.rate, row.note) == ("running", 6.0, "1 of 4 done, 2 running, 1 queued; loss 3.1")
    # one has not begun
    assert row.share == pytest.approx((1 + 0.25 + 0.75 + 0) / 4) and row.seconds_left is None
    say(folder, "41_2", "failed")
    row = run.row("a")
    assert row.state == "failed" and row.note == "1 of 4 done, 1 running, 1 failed, 1 queued; exit status 2"
    assert row.log == str(folder / "41_2_0_log.err")


def test_the_last_log_line_of_training_is_shown_even_cut_off(run: Run) -> None:
    run.make("a")
    (run.folder / "a" / "metrics.jsonl").write_text(
        '{"step": 90, "loss": 2.34567}\n{"step": 90, "valid_loss": 2.5}\n{"step": 1'
    )
    assert run.row("a").note == "step 90, loss 2.346"


# Stages, wherever they ran


def test_stages_that_ran_here_are_shown_as_well(run: Run) -> None:
    """a was made; b is at work in this process; c was killed in the middle of it."""
    assert [row.state for row in read_rows(run.folder, Queue())] == ["not submitted"] * 3
    run.make("a")
    write_json_at(run, "a", {"verb": "pretrain", "began": NOW - 99, "seconds": 90.0, "summary": {}})
    write_json_at(
        run, "b", {"verb": "pretrain", "began": NOW - 9, "host": socket.gethostname(), "pid": os.getpid()}
    )
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    write_json_at(
        run, "c", {"verb": "pretrain", "began": NOW - 9, "host": socket.gethostname(), "pid": ended.pid}
    )
    rows = read_rows(run.folder, Queue())
    assert [row.state for row in rows] == ["done", "running", "stopped"]
    assert rows[0].elapsed_seconds == 90.0 and rows[1].elapsed_seconds == pytest.approx(9, abs=5)
    write_json_at(run, "c", {"verb": "pretrain", "skipped": "skipped, the manifest has no text"})
    assert (run.row("c").state, run.row("c").note) == ("skipped", "skipped, the manifest has no text")


def write_json_at(run: Run, stage: str, record: dict[str, Any]) -> None:
    (run.folder / "stages").mkdir(exist_ok=True)
    write_json(run.folder / "stages" / f"{stage}.json", record)


def test_what_was_made_after_a_job_failed_counts_and_what_stood_before_does_not(run: Run) -> None:
    say(run.submit("a", "41"), "41", "failed")
    run.make("a", ago=7200)
    assert run.row("a").state == "failed"
    run.make("a")
    assert run.row("a").state == "done"


def test_the_last_submission_counts(run: Run) -> None:
    say(run.submit("a", "41"), "41", "failed")
    say(run.submit("a", "7", ago=60), "7", "running")  # ids begin again in a new cluster
    assert (run.row("a").job, run.row("a").state) == ("7", "running")


def test_a_stage_in_a_job_of_the_whole_recipe_has_that_jobs_progress(run: Run) -> None:
    folder = run.submit("run", "99", place="local", argv=["run", "x.toml"])
    say(folder, "99", "running")
    progress(folder, "99", 200.0)
    write_json_at(run, "b", {"verb": "pretrain", "began": NOW - 9, "host": "login1", "pid": 1})
    rows = {row.stage: row for row in read_rows(run.folder, Queue())}
    assert rows["b"].state == rows["run"].state == "running" and rows["b"].share == 0.5
    assert rows["a"].state == "not submitted"
    say(folder, "99", "failed")
    assert run.row("run").state == "failed"
    write_recipe(
        run.folder,
        ["run", "my recipe.toml"],
        json.loads((run.folder / "recipe.json").read_text())["stages"],
        given=NOW,
    )
    assert "run" not in {row.stage for row in read_rows(run.folder, Queue())}


def test_a_single_verbs_job_is_found_by_its_out_and_beside_others(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    say(run.submit("extra", "51"), "51", "failed")
    (run.folder / "recipe.json").unlink()
    assert main(["status", str(run.folder / "extra")]) == 1
    assert "wordless pretrain x.toml --on slurm" in capsys.readouterr().out
    assert main(["status", str(run.folder), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert [(row["stage"], row["state"], row["job"]) for row in told["stages"]] == [
        ("extra", "failed", "51")
    ] and not told["sound"]
    assert main(["status", str(run.folder / "none")]) == 2
    assert "nothing was submitted to it" in capsys.readouterr().err


def test_status_is_0_while_all_is_well_and_imports_no_torch(run: Run) -> None:
    say(run.submit("a", "41"), "41", "running")
    code = f"""
import sys, wordless.cli
status = wordless.cli.main(["status", {str(run.folder)!r}])
sys.exit(status or {{"torch", "numpy", "submitit"}} & sys.modules.keys() or 0)"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[1].startswith("a      pretrain  running        41   1        10 min")


# The text


def test_empty_columns_are_left_out_and_others_are_as_wide_as_they_need_be() -> None:
    assert as_table([("a", "b", "c"), ("long", "", "x"), ("y", "", "")]) == "a     c\nlong  x\ny"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, ""),
        (0.4, "0 s"),
        (99, "99 s"),
        (150, "2 min"),
        (3599, "1 h 00"),
        (3900, "1 h 05"),
        (200_000, "2 d 07 h"),
    ],
)
def test_durations_are_short(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_a_tail_has_the_last_lines_of_a_file_of_any_size(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"x" * 100_000 + b"\nfirst\n\xffsecond\n")
    assert (
        tail(path, 2) == ["first", "\ufffdsecond"]
        and tail(path, 0) == []
        and tail(tmp_path / "none", 5) == []
    )


# logs


def test_logs_show_the_end_of_what_a_task_wrote(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run.submit("a", "41", tasks=2)
    say(folder, "41", "running")
    say(folder, "41", "failed", rank=1)
    for rank in (0, 1):
        (folder / f"41_{rank}_log.out").write_text(f"out of {rank}\n")
        (folder / f"41_{rank}_log.err").write_text(f"one\ntwo of {rank}\n")
    assert main(["logs", str(run.folder), "a", "--lines", "1"]) == 0
    assert (
        capsys.readouterr().out
        == f"==> {folder}/41_1_log.out <==\nout of 1\n==> {folder}/41_1_log.err <==\ntwo of 1\n"
    )
    assert main(["logs", str(run.folder / "a"), "--task", "0"]) == 0
    assert "one\ntwo of 0\n" in capsys.readouterr().out
    for arguments, message in (
        (["a", "--task", "2"], "job 41 has 2, from 0"),
        (["a", "--element", "1"], "has 1"),
        (["z"], "no job of 'z'"),
    ):
        assert main(["logs", str(run.folder), *arguments]) == 2
        assert message in capsys.readouterr().err


def test_logs_of_a_job_that_has_not_begun_say_so(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run.submit("a", "41")
    squeue(run, "41|PENDING|Priority")
    assert main(["logs", str(run.folder), "a"]) == 0
    assert capsys.readouterr().out.count("(not there yet: queued)") == 2


def test_followed_logs_go_on_until_the_job_has_ended(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run.submit("a", "41")
    say(folder, "41", "running")
    (folder / "41_0_log.err").write_text("before\n")
    monkeypatch.setattr(slurm.logs, "QUEUE_SECONDS", 0.0)
    steps = iter(
        [
            lambda: append("more\nhalf a "),
            lambda: append("line\n"),
            lambda: (append("the end"), say(folder, "41", "finished")),
        ]
    )

    def append(text: str) -> None:
        with open(folder / "41_0_log.err", "a") as file:
            file.write(text)

    monkeypatch.setattr(slurm.logs.time, "sleep", lambda _: next(steps)())
    assert main(["logs", str(run.folder), "a", "--follow"]) == 0
    assert capsys.readouterr().out.endswith("<==\nbefore\nmore\nhalf a line\nthe end")
    assert latest_jobs(run.folder / "jobs", Queue())["a"].state == "done"

"""Runs a command inside a job, and requeues the job after a signal.

SLURM sends SIGUSR2 when a job's time is almost up (and, if configured so, at preemption), SIGTERM at
preemption with a grace time and whenever it ends a job. A training loop notes the signal, saves on all ranks
and raises it again (`pretrain/training/stopping.py`); in every other verb it arrives here at once. The first
task then requeues the job through submitit, unless SLURM does. The command runs again with the same arguments
and continues from its files.
"""

import atexit
import importlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from slurm.rendezvous import export_rendezvous, remove_leftovers
from slurm.submission import (
    Heartbeat,
    TaskStatus,
    progress_path,
    read_json,
    read_status,
    status_path,
    write_json,
)

if TYPE_CHECKING:
    from types import FrameType

    from submitit import JobEnvironment
    from submitit.helpers import DelayedSubmission

TARGET = "wordless.cli:main"
MAX_TIMEOUTS = 20  # in a row without progress, before a job ends; preemptions do not count
EARLY_SECONDS = 60  # how much too early SLURM may send the signal before the end (sbatch(1), --signal)
SIGNAL_AT = "WORDLESS_SIGNAL_AT"  # when a local job's time is almost up, by the monotonic clock
# how long the tasks of a local job outlive one that failed or asked for the requeue
FAILURE_GRACE_SECONDS = 30.0
INTERRUPTED = 130  # exit status after Ctrl-C


class CommandFailed(Exception):
    """The command ended with a nonzero exit status."""


@dataclass
class Command:
    """What a job runs, in each of its tasks: `target` ("module:function") on `argv`, verb first.

    The function returns an exit status (None is 0); a nonzero one fails the job with `CommandFailed`. `code`
    is the snapshot that must be what runs, `commit` that of its checkout; `signal_seconds` from the signal to
    save until the end of the time.
    """

    argv: list[str]
    target: str = TARGET
    code: str | None = None
    commit: str | None = None
    signal_seconds: int = 90

    def __str__(self) -> str:
        """The command line, on one line whatever the arguments hold."""
        return " ".join(shlex.join(["wordless", *self.argv]).split())

    def __call__(self) -> int:
        from submitit import JobEnvironment

        attempt = Attempt(self, JobEnvironment())  # first of all, for submitit ignores a SIGTERM until then
        attempt.take_signals()
        with Heartbeat(attempt.path):
            attempt.prepare()
            error: BaseException | None = None
            try:
                status = self._run()
            except SystemExit as stop:
                status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            except BaseException as raised:
                status, error = INTERRUPTED if isinstance(raised, KeyboardInterrupt) else 1, raised
            return attempt.end(status, error)

    def _run(self) -> int:
        module, _, function = self.target.partition(":")
        loaded = importlib.import_module(module)
        if self.code is not None:
            _check_origin(Path(self.code), {__name__: __file__, module: str(loaded.__file__)})
        return getattr(loaded, function)(list(self.argv)) or 0

    def checkpoint(self, *args: Any, **kwargs: Any) -> "DelayedSubmission":
        """What the requeued job runs. Called by submitit's protocol on preemption or timeout, in rank 0."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, *args, **kwargs)


class Attempt:
    """One task's run of a command: its status file, and what a signal does to it."""

    def __init__(self, command: Command, environment: "JobEnvironment"):
        from submitit.helpers import DelayedSubmission

        self.command, self.environment, self.paths = command, environment, environment.paths
        self.rank, self.pid, self.local = environment.global_rank, os.getpid(), environment.cluster == "local"
        self.path = status_path(self.paths.folder, environment.job_id, self.rank)
        self.progress_path = progress_path(self.paths.folder, environment.job_id)
        self.delayed = DelayedSubmission.load(self.paths.submitted_pickle)
        self.over = False  # the command has ended, and a signal finds nothing to stop
        self.noted = 0  # the signal that the first task is to decide on
        self.exit_code: int | None = None  # set once a signal has decided how this task ends
        self.progress_before = read_json(self.progress_path)
        before = read_status(self.path)
        self.status = TaskStatus(
            "running",
            None,
            attempt=1 + (before.attempt if before else 0),
            timeouts=MAX_TIMEOUTS - self.delayed._timeout_countdown,
            host=socket.gethostname(),
            pid=self.pid,
            began=time.time(),
        )
        self.say()

    def prepare(self) -> None:
        """The task's folder and environment for the command."""
        remove_leftovers(self.environment)
        export_rendezvous(self.environment)
        os.environ.pop("WORDLESS_PROGRESS", None)
        # A later attempt may find its work done, if this one is killed after the last file.
        os.environ["WORDLESS_ATTEMPT"] = str(self.status.attempt)
        if self.rank == 0:
            os.environ["WORDLESS_PROGRESS"] = str(self.progress_path)
        if self.command.code and self.command.commit:
            os.environ["WORDLESS_COMMIT"] = self.command.commit  # a snapshot's folder knows no git

    def take_signals(self) -> None:
        """Our handlers instead of submitit's, which bypass SIGTERM and count any signal in a job's last ten
        minutes as a timeout.

        They stay to the end of the process: a second signal must not find submitit's in place and requeue the
        job again.
        """
        for number in (signal.SIGTERM, self.environment._usr_sig()):
            signal.signal(number, self.on_signal)
            # At the very end Python would put back the default, and a late signal (SLURM delivers one to a
            # node that was away when a partner failed) would turn a finished task into a killed one. What
            # does not end by itself is killed anyway.
            atexit.register(signal.signal, number, signal.SIG_IGN)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)  # submitit's handler warns at the end of every job

    def say(self, **changes: Any) -> None:
        """Write the status file. A full disk must not end the work."""
        self.status = replace(self.status, **changes)
        written = {key: value for key, value in vars(self.status).items() if key != "heartbeat"}
        try:
            write_json(self.path, written)
        except OSError as error:
            print(f"{self.path}: cannot be written ({error.strerror}); the work goes on", file=sys.stderr)

    def end(self, status: int, error: BaseException | None) -> int:
        """Record how the command ended, and end the task accordingly: return 0, or raise."""
        self.over = True
        if self.exit_code is not None:  # its reason is in the status file
            if self.status.state == "failed":
                raise CommandFailed(self.status.reason)
            sys.exit(self.exit_code)
        # The work is saved, and the first task requeues the job; a failure here would make srun kill that
        # task.
        if self.noted and status == 128 + self.noted:
            self.say(
                state="stopped", status=status, ended=time.time(), reason=signal.Signals(self.noted).name
            )
            return 0
        if status == 0:
            self.say(state="finished", status=0, ended=time.time())
            return 0
        reason = (
            f"exit status {status}"
            if error is None
            else " ".join(f"{type(error).__name__}: {error}".split())[:500]
        )
        self.say(
            state="stopped" if status == INTERRUPTED else "failed",
            status=status,
            ended=time.time(),
            reason=reason,
        )
        if error is not None:
            raise error
        sys.tracebacklimit = 0  # the command has printed what is wrong; our frames add nothing
        raise CommandFailed(f"exit status {status} of {self.command}")

    def on_signal(self, number: int, frame: "FrameType | None") -> None:
        """What a signal means, decided in the first task; the others note it (their exit would have srun kill
        the first)."""
        if os.getpid() != self.pid:  # a forked child has our handlers and is no task
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if self.over or self.exit_code is not None:
            return
        if self.rank != 0:
            self.noted = number
            return
        self.exit_code = 128 + number  # from here on another signal changes nothing
        name = signal.Signals(number).name
        job = {} if self.local else _ask_slurm(self.environment.job_id)
        if number == signal.SIGTERM and job.get("JobState") not in (
            "RUNNING",
            "SIGNALING",
        ):  # SLURM has decided already
            if int(job.get("Restarts", 0)) > int(os.environ.get("SLURM_RESTART_COUNT", 0)):
                self._leave("requeued", "requeued by SLURM", self.exit_code)
            self._leave("stopped", name, self.exit_code)
        failed = self._failed_partner()
        if number == signal.SIGTERM and failed is not None:  # srun ends the partners of a task that failed
            self._leave("stopped", f"task {failed} failed", self.exit_code)
        preempted = job.get("PreemptTime", "None") != "None"
        if preempted:
            self._requeue("preempted", charged=False)
        elif number != signal.SIGTERM and self._is_time_up(job):
            self._requeue("timeout", charged=True)
        else:
            # Perhaps a partner was killed, and srun ends us; only counting keeps such a job from coming back
            # for ever.
            self._requeue(name, charged=number == signal.SIGTERM and self.environment.num_tasks > 1)

    def _is_time_up(self, job: dict[str, str]) -> bool:
        if self.local:
            return time.monotonic() >= float(os.environ.get(SIGNAL_AT, "inf"))
        elapsed = _seconds(job.get("RunTime")) or time.time() - self.status.began
        limit = _seconds(job.get("TimeLimit")) or 60 * self.delayed._timeout_min
        return elapsed >= limit - self.command.signal_seconds - EARLY_SECONDS

    def _failed_partner(self) -> int | None:
        for rank in range(1, self.environment.num_tasks):
            status = read_status(status_path(self.paths.folder, self.environment.job_id, rank))
            if status is not None and status.state == "failed" and (status.ended or 0) >= self.status.began:
                return rank
        return None

    def _requeue(self, reason: str, *, charged: bool) -> NoReturn:
        countdown = (MAX_TIMEOUTS if self._got_further() else self.delayed._timeout_countdown) - charged
        if countdown < 0:
            self._leave(
                "failed",
                f"out of time {MAX_TIMEOUTS + 1} times without getting any further; give it more time",
                1,
            )
        again = self.delayed._checkpoint_function()
        assert again is not None
        again.set_timeout(self.delayed._timeout_min, countdown)
        temporary = self.paths.submitted_pickle.with_suffix(".requeued")
        try:
            again.dump(temporary)
            os.replace(temporary, self.paths.submitted_pickle)
        except OSError as error:  # what lies there does as well, with a timeout more to come
            print(
                f"{temporary}: cannot be written ({error.strerror}); requeued all the same", file=sys.stderr
            )
        # Said first: once SLURM knows, it may kill this process at any moment.
        self.say(state="requeued", ended=time.time(), reason=reason, timeouts=MAX_TIMEOUTS - countdown)
        print(
            f"{reason}: requeued, {self.status.timeouts} of {MAX_TIMEOUTS} timeouts used",
            file=sys.stderr,
            flush=True,
        )
        try:
            self.environment._requeue(countdown)
        except SystemExit as stop:  # how a local job asks for it
            self.exit_code = int(stop.code or 0)
        except (OSError, subprocess.SubprocessError) as error:
            self._leave(
                "failed", f"could not be requeued ({error}); the same command goes on from what is saved", 1
            )
        else:
            self.exit_code = 255  # as submitit ends
        sys.exit(self.exit_code)

    def _got_further(self) -> bool:
        """Than the attempt before this one, by the word of the progress bar."""
        before, now = self.progress_before, read_json(self.progress_path)
        return (
            bool(before)
            and before.get("what") == now.get("what")
            and now.get("done", 0.0) > before.get("done", 0.0)
        )

    def _leave(self, state: str, reason: str, exit_code: int) -> NoReturn:
        self.exit_code = exit_code
        self.say(
            state=state, status=None if state == "requeued" else exit_code, ended=time.time(), reason=reason
        )
        sys.exit(exit_code)


def _ask_slurm(job_id: str) -> dict[str, str]:
    """`scontrol show job`: JobState, Restarts, RunTime, TimeLimit, PreemptTime (where it preempts) … Empty
    without an answer."""
    try:
        shown = subprocess.run(
            ["scontrol", "show", "job", "--oneliner", job_id], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    found: dict[str, str] = {}
    for name, value in re.findall(r"(\w+)=(\S*)", shown.stdout):
        # The first one counts: a value with spaces (the command, a comment) may contain what looks like a
        # field.
        found.setdefault(name, value)
    return found


def _seconds(text: str | None) -> int:
    """Of SLURM's `[days-]hours:minutes:seconds`; 0 for anything else (UNLIMITED, none)."""
    parts = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", text or "")
    if parts is None:
        return 0
    days, hours, minutes, seconds = (int(part or 0) for part in parts.groups())
    return ((24 * days + hours) * 60 + minutes) * 60 + seconds


def _check_origin(code: Path, files: dict[str, str]) -> None:
    """Modules that the snapshot `code` has must come from there. `setup` cannot come between, but a site's
    Python can."""
    for module, file in files.items():
        name = module.split(".")[0]
        if ((code / f"{name}.py").is_file() or (code / name).is_dir()) and not Path(file).is_relative_to(
            code
        ):
            raise ImportError(f"{module} comes from {file}, not from the snapshot {code}")

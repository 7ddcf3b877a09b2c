"""Cancels jobs of a run: SLURM's by scancel, local ones by a signal."""

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

from slurm.jobs import Job, Queue, controller_runs, latest_jobs
from slurm.submission import submitting, write_json

SCANCEL_SECONDS = 60.0


def cancel(run: Path, names: list[str]) -> list[str]:
    """Cancel the jobs of the stages `names` of a run (none: of all) that are queued or run; a line for each.

    Raises ValueError for a name without a job, and if a job cannot be cancelled from this machine.
    """
    parent, only = run, names
    if not (run / "jobs").is_dir():
        parent, only = run.absolute().parent, [run.absolute().name]
    if not (parent / "jobs").is_dir():
        raise ValueError(f"{run}: nothing was submitted to it")
    with submitting(parent / "jobs"):
        return _cancel_all(run, parent / "jobs", only)


def _cancel_all(run: Path, jobs: Path, only: list[str]) -> list[str]:
    there = latest_jobs(jobs, Queue())
    if unknown := [name for name in only if name not in there]:
        raise ValueError(f"{run}: no job of {', '.join(unknown)}; there are {', '.join(there) or 'none'}")
    if not there:
        raise ValueError(f"{run}: nothing was submitted to it")
    chosen = {name: job for name, job in there.items() if not only or name in only}
    lines, problems = {}, []
    for name, job in reversed(chosen.items()):  # those that wait before those that they wait for
        try:
            lines[name] = cancel_job(job) if job.alive else f"nothing to cancel, it is {job.state}"
        except ValueError as error:
            problems.append(f"{name}: {error}")
    ended = {job.submission.job_id for job in chosen.values() if job.alive}
    for name, job in there.items():
        sent = job.submission
        if name not in chosen and job.alive and ended & (set(sent.after) - set(sent.after_any)):
            lines[name] = f"job {sent.job_id} waited for what was cancelled; SLURM will cancel it, too"
    if problems:
        raise ValueError("\n".join(problems))
    return [f"{name}: {lines[name]}" for name in there if name in lines]


def cancel_job(job: Job) -> str:
    """Cancel a job, whose own handlers save what can be saved; returns what was done in a few words."""
    sent = job.submission
    if sent.place == "local":
        if sent.host != socket.gethostname():
            raise ValueError(f"its job was started on {sent.host}; cancel it there")
        if sent.pid is None or not controller_runs(job.folder, sent):
            return "its process is gone"
        _mark(job)
        os.kill(sent.pid, signal.SIGTERM)  # the controller forwards it to the tasks
        return f"process {sent.pid} told to stop"
    try:
        done = subprocess.run(
            ["scancel", sent.job_id], capture_output=True, text=True, timeout=SCANCEL_SECONDS, check=False
        )
    except FileNotFoundError:
        raise ValueError("there is no `scancel` here; go to a login node of the cluster") from None
    except subprocess.TimeoutExpired:
        raise ValueError("scancel does not answer; try again") from None
    if done.returncode and "Invalid job id" not in done.stderr:
        raise ValueError(f"scancel: {done.stderr.strip()}")
    _mark(job)
    return f"job {sent.job_id}, {job.state}, cancelled"


def _mark(job: Job) -> None:
    """Record the cancelling for `status`: a job that never began writes no status file."""
    write_json(job.folder / "cancelled.json", {"time": time.time()})

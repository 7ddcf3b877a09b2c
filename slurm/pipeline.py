"""A recipe's stages as SLURM jobs that wait for each other, submitting them again after a failure, and taking them back.

Each stage is a job that starts when those whose outputs it reads have succeeded (`afterok`); a report also starts when optional
stages have failed (`afterany`). Where another fails SLURM cancels those that wait for it; what was submitted before and is still to
run is kept when the same stages are submitted again.
"""

import fcntl
import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from slurm.jobs import ACTIVE, Job, Queue, controller_runs, latest_jobs
from slurm.launch import launch, sbatch_text
from slurm.resources import Resources
from slurm.status import as_table
from slurm.submission import write_json

SCANCEL_SECONDS = 60.0


@dataclass(frozen=True)
class Stage:
    """What a job is to run. `reads` are the stages whose outputs it needs, whether or not they are submitted with it."""

    name: str
    verb: str
    argv: list[str]
    out: Path
    reads: tuple[str, ...]
    resources: Resources  # an `array` of more than one shares the work out by the key `part_key`
    part_key: str
    after_any: tuple[
        str, ...
    ] = ()  # those of `reads` whose end it awaits, whatever it is: a report's optional stages

    @property
    def array(self) -> int | None:
        return self.resources.array if self.resources.array > 1 else None


@dataclass(frozen=True)
class Entry:
    """A line of the table: what became of a stage, its job id, the stages whose jobs it waits for."""

    stage: Stage
    job: str
    after: list[str]
    kept: str = ""  # the state of a job of an earlier submission, which was kept
    replaced: str = ""  # the job of an earlier submission that was cancelled for it


def freeze(text: str, folder: Path, *, write: bool = True) -> Path:
    """A file in `folder` with the settings that a job runs on: what was submitted, whatever becomes of the user's file before the
    job starts or is requeued. The name follows from the content; with `write` False it is not made."""
    path = folder / f"settings-{hashlib.sha256(text.encode()).hexdigest()[:12]}.toml"
    if write and not path.is_file():
        for private in (folder.parent, folder):  # as `launch` makes them
            private.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    return path


@contextmanager
def submitting(jobs: Path) -> Iterator[None]:
    """Within, no other command submits to `jobs`, or cancels: of two at the same moment the second waits, and finds what the first did."""
    jobs.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(jobs / ".lock", "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{jobs}: another command is submitting to it; waiting for that", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            print(
                f"{jobs}: cannot be locked ({error.strerror}); do not submit to it twice at the same moment",
                file=sys.stderr,
            )
        yield


def sbatch_texts(stages: list[Stage], jobs: Path) -> str:
    """What `submit` would give to sbatch; `afterok:STAGE` stands for the job of that stage."""
    names = {stage.name for stage in stages}
    texts = []
    for stage in stages:
        after = [name for name in stage.reads if name in names]
        text = sbatch_text(
            stage.argv,
            stage.resources,
            jobs / stage.name,
            after=after,
            after_any=[name for name in stage.after_any if name in names],
            array=stage.array,
            part_key=stage.part_key,
        )
        texts.append(f"# stage {stage.name}\n{text}")
    return "\n".join(texts)


def submit(stages: list[Stage], jobs: Path, record: Callable[[], None] = lambda: None) -> list[Entry]:
    """Submit `stages`, given in an order in which each follows what it reads; a line for each.

    `record` is called once the command is not refused any more: as its first job is submitted, or where none has to be.

    A stage whose last job is still to run, or runs, is kept, and what reads it waits for that job. A job that waits for one that
    failed, or was submitted with other settings or resources, is cancelled and submitted again. ValueError, before anything is
    submitted, where a job that runs stands in the way; or where sbatch refuses a job: what was submitted until then stays.
    """
    with submitting(jobs):
        return _submit(stages, jobs, record)


def _submit(stages: list[Stage], jobs: Path, record: Callable[[], None]) -> list[Entry]:
    queue = Queue()
    there = latest_jobs(jobs, queue)
    if any(job.alive and job.submission.place == "slurm" for job in there.values()) and not queue.answered:
        raise ValueError(
            f"{jobs}: holds jobs that may be in the queue, and squeue does not answer; try again when it does"
        )
    if "run" in there and there["run"].alive:
        raise ValueError(
            f"{jobs.parent}: job {there['run'].submission.job_id} runs all stages of it; wait, or `wordless cancel {jobs.parent}`"
        )
    kept, replaced = _plan(stages, there, queue)
    for job in reversed(replaced):
        _cancel(job)
    cancelled = {job.submission.name: job.submission.job_id for job in replaced}
    ids = {name: job.submission.job_id for name, job in there.items() if job.alive and job not in replaced}
    entries: list[Entry] = []
    for stage in stages:
        after = {name: ids[name] for name in stage.reads if name in ids}
        if stage.name not in kept:
            try:
                launched = launch(
                    stage.argv,
                    "slurm",
                    stage.resources,
                    jobs / stage.name,
                    wait=False,
                    after=list(after.values()),
                    out=stage.out,
                    after_any=[after[name] for name in stage.after_any if name in after],
                    array=stage.array,
                    part_key=stage.part_key,
                )
            except ValueError as error:
                before = ", ".join(entry.stage.name for entry in entries if not entry.kept)
                raise ValueError(
                    f"{stage.name}: {error}"
                    + (f"\n{before}: submitted before; the same command goes on from there" if before else "")
                ) from None
            ids[stage.name] = launched.job_id
            if all(entry.kept for entry in entries):
                record()
        state = there[stage.name].state if stage.name in kept else ""
        entries.append(Entry(stage, ids[stage.name], list(after), state, cancelled.get(stage.name, "")))
    if all(entry.kept for entry in entries):
        record()
    return entries


def _plan(stages: list[Stage], there: dict[str, Job], queue: Queue) -> tuple[set[str], list[Job]]:
    """The stages whose jobs are kept, and the jobs to cancel, in order."""
    kept: set[str] = set()
    replaced: list[Job] = []
    anew: set[str] = set()
    for stage in stages:
        job = there.get(stage.name)
        if job is None or not job.alive:
            anew.add(stage.name)
            continue
        sent = job.submission
        waits_for = {
            there[name].submission.job_id for name in stage.reads if name in there and there[name].alive
        }
        differs = sent.argv != stage.argv or sent.resources != stage.resources.model_dump(mode="json")
        outdated = [name for name in stage.reads if name in anew]
        if any(element.state in ("running", "requeued") for element in job.elements):
            way = (
                f"wait, or `wordless cancel {job.folder.parents[2]} {stage.name}` and give the command again"
            )
            if outdated:
                raise ValueError(
                    f"{stage.name}: job {sent.job_id} runs, and reads {outdated[0]}, which is to be made again; {way}"
                )
            if _settings(sent.argv) != _settings(stage.argv):
                raise ValueError(f"{stage.name}: job {sent.job_id} runs with other settings; {way}")
            if job.state in ACTIVE:
                kept.add(stage.name)
                continue
        elif (
            not outdated
            and not differs
            and job.state in ACTIVE
            and waits_for <= set(sent.after)
            and not _never_starts(job, queue)
        ):
            kept.add(stage.name)
            continue
        replaced.append(job)  # among them an array of which an element failed while others go on
        anew.add(stage.name)
    return kept, replaced


def _settings(argv: list[str]) -> list[str]:
    return [part for part in argv if part != "--redo"]  # which makes no difference to a job that runs


def _never_starts(job: Job, queue: Queue) -> bool:
    return any(
        (queue.jobs or {}).get(job_id, ("", ""))[1] == "DependencyNeverSatisfied"
        for job_id in job.submission.elements
    )


def table(entries: list[Entry]) -> str:
    """What was submitted, for a terminal: `after` without the stages that another of them waits for itself."""
    head = ("stage", "verb", "job", "", "asks for", "after")
    earlier = [
        f"kept, {entry.kept}" if entry.kept else f"instead of {entry.replaced}" * bool(entry.replaced)
        for entry in entries
    ]
    before: dict[str, set[str]] = {}  # every stage that one waits for, by way of others as well
    for entry in entries:
        before[entry.stage.name] = set(entry.after).union(*(before.get(name, set()) for name in entry.after))
    rows = [
        (
            entry.stage.name,
            entry.stage.verb,
            entry.job,
            note,
            in_words(entry.stage.resources),
            ", ".join(
                name
                for name in entry.after
                if not any(name in before.get(other, set()) for other in entry.after)
            ),
        )
        for entry, note in zip(entries, earlier, strict=True)
    ]
    return as_table([head, *rows])


def as_json(entries: list[Entry]) -> list[dict[str, object]]:
    """The table as plain types."""
    return [
        {
            "stage": entry.stage.name,
            "verb": entry.stage.verb,
            "job": entry.job,
            "kept": entry.kept or None,
            "resources": entry.stage.resources.model_dump(mode="json"),
            "after": entry.after,
        }
        for entry in entries
    ]


def in_words(resources: Resources) -> str:
    """`2 nodes of 8 tasks, 8 GPUs and 64 CPUs, 24 h, gpu`."""
    tasks, gpus = resources.tasks_per_node, resources.gpus_per_node
    cpus = tasks * resources.cpus_per_task
    parts = [
        f"{resources.array} x" if resources.array > 1 else "",
        f"{resources.nodes} nodes of" if resources.nodes > 1 else "",
        f"{tasks} tasks," if tasks > 1 else "",
        f"{gpus} GPU{'s' * (gpus > 1)}," if gpus else "",
        f"{cpus} CPU{'s' * (cpus > 1)},",
        f"{resources.memory_gb} GB," if resources.memory_gb else "",
        f"{resources.time_minutes // 60} h {resources.time_minutes % 60:02}"
        if resources.time_minutes >= 60
        else f"{resources.time_minutes} min",
    ]
    return " ".join(filter(None, parts)) + (f", {resources.partition}" if resources.partition else "")


# Taking back


def cancel(run: Path, names: list[str]) -> list[str]:
    """Cancel the jobs of the stages `names` of a run (none given: all) that are queued or run; a line for each that tells what was done.

    ValueError for a name that has no job here, and where nothing can be done from this machine.
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
    told, problems = {}, []
    for name, job in reversed(chosen.items()):  # those that wait before those that they wait for
        try:
            told[name] = _cancel(job) if job.alive else f"nothing to cancel, it is {job.state}"
        except ValueError as error:
            problems.append(f"{name}: {error}")
    ended = {job.submission.job_id for job in chosen.values() if job.alive}
    for name, job in there.items():
        if (
            name not in chosen
            and job.alive
            and ended & (set(job.submission.after) - set(job.submission.after_any))
        ):
            told[name] = (
                f"job {job.submission.job_id} waited for what was cancelled; SLURM will cancel it, too"
            )
    if problems:
        raise ValueError("\n".join(problems))
    return [f"{name}: {told[name]}" for name in there if name in told]


def _cancel(job: Job) -> str:
    """Told in a few words. The job's own handlers save what can be saved."""
    sent = job.submission
    if sent.place == "local":
        if sent.host != socket.gethostname():
            raise ValueError(f"its job was started on {sent.host}; cancel it there")
        if sent.pid is None or not controller_runs(job.folder, sent):
            return "its process is gone"
        _mark(job)
        os.kill(sent.pid, signal.SIGTERM)  # which it hands on to the tasks
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
    """Tell `status` that a job which leaves no word of its end was cancelled."""
    write_json(job.folder / "cancelled.json", {"time": time.time()})

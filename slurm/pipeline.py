"""Submits a recipe's stages as SLURM jobs that wait for each other, and again after a failure.

Each stage is a job that starts when those whose outputs it reads have succeeded (`afterok`); a report also
starts when optional stages have failed (`afterany`). If another fails, SLURM cancels those that wait for it;
jobs of an earlier submission that are still to run are kept when the same stages are submitted again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slurm.cancelling import cancel_job
from slurm.jobs import ACTIVE, Job, Queue, latest_jobs
from slurm.launch import launch, sbatch_text
from slurm.resources import Resources
from slurm.status import as_table
from slurm.submission import submitting


@dataclass(frozen=True)
class Stage:
    """What a job is to run. `reads` are the stages whose outputs it needs, whether or not they are submitted
    with it."""

    name: str
    verb: str
    argv: list[str]
    out: Path
    reads: tuple[str, ...]
    resources: Resources  # an `array` of more than one shares the work out by the key `part_key`
    part_key: str
    after_any: tuple[str, ...] = ()  # those of `reads` that may also fail: a report's optional stages

    def place_in(self, jobs: dict[str, str]) -> dict[str, Any]:
        """The arguments of `launch` for a job that waits for those of `jobs` (ids by stage) that it reads."""
        return {
            "after": [jobs[name] for name in self.reads if name in jobs],
            "after_any": [jobs[name] for name in self.after_any if name in jobs],
            "array": self.resources.array,
            "part_key": self.part_key,
        }


@dataclass(frozen=True)
class Entry:
    """A line of the table: what became of a stage, its job id, the stages whose jobs it waits for."""

    stage: Stage
    job: str
    after: list[str]
    kept: str = ""  # the state of a job of an earlier submission, which was kept
    replaced: str = ""  # the job of an earlier submission that was cancelled for it


def sbatch_texts(stages: list[Stage], jobs: Path) -> str:
    """What `submit` would give to sbatch, with `afterok:STAGE` for the job of a stage."""
    names = {stage.name: stage.name for stage in stages}
    texts = []
    for stage in stages:
        text = sbatch_text(stage.argv, stage.resources, jobs / stage.name, **stage.place_in(names))
        texts.append(f"# stage {stage.name}\n{text}")
    return "\n".join(texts)


def submit(stages: list[Stage], jobs: Path, record: Callable[[], None] = lambda: None) -> list[Entry]:
    """Submit `stages`, each after the stages that it reads; returns a line for each.

    `record` is called once the command cannot be refused any more: as its first job is submitted, or if none
    has to be. A stage whose last job is queued or runs is kept, and what reads it waits for that job. A job
    that waits for one that failed, or was submitted with other settings or resources, is cancelled and
    submitted again. Raises ValueError, before anything is submitted, if a running job prevents it; and if
    sbatch refuses a job, after which the jobs submitted before remain.
    """
    with submitting(jobs):
        return _submit(stages, jobs, record)


def _submit(stages: list[Stage], jobs: Path, record: Callable[[], None]) -> list[Entry]:
    queue = Queue()
    there = latest_jobs(jobs, queue)
    _require_known(there, jobs, queue)
    kept, replaced = _plan(stages, there, queue)
    for job in reversed(replaced):
        cancel_job(job)
    cancelled = {job.submission.name: job.submission.job_id for job in replaced}
    ids = {name: job.submission.job_id for name, job in there.items() if job.alive and job not in replaced}
    entries: list[Entry] = []
    for stage in stages:
        after = [name for name in stage.reads if name in ids]
        if stage.name not in kept:
            try:
                ids[stage.name] = launch(
                    stage.argv,
                    "slurm",
                    stage.resources,
                    jobs / stage.name,
                    wait=False,
                    out=stage.out,
                    **stage.place_in(ids),
                ).job_id
            except ValueError as error:
                before = ", ".join(entry.stage.name for entry in entries if not entry.kept)
                rest = f"\n{before}: submitted before; the same command goes on from there" if before else ""
                raise ValueError(f"{stage.name}: {error}{rest}") from None
            if all(entry.kept for entry in entries):
                record()
        state = there[stage.name].state if stage.name in kept else ""
        entries.append(Entry(stage, ids[stage.name], after, state, cancelled.get(stage.name, "")))
    if all(entry.kept for entry in entries):
        record()
    return entries


def _require_known(there: dict[str, Job], jobs: Path, queue: Queue) -> None:
    """Raises ValueError if the state of earlier jobs is not known, or one runs all stages."""
    if any(job.alive and job.submission.place == "slurm" for job in there.values()) and not queue.answered:
        raise ValueError(
            f"{jobs}: holds jobs that may be in the queue, and squeue does not answer; try again when it does"
        )
    if "run" in there and there["run"].alive:
        raise ValueError(
            f"{jobs.parent}: job {there['run'].submission.job_id} runs all stages of it; wait, or `wordless "
            f"cancel {jobs.parent}`"
        )


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
        outdated = [name for name in stage.reads if name in anew]
        if any(element.state in ("running", "requeued") for element in job.elements):
            way = (
                f"wait, or `wordless cancel {job.folder.parents[2]} {stage.name}` and give the command again"
            )
            runs = f"{stage.name}: job {sent.job_id} runs"
            if outdated:
                raise ValueError(f"{runs}, and reads {outdated[0]}, which is to be made again; {way}")
            if _settings(sent.argv) != _settings(stage.argv):
                raise ValueError(f"{runs} with other settings; {way}")
            fits = True
        else:
            same = (sent.argv, sent.resources) == (stage.argv, stage.resources.model_dump(mode="json"))
            awaited = {there[name].submission.job_id for name in stage.reads if _is_alive(there.get(name))}
            fits = same and not outdated and awaited <= set(sent.after) and not _never_starts(job, queue)
        if fits and job.state in ACTIVE:  # else it may be an array with a failed element
            kept.add(stage.name)
        else:
            replaced.append(job)
            anew.add(stage.name)
    return kept, replaced


def _is_alive(job: Job | None) -> bool:
    return job is not None and job.alive


def _settings(argv: list[str]) -> list[str]:
    return [part for part in argv if part != "--redo"]  # it makes no difference to a running job


def _never_starts(job: Job, queue: Queue) -> bool:
    known = queue.jobs or {}
    return any(
        known.get(job_id, ("",))[-1] == "DependencyNeverSatisfied" for job_id in job.submission.elements
    )


def table(entries: list[Entry]) -> str:
    """What was submitted, for a terminal: `after` without the stages that another of them waits for."""
    rows = [("stage", "verb", "job", "", "asks for", "after")]
    before: dict[str, set[str]] = {}  # all stages that one waits for, also by way of others
    for entry in entries:
        stage, earlier = entry.stage, [before.get(name, set()) for name in entry.after]
        before[stage.name] = set(entry.after).union(*earlier)
        after = ", ".join(name for name in entry.after if not any(name in names for names in earlier))
        instead = f"instead of {entry.replaced}" if entry.replaced else ""
        note = f"kept, {entry.kept}" if entry.kept else instead
        rows.append((stage.name, stage.verb, entry.job, note, in_words(stage.resources), after))
    return as_table(rows)


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


def in_words(asked: Resources) -> str:
    """`2 nodes of 8 tasks, 8 GPUs and 64 CPUs, 24 h, gpu`."""
    tasks, gpus, (hours, minutes) = asked.tasks_per_node, asked.gpus_per_node, divmod(asked.time_minutes, 60)
    cpus = tasks * asked.cpus_per_task
    parts = [
        f"{asked.array} x " * (asked.array > 1),
        f"{asked.nodes} nodes of " * (asked.nodes > 1),
        f"{tasks} tasks, " * (tasks > 1),
        f"{gpus} GPU{'s' * (gpus > 1)}, " * bool(gpus),
        f"{cpus} CPU{'s' * (cpus > 1)}, ",
        f"{asked.memory_gb} GB, " * bool(asked.memory_gb),
        f"{hours} h {minutes:02}" if hours else f"{minutes} min",
        f", {asked.partition}" * bool(asked.partition),
    ]
    return "".join(parts)

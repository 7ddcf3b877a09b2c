"""The command `status`: the state of a run's stages, from the files that they and their jobs write.

RUN/recipe.json          the stages in order, and the command that runs them; of a recipe's run
RUN/stages/NAME.json     what became of a stage when it last ran, wherever that was
RUN/jobs/NAME/*/         submissions of a stage, or of a single verb that writes to RUN/NAME (slurm/jobs.py)
"""

import json
import os
import re
import shlex
import socket
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from slurm.jobs import ACTIVE, FAULTY, Job, Queue, latest_jobs
from slurm.submission import read_json, write_json

TAIL_LINES = 8
# What begins lines in a log that say nothing of the cause; torch puts the rank before the last words of a
# task.
MACHINERY = re.compile(r"(\[rank\d+\]: )?(submitit |srun: |slurm\.command\.CommandFailed)")


@dataclass(frozen=True)
class Row:
    """A stage: what `status` shows. `share` is the part that is done, `rate` in `unit`s per second."""

    stage: str
    verb: str
    state: str  # a job's (slurm.jobs.State), "skipped", "left out" or "not submitted"
    job: str | None = None
    attempt: int | None = None
    share: float | None = None
    rate: float | None = None
    unit: str = ""
    seconds_left: float | None = None
    elapsed_seconds: float | None = None
    note: str = ""
    out: str | None = None
    log: str | None = None  # of a fault: the stderr of the task that failed first
    command: str | None = None  # that submits it again; of a job that is no stage of a recipe


def write_recipe(run: Path, command: list[str], stages: list[dict[str, Any]], given: float) -> None:
    """Write `recipe.json`: the stages in order (`name`, `verb`, `out`, `left_out`), the command line that
    runs them, the folder it was given in, and when (Unix time)."""
    run.mkdir(parents=True, exist_ok=True)
    write_json(
        run / "recipe.json", {"command": command, "folder": os.getcwd(), "given": given, "stages": stages}
    )


def read_rows(run: Path, queue: Queue) -> list[Row]:
    """A row per stage of the run in `run`, or of the artefact `run` that one job made.

    Raises ValueError if nothing is known of it.
    """
    parent, names = run, None
    if not (run / "recipe.json").is_file() and not (run / "jobs").is_dir():
        parent, names = run.absolute().parent, {run.absolute().name}
    jobs = {
        name: job
        for name, job in latest_jobs(parent / "jobs", queue).items()
        if names is None or name in names
    }
    recipe = read_json(parent / "recipe.json") if names is None else {}
    stages = recipe.get("stages", [])
    if not jobs and not stages:
        raise ValueError(
            f"{run}: nothing was submitted to it; give the folder of a recipe's run, or the `out` of a job"
        )
    whole = jobs.pop("run", None)  # a recipe that runs as one job
    rows = [_stage_row(parent, stage, jobs.pop(stage["name"], None), whole) for stage in stages]
    for name, job in jobs.items():
        argv, out = job.submission.argv, job.submission.out
        row = _stage_row(parent, {"name": name, "verb": argv[0], "out": out}, job, None)
        rows.append(replace(row, command=shlex.join(["wordless", *argv, "--on", job.submission.place])))
    superseded = whole and not whole.alive and recipe.get("given", 0.0) > whole.submission.submitted
    return rows + ([_job_row("run", "run", whole)] if whole and not superseded else [])


def _stage_row(run: Path, stage: dict[str, Any], job: Job | None, whole: Job | None) -> Row:
    name, verb, out = stage["name"], stage["verb"], stage["out"]
    record = read_json(run / "stages" / f"{name}.json")
    made = _time_of(Path(out) / "meta.json") if out else None
    if made is None and "seconds" in record:  # of a stage that has no artefact of its own, the report
        made = record["began"] + record["seconds"] if verb == "report" else None
    if job and (job.alive or job.state == "done" or made is None or made < job.submission.submitted):
        row = _job_row(name, verb, job)
        if row.state == "done" and (why := _left_out(record)):
            return replace(row, state=why[0], note=why[1])
        if row.state == "done" and out and not Path(out).exists():
            return replace(row, state="not submitted", note="what it made has been removed")
        return replace(row, note=row.note or _last_metric(out)) if row.state in ("done", *ACTIVE) else row
    row = Row(name, verb, "not submitted", out=out)
    if made is not None:
        return replace(row, state="done", elapsed_seconds=record.get("seconds"), note=_last_metric(out))
    if (why := _left_out(record)) or stage.get("left_out"):
        state, note = why or ("skipped", "left out by --skip")
        return replace(row, state=state, note=note)
    if "failed" in record:
        return replace(row, state="stopped", note=next(iter(record["failed"].splitlines()), ""))
    if "pid" in record:  # begun, in a process of no job of its own
        within = whole if whole and whole.alive and record["began"] >= whole.submission.submitted else None
        if within:
            return replace(_job_row(name, verb, within), out=out)
        elapsed = time.time() - record["began"]
        if record["host"] != socket.gethostname():
            note = f"here, it was said on {record['host']}"
            return replace(row, state="running", elapsed_seconds=elapsed, note=note)
        if Path(f"/proc/{record['pid']}").exists():
            note = _last_metric(out) or f"process {record['pid']}"
            return replace(row, state="running", elapsed_seconds=elapsed, note=note)
        return replace(row, state="stopped", note="began, and did not come to its end")
    return row


def _left_out(record: dict[str, Any]) -> tuple[str, str] | None:
    """State and note of a stage that a recipe skipped or left out; None for any other."""
    if "left_out" in record:
        return "left out", next(iter(record["left_out"].splitlines()), "")
    return ("skipped", record["skipped"]) if "skipped" in record else None


def _job_row(name: str, verb: str, job: Job) -> Row:
    shown, now = job.decisive, time.time()
    tasks = [element.task for element in job.elements if element.task]
    running = [it.progress for it in job.elements if it.state == "running" and it.progress]
    shares = [1.0 if element.state == "done" else _share(element.progress) for element in job.elements]
    unit = running[0].get("unit", "") if running else ""
    rates = [p.get("rate") or 0.0 for p in running if p.get("unit", "") == unit]
    left = [p["seconds_left"] - (now - p["time"]) for p in running if p.get("seconds_left") is not None]
    pending = any(element.state in ("queued", "waiting", "requeued") for element in job.elements)
    note = shown.why or (running and (running[0].get("note") or running[0].get("what"))) or ""
    if len(job.elements) > 1:
        counts = Counter(element.state for element in job.elements if element.state != "done")
        others = [f"{number} {state}" for state, number in counts.items()]
        counted = ", ".join([f"{shares.count(1.0)} of {len(shares)} done", *others])
        note = f"{counted}; {note}" if note else counted
    ended = None if job.alive else max((task.ended or task.heartbeat for task in tasks), default=None)
    log = job.folder / f"{shown.job_id}_{shown.rank}_log.err"
    return Row(
        name,
        verb,
        job.state,
        job.submission.job_id,
        max((task.attempt for task in tasks), default=None),
        sum(shares) / len(shares) if any(shares) or (len(shares) > 1 and job.begun) else None,
        sum(rates) if running else None,
        unit,
        max(0.0, *left) if left and not pending else None,
        (ended or now) - min(task.began for task in tasks) if tasks else None,
        note,
        job.submission.out,
        str(log) if job.state in FAULTY else None,
    )


# The text


def show(run: Path, *, as_json: bool) -> tuple[str, bool]:
    """The status of a run for a terminal or as JSON, and whether no stage failed or is lost."""
    rows, command = read_rows(run, Queue()), _command(run)
    sound = not any(row.state in FAULTY for row in rows)
    if as_json:
        stages = [asdict(row) for row in rows]
        return json.dumps({"run": str(run), "sound": sound, "command": command, "stages": stages}), sound
    head = ("stage", "verb", "state", "job", "attempt", "done", "rate", "left", "elapsed", "")
    cells = [
        (
            row.stage,
            row.verb,
            row.state,
            row.job or "",
            f"{row.attempt or ''}",
            "" if row.share is None else f"{row.share:.0%}",
            "" if row.rate is None else f"{row.rate:,.1f} {row.unit}/s",
            duration(row.seconds_left),
            duration(row.elapsed_seconds),
            row.note,
        )
        for row in rows
    ]
    parts = [as_table([head, *cells])]
    parts += [_fault(run, row) for row in rows if row.state in FAULTY]
    ended = [row for row in rows if row.state in (*FAULTY, "stopped")]
    commands = dict.fromkeys(row.command or command for row in ended)
    if again := [f"  {line}" for line in commands if line]:
        parts.append("\n".join(["to go on from there, once the cause is gone:", *again]))
    return "\n\n".join(parts), sound


def as_table(rows: Iterable[Iterable[str]]) -> str:
    """Columns side by side, without those that are empty below their head."""
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    lines = (
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True))
        for line in zip(*columns, strict=True)
    )
    return "\n".join(line.rstrip() for line in lines)


def duration(seconds: float | None) -> str:
    """`12 s`, `3 min`, `1 h 05`, `2 d 03 h`; empty for None."""
    if seconds is None:
        return ""
    minutes, hours = round(seconds / 60), int(seconds / 3600)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02}" if hours < 48 else f"{hours // 24} d {hours % 24:02} h"


def tail(path: Path, lines: int) -> list[str]:
    """The last lines of a log, without control characters; none if there is no such file."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 400 * max(lines, 1)))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    kept = text.splitlines()[-lines:] if lines else []
    return ["".join(letter for letter in line if letter.isprintable() or letter == "\t") for line in kept]


def _fault(run: Path, row: Row) -> str:
    assert row.log is not None
    lines = [line for line in tail(Path(row.log), 3 * TAIL_LINES) if not MACHINERY.match(line)][-TAIL_LINES:]
    last = [f"  | {line}" for line in lines] or ["  | (nothing on stderr)"]
    more = shlex.join(["wordless", "logs", str(run), row.stage])
    return "\n".join(
        [
            f"{row.stage} {row.state} (job {row.job}): {row.note}",
            *last,
            f"  all of it: {more}",
            f"  in {row.log}",
        ]
    )


def _command(run: Path) -> str | None:
    """The recorded command line; with a `cd` if it was given in another folder, since paths may be
    relative."""
    recipe = read_json(run / "recipe.json")
    if "command" not in recipe:
        return None
    command = shlex.join(["wordless", *recipe["command"]])
    return command if recipe["folder"] == os.getcwd() else f"cd {shlex.quote(recipe['folder'])} && {command}"


def _share(progress: dict[str, Any]) -> float:
    return min(1.0, progress.get("done", 0.0) / max(progress.get("total") or 0.0, 1e-9)) if progress else 0.0


def _last_metric(out: str | None) -> str:
    """The last step and loss of a training run; empty for any other output."""
    try:
        with open(Path(out or "") / "metrics.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 8192))
            lines = file.read().splitlines()
    except OSError:
        return ""
    for line in reversed(lines):
        try:
            metrics = json.loads(line)
            return f"step {metrics['step']}, loss {metrics['loss']:.4g}"
        except (ValueError, KeyError, TypeError):  # cut off, or of a validation
            continue
    return ""


def _time_of(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None

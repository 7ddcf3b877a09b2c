"""Progress bars with a rate and a time left, for everything that may take longer than two seconds.

Where the environment has WORDLESS_PROGRESS=FILE (a job's), the same is kept in FILE as JSON, for whoever asks
how the job fares:

    {"what": "train hubert1", "done": 120.0, "total": 400.0, "unit": "step", "rate": 3.1, "seconds_left":
    90.3, "note": "loss 3.123",
     "time": 1795276474.1}

`rate` is per second since this process began; it and `seconds_left` are null until something is done; `time`
is Unix time.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

console = Console(stderr=True)
FILE_SECONDS = 2.0  # between two states of WORDLESS_PROGRESS


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed or 0.0
        return Text(f"{speed:,.1f} {task.fields['unit']}/s {task.fields['note']}")


@contextmanager
def progress(description: str, total: float, unit: str, done: float = 0.0) -> Iterator[Callable[..., None]]:
    """Yield `advance(amount, note=None)`; a note stays until the next. On a terminal a bar; elsewhere (logs,
    CI) a line at most every ten seconds.

    >>> with progress("decode", total=2, unit="file") as advance:
    ...     advance(1)
    ...     advance(1, note="loss 3.1")
    """
    path = os.environ.get("WORDLESS_PROGRESS")
    if path:
        with (
            _file(path, description, total, unit, done) as note_down,
            _shown(description, total, unit, done) as show,
        ):

            def advance(amount: float, note: str | None = None) -> None:
                show(amount, note)
                note_down(amount, note)

            yield advance
    else:
        with _shown(description, total, unit, done) as show:
            yield show


@contextmanager
def _shown(description: str, total: float, unit: str, done: float) -> Iterator[Callable[..., None]]:
    if not console.is_terminal:
        yield _line_printer(description, total, unit, done)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        _Rate(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        task = bars.add_task(description, total=total, unit=unit, note="")
        bars.update(task, completed=done)
        yield lambda amount, note=None: bars.update(
            task, advance=amount, **({} if note is None else {"note": note})
        )


def _line_printer(description: str, total: float, unit: str, done: float) -> Callable[..., None]:
    start = last = time.monotonic()
    count, began, latest = done, done, ""

    def advance(amount: float, note: str | None = None) -> None:
        nonlocal count, last, latest
        count += amount
        latest = latest if note is None else note
        now = time.monotonic()
        if now - last >= 10:
            last = now
            rate = (count - began) / (now - start)
            left = (total - count) / max(rate, 1e-9)
            text = (
                f"{description}: {100 * count / max(total, 1e-9):.0f}% {rate:,.1f} {unit}/s, {left:.0f} s "
                f"left {latest}"
            )
            print(text.rstrip(), file=sys.stderr, flush=True)

    return advance


@contextmanager
def _file(path: str, description: str, total: float, unit: str, done: float) -> Iterator[Callable[..., None]]:
    """Keep `path` up to date, at most every FILE_SECONDS, and at the end. Where it cannot be written the work
    goes on."""
    start = last = time.monotonic()
    count, latest = done, ""

    def write() -> None:
        rate = (count - done) / max(time.monotonic() - start, 1e-9)
        state = {
            "what": description,
            "done": float(count),
            "total": float(total),
            "unit": unit,
            "rate": float(rate) or None,
            "seconds_left": float(max(total - count, 0) / rate) if rate > 0 else None,
            "note": latest,
            "time": time.time(),
        }
        with suppress(OSError):  # the disk is full: what is written is not worth the work
            with open(f"{path}.tmp", "w", encoding="utf-8") as file:
                json.dump(state, file)
            os.replace(f"{path}.tmp", path)

    def advance(amount: float, note: str | None = None) -> None:
        nonlocal count, last, latest
        count += amount
        latest = latest if note is None else note
        now = time.monotonic()
        if now - last >= FILE_SECONDS:
            last = now
            write()

    write()
    try:
        yield advance
    finally:
        write()


def say(text: str) -> None:
    """Print a line on stderr, from rank 0 alone."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)

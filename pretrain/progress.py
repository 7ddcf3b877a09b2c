"""Progress bars with a rate and a time left, for everything that may take longer than two seconds."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

console = Console(stderr=True)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed or 0.0
        return Text(f"{speed:,.1f} {task.fields['unit']}/s {task.fields['note']}")


@contextmanager
def progress(description: str, total: float, unit: str, done: float = 0.0) -> Iterator[Callable[..., None]]:
    """Yield `advance(amount, note=None)`; a note stays until the next. On a terminal a bar; elsewhere (logs, CI) a line at most every ten seconds.

    >>> with progress("decode", total=2, unit="file") as advance:
    ...     advance(1)
    ...     advance(1, note="loss 3.1")
    """
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
        yield lambda amount, note=None: bars.update(task, advance=amount, **({} if note is None else {"note": note}))


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
            text = f"{description}: {100 * count / max(total, 1e-9):.0f}% {rate:,.1f} {unit}/s, {left:.0f} s left {latest}"
            print(text.rstrip(), file=sys.stderr, flush=True)

    return advance

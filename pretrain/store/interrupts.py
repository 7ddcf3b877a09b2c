"""Ctrl-C: the first one is Python's KeyboardInterrupt, or noted (pretrain/training/stopping.py); a second one
ends the process at once.

"At once" also while the main thread waits in a library for another rank, where no handler of Python's runs: a
thread reads which signals have come. What comes within a second of the first is the same Ctrl-C: torchrun
hands on what the terminal has sent already (three seconds where there is a launcher).

Worker processes ignore SIGINT, even while they start; their parent ends them.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any, NoReturn

INTERRUPTED = 130  # exit status after Ctrl-C: 128 + SIGINT


@contextmanager
def second_interrupt_ends() -> Iterator[None]:
    """Within, a second SIGINT ends the process with status 130; not where SIGINT is ignored, or others (or
    this) watch signals already."""
    ignored = signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, None)
    if ignored or threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    if before != -1:
        signal.set_wakeup_fd(before)
        os.close(reader)
        os.close(writer)
        yield
        return
    watch = threading.Thread(target=_watch, args=(reader,), name="interrupts", daemon=True)
    watch.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(-1)
        os.close(writer)
        watch.join(1.0)  # a forked child may have the other end
        if not watch.is_alive():
            os.close(reader)


def together_seconds() -> float:
    """How long after a Ctrl-C another SIGINT is still the same."""
    return 3.0 if "RANK" in os.environ else 1.0


def _watch(reader: int) -> None:
    first = None
    while numbers := os.read(reader, 64):
        for number in numbers:
            if number == signal.SIGINT:
                first = first or time.monotonic()
                if time.monotonic() > first + together_seconds():
                    if os.environ.get("RANK", "0") == "0":
                        tell("Ctrl-C: ended at once; what was saved before is there")
                    end_now()


def end_now() -> NoReturn:
    """End the process with status 130 and those that work for it; threads that still decode, say, are not
    waited for."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the same Ctrl-C, handed on
        sys.stdout.flush()
        sys.stderr.flush()
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(INTERRUPTED)


@contextmanager
def ends_in_a_line(what: str, *, resumes: bool) -> Iterator[None]:
    """Within, a Ctrl-C ends the command with status 130 and a line on how to go on, if none was printed where
    it was noted."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if not stop.args and os.environ.get("RANK", "0") == "0":
            how = (
                "run the same command again to go on from what is done"
                if resumes
                else "run the same command again to begin anew"
            )
            tell(f"{what}: stopped by Ctrl-C; {how}")
        raise SystemExit(INTERRUPTED) from None


def tell(text: str) -> None:
    """A line on stderr from where `print` might be interrupted in itself, below a progress bar, whose cursor
    is shown again."""
    os.write(2, (f"\033[?25h\r\n{text}\r\n" if sys.stderr.isatty() else f"{text}\n").encode())


class _Process(SpawnProcess):
    """Starts with SIGINT blocked, and so stays."""

    def start(self) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class IgnoringContext(SpawnContext):
    """multiprocessing's "spawn", whose processes ignore SIGINT."""

    Process = _Process


@contextmanager
def process_pool(
    workers: int, initializer: Callable[..., None] | None = None, arguments: Any = ()
) -> Iterator[ProcessPoolExecutor]:
    """A pool of fresh processes. Where the block fails, or a Ctrl-C leaves it, they are ended and not waited
    for."""
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, IgnoringContext(), initializer, arguments)
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in set(multiprocessing.active_children()) - others:
            child.terminate()
            child.join()
        raise
    pool.shutdown()

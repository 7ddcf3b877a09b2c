"""The process around the tasks of a local job: submitit's, which gives up after six attempts and ends tasks
by SIGINT alone.

SIGINT is ignored in whatever a background shell without job control starts, and then by everything below it.
So SIGTERM is what ends a local job: the tasks get it, have as long to save as before the end of their time,
and are then killed.
"""

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from submitit.local import local

from slurm.command import SIGNAL_AT

KILL_SECONDS = 1.0  # between SIGTERM and SIGKILL of a task whose time is over


class Controller(local.Controller):
    """Runs the tasks of the job in `folder` until none asks for another attempt."""

    def __init__(self, folder: Path, failure_grace_seconds: float):
        super().__init__(folder)
        self.failure_grace_seconds = failure_grace_seconds
        self.stopping, self.ends_at = False, float("inf")
        for number in (signal.SIGTERM, signal.SIGINT):
            # If the shell ignores SIGINT for this process, so does the process.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._stop)

    def _stop(self, *_: Any) -> None:
        self.stopping = True
        self.ends_at = min(self.ends_at, time.monotonic() + self.signal_delay_s)
        self._forward_signal(signal.SIGTERM)

    def wait(self, freq: int = 24) -> Sequence[int | None]:
        """Exit codes of the tasks, None for those that are still there when their time is over."""
        signalled = False
        while True:
            codes, now = [task.poll() for task in self.tasks], time.monotonic()
            if None not in codes or now >= self.ends_at:
                return codes
            if any(codes):
                self.ends_at = min(self.ends_at, now + self.failure_grace_seconds)
            if not signalled and now >= float(os.environ[SIGNAL_AT]):
                self._forward_signal(local.LocalJobEnvironment._usr_sig())
                signalled = True
            time.sleep(1 / freq)

    def kill_tasks(self) -> None:
        self._forward_signal(signal.SIGTERM)
        deadline = time.monotonic() + KILL_SECONDS
        while time.monotonic() < deadline and any(task.poll() is None for task in self.tasks):
            time.sleep(0.05)
        self._forward_signal(signal.SIGKILL)
        for task in self.tasks:
            task.wait()
        for file in (*self.stdouts, *self.stderrs):
            file.close()
        self.tasks, self.stdouts, self.stderrs = [], [], []

    def run(self, max_retry: int | None = None) -> None:
        """`max_retry` is ignored: a job may be preempted any number of times, and counts its timeouts
        itself."""
        codes: Sequence[int | None] = [local.LOCAL_REQUEUE_RETURN_CODE]
        while local.LOCAL_REQUEUE_RETURN_CODE in codes and not self.stopping:
            began = time.monotonic()
            self.ends_at = began + self.timeout_s
            os.environ[SIGNAL_AT] = str(began + self.timeout_s - self.signal_delay_s)
            try:
                self.start_tasks()
                if self.stopping:  # while they started
                    self._stop()
                codes = self.wait()
            finally:
                self.kill_tasks()


if __name__ == "__main__":
    Controller(Path(sys.argv[1]), float(sys.argv[2])).run()

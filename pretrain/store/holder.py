"""A process that holds a lock, as other processes on this machine and others know it."""

import os
import shlex
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Holder:
    """Who has a lock. `boot` and `started` (Linux) make host and pid unmistakable."""

    host: str
    pid: int
    since: float  # Unix time
    command: str = ""
    boot: str = ""
    started: str = ""

    @classmethod
    def me(cls) -> "Holder":
        pid = os.getpid()
        command = " ".join(shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]).split())[:200]
        return cls(socket.gethostname(), pid, time.time(), command, _boot(), _started(pid))

    @property
    def is_of_this_host(self) -> bool:
        return self.host == socket.gethostname()

    @property
    def is_of_this_machine(self) -> bool:
        """Whether flock knows about it: a container has another host name than its machine, a machine another
        id after each boot."""
        return self.is_of_this_host or (bool(self.boot) and self.boot == _boot())

    def lives(self) -> bool:
        """Of this host: whether that very process is there."""
        if self.boot != _boot() or self.started != _started(self.pid):
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # it is another user's
            return True
        return True

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on host {self.host}, since {since}" + (
            f" ({self.command})" if self.command else ""
        )


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:  # not Linux
        return ""


def _started(pid: int) -> str:
    """When a process started, in the kernel's ticks: numbers of processes come again. Empty where that is not
    known."""
    try:
        return (
            Path(f"/proc/{pid}/stat")
            .read_text(encoding="utf-8", errors="replace")
            .rpartition(")")[2]
            .split()[19]
        )
    except (OSError, IndexError):
        return ""

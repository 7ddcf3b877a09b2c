"""Recordings are examined in processes of their own, so that a hostile or broken one costs nothing but
itself.

A worker is this module run as a program. It reads lines of JSON, each a list of requests, and answers each
request with a line: what `probe_audio` found, or why the recording cannot be used. Its memory is limited, and
a recording's time: what a decoder does beyond either ends the worker and not `index`, which starts another.
This bounds what a file can use up; it is no sandbox against a decoder that has been taken over.

Time is the processor's, so that nothing is held against a recording on a busy machine; ten times as much may
pass in all, for disks that hang.
"""

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.data.audio import probe_audio
from pretrain.data.decoding.spans import Member

# Added to a recording's limit: sixty times what mp3 and ogg take here, the slowest to decode for their size.
SECONDS_PER_MB = 5.0
WAITING = 10.0  # times its limit may pass on the clock
LARGEST_CHUNK = 64  # recordings given to a worker at a time
# what a worker takes to start, and some: meanwhile those that run may finish a small corpus
STARTING_SECONDS = 0.25
NO_MEMORY = 77  # a worker's exit status

Probed = tuple[int, int, int]  # start, num_samples, sample_rate


class Request(NamedTuple):
    """The arguments of `probe_audio`."""

    path: str
    offset_seconds: float = 0.0
    duration_seconds: float | None = None
    num_samples: int | None = None
    decode: bool = True
    member: Member | None = None


class Limits(NamedTuple):
    """Of a worker's memory, and of a recording's time: `seconds`, and SECONDS_PER_MB for each MB of it."""

    memory_gb: float = 1.0
    seconds: float = 60.0


def probe_recordings(
    requests: Iterable[Request], count: int, num_workers: int, limits: Limits
) -> Generator[tuple[int, Probed | str], None, None]:
    """(number, what was found or the reason why it cannot be used) for each of `count` requests, as they are
    answered.

    Workers are started as long as there is work for them and ended with the iterator, which must be closed
    where it is left early.
    """
    pool = _Pool(iter(requests), count, num_workers, limits)
    try:
        yield from pool.answers()
    finally:
        pool.end()


class _Worker:
    """A process and the requests that it has not answered yet."""

    def __init__(self, limits: Limits):
        root = str(Path(__file__).resolve().parents[2])
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",  # threads would only take address space
        }
        # -P: no folder from which index is called lends its modules
        command = [sys.executable, "-P", "-m", "pretrain.data.probing", *map(str, limits)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        self.todo: deque[tuple[int, Request]] = deque()
        self.num_answered = 0
        self.has_started = False
        self._unread = b""

    def give(self, work: list[tuple[int, Request]]) -> None:
        assert self.process.stdin is not None and not self.todo
        self.todo.extend(work)
        try:
            self.process.stdin.write(json.dumps([request for _, request in work]).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:  # it has died; the end of its answers will tell
            pass

    def hear(self) -> list[tuple[int, Any]] | None:
        """New answers; None at their end."""
        assert self.process.stdout is not None
        data = os.read(self.process.stdout.fileno(), 1 << 16)
        if not data:
            return None
        *lines, self._unread = (self._unread + data).split(b"\n")
        if lines and not self.has_started:
            self.has_started = lines.pop(0) == b"ready"
        answers = [(self.todo.popleft()[0], json.loads(line)) for line in lines]
        self.num_answered += len(answers)
        return answers

    def end(self) -> int:
        """Kill it unless it has died; its exit status, or minus a signal."""
        self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # what it was given last was never read
                pipe.close()
        return self.process.wait()


class _Pool:
    """Workers, of which another is started for each one that dies. Everything happens in the caller's
    thread."""

    def __init__(self, requests: Iterator[Request], count: int, num_workers: int, limits: Limits):
        self._requests = enumerate(requests)
        self._num_left, self._num_workers, self._limits = count, num_workers, limits
        self._selector = selectors.DefaultSelector()

    @property
    def _workers(self) -> list[_Worker]:
        return [key.data for key in self._selector.get_map().values()]

    def answers(self) -> Iterator[tuple[int, Probed | str]]:
        started = 0.0
        while self._num_left or self._workers:
            now, running = time.monotonic(), len(self._workers)
            if self._num_left and running < self._num_workers and now >= started + STARTING_SECONDS:
                for _ in range(min(max(1, running), self._num_workers - running)):  # twice as many each time
                    self._start(self._chunk())
                started = now
            growing = self._num_left and len(self._workers) < self._num_workers
            for key, _ in self._selector.select(
                max(0.0, started + STARTING_SECONDS - now) if growing else None
            ):
                worker: _Worker = key.data
                heard = worker.hear()
                if heard is None:
                    yield from self._bury(worker)
                    continue
                yield from (
                    (number, answer if isinstance(answer, str) else tuple(answer)) for number, answer in heard
                )
                if not worker.todo:
                    if work := self._chunk():
                        worker.give(work)
                    else:
                        self._dismiss(worker)

    def _chunk(self) -> list[tuple[int, Request]]:
        """The next requests: fewer towards the end, so that all workers finish together."""
        size = min(LARGEST_CHUNK, max(1, self._num_left // (4 * self._num_workers)))
        work = list(islice(self._requests, size))
        self._num_left = self._num_left - len(work) if work else 0
        return work

    def _start(self, work: list[tuple[int, Request]]) -> None:
        if work:
            worker = _Worker(self._limits)
            assert worker.process.stdout is not None
            self._selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
            worker.give(work)

    def _dismiss(self, worker: _Worker) -> int:
        assert worker.process.stdout is not None
        self._selector.unregister(worker.process.stdout)
        return worker.end()

    def _bury(self, worker: _Worker) -> Iterator[tuple[int, str]]:
        """Blame the recording that a worker died of, and give what was left to another.

        A worker that had others before may have died of what those left behind: then the recording has
        another try, first of all.
        """
        with suppress(subprocess.TimeoutExpired):
            worker.process.wait(10)  # it has closed its end, and takes a moment to go
        status = self._dismiss(worker)
        if not worker.has_started:
            raise RuntimeError(
                f"a process to examine recordings in did not start (exit status {status}); it says why above"
            )
        assert worker.todo, "a worker without work waits for more"
        number, request = worker.todo[0]
        limit = time_limit(request, self._limits.seconds)
        late = {
            -signal.SIGPROF: f"takes more than {limit:.3g} s of the processor's time to decode "
            "(seconds_limit)",
            -signal.SIGALRM: f"takes more than {WAITING * limit:.3g} s to read (ten times seconds_limit)",
        }
        if status not in late and worker.num_answered:
            self._start(list(worker.todo))
            return
        if status == NO_MEMORY:
            reason = f"takes more than {self._limits.memory_gb:g} GB of memory to decode (memory_limit_gb)"
        elif status < 0:
            reason = f"ends the process that decodes it ({signal.Signals(-status).name})"
        else:
            reason = f"ends the process that decodes it (exit status {status})"
        yield number, late.get(status, reason)
        self._start(list(worker.todo)[1:])

    def end(self) -> None:
        for worker in self._workers:
            self._dismiss(worker)
        self._selector.close()


def time_limit(request: Request, seconds: float) -> float:
    """Seconds of the processor that a recording may take."""
    try:
        size = os.path.getsize(request.path) if request.member is None else request.member.size
    except (OSError, ValueError):  # not there, or no name for a file: found out soon
        size = 0
    return seconds + SECONDS_PER_MB * max(0, size) / 1e6


def main(memory_gb: float, seconds: float) -> None:
    """A worker: answer what comes on standard input until it ends."""
    answers = os.dup(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches us, too; who started us ends us
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)  # the end, wherever the decoder is
    _limit_memory(memory_gb)
    _answer(answers, b"ready\n")
    for descriptor in (1, 2):  # decoders complain to both
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    for line in sys.stdin.buffer:
        for path, offset, duration, num_samples, decode, member in json.loads(line):
            request = Request(
                path, offset, duration, num_samples, decode, None if member is None else Member(*member)
            )
            limit = time_limit(request, seconds)
            signal.setitimer(signal.ITIMER_PROF, limit)
            signal.setitimer(signal.ITIMER_REAL, WAITING * limit)
            try:
                found: Probed | str = probe_audio(*request)
            except MemoryError:
                os._exit(NO_MEMORY)
            except ValueError as error:
                found = str(error)
                if "malloc" in found:  # libsndfile's word for the same
                    os._exit(NO_MEMORY)
            for timer in (
                signal.ITIMER_PROF,
                signal.ITIMER_REAL,
            ):  # who started us may wait long before giving more
                signal.setitimer(timer, 0)
            _answer(answers, json.dumps(found).encode() + b"\n")


def _limit_memory(gigabytes: float) -> None:
    """Let the address space grow by so much beyond what Python and its libraries have taken."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash of the decoder's leaves no file behind
    pages = Path("/proc/self/statm")
    if not pages.is_file():  # macOS has no such limit
        return
    used = int(pages.read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
    limits = [limit for limit in resource.getrlimit(resource.RLIMIT_AS) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([used + int(gigabytes * 1e9), *limits]),) * 2)


def _answer(descriptor: int, line: bytes) -> None:
    while line:
        line = line[os.write(descriptor, line) :]


if __name__ == "__main__":
    main(float(sys.argv[1]), float(sys.argv[2]))

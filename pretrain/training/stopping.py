"""Stopping in time: a signal is noted, all ranks agree on it between two steps, and the process then ends as
that signal says.

SIGTERM (a preempting or closing machine, torchrun, `kill`), SIGUSR2 (the warning that slurm/ asks for before
the time limit) and SIGINT (Ctrl-C, which reaches every rank in the terminal) must not end a step half way,
and every rank must stop after the same one, or the others wait for it for ever. So the handlers only take the
signal down; a second Ctrl-C ends the process (pretrain/store/interrupts.py). At every boundary (after a step,
before each batch of a validation) the ranks exchange what they have, the greatest number wins, and each reads
the result at its next boundary: that costs a thread's work and no waiting, since the ranks are never further
apart than a step. The exchange goes over a gloo group of its own also where gradients go over NCCL, so no GPU
is waited for; a rank that dies is noticed there at once.
"""

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

import torch
import torch.distributed as dist

from pretrain.store.artefact import is_complete
from pretrain.store.interrupts import second_interrupt_ends, tell, together_seconds
from pretrain.store.lock import release_all
from pretrain.training.parallel import World, greetings_on_stderr, is_loss_of_a_rank

STOPPING = (signal.SIGTERM, signal.SIGUSR2)  # and SIGINT
# a signal that came when a run was as good as finished: the next one in this process stops at once
_unanswered = 0


class Stop:
    """A context that takes down STOPPING signals and SIGINT; `signal` is the number that all ranks have
    agreed on, else 0.

    Handlers are set in the main thread alone (Python has none elsewhere), not over a signal that is ignored,
    and those before them are back on leaving, however that comes about. Every rank must `check` equally
    often.
    """

    def __init__(self, world: World, timeout_seconds: float = 600.0):
        self.world, self.timeout = world, timedelta(seconds=timeout_seconds)
        self.signal = 0
        self._noted = 0
        self._interrupted = 0.0  # when the first Ctrl-C came, by the monotonic clock
        self._handlers: dict[int, Any] = {}
        self._watch = second_interrupt_ends()
        self._group: dist.ProcessGroup | None = None
        # one at most: under way since the last check
        self._exchange: tuple[dist.Work, torch.Tensor] | None = None

    def __enter__(self) -> Self:
        global _unanswered
        if self.world.size > 1:
            self.world.barrier()  # notices a dead rank at once; a new group would wait for it
            with greetings_on_stderr():
                self._group = dist.new_group(backend="gloo", timeout=self.timeout)
        self._noted, _unanswered = _unanswered, 0
        self._watch.__enter__()
        if threading.current_thread() is threading.main_thread():
            for number in (*STOPPING, signal.SIGINT):
                if signal.getsignal(number) not in (
                    signal.SIG_IGN,
                    None,
                ):  # None: set by other than Python, which cannot set it again
                    self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _unanswered
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
        self._watch.__exit__(None, None, None)
        if self._exchange is not None and error is None:
            self._finish_exchange()
        _unanswered = max(self._noted, self.signal)
        # World.leave ends the group, and must not find it held here (see there).
        self._group = self._exchange = None

    def _note(self, number: int, frame: object) -> None:
        self._noted = max(self._noted, number)
        if number != signal.SIGINT:
            return
        if self._interrupted and time.monotonic() > self._interrupted + together_seconds():
            raise KeyboardInterrupt  # where nobody watches, as in a notebook
        if not self._interrupted and self.world.rank == 0:
            tell("Ctrl-C: stops after this step and saves; once more, and it ends at once")
        self._interrupted = self._interrupted or time.monotonic()

    def check(self, wait: bool = False) -> bool:
        """A boundary: whether to stop here. With `wait` whatever any rank has noted by now counts, else by
        the last check."""
        if self.signal:
            return True
        if self._group is None:
            self.signal = self._noted
            return bool(self.signal)
        if self._exchange is not None:
            self._finish_exchange()
        if not self.signal:
            value = torch.tensor(self._noted)
            work = dist.all_reduce(value, dist.ReduceOp.MAX, group=self._group, async_op=True)
            assert work is not None
            self._exchange = work, value
            if wait:
                self._finish_exchange()
        return bool(self.signal)

    def _finish_exchange(self) -> None:
        assert self._exchange is not None
        (work, value), self._exchange = self._exchange, None
        work.wait()
        self.signal = int(value)

    def pass_on(self, run: Path, step: int) -> NoReturn:
        """Say what stopped the run after `step`, and let the signal do to the process what it would have
        done: end it, or whatever the handler does that was there before. SystemExit with 128 + its number
        where that returns."""
        global _unanswered
        assert self.signal
        assert not self._handlers
        _unanswered = 0
        by_hand = self.signal == signal.SIGINT
        if self.world.rank == 0:
            where = (
                f"after step {step}, saved; the same command goes on from there"
                if step
                else "before its first step"
            )
            if by_hand:
                where = (
                    f"after step {step}, saved; run the same command again to go on from step {step}"
                    if step
                    else where
                )
            name = "Ctrl-C" if by_hand else signal.Signals(self.signal).name
            print(f"{run}: stopped by {name} {where}", file=sys.stderr)
        try:
            _hand_on(self.signal)
        except KeyboardInterrupt:
            # with a text: the user knows
            raise KeyboardInterrupt(f"{run}: stopped after step {step}") from None


def _hand_on(number: int) -> NoReturn:
    """Let a signal do what it does without us; SystemExit where its handler returns."""
    sys.stdout.flush()  # a signal's default action does not
    sys.stderr.flush()
    release_all()  # nor that
    handler = signal.getsignal(number)
    if number == signal.SIGINT and callable(handler):
        handler(number, sys._getframe())  # raised again it would count as the second Ctrl-C
    else:
        signal.raise_signal(number)
    raise SystemExit(128 + number)


def answer_late() -> None:
    """Pass on a signal that came when a training was as good as finished: for who goes on in this process
    with anything else."""
    global _unanswered
    number, _unanswered = _unanswered, 0
    if number:
        _hand_on(number)


@contextmanager
def lost_ranks_told(run: Path, world: World, newest: Callable[[], Path | None]) -> Iterator[None]:
    """Turn what a communication library throws when a rank died, or did not answer within the timeout, into a
    ConnectionError that says so, names the `newest` checkpoint (which is not read: a launcher may give little
    time) and what to do."""
    try:
        yield
    except RuntimeError as error:
        if world.size == 1 or not is_loss_of_a_rank(error):
            raise
        if is_complete(run):  # the other one died while all were leaving
            print(f"{run}: finished, but rank {world.rank} lost another one on leaving", file=sys.stderr)
            return
        raise ConnectionError(
            f"{run}: rank {world.rank} of {world.size} lost another one, which died or did not answer within "
            "training.collective_timeout_seconds; its own message tells why, if it had time for one. The "
            f"last checkpoint: {newest() or 'none yet'}; the same command goes on from there "
            f"({' '.join(str(error).split())[:300]})"
        ) from None

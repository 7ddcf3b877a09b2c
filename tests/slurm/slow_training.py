"""wordless as the tests' jobs run it: each step of training takes STEP_SECONDS longer, so that things can
happen in its middle."""

import os
import signal
import time
from functools import partial

import wordless.cli
from pretrain.objectives.hubert import HubertTask


def main(argv: list[str]) -> int:
    before_step, seconds = HubertTask.before_step, float(os.environ["STEP_SECONDS"])

    def rest_before_step(task: HubertTask, step: int) -> None:
        time.sleep(seconds)
        before_step(task, step)

    HubertTask.before_step = rest_before_step  # type: ignore[method-assign]
    return wordless.cli.main(argv)


class _Late:
    """Signals its own process while Python takes down its modules, when handlers no longer run."""

    def __init__(self) -> None:
        self.signal = partial(os.kill, os.getpid(), signal.SIGTERM)

    def __del__(self) -> None:
        self.signal()


def told_to_stop_too_late(argv: list[str]) -> int:
    globals()["late"] = _Late()
    return 0

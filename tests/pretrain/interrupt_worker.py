"""`wordless` with a stand-in for what `pretrain` does, for signals from outside.

python tests/pretrain/interrupt_worker.py pretrain CONFIG.toml
"""

import ctypes
import os
import time
from pathlib import Path
from typing import Any, Literal

from pretrain.config import Config
from pretrain.store.interrupts import process_pool
from wordless.verbs import VERBS, Verb


class StandInConfig(Config):
    out: str
    how: Literal["steps", "stuck", "pool"] = "steps"
    seconds: float = 0.02


def stand_in(config: StandInConfig) -> dict[str, Any]:
    """A hundred steps of 20 ms; one step that waits in C for ever; or processes that are at work for a
    minute."""
    if config.how == "pool":
        with process_pool(2) as pool:
            started = [pool.submit(work, config.out) for _ in range(20)]
            return {"pids": [future.result() for future in started]}

    import torch

    from tests.pretrain.linear_task import LinearTask, run_linear

    torch.set_num_threads(1)

    def on_step(step: int) -> None:
        if config.how == "stuck" and step == 3:
            (Path(config.out) / "stuck").touch()
            mutex = ctypes.create_string_buffer(64)
            for _ in range(2):
                ctypes.CDLL(None).pthread_mutex_lock(mutex)
        time.sleep(config.seconds)

    task = LinearTask(dropout=0.3, num_valid=2, on_step=on_step)
    return run_linear(
        Path(config.out),
        task,
        {"max_steps": 100, "log_every": 1, "checkpoint_every": 50, "validate_every": 40},
    )


def work(out: str) -> int:
    Path(out).mkdir(parents=True, exist_ok=True)
    (Path(out) / str(os.getpid())).touch()
    time.sleep(60)
    return os.getpid()


def stand_in_for_pretrain() -> None:
    """In this process, which is not one of the tests."""
    VERBS["pretrain"] = Verb(
        "tests.pretrain.interrupt_worker",
        "StandInConfig",
        "stand_in",
        "A stand-in.",
        distributed=True,
        resumes=True,
    )


def main(argv: list[str]) -> int:
    """What a job runs."""
    import wordless.cli

    stand_in_for_pretrain()

    return wordless.cli.main(argv)


if __name__ == "__main__":
    from wordless.cli import entry_point

    stand_in_for_pretrain()
    entry_point()

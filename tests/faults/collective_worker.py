"""What test_collective runs under torchrun, in two processes: training runs, one after another, in one of
which rank 1 is lost.

python -m torch.distributed.run --nproc_per_node 2 tests/faults/collective_worker.py FOLDER RUN=SIGNAL ...
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch

from tests.pretrain.linear_task import LinearTask, run_linear

TIMEOUT_SECONDS = 8.0


def main(run: Path, number: int) -> None:
    """Train; rank 1 sends itself the signal before step 7 (the last checkpoint is of step 4), unless it has
    done so before."""

    def lose(step: int) -> None:
        if number and step == 7 and os.environ["RANK"] == "1":
            (run / "lost").write_text(str(time.time()))
            os.kill(os.getpid(), number)

    task = LinearTask(dropout=0.3, num_valid=3, on_step=lose)
    run_linear(run, task, {"collective_timeout_seconds": TIMEOUT_SECONDS}, clip_norm=0.5)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for argument in sys.argv[2:]:
        name, _, named = argument.partition("=")
        main(Path(sys.argv[1]) / name, int(signal.Signals[named]) if named else 0)

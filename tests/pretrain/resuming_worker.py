"""What test_resuming runs under torchrun, in two processes: runs that are resumed while rank 1 cannot trust
what it reads.

python -m torch.distributed.run --nproc_per_node 2 tests/pretrain/resuming_worker.py FOLDER
"""

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from pretrain.training import checkpoint
from tests.pretrain.linear_task import ScoredTask, run_linear

RANK = int(os.environ.get("RANK", "0"))
SCORES = [5.0, 3.0, 4.0, 4.0, 4.0, 4.0]  # of steps 2, 4, … 12: the best is that of step 4
SETTINGS: dict[str, Any] = {"validate_every": 2, "keep_best": True, "checkpoint_every": 2}


def session(run: Path, power_cut: int | None = None, **training: Any) -> str:
    """Train up to the step before which the power is cut; what a refusal says."""

    def fail(step: int) -> None:
        if step == power_cut:
            raise ZeroDivisionError

    try:
        run_linear(
            run, ScoredTask(SCORES, dropout=0.3, on_step=fail), {**SETTINGS, **training}, ("valid_score",)
        )
    except (ValueError, ZeroDivisionError) as error:
        gc.collect()
        return str(error)
    return ""


def main(folder: Path) -> None:
    session(folder / "whole")
    session(folder / "cut", power_cut=8)
    read: list[str] = []
    sha256_file = checkpoint.sha256_file

    def misread(path: Path) -> str:
        """Rank 1 finds every file damaged."""
        read.append(f"{path.parent.name}/{path.name}")
        return sha256_file(path) if RANK == 0 else "0" * 64

    checkpoint.sha256_file = misread  # type: ignore[assignment]
    refusal = session(folder / "cut", log_every=3)
    session(folder / "cut", power_cut=8)  # up to where it was
    (folder / f"{RANK}.json").write_text(json.dumps({"refusal": refusal, "read": read}))
    session(folder / "cut")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))

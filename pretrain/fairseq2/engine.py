"""The engine `fairseq2` of pretrain/training/engine.py: imports fairseq2 once it is known to be there."""

from typing import Any

from pretrain.fairseq2.available import require_fairseq2
from pretrain.training.run import Run


def train(run: Run) -> dict[str, Any]:
    """Trains `run` under fairseq2's trainer, with the results of our own engine. Raises ValueError if
    fairseq2 is missing."""
    require_fairseq2('training.engine = "fairseq2"')
    from pretrain.fairseq2.training import train_with_fairseq2

    return train_with_fairseq2(run)
